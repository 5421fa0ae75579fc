"""Misuses of hvd_backup.torch in a training program, three ranks. See tests/misuse.py."""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch

import hvd_backup.torch as hvd
from tests.misuse import Gets, Scene, table_of
from tests.torch_training import batch, loss_of, make_model

misuse = table_of("torch")

MAKING = "Making the optimizer"
RANKS = "Ranks that differ"
STEP = "A step"
CHANGES = "A model that changes during training"
LOOP = "The loop: `follow`"
LATER = "Numbers that go wrong"
TENSORS = "Tensors of PyTorch in collectives"


def bytes_of(*modules: torch.nn.Module) -> bytes:
    tensors = [p.detach().contiguous() for module in modules for p in module.parameters()]
    return b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)


def wrap(model: torch.nn.Module, optimizer: Any = None, **options: Any) -> Any:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return hvd.DistributedOptimizer(optimizer, model.named_parameters(), **options)


def backward(model: torch.nn.Module, number: int = 0) -> None:
    loss_of(model, batch(hvd.rank(), number)).backward()


def step(model: torch.nn.Module, optimizer: Any, number: int = 0) -> None:
    optimizer.zero_grad()
    backward(model, number)
    optimizer.step()


def trained(scene: Scene, **options: Any) -> tuple[Any, Any]:
    """A model after two updates."""
    model = make_model()
    optimizer = wrap(model, **options)
    for number in range(2):
        step(model, optimizer, number)
    hvd.barrier()
    scene.weights = lambda: bytes_of(model)
    return model, optimizer


def odd() -> bool:
    return hvd.rank() == 1


# --- making the optimizer ---


def refused(name: str, wrong: str, kind: str, told: str, **options: Any) -> None:
    """A case: DistributedOptimizer with an option that cannot be used."""

    def run(scene: Scene) -> None:
        model = make_model()
        scene.weights = lambda: bytes_of(model)
        with scene.misuse():
            wrap(model, **options)

    run.__name__ = name
    misuse(MAKING, wrong, kind, told)(run)


