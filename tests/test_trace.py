"""Recordings: what a trace holds, that it is readable whatever becomes of the run, and what is made of it."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import _core, arrivals, stragglers, trace
from hvd_backup.errors import UsageError
from tests.launch import run_ranks, start_ranks
from tests.torch_training import batch, loss_of, make_model

HEADER = {"event": "header", "format": "hvd_backup trace", "version": 1, "size": 3, "began_unix_s": 1e9}
STEPS = 40


def written(*lines: dict[str, Any], tail: str = "") -> str:
    return "".join(json.dumps(line) + "\n" for line in (HEADER, *lines)) + tail


def line(event: str, step: int, t_us: int, **more: Any) -> dict[str, Any]:
    return {"t_us": t_us, "event": event, "channel": "optimizer.0", "step": step, "scope": 0, "attempt": 0, **more}


OPENED = line("opened", 0, 0, kind="training", required=2, grace_us=0, max_misses=0, max_lag=8, description="w (2,)")


def step_lines(step: int, *, late_us: int) -> list[dict[str, Any]]:
    """Ranks 0 and 1 arrive 1000 and 1100 us after the step has opened, rank 2 `late_us`; a step lasts 2000 us."""
    opened = 2000 * step
    decided, ranks, at = opened + 1100, [0, 1], [opened + 1000, opened + 1100]
    return [
        line("decision", step, decided, ranks=ranks, bases=[step] * 2, arrivals_us=at, opened_us=opened, required=2,
             weights=[1.0, 3.0], reason="2 needed have arrived"),
        line("dropped", step, opened + late_us, ranks=[2], bases=[step], arrivals_us=[opened + late_us]),
        line("resumed", step + 1, opened + 2000, ranks=[2]),
        line("final", step, opened + 2000, ranks=ranks, done_us=[opened + 1900, opened + 2000],
             contribution_squares=6.0, mean_squares=2.0),
    ]  # fmt: skip


PLANTED = written(OPENED, *(each for step in range(10) for each in step_lines(step, late_us=1900)))


def test_the_times_of_a_planted_recording() -> None:
    times = arrivals.of(trace.parse(PLANTED).channel(), 3)
    assert times.steps.tolist() == list(range(10))
    np.testing.assert_allclose(times.arrived[4], [1.0e-3, 1.1e-3, 1.9e-3])
    np.testing.assert_allclose(times.took[4], [1.1e-3, 1.1e-3, 1.9e-3], atol=1e-12)
    assert np.all(np.isnan(times.took[0])), "when ranks began with the first step is not known"
    np.testing.assert_allclose(times.lateness[4], [-1e-4, 0, 8e-4], atol=1e-12)
    np.testing.assert_allclose(times.tail, 0.9e-3)
    np.testing.assert_allclose(times.step_seconds(), 2e-3)
    assert times.contributed[3].tolist() == [True, True, False] and times.dropped[3].tolist() == [False, False, True]
    assert [(c.rank, c.missed, c.resumed) for c in times.catch_ups] == [(2, s, s + 1) for s in range(10)]
    assert len(times.noise) == 10 and times.noise[0].weights == (1.0, 3.0)
    assert arrivals.of(trace.parse(PLANTED).channel(), 3, last=4).steps.tolist() == [6, 7, 8, 9]


def test_nobody_waits_for_longer_than_there_is_time() -> None:
    """Rank 0 has each update long before rank 1, so it arrives at the next step before that has opened for all."""
    lines = []
    for step in range(10):
        opened = 2000 * step
        at = [opened - 900, opened + 100]
        lines += [
            line("decision", step, opened + 100, ranks=[0, 1], bases=[step] * 2, arrivals_us=at, opened_us=opened,
                 required=2, weights=[1.0, 1.0], reason="2 needed have arrived"),
            line("final", step, opened + 2000, ranks=[0, 1], done_us=[opened + 200, opened + 2000]),
        ]  # fmt: skip
    report = stragglers.report(trace.parse(written(OPENED, *lines)))
    assert report.waited == pytest.approx(0.25), "1 ms of 2 ms in every step, and the other rank never"
    assert "25% of the time waiting" in report.summary()


def test_an_update_that_nobody_contributes_to_is_part_of_the_recording() -> None:
    """As the core writes it: empty lists are left out."""
    empty = [
        line("dropped", 10, 20_900, ranks=[0], bases=[10], arrivals_us=[20_900], reason="non-finite"),
        line("decision", 10, 21_000, opened_us=20_000, required=2, reason="no gradient is finite"),
        line("final", 10, 21_000, contribution_squares=0.0, mean_squares=0.0),
    ]
    recording = trace.parse(PLANTED + "".join(json.dumps(each) + "\n" for each in empty))
    times = arrivals.of(recording.channel(), 3)
    assert not times.contributed[10].any() and times.dropped[10].tolist() == [True, False, False]
    assert len(times.noise) == 10
    assert stragglers.report(recording).updates == 11


def test_the_report_of_a_planted_recording() -> None:
    report = stragglers.report(trace.parse(PLANTED))
    assert (report.updates, report.required, report.size) == (10, 2, 3)
    assert report.step_s == pytest.approx(2e-3)
    assert [rank.verdict for rank in report.ranks] == ["on time", "on time", "always slow"]
    slow = report.ranks[2]
    assert (slow.late, slow.contributed, slow.dropped, slow.starved, slow.data) == (1.0, 0.0, 10, True, 0.0)
    assert slow.lateness_s[0] == pytest.approx(8e-4)
    assert slow.catch_up_s == pytest.approx(10 * 1e-4)
    assert report.ranks[1].data == pytest.approx(3 * 3 / 4), "three quarters of the samples, a third is its due"
    assert report.ranks[0].waited_s == pytest.approx(1e-4)
    assert "rank 2 is always slow" in report.summary() and "hardly learned from" in report.summary()
    assert "rank 2 contributes to 0%" in str(report)
    assert "<table>" in report._repr_html_() and "always slow" in report._repr_html_()


def test_a_rank_that_skips_steps_is_late_in_them() -> None:
    lines = [each for step in range(10) for each in step_lines(step, late_us=1150)]
    on_time = stragglers.report(trace.parse(written(OPENED, *lines)))
    assert on_time.ranks[2].verdict == "on time"
    skipping = [each for each in lines if each["event"] != "dropped" or each["step"] % 2]
    report = stragglers.report(trace.parse(written(OPENED, *skipping)))
    assert report.ranks[2].late == 0.5


def test_before_the_first_update_there_is_a_report_too() -> None:
    assert "no updates yet" in str(stragglers.report(trace.parse(written(OPENED))))
    assert "no updates yet" in str(stragglers.report(trace.parse(written())))
    assert "rank 0" in str(stragglers.StragglerReport())


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_killed_run_is_readable_up_to_its_last_line(cut: int) -> None:
    killed = PLANTED[: len(PLANTED) - cut]
    whole = killed.count("\n") - 1
    assert sum(len(channel.lines) for channel in trace.parse(killed).channels.values()) == whole


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ('{"no": 1}\n', "line 1"),
        ("what is this\n", "line 1"),
        (written(tail="{broken\n" + json.dumps(OPENED) + "\n"), "line 2"),
        (written().replace('"version": 1', '"version": 9'), "version 9"),
        (json.dumps(OPENED) + "\n", "no header"),
    ],
)
def test_what_is_no_trace_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        trace.parse(text)


def test_a_missing_file_and_a_missing_channel_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.jsonl"):
        trace.read(tmp_path / "nothing.jsonl")
    with pytest.raises(UsageError, match=r"no channel 'optimizer\.7'; its channels: optimizer\.0"):
        trace.parse(PLANTED).channel("optimizer.7")


def test_a_growing_trace_is_read_as_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    reader = trace.Reader(path)
    lines = PLANTED.splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:10])
    assert len(reader.poll()) == 4
    assert reader.poll() == []
    path.write_text(PLANTED)
    assert len(reader.poll()) == len(lines) - 5
    path.write_text("".join(lines[:2]))  # a new run writes to the same file
    assert len(reader.poll()) == 1
    assert reader.recording is not None and len(reader.recording.channel().lines) == 1


def train(steps: int, backup_workers: int) -> tuple[str, Any]:
    hvd.init()
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        model.named_parameters(),
        backup_workers=backup_workers,
    )
    for step in hvd.follow(range(steps), optimizer):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), step)).backward()
        optimizer.step()
    return str(hvd.straggler_report()), hvd.straggler_report()


@pytest.mark.parametrize("backup_workers", [0, 1])
def test_a_run_records_itself(backup_workers: int, tmp_path: Path) -> None:
    """With and without backup workers: the trace and the live report agree, and find the slow rank."""
    path, timeline = tmp_path / "trace.jsonl", tmp_path / "timeline.json"
    env = {
        "HVD_BACKUP_TRACE": str(path),
        "HVD_BACKUP_TIMELINE": str(timeline),
        "HVD_BACKUP_DELAY": "rank=*,ms=5;rank=2,ms=25",
    }
    reports = run_ranks(3, train, [STEPS, backup_workers], env=env)
    report = stragglers.report(trace.read(path))
    assert (report.updates, report.required) == (STEPS, 3 - backup_workers)
    assert [rank.verdict for rank in report.ranks].count("always slow") == 1
    assert report.ranks[2].verdict == "always slow"
    assert report.ranks[2].starved == (backup_workers > 0)
    live = reports[0][1]
    assert live.ranks[:2] == report.ranks[:2], "the live report is made from the same records"
    assert live.ranks[2].dropped <= report.ranks[2].dropped <= live.ranks[2].dropped + 1, "its last one came later"
    assert reports[1][1].updates == 0 and "ask there" in reports[1][0]
    times = arrivals.of(trace.read(path).channel(), 3)
    assert np.nanmedian(times.took[:, 2]) > 0.025
    assert len(times.noise) == STEPS and all(each.mean_squares > 0 for each in times.noise)
    decisions = trace.read(path).channel().decisions
    if backup_workers:
        assert '"momentum": 0.9' in decisions[0]["metadata"]
        assert "metadata" not in decisions[1], "only what has changed is written"
    check_timeline(timeline, backup_workers)


def check_timeline(path: Path, backup_workers: int) -> None:
    """It is a JSON array that is not closed; slices of one track do not overlap."""
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"compute", "wait", "reduce"} <= names
    if backup_workers:
        assert {"compute (dropped)", "catch-up"} <= names
        assert any(event["name"] == "dropped" for event in events if event["ph"] == "i")
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        f"rank {r}" for r in range(3)
    }
    for rank in range(3):
        slices = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == rank)
        assert len(slices) > (STEPS if rank < 2 else 4)
        for (_, end), (begin, _) in itertools.pairwise(slices):
            assert begin >= end, f"rank {rank}: a slice begins at {begin}, the one before ends at {end}"


def train_until_killed() -> None:
    train(100_000, 1)


def test_the_trace_of_a_killed_run_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with start_ranks(2, train_until_killed, env={"HVD_BACKUP_TRACE": str(path)}) as job:
        reader = trace.Reader(path)
        while not path.exists() or not any(each["event"] == "final" and each["step"] > 20 for each in reader.poll()):
            time.sleep(0.05)
        for rank in range(2):
            job.kill(rank)
    report = stragglers.report(trace.read(path))
    assert report.updates > 20


def test_a_trace_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for option in ("trace", "timeline"):
        with pytest.raises(UsageError, match=f"the {option} can't be written to"):
            _core.Engine.in_process(_core.Hub(1), 0, **{option: str(tmp_path / "no" / "folder")})
