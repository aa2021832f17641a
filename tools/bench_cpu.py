"""Time vision transformers on the CPU in every form that runs in ONNX Runtime; print Markdown tables.

    python tools/bench_cpu.py [--models vit-s,swin-t] [--batches 1,8] [--threads 1,2] [--openvino] [--output bench-cpu]

Weights are random and nothing is searched: how fast a model runs depends on its shape. Needs the `export` extra, for
the models' graphs. All forms of a model take turns; a ratio is the median over rounds of (float's time / the form's
own). With --openvino, OpenVINO runs the float model and NNCF's int8 model too, in a process of its own that is idle
while it is not its turn; it and NNCF are installed into environments of their own.

Models are kept in the output folder and made only where they are not there. So are measurements, in results.json: what
is in there is printed, not measured again, so that the grid can be run in pieces. Remove the file to start anew.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from native_products import PEAK_ISAS, Product, native_products, peak_meter
from peers import OpenVino, write_dynamic_int8, write_nncf_int8, write_static_int8
from resident_memory import resident_bytes_of

import mptqc
from mptqc import api
from mptqc.cli.progress import progress
from mptqc.data.load import load_samples
from mptqc.data.samples import Samples
from mptqc.errors import MptqcError
from mptqc.export.timm_models import export_timm
from mptqc.recipe import Target
from mptqc.runtime.benchmark import Clock, TimedRun, interleaved, timed_run
from mptqc.runtime.library import chosen_isa, find_library, load_library
from mptqc.runtime.machine import core_count, cpu_features, cpu_info, processor_name
from mptqc.runtime.session import create_session

MODELS: Mapping[str, str] = MappingProxyType(
    {
        "vit-s": "vit_small_patch16_224",
        "vit-b": "vit_base_patch16_224",
        "deit-t": "deit_tiny_patch16_224",
        "swin-t": "swin_tiny_patch4_window7_224",
    }
)
FLOAT, NATIVE, NNCF = "float32", "cpu-native", "NNCF"
OUR_FORMS: Mapping[str, tuple[str, Target]] = MappingProxyType(
    {
        "portable": ("w8a8", Target.PORTABLE),
        "cpu": ("w8a8", Target.CPU),
        NATIVE: ("w8a8", Target.CPU_NATIVE),
        "cpu-native W6A8": ("w6a8", Target.CPU_NATIVE),
        "portable W4A4": ("w4a4", Target.PORTABLE),
        "cpu-native W4A4": ("w4a4", Target.CPU_NATIVE),
    }
)
"""What mptqc compiles them with."""
FORMS = (FLOAT, "ORT static", "ORT dynamic", *OUR_FORMS)
OPENVINO_FORMS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"OpenVINO float32": (FLOAT, "f32"), "OpenVINO bf16": (FLOAT, "bf16"), "OpenVINO NNCF int8": (NNCF, "f32")}
)
"""The file that OpenVINO runs, and the precision of what is not quantized."""
IMAGE = (3, 224, 224)
CALIBRATION_IMAGES = 4
PROFILED_RUNS = 50
QUICK = MappingProxyType(
    {
        "samples": CALIBRATION_IMAGES,
        "range_method": "min-max",
        "smoothing": False,
        "attention_folds": False,
        "compensation": False,
    }
)


@dataclass(frozen=True)
class Row:
    """One form's figures. Times are of one run, `speedup` is against float32 in ONNX Runtime."""

    form: str
    megabytes: float
    median_ms: float
    p10_ms: float
    p90_ms: float
    speedup: float


