"""The README says what is: its script runs, its three lines are three, its table of options is the configuration's."""

import difflib
import re
from pathlib import Path

import pytest

from hvd_backup import config
from tests.launch import start_ranks

README = (Path(__file__).parent.parent / "README.md").read_text()


def scripts() -> tuple[str, str]:
    """The script before and after, from the README's diff."""
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] or "\n" for line in lines if not line.startswith("+"))
    after = "".join(line[1:] or "\n" for line in lines if not line.startswith("-"))
    return before, after


def test_three_lines_change() -> None:
    changed = [line for line in difflib.ndiff(*(text.splitlines() for text in scripts())) if line[0] == "+"]
    assert len(changed) == 3


@pytest.mark.parametrize("delay", ["", "rank=1,ms=30"], ids=["on time", "one rank late"])
def test_the_script_trains(delay: str) -> None:
    _, after = scripts()
    env = {"HVD_BACKUP_DELAY": delay} if delay else {}
    with start_ranks(2, after + "result = [p.detach().tolist() for p in model.parameters()]\n", env=env) as job:
        outcome = job.wait()
    first, second = outcome.values()
    assert first == second, "both ranks have the same weights"
    losses = [float(loss) for loss in re.findall(r"epoch \d: ([\d.]+)", outcome.ranks[0].output)]
    assert len(losses) == 4
    assert losses[-1] < 1.0, "the sum of 20 standard normals has variance 20: the model has learned"


def test_the_options_are_the_configurations() -> None:
    (table,) = re.findall(r"<!-- options:.*?-->\n(.*?)\n<!-- /options -->", README, re.DOTALL)
    assert table == config.table()
