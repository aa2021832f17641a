"""Run a graph piece by piece over all calibration images, each node once, holding only values still needed.

Between two pieces the graph may be edited downstream of what has run: sequential compensation quantizes a Linear as
soon as its input is known, and what follows then sees the quantized output.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from mptqc.analysis.observe import fitting_batches
from mptqc.data.samples import Samples
from mptqc.graph.edit import constant_of
from mptqc.runtime.session import create_session, run_arrays

Array = NDArray[np.generic]

MEMORY_BYTES = 700_000_000


class Frontier:
    """Values of all batches at the edge of what has run.

    Args:
        model: the graph; may be edited between calls of `advance`, downstream of what has run.
        samples: calibration images; live values of all images are kept, above `MEMORY_BYTES` in files.
        batch: images a batch; a fixed batch in the model wins, and its last batch is filled up by repeating.
    """

    def __init__(self, model: ir.Model, samples: Samples, batch: int) -> None:
        self._model = model
        self._image = str(model.graph.inputs[0].name)
        self._values: list[dict[str, Array | Path]] = []
        self._folder = TemporaryDirectory(prefix="mptqc-")
        self._held = 0
        self._written = 0
        for images in fitting_batches(model, samples, batch):
            self._values.append({self._image: self._keep(images)})
        self._run: set[ir.Node] = set()

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._values)

    def images(self, batch: int) -> int:
        """How many images a batch has."""
        return len(self.value(self._image, batch))

    def value(self, name: str, batch: int) -> Array:
        """A live value of one batch."""
        kept = self._values[batch][name]
        return np.asarray(np.load(kept, mmap_mode="r")) if isinstance(kept, Path) else kept

    def advance(self, targets: Sequence[ir.Value]) -> None:
        """Run what the targets need and keep them, with all else that later nodes read."""
        self._drop_dead()
        known = set(self._values[0])
        nodes = self._missing(targets, known)
        if not nodes:
            return
        chosen = set(nodes)
        self._run |= chosen
        outputs = {str(value.name): None for value in targets if value.name not in known}
        for node in nodes:
            for value in node.outputs:
                if value.is_graph_output() or any(user not in chosen for user in value.consumers()):
                    outputs.setdefault(str(value.name))
        inputs = {
            str(value.name): None
            for node in nodes
            for value in node.inputs
            if value is not None and value.name in known
        }
        session = create_session(self._piece(nodes, list(inputs), list(outputs)))
        for batch, values in enumerate(self._values):
            found = run_arrays(session, list(outputs), {name: self.value(name, batch) for name in inputs})
            values.update({name: self._keep(array) for name, array in zip(outputs, found, strict=True)})

    def _missing(self, targets: Sequence[ir.Value], known: set[str]) -> list[ir.Node]:
        """Nodes between what is known and the targets, in graph order."""
        wanted: set[ir.Node] = set()
        frontier = list(targets)
        while frontier:
            value = frontier.pop()
            node = value.producer()
            if value.name in known or node is None or node in wanted:
                continue
            wanted.add(node)
            frontier.extend(operand for operand in node.inputs if operand is not None)
        return [node for node in self._model.graph if node in wanted]

    def _piece(self, nodes: Sequence[ir.Node], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
        graph = onnx.GraphProto(name="piece")
        constants: dict[str, ir.Value] = {}
        for node in nodes:
            graph.node.append(ir.to_proto(node))
            for value in node.inputs:
                if value is not None and value.const_value is not None and constant_of(value) is not None:
                    constants[str(value.name)] = value
        for name, value in constants.items():
            assert value.const_value is not None
            tensor = ir.to_proto(value.const_value)
            tensor.name = name
            graph.initializer.append(tensor)
        for name in inputs:
            array = self.value(name, 0)
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            dims = [f"{name}.{axis}" for axis in range(array.ndim)]
            graph.input.append(onnx.helper.make_tensor_value_info(name, kind, dims))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        imports = [onnx.helper.make_opsetid(domain, number) for domain, number in self._model.opset_imports.items()]
        proto = onnx.helper.make_model(graph, opset_imports=imports, ir_version=self._model.ir_version)
        serialized: bytes = proto.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
        return serialized

    def _drop_dead(self) -> None:
        """Forget values that no node still to run reads; images stay, for quantizers put on them later."""
        needed = {self._image}
        for node in self._model.graph:
            if node not in self._run:
                needed.update(str(value.name) for value in node.inputs if value is not None)
        for values in self._values:
            for name in [name for name in values if name not in needed]:
                self._forget(values.pop(name))

    def _keep(self, array: Array) -> Array | Path:
        """The array itself while there is room in memory, else the file it was written to."""
        if self._held + array.nbytes <= MEMORY_BYTES:
            self._held += array.nbytes
            return array
        self._written += 1
        path = Path(self._folder.name) / f"{self._written}.npy"
        np.save(path, array)
        return path

    def _forget(self, kept: Array | Path) -> None:
        if isinstance(kept, Path):
            kept.unlink()
        else:
            self._held -= kept.nbytes
