"""How near the compiled model stays to the float one: at its outputs and, to name the poor layers, at every Linear."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mptqc.analysis.observe import fitting_batches, with_outputs
from mptqc.data.samples import Samples
from mptqc.graph.match import find_linears
from mptqc.runtime.evaluate import sqnr_db
from mptqc.runtime.session import create_session, run_arrays

IMAGES = 16
BATCH = 4
POOREST = 3


@dataclass(frozen=True)
class Fidelity:
    """SQNR against the float model, in dB, over `images` calibration images.

    Attributes:
        images: how many were run.
        sqnr_db: of the model's outputs; None if the float outputs are all zero.
        sites: (site, SQNR of the Linear's output), poorest first.
    """

    images: int
    sqnr_db: float | None
    sites: tuple[tuple[str, float], ...]


def measure_fidelity(smoothed: ir.Model, compiled: ir.Model, samples: Samples, seed: int) -> Fidelity:
    """Run the smoothed float model and the compiled one on the same images and compare every Linear's output.

    Args:
        smoothed: the float model right before quantization; its Linears' outputs keep their names in `compiled`.
        compiled: the quantized model.
        samples: calibration images, of which at most `IMAGES` are used.
        seed: of their choice.
    """
    names = {str(linear.output.name): linear.site for linear in find_linears(smoothed)}
    outputs = [str(value.name) for value in smoothed.graph.outputs]
    wanted = list(dict.fromkeys([*outputs, *names]))
    chosen = samples.take(min(IMAGES, samples.count), seed)
    signal, noise = np.zeros(len(wanted)), np.zeros(len(wanted))
    image = str(smoothed.graph.inputs[0].name)
    sessions = [create_session(with_outputs(model, wanted)) for model in (smoothed, compiled)]
    for images in fitting_batches(smoothed, chosen, BATCH):
        exact, found = (run_arrays(session, wanted, {image: images}) for session in sessions)
        for position, (true, value) in enumerate(zip(exact, found, strict=True)):
            signal[position] += np.square(true, dtype=np.float64).sum()
            noise[position] += np.square(true - value, dtype=np.float64).sum()
    per_value = dict(zip(wanted, zip(signal, noise, strict=True), strict=True))
    total = sqnr_db(*np.sum([per_value[name] for name in outputs], axis=0))
    return Fidelity(chosen.count, total, _poorest_first([(site, *per_value[name]) for name, site in names.items()]))


def _poorest_first(sums: Sequence[tuple[str, float, float]]) -> tuple[tuple[str, float], ...]:
    rated = [(site, sqnr_db(signal, noise)) for site, signal, noise in sums]
    return tuple(sorted(((site, rate) for site, rate in rated if rate is not None), key=lambda pair: pair[1]))
