"""Gradients that TensorFlow hands over on a GPU: tensorflow_device_cases.py has what three ranks do; here is what must
be true of it.

For TensorFlow the GPU is a plugin (tensorflow_gpu_double.cpp), for the engine a stand-in whose queue runs late
(csrc/bindings/testing_device.cpp); the memory is the host's. That the engine waits for TensorFlow's stream is not
tested here: the plugin has none that runs late.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.compiled import shared_library
from tests.launch import run_ranks, start_ranks

STEPS = 25  # as in tensorflow_device_cases.py, which this process does not import: it would import TensorFlow
LONG = 120
STOPS = 3
STOPPED_S = 0.4
INSTEAD = "With 'auto' or 'host' gradients go through host memory"

Results = list[dict[str, Any]]

pytestmark = pytest.mark.timeout(300)  # the first test waits for all cases of three ranks


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The GPU for TensorFlow."""
    found = importlib.util.find_spec("tensorflow")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent
    source = Path(__file__).with_name("tensorflow_gpu_double.cpp")
    return str(shared_library(source, tmp_path_factory.mktemp("plugin"), f"-I{folder}/include"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, plugin: str) -> Results:
    """By rank, what each case has returned."""
    source = """
    import sys
    from tests import tensorflow_device_cases
    result = tensorflow_device_cases.run_cases(*sys.argv[1:])
    """  # a script, so that this process need not import TensorFlow
    folder = str(tmp_path_factory.mktemp("gpus"))
    return run_ranks(3, source, args=(folder, plugin), env={"KERAS_BACKEND": "tensorflow"}, timeout_s=280)


def of(results: Results, case: str, way: str = "") -> list[Any]:
    return [result[case][way] if way else result[case] for result in results]


def one_history(values: list[dict[str, Any]], steps: int, empty: int = -1) -> None:
    assert len({value["digest"] for value in values}) == 1
    assert [value["step"] for value in values] == [steps] * 3
    for value in values:
        assert value["seen"] == values[0]["seen"]
        assert [step for step, _, _ in value["seen"]] == [step for step in range(steps) if step != empty]
        # These scalars have their bucket in host memory.
        assert all(mean == pytest.approx(sum(ranks) / len(ranks)) for _, ranks, mean in value["seen"])


@pytest.mark.parametrize(
    ("case", "way"), [("all_contribute", "nccl"), ("all_contribute", "no group"), ("compressed", "mpi")]
)
def test_weights_are_those_of_training_in_host_memory_bit_for_bit(results: Results, case: str, way: str) -> None:
    there, here = of(results, case, way), of(results, case, "host")
    one_history(there, STEPS)
    assert all(ranks == (0, 1, 2) for _, ranks, _ in there[0]["seen"])
    assert {value["digest"] for value in there} == {value["digest"] for value in here}
    assert [value["copies"] for value in here] == [0] * 3
    for value in there:
        assert value["copies"] > STEPS
        assert (value["exchanges"] > STEPS) == (way != "no group")
        assert value["host_bytes"] == 2 * 163 * (2 if case == "compressed" else 4)
        assert (value["groups"] > 0) == (way != "mpi")


def test_what_is_compressed_is_rounded(results: Results) -> None:
    assert of(results, "compressed", "mpi")[0]["digest"] != of(results, "all_contribute", "nccl")[0]["digest"]


def test_gradients_that_are_not_finite_are_left_out_if_so_wanted(results: Results) -> None:
    there, here = of(results, "spoiled", "nccl"), of(results, "spoiled", "host")
    one_history(there, STEPS, empty=9)  # in which nobody's is finite
    assert {value["digest"] for value in there} == {value["digest"] for value in here}
    assert [value["counters"] for value in there] == [value["counters"] for value in here]
    assert [value["counters"]["caught_up"] for value in there] == [0, 2, 1]
    assert all(value["copies"] > STEPS for value in there)


def test_i1_weights_are_equal_under_delays(results: Results) -> None:
    values = of(results, "delayed")
    one_history(values, 2 * STEPS)
    mixed = [value["counters"] for value in values if 0 < value["counters"]["caught_up"] < 2 * STEPS]
    assert mixed, "nobody was late at times"


def test_i4_a_late_rank_catches_up_with_what_lies_in_host_memory(results: Results) -> None:
    values = of(results, "one_late")
    one_history(values, 2 * STEPS)
    assert all(value["exchanges"] > STEPS for value in values[:2])
    assert values[2]["counters"]["caught_up"] > STEPS, "the others have waited"
    assert values[2]["counters"]["dropped"] > 0


def test_handing_over_waits_for_nothing_and_keeps_what_was_handed_over(results: Results) -> None:
    for value in of(results, "handing_over"):
        assert value["seen"] == (0, 1, 2)
        assert value["seconds"] < 1.5, "it has waited for the last rank"
        assert value["weights"] == [[-2.0], [-2.0]]
        assert value["others"] == [7.0], "a result was written where it has no memory any more"


def test_on_a_gpu_gradients_are_in_its_memory(results: Results) -> None:
    for found in of(results, "kernels"):
        assert found == {
            "HvdBackupSubmitOnDevice": ["GPU", "hyperparameters", "finite"],
            "HvdBackupNextUpdateOnDevice": ["GPU", "kind", "hyperparameters"],
        }


def test_the_data_plane_is_chosen(results: Results) -> None:
    for told in of(results, "chosen"):
        assert told.pop("here") == ["/CPU:0", "/CPU:0"]
        how = "gradients from GPU to GPU, by NCCL 2.28.0; kept for late ranks in page-locked host memory"
        assert told.pop("told") == [("GPU, TF", how)]
        assert {
            name: why if isinstance(why, int) else why.partition(" on rank 1: ")[2] for name, why in told.items()
        } == {
            "auto CPU:0": "",
            "host GPU:1": "",
            "auto GPU:0 without the library": "",
            "nccl GPU:1": 1,
            "nccl CPU:0": f"the parameters are on the CPU. {INSTEAD}",
            "mpi GPU:0 GPU:1": f"the parameters are on /GPU:0, /GPU:1: one GPU for each optimizer. {INSTEAD}",
            "mpi GPU:0 without the library": f"hvd_backup was built without the GPU library (nvcc). {INSTEAD}",
            "nccl GPU:2": "hvd_backup's GPU library does not run on GPU 3 (CUDA: no kernel image): build it with "
            f"CUDAARCHS set to this GPU's architecture, and with a CUDA that the driver supports. {INSTEAD}",
        }


def test_what_cannot_be_is_an_error_if_it_is_asked_for(results: Results) -> None:
    assert of(results, "refused") == [
        f"HVD_BACKUP_DATA_PLANE=nccl on rank {rank}: NCCL cannot be loaded. {INSTEAD}" for rank in range(3)
    ]


def test_i4_a_process_that_stops_amid_an_exchange_is_left_behind_and_comes_back(plugin: str, tmp_path: Path) -> None:
    source = f"""
    from tests import tensorflow_device_cases
    result = tensorflow_device_cases.train_while_one_stops({str(tmp_path)!r}, {plugin!r}, {LONG})
    """
    with start_ranks(3, source, env={"KERAS_BACKEND": "tensorflow"}, timeout_s=120) as job:
        job.wait_for_mark(0, "exchanged")
        job.stop_now_and_then(1, STOPS, STOPPED_S)
        values = job.wait().values()
    one_history(values, LONG)
    assert values[1]["counters"]["caught_up"] > 0
