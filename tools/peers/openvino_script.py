"""Time ONNX models in OpenVINO; run by openvino_times.py with the Python of the environment of openvino.txt.

Reads a JSON object a line and answers each with one:

{"model": path, "precision": "f32" or "bf16", "threads": n, "shape": [..]}   opens a model: {"index": its number}
{"run": number}                                                              runs it once: {"nanoseconds": time}
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import openvino as ov


def main() -> None:
    """Answer until the input ends."""
    core = ov.Core()
    runs: list[Callable[[], int]] = []
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer = {"nanoseconds": runs[request["run"]]()}
        else:
            runs.append(open_model(core, request["model"], request["precision"], request["threads"], request["shape"]))
            answer = {"index": len(runs) - 1}
        print(json.dumps(answer), flush=True)


def open_model(core: ov.Core, path: str, precision: str, threads: int, shape: list[int]) -> Callable[[], int]:
    """Return what runs the model once, on standard normal input, and returns the time.

    With one thread that is the process's CPU time, since OpenVINO computes on a thread of its own; else wall time.
    """
    model = core.read_model(path)
    model.reshape(shape)
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(ov.Tensor(np.random.default_rng(0).standard_normal(shape, dtype=np.float32)))
    now = time.process_time_ns if threads == 1 else time.perf_counter_ns

    def run() -> int:
        start = now()
        request.infer()
        return now() - start

    return run


if __name__ == "__main__":
    main()
