"""The rules of step() and of rounds, on a channel that plays a script: no ranks, no tensors."""

import math
import warnings
from array import array
from typing import Any

import pytest

from hvd_backup import training
from hvd_backup.errors import HvdBackupError, UsageError
from hvd_backup.metrics import Metrics
from tests.fake_training import OVER, RESUME, FakeFramework, FakePlace, FakeUpdate


@pytest.fixture
def framework(monkeypatch: pytest.MonkeyPatch) -> FakeFramework:
    made = FakeFramework(monkeypatch)
    made.step()
    made.log.clear()
    return made


def test_the_first_step_opens_the_channel_with_everything_that_must_be_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    place = FakePlace()
    first = FakeFramework(monkeypatch, place=place, grace=0.25, max_lag=9)
    second = FakeFramework(monkeypatch, place=place, backup_workers=0)
    first.training.metrics({"loss": 1.0, "acc": 2.0})
    assert first.training.step == first.training.global_step == 0
    first.step()
    given = place.opened_with
    assert (given["name"], given["required"], given["grace_us"], given["max_lag"]) == ("optimizer.0", 3, 250_000, 9)
    assert given["wait_for_all"] is True
    assert given["description"].startswith("w (2,) float32\nbackup_workers 1")
    assert given["description"].endswith("metrics acc, loss")
    layout = [entry for entry in first.log if entry[0] == "set_layout"]
    assert layout == [("set_layout", [(3, "float32"), (4, "float64"), (4, "float64")], [0, 0, 0])]
    second.step()
    assert place.opened_with["name"] == "optimizer.1" and place.opened_with["required"] == 4
    assert place.opened_with["description"].endswith("metrics none")


def test_scope_bucket_gives_each_bucket_and_the_metrics_a_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = FakeFramework(monkeypatch, scope="bucket")
    framework.training.metrics({"loss": 1.0})
    framework.open()
    assert ("set_layout", [(3, "float32"), (4, "float64"), (2, "float64")], [0, 1, 2]) in framework.log
    framework.channel.script = [
        FakeUpdate(step=0, contributors=[[1, 2, 3], [0, 1, 2], [0, 1, 2, 3]]),
        FakeUpdate(step=1, contributors=[[0, 1, 2], [0, 1, 2], [1, 2, 3]]),
        RESUME,
    ]
    assert framework.step() == [False, True]  # what it contributed was for step 0
    update = framework.training.last_update
    assert (update.step, update.by_scope, update.contributors) == (1, ((0, 1, 2), (0, 1, 2)), (0, 1, 2))
    assert (update.caught_up, update.dropped) == (2, True)


def test_a_contributor_applies_its_update(framework: FakeFramework) -> None:
    assert framework.step() == [True, True]
    assert framework.log == [
        ("begin", 1.0, b"lr"),
        ("submit", 0, 1, 10),
        ("submit", 1, 2, 20),
        "wait",
        "load",
        "apply",
        "applied",
    ]
    update = framework.training.last_update
    assert (update.step, update.contributed, update.caught_up, update.dropped) == (1, True, 0, False)
    assert (framework.training.step, framework.training.step_calls) == (2, 2)


def test_a_late_rank_applies_what_it_missed_in_order_and_resumes(framework: FakeFramework) -> None:
    seen: list[tuple[str, int, int]] = []
    framework.training.before_update.append(lambda update: seen.append(("before", update.step, update.caught_up)))
    framework.training.after_update.append(lambda update: seen.append(("after", update.step, update.caught_up)))
    for _ in range(2):
        framework.channel.missed()
    framework.channel.script.append(RESUME)
    assert framework.step() == [False, False]
    assert framework.log[3:] == ["wait", "load", "apply", "applied", "wait", "load", "apply", "applied", "wait"]
    assert seen == [("before", 1, 0), ("after", 1, 0), ("before", 2, 1), ("after", 2, 1)]
    update = framework.training.last_update
    assert (update.step, update.contributed, update.caught_up, update.dropped) == (2, False, 2, True)
    assert framework.step() == [True, True]


