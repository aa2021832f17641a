"""The kernels under the address and undefined-behaviour sanitizers."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    program = tmp_path / "sanitized"
    sources = [Path(__file__).with_name("sanitized.cpp"), *sorted((ROOT / "kernels/cpu").glob("*.cpp"))]
    include = f"-I{ROOT / 'kernels/include'}"
    subprocess.run([compiler, *OPTIONS, *SANITIZERS, include, *sources, "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
