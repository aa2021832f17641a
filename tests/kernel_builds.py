"""Builds of the kernels that only tests make: AVX-VNNI and AMX emulated, so that their code runs on other processors.

AVX-VNNI then takes AVX2, and AMX AVX512-VNNI.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent / "kernels"
OPTIONS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


def build_with_emulation(output: Path, folders: Sequence[str], options: Sequence[str | Path]) -> Path:
    """Compile the sources in `folders` of kernels/, and `options` into `output`; skips without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    sources = [path for folder in folders for path in sorted((ROOT / "kernels" / folder).glob("*.cpp"))]
    sources.remove(ROOT / "kernels/cpu/processor.cpp")  # the emulations say themselves that they are there
    emulation = [f'-DMPTQC_EMULATED_{name.upper()}="{HERE / f"emulated_{name}.h"}"' for name in ("avx_vnni", "amx")]
    include = [f"-I{ROOT / 'kernels' / folder}" for folder in ("include", "ort/cpu")]
    subprocess.run([compiler, *OPTIONS, *emulation, *include, *options, *sources, "-o", output], check=True)
    return output
