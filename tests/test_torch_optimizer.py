"""DistributedOptimizer as a torch optimizer: gradients in every form, hooks, schedulers, metrics, checkpoints."""

import copy
import io
import time
import warnings
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import faults
from tests.torch_training import batch, digest, loss_of, make_model

F64 = torch.float64


def sgd(model: torch.nn.Module, **options: Any) -> Any:
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return hvd.DistributedOptimizer(plain, model.named_parameters(), **options)


def clip(model: torch.nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module, tolerance: float = 1e-12) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=tolerance)


def all_backwards(model: torch.nn.Module, step: int) -> None:
    """The mean over all ranks of the gradients that each computes in `backward`, computed here."""
    sum(loss_of(model, batch(rank, step, dtype=F64)) / hvd.size() for rank in range(hvd.size())).backward()


@pytest.mark.ranks(1, 2)
def test_gradients_in_every_form(size: int) -> None:
    """Views or not, zeroed or None or never reset, one or two passes: as plain torch with the mean gradient."""
    hvd.init()
    for views in (False, True):
        for zeroing in ("none", "zeros", "model", "never"):
            for passes in (1, 2):
                ours, plain = make_model(dtype=F64), make_model(dtype=F64)
                optimizer = sgd(ours, backward_passes_per_step=passes, gradient_as_bucket_view=views)
                reference = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
                held: list[torch.Tensor] = []
                for step in range(5):
                    for model, resetting in ((ours, optimizer), (plain, reference)):
                        if zeroing == "model":
                            model.zero_grad()
                        elif zeroing != "never":
                            resetting.zero_grad(set_to_none=zeroing == "none")
                    for micro in range(passes):
                        loss_of(ours, batch(hvd.rank(), 2 * step + micro, dtype=F64)).backward()
                        all_backwards(plain, 2 * step + micro)
                    optimizer.step()
                    reference.step()
                    assert_same_weights(ours, plain)
                    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
                        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
                    held = [p.grad for p in ours.parameters()]
                assert all(p.grad is g for p, g in zip(ours.parameters(), held, strict=True))
                assert optimizer.global_step == 5 and size == hvd.size()
    # With views and zeros in place nothing is copied: autograd accumulates into the buffer that is sent.
    model = make_model()
    optimizer = sgd(model, gradient_as_bucket_view=True)
    places = []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), step)).backward()
        places.append({p.grad.untyped_storage().data_ptr() for p in model.parameters()})
        optimizer.step()
    assert places[1] == places[3] != places[2], "the two buffers change roles"


