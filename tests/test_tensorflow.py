"""hvd_backup.tensorflow over four ranks: tensorflow_cases.py has what they do; here is what must be true of it."""

from pathlib import Path
from typing import Any

import pytest

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
        ("a_dtype_that_is_not_there", "dtype bool is not supported"),
        ("shapes_that_differ_between_ranks", "shape (2,)"),
    ],
)
def test_errors_say_what_to_do_on_every_rank(tensorflow_results: Results, case: str, said: str) -> None:
    for told in of(tensorflow_results, case):
        assert isinstance(told, str) and said in told, told


def test_use_before_init(tensorflow_results: Results) -> None:
    assert "call hvd.init() first" in tensorflow_results[0]["before_init"]


def test_ops_of_another_tensorflow_are_explained(tmp_path: Path) -> None:
    from hvd_backup.tensorflow.library import mismatch  # here, because it imports TensorFlow

    assert "was built without TensorFlow" in mismatch(tmp_path, "2.21.0")
    (tmp_path / "ops-2.20.0.so").touch()
    told = mismatch(tmp_path, "2.21.0")
    assert "built with TensorFlow 2.20.0, but TensorFlow 2.21.0 is installed" in told
    assert "pip install --no-build-isolation --force-reinstall" in told
    (tmp_path / "ops-2.21.0.so").touch()
    assert mismatch(tmp_path, "2.21.0") == ""
