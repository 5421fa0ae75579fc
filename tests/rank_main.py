"""What runs inside each rank of a test: takes its job from the job folder, does it, and reports.

Started by `tests/launch.py` as `python rank_main.py JOB_FOLDER`, once per rank. Everything that the rank prints goes to
its own log, so that a failure can show the ranks one by one. SIGUSR1 makes a rank write all of its stacks there, from
C, also when Python itself is stuck.

Files of rank 2 in the job folder: rank2.pid, rank2.log, rank2.marks (JSON lines), rank2.report (pickle).
"""

import faulthandler
import json
import os
import pickle
import reprlib
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
FOLDER_VARIABLE = "RANK_TEST_FOLDER"


def launched_rank() -> int:
    """This process's rank, as its launcher says it: MPI need not be initialised for a rank to be named."""
    for name in RANK_VARIABLES:
        if name in os.environ:
            return int(os.environ[name])
    raise RuntimeError(f"not started by a known mpirun: none of {', '.join(RANK_VARIABLES)} is set")


def mark(name: str, value: Any = None) -> None:
    """Tells the waiting test that this rank has come to the point `name` (`Job.wait_for_mark`); value: any JSON."""
    line = json.dumps({"name": name, "value": value, "time": time.time()}) + "\n"
    with open(Path(os.environ[FOLDER_VARIABLE]) / f"rank{launched_rank()}.marks", "a") as file:
        file.write(line)


def publish(path: Path, data: bytes) -> None:
    """Writes a file that a reader sees whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(data)
    partial.rename(path)


def run_job(job: dict[str, Any]) -> Any:
    """Runs the job's function and returns what it returns, or its script and returns its global `result`."""
    if "call" in job:
        function, args, kwargs = pickle.loads(job["call"])
        return function(*args, **kwargs)
    sys.argv = [job["script"], *job["args"]]
    sys.path.insert(0, str(Path(job["script"]).parent))
    return runpy.run_path(job["script"], run_name="__main__").get("result")


def describe(error: BaseException) -> tuple[str, str]:
    """The traceback without this file's own frames, with the variables of a failed assert; and its last lines alone."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    if isinstance(error, AssertionError) and frames is not None:
        while frames.tb_next is not None:
            frames = frames.tb_next
        for name, value in frames.tb_frame.f_locals.items():
            text += f"  {name} = {reprlib.repr(value)}\n"
    return text, "".join(traceback.format_exception_only(error))


def main(folder: Path) -> None:
    rank = launched_rank()
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    publish(folder / f"rank{rank}.pid", str(os.getpid()).encode())
    job = pickle.loads((folder / "job").read_bytes())
    sys.path[:] = job["sys_path"]
    os.environ[FOLDER_VARIABLE] = str(folder)
    report = folder / f"rank{rank}.report"
    try:
        value = run_job(job)
        publish(report, pickle.dumps(("returned", value)))
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            publish(report, pickle.dumps(("returned", None)))
        else:
            publish(report, pickle.dumps(("raised", describe(error))))
        raise  # on its way out it meets what a user's program has: excepthook, atexit, MPI_Finalize


if __name__ == "__main__":
    main(Path(sys.argv[1]))
