"""hvd_backup.keras over four ranks, on TensorFlow and on PyTorch.

keras_cases.py has what they do, in one launch for each backend; here is what must be true of it.
"""

import os
import subprocess
import sys
from typing import Any

import pytest

# keras_cases.py, which this process does not import: it would import TensorFlow.
EPOCH = 20
OPTIMIZERS = ["momentum", "adam", "adamw", "clipnorm", "global_clipnorm", "ema", "accumulation", "schedule"]
OPTIMIZERS += ["loss_scale"]
FOLLOWED = [
    "delayed_momentum",
    "delayed_adam",
    "delayed_ema",
    "delayed_accumulation",
    "delayed_schedule",
    "delayed_mixed_precision",
    "delayed_with_a_rate_that_is_set_in_every_step",
]
FOLLOWED_IN_GRAPHS = ["delayed_adam_several_steps_in_one_call", "delayed_eagerly"]
TAPED_LOOPS = [f"tape_{where}_with_{name}" for where in ("in_a_function", "eagerly") for name in ("momentum", "adam")]
OWN_LOOPS = ["own_loop_in_a_function", "own_loop_eagerly", "own_loop_with_an_embedding"]

Results = list[dict[str, Any]]

pytestmark = pytest.mark.timeout(600)  # the first test waits for all cases of four ranks: two minutes on two idle cores


@pytest.fixture(params=["tensorflow", "torch"])
def keras_results(request: pytest.FixtureRequest) -> Results:
    """Of both backends."""
    results: Results = request.getfixturevalue(
        {"tensorflow": "tensorflow_results"}.get(request.param, "keras_torch_results")
    )
    return results


def of(keras_results: Results, case: str) -> list[Any]:
    return [results[case] for results in keras_results]


def digests(values: list[Any]) -> set[str]:
    assert all(isinstance(value, dict) for value in values), values
    return {value["digest"] for value in values}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_backup_workers_it_is_one_process_with_all_the_data(keras_results: Results, name: str) -> None:
    values = of(keras_results, "as_one_process")
    assert all(isinstance(value, dict) for value in values), values
    (difference,) = [value[name] for value in values if name in value]
    assert difference < 2e-5


@pytest.mark.parametrize("name", [*FOLLOWED, "delayed_without_callbacks", "delayed_in_train_on_batch"])
def test_i1_weights_and_optimizer_are_equal_under_delays(keras_results: Results, name: str) -> None:
    one_history(of(keras_results, name))


def test_a_rank_beyond_the_journal_takes_over_the_state_of_another_one(keras_results: Results) -> None:
    values = of(keras_results, "beyond_the_journal")
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {3 * EPOCH}
    *others, late = values
    counters = late["counters"]
    assert counters["resynced"] > 2
    assert counters["contributed"] + counters["caught_up"] + counters["resynced"] == 3 * EPOCH
    known = {bits for value in others for bits in value["seen"]}
    assert late["taken_over"] and set(late["taken_over"]) <= known
    assert late["told"] and all(told == counted for value in values for told, counted in value["told"])


@pytest.mark.parametrize("name", FOLLOWED_IN_GRAPHS)
def test_i1_in_other_ways_of_tensorflow(tensorflow_results: Results, name: str) -> None:
    one_history(of(tensorflow_results, name))


def one_history(values: list[Any]) -> None:
    assert len(digests(values)) == 1
    assert all(value["trained"] for value in values)
    assert len({value["step"] for value in values}) == 1
    assert sum(value["counters"]["caught_up"] for value in values) > 0, "nobody was late"
    assert all(len(value["contributors"]) >= 3 for value in values)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_followed_epoch_has_as_many_updates_as_batches(keras_results: Results, name: str) -> None:
    assert {value["step"] for value in of(keras_results, name)} == {2 * EPOCH}


@pytest.mark.parametrize(("name", "epochs"), list(zip(FOLLOWED_IN_GRAPHS, (2, 1), strict=True)))
def test_a_followed_epoch_in_other_ways_of_tensorflow(tensorflow_results: Results, name: str, epochs: int) -> None:
    assert {value["step"] for value in of(tensorflow_results, name)} == {epochs * EPOCH}


