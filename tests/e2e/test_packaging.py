"""What is installed is what is in the tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")


def python(*arguments: object, folder: Path, **environment: str) -> None:
    ran = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def sources() -> set[str]:
    """Every file that must be in a wheel, by its path there."""
    found = set()
    for package, place in (("mptqc", "mptqc"), ("passes", "mptqc/passes")):
        files = [path for path in (ROOT / package).rglob("*") if path.suffix == ".py" or path.name == "py.typed"]
        found |= {f"{place}/{path.relative_to(ROOT / package).as_posix()}" for path in files if path.is_file()}
    return found


@pytest.fixture
def tree(tmp_path):
    """A copy to build in, so that nothing is left in the working tree; the symlink stays one."""
    folder = tmp_path / "tree"
    folder.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in ("mptqc", "passes", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


LIBRARY = "mptqc/runtime/libmptqc_kernels.so"
CUDA_LIBRARY = "mptqc/runtime/libmptqc_cuda.so"


def build_wheel(source: Path, folder: Path, **environment: str) -> set[str]:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    python("-m", "pip", "wheel", *options, source, folder=folder, **environment)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return set(wheel.namelist())


def test_without_a_compiler_only_the_kernel_library_is_missing(tree, tmp_path):
    names = build_wheel(tree, tmp_path, CC="no-compiler", CXX="no-compiler")
    assert sources() - names == set()
    assert LIBRARY not in names


def test_the_cuda_library_is_built_where_it_is_asked_for(tree, tmp_path):
    """With a compiler that writes down what it is called with."""
    compiler = tmp_path / "nvcc"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    compiler.chmod(0o755)
    cuda = {"MPTQC_CUDA": "1", "NVCC": str(compiler), "MPTQC_CUDA_ARCHITECTURES": "80,90"}
    names = build_wheel(tree, tmp_path, CC="no-compiler", CXX="no-compiler", **cuda)
    assert CUDA_LIBRARY in names
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        command = wheel.read(CUDA_LIBRARY).decode()
    assert "code=sm_80 " in command
    assert "code=sm_90a " in command
    assert "code=compute_90 " in command
    assert "--cudart=static" in command
    assert {"linear.cu", "device.cu", "register.cpp", "backend.cpp", "arguments.cpp"} <= {
        Path(word).name for word in command.split()
    }


def test_without_nvcc_asking_for_the_cuda_library_is_an_error(tree):
    environment = {**os.environ, "MPTQC_CUDA": "1", "PATH": "", "CC": "no-compiler", "CXX": "no-compiler"}
    environment.pop("NVCC", None)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    ran = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "there is no nvcc: install CUDA 13, or let NVCC name its compiler" in ran.stderr


def test_wheel_of_the_source_archive_holds_every_module(tree, tmp_path):
    python("setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, folder=tree)
    archive = next(tmp_path.glob("*.tar.gz"))
    with tarfile.open(archive) as content:
        assert any(name.endswith("/constraints.txt") for name in content.getnames())
    names = build_wheel(archive, tmp_path)
    assert sources() - names == set()
    assert (LIBRARY in names) == (shutil.which("g++") is not None)
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"mptqc"}


def test_markers_never_ask_for_both_runtimes():
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    pins = [requirement for line in lines if (requirement := Requirement(line)).name.startswith("onnxruntime")]
    for system, machine in (("linux", "x86_64"), ("linux", "aarch64"), ("win32", "AMD64"), ("darwin", "arm64")):
        place = {"sys_platform": system, "platform_machine": machine}
        assert sum(pin.marker.evaluate(place) for pin in pins) == 1
