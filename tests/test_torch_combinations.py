"""What people combine with an optimizer, with one backup worker and ranks that are late in turn: one history for all.

Each case trains through random delays; whatever has state (weights, optimizer, schedulers, scaler, averages) must end
bit for bit the same on all ranks, late ones too, and the loss must have come down.
"""

import hashlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hvd_backup._core_testing import HostDevice
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import hvd_backup.torch as hvd
from hvd_backup import faults
from tests.delayed_transfers import DelayedTransfers, HostLibrary, use
from tests.launch import run_ranks
from tests.torch_training import batch, digest, loss_of, make_model

STEPS = 24
Setup = Callable[["Case"], None]


class Case:
    """One training: what a setup function may change before it runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: torch.nn.Module = make_model()
        self.make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)
        self.options: dict[str, Any] = {"backup_workers": 1}
        self.passes = 1
        self.after_making: list[Callable[[Any], None]] = []
        self.stateful: list[Any] = []
        self.scaler: Any = None
        self.loss: Callable[[int, int], torch.Tensor] = lambda rank, step: loss_of(self.model, batch(rank, step))
        self.between_rounds: Callable[[Any], None] = lambda optimizer: None

    def run(self) -> dict[str, Any]:
        rank = hvd.rank()
        optimizer = hvd.DistributedOptimizer(
            self.make(p for p in self.model.parameters() if p.requires_grad or self.name == "frozen layers"),
            backward_passes_per_step=self.passes,
            **self.options,
        )
        for prepare in self.after_making:
            prepare(optimizer)
        losses: list[float] = []
        scales: list[float] = []

        def record(update: Any) -> None:
            losses.append(update.metrics["loss"])
            scales.append(1.0 if self.scaler is None else self.scaler.get_scale())

        optimizer.on_update(record)
        for _ in range(2):
            for number in hvd.follow(range(STEPS // 2 * self.passes), optimizer):
                if number % self.passes == 0:
                    optimizer.zero_grad()
                loss = self.loss(rank, number)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
                if number % self.passes == self.passes - 1:
                    optimizer.metrics(loss=loss)
                    if self.scaler is None:
                        optimizer.step()
                    else:
                        self.scaler.step(optimizer)
                        self.scaler.update()
            self.between_rounds(optimizer)
        states = [pickle.dumps(thing) for thing in (self.flat(each) for each in self.stateful)]
        return {
            "digest": digest(self.model, optimizer),
            "states": [hashlib.sha256(state).hexdigest() for state in states],
            "steps": optimizer.global_step,
            "dropped": optimizer.counters()["dropped"],
            "losses": losses,
            "scales": scales,
            "error": self.error(),
        }

    def error(self) -> float:
        """On data that nobody has trained on."""
        with torch.no_grad():
            return sum(self.loss(0, 7 * step).item() for step in range(1000, 1010))

    @staticmethod
    def flat(thing: Any) -> Any:
        if isinstance(thing, torch.nn.Module):
            return [value.numpy().tobytes() for value in thing.state_dict().values()]
        return repr(sorted((k, repr(v)) for k, v in thing.state_dict().items() if not k.startswith("_get_lr")))


def clip_norm(case: Case) -> None:
    def clip(update: Any) -> None:
        torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.5)

    case.after_making.append(lambda optimizer: optimizer.on_update(clip, when="before"))


def clip_value(case: Case) -> None:
    def clip(update: Any) -> None:
        torch.nn.utils.clip_grad_value_(case.model.parameters(), 0.05)

    case.after_making.append(lambda optimizer: optimizer.on_update(clip, when="before"))


def change_between(case: Case, change: Callable[[list[torch.Tensor]], object]) -> None:
    """Horovod's way; late ranks get what the contributors have made of the gradient."""

    def patch(optimizer: Any) -> None:
        step = optimizer.step

        def changed() -> None:
            optimizer.synchronize()
            change(list(case.model.parameters()))
            with optimizer.skip_synchronize():
                step()

        optimizer.step = changed

    case.after_making.append(patch)


def clip_between(case: Case) -> None:
    change_between(case, lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.3))


def clip_value_between(case: Case) -> None:
    change_between(case, lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.05))