def test_gradients_that_are_not_finite_are_left_out_if_so_wanted(keras_results: Results) -> None:
    values = of(keras_results, "spoiled_gradients")
    assert len(digests(values)) == 1
    assert all(value["finite"] and value["trained"] for value in values)
    assert {value["step"] for value in values} == {EPOCH}
    assert [value["counters"]["dropped"] for value in values] == [1, 4, 2, 1]
    assert [value["counters"]["caught_up"] for value in values] == [0, 3, 1, 0]


def test_the_learning_rate_travels_with_the_update(keras_results: Results) -> None:
    assert len({value["rate"] for value in of(keras_results, "delayed_with_a_rate_that_is_set_in_every_step")}) == 1


def test_i4_a_slow_rank_costs_the_others_nothing(keras_results: Results) -> None:
    values = of(keras_results, "a_rank_that_is_always_slow")
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {2 * EPOCH}
    assert values[3]["missed"] > EPOCH / 2, "the slow one was waited for"


@pytest.mark.parametrize("name", OWN_LOOPS)
def test_a_loop_of_ones_own_over_follow_with_a_tape(tensorflow_results: Results, name: str) -> None:
    followed_loop(of(tensorflow_results, name))


@pytest.mark.parametrize("name", TAPED_LOOPS)
def test_i4_a_tape_with_its_optimizer_does_not_wait_for_a_slow_rank(tensorflow_results: Results, name: str) -> None:
    values = of(tensorflow_results, name)
    followed_loop(values)
    slow = values[3]
    assert slow["computed"] < EPOCH, "it has worked through old updates"
    assert slow["counters"]["contributed"] + slow["counters"]["caught_up"] == 2 * EPOCH
    in_time = [update for update in values[0]["seen"] if 3 not in update[1]]
    assert len(in_time) > EPOCH, "the others have waited for the slow rank"
    for value in values:  # what gradient() returns is the mean of the update that is the newest afterwards
        assert all(norm == values[0]["norms"].get(step, norm) > 0 for step, norm in value["norms"].items())


def test_i6_a_tape_with_its_optimizer_when_the_round_is_over(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "tape_after_the_end_of_the_round")
    assert len(digests(values)) == 1
    assert len({value["step"] for value in values}) == 1
    for value in values[1:]:
        assert len([norm for norm in value["norms"] if norm > 0]) <= value["step"] < 9
        assert value["norms"][-1] == 0


def test_a_tape_with_its_optimizer_says_what_it_cannot_do(tensorflow_results: Results) -> None:
    for told in of(tensorflow_results, "tape_misused"):
        eagerly, in_a_function, plain, both, twice = told
        assert "give the optimizer clipnorm, clipvalue or global_clipnorm" in eagerly
        assert "give the optimizer clipnorm, clipvalue or global_clipnorm" in in_a_function
        assert "optimizer=SGD): expected an optimizer made by hvd.DistributedOptimizer" in plain
        assert "hvd.DistributedOptimizer(optimizer, op=..., backup_workers=...)" in both
        assert "give the tape the optimizer" in twice


def test_a_loop_of_ones_own_over_follow_with_backward(keras_torch_results: Results) -> None:
    values = of(keras_torch_results, "own_loop_eagerly")
    followed_loop(values)
    assert all(value["untouched"] for value in values), "apply() has changed what p.grad shows"


def test_pytorch_backend_needs_no_tensorflow(keras_torch_results: Results) -> None:
    assert of(keras_torch_results, "without_tensorflow") == [True] * 4


def followed_loop(values: list[Any]) -> None:
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {2 * EPOCH}
    assert all(0 < value["computed"] <= 2 * EPOCH for value in values)
    assert min(value["computed"] for value in values) < 2 * EPOCH, "nobody has skipped a batch"
    for value in values:  # on_update runs on every rank for every update, with the mean of what its contributors gave
        assert value["seen"] == values[0]["seen"]
        assert [step for step, _, _ in value["seen"]] == list(range(2 * EPOCH))
        assert all(mean == pytest.approx(sum(ranks) / len(ranks)) for _, ranks, mean in value["seen"])


def test_uneven_data(keras_results: Results) -> None:
    values = of(keras_results, "uneven_data")
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {2 * EPOCH}


