"""Packaging of mptqc; the pass sources live in passes/ and are installed as mptqc.passes.

The kernel library is built from kernels/ if a C++17 compiler is there, and lies beside mptqc/runtime/library.py.
Without one the install succeeds, with a warning. That of the CUDA kernels is built only if MPTQC_CUDA=1 asks for it, as
it takes minutes, by the nvcc of CUDA 13 (NVCC names it, else the one on PATH); MPTQC_CUDA_ARCHITECTURES limits it to
some architectures, as in 90,120.
"""

import os
import re
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "mptqc/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)

HAS_GPU_WHEEL = (
    "(sys_platform == 'linux' and platform_machine == 'x86_64')"
    " or (sys_platform == 'win32' and platform_machine == 'AMD64')"
)
NO_GPU_WHEEL = (
    "(sys_platform != 'linux' or platform_machine != 'x86_64')"
    " and (sys_platform != 'win32' or platform_machine != 'AMD64')"
)

KERNELS = "mptqc.runtime.libmptqc_kernels"
KERNEL_SOURCES = [*HERE.glob("kernels/cpu/*.cpp"), *HERE.glob("kernels/ort/*.cpp"), *HERE.glob("kernels/ort/cpu/*.cpp")]
CUDA_KERNELS = "mptqc.runtime.libmptqc_cuda"
CUDA_SOURCES = [
    *HERE.glob("kernels/cuda/*.cu"),
    *HERE.glob("kernels/ort/*.cpp"),
    *HERE.glob("kernels/ort/cuda/*.cpp"),
    HERE / "kernels/cpu/arguments.cpp",
]
CUDA_ARCHITECTURES = "80,86,89,90,100,120"
HOPPER = "90a"  # with products of four warps, which no other architecture has
CUDA_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-fmad=false",  # as -ffp-contract below
    "--cudart=static",
    "-shared",
    "--threads=0",  # architectures side by side
    "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off",
]
KERNEL_HEADERS = [*HERE.glob("kernels/**/*.h")]
COMPILE_OPTIONS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # each rounding is part of what an operator means: a fused multiply-add is written out
    "-Wno-uninitialized",  # GCC 12 warns of its own AVX-512 header
    "-Wno-maybe-uninitialized",
]


def wants_cuda():
    """Whether the library of CUDA kernels is asked for."""
    return os.environ.get("MPTQC_CUDA", "0") == "1"


def relative(paths):
    """Paths from this folder, as setuptools wants them, in one order everywhere."""
    return sorted(path.relative_to(HERE).as_posix() for path in paths)


class BuildKernels(build_ext):
    """Build plain shared libraries."""

    def build_extension(self, ext):
        """Build the CUDA kernels with nvcc, all else as usual."""
        if ext.name != CUDA_KERNELS:
            super().build_extension(ext)
            return
        nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
        if nvcc is None:
            raise SystemExit("MPTQC_CUDA=1, but there is no nvcc: install CUDA 13, or let NVCC name its compiler.")
        names = os.environ.get("MPTQC_CUDA_ARCHITECTURES", CUDA_ARCHITECTURES).split(",")
        own = [HOPPER if name == "90" else name for name in names]
        codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in own]
        codes.append(f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}")  # newer ones compile it at start
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        include = [f"-I{folder}" for folder in ext.include_dirs]
        self.spawn([nvcc, *ext.extra_compile_args, *codes, *include, *ext.sources, "-o", str(target)])

    def get_ext_filename(self, fullname):
        """Leave Python's version out of the name."""
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext):
        """Leave out the PyInit function that an extension module would have."""
        return ext.export_symbols


class PlatformWheel(bdist_wheel):
    """A wheel for this platform."""

    def get_tag(self):
        """Any Python 3 will do: the library is plain C."""
        return ("py3", "none", super().get_tag()[2])


CUDA_EXTENSION = Extension(
    CUDA_KERNELS,
    sources=relative(CUDA_SOURCES),
    depends=relative(KERNEL_HEADERS),
    include_dirs=["kernels/include", "kernels/ort/cuda"],
    extra_compile_args=CUDA_OPTIONS,
)


setup(
    name="mptqc",
    version=VERSION[1],
    description="Compile float ONNX vision transformers to low-bit integer ONNX models for ONNX Runtime",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["mptqc", "mptqc.*"], exclude=["mptqc.passes*"]), "mptqc.passes"],
    package_dir={"mptqc.passes": "passes"},
    package_data={"mptqc": ["py.typed"]},
    include_package_data=False,
    ext_modules=[
        Extension(
            KERNELS,
            sources=relative(KERNEL_SOURCES),
            depends=relative(KERNEL_HEADERS),
            include_dirs=["kernels/include", "kernels/ort/cpu"],
            extra_compile_args=COMPILE_OPTIONS,
            language="c++",
            optional=True,
        ),
        *([CUDA_EXTENSION] if wants_cuda() else []),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    install_requires=[
        "numpy>=2.0",
        "onnx>=1.19",
        "onnx-ir>=1.1",
        "onnxsim>=0.8",
        f"onnxruntime-gpu>=1.24; {HAS_GPU_WHEEL}",
        f"onnxruntime>=1.24; {NO_GPU_WHEEL}",
        "pydantic>=2.10",
        "typer>=0.15",
        "rich>=13",
        "pillow>=11",
        "safetensors>=0.5",
    ],
    extras_require={
        "export": ["torch>=2.6", "onnxscript>=0.5", "timm>=1.0"],
        "exact": ["scipy>=1.11"],
        "dask": ["distributed>=2024.8"],
        "plot": ["matplotlib>=3.9"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6",
            "ruff",
            "mypy",
            "matplotlib>=3.9",
            "transformers>=5",
            "setuptools>=77",
            "scipy>=1.11",
            "distributed>=2024.8",
            "nvidia-cuda-nvdisasm>=13; sys_platform == 'linux' and platform_machine == 'x86_64'",
        ],
    },
    entry_points={"console_scripts": ["mptqc=mptqc.cli.app:main"]},
)