refused(
    "more_than_there_are",
    "`backup_workers=3` with 3 ranks",
    "ConfigError",
    "there are 3 ranks, of which one must",
    backup_workers=3,
)
refused(
    "a_share_above_one",
    "`backup_workers=1.5`",
    "ConfigError",
    "backup_workers=1.5: expected an integer >= 0, a",
    backup_workers=1.5,
)
refused(
    "backup_true",
    "`backup_workers=True`",
    "ConfigError",
    "backup_workers=True: expected an integer >= 0, a",
    backup_workers=True,
)
refused(
    "nonfinite_unknown",
    '`nonfinite="ignore"`',
    "ConfigError",
    'nonfinite=\'ignore\': expected "pass" or "drop"',
    nonfinite="ignore",
)
refused(
    "nonfinite_arrives_first",
    '`nonfinite="drop", arrive="first"`',
    "ConfigError",
    "a rank arrives with that: leave arrive out",
    nonfinite="drop",
    arrive="first",
)
refused(
    "least_above_size",
    '`backup_workers="auto", min_contributors=4`',
    "ConfigError",
    "min_contributors=4, but there are 3 ranks",
    backup_workers="auto",
    min_contributors=4,
)
refused("grace_negative", "`grace=-1`", "ConfigError", "grace=-1: expected a number of seconds >= 0", grace=-1)
refused("grace_nan", '`grace=float("nan")`', "ConfigError", "grace=nan: expected a number of", grace=float("nan"))
refused("misses_huge", "`max_misses=10**30`", "ConfigError", "max_misses=", max_misses=10**30)
refused("stale", "`max_staleness=2`", "ConfigError", "cannot be used yet, only dropped or carried", max_staleness=2)
refused("late_keep", '`late="keep"`', "ConfigError", 'late=\'keep\': expected "drop" or "carry"', late="keep")
refused("lag_zero", "`max_lag=0`", "ConfigError", 'max_lag=0: expected an integer >= 1, or "auto"', max_lag=0)
refused("lag_huge", "`max_lag=10**30`", "ConfigError", "max_lag=", max_lag=10**30)
refused("scope_layer", '`scope="layer"`', "ConfigError", 'expected "step" or "bucket"', scope="layer")
refused("arrive_never", '`arrive="never"`', "ConfigError", 'expected "first" or "last"', arrive="never")
refused("policy_unknown", '`policy="bakcup"`', "ConfigError", "unknown (did you mean backup?)", policy="bakcup")
refused(
    "synchronous_and_backup",
    '`policy="synchronous", backup_workers=1`',
    "ConfigError",
    'policy="synchronous" waits for all ranks, but backup_workers=1',
    policy="synchronous",
    backup_workers=1,
)
refused(
    "backup_of_none",
    '`policy="backup"` without `backup_workers`',
    "ConfigError",
    "needs backup_workers",
    policy="backup",
)
refused("op_text", '`op="sum"`', "ConfigError", "op='sum': expected hvd.Average, hvd.Sum", op="sum")
refused(
    "adasum_backup",
    "`op=hvd.Adasum, backup_workers=1`",
    "ConfigError",
    "cannot be combined with",
    op=hvd.Adasum,
    backup_workers=1,
)
refused(
    "no_horovod",
    "`process_set=...` without Horovod",
    "ConfigError",
    "needs Horovod's own DistributedOptimizer",
    process_set="half",
)
refused(
    "compression_text",
    '`compression="fp16"`',
    "ConfigError",
    "expected Compression.none, Compression.fp16",
    compression="fp16",
)
refused(
    "factor_text",
    '`gradient_predivide_factor="2x"`',
    "ConfigError",
    "gradient_predivide_factor='2x': expected a finite number above 0",
    gradient_predivide_factor="2x",
)
refused(
    "passes_half",
    "`backward_passes_per_step=1.5`",
    "ConfigError",
    "backward_passes_per_step=1.5: expected an int",
    backward_passes_per_step=1.5,
)
refused(
    "groups_text", '`groups="all"`', "ValueError", "groups should be a non-negative integer or a list", groups="all"
)
refused(
    "option_misspelt",
    "`backup_worker=1`: a name that does not exist",
    "TypeError",
    "unexpected keyword argument 'backup_worker'",
    backup_worker=1,
)


@misuse(
    MAKING,
    "`DistributedOptimizer(model)`: the model in place of the optimizer",
    "UsageError",
    "expected a torch.optim.Optimizer",
)
def model_for_optimizer(scene: Scene) -> None:
    with scene.misuse():
        hvd.DistributedOptimizer(make_model())


@misuse(MAKING, "wrapping an optimizer twice", "UsageError", "one already: wrap a plain one, once")
def wrapped_twice(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        wrap(model, optimizer)


@misuse(MAKING, "`torch.optim.LBFGS`", "UsageError", "it evaluates the loss several times in one step()")
def lbfgs(scene: Scene) -> None:
    model = make_model()
    with scene.misuse():
        wrap(model, torch.optim.LBFGS(model.parameters()))


@misuse(
    MAKING,
    "`named_parameters=model`",
    "ValueError",
    "named_parameters should be a sequence of tuples (name, parameter)",
)
def model_for_names(scene: Scene) -> None:
    model = torch.nn.Linear(2, 2)
    with scene.misuse():
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model)


@misuse(MAKING, "the same name for two parameters", "ValueError", "must be unique. Found duplicates: w")
def duplicate_names(scene: Scene) -> None:
    model = make_model()
    with scene.misuse():
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), [("w", p) for p in model.parameters()])


@misuse(
    MAKING,
    "a parameter that has no name in `named_parameters`",
    "ValueError",
    "one or more model parameters were not named. Shapes of those: (16,)…",
)
def unnamed_parameter(scene: Scene) -> None:
    model = make_model()
    with scene.misuse():
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), list(model.named_parameters())[:1])