def test_a_bucket_whose_contributors_have_all_left_counts_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = FakeFramework(monkeypatch, scope="bucket")
    framework.open()
    framework.channel.script = [FakeUpdate(step=0, contributors=[[], [1, 2, 3]]), RESUME]
    framework.log.clear()
    assert framework.step() == [False, False]
    assert ("load", [False, True]) in framework.log and framework.training.last_update.contributors == ()


def test_samples_are_checked_and_go_with_the_gradient(framework: FakeFramework) -> None:
    for wrong in (0, -2, math.inf, math.nan):
        with pytest.raises(UsageError, match="above 0"):
            framework.training.samples = wrong
    framework.training.samples = 32
    framework.backward()
    framework.training.samples = 32.0  # the same is no change
    with pytest.raises(UsageError, match="before backward"):
        framework.training.samples = 16
    framework.step()
    assert framework.log[0] == ("begin", 32.0, b"lr")


def test_metrics_are_means_over_those_that_gave_a_number() -> None:
    metrics = Metrics()
    metrics.give({"b": 4, "a": None})
    metrics.freeze()
    contribution, result = metrics.pack()
    assert metrics.names == ("a", "b") and contribution != result == metrics.result_address
    assert list(metrics._contribution) == [0.0, 0.0, 4.0, 1.0]
    metrics._result = array("d", [0.0, 0.0, 6.0, 0.75])
    means = metrics.means()
    assert math.isnan(means["a"]) and means["b"] == 8.0
    assert all(map(math.isnan, metrics.means(has_result=False).values()))
    metrics.give({"a": math.nan, "b": math.inf})
    metrics.pack()
    assert list(metrics._contribution) == [0.0, 0.0, math.inf, 1.0]
    metrics.pack()
    assert list(metrics._contribution) == [0.0] * 4, "values are for one update"
    with pytest.raises(UsageError, match=r"metrics\(c=.*were: a, b"):
        metrics.give({"c": 1.0})
    with pytest.raises(UsageError, match="expected a number"):
        metrics.give({"a": "high"})


