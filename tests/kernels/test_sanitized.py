"""The kernels under the address and undefined-behaviour sanitizers."""

import subprocess
from pathlib import Path

from kernel_builds import HERE, build_with_emulation

SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    program = build_with_emulation(tmp_path / "sanitized", ["cpu"], [*SANITIZERS, HERE / "sanitized.cpp"])
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
