"""A channel that plays a script, and a framework without tensors: to test training.py, updates.py and follow.py."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hvd_backup import context
from hvd_backup.config import Config
from hvd_backup.policy import Policy
from hvd_backup.training import Training


@dataclass
class FakeUpdate:
    """What Channel.wait gives."""

    kind: str = "update"
    step: int = 0
    contributors: list[list[int]] = field(default_factory=lambda: [[0, 1, 2]])
    contributed: bool = False
    samples: float = 3.0
    required: int = 3
    metadata: bytes = b""


RESUME = FakeUpdate("resume")
OVER = FakeUpdate("over")


class FakeChannel:
    """Answers wait() from `script`. When that is empty: a gradient that was submitted became an update, a round that
    was left is over, and anything else would block for ever, which is an error."""

    def __init__(self, log: list[Any], proposal: bytes) -> None:
        self.log = log
        self.proposal = proposal
        self.script: list[FakeUpdate] = []
        self.step = 0
        self.round_start = 0
        self.round_end: int | None = None
        self.round_over = False
        self._begun = False
        self._leaving = False

    def missed(self, *contributors: int) -> None:
        """One more update without this rank's gradient (rank 0)."""
        step = self.step + sum(update.kind == "update" for update in self.script)
        self.script.append(FakeUpdate(step=step, contributors=[list(contributors or (1, 2, 3))]))

    def set_layout(self, buckets: list[tuple[int, str]], scopes: list[int], on_device: list[bool]) -> None:
        assert not any(on_device)
        self.log.append(("set_layout", buckets, scopes))

    def measure(self, buckets: int) -> None:
        self.log.append(("measure", buckets))

    def set_results(self, results: list[int]) -> None:
        self.log.append(("set_results", results))

    def begin(self, samples: float, metadata: bytes) -> None:
        self.log.append(("begin", samples, metadata))
        self._begun = True

    def submit(self, bucket: int, contribution: int, result: int) -> None:
        self.log.append(("submit", bucket, contribution, result))

    def wait(self) -> FakeUpdate:
        self.log.append("wait")
        if not self.script:
            assert self._begun or self._leaving, "wait() would block for ever"
            self.script.append(FakeUpdate(step=self.step, contributed=True) if self._begun else OVER)
        update = self.script.pop(0)
        self._begun = False
        self.step += update.kind == "update"
        if update.kind == "over":
            self.round_over = not self._leaving
            self._leaving = False
            self.round_start = self.step
        return update

    def leave(self) -> None:
        self.log.append("leave")
        self._leaving = True

    def away(self) -> None:
        self.log.append("away")

    def begin_round(self, length: int, align_every: int) -> None:
        self.log.append(("begin_round", length, align_every))
        self.round_over = False
        self.round_end = None

    def poll(self) -> bool:
        return bool(self.script)

    def counters(self) -> dict[str, int]:
        return {"contributed": 7, "dropped": 2, "caught_up": 1, "resynced": 0}


class FakePlace:
    """As much of a Context as a Training needs."""

    rank = 0
    size = 4

    def __init__(self) -> None:
        self.engine = self
        self.log: list[Any] = []
        self.opened_with: dict[str, Any] = {}

    def check_process(self) -> None:
        pass

    def register(self, participant: Any) -> None:
        self.log.append("register")

    def open(
        self, name: str, kind: str, description: str, proposal: bytes, required: int, **options: Any
    ) -> FakeChannel:
        self.opened_with = {"name": name, "description": description, "required": required, **options}
        return FakeChannel(self.log, proposal)


class FakeFramework:
    """Two buckets; notes what it is asked to do."""

    def __init__(
        self, monkeypatch: Any, backup_workers: int = 1, place: FakePlace | None = None, **options: Any
    ) -> None:
        self.place = place or FakePlace()
        monkeypatch.setattr(context, "_current", self.place)
        policy = Policy.resolve(Config(), 4, backup_workers=backup_workers, **options)
        self.training = Training(self.place, policy, self)  # type: ignore[arg-type]
        self.log = self.place.log
        self.started = False

    @property
    def channel(self) -> FakeChannel:
        channel: Any = self.training.channel
        assert isinstance(channel, FakeChannel)
        return channel

    def open(self) -> None:
        self.training.open(["w (2,) float32"], b"order", 1000)
        self.training.set_layout([(3, "float32"), (4, "float64")], [10, 20], None)

    def backward(self) -> None:
        self.started = True

    def step(self) -> list[bool]:
        """A whole step of the user's."""
        if self.training.channel is None:
            self.open()
        self.training.contribute(lambda: b"lr")
        for bucket in (0, 1):
            self.training.submit(bucket, 1 + bucket, 10 * (1 + bucket))
        used = self.training.catch_up()
        self.started = False
        self.training.complete()
        return used

    def gradient_started(self) -> bool:
        return self.started

    def load(self, metadata: bytes, filled: list[bool], settled: bool) -> None:
        assert not settled
        self.log.append("load" if all(filled) else ("load", filled))

    def settle(self) -> None:
        self.log.append("settle")

    def apply(self) -> None:
        self.log.append("apply")

    def applied(self) -> None:
        self.log.append("applied")

    @contextmanager
    def outside_step(self) -> Iterator[None]:
        self.log.append("outside")
        yield
        self.log.append("inside")
