"""Files that are whole or not there."""

import os
from collections.abc import Mapping
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside and rename, so that a reader never sees half a file.

    Raises:
        OSError: the folder is missing or not writable, or a folder has this name.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write all files beside their places, then rename each, in order; what cannot be written changes nothing.

    Raises:
        OSError: a folder is missing or not writable, or a folder has the name of a file.
    """
    beside = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in contents}
    try:
        for path, content in contents.items():
            beside[path].write_bytes(content)
        for path in contents:
            beside[path].replace(path)
    finally:
        for partial in beside.values():
            partial.unlink(missing_ok=True)
