"""HVD_BACKUP_REPLAY: the decisions of a recorded run, made again, so that a run with stragglers can be repeated.

Contributors, their weights and the hyperparameters are those of the trace, and every rank computes exactly the steps
that it computed then, so that random numbers are drawn alike; the time that things take does not matter. What it is
not: a check of the data. The same program with the same data and seeds on as many ranks gives the same weights, bit for
bit, when its kernels do (the same library versions and kind of processor).
"""

from __future__ import annotations

from hvd_backup._core import Engine
from hvd_backup.errors import UsageError
from hvd_backup.trace import ChannelRecording, Line, Recording, read

__all__ = ["instruct", "load"]


def load(path: str, size: int) -> Recording:
    """The trace to be replayed among `size` ranks.

    Raises:
        UsageError: it cannot be read, or was recorded with another number of ranks.
    """
    recording = read(path)
    if recording.size != size:
        raise UsageError(
            f"HVD_BACKUP_REPLAY={path}: recorded with {recording.size} ranks, but this run has {size}: start as many"
        )
    return recording


def instruct(engine: Engine, recording: Recording) -> None:
    """Tells rank 0's engine what to decide. Collectives in which all take part have nothing to be decided."""
    for channel in recording.channels.values():
        if channel.kind == "training" or channel.options.get("required", recording.size) < recording.size:
            _instruct_channel(engine, channel)


def _instruct_channel(engine: Engine, channel: ChannelRecording) -> None:
    engine.replay_channel(channel.name, channel.description)
    for line in channel.of("dropped"):
        engine.replay_drop(channel.name, line["step"], line["scope"], line["ranks"][0])
    for line in channel.of("round_over"):
        engine.replay_round_end(channel.name, line["step"])
    metadata = b""
    withdrawn = _withdrawn(channel)
    newest: dict[tuple[int, int], tuple[Line, bytes]] = {}  # a later attempt at a decision replaces it
    for line in channel.of("decision"):
        if line["scope"] == 0:
            metadata = _metadata(line, metadata)
        newest[line["step"], line["scope"]] = line, metadata if line["scope"] == 0 else b""
    for (step, scope), (line, of_update) in newest.items():
        gone = withdrawn.get((step, scope), set())
        kept = [(r, w) for r, w in zip(line.get("ranks", []), line.get("weights", []), strict=True) if r not in gone]
        ranks, weights = [r for r, _ in kept], [w for _, w in kept]
        engine.replay_decision(channel.name, step, scope, line.get("required", 1), ranks, weights, of_update)


def _withdrawn(channel: ChannelRecording) -> dict[tuple[int, int], set[int]]:
    """Contributors that did not deliver, by step and scope; forgotten when a later decision names them again."""
    gone: dict[tuple[int, int], set[int]] = {}
    for line in channel.lines:
        key = line["step"], line["scope"]
        if line["event"] == "replaced":
            gone.setdefault(key, set()).update(line["ranks"])
        elif line["event"] == "decision":
            gone.pop(key, None)
    return gone


def _metadata(line: Line, before: bytes) -> bytes:
    """A decision's metadata; a line without any has those of the decision before."""
    if "metadata_hex" in line:
        return bytes.fromhex(line["metadata_hex"])
    return line["metadata"].encode() if "metadata" in line else before