def main() -> None:
    """Make what is missing, measure what is missing, print all."""
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    store = Store(arguments.output / "results.json")
    for model in arguments.models:
        files = {form: arguments.output / f"{model}.{form.replace(' ', '-').lower()}.onnx" for form in FORMS}
        make_missing(files, model)
        if arguments.openvino:
            files[NNCF] = make_nncf(files[FLOAT], arguments.output)
        for batch in arguments.batches:
            for threads in arguments.threads:
                key = f"{model}, batch {batch}, {threads} thread(s)" + (", with OpenVINO" if arguments.openvino else "")
                if key not in store:
                    store[key] = measure(key, files, batch, threads, arguments.seconds, arguments.output)
                print(as_markdown(key, store[key]), flush=True)
        key = f"{model}, memory"
        if key not in store:
            store[key] = {form: resident_bytes_of(files[form], (1, *IMAGE)) for form in FORMS}
        print(memory_as_markdown(model, store[key], weight_count(files[FLOAT])), flush=True)
        key = f"{model}, operators"
        if key not in store and used_isa() in PEAK_ISAS:
            store[key] = measure_products(files[NATIVE], used_isa(), arguments.output)
        if key in store:
            products = [Product(**product) for product in store[key]["products"]]
            print(products_as_markdown(model, products, store[key]["peak"]), flush=True)
    print(conditions())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of_models, default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each form, and at least 10 rounds")
    parser.add_argument("--openvino", action="store_true", help="OpenVINO and NNCF too; downloads some 700 MB once")
    parser.add_argument("--output", type=Path, default=Path("bench-cpu"))
    return parser.parse_args()


