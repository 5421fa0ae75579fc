"""hvd_backup.tensorflow over four ranks: tensorflow_cases.py has what they do; here is what must be true of it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launch import start_ranks
from tests.rank_main import mark

DTYPES = ("float16", "bfloat16", "float32", "float64", "int32", "int64")
Results = list[dict[str, Any]]

pytestmark = pytest.mark.timeout(600)  # the first test waits for all cases of four ranks: two minutes on two idle cores


def of(tensorflow_results: Results, case: str) -> list[Any]:
    return [results[case] for results in tensorflow_results]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_first_n_allreduce_of_one_tensor_and_of_a_list(tensorflow_results: Results, dtype: str, mode: str) -> None:
    values = of(tensorflow_results, "sums")
    assert all(isinstance(value, dict) for value in values), values
    assert all(value[f"{dtype} {mode}"] for value in values)


def test_on_a_gpu_every_tensor_is_in_host_memory(tensorflow_results: Results) -> None:
    """That TensorFlow copies them, on a machine with a GPU, is not tested here."""
    for found in of(tensorflow_results, "ops_on_a_gpu"):
        assert found == {
            "HvdBackupSubmit": ["hyperparameters", "gradients"],
            "HvdBackupNextUpdate": ["kind", "hyperparameters", "gradients"],
            "HvdBackupFirstN": ["tensors", "results", "contributors"],
        }


def test_waiting_blocks_no_thread_of_the_executor(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "waiting_blocks_no_thread")
    assert [value["mean"] for value in values] == [1.5] * 4
    assert values[0]["ahead_s"] > 0.5, "the other ops came after the collective"


@pytest.mark.parametrize("where", ["", " in a function"])
def test_gradients(tensorflow_results: Results, where: str) -> None:
    for rank, found in enumerate(of(tensorflow_results, "gradients")):
        assert isinstance(found, dict), found
        assert found["allreduce" + where] == [2.5, 2.5]
        assert found["first_n" + where] == [2.5, 2.5]
        assert found["broadcast" + where] == ([10.0, 10.0] if rank == 1 else [0.0, 0.0])
        assert found["allgather" + where] == [10.0, 10.0]


def test_gradient_tape(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "tape")
    assert all(isinstance(value, dict) and value["finite"] for value in values), values
    assert len({value["late"] for value in values}) == 1
    assert len({value["together"] for value in values}) == 1


def test_i4_a_tape_does_not_wait_for_a_slow_rank(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "tape_of_a_slow_rank")
    assert all(isinstance(value, dict) for value in values), values
    assert len({value["weights"] for value in values}) == 1
    assert max(value["seconds"] for value in values[:3]) < 0.75 * values[3]["seconds"]
    assert [len(value["said"]) for value in values] == [0, 0, 0, 1]
    assert "hvd.DistributedGradientTape(tape, optimizer=optimizer)" in values[3]["said"][0]


def test_facts_inside_a_function(tensorflow_results: Results) -> None:
    assert of(tensorflow_results, "facts_in_graphs") == [[4, rank, 4, rank, 3, 1] for rank in range(4)]


def test_broadcast_and_allgather(tensorflow_results: Results) -> None:
    assert of(tensorflow_results, "variables_are_broadcast") == [[2.0, 2.0, 2.0, 2.0, 14.0, 3]] * 4


def test_names_that_need_horovod_say_so(tensorflow_results: Results) -> None:
    assert "alltoall is Horovod's own" in tensorflow_results[0]["horovods_names"]


def test_sparse_as_dense(tensorflow_results: Results) -> None:
    assert of(tensorflow_results, "sparse_as_dense") == [[[0.5, 0.5], [0.5, 0.5]]] * 4


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("sparse", "sparse_as_dense=True"),
        ("unknown_shape", "tf.ensure_shape"),
        ("jit_compiled_function", "without jit_compile=True"),
        ("a_dtype_that_is_not_there", "dtype bool is not supported"),
        ("shapes_that_differ_between_ranks", "shape (2,)"),
        ("wrong_root_in_a_function", "UsageError: root_rank=7: expected 0 to 3"),
    ],
)
def test_errors_say_what_to_do_on_every_rank(tensorflow_results: Results, case: str, said: str) -> None:
    for told in of(tensorflow_results, case):
        assert isinstance(told, str) and said in told, told


def test_errors_of_ops_are_the_packages_own(tensorflow_results: Results) -> None:
    for told in of(tensorflow_results, "another_shape_than_traced"):
        assert told["text"] == "tensor 0 has shape [4], another one than when the function was traced"
        assert told["theirs"], "code that catches TensorFlow's errors goes on to work"


def interrupted() -> None:
    """Rank 0 waits in a tf.function for a rank that does not come."""
    import time

    import tensorflow as tf

    import hvd_backup.tensorflow as hvd

    hvd.init()

    @tf.function
    def mean(tensor: Any) -> Any:
        return hvd.allreduce(tensor, name="wait")

    mean(tf.ones([4]))
    mark("goes on")
    if hvd.rank() > 0:
        time.sleep(60)
    began = time.monotonic()
    try:
        mean(tf.ones([4]))
    except KeyboardInterrupt:
        mark("interrupted", time.monotonic() - began)
    try:
        mean(tf.ones([4]))
    except hvd.HvdBackupError as error:
        mark("then", str(error))


def test_ctrl_c_is_answered_while_a_function_waits() -> None:
    with start_ranks(2, interrupted) as job:
        for rank in (0, 1):
            job.wait_for_mark(rank, "goes on")
        time.sleep(1.0)
        os.kill(job.pid(0), signal.SIGINT)
        assert 0.5 < job.wait_for_mark(0, "interrupted", timeout_s=10) < 5
        assert "Ctrl-C has ended the wait" in job.wait_for_mark(0, "then", timeout_s=10)


def test_use_before_init(tensorflow_results: Results) -> None:
    assert tensorflow_results[0]["before_init"].count("call hvd.init() first") == 6


def test_another_tensorflow_is_found_at_import(tensorflow_results: Results) -> None:
    assert "but TensorFlow 0.99.0 is installed: build hvd_backup again" in tensorflow_results[0]["before_init"]


def test_ops_of_another_tensorflow_are_explained(tmp_path: Path) -> None:
    from hvd_backup.tensorflow.library import mismatch  # here, because it imports TensorFlow

    assert "was built without TensorFlow" in mismatch(tmp_path, "2.21.0")
    (tmp_path / "ops-2.20.0.so").touch()
    told = mismatch(tmp_path, "2.21.0")
    assert "built with TensorFlow 2.20.0, but TensorFlow 2.21.0 is installed" in told
    assert "pip install --no-build-isolation --force-reinstall" in told
    (tmp_path / "ops-2.21.0.so").touch()
    assert mismatch(tmp_path, "2.21.0") == ""