def clip_between_compressed(case: Case) -> None:
    case.options.update(compression=hvd.Compression.fp16, gradient_predivide_factor=2.0)
    clip_between(case)


def replace_between(case: Case) -> None:
    """p.grad becomes another tensor, and one is taken away."""

    def change(parameters: list[torch.Tensor]) -> None:
        for parameter in parameters[1:]:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.clamp(-0.05, 0.05)
        parameters[0].grad = None

    change_between(case, change)


def overflowing(case: Case, scaler: Any) -> None:
    def loss(rank: int, step: int) -> torch.Tensor:
        value = loss_of(case.model, batch(rank, step))
        if step % 7 == 3 and rank == step % 4:
            last = list(case.model.parameters())[-1]  # whose gradient is Inf; the others are finite, nothing is NaN
            value = value + (1 + last - last.detach()).sum() * float("inf")
        return value

    case.loss = loss
    case.scaler = scaler
    case.stateful.append(scaler)


def grad_scaler(case: Case) -> None:
    """Whoever contributes Inf spoils an update; it is skipped on all ranks, and the scale halved on all."""
    overflowing(case, torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5))
    case.after_making.append(lambda optimizer: optimizer.register_scaler(case.scaler))


def grad_scaler_and_clipping(case: Case) -> None:
    grad_scaler(case)
    clip_norm(case)


def grad_scaler_of_horovod(case: Case) -> None:
    """synchronize, unscale, clip, step in skip_synchronize. Clipping by value hides that Inf was there."""

    class Scaler:
        """The recipe, where a script writes scaler.step(optimizer)."""

        def __init__(self) -> None:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.scaler, name)

        def step(self, optimizer: Any) -> None:
            optimizer.synchronize()
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_value_(case.model.parameters(), 0.05)
            with optimizer.skip_synchronize():
                self.scaler.step(optimizer)

    overflowing(case, Scaler())
    if case.options["backup_workers"]:
        case.after_making.append(lambda optimizer: optimizer.register_scaler(case.scaler.scaler))


def grad_scaler_of_horovod_without_backup_workers(case: Case) -> None:
    """A skipped step leaves nothing behind."""
    case.options["backup_workers"] = 0
    grad_scaler_of_horovod(case)


def bfloat16(case: Case) -> None:
    def loss(rank: int, step: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss_of(case.model, batch(rank, step))

    case.loss = loss


def average(case: Case) -> None:
    averaged = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    case.stateful.append(averaged)
    case.after_making.append(lambda o: o.on_update(lambda update: averaged.update_parameters(case.model)))


def accumulation(case: Case) -> None:
    case.passes = 3


def later_group(case: Case) -> None:
    late = torch.nn.Linear(6, 3)
    with torch.no_grad():
        for parameter in late.parameters():
            parameter.fill_(0.01)
    body = case.model
    case.model = torch.nn.ModuleDict({"body": body, "late": late})
    late.requires_grad_(False)

    def loss(rank: int, step: int) -> torch.Tensor:
        x, y = batch(rank, step)
        return torch.nn.functional.mse_loss(body(x) + late(x), y)

    def thaw(optimizer: Any) -> None:
        if not next(late.parameters()).requires_grad:
            late.requires_grad_(True)
            optimizer.add_param_group({"params": late.parameters(), "lr": 0.02})

    case.loss, case.between_rounds = loss, thaw


def frozen(case: Case) -> None:
    case.model[0].requires_grad_(False)  # type: ignore[index]


def unused(case: Case) -> None:
    body = case.model
    case.model = torch.nn.ModuleDict({"body": body, "unused": torch.nn.Linear(3, 3)})
    case.loss = lambda rank, step: loss_of(body, batch(rank, step))


def fp16(case: Case) -> None:
    case.options["compression"] = hvd.Compression.fp16


def groups(case: Case) -> None:
    case.options["groups"] = 2


def sparse(case: Case) -> None:
    words = torch.nn.Embedding(9, 6, sparse=True)
    torch.nn.init.constant_(words.weight, 0.1)
    case.model = words
    head = make_model()
    case.make = lambda parameters: torch.optim.SparseAdam(list(parameters), lr=0.1)

    def loss(rank: int, step: int) -> torch.Tensor:
        x, y = batch(rank, 0)
        return torch.nn.functional.mse_loss(head(x + words(torch.arange(8) % (2 + rank))), y)

    case.loss = loss


def with_optimizer(kind: Any) -> Setup:
    def setup(case: Case) -> None:
        case.make = lambda parameters: kind(
            [p for p in parameters if kind is not torch.optim.Muon or p.ndim == 2],
            lr=1.0 if kind is torch.optim.Adadelta else 0.01,
        )

    return setup


def with_scheduler(make: Callable[[Any], Any]) -> Setup:
    def setup(case: Case) -> None:
        def prepare(optimizer: Any) -> None:
            scheduler = make(optimizer)
            case.stateful.append(scheduler)
            optimizer.register_scheduler(scheduler)

        case.after_making.append(prepare)

    return setup


def plateau(case: Case) -> None:
    def prepare(optimizer: Any) -> None:
        scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=1, factor=0.7, threshold=0.1)
        case.stateful.append(scheduler)
        optimizer.on_update(lambda update: scheduler.step(update.metrics["loss"]))

    case.after_making.append(prepare)