def test_the_end_of_fit_ends_the_round_without_callbacks(keras_results: Results) -> None:
    """The data of rank 0 ends first: what the others have left is dropped, and a warning says what to do."""
    values = of(keras_results, "uneven_data_without_callbacks")
    assert len(digests(values)) == 1
    assert len({value["step"] for value in values}) == 1
    said = [text for value in values for text in value["said"]]
    assert said and all("gradients were dropped" in text and "FollowCallback" in text for text in said)


@pytest.mark.parametrize("where", ["callback 0", "callback 1", "data 0", "data 1"])
def test_i6_fit_that_raises_on_one_rank(keras_results: Results, where: str) -> None:
    """The others end their epoch without it, and the next fit() is everybody's."""
    values = of(keras_results, "fit_that_raises")
    assert all(isinstance(value, dict) for value in values), values
    assert ["on purpose" in value[where]["told"] for value in values] == [False, False, True, False]
    assert [value[where]["met"] for value in values] == [["met"] * 4] * 4
    assert [value[where]["steps"] for value in values] == [(EPOCH, 2 * EPOCH)] * 4
    assert len({value[where]["digest"] for value in values}) == 1


def test_callbacks_of_horovod(keras_results: Results) -> None:
    values = of(keras_results, "callbacks_of_horovod")
    assert len(digests(values)) == 1
    histories = [value["history"] for value in values]
    assert all(history == histories[0] for history in histories), "logs are those of all ranks"
    assert histories[0]["lr"] == pytest.approx(
        [0.25, 0.4, 0.4], rel=1e-6
    )  # (1/4 + 1) / 2, then at its end, then 0.5**0
    assert all(value["saved"] for value in values)


def test_saved_and_loaded(keras_results: Results) -> None:
    values = of(keras_results, "saved_and_loaded")
    assert len(digests(values)) == 1
    assert all(value["equal"] for value in values), "weights and optimizer state are what was saved"
    assert {value["kinds"] for value in values} == {("Adam", False, True)}, "plain Keras can load it"
    assert {value["step"] for value in values} == {2 * EPOCH}


def test_pytorch_and_tensorflow_share_one_engine(keras_results: Results) -> None:
    values = of(keras_results, "beside_pytorch")
    assert len(digests(values)) == 1
    assert all(value["one"] and value["steps"] == (5, 5) for value in values)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("loss_scale_outside", "hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer)"),
        ("other_variables_than_before", "the first call had"),
        ("wrapped_twice", "wrap a plain one, once"),
        ("no_optimizer", "expected a keras.optimizers.Optimizer"),
        ("variables_that_differ_between_ranks", "variable 0: w (2,) float32"),
        ("variables_that_differ_in_fit", "variable 0: kernel (6, 3) float32"),
    ],
)
def test_errors_say_what_to_do_on_every_rank(keras_results: Results, case: str, said: str) -> None:
    for told in of(keras_results, case):
        assert isinstance(told, str) and said in told, told


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("jit_compile", "jit_compile=False"),
        ("jit_compiled_step", "without jit_compile=True"),
        ("sparse_gradient", "sparse_as_dense=True"),
        ("unknown_shape_in_fit", "shape (None, 6) when the function is traced"),
        ("variables_that_differ_in_a_function", "variable 0: w:0 (2,) float32"),
    ],
)
def test_errors_with_tensorflow(tensorflow_results: Results, case: str, said: str) -> None:
    for told in of(tensorflow_results, case):
        assert isinstance(told, str) and said in told, told


def test_use_after_shutdown(keras_results: Results) -> None:
    for told in of(keras_results, "after_shutdown"):
        assert len(told) == 4 and all("shutdown()" in each and "init()" in each for each in told), told


def test_errors_with_pytorch(keras_torch_results: Results) -> None:
    for told in of(keras_torch_results, "wrong_shape"):
        assert isinstance(told, str) and "the gradient of a has shape (3,), the variable (2,)" in told, told


def test_another_backend_of_keras_is_refused() -> None:
    code = "import keras; keras.backend.backend = lambda: 'jax'; import hvd_backup.keras"  # jax itself is not installed
    env = {**os.environ, "KERAS_BACKEND": "torch"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert "works with Keras on TensorFlow or PyTorch, but its backend is jax" in done.stderr
