"""The CUDA kernels compile, to the instructions that they are written for. nvcc is enough for that; no GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mptqc.runtime.cuda import find_cuda_library

ROOT = Path(__file__).parents[2]
OPTIONS = ("-std=c++17", "-O3", "-fmad=false", "-ptx", "-arch=compute_80", "-Werror=all-warnings")
COPY = r"cp\.async\.cg\.shared\.global"
LOAD = r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16"
SIGNED = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.s8\.s32"
UNSIGNED = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.u8\.s32"
INSTRUCTIONS = {
    "linear": [COPY, LOAD, SIGNED, r"ld\.shared\.v4\.u32"],
    "attention": [COPY, LOAD, UNSIGNED, r"ld\.shared\.v4\.u32", r"ex2\.approx\.ftz\.f32", r"prmt\.b32"],
    "layer_norm": [r"ld\.global\.v4\.f32", r"st\.global\.v4\.u8|st\.global\.u32", r"shfl\.sync\.bfly\.b32"],
    "patches": [r"ld\.global\.v4\.f32", r"st\.global\.v4\.u8|st\.global\.u32"],
    "device": [],
}


@pytest.mark.parametrize("kernel", INSTRUCTIONS)
def test_a_kernel_compiles_to_the_instructions_it_is_written_for(kernel: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    target = tmp_path / "kernel.ptx"
    source = ROOT / f"kernels/cuda/{kernel}.cu"
    command = [nvcc, *OPTIONS, f"-I{ROOT / 'kernels/include'}", source, "-o", target]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    code = target.read_text(encoding="utf-8")
    missing = [instruction for instruction in INSTRUCTIONS[kernel] if not re.search(instruction, code)]
    assert missing == []


def test_the_library_multiplies_on_tensor_cores() -> None:
    path, tool = find_cuda_library(), shutil.which("cuobjdump")
    if path is None or tool is None:
        pytest.skip("needs the library of CUDA kernels and cuobjdump")
    code = subprocess.run([tool, "--dump-sass", str(path)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"IMMA\.16832\.U8\.S8", code)
    assert re.search(r"IMMA\.16832\.U8\.U8", code)
    assert not re.search(r"\b(LDL|STL)\b", code), "registers went to local memory"