def by_epoch(case: Case) -> None:
    """Stepped between rounds, as most scripts do."""

    def prepare(optimizer: Any) -> None:
        scheduler = schedulers.StepLR(optimizer, step_size=1, gamma=0.5)
        case.stateful.append(scheduler)
        case.between_rounds = lambda optimizer: scheduler.step()

    case.after_making.append(prepare)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.98**step),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.97),
    "StepLR": lambda o: schedulers.StepLR(o, 5, 0.7),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [4, 9], 0.7),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.3, total_iters=7),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.97),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 6),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.06, 4),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.06, total_steps=STEPS + 1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.95)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 3), schedulers.ExponentialLR(o, 0.95)], o
    ),
}
OPTIMIZERS = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax"),
    *("Muon", "NAdam", "RAdam", "RMSprop", "Rprop"),
]

SETUPS: dict[str, Setup] = {
    "clip by norm": clip_norm,
    "clip by value": clip_value,
    "clip between synchronize and step": clip_between,
    "clip by value between": clip_value_between,
    "clip between, compressed": clip_between_compressed,
    "other gradients between": replace_between,
    "GradScaler": grad_scaler,
    "GradScaler and clipping": grad_scaler_and_clipping,
    "GradScaler as with Horovod": grad_scaler_of_horovod,
    "GradScaler as with Horovod, b = 0": grad_scaler_of_horovod_without_backup_workers,
    "bfloat16 autocast": bfloat16,
    "moving average": average,
    "accumulation": accumulation,
    "group added later": later_group,
    "frozen layers": frozen,
    "unused parameters": unused,
    "fp16 compression": fp16,
    "groups": groups,
    "sparse gradients": sparse,
    "ReduceLROnPlateau": plateau,
    "scheduler by epoch": by_epoch,
    **{name: with_scheduler(make) for name, make in SCHEDULERS.items()},
    **{name: with_optimizer(getattr(torch.optim, name)) for name in OPTIMIZERS if hasattr(torch.optim, name)},
}


COMPARED = [
    *("clip by norm", "clip between synchronize and step", "GradScaler", "bfloat16 autocast", "accumulation"),
    *("fp16 compression", "StepLR", "Adam"),
]


# How gradients travel on each rank: "host": as if they lay on a GPU, with the GPU library or without it; "direct": the
# engine has the GPU, and exchanges data with those of the others that have.
PLANES = {
    "on the CPU": ("", "", "", ""),
    "half of them through host memory": ("", "host", "", "host without the library"),
    "all from GPU to GPU": ("direct", "direct", "direct", "direct"),
    "all but one from GPU to GPU": ("direct", "direct", "host", "direct"),
}


