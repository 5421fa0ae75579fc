"""Every public name of horovod.tensorflow, horovod.keras and horovod.tensorflow.keras is there, with its arguments.

Read from the source of the Horovod that is installed, which need not fit the TensorFlow that is.
"""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

TWINS = {
    "horovod.tensorflow": "hvd_backup.tensorflow",
    "horovod.keras": "hvd_backup.keras",
    "horovod.tensorflow.keras": "hvd_backup.tensorflow.keras",
}
MODULES = {"K", "inspect", "keras", "os", "tf", "version", "warnings"}
HELPERS = {"device_compatibility_check", "is_version_greater_equal_than"}


def tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec("horovod")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], *module.split(".")[1:], "__init__.py")
    return ast.parse(path.read_text())


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """Those of the module, also under `if` and `try`."""
    found = []
    for statement in body:
        found.append(statement)
        for part in ("body", "orelse", "handlers") if isinstance(statement, (ast.If, ast.Try)) else ():
            found += statements(getattr(statement, part, []))
    return found


def public_names(module: str) -> list[str]:
    names: set[str] = set()
    for statement in statements(tree(module).body):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in statement.names}
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
    return sorted(name for name in names - MODULES - HELPERS if not name.startswith("_") and "." not in name)


def functions(module: str) -> dict[str, list[tuple[str, object]]]:
    """Of each public function that is defined there, the arguments, with their defaults if these are literals."""
    found = {}
    for statement in statements(tree(module).body):
        if isinstance(statement, ast.FunctionDef) and not statement.name.startswith("_"):
            arguments = statement.args.args
            defaults = [None] * (len(arguments) - len(statement.args.defaults)) + statement.args.defaults
            literal = [default.value if isinstance(default, ast.Constant) else ... for default in defaults]
            found[statement.name] = [(each.arg, value) for each, value in zip(arguments, literal, strict=True)]
    return found


OURS = """
import importlib, inspect, json, sys
module = importlib.import_module(sys.argv[1])
told = {}
for name in json.loads(sys.argv[2]):
    if name in vars(module):
        value = vars(module)[name]
        arguments = inspect.signature(value).parameters.values() if inspect.isfunction(value) else []
        plain = (int, float, str, bool, type(None))
        told[name] = [[p.name, p.default if isinstance(p.default, plain) else "..."] for p in arguments]
print(json.dumps({"own": told, "theirs": sorted(module.NAMES.all())}))
"""


@pytest.fixture(scope="module", params=list(TWINS))
def twin(request: pytest.FixtureRequest) -> tuple[str, dict[str, object], list[str]]:
    """Horovod's module; of ours, its own names with their arguments, and those that are Horovod's."""
    import json

    module: str = request.param
    command = [sys.executable, "-c", OURS, TWINS[module], json.dumps(public_names(module))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return module, told["own"], told["theirs"]


def test_every_public_name_is_there(twin: tuple[str, dict[str, object], list[str]]) -> None:
    module, own, theirs = twin
    assert len(public_names(module)) > 25
    missing = set(public_names(module)) - set(own) - set(theirs)
    assert not missing, f"{TWINS[module]} lacks {sorted(missing)}"
    usual = {"init", "shutdown", "is_initialized", "rank", "size", "local_rank", "local_size", "DistributedOptimizer"}
    usual |= {"allreduce", "allgather", "broadcast", "Average", "Sum", "Compression"}
    assert usual <= set(own), "these must work without Horovod"


def test_arguments_are_horovods(twin: tuple[str, dict[str, list[list[object]]], list[str]]) -> None:
    """Ours may take more. The two Keras twins differ in DistributedOptimizer's after `op`: ours are keywords there."""
    module, own, _ = twin
    for name, theirs in functions(module).items():
        if name not in own:
            continue
        ours = own[name]
        if name == "DistributedOptimizer" and module != "horovod.tensorflow":
            assert {argument for argument, _ in theirs} <= {argument for argument, _ in ours}
            theirs = theirs[:8]
        for (argument, default), (our_argument, our_default) in zip(theirs, ours, strict=False):
            assert argument == our_argument, f"{module}.{name}"
            if isinstance(default, (int, float, str, bool)) and argument != "average":
                assert default == our_default, f"{module}.{name}({argument})"
        assert len(ours) >= len(theirs), f"{module}.{name}"
