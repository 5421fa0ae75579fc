"""Misuses of init() and shutdown(), of the environment, and of hvd_backup.mpi, three ranks. See tests/misuse.py."""

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

import hvd_backup.mpi as hvd
from tests.misuse import Gets, Scene, table_of

misuse = table_of("mpi")

PROGRAM = "Beginning and end of the program"
ENVIRONMENT = "The environment"
COLLECTIVES = "Collectives (`hvd_backup.mpi`, and the same of `hvd_backup.torch`)"
REPLAY = "Replaying a trace"


def world() -> Any:
    from mpi4py import MPI

    return MPI.COMM_WORLD


def odd() -> bool:
    return bool(world().Get_rank() == 1)


# --- init and shutdown ---


@misuse(
    PROGRAM,
    "`hvd.rank()` before `init()`",
    "NotInitializedError",
    "hvd_backup is not initialised: call hvd.init() first",
)
def rank_before_init(scene: Scene) -> None:
    with scene.misuse():
        hvd.rank()


@misuse(
    PROGRAM,
    "a collective after `shutdown()`",
    "NotInitializedError",
    "used after shutdown(): call hvd.init() again first",
)
def after_shutdown(scene: Scene) -> None:
    hvd.init()
    hvd.shutdown()
    with scene.misuse():
        hvd.allreduce(np.ones(2))


@misuse(PROGRAM, "`init()` or `shutdown()` twice", "", "the second call does nothing")
def twice(scene: Scene) -> None:
    with scene.misuse():
        hvd.init()
        hvd.init()
        hvd.barrier()
        hvd.shutdown()
        hvd.shutdown()


@misuse(
    PROGRAM,
    "`init()` again with another communicator",
    "UsageError",
    "init() was called before with another communicator: on all ranks, call shutdown() first",
)
def init_elsewhere(scene: Scene) -> None:
    hvd.init()
    with scene.misuse():
        from mpi4py import MPI

        hvd.init(MPI.COMM_SELF)


@misuse(
    PROGRAM,
    '`init(comm="world")`: no communicator',
    "UsageError",
    "init(comm='world'): expected an mpi4py intracommunicator",
)
def init_text(scene: Scene) -> None:
    with scene.misuse():
        hvd.init("world")  # type: ignore[arg-type]


@misuse(
    PROGRAM, "`init(MPI.COMM_NULL)`", "UsageError", "expected an mpi4py intracommunicator that contains this process"
)
def init_null(scene: Scene) -> None:
    from mpi4py import MPI

    with scene.misuse():
        hvd.init(MPI.COMM_NULL)


@misuse(
    PROGRAM,
    "`init([0, 7])`: ranks that do not exist",
    "UsageError",
    "expected different ranks of MPI.COMM_WORLD, this one among them",
)
def init_strangers(scene: Scene) -> None:
    with scene.misuse():
        hvd.init([0, 7])


@misuse(PROGRAM, '`init(["0"])`: no numbers', "UsageError", "expected different ranks of MPI.COMM_WORLD")
def init_texts(scene: Scene) -> None:
    with scene.misuse():
        hvd.init(["0"])  # type: ignore[list-item]


