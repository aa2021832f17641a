"""How much memory a model takes once it is loaded and has run.

    python tools/resident_memory.py MODEL THREADS SHAPE

Prints bytes: resident memory after a run, less that before the session was made, each after free memory has been given
back to the system. SHAPE is that of the input, as in 1,3,224,224. In a process of its own: what another model has left
behind would count otherwise.
"""

import ctypes
import gc
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mptqc.runtime.session import create_session

STATUS = Path("/proc/self/status")


def main() -> None:
    """Measure and print."""
    model, threads, shape = sys.argv[1:]
    before = resident_bytes()
    session = create_session(model, threads=int(threads))
    feed = np.zeros([int(size) for size in shape.split(",")], np.float32)
    session.run(None, {session.get_inputs()[0].name: feed})
    print(resident_bytes() - before)


def resident_bytes() -> int:
    """Resident memory of this process, without what is merely not given back yet."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def resident_bytes_of(model: Path, shape: Sequence[int], threads: int = 1) -> int:
    """What main prints."""
    command = [sys.executable, __file__, str(model), str(threads), ",".join(map(str, shape))]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
