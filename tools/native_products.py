"""How close the operators of a native model come to the processor's peak: their times in ONNX Runtime, by shape."""

import json
import math
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mptqc.errors import MptqcError
from mptqc.runtime.session import create_session

PEAK_SOURCE = Path(__file__).with_name("integer_peak.cpp")
PEAK_ISAS = ("avx512_vnni", "amx_int8")
LINEARS, ATTENTIONS = ("Linear", "LinearQuantize"), ("Attention", "AttentionQuantize")
KERNEL_TIME = "_kernel_time"  # how ONNX Runtime ends the name of an operator's own event


class PeakError(MptqcError):
    """The processor's peak cannot be measured here."""


@dataclass(frozen=True)
class Product:
    """Operators of one type and one shape in a run of a model.

    `milliseconds` is the sum over them of the shortest time that each took in any run; `operations` counts integer
    multiplications and additions of all of them, 0 for an operator without a product.
    """

    operator: str
    shape: str
    count: int
    milliseconds: float
    operations: int


def native_products(
    model: Path, shape: Iterable[int], runs: int, between_runs: Callable[[], None] = lambda: None
) -> list[Product]:
    """Run a native model on one thread, and return its operators, those that take longest first."""
    with tempfile.TemporaryDirectory(prefix="mptqc-") as folder:
        session = create_session(model, threads=1, profile_prefix=Path(folder) / "profile")
        feed = np.random.default_rng(0).standard_normal(tuple(shape), dtype=np.float32)
        for _ in range(runs):
            session.run(None, {session.get_inputs()[0].name: feed})
            between_runs()
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return products_of(events)


def products_of(events: Iterable[Mapping[str, Any]]) -> list[Product]:
    """Gather the events of ONNX Runtime's profile by operator and shape."""
    shortest: dict[str, float] = defaultdict(lambda: math.inf)
    kinds: dict[str, tuple[str, str, int]] = {}
    for event in events:
        name = str(event["name"])
        if not name.endswith(KERNEL_TIME):
            continue
        arguments = event["args"]
        inputs = [tuple(dims) for kind in arguments["input_type_shape"] for dims in kind.values()]
        outputs = [tuple(dims) for kind in arguments["output_type_shape"] for dims in kind.values()]
        shortest[name] = min(shortest[name], event["dur"] / 1000)
        kinds[name] = (arguments["op_name"], *size_of(arguments["op_name"], inputs, outputs))
    times: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for name, kind in kinds.items():
        times[kind].append(shortest[name])
    found = [
        Product(operator, shape, len(each), sum(each), operations * len(each))
        for (operator, shape, operations), each in times.items()
    ]
    return sorted(found, key=lambda product: -product.milliseconds)


def size_of(operator: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]]) -> tuple[str, int]:
    """How a table names the operator's size, and how many integer operations its products take."""
    if operator in LINEARS:
        *rows, width = inputs[0]
        outer = outputs[0][-1]
        return f"{math.prod(rows)} × {width} × {outer}", 2 * math.prod(rows) * width * outer
    if operator in ATTENTIONS:
        (batch, rows, width), (_, columns, _), (_, _, value_width) = inputs[:3]
        return f"{batch} × {rows} × {columns} × {width}", 2 * batch * rows * columns * (width + value_width)
    return " × ".join(map(str, outputs[0])) if outputs else "", 0


def peak_meter(isa: str, folder: Path) -> Callable[[], float]:
    """Build the program of integer_peak.cpp in `folder`; return what runs it: integer operations a second of one core.

    It takes a moment. The most of many measurements is the processor's peak: others may use the core at times.

    Args:
        isa: "avx512_vnni" or "amx_int8".

    Raises:
        PeakError: another instruction set, or there is no g++.
    """
    compiler = shutil.which("g++")
    if compiler is None or isa not in PEAK_ISAS:
        raise PeakError(f"the peak of {isa} is not measured here: it takes g++, and AVX512-VNNI or AMX.")
    program = folder / "integer_peak"
    subprocess.run([compiler, "-O2", "-std=c++17", str(PEAK_SOURCE), "-o", str(program)], check=True)
    return lambda: 1e9 * float(subprocess.run([program, isa], stdout=subprocess.PIPE, text=True, check=True).stdout)
