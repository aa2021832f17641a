"""Packaging of mptqc; the pass sources live in passes/ and are installed as mptqc.passes."""

import re
from pathlib import Path

from setuptools import find_packages, setup

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
        "dev": ["pytest>=8", "hypothesis>=6", "ruff", "mypy", "matplotlib>=3.9", "transformers>=5", "setuptools>=77"],
    },
    entry_points={"console_scripts": ["mptqc=mptqc.cli.app:main"]},
)