def test_an_exception_in_the_middle_of_an_update_makes_the_optimizer_unusable(framework: FakeFramework) -> None:
    framework.training.after_update.append(lambda update: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        framework.step()
    with pytest.raises(HvdBackupError, match=r"while it applied update 1, .* no longer"):
        framework.training.check_usable()
    framework.log.clear()
    framework.training.leave_round("barrier()")
    assert framework.log == []


def test_a_followed_round_begins_and_ends(framework: FakeFramework) -> None:
    framework.training.leave_round("barrier()")  # what comes before
    framework.log.clear()
    framework.channel.missed()
    framework.channel.script.append(RESUME)
    framework.training.begin_round(10, 4)
    assert framework.log[:3] == [("begin_round", 10, 4), "outside", "wait"] and framework.log[-1] == "inside"
    assert framework.training.round_start == 1 and framework.training.step == 2
    assert framework.training.in_followed_round() and not framework.training.aligned()
    framework.channel.step = 4
    assert framework.training.aligned()
    assert not framework.training.round_over()
    framework.channel.round_end = 2
    assert not framework.training.aligned(), "taken over from a later round, in which the others meet it"
    framework.channel.round_end = 4
    assert framework.training.aligned()
    framework.channel.script = [FakeUpdate(step=4, contributors=[[1, 2, 3]]), OVER]
    assert framework.training.round_over()
    framework.log.clear()
    training.end_rounds([framework.training])
    assert framework.log == ["leave", "wait"]  # it was over already: away would be for the next round
    assert not framework.training.in_followed_round()


def test_a_rank_whose_data_has_ended_goes_on_applying(framework: FakeFramework) -> None:
    framework.training.leave_round("barrier()")
    framework.channel.script = [RESUME]
    framework.training.begin_round(10, 0)
    framework.log.clear()
    for _ in range(3):
        framework.channel.missed()
    framework.channel.script.append(OVER)
    training.end_rounds([framework.training])
    assert framework.log[0] == "away"
    assert framework.log.count("apply") == 3 and framework.training.step == 4


def test_a_round_of_a_rank_without_data_opens_the_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = FakeFramework(monkeypatch)
    framework.training.begin_round(0, 0)
    assert framework.training.channel is None and not framework.training.round_over()
    framework.training.stop_contributing()
    begun = framework.log.index(("begin_round", 0, 0))
    assert framework.log.index("away") > begun


def test_several_rounds_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the first may need updates of the second, whose journal is bounded."""
    place = FakePlace()
    frameworks = [FakeFramework(monkeypatch, place=place) for _ in range(2)]
    for framework in frameworks:
        framework.training.begin_round(-1, 0)
        framework.step()
    first, second = (framework.channel for framework in frameworks)
    second.missed()
    poll = second.poll

    def poll_second() -> bool:
        if not second.script and not first.script:
            first.script.append(OVER)  # only after the second channel has been served
            second.script.append(OVER)
        return poll()

    second.poll = poll_second  # type: ignore[method-assign]
    training.end_rounds([framework.training for framework in frameworks])
    assert second.step == 2


def test_leaving_a_round_without_follow_warns_once_about_leftovers(
    framework: FakeFramework, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_warned_about_leftovers", False)
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for _ in range(3):
                framework.channel.script = [OVER]
                framework.step()
                assert framework.training.last_update.dropped
            framework.channel.script = [FakeUpdate(step=framework.channel.step), OVER]
            framework.training.leave_round("allreduce()")
        told = [str(warning.message) for warning in caught]
    assert len(told) == 1 and "3 gradients were dropped" in told[0] and "allreduce()" in told[0]


def test_full_collectives_between_backward_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    framework = FakeFramework(monkeypatch, backup_workers=1)
    framework.training.leave_round("barrier()")  # before the first step there is no round
    assert "leave" not in framework.log
    framework.step()
    framework.backward()
    with pytest.raises(UsageError, match="would drop the gradient"):
        framework.training.leave_round("barrier()")
    synchronous = FakeFramework(monkeypatch, backup_workers=0)
    synchronous.step()
    synchronous.backward()
    synchronous.log.clear()
    synchronous.training.leave_round("barrier()")
    assert synchronous.log == []


def test_follow_after_plain_steps_ends_their_round_first(framework: FakeFramework) -> None:
    framework.channel.script = [OVER, RESUME]
    framework.training.begin_round(5, 0)
    kinds = [entry for entry in framework.log if entry in ("leave", ("begin_round", 5, 0))]
    assert kinds == ["leave", ("begin_round", 5, 0)]
    with pytest.raises(UsageError, match="end that loop first"):
        framework.training.begin_round(5, 0)


def test_an_abandoned_round_never_blocks_and_is_made_up_for(framework: FakeFramework) -> None:
    framework.channel.script = [OVER, RESUME]
    framework.training.begin_round(5, 0)
    framework.log.clear()
    framework.training.abandon_round()
    assert framework.log == ["away"]
    framework.channel.missed()
    framework.channel.script += [OVER]
    framework.training.leave_round("barrier()")
    assert framework.log.count("apply") == 1

    def broken() -> Any:
        raise HvdBackupError("the engine has failed")

    framework.channel.away = broken  # type: ignore[method-assign]
    framework.training.abandon_round()


def test_the_global_step_goes_on_from_a_checkpoint(framework: FakeFramework) -> None:
    framework.training.global_step = 100
    assert framework.training.step == 1 and framework.training.global_step == 100
    framework.step()
    assert framework.training.global_step == 101
    assert framework.training.counters() == {"contributed": 7, "dropped": 2, "caught_up": 1, "resynced": 0}
