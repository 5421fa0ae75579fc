"""What ranks say to each other: every message comes back as it was sent; bytes that are none are refused."""

import resource
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hvd_backup._core_testing import compose, describe
from hypothesis import given, settings
from hypothesis import strategies as st

int32 = st.integers(-(1 << 31), (1 << 31) - 1)
int64 = st.integers(-(1 << 63), (1 << 63) - 1)
unsigned = st.integers(0, (1 << 32) - 1)
number = st.floats(allow_nan=False)
text = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "surrogateescape"))  # any bytes
ranks = st.lists(int32, max_size=5)
options = st.fixed_dictionaries(
    {"required": int32, "grace_us": int64, "max_misses": int32, "max_lag": int64}
    | dict.fromkeys(("automatic", "resync"), st.booleans())
)
outlook = st.fixed_dictionaries({"round_end": int64, "all_have": int64, "beyond": st.booleans()})
past = st.fixed_dictionaries(
    {"step": int64, "contributors": st.lists(ranks, max_size=3), "samples": number, "required": int32, "metadata": text}
)
pull = {"channel": unsigned, "step": int64, "bucket": int32, "shard": int32, "tag": int32}
place = {"channel": unsigned, "step": int64, "scope": int32}

FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "Open": {
        "name": text,
        "kind": st.integers(0, 1),
        "description": text,
        "proposal": text,
        "options": options,
        "wait_for_all": st.booleans(),
        "on_device": st.booleans(),
    },
    "Arrive": place
    | {
        "base": int64,
        "round": int32,
        "scopes": int32,
        "buckets": int32,
        "samples": number,
        "finite": st.booleans(),
        "metadata": text,
        "payload": text,
    },
    "Withdraw": place,
    "Waiting": {"channel": unsigned, "step": int64},
    "Done": place
    | {
        "attempt": int32,
        "kept": st.booleans(),
        "squares": st.fixed_dictionaries({"contributions": number, "mean": number}),
    },
    "Kept": place,
    "Progress": place
    | {"attempt": int32, "unsubmitted": int32, "contributions_missing": ranks, "results_missing": ranks},
    "Sync": {"channel": unsigned, "have": int64, "round": int32, "lost": st.booleans()},
    "Offered": {"channel": unsigned, "step": int64, "bytes": int64},
    "StateLost": {"channel": unsigned, "server": int32, "step": int64},
    "BeginRound": {"channel": unsigned, "round": int32, "length": int64, "align_every": int64},
    "Away": {"channel": unsigned, "round": int32},
    "Leave": {"channel": unsigned, "round": int32},
    "Pause": {},
    "Join": {},
    "CanGroup": {"why_not": text, "means": text},
    "Formed": {"group": int64, "failure": text},
    "Exit": {"failure": text},
    "Opened": {"name": text, "channel": unsigned, "proposal": text, "measured": st.booleans()},
    "Failed": {"name": text, "reason": text},
    "Decision": place
    | {
        "attempt": int32,
        "tag": int64,
        "votes": st.booleans(),
        "group": int64,
        "contributors": ranks,
        "weights": st.lists(number, max_size=5),
        "samples": number,
        "required": int32,
        "metadata": text,
        "result": text,
        "outlook": outlook,
    },
    "Final": place | {"attempt": int32, "stopped": ranks, "outlook": outlook},
    "Probe": place | {"attempt": int32},
    "Late": place | {"newest": int64, "outlook": outlook},
    "History": {"channel": unsigned, "updates": st.lists(past, max_size=3), "outlook": outlook},
    "Resume": {"channel": unsigned, "outlook": outlook},
    "Over": {"channel": unsigned, "round": int32, "end": int64, "outlook": outlook},
    "Offer": {"channel": unsigned},
    "Dismiss": {"channel": unsigned, "step": int64},
    "Resync": {
        "channel": unsigned,
        "server": int32,
        "step": int64,
        "bytes": int64,
        "contributed": st.booleans(),
        "instead": st.booleans(),
        "outlook": outlook,
    },
    "Joined": {"last": int32},
    "Lost": {"rank": int32},
    "Form": {"group": int64, "members": ranks, "name": text},
    "Disband": {"group": int64},
    "AllGone": {},
    "Pull": pull,
    "Refused": {"pull": st.fixed_dictionaries(pull), "forgotten": st.booleans()},
    "PullState": {"channel": unsigned, "step": int64, "begin": int64, "bytes": int64, "tag": int64},
    "NoState": {"channel": unsigned, "step": int64},
}
any_message = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda kind: st.fixed_dictionaries(FIELDS[kind]).map(lambda fields: (kind, fields))
)