def names_of_models(text: str) -> list[str]:
    """Names of MODELS, separated by commas."""
    found = text.split(",")
    unknown = [name for name in found if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; the models are {', '.join(MODELS)}")
    return found


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


class Store:
    """Measurements by name, in a JSON file that is written at each new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def __getitem__(self, key: str) -> Any:
        return self._content[key]

    def __setitem__(self, key: str, value: object) -> None:
        self._content[key] = value
        self._path.write_text(json.dumps(self._content, indent=1) + "\n", encoding="utf-8")


def make_missing(files: Mapping[str, Path], model: str) -> None:
    """Write each form that is not there: the float model, ONNX Runtime's own two, and ours."""
    original = files[FLOAT]
    if not original.is_file():
        export_timm(MODELS[model], original, pretrained=False)
    if not files["ORT static"].is_file():
        write_static_int8(original, files["ORT static"], calibration(original), "images")
    if not files["ORT dynamic"].is_file():
        write_dynamic_int8(original, files["ORT dynamic"])
    for form, (preset, target) in OUR_FORMS.items():
        if not files[form].is_file():
            portable = compiled(original, preset)
            if target is Target.PORTABLE:
                shutil.copyfile(portable, files[form])
            else:
                api.lower(portable, target=target).save(files[form])


def compiled(original: Path, preset: str) -> Path:
    """The model compiled by a preset, to be lowered to any target; made if it is not there."""
    portable = original.with_name(original.name.replace(".float32.", f".{preset}."))
    if not portable.is_file():
        calibration(original)
        mptqc.compile(original, images_of(original), preset=preset, options=dict(QUICK)).save(portable)
    return portable


def make_nncf(original: Path, folder: Path) -> Path:
    """Write NNCF's int8 model, if it is not there."""
    quantized = original.with_name(original.name.replace(".float32.", ".nncf."))
    if not quantized.is_file():
        write_nncf_int8(original, quantized, calibration(original), "images", folder / "environments/nncf")
    return quantized


def images_of(original: Path) -> Path:
    """Where the model's calibration images are."""
    return original.with_suffix(".npz")


def calibration(original: Path) -> Samples:
    """The model's calibration images: noise, written beside it if it is not there."""
    images = images_of(original)
    if not images.is_file():
        size = (CALIBRATION_IMAGES, *IMAGE)
        np.savez(images, images=np.random.default_rng(0).standard_normal(size, dtype=np.float32))
    return load_samples(images, input_name="images", input_shape=(None, *IMAGE), preprocessing=None)


def measure(
    title: str, files: Mapping[str, Path], batch: int, threads: int, seconds: float, folder: Path
) -> dict[str, object]:
    """Time all forms, in turns; OpenVINO's too if there is NNCF's file."""
    shape = (batch, *IMAGE)
    clock: Clock = "cpu" if threads == 1 else "wall"
    feed = {"images": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
    paths = {form: files[form] for form in FORMS}
    with ExitStack() as stack:
        runs = [timed_run(create_session(path, threads=threads), feed, clock) for path in paths.values()]
        if NNCF in files:
            peer = stack.enter_context(OpenVino(folder / "environments/openvino"))
            for form, path, run in openvino_runs(peer, files, shape, threads):
                paths[form] = path
                runs.append(run)
        report = stack.enter_context(progress(title))
        milliseconds = interleaved(runs, seconds, progress=report)
    rows = [
        Row(
            form,
            path.stat().st_size / 1e6,
            *(float(np.percentile(times, percent)) for percent in (50, 10, 90)),
            float(np.median(milliseconds[:, 0] / times)),
        )
        for (form, path), times in zip(paths.items(), milliseconds.T, strict=True)
    ]
    return {"clock": clock, "rounds": len(milliseconds), "rows": [asdict(row) for row in rows]}


def measure_products(native: Path, isa: str, folder: Path) -> dict[str, object]:
    """Time the operators of a native model, and the processor's peak in between."""
    meter, peaks = peak_meter(isa, folder), []
    products = native_products(native, (1, *IMAGE), PROFILED_RUNS, lambda: peaks.append(meter()))
    return {"peak": max(peaks), "products": [asdict(product) for product in products]}


def openvino_runs(
    peer: OpenVino, files: Mapping[str, Path], shape: Sequence[int], threads: int
) -> Iterator[tuple[str, Path, TimedRun]]:
    """OpenVINO's forms that this processor has the instructions for: name, file, run."""
    features = cpu_features(cpu_info()) or {}
    for form, (file, precision) in OPENVINO_FORMS.items():
        if precision != "bf16" or features.get("amx_bf16"):
            yield form, files[file], peer.open_model(files[file], shape, threads=threads, precision=precision)


def weight_count(path: Path) -> int:
    """How many numbers the weights of a model are."""
    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


def as_markdown(title: str, cell: Mapping[str, Any]) -> str:
    """One table of times: a line a form."""
    clock = "CPU time" if cell["clock"] == "cpu" else "wall time"
    lines = [
        f"\n{title}: {cell['rounds']} rounds, {clock}\n",
        "| form | MB | median ms | p10..p90 | × float32 |",
        "|--|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row.form} | {row.megabytes:.1f} | {row.median_ms:.2f} | {row.p10_ms:.2f}..{row.p90_ms:.2f} "
        f"| {row.speedup:.2f} |"
        for row in (Row(**row) for row in cell["rows"])
    ]
    return "\n".join(lines)


def memory_as_markdown(model: str, resident: Mapping[str, int], weights: int) -> str:
    """One table of memory: a line a form."""
    lines = [
        f"\n{model}, resident memory after a run of one image; {weights / 1e6:.1f} million weights\n",
        "| form | MB | bytes a weight |",
        "|--|--:|--:|",
    ]
    lines += [f"| {form} | {size / 1e6:.1f} | {size / weights:.2f} |" for form, size in resident.items()]
    return "\n".join(lines)


def products_as_markdown(model: str, products: Sequence[Product], peak: float) -> str:
    """One table of a native model's operators, `peak` being the processor's operations a second on one core."""
    lines = [
        f"\n{model}, {NATIVE}, batch 1, 1 thread: shortest time of each operator in {PROFILED_RUNS} runs; measured "
        f"peak {peak / 1e9:.0f} GOP/s\n",
        "| operator | size | count | ms | GOP/s | of the peak |",
        "|--|--|--:|--:|--:|--:|",
    ]
    for product in products:
        rate = product.operations / product.milliseconds * 1e3
        speed = f"{rate / 1e9:.0f} | {rate / peak:.0%}" if product.operations else "– | –"
        lines.append(
            f"| {product.operator} | {product.shape} | {product.count} | {product.milliseconds:.2f} | {speed} |"
        )
    return "\n".join(lines)


def used_isa() -> str:
    """The instruction set of the kernel library; "none" without the library."""
    library = find_library()
    return "none" if library is None else chosen_isa(load_library(library))


def conditions() -> str:
    """What the times hold for."""
    return (
        f"\n{processor_name(cpu_info())}, {core_count()} cores, onnxruntime {onnxruntime.__version__}, kernel library: "
        f"{used_isa()}"
    )


if __name__ == "__main__":
    try:
        main()
    except MptqcError as error:
        sys.exit(f"error: {error}")
