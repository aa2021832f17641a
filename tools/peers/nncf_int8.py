"""The 8-bit models that NNCF makes, to compare with.

NNCF runs nncf_script.py in an environment of its own, by nncf.txt: it needs onnxruntime where ours has onnxruntime-gpu,
which share one package folder and must not both be installed.
"""

import tempfile
from pathlib import Path

import numpy as np

from mptqc.data.samples import Samples
from mptqc.graph.files import write_atomically
from peers.environment import ensure_environment, run

HERE = Path(__file__).parent
REQUIREMENTS, SCRIPT = HERE / "nncf.txt", HERE / "nncf_script.py"
NO_TELEMETRY = {"CI": "true"}  # openvino-telemetry reports nothing, and writes no file, where this is set
READ_BATCH = 16


def write_nncf_int8(
    model: Path, output: Path, samples: Samples, input_name: str, environment: Path, *, smooth_quant: bool = True
) -> None:
    """Write NNCF's post-training int8 QDQ model: for transformers, preset mixed, ranges from all of `samples`.

    Args:
        model: the float ONNX file; takes batches of one image.
        output: the ONNX file to write, which stock ONNX Runtime runs.
        samples: calibration images.
        input_name: name of the model's input.
        environment: folder of the environment; made on first use (some 460 MB), used again later.
        smooth_quant: NNCF's SmoothQuant of MatMul inputs, at its default strength; it is on by default there too.

    Raises:
        PeerError: the environment cannot be made, or NNCF failed.
        DataError: a sample cannot be read.
        OSError: `output` cannot be written.
    """
    python = ensure_environment(environment, REQUIREMENTS)
    with tempfile.TemporaryDirectory() as folder:
        images, quantized = Path(folder) / "images.npy", Path(folder) / "quantized.onnx"
        write_images(samples, images)
        flag = "--smooth-quant" if smooth_quant else "--no-smooth-quant"
        arguments = [str(model), str(images), str(quantized), "--input-name", input_name, flag]
        # -I keeps PYTHONPATH and user packages of this process's environment out of that one.
        run([str(python), "-I", str(SCRIPT), *arguments], f"NNCF cannot quantize {model}", NO_TELEMETRY)
        write_atomically(output, quantized.read_bytes())


def write_images(samples: Samples, path: Path) -> None:
    """Write float32 [N, C, H, W] as .npy, a batch at a time."""
    shape = next(samples.batches(1)).shape[1:]
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(samples.count, *shape))
    start = 0
    for batch in samples.batches(READ_BATCH):
        images[start : start + len(batch)] = batch
        start += len(batch)
    images.flush()
