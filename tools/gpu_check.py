#!/usr/bin/env python3
"""Check and measure mptqc on a GPU, in one command; write docs/gpu/<gpu>-<date>.json and a Markdown table beside it.

    python tools/gpu_check.py [--stages build,kernels,products,chain,e2e,bench] [--minutes 9] [--models …] [--batches …]

Needs CUDA 13 with nvcc, onnxruntime-gpu and what mptqc needs; torch and timm for two of the models and the reference.
Each stage stands by itself: one that fails, or lacks something, says so and the next one goes on. Figures are written
as they come. For a machine without network:

    python tools/gpu_check.py --pack .gpu-pack            where there is a network
    python tools/gpu_check.py --unpack .gpu-pack …        there; parts may come a few at a time, in several calls

--rehearse runs all of it on an emulated GPU (tests/fake_gpu.py), with a tiny model; needs g++.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from gpu.packing import PackError, download_wheels, install, pack, unpack
from gpu.targets import targets

STAGE_NAMES = ("build", "kernels", "products", "chain", "e2e", "bench")
MODELS, BATCHES = "vit-s,vit-b,deit-b,swin-t", "1,8,64,256"
SITE = Path(tempfile.gettempdir()) / "mptqc-gpu-site"
RESULTS = Path("docs/gpu")
MOST_CHARACTERS = 400
"""Of an error in the results."""
INSTALLED = "MPTQC_GPU_SITE"
"""Set for the process that sees the unpacked wheels."""


def main() -> None:
    """Pack, or unpack and check."""
    arguments = parse_arguments()
    if arguments.pack is not None:
        write_pack(arguments.pack, arguments.python)
        return
    if arguments.unpack is not None and INSTALLED not in os.environ:
        unpack_and_restart(arguments.unpack)
    check(arguments)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=stages_of, default=list(STAGE_NAMES), help=", ".join(STAGE_NAMES))
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing new is begun")
    parser.add_argument("--models", default=None, help=f"(default: {MODELS})")
    parser.add_argument("--batches", default=None, help=f"(default: {BATCHES})")
    parser.add_argument("--forms", default=None, help="what is timed, in this order; semicolons between (default: all)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure of the benchmark")
    parser.add_argument("--work", type=Path, default=Path("gpu-check"), help="folder of the models")
    parser.add_argument(
        "--output", type=Path, help=f"folder of the results (default: {RESULTS}, of a rehearsal: --work)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on an emulated GPU, with a tiny model")
    parser.add_argument("--pack", type=Path, help="only write the parts that --unpack takes to this folder")
    parser.add_argument("--unpack", type=Path, help="install what the parts in this folder hold first")
    parser.add_argument("--python", default="3.12", help="version of the Python that unpacks")
    return parser.parse_args()


def stages_of(text: str) -> list[str]:
    """Names of stages, separated by commas."""
    found = text.split(",")
    unknown = [name for name in found if name not in STAGE_NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; the stages are {', '.join(STAGE_NAMES)}")
    return found


def write_pack(folder: Path, python: str) -> None:
    """Fetch the wheels and cut them into parts."""
    wheels = folder / "wheels"
    download_wheels(wheels, python)
    for part in pack(sorted(wheels.glob("*.whl")), folder / "parts"):
        print(f"{part.stat().st_size / 2**20:6.1f} MiB  {part}")


def unpack_and_restart(folder: Path) -> NoReturn:
    """Install what is whole and, once all is, start this program again with it."""
    try:
        whole, awaited = unpack(folder, SITE.with_name(f"{SITE.name}-wheels"))
    except PackError as error:
        sys.exit(f"gpu_check: {error}")
    if awaited:
        print(f"{len(whole)} files are whole; still to come: {', '.join(awaited)}")
        sys.exit()
    if not SITE.is_dir():
        install(whole, SITE)
    path = os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")])
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONPATH": path, INSTALLED: str(SITE)})


def check(arguments: argparse.Namespace) -> None:
    """Run the stages and write what they find."""
    root = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(root), str(root / "tests")]  # mptqc from the source tree, and the kernels' callers
    preload_torch()
    try:
        from gpu.stages import STAGES, TIMED_FORMS, Missing, Settings
    except ImportError as error:
        sys.exit(
            f"gpu_check: {error}. Install mptqc's requirements here (pip install -e .), or bring them with --pack."
        )
    forms = tuple(form.strip() for form in arguments.forms.split(";")) if arguments.forms else TIMED_FORMS
    if unknown := [form for form in forms if form not in TIMED_FORMS]:
        sys.exit(f"gpu_check: no form is called {unknown[0]}; there are {'; '.join(TIMED_FORMS)}")
    settings = Settings(
        folder=arguments.work,
        models=tuple((arguments.models or ("tiny" if arguments.rehearse else MODELS)).split(",")),
        batches=tuple(
            int(size) for size in (arguments.batches or ("1,2" if arguments.rehearse else BATCHES)).split(",")
        ),
        forms=forms,
        seconds=arguments.seconds,
        deadline=time.monotonic() + 60 * arguments.minutes,
        rehearse=arguments.rehearse,
    )
    with contextlib.ExitStack() as stack:
        if arguments.rehearse:
            from fake_gpu import fake_gpu

            stack.enter_context(fake_gpu(arguments.work / "libmptqc_emulated.so"))
        run_stages(arguments, settings, STAGES, Missing)


def run_stages(
    arguments: argparse.Namespace,
    settings: Any,
    stages: Mapping[str, Callable[[Any, Callable[[Any], None]], None]],
    missing: type[Exception],
) -> None:
    """Run the stages asked for, and write what each finds as it comes."""
    machine = describe_machine()
    if arguments.rehearse:
        machine["gpu"] = "rehearsal"
    folder = arguments.output or (arguments.work if arguments.rehearse else RESULTS)
    path = folder / f"{file_name(machine['gpu'])}-{datetime.date.today()}.json"
    results = {"machine": machine, "stages": earlier(path)}
    for name in arguments.stages:
        entry: dict[str, Any] = {"outcome": "under way", "found": []}
        results["stages"][name] = entry

        def report(found: Any, entry: dict[str, Any] = entry, name: str = name) -> None:
            entry["found"].append(found)
            write(path, results)
            print(f"{name}: {json.dumps(found, ensure_ascii=False)}", flush=True)

        try:
            stages[name](settings, report)
            entry["outcome"] = "done"
        except missing as error:
            entry["outcome"] = f"not whole: {error}"
        except Exception as error:  # what one stage does wrong must not keep the others from running
            entry["outcome"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:MOST_CHARACTERS]}"
            print(error, file=sys.stderr)
        print(f"{name}: {entry['outcome']}", flush=True)
        write(path, results)
    print(f"wrote {path} and {path.with_suffix('.md')}")


def preload_torch() -> None:
    """Let torch load CUDA and cuDNN, where it is: onnxruntime-gpu finds what is loaded already."""
    try:
        import torch  # noqa: F401 - for its libraries
    except ImportError:
        print("torch is not here: CUDA's libraries must be on the loader's path for onnxruntime-gpu")


def describe_machine() -> dict[str, str]:
    """What the figures hold for."""
    from importlib.metadata import PackageNotFoundError, version

    gpus = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    gpu, driver = gpus[0].split(", ") if gpus else ("no GPU", "none")
    found = {"gpu": gpu, "driver": driver}
    found["nvcc"] = (re.findall(r"release ([\d.]+)", output_of("nvcc", "--version")) or ["none"])[0]
    for package in ("onnxruntime-gpu", "onnxruntime", "torch", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def output_of(*command: str) -> str:
    """What a program prints; nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def file_name(gpu: str) -> str:
    """A GPU's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def earlier(path: Path) -> dict[str, Any]:
    """Stages that ran before on the same day, in another call."""
    if not path.is_file():
        return {}
    stages: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return stages


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the figures, and the same as tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(as_markdown(results), encoding="utf-8")


def as_markdown(results: dict[str, Any]) -> str:
    """One table a stage; the benchmark's has a column a batch."""
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if name != "gpu")
    found = {name: stage["found"] for name, stage in results["stages"].items()}
    lines = [f"# {results['machine']['gpu']}", "", machine, "", "## Targets", ""]
    lines += table(targets(found.get("bench", []), found.get("products", [])))
    for name, stage in results["stages"].items():
        lines += ["", f"## {name}: {stage['outcome']}", ""]
        lines += table(stage["found"] if name != "bench" else by_batch(stage["found"]))
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table; none without rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return []
    lines = [f"| {' | '.join(columns)} |", f"|{'--|' * len(columns)}"]
    return lines + [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in rows]


def cell(value: Any) -> str:
    """A cell's text; empty for what is not known."""
    return "" if value is None else str(value)


def by_batch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one figure each, median milliseconds, as rows of one form each."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault((row["model"], row["form"]), {"model": row["model"], "form": row["form"]})
        value = row.get("failed") or row.get("left out") or f"{row['median_ms']:.3f} ms"
        line[f"batch {row['batch']}"] = value
    return list(table.values())


if __name__ == "__main__":
    main()
