"""Times of models in OpenVINO, to compare with.

OpenVINO runs openvino_script.py in an environment of its own, by openvino.txt, in one process for all models: it is
told when to run which, so that its models take turns with those of this process, and waits in between.
"""

import contextlib
import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from peers.environment import PeerError, ensure_environment

HERE = Path(__file__).parent
REQUIREMENTS, SCRIPT = HERE / "openvino.txt", HERE / "openvino_script.py"


class OpenVino:
    """The process; a context manager, which ends it.

    Args:
        environment: folder of the environment; made on first use (some 250 MB), used again later.

    Raises:
        PeerError: the environment cannot be made.
    """

    def __init__(self, environment: Path) -> None:
        python = ensure_environment(environment, REQUIREMENTS)
        # -I keeps PYTHONPATH and user packages of this process's environment out of that one.
        command = [str(python), "-I", str(SCRIPT)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "OpenVino":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it ended by itself before it had read all
                self._process.stdin.close()
        self._process.wait()

    def open_model(
        self, model: Path, shape: Sequence[int], *, threads: int, precision: str = "f32"
    ) -> Callable[[], int]:
        """Open an ONNX file; return what runs it once and returns nanoseconds: CPU time with one thread, else wall.

        Args:
            model: with one float input.
            shape: of the input.
            threads: that OpenVINO may use.
            precision: "f32" or "bf16" for what is not quantized.

        Raises:
            PeerError: OpenVINO cannot run the model.
        """
        request = {"model": str(model), "shape": list(shape), "threads": threads, "precision": precision}
        index = self._ask(request)["index"]
        return lambda: int(self._ask({"run": index})["nanoseconds"])

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError as error:
            raise PeerError("OpenVINO's process ended; what it printed is above") from error
        line = stdout.readline()
        if not line:
            raise PeerError(f"OpenVINO failed on {request}; what it printed is above")
        answer: dict[str, Any] = json.loads(line)
        return answer
