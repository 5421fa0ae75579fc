"""Messages that no rank would send: real ones, changed at random, by the tens of thousands. Under ASan and UBSan, too
(tools/sanitize.py), where a wild index or an allocation of gigabytes is a finding.

The real ones are what simulated trainings say (tests/control_world.py). test_messages.py makes messages from scratch.
"""

import struct
from contextlib import suppress
from functools import cache
from random import Random
from typing import Any

import pytest
from hvd_backup._core_testing import Coordinator, compose, describe

from tests import control_plans
from tests.control_programs import Plan

SEEDS = range(8)  # of the random changes; each is a test, so that one that fails is named
MESSAGES = 8000  # changed messages for each
CONVERSATIONS = 150  # with the coordinator, for each
# What programs stumble over: limits of the types, sizes that no rank can have, numbers that are none.
NASTY = [
    *(struct.pack("<B", value) for value in (0, 1, 2, 0x7F, 0x80, 0xFF)),
    *(struct.pack("<i", value) for value in (-1, 0, 1, 1 << 16, (1 << 31) - 1, -(1 << 31))),
    *(struct.pack("<q", value) for value in (-1, 1, 1 << 20, 1 << 61, (1 << 63) - 1, -(1 << 63))),
    *(struct.pack("<d", value) for value in (0.0, -1.0, 1e300, float("nan"), float("inf"))),
]


class Overheard:
    """A coordinator that writes down what it is told."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.told: list[tuple[int, bytes, int]] = []
        self.answered: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def receive(self, sender: int, message: bytes, now: int) -> None:
        self.told.append((sender, message, now))
        self._inner.receive(sender, message, now)

    def take_replies(self) -> list[tuple[int, bytes]]:
        replies: list[tuple[int, bytes]] = self._inner.take_replies()
        self.answered += [message for _, message in replies]
        return replies


@cache
def conversations() -> list[tuple[int, Overheard]]:
    """Number of ranks, and what was said, of several simulated programs."""
    heard = []
    for seed in range(30):
        rng = Random(seed)
        plan: Plan = [control_plans.training, control_plans.failing, control_plans.collectives][seed % 3](rng)
        world = plan.world()
        ear = world.coordinator = Overheard(world.coordinator)
        for _ in range(300):
            if not world.step(rng.randrange(1 << 16)):
                break
        world.settle()
        heard.append((plan.size, ear))
    return heard


def changed(rng: Random, message: bytes, other: bytes) -> bytes:
    """A change or a few: bits, bytes, numbers, cuts, parts of another message."""
    data = bytearray(message)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        how = rng.randrange(6)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif how <= 2:
            value = rng.choice(NASTY)
            data[at : at + len(value)] = value
        elif how == 3:
            del data[at:]
        elif how == 4:
            data[at:at] = rng.randbytes(rng.randrange(9))
        else:
            cut = rng.randrange(len(other) + 1)
            data[at:] = other[cut:]
    return bytes(data)


@pytest.mark.parametrize("seed", SEEDS)
def test_changed_bytes_are_refused_or_mean_exactly_what_they_say(seed: int) -> None:
    rng = Random(seed)
    valid = [message for _, ear in conversations() for message in [told for _, told, _ in ear.told] + ear.answered]
    understood = 0
    for _ in range(MESSAGES):
        data = changed(rng, rng.choice(valid), rng.choice(valid))
        try:
            fields = describe(data)
        except RuntimeError as error:
            assert str(error).startswith("malformed message: "), data
            continue
        understood += 1
        assert compose(fields.pop("message"), **fields) == data  # one meaning, one spelling
    assert MESSAGES // 10 < understood < MESSAGES


@pytest.mark.parametrize("seed", SEEDS)
def test_the_coordinator_takes_or_refuses_whatever_it_is_told(seed: int) -> None:
    """A conversation as it was, but for a few messages; once one is refused, the engine would end."""
    rng = Random(seed)
    refused = 0
    for _ in range(CONVERSATIONS):
        size, ear = rng.choice(conversations())
        coordinator = Coordinator(size)
        share = rng.choice((0.005, 0.02, 0.1))
        for sender, message, now in ear.told:
            if rng.random() < share:
                message = changed(rng, message, rng.choice(ear.told)[1])
            elif rng.random() < share:
                sender, message, _ = rng.choice(ear.told)
            try:
                coordinator.receive(sender, message, now)
            except RuntimeError as error:
                assert str(error).startswith("malformed message: ")
                refused += 1
                break
            for _, reply in coordinator.take_replies():
                describe(reply)
            with suppress(UnicodeDecodeError):  # a record's text is Python's only here, and need be none
                coordinator.take_records()
    assert refused > CONVERSATIONS // 10