def test_every_kind_of_message_is_tried_here() -> None:
    kinds = []
    for index in range(256):
        try:
            kinds.append(describe(bytes([index]) + bytes(200))["message"])
        except RuntimeError as error:
            told = str(error)
            if "unknown kind" in told:
                assert told == f"malformed message: unknown kind {index}"
                break
            assert told == "malformed message: bytes left over"
            size = next(size for size in range(200) if _is_whole(bytes([index]) + bytes(size)))
            kinds.append(describe(bytes([index]) + bytes(size))["message"])
    assert sorted(kinds) == sorted(FIELDS)


def _is_whole(data: bytes) -> bool:
    try:
        describe(data)
    except RuntimeError:
        return False
    return True


@settings(max_examples=500)
@given(any_message)
def test_a_message_comes_back_as_it_was_sent(message: tuple[str, dict[str, Any]]) -> None:
    kind, fields = message
    data = compose(kind, **fields)
    assert describe(data) == {**fields, "message": kind}
    assert compose(kind, **fields) == data


@given(any_message, st.data())
def test_a_message_that_is_cut_short_is_refused(message: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    whole = compose(message[0], **message[1])
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(RuntimeError, match=r"malformed message: (it ends too early|a list is longer than the message)"):
        describe(whole[:length])


@given(any_message, st.binary(min_size=1, max_size=20))
def test_bytes_left_over_are_refused(message: tuple[str, dict[str, Any]], more: bytes) -> None:
    with pytest.raises(RuntimeError, match="malformed message: bytes left over"):
        describe(compose(message[0], **message[1]) + more)


@settings(max_examples=300)  # more of the kind, from messages that are nearly right, in test_message_fuzz.py
@given(st.binary(max_size=300))
def test_garbage_is_refused_or_is_a_message(data: bytes) -> None:
    """Either an error of ours; or what is understood is a message, which is written with the same bytes."""
    try:
        fields = describe(data)
    except RuntimeError as error:
        assert str(error).startswith("malformed message: ")
        return
    assert compose(fields.pop("message"), **fields) == data


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (compose("Opened")[:-1] + b"\2", "malformed message: a bool is 2"),
        (compose("Open")[:5] + b"\2" + compose("Open")[6:], "malformed message: no value of its kind is 2"),
    ],
    ids=["bool", "enum"],
)
def test_a_value_that_is_none_of_its_kind_is_refused(data: bytes, told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        describe(data)


@pytest.mark.parametrize(
    "claim",
    [
        lambda huge: compose("Exit")[:1] + huge,  # a text
        lambda huge: compose("Decision")[:25] + huge,  # contributors
        lambda huge: compose("History")[:5] + huge,  # updates
        lambda huge: compose("History")[:5] + struct.pack("<Iq", 1, 0) + huge,  # contributors of the first
    ],
    ids=["text", "ranks", "updates", "ranks of each scope"],
)
@pytest.mark.parametrize("length", [1 << 16, (1 << 31) - 1, (1 << 32) - 1])
def test_a_length_that_is_a_lie_allocates_nothing(claim: Callable[[bytes], bytes], length: int) -> None:
    """A length may be no more than what is left of the message, so a list takes at most some 100 times its bytes."""
    data = claim(struct.pack("<I", length)) + bytes(1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RuntimeError, match="malformed message"):
        describe(data)
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert grown < 16 << 20