@misuse(MAKING, "a complex parameter", "UsageError", "dtype complex64: supported are … torch.view_as_real")
def complex_parameter(scene: Scene) -> None:
    with scene.misuse():
        hvd.DistributedOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], 0.1))


@misuse(
    MAKING,
    "nothing to train: all parameters are frozen",
    "UsageError",
    "no parameter of the optimizer requires a gradient",
)
def all_frozen(scene: Scene) -> None:
    model = make_model().requires_grad_(False)
    with scene.misuse():
        wrap(model)


@misuse(MAKING, "`optimizer.on_update(None)`", "UsageError", "on_update(NoneType): expected a function")
def on_update_none(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        optimizer.on_update(None)


@misuse(
    MAKING,
    "`register_scheduler` of a scheduler made for another optimizer",
    "UsageError",
    "was made for another optimizer",
)
def foreign_scheduler(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        optimizer.register_scheduler(torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 1))


@misuse(
    MAKING,
    "`register_scaler` of something that is no GradScaler",
    "UsageError",
    "register_scaler(SGD): expected a torch.amp.GradScaler",
)
def no_scaler(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        optimizer.register_scaler(torch.optim.SGD(model.parameters(), 0.1))


@misuse(
    MAKING,
    "`copy.deepcopy(optimizer)`",
    "UsageError",
    "a DistributedOptimizer cannot be copied or pickled: use state_dict()",
)
def deep_copy(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        copy.deepcopy(optimizer)


# --- ranks that differ ---


def differing(name: str, wrong: str, told: str, make: Any) -> None:
    """A case: rank 1 makes something else than the others; found at the first step, on every rank."""

    def run(scene: Scene) -> None:
        model, options = make()
        optimizer = wrap(model, **options) if isinstance(options, dict) else options
        scene.weights = lambda: bytes_of(model) if not odd() else b""
        with scene.misuse():
            sum(p.float().sum() for p in model.parameters()).backward()
            optimizer.step()

    run.__name__ = name
    misuse(RANKS, wrong, "HvdBackupError", told)(run)


def linear(out: int = 3, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(4, out, **options)


differing(
    "other_shape",
    "a layer with 5 outputs on rank 1, 3 on the others",
    "differ in 'optimizer.0': line …weight (",
    lambda: (linear(5 if odd() else 3), {}),
)
differing(
    "other_dtype", "a float64 model on rank 1", "float64", lambda: (linear(dtype=torch.float64 if odd() else None), {})
)
differing(
    "other_number", "one parameter more on rank 1", "differ in 'optimizer.0': line", lambda: (linear(bias=odd()), {})
)
differing(
    "other_options",
    "`backup_workers=1` on rank 1 alone",
    "differ in 'optimizer.0': line …'backup_workers 1 of 3 ranks'",
    lambda: (linear(), {"backup_workers": int(odd())}),
)
differing(
    "other_grace",
    "`grace=0.5` on rank 1 alone",
    "differ in 'optimizer.0': line …'grace 0.5 s'",
    lambda: (linear(), {"backup_workers": 1, "grace": 0.5 * odd()}),
)
differing(
    "other_op", "`op=hvd.Sum` on rank 1 alone", "'op ", lambda: (linear(), {"op": hvd.Sum if odd() else hvd.Average})
)
differing(
    "other_passes",
    "`backward_passes_per_step=2` on rank 1 alone",
    "differ in 'optimizer.0': line …'backward_passes_per_step 2'",
    lambda: (linear(), {"backward_passes_per_step": 1 + odd()}),
)
differing(
    "other_optimizer",
    "Adam on rank 1, SGD on the others",
    "differ in 'optimizer.0': line 1: given 'optimizer …",
    lambda: (m := linear(), wrap(m, (torch.optim.Adam if odd() else torch.optim.SGD)(m.parameters(), 0.1))),
)
differing(
    "other_rate",
    "another learning rate on rank 1, at the first step",
    "differ in 'optimizer.0': line …'hyperparameters [{'lr': 0.2,",
    lambda: (m := linear(), wrap(m, torch.optim.SGD(m.parameters(), 0.2 if odd() else 0.1))),
)


@misuse(
    RANKS,
    "other weights on rank 1: no `broadcast_parameters` before the first step",
    "HvdBackupError",
    "weights with checksum … (alike after hvd.broadcast_parameters(model.state_dict(), 0))",
)
def other_weights(scene: Scene) -> None:
    model = make_model(seed=hvd.rank())
    optimizer = wrap(model)
    with scene.misuse():
        step(model, optimizer)


@misuse(RANKS, "parameters in another order on rank 1", "HvdBackupError", "differ in 'optimizer.0': line")
def other_order(scene: Scene) -> None:
    model = make_model()
    parameters = list(model.parameters())
    names = list(reversed(list(model.named_parameters()))) if odd() else list(model.named_parameters())
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([p for _, p in names], 0.1), names)
    scene.weights = lambda: bytes_of(model)
    assert parameters
    with scene.misuse():
        step(model, optimizer)


@misuse(
    RANKS,
    "`optimizer.metrics(loss=...)` on the others, `metrics(accuracy=...)` on rank 1",
    "HvdBackupError",
    "differ in 'optimizer.0': line …'metrics accuracy'",
)
def other_metrics(scene: Scene) -> None:
    model = make_model()
    optimizer = wrap(model)
    scene.weights = lambda: bytes_of(model)
    with scene.misuse():
        optimizer.metrics(**{"accuracy" if odd() else "loss": 1.0})
        step(model, optimizer)


@misuse(RANKS, "another `align_every` on rank 1", "HvdBackupError", "align_every=")
def other_align(scene: Scene) -> None:
    model, optimizer = trained(scene, backup_workers=1, grace=5.0)
    with scene.misuse():
        for number in hvd.follow(range(6), optimizer, align_every=2 if odd() else 3):
            step(model, optimizer, number)


@misuse(
    RANKS,
    "`add_param_group` on rank 1 alone, which waits for the others there",
    "HvdBackupError",
    "rank … has left",
    on=(1,),
    others=Gets("", "that ends the round, so their gradients are dropped"),
)
def lone_param_group(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        if odd():
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        else:
            step(model, optimizer)


# --- a step ---


@misuse(
    STEP,
    "`step()` without `backward()`",
    "UsageError",
    "step() without a gradient: call loss.backward() before every step()",
)
def step_alone(scene: Scene) -> None:
    _, optimizer = trained(scene, backup_workers=1, grace=5.0)
    with scene.misuse():
        optimizer.step()


@misuse(
    STEP,
    "`backward()` twice before `step()`",
    "AssertionError",
    "more than backward_passes_per_step times before call to step()",
)
def backward_twice(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        backward(model)
        backward(model)
    assert optimizer is not None


@misuse(
    STEP,
    "`zero_grad()` between `backward()` and `step()`",
    "AssertionError",
    "after loss.backward() but before optimizer.step()",
)
def zero_between(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        backward(model)
        optimizer.zero_grad()


@misuse(
    STEP,
    "gradients changed between `backward()` and `step()` (clipping)",
    "UsageError",
    "0.weight was changed after backward() had handed it over: clip between",
)
def clipped_too_early(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        backward(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()


@misuse(
    STEP,
    "the learning rate changed between `backward()` and `step()`, with backup workers",
    "UsageError",
    "lr from 0.1 to 0.05",
)
def rate_between(scene: Scene) -> None:
    model, optimizer = trained(scene, backup_workers=1, grace=5.0)
    with scene.misuse():
        backward(model)
        optimizer.param_groups[0]["lr"] = 0.05
        optimizer.step()


@misuse(STEP, "`samples = 0`", "UsageError", "samples=0: expected a finite number above 0")
def no_samples(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        optimizer.samples = 0


@misuse(STEP, "`samples = None`", "UsageError", "samples=None: expected a finite number above 0")
def samples_none(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        optimizer.samples = None


@misuse(STEP, "`samples = [8]`", "UsageError", "samples=[8]: expected a finite number above 0")
def samples_list(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        optimizer.samples = [8]


@misuse(STEP, "`step()` in `skip_synchronize()` without `synchronize()`", "UsageError", "call synchronize() before it")
def skipped_synchronize(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        backward(model)
        with optimizer.skip_synchronize():
            optimizer.step()


@misuse(
    STEP,
    "a metric with a new name after the first step",
    "UsageError",
    "the names are fixed at the first step(), and were: loss",
)
def new_metric(scene: Scene) -> None:
    model = make_model()
    optimizer = wrap(model)
    optimizer.metrics(loss=1.0)
    step(model, optimizer)
    scene.weights = lambda: bytes_of(model)
    with scene.misuse():
        optimizer.metrics(accuracy=1.0)


@misuse(
    STEP, "`optimizer.metrics(loss=model)`: no number", "UsageError", "expected a number, or a tensor with one element"
)
def metric_of_no_number(scene: Scene) -> None:
    model = make_model()
    optimizer = wrap(model)
    with scene.misuse():
        optimizer.metrics(loss=model)


@misuse(
    STEP,
    "`load_state_dict` between `backward()` and `step()`",
    "UsageError",
    "between backward() and step(): call it after step()",
)
def loaded_between(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        backward(model)
        optimizer.load_state_dict(optimizer.state_dict())


@misuse(
    STEP,
    "`barrier()` between `backward()` and `step()`, with backup workers",
    "UsageError",
    "would drop the gradient: call it after step()",
)
def barrier_between(scene: Scene) -> None:
    model, optimizer = trained(scene, backup_workers=1, grace=5.0)
    with scene.misuse():
        backward(model)
        hvd.barrier()
    assert optimizer is not None


@misuse(
    STEP,
    "a GradScaler that is not registered, with backup workers",
    "UsageError",
    "Call optimizer.register_scaler(scaler) once, before the first step",
)
def unregistered_scaler(scene: Scene) -> None:
    model, optimizer = trained(scene, backup_workers=1, grace=5.0)
    scaler = torch.amp.GradScaler("cpu")
    with scene.misuse():
        scaler.scale(loss_of(model, batch(hvd.rank(), 0))).backward()
        scaler.step(optimizer)


@misuse(
    STEP,
    '`register_scaler` with `nonfinite="drop"`, or a GradScaler that is not registered',
    "UsageError",
    "it lowers its scale when it finds Inf in a mean gradient, but a gradient with Inf is left out of the mean",
)
def scaler_and_drop(scene: Scene) -> None:
    model = make_model()
    scene.weights = lambda: bytes_of(model)
    optimizer = wrap(model, nonfinite="drop")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, batch(hvd.rank(), 0))).backward()
    try:
        scaler.step(optimizer)
    except hvd.UsageError as error:
        assert "nonfinite" in str(error)
    with scene.misuse():
        wrap(make_model(), nonfinite="drop").register_scaler(scaler)


@misuse(
    STEP,
    "a function of `on_update` that raises: the next use says that this rank's weights are of no use",
    "HvdBackupError",
    "the weights of this rank are no longer those of the others: end the program, or load a checkpoint",
    trains=True,
)
def failing_on_update(scene: Scene) -> None:
    model, optimizer = trained(scene)
    optimizer.on_update(lambda update: 1 / 0)
    with scene.misuse():
        try:
            step(model, optimizer)
        except ZeroDivisionError:
            pass
        step(model, optimizer)


@misuse(
    STEP,
    "an optimizer of before `shutdown()` used after the next `init()`",
    "UsageError",
    "made before shutdown(): make a new DistributedOptimizer after init()",
)
def outlived(scene: Scene) -> None:
    model, optimizer = trained(scene)
    hvd.shutdown()
    hvd.init()
    with scene.misuse():
        step(model, optimizer)


@misuse(STEP, "training in a forked child process", "UsageError", "in a process that was forked after init()")
def in_a_forked_child(scene: Scene) -> None:
    model, optimizer = trained(scene)
    reader, writer = os.pipe()
    with scene.misuse():
        if (child := os.fork()) == 0:
            try:
                step(model, optimizer)
                told = "nothing"
            except BaseException as error:
                told = f"{type(error).__name__}|{error}"
            os.write(writer, told.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            kind, _, text = pipe.read().partition("|")
        os.waitpid(child, 0)
        raise getattr(hvd, kind, AssertionError)(text)


# --- a model that changes ---


@misuse(
    CHANGES,
    "a layer that was frozen when the optimizer was made is unfrozen",
    "UsageError",
    "was frozen when the DistributedOptimizer was made, so nothing is exchanged for it",
)
def unfrozen(scene: Scene) -> None:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = wrap(model)
    step(model, optimizer)
    model[0].requires_grad_(True)
    scene.weights = lambda: bytes_of(model)
    with scene.misuse():
        step(model, optimizer)


@misuse(
    CHANGES,
    "a layer is frozen later, on all ranks or on some",
    "",
    "it works: where there is no gradient it counts as zero, as with Horovod",
    trains=True,
)
def frozen_later(scene: Scene) -> None:
    model, optimizer = trained(scene)
    if odd():
        model[0].requires_grad_(False)
    with scene.misuse():
        step(model, optimizer)
        step(model, optimizer)


@misuse(
    CHANGES,
    "a parameter of the optimizer is replaced by another one (`param_groups[0]['params'][0] = ...`)",
    "UsageError",
    "has a gradient but was",
)
def replaced_in_group(scene: Scene) -> None:
    model, optimizer = trained(scene)
    new = torch.nn.Parameter(torch.ones_like(model[0].weight))
    optimizer.param_groups[0]["params"][0] = new
    model[0].weight = new
    with scene.misuse():
        step(model, optimizer)


@misuse(
    CHANGES,
    "every parameter of the model is replaced, and the optimizer knows nothing of it",
    "UsageError",
    "step() without a gradient",
)
def all_replaced(scene: Scene) -> None:
    model, optimizer = trained(scene)
    for layer in (model[0], model[2]):
        layer.weight = torch.nn.Parameter(torch.ones_like(layer.weight))
        layer.bias = torch.nn.Parameter(torch.ones_like(layer.bias))
    with scene.misuse():
        step(model, optimizer)


@misuse(
    CHANGES,
    "the model becomes float64 after the first step (`model.double()`)",
    "UsageError",
    "parameter …has dtype float64 now, but had dtype float32 when training began: make a new DistributedOptimizer",
)
def becomes_double(scene: Scene) -> None:
    model, optimizer = trained(scene)
    model.double()
    with scene.misuse():
        optimizer.zero_grad()
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()


@misuse(
    CHANGES,
    "a parameter gets another shape after the first step (`p.data = ...`)",
    "UsageError",
    "parameter 2.bias has shape (4,) now, but had shape (3,) when training began",
)
def becomes_longer(scene: Scene) -> None:
    model, optimizer = trained(scene)
    model[2].bias.data = torch.ones(4)
    with scene.misuse():
        optimizer.zero_grad()
        sum(p.sum() for p in model.parameters()).backward()
        optimizer.step()


@misuse(
    CHANGES, "`add_param_group` in a loop over `follow`", "UsageError", "add_param_group() inside a loop over follow()"
)
def group_in_loop(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        for _ in hvd.follow(range(3), optimizer):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@misuse(
    CHANGES,
    "`add_param_group` of a parameter that the optimizer has already",
    "ValueError",
    "some parameters appear in more than one parameter group",
)
def group_twice(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        optimizer.add_param_group({"params": [model[0].weight]})


@misuse(CHANGES, "`add_param_group([parameter])`: no dict", "UsageError", 'expected a dict with "params"')
def group_of_no_dict(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        optimizer.add_param_group([torch.nn.Parameter(torch.ones(2))])


# --- the loop ---


@misuse(
    LOOP, "`follow(loader)` without an optimizer", "TypeError", "missing 1 required positional argument: 'optimizer'"
)
def follow_alone(scene: Scene) -> None:
    with scene.misuse():
        hvd.follow(range(3))


@misuse(LOOP, "`follow(loader, plain_optimizer)`", "UsageError", "SGD was not made by hvd.DistributedOptimizer")
def follow_plain(scene: Scene) -> None:
    with scene.misuse():
        hvd.follow(range(3), torch.optim.SGD(make_model().parameters(), 0.1))


@misuse(LOOP, "`follow(5, optimizer)`: no iterable", "UsageError", "follow(int): expected an iterable of batches")
def follow_number(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        list(hvd.follow(5, optimizer))


@misuse(LOOP, "`follow` within a loop over `follow` of the same optimizer", "UsageError", "end that loop")
def follow_nested(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        for _ in hvd.follow(range(2), optimizer):
            list(hvd.follow(range(2), optimizer))


@misuse(
    LOOP,
    "`follow(..., align_every=0)`",
    "UsageError",
    "follow(align_every=0): expected a number of steps >= 1, or None",
)
def follow_align_zero(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        hvd.follow(range(3), optimizer, align_every=0)


@misuse(
    LOOP,
    "a full collective in a followed loop, with backup workers",
    "UsageError",
    "allreduce() inside a loop over follow() with backup workers",
)
def collective_in_loop(scene: Scene) -> None:
    _, optimizer = trained(scene, backup_workers=1, grace=5.0)
    with scene.misuse():
        for _ in hvd.follow(range(3), optimizer):
            hvd.allreduce(torch.ones(1))


@misuse(
    LOOP,
    "`step()` twice for a batch",
    "UsageError",
    "step() of the followed optimizer was called more than once for a batch",
    trains=True,
)
def two_steps(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        for number in hvd.follow(range(4), optimizer):
            step(model, optimizer, number)
            step(model, optimizer, number)


@misuse(LOOP, "`join()` in a loop over `follow`", "UsageError", "join() inside a loop over follow()")
def join_in_loop(scene: Scene) -> None:
    _, optimizer = trained(scene)
    with scene.misuse():
        for _ in hvd.follow(range(3), optimizer):
            hvd.join()


@misuse(
    LOOP,
    "a loader without a length that claims 2**63 - 1 batches",
    "",
    "it works: the round ends when the data of all ranks has",
    trains=True,
)
def endless_length(scene: Scene) -> None:
    model, optimizer = trained(scene)

    class Endless:
        def __len__(self) -> int:
            return (1 << 63) - 1

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with scene.misuse():
        for _ in range(2):
            for number in hvd.follow(Endless(), optimizer):
                step(model, optimizer, number)


@misuse(
    LOOP,
    "the loader of rank 1 raises",
    "ZeroDivisionError",
    "integer division or modulo by zero",
    on=(1,),
    others=Gets("", "they train on without it, to the end of their data"),
    trains=True,
)
def loader_raises(scene: Scene) -> None:
    model, optimizer = trained(scene)
    if odd():
        scene.weights = lambda: b""  # it is behind, and knows it
    with scene.misuse():
        for number in hvd.follow((1 // (2 - i if odd() else 1) for i in range(4)), optimizer):
            step(model, optimizer, number)


@misuse(
    LOOP,
    "iterations left over without `follow`: another rank has ended the round",
    "UserWarning",
    "gradients were dropped, because another rank had left the training loop before and entered barrier()",
    on=(0, 2),
    others=Gets("", "nothing is wrong there"),
    trains=True,
)
def leftovers(scene: Scene) -> None:
    model, optimizer = trained(scene, backup_workers=1, grace=5.0)
    with scene.misuse():
        for number in range(3 if odd() else 6):
            step(model, optimizer, number)
        hvd.barrier()


# --- numbers ---


@misuse(
    LATER,
    'a gradient with NaN, and no `nonfinite="drop"`',
    "",
    "it is averaged like any other: the weights become NaN, alike on all ranks",
    trains=True,
)
def nan_gradient(scene: Scene) -> None:
    model, optimizer = trained(scene)
    with scene.misuse():
        optimizer.zero_grad()
        (loss_of(model, batch(hvd.rank(), 0)) * (float("nan") if odd() else 1.0)).backward()
        optimizer.step()
        assert all(p.isnan().all() for p in model.parameters())


# --- collectives ---


def refused_call(name: str, wrong: str, kind: str, told: str, call: Any) -> None:
    """A case: a call that cannot be right on any rank, or that rank 1 makes otherwise. call(whether this is rank 1)."""

    def run(scene: Scene) -> None:
        with scene.misuse():
            call(odd())

    run.__name__ = name
    misuse(TENSORS, wrong, kind, told)(run)


def sgd(out: int = 3) -> torch.optim.Optimizer:
    return torch.optim.SGD(linear(out).parameters(), lr=0.1, momentum=0.9)


refused_call(
    "tensor_elsewhere",
    'a tensor that is neither on the CPU nor on a GPU (`device="meta"`)',
    "UsageError",
    "first_n_allreduce: the tensor is on meta, supported are the CPU and CUDA: use tensor.cpu()",
    lambda odd: hvd.first_n_allreduce(torch.ones(2, device="meta"), n=2),
)
refused_call(
    "tensor_sparse",
    "a sparse tensor",
    "UsageError",
    "has layout torch.sparse_coo, not a dense one: use tensor.to_dense()",
    lambda odd: hvd.first_n_allreduce(torch.ones(2).to_sparse(), n=2),
)
refused_call(
    "no_tensor",
    "a list in place of a tensor",
    "UsageError",
    "allreduce(list): expected a torch.Tensor",
    lambda odd: hvd.allreduce([1.0, 2.0]),
)
refused_call(
    "tensor_of_bools",
    "a tensor of bools",
    "UsageError",
    "allreduce: dtype bool is not supported, only",
    lambda odd: hvd.allreduce(torch.ones(2, dtype=torch.bool)),
)
refused_call(
    "first_n_other_tensor",
    "another tensor under the same name on rank 1",
    "HvdBackupError",
    "differ in 'first_n_allreduce:x': line 2: …'shape (2, 2)'",
    # With fewer than all three, the others may be done before rank 1 calls it.
    lambda odd: hvd.first_n_allreduce(torch.ones((2, 2) if odd else 4), n=3, name="x"),
)
refused_call(
    "parameters_of_a_model",
    "`broadcast_parameters(model)`",
    "ValueError",
    "invalid params of type: <class 'torch.nn.modules.linear.Linear'>",
    lambda odd: hvd.broadcast_parameters(linear(), root_rank=0),
)
refused_call(
    "parameters_differ",
    "`broadcast_parameters` of another model on rank 1",
    "UsageError",
    "the ranks are in different collectives, which must be called by all in the same order: …weight float32[5, 4]",
    lambda odd: hvd.broadcast_parameters(linear(5 if odd else 3).state_dict(), root_rank=0),
)
refused_call(
    "state_of_a_model",
    "`broadcast_optimizer_state(model)`",
    "UsageError",
    "broadcast_optimizer_state(Linear): expected a torch.optim.Optimizer",
    lambda odd: hvd.broadcast_optimizer_state(linear(), root_rank=0),
)
refused_call(
    "states_differ",
    "`broadcast_optimizer_state` of another optimizer on rank 1",
    "UsageError",
    "the ranks are in different collectives, which must be called by all in the same order: …float32[5, 4]",
    lambda odd: hvd.broadcast_optimizer_state(sgd(5 if odd else 3), root_rank=0),
)
refused_call(
    "only_horovods",
    "`hvd.alltoall(x)` without Horovod",
    "AttributeError",
    "alltoall is Horovod's own",
    lambda odd: hvd.alltoall(torch.ones(2)),
)
