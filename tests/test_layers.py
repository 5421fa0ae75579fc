"""Folders are layers and includes point one way (docs: the design, section 4). Reads the sources; needs no build."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"

# What each layer may include beside itself.
MAY_INCLUDE = {
    "base": set[str](),
    "control": {"base"},
    "transport": {"base"},
    "kernels": {"base"},
    "device": {"base"},
    "gpu": {"base", "device"},  # a library of its own
    "collective": {"base", "transport", "kernels", "device"},
    "engine": {"base", "control", "transport", "collective", "kernels", "device"},
    "api": {"base", "control", "transport", "collective", "kernels", "device", "engine"},
    "bindings": {"api"},
    "bindings of the GPU library": {"base", "device", "gpu", "bindings"},
}
# Control is pure: time and messages come in, messages come out.
IMPURE = {
    *("atomic", "chrono", "condition_variable", "cstdio", "cstdlib", "ctime", "fstream", "future", "iostream"),
    *("mutex", "random", "thread"),
}


def sources() -> list[Path]:
    return sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")])


def is_testing(path: Path) -> bool:
    """The bindings that open the inner layers to the tests: no part of the product, and they may know everything."""
    return path.parent.name == "bindings" and path.name.startswith("testing")


@cache
def own_includes(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE))


@cache
def foreign_includes(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^\s*#\s*include\s+<([^>]+)>", path.read_text(), re.MULTILINE))


def layer(path: Path) -> str:
    folder = path.relative_to(CSRC).parts[0]
    return "bindings of the GPU library" if folder == "bindings" and path.name.startswith("gpu") else folder


def test_every_folder_of_csrc_is_a_layer_with_sources() -> None:
    assert {layer(path) for path in sources()} == set(MAY_INCLUDE)
    assert all(len(path.relative_to(CSRC).parts) == 2 for path in sources()), "layers have no folders of their own"


@pytest.mark.parametrize("name", MAY_INCLUDE)
def test_includes_point_one_way(name: str) -> None:
    allowed = MAY_INCLUDE[name] | {name}
    wrong = [
        f"{path.relative_to(ROOT)} includes {include}"
        for path in sources()
        if layer(path) == name and not is_testing(path)
        for include in own_includes(path)
        if include.split("/")[0] not in allowed
    ]
    assert not wrong, f"{name} may include {', '.join(sorted(allowed))}"


def test_includes_are_written_from_csrc() -> None:
    missing = [f"{path.name}: {include}" for path in sources() for include in own_includes(path)]
    missing = [entry for entry in missing if not (CSRC / entry.split(": ")[1]).is_file()]
    assert not missing, 'write #include "folder/file.h"'


@pytest.mark.parametrize(
    ("header", "where"),
    [
        (r"mpi\.h", r"transport/mpi_\w+\.(h|cpp)"),
        (r"(nanobind/.*|Python\.h)", r"bindings/\w+\.(h|cpp)"),
        (r"(tensorflow|xla)/.*", r"bindings/tensorflow_(device_)?ops\.(h|cpp)"),
        (r"cuda.*", r"gpu/\w+\.(h|cu)"),
        (r"(torch|ATen|c10|nccl).*", r"(?!)"),
    ],
    ids=["mpi", "python", "tensorflow", "cuda", "frameworks"],
)
def test_each_foreign_library_has_one_home(header: str, where: str) -> None:
    homeless = [
        f"{path.relative_to(CSRC)} includes <{include}>"
        for path in sources()
        for include in foreign_includes(path)
        if re.fullmatch(header, include) and not re.fullmatch(where, str(path.relative_to(CSRC)))
    ]
    assert not homeless


def test_only_the_api_names_a_concrete_transport() -> None:
    concrete = {"transport/in_process.h", "transport/mpi_transport.h", "transport/mpi_handle.h"}
    wrong = [
        f"{path.relative_to(ROOT)} includes {include}"
        for path in sources()
        if layer(path) not in ("transport", "api") and not is_testing(path)
        for include in own_includes(path)
        if include in concrete
    ]
    assert not wrong, "the layers above know transport/transport.h alone"


def test_control_has_no_clock_and_no_io() -> None:
    impure = [
        f"{path.relative_to(ROOT)} includes <{include}>"
        for path in sources()
        if layer(path) == "control"
        for include in foreign_includes(path)
        if include in IMPURE
    ]
    assert not impure, "time and messages come in as arguments"


def test_the_public_header_is_plain_c() -> None:
    for header in (CSRC / "api").glob("*.h"):
        assert not own_includes(header)
        assert all(include.endswith(".h") for include in foreign_includes(header)), f"{header.name}: C headers only"


def test_only_a_frameworks_own_folder_imports_it() -> None:
    """`import hvd_backup.mpi` works on a machine without PyTorch or TensorFlow, and Keras works with either."""
    wrong = []
    for path in (ROOT / "hvd_backup").rglob("*.py"):
        homes = {path.relative_to(ROOT / "hvd_backup").parts[0].removesuffix(".py")}
        homes |= {path.stem.removesuffix("_updates")} if homes == {"keras"} else set()  # torch_updates.py
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            roots = {name.split(".")[0] for name in names} & {"torch", "tensorflow", "keras", "horovod"}
            wrong += [f"{path.relative_to(ROOT)} imports {root}" for root in roots - homes]
    assert not wrong