@misuse(PROGRAM, "a collective in a forked child process", "UsageError", "in a process that was forked after init()")
def forked(scene: Scene) -> None:
    hvd.init()
    reader, writer = os.pipe()
    with scene.misuse():
        if (child := os.fork()) == 0:
            try:
                hvd.allreduce(np.ones(2))
                told = "nothing"
            except BaseException as error:
                told = str(error)
            os.write(writer, told.encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        from hvd_backup.errors import UsageError

        raise UsageError(text)


# --- the environment ---


def environment(name: str, wrong: str, told: str, variables: dict[str, str], on: tuple[int, ...] | None = None) -> None:
    """A case: init() with variables that cannot be used."""

    def run(scene: Scene) -> None:
        if on is None or world().Get_rank() in on:
            os.environ.update(variables)
        with scene.misuse():
            hvd.init()

    run.__name__ = name
    others = None if on is None else Gets("ConfigError", f"init() failed on rank 1: …{told}")
    misuse(ENVIRONMENT, wrong, "ConfigError", told, on=on, others=others)(run)


environment(
    "misspelt_name", "`HVD_BACKUP_GARCE=1`: no such option", "did you mean HVD_BACKUP_GRACE?", {"HVD_BACKUP_GARCE": "1"}
)
environment(
    "many",
    "`HVD_BACKUP_BACKUP_WORKERS=many`",
    "HVD_BACKUP_BACKUP_WORKERS='many': expected an integer >= 0",
    {"HVD_BACKUP_BACKUP_WORKERS": "many"},
)
environment(
    "bytes_in_words",
    "`HVD_BACKUP_BUCKET_BYTES=25MB`",
    'expected a number of bytes >= 0, such as 26214400 or "25MiB"',
    {"HVD_BACKUP_BUCKET_BYTES": "25MB"},
)
environment("delay_of_nobody", "`HVD_BACKUP_DELAY=rank=x`", "HVD_BACKUP_DELAY='rank=x'", {"HVD_BACKUP_DELAY": "rank=x"})
environment(
    "log_level",
    "`HVD_BACKUP_LOG_LEVEL=loud`",
    "HVD_BACKUP_LOG_LEVEL='loud': expected",
    {"HVD_BACKUP_LOG_LEVEL": "loud"},
)
environment(
    "one_rank_alone",
    "a variable that cannot be used on rank 1 alone",
    "HVD_BACKUP_GRACE='soon': expected a number of seconds",
    {"HVD_BACKUP_GRACE": "soon"},
    on=(1,),
)


@misuse(
    ENVIRONMENT,
    "`HVD_BACKUP_TRACE` in a folder that does not exist",
    "ConfigError",
    "HVD_BACKUP_TRACE…cannot be written",
    on=(0,),
    others=Gets("ConfigError", "init() failed on rank 0: …cannot be written"),
)
def trace_nowhere(scene: Scene) -> None:
    os.environ["HVD_BACKUP_TRACE"] = "/no/such/folder/trace.jsonl"
    with scene.misuse():
        hvd.init()


@misuse(
    ENVIRONMENT,
    "`HVD_BACKUP_BACKUP_WORKERS=3` with 3 ranks, where first_n_allreduce takes its default from",
    "ConfigError",
    "there are 3 ranks, of which one must count",
)
def default_too_large(scene: Scene) -> None:
    os.environ["HVD_BACKUP_BACKUP_WORKERS"] = "3"
    with scene.misuse():
        hvd.init()
        hvd.first_n_allreduce(np.ones(2))


# --- collectives ---


def refused(name: str, wrong: str, kind: str, told: str, call: Any) -> None:
    """A case: a call that cannot be right on any rank."""

    def run(scene: Scene) -> None:
        hvd.init()
        with scene.misuse():
            call()

    run.__name__ = name
    misuse(COLLECTIVES, wrong, kind, told)(run)


ones = np.ones(2)
refused(
    "n_zero",
    "`first_n_allreduce(x, n=0)`",
    "UsageError",
    "n=0: expected n from 1 to 3, there are 3 ranks",
    lambda: hvd.first_n_allreduce(ones, n=0),
)
refused(
    "n_four",
    "`first_n_allreduce(x, n=4)` with 3 ranks",
    "UsageError",
    "n=4: expected n from 1 to 3",
    lambda: hvd.first_n_allreduce(ones, n=4),
)
refused(
    "n_half",
    "`first_n_allreduce(x, n=1.5)`",
    "UsageError",
    "n=1.5: expected n from 1 to 3",
    lambda: hvd.first_n_allreduce(ones, n=1.5),
)
refused(
    "n_text",
    '`first_n_allreduce(x, n="2")`',
    "UsageError",
    "n='2': expected n from 1 to 3",
    lambda: hvd.first_n_allreduce(ones, n="2"),
)
refused(
    "b_text",
    '`first_n_allreduce(x, backup_workers="1")`',
    "UsageError",
    "backup_workers='1': expected backup_workers from 0 to 2, there are 3 ranks",
    lambda: hvd.first_n_allreduce(ones, backup_workers="1"),
)
refused(
    "n_and_b",
    "`first_n_allreduce(x, n=2, backup_workers=1)`",
    "UsageError",
    "give n or backup_workers, not both",
    lambda: hvd.first_n_allreduce(ones, n=2, backup_workers=1),
)
refused(
    "first_n_max",
    "`first_n_allreduce(x, op=hvd.Max)`",
    "UsageError",
    "only Average and Sum",
    lambda: hvd.first_n_allreduce(ones, n=2, op=hvd.Max),
)
refused(
    "op_number",
    "`allreduce(x, op=7)`",
    "UsageError",
    "allreduce(op=7) of dtype float64: expected",
    lambda: hvd.allreduce(ones, op=7),
)
refused(
    "op_text",
    '`allreduce(x, op="sum")`',
    "UsageError",
    "allreduce(op='sum') of dtype float64: expected",
    lambda: hvd.allreduce(ones, op="sum"),
)
refused(
    "name_number", "`allreduce(x, name=5)`", "UsageError", "name=5, expected a str", lambda: hvd.allreduce(ones, name=5)
)
refused(
    "complex_array",
    "an array of complex numbers",
    "UsageError",
    "dtype complex128 is not supported, only",
    lambda: hvd.allreduce(np.ones(2, complex)),
)
refused(
    "strings", "an array of text", "UsageError", "dtype str32 is not supported", lambda: hvd.allreduce(np.array(["a"]))
)
refused(
    "objects",
    "an array of Python objects",
    "UsageError",
    "use broadcast_object or allgather_object",
    lambda: hvd.allreduce(np.array([{}])),
)
refused(
    "ragged",
    "a list that is no array",
    "UsageError",
    "allreduce(list): that is no array",
    lambda: hvd.allreduce([[1.0], [1.0, 2.0]]),
)
refused(
    "root_seven",
    "`broadcast(x, root_rank=7)`",
    "UsageError",
    "root_rank=7: expected 0 to 2, there are 3 ranks",
    lambda: hvd.broadcast(ones, 7),
)
refused(
    "root_text",
    '`broadcast(x, root_rank="0")`',
    "UsageError",
    "root_rank='0': expected 0 to 2",
    lambda: hvd.broadcast(ones, "0"),
)
refused(
    "no_handle",
    "`synchronize(x)` of something that is no handle",
    "UsageError",
    "synchronize(ndarray): expected a handle",
    lambda: hvd.synchronize(ones),
)


def differing(name: str, wrong: str, kind: str, told: str, call: Any) -> None:
    """A case: rank 1 means something else than the others; every rank is told. call(whether this is rank 1)."""

    def run(scene: Scene) -> None:
        hvd.init()
        with scene.misuse():
            call(odd())

    run.__name__ = name
    misuse(COLLECTIVES, wrong, kind, told)(run)


differing(
    "shape_differs",
    "rank 1 gives another shape",
    "HvdBackupError",
    "differ in 'allreduce:x': line 2: …'shape (3,)'",
    lambda odd: hvd.allreduce(np.ones(2 + odd), name="x"),
)
differing(
    "dtype_differs",
    "rank 1 gives another dtype",
    "HvdBackupError",
    "differ in 'allreduce:x': line 1: …'dtype float32'",
    lambda odd: hvd.allreduce(np.ones(2, "f4" if odd else "f8"), name="x"),
)
differing(
    "n_differs",
    "rank 1 gives another n",
    "HvdBackupError",
    "differ in 'first_n_allreduce:x': line 3: given 'n …",
    lambda odd: hvd.first_n_allreduce(ones, n=2 + odd, name="x"),
)
differing(
    "op_differs",
    "rank 1 sums, the others average",
    "HvdBackupError",
    "differ in 'allreduce:x': line 4: given 'op …",
    lambda odd: hvd.allreduce(ones, op=hvd.Sum if odd else hvd.Average, name="x"),
)
differing(
    "root_differs",
    "rank 1 has another `root_rank`",
    "UsageError",
    "the ranks are in different collectives, which must be called by all in the same order: rank",
    lambda odd: hvd.broadcast(ones, int(odd)),
)
differing(
    "call_differs",
    "rank 1 is in `allgather()`, the others in `broadcast()`",
    "UsageError",
    "the ranks are in different collectives",
    lambda odd: hvd.allgather(ones) if odd else hvd.broadcast(ones, 0),
)


ELSEWHERE = "the ranks wait for each other in different collectives, which must be called by all in the same order"
differing(
    "name_differs",
    "rank 1 gives another name",
    "HvdBackupError",
    f"{ELSEWHERE}…rank 1 in 'allreduce:b'…",
    lambda odd: hvd.allreduce(ones, name="b" if odd else "a"),
)
differing(
    "order_differs",
    "rank 1 is in `allreduce()`, the others in `broadcast()`",
    "HvdBackupError",
    ELSEWHERE,
    lambda odd: hvd.allreduce(ones) if odd else hvd.broadcast(ones, 0),
)
differing(
    "shape_differs_later",
    "rank 1 gives another shape under a name that was used before",
    "HvdBackupError",
    ELSEWHERE,
    lambda odd: [hvd.allreduce(np.ones(2 + (odd and k)), name="x") for k in range(2)],
)


@misuse(
    COLLECTIVES,
    "an object that cannot be pickled, in `broadcast_object`",
    "TypeError",
    "cannot pickle",
    on=(1,),
    others=Gets("HvdBackupError", "rank 1 has left"),
)
def unpicklable(scene: Scene) -> None:
    hvd.init()
    with scene.misuse():
        hvd.broadcast_object(threading.Lock() if odd() else None, root_rank=1)


@misuse(
    COLLECTIVES,
    "an object that cannot be pickled on rank 1, in `allgather_object`",
    "TypeError",
    "cannot pickle",
    on=(1,),
    others=Gets("HvdBackupError", "rank 1 has left"),
)
def unpicklable_everywhere(scene: Scene) -> None:
    hvd.init()
    with scene.misuse():
        hvd.allgather_object(threading.Lock() if odd() else 0)


@misuse(
    COLLECTIVES,
    "a name that is under way already",
    "UsageError",
    "a collective named 'x' is under way: synchronize() it first, or give another name",
)
def name_under_way(scene: Scene) -> None:
    hvd.init()
    handle = hvd.allreduce_async(ones, name="x")
    with scene.misuse():
        hvd.allreduce_async(ones, name="x")
    hvd.synchronize(handle)


@misuse(
    COLLECTIVES,
    "`broadcast()` while another rank has joined",
    "UsageError",
    "needs all ranks, but rank 1 called join(): call it after that",
    on=(0, 2),
    others=Gets("", "it waits for the others to join, too"),
)
def broadcast_amid_join(scene: Scene) -> None:
    hvd.init()
    with scene.misuse():
        if odd():
            hvd.join()
        else:
            hvd.broadcast(ones, 0)
    if not odd():
        hvd.join()


@misuse(
    COLLECTIVES,
    "`join()` while a collective is under way",
    "UsageError",
    "join() while a collective is under way: synchronize() all handles first",
)
def join_amid_collective(scene: Scene) -> None:
    hvd.init()
    handle = hvd.allreduce_async(ones, name="x")
    with scene.misuse():
        hvd.join()
    hvd.synchronize(handle)


@misuse(
    COLLECTIVES,
    "rank 1 leaves the program, the others wait for it in a collective",
    "",
    "it is gone",
    on=(1,),
    others=Gets("HvdBackupError", "rank 1 has left"),
)
def gone_before_a_collective(scene: Scene) -> None:
    hvd.init()
    with scene.misuse():
        if odd():
            hvd.shutdown()
        else:
            hvd.allreduce(ones)


# --- replay ---

HEADER = '{"event": "header", "format": "hvd_backup trace", "version": 1, "size": %d, "began_unix_s": 0.0}\n'


def replayed(name: str, wrong: str, told: str, content: str | None) -> None:
    """A case: HVD_BACKUP_REPLAY names something that is not a trace of such a run. Rank 0 reads it."""

    def run(scene: Scene) -> None:
        path = Path(os.environ["RANK_TEST_FOLDER"]) / f"{name}.jsonl"
        if content is not None and world().Get_rank() == 0:
            path.write_text(content)
        os.environ["HVD_BACKUP_REPLAY"] = str(path)
        with scene.misuse():
            hvd.init()

    run.__name__ = name
    misuse(
        REPLAY, wrong, "ConfigError", told, on=(0,), others=Gets("ConfigError", f"init() failed on rank 0: …{told}")
    )(run)


replayed(
    "no_trace",
    "`HVD_BACKUP_REPLAY` names a file that does not exist",
    "cannot be read: No such file or directory",
    None,
)
replayed("empty_trace", "an empty file", "is empty", "")
replayed("no_json", "a file that is no trace", "is not a trace of hvd_backup: line 1 is", "hello\n")
replayed(
    "other_version",
    "a trace of another format version",
    "but this hvd_backup reads version 1",
    HEADER.replace('"version": 1', '"version": 9') % 3,
)
replayed("other_size", "a trace of 4 ranks, for 3", "recorded with 4 ranks, but this run has 3", HEADER % 4)
replayed(
    "broken_line",
    "a trace with a broken line",
    "is not a trace of hvd_backup: line 2 is",
    HEADER % 3 + '{"event": "deci\n',
)
replayed(
    "line_without_step",
    "a trace with a line that lacks what belongs there",
    "line 2",
    HEADER % 3
    + '{"event": "decision", "channel": "optimizer.0"}\n'
    + '{"event": "opened", "channel": "optimizer.0"}\n',
)
