"""Misuses of the command line and of files, in one process. See tests/misuse.py."""

import contextlib
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

from hvd_backup import cli, run
from tests.misuse import Scene, table_of

misuse = table_of("commands")

COMMANDS = "The commands `hvd-backup` and `python -m hvd_backup.run`"
HEADER = '{"event": "header", "format": "hvd_backup trace", "version": 1, "size": 3, "began_unix_s": 0.0}\n'
OPENED = (
    '{"event": "opened", "channel": "optimizer.0", "kind": "training", "step": 0, "scope": 0, "required": 3, '
    '"grace_us": 0, "max_misses": 0, "max_lag": 64, "time_us": 1, "at_us": 1, "ranks": []}\n'
)


def command(
    name: str, wrong: str, kind: str, told: str, arguments: Callable[[Path], list[str]], trace: str | bytes = ""
) -> None:
    """A case: a command line. kind: "exit status 1", say; told: what standard error says."""

    def case(scene: Scene) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.jsonl"
            file.write_bytes(trace if isinstance(trace, bytes) else trace.encode())
            given = arguments(file)
            said = io.StringIO()
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    status = run.main(given[1:]) if given[:1] == ["run"] else cli.main(given)
                except SystemExit as error:
                    status = int(error.code or 0) if not isinstance(error.code, str) else 1
            scene.seen.kind, scene.seen.message = f"exit status {status or 0}", said.getvalue()

    case.__name__ = name
    misuse(COMMANDS, wrong, kind, told)(case)


command(
    "no_command",
    "`hvd-backup` without a subcommand",
    "exit status 2",
    "the following arguments are required: COMMAND",
    lambda f: [],
)
command("unknown_command", "`hvd-backup reports`", "exit status 2", "invalid choice: 'reports'", lambda f: ["reports"])
command(
    "unknown_option",
    "`hvd-backup plan FILE --lats 5`",
    "exit status 2",
    "unrecognized arguments: --lats",
    lambda f: ["plan", str(f), "--lats", "5"],
)
command(
    "plan_of_nothing",
    "`hvd-backup plan` of a file that does not exist",
    "exit status 1",
    "hvd-backup plan: the trace … cannot be read: No such file or directory",
    lambda f: ["plan", f"{f}.gone"],
)
command(
    "plan_of_a_folder",
    "`hvd-backup plan` of a folder",
    "exit status 1",
    "cannot be read: Is a directory",
    lambda f: ["plan", str(f.parent)],
)
command(
    "plan_of_an_empty_file",
    "`hvd-backup plan` of an empty file",
    "exit status 1",
    "is empty: rank 0 writes it as soon as init() has returned",
    lambda f: ["plan", str(f)],
)
command(
    "plan_of_binary_data",
    "`hvd-backup plan` of a file that is no trace",
    "exit status 1",
    "is not a trace of hvd_backup: line 1 is",
    lambda f: ["plan", str(f)],
    bytes(range(256)) + b"\n",
)
command(
    "plan_of_other_json",
    "`hvd-backup plan` of another kind of JSON",
    "exit status 1",
    "is not a trace of hvd_backup",
    lambda f: ["plan", str(f)],
    '{"event": "header"}\n',
)
command(
    "plan_of_half_a_header",
    "`hvd-backup plan` of a trace whose header lacks something",
    "exit status 1",
    "is not a trace of hvd_backup: line 1 is",
    lambda f: ["plan", str(f)],
    '{"event": "header", "format": "hvd_backup trace"}\n',
)
command(
    "plan_of_a_torn_line",
    "`hvd-backup plan` of a trace with a line that lacks what belongs there",
    "exit status 1",
    "is not a trace of hvd_backup: line 3 is",
    lambda f: ["plan", str(f)],
    HEADER + OPENED + '{"event": "decision", "channel": "optimizer.0"}\n',
)
command(
    "plan_without_training",
    "`hvd-backup plan` of a run without training",
    "exit status 1",
    "has no training channel; its channels: none at all",
    lambda f: ["plan", str(f)],
    HEADER,
)
command(
    "plan_without_updates",
    "`hvd-backup plan` of a run without updates",
    "exit status 1",
    "nothing is known about how long rank 0 computes",
    lambda f: ["plan", str(f)],
    HEADER + OPENED,
)
command(
    "plan_of_no_channel",
    "`hvd-backup plan FILE --channel optimizer.7`",
    "exit status 1",
    "has no channel 'optimizer.7'; its channels: optimizer.0",
    lambda f: ["plan", str(f), "--channel", "optimizer.7"],
    HEADER + OPENED,
)
command(
    "plan_of_the_last_none",
    "`hvd-backup plan FILE --last 0`",
    "exit status 2",
    "argument --last: expected a number >= 1, given 0",
    lambda f: ["plan", str(f), "--last", "0"],
    HEADER + OPENED,
)
command(
    "report_of_nothing",
    "`hvd-backup report` of a file that does not exist",
    "exit status 1",
    "cannot be read: No such file or directory",
    lambda f: ["report", f"{f}.gone"],
)
command(
    "top_of_nothing",
    "`hvd-backup top` of a file that does not exist",
    "exit status 1",
    "hvd-backup top: ",
    lambda f: ["top", f"{f}.gone", "--once"],
)
command(
    "run_of_nothing",
    "`python -m hvd_backup.run` of a script that does not exist",
    "exit status 2",
    "there is no script train.py",
    lambda f: ["run", "train.py"],
)
command(
    "run_with_nonsense",
    "`python -m hvd_backup.run --backup-workers many train.py`",
    "exit status 2",
    "HVD_BACKUP_BACKUP_WORKERS='many': expected an integer",
    lambda f: ["run", "--backup-workers", "many", __file__],
)
