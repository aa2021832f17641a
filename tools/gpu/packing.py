"""Carrying to a GPU machine without network what it lacks: wheels, in parts that are small enough to travel."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PART_BYTES = 48 * 2**20
"""Few enough that a part and the repository fit in the 64 MiB that some machines take at a time."""
INDEX = "index.json"
WHEELS = (
    "onnxruntime-gpu==1.31.1",
    "onnx-ir==1.1.0",
    "onnxsim==0.8.1",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
)
"""What mptqc needs and an image with torch, onnx and numpy may lack."""


class PackError(Exception):
    """What was packed is not whole."""


def download_wheels(folder: Path, python: str, wheels: Sequence[str] = WHEELS) -> None:
    """Fetch wheels for another Python, without what they need in turn.

    Raises:
        subprocess.CalledProcessError: pip cannot find one.
    """
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + [
        "--platform=manylinux2014_x86_64"
    ]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", *wheels], check=True)


def pack(files: Sequence[Path], folder: Path, *, part_bytes: int = PART_BYTES) -> list[Path]:
    """Cut files into parts of at most `part_bytes`, and write an index with their digests; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    index: dict[str, dict[str, object]] = {}
    for file in files:
        content = file.read_bytes()
        parts = []
        for number, start in enumerate(range(0, len(content), part_bytes)):
            part = folder / f"{file.name}.{number:02d}"
            part.write_bytes(content[start : start + part_bytes])
            parts.append(part.name)
            written.append(part)
        index[file.name] = {"parts": parts, "sha256": hashlib.sha256(content).hexdigest()}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return [*written, folder / INDEX]


def unpack(folder: Path, target: Path) -> tuple[list[Path], list[str]]:
    """Put together the files whose parts are all in `folder`; returns them, and the names of the parts still to come.

    A file that is in `target` already, and whole, needs no parts: they may come a few at a time, over several calls.

    Raises:
        PackError: there is no index, or a file is not what was packed.
    """
    if not (folder / INDEX).is_file():
        raise PackError(f"{folder} has no {INDEX}; make it with --pack, and bring it with the parts")
    target.mkdir(parents=True, exist_ok=True)
    whole, awaited = [], []
    for name, entry in json.loads((folder / INDEX).read_text(encoding="utf-8")).items():
        file = target / name
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]:
            whole.append(file)
            continue
        for part in entry["parts"]:  # those of earlier calls wait in `target`
            arrived = folder / part
            if arrived.is_file():
                (target / part).write_bytes(arrived.read_bytes())
        missing = [part for part in entry["parts"] if not (target / part).is_file()]
        if missing:
            awaited += missing
            continue
        content = b"".join((target / part).read_bytes() for part in entry["parts"])
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise PackError(f"{name} is not what was packed: a part is damaged, or of another pack; bring them again")
        file.write_bytes(content)
        for part in entry["parts"]:
            (target / part).unlink()
        whole.append(file)
    return whole, awaited


def install(wheels: Sequence[Path], site: Path) -> None:
    """Install wheels into a folder of their own, from which PYTHONPATH takes them.

    Raises:
        subprocess.CalledProcessError: pip refuses one.
    """
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", f"--target={site}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *map(str, wheels)], check=True)
