"""hvd_backup.keras over four ranks: keras_cases.py has what they do, in one launch; here is what must be true of it."""

from typing import Any

import pytest

# keras_cases.py, which this process does not import: it would import TensorFlow.
EPOCH = 20
OPTIMIZERS = ["momentum", "adam", "adamw", "global_clipnorm", "ema", "accumulation", "schedule", "loss_scale"]
FOLLOWED = [
    "delayed_momentum",
    "delayed_adam_several_steps_in_one_call",
    "delayed_ema",
    "delayed_accumulation",
    "delayed_schedule",
    "delayed_mixed_precision",
    "delayed_with_a_rate_that_is_set_in_every_step",
    "delayed_eagerly",
]

Results = list[dict[str, Any]]

pytestmark = pytest.mark.timeout(600)  # the first test waits for all cases of four ranks: two minutes on two idle cores


def of(tensorflow_results: Results, case: str) -> list[Any]:
    return [results[case] for results in tensorflow_results]


def digests(values: list[Any]) -> set[str]:
    assert all(isinstance(value, dict) for value in values), values
    return {value["digest"] for value in values}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_backup_workers_it_is_one_process_with_all_the_data(tensorflow_results: Results, name: str) -> None:
    differences = tensorflow_results[0]["as_one_process"]
    assert isinstance(differences, dict), differences
    assert differences[name] < 2e-5


@pytest.mark.parametrize("name", [*FOLLOWED, "delayed_without_callbacks"])
def test_i1_weights_and_optimizer_are_equal_under_delays(tensorflow_results: Results, name: str) -> None:
    values = of(tensorflow_results, name)
    assert len(digests(values)) == 1
    assert all(value["trained"] for value in values)
    assert len({value["step"] for value in values}) == 1
    assert sum(value["counters"]["caught_up"] for value in values) > 0, "nobody was late"
    assert all(len(value["contributors"]) >= 3 for value in values)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_followed_epoch_has_as_many_updates_as_batches(tensorflow_results: Results, name: str) -> None:
    epochs = 1 if name == "delayed_eagerly" else 2
    assert {value["step"] for value in of(tensorflow_results, name)} == {epochs * EPOCH}


def test_the_learning_rate_travels_with_the_update(tensorflow_results: Results) -> None:
    assert (
        len({value["rate"] for value in of(tensorflow_results, "delayed_with_a_rate_that_is_set_in_every_step")}) == 1
    )


def test_i4_a_slow_rank_costs_the_others_nothing(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "a_rank_that_is_always_slow")
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {2 * EPOCH}
    late_s = 2 * EPOCH * 0.1
    assert max(value["seconds"] for value in values) < 0.75 * late_s, "as slow as the slow one"


@pytest.mark.parametrize("name", ["own_loop_in_a_function", "own_loop_eagerly", "own_loop_with_an_embedding"])
def test_a_loop_of_ones_own_over_follow(tensorflow_results: Results, name: str) -> None:
    values = of(tensorflow_results, name)
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {2 * EPOCH}
    assert all(0 < value["computed"] <= 2 * EPOCH for value in values)
    assert min(value["computed"] for value in values) < 2 * EPOCH, "nobody has skipped a batch"


def test_uneven_data(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "uneven_data")
    assert len(digests(values)) == 1
    assert {value["step"] for value in values} == {2 * EPOCH}


def test_callbacks_of_horovod(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "callbacks_of_horovod")
    assert len(digests(values)) == 1
    histories = [value["history"] for value in values]
    assert all(history == histories[0] for history in histories), "logs are those of all ranks"
    assert histories[0]["lr"] == pytest.approx(
        [0.25, 0.4, 0.4], rel=1e-6
    )  # (1/4 + 1) / 2, then at its end, then 0.5**0
    assert all(value["saved"] for value in values)


def test_saved_and_loaded(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "saved_and_loaded")
    assert len(digests(values)) == 1
    assert all(value["equal"] for value in values), "weights and optimizer state are what was saved"
    assert {value["kinds"] for value in values} == {("Adam", False, True)}, "plain Keras can load it"
    assert {value["step"] for value in values} == {2 * EPOCH}


def test_pytorch_and_tensorflow_share_one_engine(tensorflow_results: Results) -> None:
    values = of(tensorflow_results, "beside_pytorch")
    assert len(digests(values)) == 1
    assert all(value["one"] and value["steps"] == (5, 5) for value in values)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("jit_compile", "jit_compile=False"),
        ("loss_scale_outside", "hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer)"),
        ("sparse_gradient", "sparse_as_dense=True"),
        ("other_variables_than_before", "the first call had"),
        ("wrapped_twice", "wrap a plain one, once"),
        ("no_optimizer", "expected a keras.optimizers.Optimizer"),
        ("variables_that_differ_between_ranks", "variable 0: w:0 (2,) float32"),
    ],
)
def test_errors_say_what_to_do_on_every_rank(tensorflow_results: Results, case: str, said: str) -> None:
    for told in of(tensorflow_results, case):
        assert isinstance(told, str) and said in told, told
