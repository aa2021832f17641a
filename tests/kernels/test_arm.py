"""The kernels of 64-bit ARM under an emulator, on random shapes, bit for bit against the portable ones."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_builds import HERE, OPTIONS, ROOT

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # of Debian's cross-compiler

LISTING = """
#include <cstdio>
#include "mptqc_kernels.h"
int main() {
  for (int isa = 0; isa < MPTQC_ISA_COUNT; ++isa)
    if (mptqc_isa_runs_here(static_cast<mptqc_isa>(isa))) std::puts(mptqc_isa_name(static_cast<mptqc_isa>(isa)));
}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory):
    """Compile a program with the kernels; returns a function that runs it on an emulated processor."""
    if platform.machine() == "aarch64":
        pytest.skip("this is an ARM machine: the other tests run its kernels")
    compiler, emulator = shutil.which(COMPILER), shutil.which(EMULATOR)
    if compiler is None or emulator is None or not LIBRARIES.is_dir():
        pytest.skip(f"takes {COMPILER} and {EMULATOR}")
    folder = tmp_path_factory.mktemp("arm")
    objects = []
    for source in sorted((ROOT / "kernels/cpu").glob("*.cpp")):
        objects.append(folder / f"{source.stem}.o")
        command = [compiler, *OPTIONS, "-O2", "-Wno-psabi", f"-I{ROOT / 'kernels/include'}", "-c", source]
        subprocess.run([*command, "-o", objects[-1]], check=True)

    def program(source: Path):
        path = folder / source.stem
        subprocess.run([compiler, *OPTIONS, f"-I{ROOT / 'kernels/include'}", source, *objects, "-o", path], check=True)

        def run(cpu: str) -> subprocess.CompletedProcess[str]:
            environment = os.environ | {"QEMU_LD_PREFIX": str(LIBRARIES)}
            return subprocess.run(
                [emulator, "-cpu", cpu, path], capture_output=True, text=True, check=False, env=environment
            )

        return run

    return program


@pytest.mark.parametrize(
    ("cpu", "isas"),
    [
        ("cortex-a72", ["portable"]),
        ("cortex-a76", ["portable", "neon_dotprod"]),
        ("max", ["portable", "neon_dotprod", "neon_i8mm"]),
    ],
)
def test_the_instruction_sets_of_a_processor_are_found(build, tmp_path, cpu, isas):
    source = tmp_path / "listing.cpp"
    source.write_text(LISTING)
    assert build(source)(cpu).stdout.split() == isas


@pytest.mark.parametrize("cpu", ["cortex-a76", "max"])
def test_they_equal_the_portable_kernels(build, cpu):
    ran = build(HERE / "sanitized.cpp")(cpu)
    assert ran.returncode == 0, ran.stdout + ran.stderr
