"""Test settings, and the mark that runs a test's body inside each rank.

    @pytest.mark.ranks(1, 2, 4)                 # three tests; timeout_s=... bounds each
    def test_sum(size: int, tmp_path: Path) -> None:
        ...                                     # runs in every rank; `size` and fixtures are optional

Fixtures are set up here, once, and their values are sent to the ranks: they must pickle.

    @pytest.mark.gpu                            # skipped, visibly, where PyTorch finds none
"""

import signal
from typing import Any

import hypothesis
import pytest

from tests.launch import run_ranks

# Time limits per example would make tests depend on how busy the machine is; pytest-timeout bounds whole tests.
hypothesis.settings.register_profile("hvd_backup", deadline=None, print_blob=True)
hypothesis.settings.load_profile("hvd_backup")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start is to be interruptible
    config.addinivalue_line("markers", "ranks(*sizes, timeout_s=120): run the test's body in each rank, at these sizes")
    config.addinivalue_line("markers", "gpu: needs a GPU that PyTorch can use; the only tests that may be skipped")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if (mark := metafunc.definition.get_closest_marker("ranks")) is None:
        return
    if metafunc.cls is not None or not mark.args or not all(isinstance(size, int) for size in mark.args):
        raise TypeError(f"{metafunc.definition.nodeid}: ranks(1, 2, 4) marks a function, with the sizes as integers")
    if "size" not in metafunc.fixturenames:
        metafunc.fixturenames.append("size")
    metafunc.parametrize("size", mark.args, ids=[f"{size}ranks" for size in mark.args])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> bool | None:
    if (mark := pyfuncitem.get_closest_marker("ranks")) is None:
        return None
    kwargs = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    run_ranks(pyfuncitem.callspec.params["size"], pyfuncitem.obj, kwargs=kwargs, **mark.kwargs)
    return True


@pytest.fixture(scope="session")
def tensorflow_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each case of TensorFlow, and of Keras on it, has returned, by rank: one launch of four ranks."""
    return _keras_results("tensorflow", tmp_path_factory)


@pytest.fixture(scope="session")
def keras_torch_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same for Keras on PyTorch."""
    return _keras_results("torch", tmp_path_factory)


def _keras_results(backend: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    source = """
    import sys
    from tests import keras_cases
    result = keras_cases.run_cases(sys.argv[1])
    """  # a script, so that this process need not import TensorFlow
    folder = str(tmp_path_factory.mktemp(backend))
    return run_ranks(4, source, args=(folder,), env={"KERAS_BACKEND": backend}, timeout_s=560)
