"""What ONNX Runtime really runs: the operators of a model after graph optimisation, counted.

A quantized Linear that nothing fused is a float product between casts, slower than the float model; only the
optimised graph shows which of the two it became.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx

from mptqc.reference.custom_ops import DOMAIN
from mptqc.runtime.session import Session, create_session

INTEGER_MATMULS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)
"""Operator types that multiply integers."""

FLOAT_MATMULS = frozenset(
    {
        "Attention",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "Gemm",
        "MatMul",
        "MatMulNBits",
        "MultiHeadAttention",
        "TransposeMatMul",
    }
)
"""Operator types that multiply floats, MatMulNBits' unpacked weights included; an attention operator counts once."""


NATIVE_PRODUCTS: Mapping[str, int] = MappingProxyType(
    {
        f"{DOMAIN}.Linear": 1,
        f"{DOMAIN}.LinearQuantize": 1,
        f"{DOMAIN}.Attention": 2,
        f"{DOMAIN}.AttentionQuantize": 2,
    }
)
"""How many integer products each operator of the kernel library stands for."""


@dataclass(frozen=True)
class MatmulCounts:
    """How many products run in integers, and how many in floats."""

    integer_matmuls: int
    float_matmuls: int


def optimized_op_counts(
    model: bytes | str | Path, *, provider: str = "cpu", graph_optimization: bool = True
) -> dict[str, int]:
    """Count the operator types that ONNX Runtime runs for `model`, most frequent first, subgraphs included.

    Raises:
        ModelError: the model cannot be loaded.
        ProviderError: the provider is unknown or cannot start here.
    """
    return open_counted_session(model, provider=provider, graph_optimization=graph_optimization)[1]


def open_counted_session(
    model: bytes | str | Path, *, provider: str = "cpu", threads: int = 0, graph_optimization: bool = True
) -> tuple[Session, dict[str, int]]:
    """Open a session and count the operators of the very graph it runs; see `create_session` for the arguments."""
    with tempfile.TemporaryDirectory(prefix="mptqc-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = create_session(
            model,
            provider=provider,
            threads=threads,
            graph_optimization=graph_optimization,
            optimized_path=optimized,
        )
        return session, graph_op_counts(onnx.load(optimized, load_external_data=False).graph)


def graph_op_counts(graph: onnx.GraphProto) -> dict[str, int]:
    """Count the operator types of a graph as written, most frequent first, then by name; subgraphs included.

    Operators of the kernel library are named with their domain.
    """
    counts = Counter(f"{DOMAIN}.{node.op_type}" if node.domain == DOMAIN else node.op_type for node in _nodes(graph))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def matmul_counts(op_counts: Mapping[str, int]) -> MatmulCounts:
    """Sum the counts of `optimized_op_counts` into integer and float products."""
    return MatmulCounts(
        integer_matmuls=sum(
            count * NATIVE_PRODUCTS.get(op_type, int(op_type in INTEGER_MATMULS))
            for op_type, count in op_counts.items()
        ),
        float_matmuls=sum(count for op_type, count in op_counts.items() if op_type in FLOAT_MATMULS),
    )


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for subgraph in attribute.graphs:
                    yield from _nodes(subgraph)