class Odd(torch.nn.Module):
    """Two dtypes, a channels_last weight, an embedding, a layer that only some ranks use, one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.Linear(4, 4, dtype=F64)
        self.narrow = torch.nn.Linear(4, 4, dtype=torch.bfloat16)
        self.conv = torch.nn.Conv2d(4, 8, 3, dtype=F64).to(memory_format=torch.channels_last)
        self.embedding = torch.nn.Embedding(10, 4, sparse=True, dtype=F64)
        self.sometimes = torch.nn.Linear(4, 4, dtype=F64)
        self.never = torch.nn.Parameter(torch.ones(3, dtype=F64))
        self.transposed = torch.nn.Parameter(torch.randn(3, 4, dtype=F64).t())
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    def loss(self, rank: int, step: int) -> torch.Tensor:
        x, _ = batch(rank, step, 2, F64)
        h = self.wide(x[:, :4]) + self.embedding(torch.tensor([rank, step % 10]))
        if rank % 2:
            h = self.sometimes(h)
        image = (x[:, :4, None, None] * torch.ones(5, 5, dtype=F64)).contiguous(memory_format=torch.channels_last)
        rest = self.narrow(x[:, :4].to(torch.bfloat16)).to(F64).square().mean() + self.conv(image).square().mean()
        return h.square().mean() + rest + (h @ self.transposed).square().mean()


@pytest.mark.ranks(2)
def test_parameters_of_every_kind() -> None:
    hvd.init()
    for views in (False, True):
        for op, factor in ((hvd.Average, 1.0), (hvd.Sum, 1.0), (hvd.Average, 8.0)):
            ours, plain = Odd(), Odd()
            optimizer = hvd.DistributedOptimizer(
                torch.optim.SGD(ours.parameters(), lr=0.01),
                ours.named_parameters(),
                op=op,
                gradient_predivide_factor=factor,
                sparse_as_dense=True,
                gradient_as_bucket_view=views,
            )
            reference = torch.optim.SGD(plain.parameters(), lr=0.01)
            for step in range(4):
                optimizer.zero_grad()
                reference.zero_grad()
                ours.loss(hvd.rank(), step).backward()
                optimizer.step()
                scale = 1.0 if op is hvd.Sum else 0.5
                for rank in range(2):
                    (scale * plain.loss(rank, step)).backward()
                for p in plain.parameters():
                    if p.grad is not None and p.grad.is_sparse:
                        p.grad = p.grad.to_dense()
                reference.step()
                for name, p in ours.named_parameters():
                    tolerance = 0.02 if "narrow" in name else 1e-12
                    torch.testing.assert_close(p, plain.get_parameter(name), rtol=0, atol=tolerance, msg=name)
            assert ours.never.grad.tolist() == [0, 0, 0]
            assert ours.conv.weight.grad.stride() == ours.conv.weight.stride()


@pytest.mark.ranks(2)
def test_b0_habits_of_horovod() -> None:
    hvd.init()
    rank = hvd.rank()
    model, plain = make_model(dtype=F64), make_model(dtype=F64)
    optimizer = sgd(model)
    assert isinstance(optimizer, torch.optim.SGD) and type(optimizer).__name__ == "SGD"
    reference = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [torch.optim.lr_scheduler.StepLR(o, step_size=2, gamma=0.5) for o in (optimizer, reference)]
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        for step in range(6):
            optimizer.zero_grad()
            reference.zero_grad()
            all_backwards(plain, step)
            clip(plain)
            if step < 3:
                loss_of(model, batch(rank, step, dtype=F64)).backward()
                optimizer.synchronize()
                clip(model)
                with optimizer.skip_synchronize():
                    optimizer.step()
            else:
                if step == 3:
                    optimizer.on_update(lambda _: clip(model), when="before")
                data = batch(rank, step, dtype=F64)

                def closure(data: Any = data) -> torch.Tensor:
                    loss = loss_of(model, data)
                    loss.backward()
                    return loss

                assert optimizer.step(closure).item() > 0
            reference.step()
            for scheduler in schedulers:
                scheduler.step()
            assert_same_weights(model, plain)
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"] == 0.05 / 8
        assert calls == ["post"] * 6
    with pytest.warns(UserWarning, match="skip_synchronize"):
        loss_of(model, batch(rank, 9, dtype=F64)).backward()
        optimizer.synchronize()
        optimizer.step()
    # An optimizer that has state, and a scheduler that was made for it before.
    late_wrapped = torch.optim.Adam(plain.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(late_wrapped, 0.5)
    all_backwards(plain, 0)
    late_wrapped.step()
    wrapped = hvd.DistributedOptimizer(late_wrapped, plain.named_parameters())
    assert wrapped.state[next(plain.parameters())]["step"] == 1
    wrapped.zero_grad()
    all_backwards(plain, 1)
    wrapped.step()
    scheduler.step()
    assert wrapped.param_groups[0]["lr"] == 0.05 and wrapped.state[next(plain.parameters())]["step"] == 2
    # When an optimizer has gone, so have its hooks.
    del wrapped, scheduler
    again = hvd.DistributedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1))
    for step in range(2):
        again.zero_grad()
        all_backwards(plain, step)
        again.step()
    assert again.global_step == 2


@pytest.mark.ranks(2)
def test_metrics_samples_and_last_update() -> None:
    hvd.init()
    rank = hvd.rank()
    model = make_model()
    optimizer = sgd(model)
    assert optimizer.last_update.step == -1 and optimizer.counters()["contributed"] == 0
    for step in range(4):
        optimizer.zero_grad()
        optimizer.samples = 3 if rank else 1
        loss_of(model, batch(rank, step)).backward()
        optimizer.metrics(rank=torch.tensor(float(rank)), one=rank if rank else None, none=float("nan"))
        if step != 2:
            optimizer.metrics(rank=rank)
        optimizer.step()
        update = optimizer.last_update
        assert (update.step, update.contributors, update.samples) == (step, (0, 1), 4.0)
        assert update.contributed and not update.dropped and update.caught_up == 0
        assert update.metrics["rank"] == 0.75 and update.metrics["one"] == 1.0
        assert update.metrics["none"] != update.metrics["none"]
    with pytest.raises(hvd.UsageError, match="the names are fixed at the first step"):
        optimizer.metrics(new=1.0)
    with pytest.raises(hvd.UsageError, match="expected a number"):
        optimizer.metrics(one=torch.ones(2))
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(hvd.UsageError, match="above 0"):
            optimizer.samples = wrong
    loss_of(model, batch(rank, 0)).backward()
    with pytest.raises(hvd.UsageError, match="before backward"):
        optimizer.samples = 9
    optimizer.step()
    assert optimizer.last_update.metrics["rank"] != optimizer.last_update.metrics["rank"]  # not given this time
    assert optimizer.counters() == {"contributed": 5, "dropped": 0, "caught_up": 0, "resynced": 0}


def late_at(steps: str, ms: int = 250) -> None:
    """Rank 1 is late at these steps."""
    faults.inject(faults.Delay(rank=1, ms=ms, steps=steps))


@pytest.mark.ranks(2)
def test_a_late_rank_does_what_the_contributors_did() -> None:
    """Schedulers, hooks, clipping, weight averages, metrics: all of it runs for updates that a rank has missed."""
    hvd.init()
    rank = hvd.rank()
    late_at("3,9")
    model = make_model()
    plain = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=torch.tensor(0.01))
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters(), backup_workers=1, grace=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    optimizer.register_scheduler(scheduler)
    average = copy.deepcopy(model)
    log: list[tuple[str, int, float]] = []
    optimizer.on_update(lambda u: log.append(("before", u.step, optimizer.param_groups[0]["lr"].item())), when="before")
    optimizer.on_update(lambda _: clip(model), when="before")

    def move_average(update: Any) -> None:
        log.append(("after", update.step, update.metrics["loss"]))
        with torch.no_grad():
            for mean, p in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(p, 0.2)

    optimizer.on_update(move_average)
    seen, dropped = [], 0
    for _ in hvd.follow(range(16), optimizer):
        seen.append(optimizer.global_step)
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, optimizer.global_step))
        optimizer.metrics(loss=loss)
        loss.backward()
        optimizer.step()
        update = optimizer.last_update
        assert update.step == optimizer.global_step - 1
        assert update.dropped == (update.caught_up > 0 and not update.contributed)
        dropped += update.dropped
        scheduler.step()  # does nothing any more
    assert [step for kind, step, _ in log if kind == "after"] == list(range(16))
    for kind, step, value in log:
        if kind == "before":
            assert abs(value - 0.01 * 0.5 ** (step // 4)) < 1e-7
    if rank == 1:
        assert dropped >= 1 and seen[:4] == [0, 1, 2, 3] and len(seen) < 16
    told = hvd.allgather_object((digest(model, optimizer), digest(average), log, scheduler.last_epoch))
    assert told[0] == told[1]
    assert scheduler.last_epoch == 16
    buffer = io.BytesIO()
    torch.save(scheduler.state_dict(), buffer)
    with pytest.raises(hvd.UsageError, match="registered already"):
        optimizer.register_scheduler(scheduler)
    with pytest.raises(hvd.UsageError, match="ReduceLROnPlateau"):
        optimizer.register_scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(hvd.UsageError, match="another optimizer"):
        optimizer.register_scheduler(torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.1), 3))


@pytest.mark.ranks(2)
def test_hyperparameters_travel_and_gradients_are_carried() -> None:
    hvd.init()
    rank = hvd.rank()
    # The learning rate of the lowest contributor is everybody's, also where the program sets another.
    model = make_model()
    optimizer = sgd(model, backup_workers=1, grace=2.0)
    for step in range(4):
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = 0.01 * (step + 1) * (1 + rank)
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.01 * (step + 1)
    told = hvd.allgather_object(digest(model, optimizer))
    assert told[0] == told[1]
    # Without backup workers each rank applies its own, as in Horovod.
    model = make_model()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + rank)
    loss_of(model, batch(rank, 0)).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.01 * (1 + rank)
    # late="carry": what was dropped is in this rank's next contribution. Each gradient counts 1.
    for late in ("carry", "drop"):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=F64))
        plain = torch.optim.SGD([weight], lr=1.0)
        optimizer = hvd.DistributedOptimizer(plain, backup_workers=1, late=late, grace=0.1)
        contributions: list[float] = []

        def note(update: Any, weight: Any = weight, contributions: Any = contributions) -> None:
            contributions.append(weight.grad[1].item() * len(update.contributors))

        optimizer.on_update(note, when="before")
        late_at("2,6")
        waiting = 0
        for _ in hvd.follow(range(12), optimizer):
            optimizer.zero_grad()
            weight[rank].backward()
            waiting += 1
            optimizer.step()
            if rank == 1 and optimizer.last_update.contributed:
                assert contributions[-1] == pytest.approx(waiting if late == "carry" else 1)
                waiting = 0
        faults.clear()
        if rank == 1:
            assert optimizer.counters()["dropped"] > 0
            assert round(max(contributions)) > 1 if late == "carry" else round(max(contributions)) == 1
        told = hvd.allgather_object((weight.detach().tolist(), contributions))
        assert told[0] == told[1]


@pytest.mark.ranks(2)
def test_updates_applied_outside_step_leave_the_gradients_alone() -> None:
    """A rank that is late for the beginning of an epoch catches up in follow(), after it has zeroed its gradients."""
    hvd.init()
    rank = hvd.rank()
    for views in (False, True):
        weight = torch.nn.Parameter(torch.zeros(2, dtype=F64))
        plain = torch.optim.SGD([weight], lr=1.0)
        optimizer = hvd.DistributedOptimizer(plain, backup_workers=1, grace=0.1, gradient_as_bucket_view=views)
        contributions: list[list[float]] = []

        def note(update: Any, weight: Any = weight, contributions: Any = contributions) -> None:
            contributions.append((weight.grad * len(update.contributors)).tolist())

        optimizer.on_update(note, when="before")
        for epoch in range(3):
            if rank == 1 and epoch == 1:
                time.sleep(0.6)
            for _ in hvd.follow(range(6), optimizer):
                assert weight.grad is None or weight.grad.tolist() == [0, 0], "an update has left its gradient behind"
                weight[rank].backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=epoch == 0)
        assert len(contributions) == 18 and all(value in (0, 1) for pair in contributions for value in pair)
        told = hvd.allgather_object((weight.detach().tolist(), contributions))
        assert told[0] == told[1]
        assert [1, 0] in contributions, "rank 1 was never late"


@pytest.mark.ranks(2)
def test_checkpoints_and_broadcasts() -> None:
    hvd.init()
    rank = hvd.rank()
    for make_plain in (
        lambda ps: torch.optim.SGD(ps, lr=0.1),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, lr=0.1, betas=(0.8, 0.9)),
        lambda ps: torch.optim.Adagrad(ps, lr=0.1),
        lambda ps: torch.optim.RMSprop(ps, lr=0.1, centered=True),
        lambda ps: torch.optim.NAdam(ps, lr=0.1),
        lambda ps: torch.optim.Rprop(ps, lr=0.1),
    ):
        model = make_model(seed=rank)
        plain = make_plain(list(model.parameters()))
        if rank == 0:
            for step in range(3):
                plain.zero_grad()
                loss_of(model, batch(0, step)).backward()
                plain.step()
            plain.param_groups[0]["lr"] = 0.07
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = hvd.DistributedOptimizer(plain, model.named_parameters())
        if rank == 0:
            optimizer.load_state_dict({**optimizer.state_dict(), "hvd_backup": {"global_step": 3}})
        hvd.broadcast_optimizer_state(optimizer, root_rank=0)
        told = hvd.allgather_object((digest(model, optimizer), optimizer.global_step))
        assert told[0] == told[1] and told[0][1] == 3
        assert optimizer.param_groups[0]["lr"] == 0.07
        optimizer.zero_grad()
        loss_of(model, batch(rank, 3)).backward()
        optimizer.step()
        assert optimizer.global_step == 4
        saved = copy.deepcopy(optimizer.state_dict())
        other_model = copy.deepcopy(model)
        other_plain = make_plain(list(other_model.parameters()))
        other_plain.load_state_dict(saved)  # a plain optimizer ignores our key
        other = hvd.DistributedOptimizer(make_plain(list(other_model.parameters())), other_model.named_parameters())
        groups = other.param_groups
        other.load_state_dict(saved)
        assert other.global_step == 4 and other.param_groups is groups
        for m, o in ((model, optimizer), (other_model, other)):
            o.zero_grad()
            loss_of(m, batch(rank, 4)).backward()
            o.step()
        assert digest(model, optimizer) == digest(other_model, other)
        assert other.global_step == optimizer.global_step == 5
    hvd.broadcast_parameters(model.named_parameters(), root_rank=1)
    hvd.broadcast_parameters(list(model.parameters()), root_rank=1)
    with pytest.raises(ValueError, match="LBFGS"):
        hvd.broadcast_optimizer_state(torch.optim.LBFGS(model.parameters()), root_rank=0)