def run_cases(names: list[str], planes: str = "on the CPU", folder: str = "") -> dict[str, dict[str, Any]]:
    """folder: where stand-ins for GPUs exchange data."""
    faults.inject(
        faults.Delay(rank="rotate:5", ms=9, p=0.6, seed=1),
        faults.Delay(rank="*", ms=3, p=0.3, distribution="exponential", seed=2),
    )
    hvd.init()
    plane = PLANES[planes][hvd.rank()]
    device = HostDevice(folder, hvd.rank() + 1) if plane == "direct" else None
    if plane:
        use(DelayedTransfers(device=device), library=None if "without" in plane else HostLibrary)
    outcomes = {}
    for name in names:
        case = Case(name)
        SETUPS[name](case)
        outcomes[name] = case.run()
        hvd.barrier()
        if name in COMPARED:
            reference = Case(name)
            SETUPS[name](reference)
            reference.options["backup_workers"] = 0
            outcomes[name]["error with b = 0"] = reference.run()["error"]
            hvd.barrier()
        outcomes[name]["exchanges"] = 0 if device is None else device.exchanges
    return outcomes


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, dict[str, Any]]]:
    """What each of four ranks ended with, in each case: all in one program."""
    return run_ranks(4, run_cases, [list(SETUPS)], timeout_s=240)


@pytest.mark.parametrize("name", SETUPS)
def test_all_ranks_end_with_the_same_bits(name: str, outcomes: list[dict[str, dict[str, Any]]]) -> None:
    check_same(name, outcomes)


def check_same(name: str, outcomes: list[dict[str, dict[str, Any]]]) -> None:
    """All ranks have made the same updates, and those have trained the model."""
    of_rank = [outcome[name] for outcome in outcomes]
    first = of_rank[0]
    for other in of_rank[1:]:
        for key in ("digest", "states", "steps", "losses", "scales"):
            assert other[key] == first[key], key
    assert first["steps"] == STEPS
    if "b = 0" not in name:
        assert sum(each["dropped"] for each in of_rank) > 0, "nobody was ever late"
    finite = [loss for loss in first["losses"] if loss < float("inf")]
    assert sum(finite[-4:]) < sum(finite[:4])


STAGED = [
    *("clip by norm", "clip between, compressed", "other gradients between", "GradScaler as with Horovod"),
    *("accumulation", "group added later", "unused parameters", "groups", "sparse gradients", "Adam"),
]


@pytest.fixture(scope="module", params=list(PLANES)[1:])
def outcomes_on_gpus(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, dict[str, Any]]]:
    """The same where gradients lie on stand-ins for GPUs (test_torch_staging.py, test_engine_device.py)."""
    return run_ranks(4, run_cases, [STAGED, request.param, str(tmp_path_factory.mktemp("gpus"))], timeout_s=240)


@pytest.mark.parametrize("name", STAGED)
def test_gradients_on_gpus_end_with_the_same_bits_on_all_ranks(
    name: str, outcomes_on_gpus: list[dict[str, dict[str, Any]]]
) -> None:
    check_same(name, outcomes_on_gpus)


def test_gpus_have_exchanged_data(outcomes_on_gpus: list[dict[str, dict[str, Any]]], request: Any) -> None:
    planes = PLANES[request.node.callspec.params["outcomes_on_gpus"]]
    for rank, plane in enumerate(planes):
        exchanges = max(outcome["exchanges"] for outcome in outcomes_on_gpus[rank].values())
        assert (exchanges > 100) == (set(planes) == {"direct"}), (rank, plane, exchanges)


@pytest.mark.parametrize("name", COMPARED)
def test_accuracy_is_that_of_waiting_for_all(name: str, outcomes: list[dict[str, dict[str, Any]]]) -> None:
    """Of four gradients one is left out now and then, so results differ by noise."""
    outcome = outcomes[0][name]
    assert outcome["error"] == pytest.approx(outcome["error with b = 0"], rel=0.25)


def test_updates_that_overflow_are_skipped_everywhere(outcomes: list[dict[str, dict[str, Any]]]) -> None:
    for name in (case for case in SETUPS if "GradScaler" in case):
        losses, scales = outcomes[0][name]["losses"], outcomes[0][name]["scales"]
        assert len(set(scales)) > 1, f"{name}: the scale never changed"
        if "b = 0" in name:
            assert len(losses) < STEPS, "a skipped update runs no functions of on_update"
        else:
            overflows = [number for number, loss in enumerate(losses) if loss == float("inf") and number > 0]
            assert overflows, f"{name}: no update overflowed"
            assert all(scales[number] == scales[number - 1] / 2 for number in overflows)
