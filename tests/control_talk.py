"""A conversation with the real coordinator, said by hand, with a manual clock: for tests of its rules one by one."""

from typing import Any

from hvd_backup._core_testing import Coordinator, compose, describe

Said = list[tuple[int, dict[str, Any]]]


class Talk:
    """A coordinator, and ranks that say one thing at a time. `now` is the clock, in microseconds."""

    def __init__(self, size: int, stall_check_us: int = 0, survives_losses: bool = False) -> None:
        self.size = size
        self.coordinator = Coordinator(size, stall_check_us, survives_losses)
        self.now = 0
        self.records: list[dict[str, Any]] = []

    def say(self, rank: int, kind: str, /, **fields: Any) -> Said:
        if kind == "Done":
            fields = {"kept": True} | fields
        self.coordinator.receive(rank, compose(kind, **fields), self.now)
        return self.hear()

    def lose(self, rank: int) -> Said:
        """Its process dies; returns what is said besides that, of which every other rank is told first."""
        self.coordinator.lost(rank, self.now)
        said = self.hear()
        told = [to for to, body in said[: self.size - 1] if body == {"message": "Lost", "rank": rank}]
        assert rank not in told and len(told) >= self.size - 2
        return [each for each in said if each[1]["message"] != "Lost"]

    def tick(self) -> Said:
        self.coordinator.tick(self.now)
        return self.hear()

    def hear(self) -> Said:
        self.records += self.coordinator.take_records()
        return [(to, describe(message)) for to, message in self.coordinator.take_replies()]

    def open(self, kind: str = "training", name: str = "it", **options: int) -> "Talk":
        number = ["training", "collective"].index(kind)
        for rank in range(self.size):
            self.say(rank, "Open", name=name, kind=number, options={"required": 2, "max_lag": 64} | options)
        return self

    def arrive(self, rank: int, step: int, **fields: Any) -> Said:
        return self.say(rank, "Arrive", **({"step": step, "base": step} | fields))

    def final(self, step: int, *contributors: int, **fields: Any) -> Said:
        """All contributors arrive, and have the result."""
        for rank in contributors:
            self.arrive(rank, step, **fields)
        out: Said = []
        for rank in contributors:
            out += self.say(rank, "Done", step=step)
        return [(to, body) for to, body in out if body["message"] != "Final"]

    def follow(self, *lengths: int, align_every: int = 0, round: int = 0) -> Said:
        out: Said = []
        for rank, length in enumerate(lengths):
            out += self.say(rank, "BeginRound", round=round, length=length, align_every=align_every)
        return out

    def recorded(self, event: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == event]


def told(said: Said) -> list[tuple[int, str]]:
    return [(to, body["message"]) for to, body in said]


def decisions(said: Said) -> dict[int, dict[str, Any]]:
    return {to: body for to, body in said if body["message"] == "Decision"}
