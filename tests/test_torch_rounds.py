"""I6 (live): epochs end on all ranks at the same step, whatever the data and the loop look like."""

import time
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import faults
from tests.torch_training import Unsized, batch, digest, loss_of, make_model


def make(backup_workers: int, seed: int = 0, **options: Any) -> tuple[torch.nn.Module, Any]:
    model = make_model(seed)
    plain = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, hvd.DistributedOptimizer(plain, model.named_parameters(), backup_workers=backup_workers, **options)


def step_once(model: torch.nn.Module, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    loss_of(model, batch(hvd.rank(), number)).backward()
    optimizer.step()


def check_equal(*models: torch.nn.Module, optimizer: Any, step: int | None = None) -> None:
    """All ranks have the same weights and the same global step. A full collective."""
    told = hvd.allgather_object((optimizer.global_step, [digest(model) for model in models]))
    assert len({(at, tuple(digests)) for at, digests in told}) == 1, told
    if step is not None:
        assert optimizer.global_step == step, (optimizer.global_step, step)


@pytest.mark.ranks(1, 2, 4)
def test_followed_epochs_of_any_lengths(size: int) -> None:
    hvd.init()
    rank = hvd.rank()
    faults.inject(faults.Delay(rank="rotate:3", ms=6, p=0.6))
    cases: list[tuple[str, list[Iterable[int]], int | None]] = [
        ("equal", [range(12)] * 4, 12),
        ("uneven", [range(11), range(7), range(14), range(3)], None),
        ("unknown", [Unsized(8), Unsized(8), Unsized(8), Unsized(8)], None),
        ("unknown and uneven", [Unsized(9), Unsized(2), Unsized(6), Unsized(9)], None),
        ("some unknown", [range(6), Unsized(9), range(4), range(8)], None),
        ("nothing on rank 0", [range(0), range(6), range(4), range(5)], None),
    ]
    for backup_workers in (0, 1) if size > 1 else (0,):
        for name, loaders, steps in cases:
            model, optimizer = make(backup_workers)
            loaders = loaders[:size]
            longest = max((len(loader) if isinstance(loader, range) else loader.count) for loader in loaders)
            end = 0
            for _ in range(3):  # epochs
                seen = []
                for number in hvd.follow(loaders[rank], optimizer):
                    assert not seen or number > seen[-1]
                    seen.append(number)
                    assert number == optimizer.global_step - end, name
                    step_once(model, optimizer, optimizer.global_step)
                assert set(seen) <= set(loaders[rank])
                check_equal(model, optimizer=optimizer)
                taken = optimizer.global_step - end
                known = all(isinstance(loader, range) for loader in loaders)
                if known and longest > 0:
                    assert taken == longest, (name, taken)
                else:
                    assert taken <= longest, (name, taken)
                end = optimizer.global_step
            if steps is not None:
                assert end == 3 * steps


@pytest.mark.ranks(4)
def test_a_loop_without_follow_ends_and_warns_once() -> None:
    hvd.init()
    rank = hvd.rank()
    faults.inject(faults.Delay(rank="rotate:5", ms=8, p=0.8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for backup_workers in (1, 0):
            model, optimizer = make(backup_workers)
            iterations = [12, 12, 12, 12] if backup_workers else [10, 14, 8, 12]
            for _ in range(3):
                for number in range(iterations[rank]):
                    step_once(model, optimizer, number)
                mean = hvd.allreduce(torch.tensor(float(rank)))
                assert mean.item() == 1.5
                check_equal(model, optimizer=optimizer)
            assert optimizer.global_step > 0
    told = [str(warning.message) for warning in caught if "gradients were dropped" in str(warning.message)]
    assert len(told) <= 1
    if told:
        assert "allreduce" in told[0] and "follow" in told[0]
    everybody = hvd.allgather_object(len(told))
    assert sum(everybody) > 0, "nobody warned although the ranks had unequal data"
    # The full collective of a synchronous loop belongs between backward() and step() as well as after it.
    model, optimizer = make(0)
    for number in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, number))
        loss.backward()
        hvd.allreduce(loss)
        optimizer.step()
        assert not optimizer.last_update.dropped
    check_equal(model, optimizer=optimizer, step=4)
    # After plain steps, follow() begins a round of its own.
    for _ in hvd.follow(range(5), optimizer):
        step_once(model, optimizer, optimizer.global_step)
    check_equal(model, optimizer=optimizer, step=9)


@pytest.mark.ranks(4)
def test_two_optimizers_in_one_program() -> None:
    hvd.init()
    rank = hvd.rank()
    faults.inject(faults.Delay(rank="rotate:4", ms=6, p=0.6))
    for backup_workers, lengths in ((1, [12, 12, 12, 12]), (1, [6, 12, 9, 3]), (0, [5, 9, 7, 2])):
        critic, critic_optimizer = make(backup_workers, seed=1)
        maker, maker_optimizer = make(backup_workers, seed=2)
        for _ in range(2):
            for number in hvd.follow(range(lengths[rank]), [critic_optimizer, maker_optimizer]):
                step_once(critic, critic_optimizer, number)
                if number % 2:  # a generator that steps less often than its critic
                    step_once(maker, maker_optimizer, number)
            check_equal(critic, maker, optimizer=critic_optimizer)
            check_equal(critic, maker, optimizer=maker_optimizer)
        # A rank that was turned away because it was out of phase has used up a batch without a step.
        assert 2 * max(lengths) - 4 <= critic_optimizer.global_step <= 2 * max(lengths), critic_optimizer.global_step
        assert 0 < maker_optimizer.global_step < critic_optimizer.global_step


@pytest.mark.ranks(4)
def test_meeting_every_k_steps_and_collectives_inside_the_loop() -> None:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    faults.inject(faults.Delay(rank="rotate:2", ms=8, p=0.7))
    model, optimizer = make(1)
    met = []
    for epoch in range(2):
        for _ in hvd.follow(range(17), optimizer, align_every=5):
            step_once(model, optimizer, optimizer.global_step)
            if optimizer.aligned:
                met.append(optimizer.global_step)
                check_equal(model, optimizer=optimizer)
        check_equal(model, optimizer=optimizer, step=17 * (epoch + 1))
    assert met == [5, 10, 15, 20, 25, 30]
    with pytest.raises(hvd.UsageError, match=r"align_every=k.*"):
        for _ in hvd.follow(range(4), optimizer):
            step_once(model, optimizer, optimizer.global_step)
            hvd.barrier()
    # Without backup workers nobody skips, and full collectives are welcome in the loop.
    model, optimizer = make(0)
    for _ in hvd.follow(range(6), optimizer):
        step_once(model, optimizer, optimizer.global_step)
        assert hvd.allreduce(torch.ones(2), op=hvd.Sum).tolist() == [size, size]
    check_equal(model, optimizer=optimizer, step=6)
    assert rank == hvd.rank()


@pytest.mark.ranks(4)
def test_loops_that_are_left_early_skip_batches_or_accumulate() -> None:
    hvd.init()
    rank = hvd.rank()
    faults.inject(faults.Delay(rank="rotate:4", ms=6, p=0.5))
    model, optimizer = make(1)
    for _ in hvd.follow(range(20), optimizer):
        step_once(model, optimizer, optimizer.global_step)
        if rank == 2 and optimizer.global_step >= 6:
            break
    check_equal(model, optimizer=optimizer, step=20)
    for _ in hvd.follow(range(20), optimizer):  # all leave
        step_once(model, optimizer, optimizer.global_step)
        if optimizer.global_step >= 26:
            break
    check_equal(model, optimizer=optimizer, step=26)
    # An exception that one rank survives; it does not wait for the others, and catches up when it meets them.
    try:
        for _ in hvd.follow(range(10), optimizer):
            step_once(model, optimizer, optimizer.global_step)
            if rank == 1 and optimizer.global_step >= 30:
                raise KeyError("a batch that cannot be read")
    except KeyError:
        assert optimizer.global_step < 36
    hvd.barrier()
    check_equal(model, optimizer=optimizer, step=36)
    # A gradient that is skipped on one rank.
    for number in hvd.follow(range(9), optimizer):
        if not (rank == 1 and number == 4):
            step_once(model, optimizer, optimizer.global_step)
    check_equal(model, optimizer=optimizer)
    # Two batches for each step. A rank that comes late to the second epoch begins in the middle.
    model, optimizer = make(1, backward_passes_per_step=2)
    for epoch in range(2):
        if epoch == 1 and rank == 1:
            time.sleep(0.3)
        numbers = []
        for number in hvd.follow(range(12), optimizer):
            numbers.append(number)
            if number % 2 == 0:
                optimizer.zero_grad()
            (loss_of(model, batch(rank, number)) / 2).backward()
            if number % 2:
                optimizer.step()
        assert numbers == sorted(set(numbers))
        assert all(b == a + 1 for a, b in zip(numbers[::2], numbers[1::2], strict=True)), numbers
        check_equal(model, optimizer=optimizer)
    assert 0 < optimizer.global_step <= 12


@pytest.mark.ranks(1, 2, 4)
def test_join_lets_the_others_train_on(size: int) -> None:
    hvd.init()
    rank = hvd.rank()
    faults.inject(faults.Delay(rank="rotate:4", ms=6, p=0.5))
    for backup_workers in (0, 1) if size > 1 else (0,):
        critic, critic_optimizer = make(backup_workers, seed=1)
        maker, maker_optimizer = make(backup_workers, seed=2)
        for epoch in range(3):
            before = critic_optimizer.global_step, maker_optimizer.global_step
            for number in range(4 * rank):  # rank 0 has no data at all
                step_once(critic, critic_optimizer, number)
                if number % 2:
                    step_once(maker, maker_optimizer, number)
            last = hvd.join()
            assert 0 <= last < size and (backup_workers or last == size - 1)
            check_equal(critic, maker, optimizer=critic_optimizer)
            check_equal(critic, maker, optimizer=maker_optimizer)
            if backup_workers == 0:
                longest = 4 * (size - 1)
                assert critic_optimizer.global_step == before[0] + longest, epoch
                assert maker_optimizer.global_step == before[1] + longest // 2
    loss_of(critic, batch(rank, 0)).backward()
    with pytest.raises(hvd.UsageError, match=r"join\(\) between backward\(\) and step\(\)"):
        hvd.join()
    critic_optimizer.step()
    with pytest.raises(hvd.UsageError, match=r"join\(\) inside a loop over follow\(\)"):
        for _ in hvd.follow(range(1), critic_optimizer):
            hvd.join()
