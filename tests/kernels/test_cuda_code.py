"""The CUDA kernels compile, to the instructions that they are written for. nvcc is enough for that; no GPU."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_kernels import KERNELS, ROOT, build_emulated

OPTIONS = ("-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", f"-I{ROOT / 'kernels/include'}")
ARCHITECTURES = ("80", "90a")
"""The oldest, and the one with code of its own; the others that are built take the code of the oldest."""
HOPPER = "90a"
COPY = r"cp\.async\.cg\.shared\.global"
LOAD = r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16"
SIGNED = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.s8\.u8\.s32"
UNSIGNED = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.u8\.u8\.s32"
PTX = {
    "linear": [COPY, LOAD, SIGNED, r"ld\.shared\.v2\.u32", r"st\.shared\.v2\.u32", r"cvt\.rn\.f16\.f32"],
    "attention": [COPY, LOAD, UNSIGNED, r"ld\.shared\.v4\.u32", r"ex2\.approx\.ftz\.f32", r"prmt\.b32"],
    "layer_norm": [r"ld\.global\.v4\.f32", r"st\.global\.v4\.u8|st\.global\.u32", r"shfl\.sync\.bfly\.b32"],
    "patches": [r"ld\.global\.v4\.f32", r"st\.global\.v4\.u8|st\.global\.u32"],
}
SASS = {
    "linear": [r"IMMA\.16832\.S8\.U8", r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4", r"LDS\.64"],
    "attention": [r"IMMA\.16832\.U8\.U8", r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.M88\.4", r"MUFU\.EX2"],
    "layer_norm": [r"SHFL\.BFLY"],
    "patches": [r"LDG\.E\.128"],
}
OF_HOPPER = {
    "linear": [r"IGMMA\.64x96x32\.S8\.U8", r"IGMMA\.64x32x32\.S8\.U8", r"UTMALDG\.3D", "USETMAXREG", "ACQBULK"],
    "attention": ["ACQBULK"],
    "layer_norm": ["ACQBULK"],
    "patches": ["ACQBULK"],
}
"""Products of four warps, boxes, registers that a group leaves to others; every kernel waits for its inputs itself."""
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LARGE_TILE = "LinearTileILi128ELi128"
MOST_SPILLED_BYTES = 32
"""What one attention keeps in local memory on some architectures, a few numbers of a block; an array would be more."""
PRODUCTS_OF_STAGE, MOST_INSTRUCTIONS_OF_STAGE = 64, 240
"""Of a warp in the Linear's large tile. A product takes 6 to 8 cycles, and a scheduler issues one instruction in each:
tensor cores wait for it once there are more than some 400."""


def compiler() -> str:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: CUDA's compiler is not here")
    return nvcc


def disassembler() -> str:
    """nvdisasm, of CUDA or of its wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    found = shutil.which("nvdisasm") or next(
        (file for folder in folders for file in folder.glob("*/bin/nvdisasm")), None
    )
    if found is None:
        pytest.skip("compiled, but not disassembled: neither CUDA's nvdisasm nor its wheel is here")
    return str(found)


def source(kernel: str) -> Path:
    return ROOT / f"kernels/cuda/{kernel}.cu"


def test_every_kernel_is_looked_at() -> None:
    assert [path.stem for path in KERNELS] == sorted(PTX) == sorted(SASS)


@pytest.mark.parametrize("kernel", PTX)
def test_a_kernel_is_written_in_the_instructions_that_are_meant(kernel: str, tmp_path: Path) -> None:
    target = tmp_path / "kernel.ptx"
    subprocess.run([compiler(), *OPTIONS, "-ptx", "-arch=compute_80", source(kernel), "-o", target], check=True)
    code = target.read_text(encoding="utf-8")
    assert [instruction for instruction in PTX[kernel] if not re.search(instruction, code)] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_and_stay_in_registers(architecture: str, tmp_path: Path) -> None:
    command = [compiler(), *OPTIONS, "-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v"]

    def compile_kernel(kernel: str) -> subprocess.CompletedProcess[str]:
        own = [*command, source(kernel), "-o", tmp_path / kernel]
        return subprocess.run(own, capture_output=True, text=True, check=False)

    kernels = sorted((*PTX, "device"))  # the longest first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(compile_kernel, kernels))
    for kernel, ran in zip(kernels, compiled, strict=True):
        assert ran.returncode == 0, ran.stderr
        assert "C75" not in ran.stderr, "products of four warps wait for each other"
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", ran.stderr)
        assert all(int(spill) <= MOST_SPILLED_BYTES for spill in spills), ran.stderr
        assert spills or kernel == "device"
    for kernel, wanted in SASS.items():
        code = subprocess.run(
            [disassembler(), "-c", tmp_path / kernel], capture_output=True, text=True, check=True
        ).stdout
        wanted = wanted + OF_HOPPER[kernel] * (architecture == HOPPER)
        assert [instruction for instruction in wanted if not re.search(instruction, code)] == []
        assert len(re.findall(r"\b(?:LDL|STL)\b", code)) <= MOST_SPILLED_BYTES, "registers went to local memory"
        if kernel == "linear":
            assert instructions_of_a_stage(code) < MOST_INSTRUCTIONS_OF_STAGE


def instructions_of_a_stage(code: str) -> int:
    """How long the loop around the products is, in the kernel of the large tile."""
    kernel = next(part for part in re.split(r"\n\s*\.section\s+\.text\.", code) if LARGE_TILE in part.split("\n")[0])
    labels = {match[1]: match.start() for match in re.finditer(r"\n\s*(\.L_x_\d+):", kernel)}
    loops = [
        INSTRUCTION.findall(kernel[labels[jump[1]] : jump.start()])
        for jump in re.finditer(r"BRA[^;]*`\((\.L_x_\d+)\)", kernel)
        if labels[jump[1]] < jump.start()
    ]
    around = [loop for loop in loops if sum(name.startswith("IMMA") for name in loop) == PRODUCTS_OF_STAGE]
    assert len(around) == 1
    return len(around[0])


def test_a_linear_hits_every_bank_of_shared_memory_once(tmp_path: Path) -> None:
    try:
        build_emulated(tmp_path / "banks.so", [ROOT / "tests/kernels/emulated/banks.cpp"])
    except FileNotFoundError as error:
        pytest.skip(str(error))
    library = ctypes.CDLL(str(tmp_path / "banks.so"))
    assert library.worst_of_columns() == 32  # without that, a count that sees nothing would look like a good layout
    assert library.worst_of_large_tile() == 1
    assert library.worst_of_small_tile() == 1
    assert library.worst_of_groups() == 1
