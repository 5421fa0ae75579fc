"""hvd-backup report, plan and top on recorded files, and the callbacks in a run."""

import re
import struct
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hvd_backup.torch as hvd
from hvd_backup import pictures, planning, stragglers, trace
from hvd_backup.callbacks import Prometheus, TensorBoard
from hvd_backup.cli import main
from hvd_backup.errors import UsageError
from tests.launch import run_ranks
from tests.test_trace import PLANTED, written
from tests.torch_training import batch, loss_of, make_model


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    path = tmp_path / "run.jsonl"
    path.write_text(PLANTED)
    return path


def size_of_png(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_report_writes_table_pictures_and_one_page(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(planted), "--output", str(planted.parent / "out")]) == 0
    assert "always slow" in capsys.readouterr().out
    for name in ("arrivals", "lateness", "time_to_kth"):
        width, height = size_of_png((planted.parent / "out" / f"run_{name}.png").read_bytes())
        assert width >= 1000 and height >= 300, "readable when printed"
    page = (planted.parent / "out" / "run_report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', page), "it opens without a network"
    assert "always slow" in page


def test_report_without_pictures_writes_nothing(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(planted), "--no-pictures", "--last", "5"]) == 0
    assert "updates 5 to 9" in capsys.readouterr().out
    assert [path.name for path in planted.parent.iterdir()] == ["run.jsonl"]


def test_plan_names_the_best(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = planted.parent / "plan.png"
    assert main(["plan", str(planted), "--noise-scale", "0.5", "--picture", str(picture)]) == 0
    told = capsys.readouterr().out
    assert "best: b = 1" in told and "0.5 batches of a rank" in told
    size_of_png(picture.read_bytes())


def test_top_shows_a_run_once(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(planted), "--once"]) == 0
    told = capsys.readouterr().out
    assert "always slow" in told and "b = 1" in told
    planted.write_text(written())
    assert main(["top", str(planted), "--once"]) == 0
    assert "no training yet" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["report", "plan", "top"])
def test_a_file_that_is_no_trace(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("dear diary\n")
    arguments = [command, str(path), *(["--once"] if command == "top" else [])]
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"hvd-backup {command}: ") and "is not a trace" in told
    assert main([command, str(tmp_path / "missing"), *arguments[2:]]) == 1


def test_pictures_of_many_ranks_and_steps() -> None:
    """What is merged, cut or unknown does not break a picture."""
    from hvd_backup import arrivals

    few = arrivals.of(trace.parse(PLANTED).channel(), 3)
    steps, ranks = 1000, 100
    arrived = np.random.default_rng(1).lognormal(-3, 0.5, (steps, ranks))
    arrived[5:50, 7] = np.nan
    shape = (steps, ranks)
    many = arrivals.Arrivals(
        np.arange(steps), arrived, arrived, np.ones(shape, bool), np.zeros(shape, bool), np.ones(shape),
        np.arange(steps) * 1.0, np.full(steps, 0.5), np.full(steps, 0.01), np.full(steps, ranks), np.arange(steps) == 0,
        (), (),
    )  # fmt: skip
    for times in (few, many):
        for draw in (pictures.arrivals_by_rank, pictures.lateness_map, pictures.time_to_kth):
            size_of_png(draw(times))
    assert stragglers.of_arrivals(many, "optimizer.0").size == ranks
    size_of_png(pictures.plan_picture(planning.plan(arrived[:60], resampled=3)))


def train_with_callbacks(folder: str) -> str:
    import prometheus_client

    hvd.init()
    model = make_model()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), model.named_parameters(), backup_workers=1
    )
    registry = prometheus_client.CollectorRegistry()
    with pytest.raises(UsageError, match="every=0"):
        TensorBoard(folder, every=0)
    optimizer.on_update(TensorBoard(folder, every=5))
    optimizer.on_update(Prometheus(port=None, every=5, registry=registry))
    for step in hvd.follow(range(12), optimizer):
        optimizer.zero_grad()
        loss_of(model, batch(hvd.rank(), step)).backward()
        optimizer.step()
    if hvd.rank() > 0:
        return ""
    server, _ = prometheus_client.start_http_server(0, "127.0.0.1", registry)
    text: str = urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics").read().decode()
    server.shutdown()
    return text


def test_tensorboard_and_prometheus(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics: list[Any] = run_ranks(2, train_with_callbacks, [str(tmp_path)], env={"HVD_BACKUP_DELAY": "rank=1,ms=20"})
    assert "hvd_backup_updates_total 12.0" in metrics[0]
    assert "hvd_backup_required 1.0" in metrics[0]
    assert re.search(r'hvd_backup_contributed_ratio\{rank="0"\} 1\.0', metrics[0])
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert len(events.Tensors("hvd_backup/contributors")) == 12  # scalars of version 2 are tensors with one element
    assert {"hvd_backup/late/rank_1", "hvd_backup/seconds_per_update"} <= set(events.Tags()["tensors"])
