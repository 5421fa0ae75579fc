"""Cases written for horovod.torch: each takes the module and returns what it saw, so that two modules can be compared.

They are ordinary uses, and ordinary mistakes, of Horovod's API with backup_workers=0. Two ranks.
"""

import contextlib
import importlib
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # takes seconds, which optimizers would otherwise spend while Horovod polls

from tests.rank_main import mark
from tests.torch_training import batch, loss_of, make_model


def plain(value: Any) -> Any:
    """Tensors as nested lists with their dtype, exceptions as type and first words: comparable."""
    if isinstance(value, torch.Tensor):
        dense = value.detach().to_dense() if value.is_sparse else value.detach()
        return (str(value.dtype), tuple(value.shape), dense.double().flatten().tolist())
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    """What an exception that a call raises can be caught as (its built-in bases), and its text."""
    try:
        call()
    except Exception as error:
        return " ".join(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"), str(error)
    return "", ""


def collectives(hvd: Any) -> Any:
    rank = hvd.rank()
    seen: list[Any] = []
    for dtype in (torch.float32, torch.float64, torch.float16, torch.int32, torch.int64):
        tensor = torch.arange(6).reshape(2, 3).to(dtype) + rank
        seen.append(hvd.allreduce(tensor, op=hvd.Sum, name=f"sum.{dtype}"))
        seen.append(hvd.allgather(tensor[: 1 + rank], name=f"gather.{dtype}"))
        seen.append(hvd.broadcast(tensor, root_rank=1, name=f"broadcast.{dtype}"))
    for op in (hvd.Average, hvd.Sum, hvd.Min, hvd.Max, hvd.Product):
        seen.append(hvd.allreduce(torch.tensor([1.0, 2.0, 3.0]) + rank, op=op))
    seen.append(hvd.allreduce(torch.full((3,), 1.5 + rank), average=False))
    seen.append(hvd.allreduce(torch.full((3,), 1.5 + rank), prescale_factor=2.0, postscale_factor=0.5))
    seen.append(hvd.allreduce(torch.full((3,), 1.5 + rank), compression=hvd.Compression.fp16))
    in_place = torch.full((2,), float(rank))
    assert hvd.allreduce_(in_place, op=hvd.Sum) is in_place
    assert hvd.broadcast_(in_place.add_(rank), 1) is in_place
    seen.append(in_place)
    seen.append(hvd.grouped_allreduce([torch.ones(2) * rank, torch.ones(3)], op=hvd.Sum))
    seen.append(hvd.grouped_allgather([torch.ones(1) * rank, torch.ones(2, 2)]))
    seen.append(hvd.reducescatter(torch.arange(4.0) + rank, op=hvd.Sum))
    seen.append(hvd.grouped_reducescatter([torch.arange(4.0), torch.ones(2)], op=hvd.Sum))
    received, splits = hvd.alltoall(torch.arange(3.0) + 10 * rank, splits=torch.tensor([1, 2], dtype=torch.int32))
    seen += [received, splits]
    handles = [
        hvd.allreduce_async(torch.ones(2) * i, name=f"async.{i}") for i in (range(3) if rank else range(2, -1, -1))
    ]
    values = [hvd.synchronize(handle) for handle in handles]
    seen.append(values if rank else values[::-1])
    handle = hvd.broadcast_async_(torch.ones(1) * rank, 0)
    while not hvd.poll(handle):
        pass
    seen.append(hvd.synchronize(handle))
    seen.append(hvd.broadcast_object({"a": [rank], "f": (lambda x: x + 1)(rank)}, root_rank=1))
    seen.append(hvd.broadcast_object(lambda x: x + 1, 0)(3))
    seen.append(hvd.allgather_object((rank, "x" * rank)))
    hvd.barrier()
    return seen


def derivatives(hvd: Any) -> Any:
    seen = []
    for call in (
        lambda x: hvd.allreduce(x, op=hvd.Sum),
        lambda x: hvd.allreduce(x),
        lambda x: hvd.allgather(x),
        lambda x: hvd.broadcast(x, 0),
        lambda x: hvd.alltoall(x)[0] if isinstance(hvd.alltoall(x), tuple) else hvd.alltoall(x),
        lambda x: hvd.reducescatter(x, op=hvd.Sum),
    ):
        x = torch.arange(4.0).add(hvd.rank()).requires_grad_()
        (call(x) ** 2).sum().backward()
        seen.append(x.grad)
    return seen


def wrong_collectives(hvd: Any) -> Any:
    kinds = [
        error_of(lambda: hvd.allreduce(torch.ones(2 + hvd.rank()), name="shapes")),
        error_of(
            lambda: hvd.allreduce(torch.ones(2, dtype=torch.float64 if hvd.rank() else torch.float32), name="kind")
        ),
        error_of(lambda: hvd.broadcast(torch.ones(2), root_rank=hvd.rank(), name="roots")),
        error_of(lambda: hvd.broadcast(torch.ones(2), root_rank=7, name="root7")),
        error_of(lambda: hvd.allreduce(torch.ones(2, 2).t()[:, :1], name="strides")),
        error_of(lambda: hvd.allreduce(torch.ones(2), average=True, op=hvd.Sum)),
        error_of(lambda: hvd.broadcast_parameters(7, 0)),
    ]
    return kinds


def queries(hvd: Any) -> Any:
    seen = [
        *(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()),
        *(hvd.is_initialized(), hvd.mpi_enabled(), hvd.gloo_enabled(), hvd.mpi_threads_supported(), hvd.mpi_built()),
        *(bool(hvd.gloo_built()), bool(hvd.nccl_built()), bool(hvd.cuda_built()), bool(hvd.rocm_built())),
        *(hvd.global_process_set.size(), hvd.global_process_set.rank(), hvd.global_process_set.included()),
    ]
    return seen


def process_sets(hvd: Any) -> Any:
    odd, even = hvd.add_process_set([1]), hvd.add_process_set(hvd.ProcessSet([0]))
    mine = odd if hvd.rank() else even
    seen: list[Any] = [mine.included(), mine.size(), mine.rank()]
    seen.append(hvd.allreduce(torch.ones(2) * hvd.rank(), op=hvd.Sum, process_set=mine))
    seen.append(hvd.broadcast_object(hvd.rank(), root_rank=hvd.rank(), process_set=mine))
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), process_set=mine
    )
    loss_of(model, batch(hvd.rank(), 0)).backward()
    optimizer.step()
    seen.append(list(model.parameters()))
    seen += [hvd.remove_process_set(odd), hvd.remove_process_set(even)]
    return seen


