"""The configuration of a process: one immutable object, read once from the environment by init().

Nothing else in this package reads `os.environ`. Arguments beat the environment: whoever takes options as arguments
merges them with `Config.override`, so that a value is checked by the same rules wherever it came from
(option_values.py). What depends on the number of ranks (is backup_workers < size?) is decided in policy.py.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvd_backup import option_values as values_of
from hvd_backup.errors import ConfigError

__all__ = ["Config", "announced_processes", "environment_name", "gloo_rank", "spare_last_barrier", "table"]

PREFIX = "HVD_BACKUP_"
LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "fatal")


@dataclass(frozen=True)
class _Option:
    """What a field means, how its value is checked, and Horovod's variable that counts when ours is not set."""

    meaning: str
    check: values_of.Check
    horovod: str | None


def _option(default: Any, meaning: str, check: values_of.Check, horovod: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"option": _Option(meaning, check, horovod)})


@dataclass(frozen=True)
class Config:
    """Every option with its value. Immutable; construction checks every value."""

    backup_workers: int | float | str = _option(
        0, "b: an update waits for the first n - b ranks; a fraction f means floor(f * n); `auto`: chosen as it runs",
        values_of.backup_workers,
    )  # fmt: skip
    min_contributors: int = _option(
        0, "with `auto`: so many ranks are waited for at least; 0: half of them, rounded up", values_of.integer(0)
    )
    policy: str | None = _option(
        None, "who is waited for, by name: `synchronous` (b = 0), `backup` (b > 0) or `auto`", values_of.policy
    )
    grace: float = _option(
        0.0, "seconds after the (n - b)-th arrival during which others still count", values_of.seconds
    )
    max_misses: int = _option(
        0, "a rank left out this many times in a row is waited for; 0: never", values_of.integer(0, most=values_of.MOST)
    )
    max_staleness: int = _option(
        0, "how many updates older than its update a gradient's weights may be; only 0 yet", values_of.max_staleness
    )
    late: str = _option(
        "drop", "what a gradient becomes that came too late: `drop`, or `carry` (added to the rank's next)",
        values_of.one_of("drop", "carry"),
    )  # fmt: skip
    max_lag: int | str = _option(
        "auto", "updates kept for ranks that are behind; `auto`: what fits in the journal, 4 to 1024", values_of.max_lag
    )
    on_max_lag: str = _option(
        "resync",
        "beyond that bound: `resync`: the rank takes over the weights of another one; `wait`: the others wait for it",
        values_of.on_max_lag,
    )
    scope: str = _option(
        "step", "what has one set of contributors: a `step` or a `bucket`", values_of.one_of("step", "bucket")
    )
    arrive: str = _option(
        "first", "a rank arrives with its `first` bucket (overlap) or its `last`", values_of.one_of("first", "last")
    )
    nonfinite: str = _option(
        "pass", "a gradient with NaN or Inf: `pass` it on, or `drop` it (it counts as late, and ranks arrive `last`)",
        values_of.one_of("pass", "drop"),
    )  # fmt: skip
    bucket_bytes: int = _option(
        25 << 20, "gradients are packed into buckets of about this size", values_of.byte_count,
        horovod="HOROVOD_FUSION_THRESHOLD",
    )  # fmt: skip
    journal_bytes: int = _option(
        1 << 30, "memory of each rank for the updates kept by one channel when max_lag is `auto`", values_of.byte_count
    )
    trace: str = _option("", "file to which rank 0 records the run as JSON lines (docs/trace.md)", values_of.path)
    replay: str = _option("", "trace of a run whose decisions are to be made again (rank 0 reads it)", values_of.path)
    timeline: str = _option(
        "", "file to which rank 0 writes who did what when, for chrome://tracing and Perfetto", values_of.path,
        horovod="HOROVOD_TIMELINE",
    )  # fmt: skip
    stall_check: float = _option(
        60.0, "after so many seconds without progress rank 0 says who waits for whom; 0: never", values_of.seconds,
        horovod="HOROVOD_STALL_CHECK_TIME_SECONDS",
    )  # fmt: skip
    data_plane: str = _option(
        "auto",
        "gradients on GPUs travel by `nccl`, by CUDA-aware `mpi`, or through `host` memory; `auto`: by the first of "
        "these that can be",
        values_of.one_of("auto", "nccl", "mpi", "host"),
    )  # fmt: skip
    journal: str = _option(
        "host",
        "what GPUs have summed is kept for late ranks in page-locked `host` memory, or on the GPU: `device`",
        values_of.one_of("host", "device"),
    )  # fmt: skip
    nccl_library: str = _option("", "NCCL's library (libnccl.so.2), where it is not found by name", values_of.path)
    delay: str = _option("", "artificial delays, such as `rank=3,ms=200,p=0.3` (hvd_backup.faults)", values_of.delay)
    horovod: str = _option(
        "auto",
        "`auto`: Horovod's own collectives where Horovod is installed; `off`: never",
        values_of.one_of("auto", "off"),
    )
    log_level: str = _option(
        "warning", "one of " + ", ".join(f"`{level}`" for level in LOG_LEVELS), values_of.one_of(*LOG_LEVELS),
        horovod="HOROVOD_LOG_LEVEL",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, option in _options().items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), option))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Reads the environment. A variable that is set to nothing counts as not set.

        Raises:
            ConfigError: an unknown HVD_BACKUP_* name, or a value that cannot be used.
        """
        environ = os.environ if environ is None else environ
        options = _options()
        for variable in sorted(environ):
            if variable.startswith(PREFIX):
                _check_known(variable.removeprefix(PREFIX), [name.upper() for name in options], PREFIX)
        values: dict[str, Any] = {}
        for name, option in options.items():
            for candidate in (environment_name(name), option.horovod):
                if candidate and environ.get(candidate):
                    values[name] = _checked(candidate, environ[candidate], option)
                    if candidate == "HOROVOD_TIMELINE":
                        values[name] = _beside_horovod(values[name])
                    break
        return cls(**values)

    def override(self, **arguments: Any) -> Config:
        """This configuration with the arguments that are not None in place of its own values.

        `policy` and `backup_workers` say the same thing in two ways, so an argument for one of them also beats what the
        environment says about the other.

        Raises:
            ConfigError: an unknown option, or a value that cannot be used.
        """
        for name in arguments:
            _check_known(name, list(_options()))
        given = {name: value for name, value in arguments.items() if value is not None}
        if "backup_workers" in given:
            given.setdefault("policy", None)
        elif given.get("policy") in ("synchronous", "auto"):
            given["backup_workers"] = 0
        return dataclasses.replace(self, **given)


def _beside_horovod(timeline: str) -> str:
    """Our file, where HOROVOD_TIMELINE names one: another one where Horovod is installed, and may write its own."""
    if timeline == "DYNAMIC":  # Horovod's word for: when the program calls start_timeline
        return ""
    root, extension = os.path.splitext(timeline)
    return f"{root}.hvd_backup{extension}" if importlib.util.find_spec("horovod") else timeline


def environment_name(option: str) -> str:
    """The environment variable of an option."""
    return PREFIX + option.upper()


def table() -> str:
    """The options as a Markdown table: environment variable, default, meaning."""
    rows = ["| variable | default | meaning |", "| --- | --- | --- |"]
    for field in dataclasses.fields(Config):
        option: _Option = field.metadata["option"]
        default = "none" if field.default in (None, "") else f"`{_written(field.name, field.default)}`"
        also = f" (`{option.horovod}` counts too)" if option.horovod else ""
        rows.append(f"| `{environment_name(field.name)}` | {default} | {option.meaning}{also} |")
    return "\n".join(rows)


# Set by launchers to the number of processes: horovodrun --gloo; Open MPI; PMI (MPICH, Slurm); srun; torchrun (two).
_LAUNCHER_VARIABLES = (
    "HOROVOD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
)


def spare_last_barrier() -> None:
    """MPI_Finalize of Open MPI 5 may wait for a process that has died (its issue 11404), unless told not to.

    All ranks meet in shutdown() anyway. If MPI runs already, it is too late: `mpirun --mca async_mpi_finalize 1`.
    """
    enabled = os.environ.get("OMPI_MCA_mpi_ft_enable", "")  # noqa: SIM112 (Open MPI's name)
    if enabled.lower() in ("1", "t", "true", "enabled", "yes", "y"):
        os.environ.setdefault("OMPI_MCA_async_mpi_finalize", "1")


def announced_processes(environ: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """What the environment says about a launcher that MPI may know nothing of.

    Returns:
        (variable, number of processes) of the first launcher that announces more than one; None when there is none.
    """
    environ = os.environ if environ is None else environ
    for variable in _LAUNCHER_VARIABLES:
        count = environ.get(variable, "")
        if count.isdecimal() and int(count) > 1:
            return variable, int(count)
    return None


def gloo_rank(environ: Mapping[str, str] | None = None) -> int | None:
    """The rank that `horovodrun --gloo` has given to this process; None when something else has started it."""
    environ = os.environ if environ is None else environ
    rank = environ.get("HOROVOD_RANK", "")
    return int(rank) if environ.get("HOROVOD_CONTROLLER") == "gloo" and rank.isdecimal() else None


def _options() -> dict[str, _Option]:
    return {field.name: field.metadata["option"] for field in dataclasses.fields(Config)}


def _checked(name: str, value: Any, option: _Option) -> Any:
    try:
        return option.check(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r}: {error}") from None


def _check_known(name: str, known: list[str], prefix: str = "") -> None:
    if name not in known:
        kind = "environment variable" if prefix else "option"
        hint = values_of.did_you_mean(name, known, prefix)
        raise ConfigError(f"unknown {kind} {prefix}{name}{hint}; known: {', '.join(prefix + each for each in known)}")


def _written(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value >> 20}MiB" if value % (1 << 30) else f"{value >> 30}GiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


Config.__doc__ = f"{Config.__doc__}\n\n{table()}\n"
