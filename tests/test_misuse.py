"""Every misuse of docs/misuse.md gives what the page says, and the page says what the tests find."""

from pathlib import Path
from typing import Any

import pytest

import hvd_backup.mpi as hvd
from tests import all_misuses, misuse  # noqa: F401
from tests.launch import run_ranks
from tests.misuse import COMMAND, MISUSES, Seen, complaints

PAGE = Path(__file__).parent.parent / "docs" / "misuse.md"


def run_group(group: str) -> dict[str, Seen]:
    """In each rank."""
    begins = {"mpi": lambda: None, "torch": hvd.init}  # the cases of "mpi" begin with init() themselves, if at all
    return misuse.run_all(group, lambda: misuse.program(begins[group]))


@pytest.mark.parametrize("group", ["mpi", "torch"])
def test_what_one_gets_on_every_rank(group: str) -> None:
    by_rank = run_ranks(3, run_group, [group], timeout_s=120)
    wrong = {each.name: complaints(each, [seen[each.name] for seen in by_rank]) for each in MISUSES[group]}
    assert not any(wrong.values()), "\n".join(f"{name}: {line}" for name, lines in wrong.items() for line in lines)


def test_what_one_gets_with_tensorflow(tensorflow_results: list[dict[str, Any]]) -> None:
    by_rank = [result["misuses"] for result in tensorflow_results]
    wrong = {each.name: complaints(each, [seen[each.name] for seen in by_rank]) for each in MISUSES["tensorflow"]}
    assert not any(wrong.values()), "\n".join(f"{name}: {line}" for name, lines in wrong.items() for line in lines)


def test_what_one_gets_on_the_command_line() -> None:
    wrong = []
    for each in MISUSES["commands"]:
        scene = misuse.Scene()
        with misuse.program(lambda: None):  # `hvd_backup.run` sets variables
            each.run(scene)
        wrong += [f"{each.name}: {line}" for line in complaints(each, [scene.seen])]
    assert not wrong, "\n".join(wrong)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == misuse.page(), f"docs/misuse.md is out of date: {COMMAND}"
