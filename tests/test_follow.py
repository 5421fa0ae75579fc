"""Where follow() is in the data, on a channel that plays a script."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hvd_backup.errors import UsageError
from hvd_backup.follow import follow
from tests.fake_training import OVER, RESUME, FakeFramework, FakePlace


class Numbers(torch.utils.data.Dataset[int]):
    """Numbers that note when they are loaded."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        self.loaded.append(index)
        return index


class Stream(torch.utils.data.IterableDataset[int]):
    """Numbers without indices."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(8))


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> FakeFramework:
    made = FakeFramework(monkeypatch)
    made.step()
    made.training.leave_round("barrier()")
    made.channel.script = [RESUME]
    return made


def miss(framework: FakeFramework, updates: int) -> None:
    """The next gradient is dropped, and this many updates are applied in its place."""
    for _ in range(updates):
        framework.channel.missed()
    framework.channel.script.append(RESUME)


def seen(framework: FakeFramework, loader: Any, late: dict[int, int]) -> list[Any]:
    """The batches of one epoch in which the step on batch b misses late[b] updates."""
    start = framework.training.step
    batches = []
    for batch in follow(loader, framework):
        batches.append(batch)
        number = int(batch)
        assert number == framework.training.step - start
        if number in late:
            miss(framework, late[number])
        framework.step()
        if number + 1 == 8:
            framework.channel.script = [OVER]
    return batches


def test_a_late_rank_skips_the_batches_of_the_updates_that_it_missed(framework: FakeFramework) -> None:
    assert seen(framework, range(8), {2: 3, 6: 1}) == [0, 1, 2, 5, 6, 7]
    assert not framework.training.in_followed_round()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_without_workers_skips_without_loading(framework: FakeFramework, workers: int) -> None:
    dataset = Numbers(8)
    loader = torch.utils.data.DataLoader(dataset, batch_size=1, num_workers=workers)
    assert seen(framework, loader, {2: 3}) == [0, 1, 2, 5, 6, 7]
    assert dataset.loaded == ([0, 1, 2, 5, 6, 7] if workers == 0 else [])


def test_other_iterables_are_read_and_thrown_away(framework: FakeFramework) -> None:
    loader = torch.utils.data.DataLoader(Stream(), batch_size=1)
    assert seen(framework, loader, {1: 2}) == [0, 1, 3, 4, 5, 6, 7]


def test_updates_before_the_first_batch_move_the_position(framework: FakeFramework) -> None:
    framework.channel.script = []
    miss(framework, 2)
    batches = []
    for batch in follow(range(8), framework):
        batches.append(batch)
        framework.step()
        if batch == 7:
            framework.channel.script = [OVER]
    assert batches == [2, 3, 4, 5, 6, 7]


def test_skipping_beyond_the_end_ends_the_loop(framework: FakeFramework) -> None:
    batches = []
    for batch in follow(iter(range(6)), framework):
        batches.append(batch)
        if batch == 3:
            miss(framework, 7)
            framework.step()
            framework.channel.script = [OVER]
        else:
            framework.step()
    assert batches == [0, 1, 2, 3]
    assert "away" in framework.log


def test_the_end_of_the_round_ends_the_loop_though_there_is_data(framework: FakeFramework) -> None:
    batches = []
    for batch in follow(range(8), framework):
        batches.append(batch)
        framework.step()
        if batch == 4:
            framework.channel.round_end = framework.training.step
            framework.channel.script = [OVER]
    assert batches == [0, 1, 2, 3, 4]
    assert "away" not in framework.log


def test_a_round_end_that_was_outdated_is_asked_for_again(framework: FakeFramework) -> None:
    batches = []
    for batch in follow(range(8), framework):
        batches.append(batch)
        framework.step()
        if batch == 2:
            framework.channel.round_end = framework.training.step

            def wait_once(channel: Any = framework.channel) -> Any:
                del channel.wait  # the answer brings the new end
                channel.round_end = channel.step + 2
                return RESUME

            framework.channel.wait = wait_once  # type: ignore[method-assign]
        if batch == 4:
            framework.channel.script = [OVER]
    assert batches == [0, 1, 2, 3, 4]


def test_batches_without_a_step_and_accumulation(framework: FakeFramework) -> None:
    batches = []
    for batch in follow(range(8), framework):
        batches.append(batch)
        if batch != 3:
            framework.step()
        if batch == 7:
            framework.channel.script = [OVER]
    assert batches == list(range(8))
    framework.channel.script = [RESUME]
    batches = []
    for batch in follow(range(12), framework):  # two batches for each step; two updates are missed at 2 and 3
        batches.append(batch)
        if batch == 3:
            miss(framework, 2)
        if batch % 2:
            framework.step()
        if batch == 11:
            framework.channel.script = [OVER]
    assert batches == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]


def test_two_steps_for_a_batch(framework: FakeFramework) -> None:
    batches = []
    for batch in follow(iter(range(5)), framework):
        batches.append(batch)
        framework.step()
        framework.step()
        if batch == 4:
            framework.channel.script = [OVER]
    assert batches == [0, 1, 2, 3, 4]
    framework.channel.script = [RESUME]
    with pytest.raises(UsageError, match="more than once"):
        for _ in follow(range(5), framework):
            framework.step()
            framework.step()


def test_leaving_the_loop_waits_unless_an_exception_is_on_its_way(framework: FakeFramework) -> None:
    for _ in follow(range(8), framework):
        framework.step()
        framework.channel.missed()
        framework.channel.script.append(OVER)
        break
    assert framework.log[-2:] == ["leave", "wait"] and framework.log.count("apply") == 3

    def returns() -> int:
        framework.channel.script = [RESUME]
        for batch in follow(range(8), framework):
            framework.step()
            framework.channel.script = [OVER]
            return batch
        return -1

    assert returns() == 0 and framework.log[-2:] == ["leave", "wait"]

    framework.channel.script = [RESUME]
    framework.log.clear()
    with pytest.raises(KeyError):
        for _ in follow(range(8), framework):
            raise KeyError
    assert framework.log[-1] == "away" and not framework.training.in_followed_round()
    framework.channel.script = [OVER, RESUME]
    loop = iter(follow(range(8), framework))
    next(loop)
    framework.log.clear()
    loop.close()
    assert framework.log == ["away"]


def test_a_loader_that_fails(framework: FakeFramework) -> None:
    def loader() -> Iterator[int]:
        yield 0
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        for _ in follow(loader(), framework):
            framework.step()
    assert framework.log[-1] == "away"


def test_several_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    place = FakePlace()
    critic, maker = (FakeFramework(monkeypatch, place=place) for _ in range(2))
    batches = []
    for batch in follow(range(6), [critic, maker]):
        batches.append(batch)
        critic.step()
        if batch % 3 == 2:
            maker.step()
        if batch == 5:
            critic.channel.script = [OVER]
            maker.channel.script = [OVER]
    assert batches == list(range(6))
    assert ("begin_round", 6, 0) in place.log and ("begin_round", -1, 0) in place.log
    assert len(follow(range(6), critic)) == 6
    with pytest.raises(TypeError):
        len(follow(iter(range(6)), critic))