class Mixed(torch.nn.Module):
    """Used, unused and frozen layers, and a sparse embedding."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = make_model()
        self.unused = torch.nn.Linear(2, 2)
        self.frozen = torch.nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.words = torch.nn.Embedding(7, 6, sparse=sparse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.body(self.frozen(x) + self.words(torch.arange(len(x)) % 3))
        return found


def train(
    hvd: Any, make: Callable[[Any], Any], sparse: bool = False, steps: int = 3, passes: int = 1, **options: Any
) -> Any:
    """Weights and losses after some steps."""
    model = Mixed(sparse)
    if "groups" in options and options["groups"] == "lists":
        options["groups"] = [list(model.body[0].parameters()), [model.words.weight]]
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    plain_optimizer = make(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = hvd.DistributedOptimizer(
            plain_optimizer, model.named_parameters(), backward_passes_per_step=passes, **options
        )
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(passes):
            loss = loss_of(model, batch(hvd.rank(), passes * step + part))
            loss.backward()
        optimizer.step()
        losses.append(round(loss.item(), 5))
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def optimizers(hvd: Any) -> Any:
    rank_is_free = {
        "plain": {},
        "sum": {"op": hvd.Sum},
        "fp16": {"compression": hvd.Compression.fp16},
        "passes": {"passes": 3},
        "predivide": {"gradient_predivide_factor": 2.0},
        "groups": {"groups": 2},
        "num_groups": {"num_groups": 3},
        "lists": {"groups": "lists"},
        "adasum": {"op": hvd.Adasum},
        "sparse": {"sparse": True},
        "sparse_as_dense": {"sparse": True, "sparse_as_dense": True},
    }
    return {name: train(hvd, sgd, **options) for name, options in rank_is_free.items()}


def steps_by_hand(hvd: Any) -> Any:
    """synchronize, skip_synchronize, clipping between them, gradients made by hand, a second optimizer."""
    model = make_model()
    optimizer = hvd.DistributedOptimizer(sgd(model.parameters()), named_parameters=model.named_parameters())
    told = []
    loss_of(model, batch(hvd.rank(), 0)).backward()
    optimizer.synchronize()
    told.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    with optimizer.skip_synchronize():
        optimizer.step()
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 + hvd.rank())
    optimizer.step()  # gradients that no backward pass has made
    told.append([p.detach().clone() for p in model.parameters()])
    loss_of(model, batch(hvd.rank(), 1)).backward()
    optimizer.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    told.append("without optimizer.skip_synchronize() context" in str(caught[0].message))
    optimizer.set_backward_passes_per_step(2)
    optimizer.zero_grad()
    for part in range(2):
        loss_of(model, batch(hvd.rank(), 2 + part)).backward()
    optimizer.step()
    told.append([p.detach().clone() for p in model.parameters()])
    other = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01))  # takes over, unnamed
    other.zero_grad()
    del optimizer
    return told


def wrong_optimizers(hvd: Any) -> Any:
    model = make_model()
    parameters = list(model.parameters())
    make = hvd.DistributedOptimizer
    told = [
        error_of(lambda: make(sgd(parameters), [("a", p) for p in parameters])),
        error_of(lambda: make(sgd(parameters), parameters)),
        error_of(lambda: make(sgd(parameters), [("w", parameters[0])]))[:1],
        error_of(lambda: make(sgd(parameters), op=hvd.Sum, gradient_predivide_factor=2.0)),
        error_of(lambda: make(sgd(parameters), backward_passes_per_step=0))[:1],
        error_of(lambda: make(sgd(parameters), groups=-1)),
        error_of(lambda: make(sgd(parameters), groups=[[1]])),
        error_of(lambda: make(sgd(parameters), groups=[parameters[:1], parameters[:1]])),
        error_of(lambda: hvd.broadcast_optimizer_state(torch.optim.LBFGS(parameters), 0)),
    ]
    optimizer = make(sgd(parameters), model.named_parameters())
    loss_of(model, batch(hvd.rank(), 0)).backward()
    told.append(error_of(optimizer.zero_grad))
    told.append(error_of(loss_of(model, batch(hvd.rank(), 0)).backward)[:1])
    with contextlib.suppress(Exception):
        optimizer.step()
    return told


def resume(hvd: Any) -> Any:
    """A checkpoint of rank 0 reaches all: state, hyperparameters, weights."""
    seen = {}
    # Not plain SGD: without state, Horovod sends no learning rate either. And none with weight decay: Horovod makes the
    # first state by a step with the rank's own learning rate, and so other weights on each; ours takes the root's.
    for kind in (torch.optim.Adadelta, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad):
        model = make_model(seed=hvd.rank())
        optimizer = hvd.DistributedOptimizer(
            kind(model.parameters(), lr=0.01 * (1 + hvd.rank())), model.named_parameters()
        )
        hvd.broadcast_parameters(model.state_dict(), 0)
        hvd.broadcast_optimizer_state(optimizer, 0)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, batch(hvd.rank(), step)).backward()
            optimizer.step()
        saved = {key: optimizer.state_dict()[key] for key in ("state", "param_groups")}
        saved = hvd.broadcast_object(saved if hvd.rank() == 0 else {}, 0)
        again = make_model(seed=7 + hvd.rank())
        resumed = hvd.DistributedOptimizer(kind(again.parameters(), lr=1.0), again.named_parameters())
        if hvd.rank() == 0:
            again.load_state_dict(model.state_dict())
            resumed.load_state_dict(saved)
        hvd.broadcast_parameters(again.state_dict(), 0)
        hvd.broadcast_optimizer_state(resumed, 0)
        loss_of(again, batch(hvd.rank(), 5)).backward()
        resumed.step()
        seen[kind.__name__] = (list(again.parameters()), resumed.param_groups[0]["lr"])
    return seen


def two_in_turn(hvd: Any) -> Any:
    """A GAN: each network is trained while the other one needs no gradients."""
    torch.manual_seed(5)
    networks = [torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 1, 1)]
    optimizers = [
        hvd.DistributedOptimizer(
            torch.optim.SGD(network.parameters(), lr=0.05),
            named_parameters=[(f"{number}.{name}", parameter) for name, parameter in network.named_parameters()],
        )
        for number, network in enumerate(networks)
    ]
    data = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(hvd.rank()))
    for step in range(6):
        trained = [step % 3 != 1, step % 3 != 0]
        for network, optimizer, wanted in zip(networks, optimizers, trained, strict=True):
            network.requires_grad_(wanted)
            optimizer.zero_grad()
        networks[1](networks[0](data)).pow(2).sum().backward()
        for network, optimizer, wanted in zip(networks, optimizers, trained, strict=True):
            assert wanted == any(p.grad is not None and p.grad.any() for p in network.parameters())
            if wanted:
                optimizer.step()
    return [list(network.parameters()) for network in networks]


def batch_norm(hvd: Any) -> Any:
    """Horovod's is for GPUs: on the CPU it says so, unless it evaluates."""
    layer = hvd.SyncBatchNorm(3)
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)
    return [error_of(lambda: layer(torch.ones(4, 3))), isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]


