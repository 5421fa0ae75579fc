"""The configuration: read once from the environment, checked, overridden by arguments."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_backup import config
from hvd_backup.config import Config
from hvd_backup.errors import ConfigError, HvdBackupError, UsageError

PACKAGE = Path(config.__file__).parent


def test_defaults_need_no_environment() -> None:
    assert Config.from_environment({}) == Config()


def test_every_option_has_a_variable_and_a_row_in_the_table() -> None:
    for field in dataclasses.fields(Config):
        row = next(line for line in config.table().splitlines() if f"`HVD_BACKUP_{field.name.upper()}`" in line)
        assert row.count("|") == 4
    assert Config.__doc__ is not None
    assert config.table() in Config.__doc__


@pytest.mark.parametrize(
    ("variable", "text", "option", "value"),
    [
        ("HVD_BACKUP_BACKUP_WORKERS", "2", "backup_workers", 2),
        ("HVD_BACKUP_BACKUP_WORKERS", "0.25", "backup_workers", 0.25),
        ("HVD_BACKUP_POLICY", "Backup", "policy", "backup"),
        ("HVD_BACKUP_GRACE", "0.5", "grace", 0.5),
        ("HVD_BACKUP_MAX_MISSES", "3", "max_misses", 3),
        ("HVD_BACKUP_MAX_STALENESS", "0", "max_staleness", 0),
        ("HVD_BACKUP_LATE", "carry", "late", "carry"),
        ("HVD_BACKUP_MAX_LAG", "auto", "max_lag", "auto"),
        ("HVD_BACKUP_MAX_LAG", "17", "max_lag", 17),
        ("HVD_BACKUP_ON_MAX_LAG", "wait", "on_max_lag", "wait"),
        ("HVD_BACKUP_SCOPE", "bucket", "scope", "bucket"),
        ("HVD_BACKUP_ARRIVE", "last", "arrive", "last"),
        ("HVD_BACKUP_NONFINITE", "drop", "nonfinite", "drop"),
        ("HVD_BACKUP_BUCKET_BYTES", "64MiB", "bucket_bytes", 64 << 20),
        ("HOROVOD_FUSION_THRESHOLD", "1024", "bucket_bytes", 1024),
        ("HVD_BACKUP_JOURNAL_BYTES", " 2 gib", "journal_bytes", 2 << 30),
        ("HVD_BACKUP_TRACE", "a.jsonl", "trace", "a.jsonl"),
        ("HVD_BACKUP_DELAY", "rank=3,ms=200,p=0.3", "delay", "rank=3,ms=200,p=0.3"),
        ("HVD_BACKUP_LOG_LEVEL", "INFO", "log_level", "info"),
        ("HOROVOD_LOG_LEVEL", "debug", "log_level", "debug"),
    ],
)
def test_each_variable_sets_its_option(variable: str, text: str, option: str, value: object) -> None:
    read = Config.from_environment({variable: text, "PATH": "/bin"})
    assert getattr(read, option) == value
    assert dataclasses.asdict(read) == {**dataclasses.asdict(Config()), option: value}


def test_our_variable_beats_horovods() -> None:
    environ = {"HVD_BACKUP_BUCKET_BYTES": "1MiB", "HOROVOD_FUSION_THRESHOLD": "2"}
    assert Config.from_environment(environ).bucket_bytes == 1 << 20


def test_a_variable_set_to_nothing_counts_as_not_set() -> None:
    assert Config.from_environment({"HVD_BACKUP_GRACE": ""}) == Config()


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("HVD_BACKUP_GARCE", "1", "did you mean HVD_BACKUP_GRACE?"),
        ("HVD_BACKUP_QQQ", "1", "known: HVD_BACKUP_BACKUP_WORKERS, "),
        ("HVD_BACKUP_BACKUP_WORKERS", "many", 'or "auto"'),
        ("HVD_BACKUP_MIN_CONTRIBUTORS", "-1", "an integer >= 0"),
        ("HVD_BACKUP_BACKUP_WORKERS", "-1", "an integer >= 0, a fraction"),
        ("HVD_BACKUP_BACKUP_WORKERS", "1.0", "an integer >= 0, a fraction"),
        ("HVD_BACKUP_BACKUP_WORKERS", "nan", "an integer >= 0, a fraction"),
        ("HVD_BACKUP_POLICY", "bakcup", "did you mean backup?"),
        ("HVD_BACKUP_POLICY", "softsync", "not there yet; those that exist: synchronous, backup, auto"),
        ("HVD_BACKUP_GRACE", "-0.1", "seconds >= 0"),
        ("HVD_BACKUP_GRACE", "inf", "seconds >= 0"),
        ("HVD_BACKUP_MAX_MISSES", "1.5", "an integer >= 0"),
        ("HVD_BACKUP_MAX_STALENESS", "1", "only dropped or carried"),
        ("HVD_BACKUP_LATE", "keep", '"drop" or "carry"'),
        ("HVD_BACKUP_MAX_LAG", "0", 'an integer >= 1, or "auto"'),
        ("HVD_BACKUP_ON_MAX_LAG", "skip", '"resync" or "wait"'),
        ("HVD_BACKUP_SCOPE", "layer", '"step" or "bucket"'),
        ("HVD_BACKUP_ARRIVE", "middle", '"first" or "last"'),
        ("HVD_BACKUP_BUCKET_BYTES", "64MB", '"25MiB"'),
        ("HOROVOD_FUSION_THRESHOLD", "-1", "a number of bytes >= 0"),
        ("HVD_BACKUP_DELAY", "rank=3", "ms missing"),
        ("HVD_BACKUP_LOG_LEVEL", "loud", '"warning"'),
    ],
)
def test_what_cannot_be_used_is_refused_with_name_value_and_remedy(variable: str, text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_environment({variable: text})
    assert variable in str(caught.value)
    assert expected in str(caught.value)
    if variable not in ("HVD_BACKUP_GARCE", "HVD_BACKUP_QQQ"):
        assert repr(text) in str(caught.value)


def test_errors_are_one_tree() -> None:
    assert issubclass(ConfigError, UsageError)
    assert issubclass(ConfigError, ValueError)
    assert issubclass(UsageError, HvdBackupError)
    assert issubclass(HvdBackupError, RuntimeError)


def test_arguments_beat_the_environment() -> None:
    base = Config.from_environment({"HVD_BACKUP_GRACE": "1", "HVD_BACKUP_LATE": "carry"})
    assert base.override(grace=2.0, late=None) == dataclasses.replace(base, grace=2.0)


def test_an_argument_for_policy_or_backup_workers_beats_the_environment_on_the_other() -> None:
    base = Config.from_environment({"HVD_BACKUP_BACKUP_WORKERS": "1"})
    assert base.override(policy="synchronous").backup_workers == 0
    base = Config.from_environment({"HVD_BACKUP_POLICY": "synchronous"})
    assert base.override(backup_workers=1).policy is None


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown option grase \(did you mean grace\?\)"):
        Config().override(grase=1)


def test_it_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().grace = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"HOROVOD_SIZE": "1"}, None),
        ({"HOROVOD_SIZE": "4", "HOROVOD_RANK": "0", "HOROVOD_CONTROLLER": "gloo"}, ("HOROVOD_SIZE", 4)),
        ({"SLURM_NTASKS": "4"}, None),  # an allocation, in which this process may well be alone
        ({"SLURM_STEP_NUM_TASKS": "8"}, ("SLURM_STEP_NUM_TASKS", 8)),
        ({"PMI_SIZE": "2"}, ("PMI_SIZE", 2)),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ("LOCAL_WORLD_SIZE", 2)),
        ({"HOROVOD_SIZE": "many"}, None),
    ],
)
def test_launchers_are_recognised(environ: dict[str, str], expected: tuple[str, int] | None) -> None:
    assert config.announced_processes(environ) == expected


def test_only_the_configuration_and_the_launcher_read_the_environment() -> None:
    readers = {
        path.name for path in PACKAGE.rglob("*.py") if re.search(r"\benviron\[|os\.environ|getenv", path.read_text())
    }
    # launch.py starts other processes, and hands its environment on; run.py sets options for the script that it runs.
    assert readers == {"config.py", "launch.py", "run.py"}


def test_importing_reads_nothing_and_starts_nothing() -> None:
    code = "import sys, hvd_backup.config, hvd_backup.context; sys.exit('mpi4py.MPI' in sys.modules)"
    environ = {**os.environ, "HVD_BACKUP_NO_SUCH_THING": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, timeout=60)
