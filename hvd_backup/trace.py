"""Reads what HVD_BACKUP_TRACE writes: one run's recording, as far as its last complete line. docs/trace.md: the format.

    recording = trace.read("trace.jsonl")
    recording.channel().decisions

What it is not: an analysis (arrivals.py makes tables of times from a recording).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvd_backup.errors import UsageError

__all__ = ["ChannelRecording", "Reader", "Recording", "parse", "read"]

VERSION = 1

Line = dict[str, Any]

# What a line must have besides: numbers, or lists of as many numbers as there are ranks concerned.
_NUMBERS = {
    "header": ("version", "size", "began_unix_s"),
    "opened": ("required", "grace_us", "max_misses", "max_lag"),
    "decision": ("opened_us", "required"),
    "resumed": ("t_us",),
}
_LISTS = {
    "dropped": ("ranks", "arrivals_us"),
    "resumed": ("ranks",),
    "replaced": ("ranks",),
    "resynced": ("ranks",),
    "lost": ("ranks",),
}


@dataclass
class ChannelRecording:
    """What was recorded of one channel (one optimizer, or one collective).

    Attributes:
        name: "optimizer.0" for the first optimizer.
        kind: "training" or "collective"; "" when the line that tells is missing.
        options: required (N), grace_us, max_misses, max_lag, as the channel was opened.
        description: what all ranks agreed on, line by line: parameters, options.
        lines: everything about the channel, in the order in which it happened.
    """

    name: str
    kind: str = ""
    options: dict[str, int] = field(default_factory=dict)
    description: str = ""
    lines: list[Line] = field(default_factory=list)

    def of(self, event: str) -> Iterator[Line]:
        """The lines of one event."""
        return (line for line in self.lines if line["event"] == event)

    @property
    def decisions(self) -> list[Line]:
        """Who contributed to what, in order; of an update whose contributors were replaced, the last attempt."""
        return list({(line["step"], line["scope"]): line for line in self.of("decision")}.values())


@dataclass
class Recording:
    """A trace.

    Attributes:
        size: ranks.
        began_unix_s: the wall clock when the trace's own time was 0.
        channels: by name, in the order of their first line.
        source: for messages.
    """

    size: int
    began_unix_s: float
    channels: dict[str, ChannelRecording] = field(default_factory=dict)
    source: str = "the trace"

    def channel(self, name: str | None = None) -> ChannelRecording:
        """A channel by name; None: the training channel with the most updates (the first of equals).

        Raises:
            UsageError: there is none, and which there are.
        """
        training = [channel for channel in self.channels.values() if channel.kind == "training"]
        if name is None and training:
            return max(training, key=lambda channel: sum(1 for _ in channel.of("decision")))
        if name is not None and name in self.channels:
            return self.channels[name]
        known = ", ".join(self.channels) or "none at all"
        what = "no training channel" if name is None else f"no channel {name!r}"
        raise UsageError(f"{self.source} has {what}; its channels: {known}")

    def add(self, line: Line) -> None:
        """Takes the next line."""
        channel = self.channels.setdefault(line["channel"], ChannelRecording(line["channel"]))
        if line["event"] == "opened":
            channel.kind = line["kind"]
            channel.options = {key: line[key] for key in ("required", "grace_us", "max_misses", "max_lag")}
            channel.description = line.get("description", "")
        channel.lines.append(line)


class Reader:
    """Reads a trace while it is written: each `poll` takes what has come since."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._position = 0
        self._number = 0
        self.recording: Recording | None = None  # once there is a header

    def poll(self) -> list[Line]:
        """New lines, already in `recording`. A file that has been begun anew is read from its start.

        Raises:
            UsageError: this is no trace.
            OSError: the file cannot be read.
        """
        with open(self._path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._position:
                self._position, self._number, self.recording = 0, 0, None
            file.seek(self._position)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        return list(self._take(complete.decode(errors="replace").splitlines()))

    def _take(self, lines: Iterable[str]) -> Iterator[Line]:
        for text in lines:
            self._number += 1
            line = _load(text, self._number, str(self._path))
            if self.recording is None:
                self.recording = _begin(line, str(self._path))
                continue
            self.recording.add(line)
            yield line


def read(path: str | os.PathLike[str]) -> Recording:
    """The trace in a file. A last line that is incomplete (the run was killed) is left out.

    Raises:
        UsageError: the file cannot be read, or is no trace.
    """
    try:
        text = Path(path).read_text(errors="replace")
    except OSError as error:
        raise UsageError(f"the trace {os.fspath(path)!r} cannot be read: {error.strerror}") from None
    return parse(text, os.fspath(path))


def parse(text: str, source: str = "the trace") -> Recording:
    """The trace in `text`; source: names it in messages."""
    recording: Recording | None = None
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        content = _load(line, number, source)
        if recording is None:
            recording = _begin(content, source)
        else:
            recording.add(content)
    if recording is None:
        raise UsageError(f"{source} is empty: rank 0 writes it as soon as init() has returned")
    return recording


def _load(text: str, number: int, source: str) -> Line:
    try:
        line = json.loads(text)
        if isinstance(line, dict) and _is_whole(line):
            return line
    except ValueError:
        pass
    raise UsageError(f"{source} is not a trace of hvd_backup: line {number} is {text[:60]!r}")


def _is_whole(line: Line) -> bool:
    """Whether nothing is missing that its readers rely on."""
    event = str(line.get("event"))
    if event != "header":
        if not isinstance(line.get("channel"), str) or not all(isinstance(line.get(k), int) for k in ("step", "scope")):
            return False
        if event == "opened" and line.get("kind") not in ("training", "collective"):
            return False
    if not all(isinstance(line.get(key), (int, float)) for key in _NUMBERS.get(event, ())):
        return False
    return all(isinstance(line.get(key), list) and line[key] for key in _LISTS.get(event, ()))


def _begin(header: Line, source: str) -> Recording:
    if header["event"] != "header" or header.get("format") != "hvd_backup trace":
        raise UsageError(f"{source} is not a trace of hvd_backup: its first line is no header")
    if header["version"] != VERSION:
        raise UsageError(
            f"{source} has format version {header['version']}, but this hvd_backup reads version {VERSION}: "
            "use the hvd_backup that wrote it"
        )
    return Recording(size=header["size"], began_unix_s=header["began_unix_s"], source=source)