def elastic_state(hvd: Any) -> Any:
    model = make_model(seed=hvd.rank())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * (1 + hvd.rank()))
    sampler = hvd.elastic.ElasticSampler(range(10), shuffle=False)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=hvd.rank())
    state.sync()
    sampler.record_batch(0, 2)
    state.save()
    with torch.no_grad():
        next(model.parameters()).zero_()
    state.epoch = 9
    state.restore()
    return [list(model.parameters()), state.epoch, optimizer.param_groups[0]["lr"], list(sampler)]


def uneven_training(hvd: Any) -> Any:
    """Rank 1 has twice as many batches in each epoch; the weights are then those of the rank that joined last.

    Without momentum: with Horovod, that of a rank that has joined stays behind.
    """
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, 0.5)
    torch.nn.init.constant_(model.bias, 0.1)
    plain = torch.optim.SGD(model.parameters(), lr=0.02)
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(prefix="uneven_training"))
    seen = []
    for _ in range(2):
        for step in range(3 + 3 * hvd.rank()):
            optimizer.zero_grad()
            model(torch.full((1, 2), 0.3 * step + hvd.rank())).pow(2).mean().backward()
            optimizer.step()
        last = hvd.join()
        hvd.broadcast_parameters(model.state_dict(), root_rank=last)
        seen.append([last, *(parameter.detach().clone() for parameter in model.parameters())])
    return seen


def uneven_join(hvd: Any) -> Any:
    seen = [hvd.allreduce(torch.ones(1), op=hvd.Sum, name=f"uneven.{i}") for i in range(2 + hvd.rank())]
    return [*seen, hvd.join()]


CASES = [
    *(
        collectives,
        derivatives,
        queries,
        process_sets,
        optimizers,
        steps_by_hand,
        two_in_turn,
        resume,
        batch_norm,
        elastic_state,
    ),
    *(wrong_collectives, wrong_optimizers, uneven_join, uneven_training),
]


def run(module: str) -> dict[str, Any]:
    """All cases in a rank: what `plain` makes of what each saw."""
    hvd = importlib.import_module(module)
    hvd.init(process_sets="dynamic")
    seen = {}
    for case in CASES:
        mark(case.__name__)
        seen[case.__name__] = plain(case(hvd))
    hvd.shutdown()
    return seen
