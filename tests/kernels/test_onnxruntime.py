"""The operators in ONNX Runtime: the portable file's numbers, threads, concurrent runs, errors for malformed nodes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from code_quantizers import FOUR_REGIONS, TWO_REGIONS, UNIFORM
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from mptqc.errors import ModelError
from mptqc.reference import custom_ops as ops
from mptqc.runtime.library import ISA_VARIABLE, PATH_VARIABLE, find_library
from mptqc.runtime.session import Session, create_session

PROBABILITY = ops.CodeQuantizer(1 / 255, 0)
SCALES = ops.AttentionScales(0.021, 117, 0.019, 133, 0.013, 126)
TYPES = {
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.int64): TensorProto.INT64,
}
Arrays = dict[str, np.ndarray]
OUTPUTS = ("y", "codes")
OUTPUT_TYPES = {op: [TensorProto.FLOAT] for op in ("Linear", "Attention", "LayerNormAdd")} | {
    "LayerNormAddQuantize": [TensorProto.FLOAT, TensorProto.UINT8]
}

random = np.random.default_rng(0)
A = random.integers(0, 256, (2, 23, 35), np.uint8)
W = random.integers(-64, 64, (35, 77)).astype(np.int8)  # more would saturate in ONNX Runtime's own products on AVX2
LINEAR_INPUTS = {
    "W": ops.block_weight(W),
    "W_scale": np.abs(random.standard_normal(77)).astype(np.float32) * np.float32(2e-3),
    "bias": random.standard_normal(77).astype(np.float32),
}
LINEAR = {"input_scale": 0.17, "input_zero_point": 201, "activation": "none"}
RESIDUAL = random.standard_normal((46, 77)).astype(np.float32)
ROWS = random.permutation(23)
CODE_ROWS = ROWS[::-1].copy()
MULTIPLIER = np.exp(random.standard_normal(77)).astype(np.float32)
X = random.standard_normal((2, 23, 35)).astype(np.float32)
HEADS_INPUTS = {"W": ops.block_weight(W[:, :64]), **{name: LINEAR_INPUTS[name][:64] for name in ("W_scale", "bias")}}
ROTATION = {name: random.standard_normal((23, 2, 32)).astype(np.float32) for name in ("cosine", "sine")}
STREAM = random.standard_normal((46, 35)).astype(np.float32)
NORM_INPUTS = {name: random.standard_normal(35).astype(np.float32) for name in ("gamma", "beta")}
Q, K, V = (random.integers(0, 256, (2, size, 48), np.uint8) for size in (9, 13, 13))
BIAS = random.standard_normal((2, 1, 9, 13)).astype(np.float32)
ATTENTION = {"heads": 3, "row_scale": 1, **vars(SCALES), **PROBABILITY.attributes("p")}
IMAGE = random.standard_normal((2, 3, 8, 12)).astype(np.float32)


@pytest.fixture(autouse=True)
def with_library(library) -> None:
    """Every test here needs the kernel library."""


def bytes_of(nodes: list[Any], feeds: Arrays, initializers: Arrays, *outputs: int) -> bytes:
    inputs = [
        helper.make_tensor_value_info(name, TYPES[x.dtype], [f"{name}{axis}" for axis in range(x.ndim)])
        for name, x in feeds.items()
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        [helper.make_tensor_value_info(name, output, None) for name, output in zip(OUTPUTS, outputs, strict=False)],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ops.DOMAIN, 1)]
    model: bytes = helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString()
    return model


def native(op: str, feeds: Arrays, initializers: Arrays, attributes: dict[str, Any], inputs: str = "") -> bytes:
    """A model of one operator; `inputs` are their names in order, those fed first unless given."""
    names = inputs.split() if inputs else [*feeds, *initializers]
    types = OUTPUT_TYPES.get(op, [TensorProto.UINT8])
    read = ["" if name == "-" else name for name in names]
    node = helper.make_node(op, read, OUTPUTS[: len(types)], domain=ops.DOMAIN, name="node")
    node.attribute.extend(
        helper.make_attribute(name, value, attr_type=AttributeProto.INTS if value == () else None)
        for name, value in attributes.items()
    )
    return bytes_of([node], feeds, initializers, *types)


def run(model: bytes, feeds: Arrays, threads: int = 1) -> np.ndarray:
    return run_all(model, feeds, threads)[0]


def run_all(model: bytes, feeds: Arrays, threads: int = 1) -> list[np.ndarray]:
    return create_session(model, threads=threads).run(None, feeds)


CASES: dict[str, tuple[Any, ...]] = {
    "norm": ("LayerNormQuantize", {"X": X}, NORM_INPUTS, {"epsilon": 1e-6, **UNIFORM.attributes("output")}),
    "norm with rows": (
        "LayerNormQuantize", {"X": X}, {**NORM_INPUTS, "rows": ROWS}, {"epsilon": 1e-6, **UNIFORM.attributes("output")}
    ),
    "sum": ("LayerNormAdd", {"X": X, "residual": STREAM}, NORM_INPUTS, {"epsilon": 1e-6}, "X gamma beta residual"),
    "sum with rows": (
        "LayerNormAdd", {"X": X, "residual": STREAM}, {**NORM_INPUTS, "rows": ROWS}, {"epsilon": 1e-6},
        "X gamma beta residual rows",
    ),
    "sum, quantized": (
        "LayerNormAddQuantize", {"X": X, "residual": STREAM}, NORM_INPUTS,
        {"epsilon": 1e-6, **TWO_REGIONS.attributes("output")}, "X gamma beta residual",
    ),
    "sum, quantized, with all": (
        "LayerNormAddQuantize", {"X": X, "residual": STREAM}, {**NORM_INPUTS, "rows": ROWS, "code_rows": CODE_ROWS},
        {"epsilon": 1e-6, **TWO_REGIONS.attributes("output")}, "X gamma beta residual rows code_rows",
    ),
    "sum of nothing, quantized, with moved codes": (
        "LayerNormAddQuantize", {"X": X}, {**NORM_INPUTS, "code_rows": CODE_ROWS},
        {"epsilon": 1e-6, **TWO_REGIONS.attributes("output")}, "X gamma beta - - code_rows",
    ),
    "linear": ("Linear", {"A": A}, LINEAR_INPUTS, LINEAR),
    "linear with residual": (
        "Linear", {"A": A, "residual": RESIDUAL}, LINEAR_INPUTS, LINEAR, "A W W_scale bias residual"
    ),
    "linear with all": (
        "Linear", {"A": A, "residual": RESIDUAL}, {**LINEAR_INPUTS, "rows": ROWS}, LINEAR,
        "A W W_scale bias residual rows",
    ),
    "linear with rows": ("Linear", {"A": A}, {**LINEAR_INPUTS, "rows": ROWS}, LINEAR, "A W W_scale bias - rows"),
    "quantize": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, {**LINEAR, **UNIFORM.attributes("output")}),
    "gelu": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, {**LINEAR, "activation": "gelu", **TWO_REGIONS.attributes("output")}
    ),
    "gelu by tanh": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS,
        {**LINEAR, "activation": "gelu_tanh", **TWO_REGIONS.attributes("output")},
    ),
    "gelu, quick": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS,
        {**LINEAR, "activation": "quick_gelu", **TWO_REGIONS.attributes("output")},
    ),
    "gelu with multiplier": (
        "LinearQuantize", {"A": A}, {**LINEAR_INPUTS, "multiplier": MULTIPLIER},
        {**LINEAR, "activation": "gelu", **FOUR_REGIONS.attributes("output")},
    ),
    "unit heads": (
        "LinearQuantize", {"A": A}, {**HEADS_INPUTS, "multiplier": MULTIPLIER[:64]},
        {**LINEAR, "activation": "unit_heads", "head_width": 32, "head_epsilon": 1e-6, **UNIFORM.attributes("output")},
    ),
    "silu": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, {**LINEAR, "activation": "silu", **TWO_REGIONS.attributes("output")}
    ),
    "factor": ("Linear", {"A": A, "factor": RESIDUAL}, LINEAR_INPUTS, LINEAR, "A W W_scale bias - - factor"),
    "factor, quantized": (
        "LinearQuantize", {"A": A, "factor": RESIDUAL}, LINEAR_INPUTS, {**LINEAR, **UNIFORM.attributes("output")},
        "A W W_scale bias - - - factor",
    ),
    "rotate": (
        "LinearQuantize", {"A": A}, {**HEADS_INPUTS, **ROTATION}, {**LINEAR, **UNIFORM.attributes("output")},
        "A W W_scale bias - cosine sine",
    ),
    "attention": ("Attention", {"q": Q, "k": K, "v": V}, {}, ATTENTION),
    "attention with bias": ("Attention", {"q": Q, "k": K, "v": V}, {"bias": BIAS}, ATTENTION),
    "attention with both": (
        "AttentionQuantize", {"q": Q, "k": K, "v": V}, {"bias": BIAS, "mask": BIAS},
        {**ATTENTION, **UNIFORM.attributes("output")},
    ),
    "patches": (
        "QuantizePatches", {"X": IMAGE}, {}, {"patch_height": 4, "patch_width": 3, **UNIFORM.attributes("output")}
    ),
}  # fmt: skip


def expected(case: str, kernels: Any) -> list[np.ndarray]:
    """What the same kernels give when they are called directly."""
    rows = ROWS if "rows" in case or "all" in case else None
    linear = (A, W, LINEAR_INPUTS["W_scale"], LINEAR_INPUTS["bias"])
    results: dict[str, Callable[[], np.ndarray | tuple[np.ndarray, np.ndarray]]] = {
        "norm": lambda: kernels.layer_norm(X, *NORM_INPUTS.values(), 1e-6, UNIFORM, rows),
        "sum": lambda: kernels.layer_norm_add(
            X, *NORM_INPUTS.values(), 1e-6, residual=None if "nothing" in case else STREAM, rows=rows,
            quantizer=TWO_REGIONS if "quantized" in case else None,
            code_rows=CODE_ROWS if "all" in case or "codes" in case else None,
        ),
        "linear": lambda: kernels.linear(
            *linear, **LINEAR, rows=rows, residual=RESIDUAL if "residual" in case or "all" in case else None
        ),
        "quantize": lambda: kernels.linear(*linear, **LINEAR, quantizer=UNIFORM),
        "gelu": lambda: kernels.linear(
            *linear, **(LINEAR | {"activation": CASES[case][3]["activation"]}),
            quantizer=FOUR_REGIONS if "multiplier" in case else TWO_REGIONS,
            multiplier=MULTIPLIER if "multiplier" in case else None,
        ),
        "unit": lambda: kernels.linear(
            A, W[:, :64], HEADS_INPUTS["W_scale"], HEADS_INPUTS["bias"], **LINEAR, quantizer=UNIFORM,
            multiplier=MULTIPLIER[:64], unit_heads=(32, 1e-6),
        ),
        "silu": lambda: kernels.linear(*linear, **(LINEAR | {"activation": "silu"}), quantizer=TWO_REGIONS),
        "factor": lambda: kernels.linear(
            *linear, **LINEAR, factor=RESIDUAL, quantizer=UNIFORM if "quantized" in case else None
        ),
        "rotate": lambda: kernels.linear(
            A, W[:, :64], HEADS_INPUTS["W_scale"], HEADS_INPUTS["bias"], **LINEAR, quantizer=UNIFORM,
            rotary=(ROTATION["cosine"], ROTATION["sine"]),
        ),
        "attention": lambda: kernels.attention(
            Q, K, V, 3, SCALES, PROBABILITY, BIAS if "with" in case else None,
            *((BIAS, UNIFORM) if "both" in case else ()), row_scale=True
        ),
        "patches": lambda: kernels.patches(IMAGE, 4, 3, UNIFORM),
    }  # fmt: skip
    outputs = results[case.split()[0].rstrip(",")]()
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("case", CASES)
def test_operator_runs_its_kernel(case, kernels, monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, kernels.isa)
    monkeypatch.setenv(PATH_VARIABLE, str(kernels.path))
    for actual, wanted in zip(run_all(native(*CASES[case]), CASES[case][1]), expected(case, kernels), strict=True):
        assert actual.dtype == wanted.dtype and np.array_equal(actual, wanted)


@pytest.mark.parametrize("case", CASES)
def test_batch_zero(case):
    feeds = {name: x[:0] for name, x in CASES[case][1].items()}
    arguments = list(CASES[case])
    if case.startswith("attention"):  # a bias of two windows does not divide a batch of 0 into fewer
        arguments[2] = {name: x[:1] for name, x in arguments[2].items()}
    assert all(output.size == 0 for output in run_all(native(*arguments), feeds))


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_nothing(case):
    feeds = {name: np.concatenate([x] * 40) for name, x in CASES[case][1].items()}
    model = native(*CASES[case])
    alone = run_all(model, feeds)
    for threads in (2, 3):
        assert all(map(np.array_equal, run_all(model, feeds, threads), alone))


@pytest.mark.parametrize("case", CASES)
def test_one_session_runs_concurrently(case):
    session = create_session(native(*CASES[case]), threads=2)
    sizes = [1, 2, 5, 8] * 4
    batches = [{name: np.concatenate([x] * size) for name, x in CASES[case][1].items()} for size in sizes]
    alone = [session.run(None, feeds) for feeds in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda feeds: session.run(None, feeds), batches))
    assert all(all(map(np.array_equal, *outputs)) for outputs in zip(alone, together, strict=True))


def amid_others(case: str, *, kept: bool) -> bytes:
    """The operator between two that negate: the residual may be overwritten unless it is `kept`, as an output."""
    model = onnx.load_from_string(native(*CASES[case]))
    graph, (node,) = model.graph, model.graph.node
    index = list(node.input).index("residual")
    node.input[index], node.output[0] = "before", "behind"
    negations = [
        helper.make_node("Neg", *([name] for name in names)) for names in (("residual", "before"), ("behind", "y"))
    ]
    shape = CASES[case][1]["residual"].shape
    graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("before", "behind")
    )
    graph.node.insert(0, negations[0])
    graph.node.append(negations[1])
    if kept:
        graph.output.append(helper.make_tensor_value_info("before", TensorProto.FLOAT, shape))
    result: bytes = model.SerializeToString()
    return result


@pytest.mark.parametrize("case", [case for case in CASES if "residual" in CASES[case][1]])
def test_an_output_takes_the_residuals_place_where_nothing_else_reads_it(case):
    feeds = CASES[case][1]
    free, kept = (run_all(amid_others(case, kept=kept), feeds) for kept in (False, True))
    assert np.array_equal(kept[-1], -feeds["residual"])
    assert all(np.array_equal(mine, its) for mine, its in zip(free, kept, strict=False))


def portable_linear(quantizer: ops.CodeQuantizer | None) -> bytes:
    """MatMulInteger -> Cast -> Mul -> Add (-> quantizer), as the compiler writes it."""
    constants = {
        "W": W, "zero": np.uint8(201), "scale": np.float32(0.17) * LINEAR_INPUTS["W_scale"],
        "bias": LINEAR_INPUTS["bias"],
    }  # fmt: skip
    node = helper.make_node
    last = "y" if quantizer is None else "f"
    nodes = [
        node("MatMulInteger", ["A", "W", "zero"], ["i"]),
        node("Cast", ["i"], ["c"], to=TensorProto.FLOAT),
        node("Mul", ["c", "scale"], ["m"]),
        node("Add", ["m", "bias"], [last]),
    ]
    if quantizer is not None:
        step, zero = np.float32(quantizer.scale), quantizer.zero_point
        constants |= {
            "s0": step, "s1": step * np.float32(8), "z0": np.uint8(255 - quantizer.split[0]), "z1": np.uint8(0),
            "z1_low": np.uint8(8), "z1_high": np.uint8(8 + 15), "z": np.uint8(zero),
        }  # fmt: skip
        nodes += [
            node("QuantizeLinear", ["f", "s0", "z0"], ["low"]),
            node("QuantizeLinear", ["f", "s1", "z1"], ["high"]),
            node("Clip", ["high", "z1_low", "z1_high"], ["clipped"]),
            node("DequantizeLinear", ["low", "s0", "z0"], ["low_part"]),
            node("DequantizeLinear", ["clipped", "s1", "z1_low"], ["high_part"]),
            node("Add", ["low_part", "high_part"], ["sum"]),
            node("QuantizeLinear", ["sum", "s0", "z"], ["y"]),
        ]
    arrays = {name: np.asarray(value) for name, value in constants.items()}
    return bytes_of(nodes, {"A": A}, arrays, TensorProto.FLOAT if quantizer is None else TensorProto.UINT8)


def test_linear_equals_the_portable_file_bit_for_bit():
    portable = create_session(portable_linear(None), graph_optimization=False).run(None, {"A": A})[0]
    assert np.array_equal(run(native(*CASES["linear"]), {"A": A}), portable)


def test_two_region_codes_equal_the_portable_files():
    portable = create_session(portable_linear(TWO_REGIONS), graph_optimization=False).run(None, {"A": A})[0]
    attributes = {**LINEAR, **TWO_REGIONS.attributes("output")}
    assert np.array_equal(run(native("LinearQuantize", {"A": A}, LINEAR_INPUTS, attributes), {"A": A}), portable)
    assert np.unique(portable).size > 30


def without(attributes: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in attributes.items() if key != name}


def rotation_of(cosine: tuple[int, ...], sine: tuple[int, ...] | None = None) -> tuple[Any, ...]:
    """The case "rotate" with tables of other shapes."""
    op, feeds, initializers, *rest = CASES["rotate"]
    tables = {"cosine": np.zeros(cosine, np.float32), "sine": np.zeros(sine or cosine, np.float32)}
    return (op, feeds, initializers | tables, *rest)


QUANTIZE = CASES["quantize"][3]
MALFORMED_NODES: dict[str, tuple[Any, ...]] = {
    "input_scale": ("Linear", {"A": A}, LINEAR_INPUTS, without(LINEAR, "input_scale")),
    "output_split": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, without(QUANTIZE, "output_split")),
    "output_m must be a list": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": 1.0}),
    "output_split must be a list": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_split": 0}),
    "output_zero_point is 256": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_zero_point": 256}),
    "scale must lie": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_scale": 0.0}),
    "split must be": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": [2], "output_split": [6]}),
    "m must rise": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": [3, 3], "output_split": [8, 16]}
    ),
    "differ in length": ("LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": [3, 4]}),
    "more than 3 numbers": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": [1, 2, 3, 4], "output_split": [0, 0, 0, 0]}
    ),
    "a number not between 0 and 255": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": [3], "output_split": [2**40]}
    ),
    "hold whole steps": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_m": [3, 4], "output_split": [64, 48]}
    ),
    "minimum <= maximum": (
        "LinearQuantize", {"A": A}, LINEAR_INPUTS, QUANTIZE | {"output_minimum": 9, "output_maximum": 8}
    ),
    "activation must be": ("Linear", {"A": A}, LINEAR_INPUTS, LINEAR | {"activation": "relu"}),
    "input_scale must be above 0": ("Linear", {"A": A}, LINEAR_INPUTS, LINEAR | {"input_scale": float("nan")}),
    "W must be constant": ("Linear", {"A": A, "W": ops.block_weight(W)}, without(LINEAR_INPUTS, "W"), LINEAR),
    "W has shape": ("Linear", {"A": A}, LINEAR_INPUTS | {"W": ops.block_weight(W)[:-1]}, LINEAR),
    "bias and W_scale": ("Linear", {"A": A}, LINEAR_INPUTS | {"bias": np.zeros(76, np.float32)}, LINEAR),
    "rows must be a permutation": (
        "Linear", {"A": A}, LINEAR_INPUTS | {"rows": np.array([0, 2])}, LINEAR, "A W W_scale bias - rows"
    ),
    "heads must be 2 to 64 wide": rotation_of((23, 1, 128)),
    "must fill 64 columns": rotation_of((23, 1, 32)),
    "cosine has": rotation_of((23, 2, 32), (22, 2, 32)),
    "activation none": (*CASES["rotate"][:3], CASES["rotate"][3] | {"activation": "gelu"}, CASES["rotate"][4]),
    "head_width must be 16": (*CASES["unit heads"][:3], CASES["unit heads"][3] | {"head_width": 24}),
    "head_width": (*CASES["unit heads"][:3], without(CASES["unit heads"][3], "head_width")),
    "head_epsilon must be above 0": (*CASES["unit heads"][:3], CASES["unit heads"][3] | {"head_epsilon": 0.0}),
    "a factor goes with": (*CASES["factor"][:3], LINEAR | {"activation": "silu"}, CASES["factor"][4]),
    "a factor and rows": (
        "Linear", CASES["factor"][1], LINEAR_INPUTS | {"rows": ROWS}, LINEAR, "A W W_scale bias - rows factor"
    ),
    "gamma and beta": (
        "LayerNormQuantize", {"X": X}, NORM_INPUTS | {"beta": np.zeros(3, np.float32)}, CASES["norm"][3]
    ),
    "epsilon must be": ("LayerNormQuantize", {"X": X}, NORM_INPUTS, CASES["norm"][3] | {"epsilon": -1.0}),
    "gamma and beta differ": (
        "LayerNormAdd", {"X": X, "residual": STREAM}, NORM_INPUTS | {"beta": np.zeros(3, np.float32)},
        {"epsilon": 1e-6}, "X gamma beta residual",
    ),
    "epsilon must be above 0": (
        "LayerNormAdd", {"X": X, "residual": STREAM}, NORM_INPUTS, {"epsilon": 0.0}, "X gamma beta residual"
    ),
    "code_rows must be a permutation": (
        *CASES["sum, quantized, with all"][:2], {**NORM_INPUTS, "rows": ROWS, "code_rows": np.array([0, 0, 1])},
        *CASES["sum, quantized, with all"][3:],
    ),
    "code_rows must be constant": (
        "LayerNormAddQuantize", {"X": X, "residual": STREAM, "code_rows": ROWS}, NORM_INPUTS,
        CASES["sum, quantized"][3], "X gamma beta residual - code_rows",
    ),
    "code_rows is empty": (
        *CASES["sum, quantized, with all"][:2], {**NORM_INPUTS, "rows": ROWS, "code_rows": ROWS[:0]},
        *CASES["sum, quantized, with all"][3:],
    ),
    "row_scale is 2": ("Attention", {"q": Q, "k": K, "v": V}, {}, ATTENTION | {"row_scale": 2}),
    "heads is 0": ("Attention", {"q": Q, "k": K, "v": V}, {}, ATTENTION | {"heads": 0}),
    "patch_width is -1": ("QuantizePatches", {"X": IMAGE}, {}, CASES["patches"][3] | {"patch_width": -1}),
}  # fmt: skip

MALFORMED_SHAPES: dict[str, tuple[str, Arrays]] = {
    "A has shape": ("linear", {"A": A[..., :31]}),
    "A has shape ": ("linear", {"A": A[..., :0]}),
    "residual has shape": ("linear with residual", {"A": A, "residual": RESIDUAL[:-1]}),
    "rows has 23 entries": ("linear with rows", {"A": A[:, :-1]}),
    "factor has shape": ("factor", {"A": A, "factor": RESIDUAL[1:]}),
    "cosine has shape": ("rotate", {"A": A[:, 1:]}),
    "X has shape": ("norm", {"X": X[..., :-1]}),
    "rows has 23": ("norm with rows", {"X": X[:, 1:]}),
    "X has shape   ": ("sum", {"X": X[..., :-1], "residual": STREAM}),
    "residual has shape ": ("sum", {"X": X, "residual": STREAM[:-1]}),
    "residual has shape  ": ("sum, quantized", {"X": X, "residual": STREAM[:, :-1]}),
    "rows has 23 ": ("sum with rows", {"X": X[:, 1:], "residual": STREAM[2:]}),
    "code_rows has 23": ("sum of nothing, quantized, with moved codes", {"X": X[:, 1:]}),
    "an operand has shape": ("attention", {"q": Q[..., :-1], "k": K, "v": V}),
    "k has shape": ("attention", {"q": Q, "k": K[:1], "v": V}),
    "v has shape": ("attention", {"q": Q, "k": K, "v": V[:, 1:]}),
    "bias has shape": ("attention with bias", {"q": Q[:1], "k": K[:1], "v": V[:1]}),
    "bias has shape ": ("attention with bias", {"q": Q, "k": K[:, 1:], "v": V[:, 1:]}),
    "X has shape  ": ("patches", {"X": IMAGE[:, :, :-1]}),
}


@pytest.mark.parametrize("message", MALFORMED_NODES)
def test_a_malformed_node_is_refused_at_load(message):
    with pytest.raises(ModelError, match=message) as error:
        create_session(native(*MALFORMED_NODES[message]))
    assert f"{MALFORMED_NODES[message][0]} node" in str(error.value)


@pytest.mark.parametrize("message", MALFORMED_SHAPES)
def test_shapes_that_do_not_fit_are_refused_at_run(message):
    case, feeds = MALFORMED_SHAPES[message]
    session = create_session(native(*CASES[case]))
    with pytest.raises(Exception, match=rf"(?i)INVALID_ARGUMENT.*{message.strip()}"):
        session.run(None, feeds)
    assert run_again(session, CASES[case][1])


def run_again(session: Session, feeds: Arrays) -> bool:
    return bool(session.run(None, feeds)[0].size)


def test_folded_constants_count_as_constants():
    """A weight unpacked by standard operators is constant once ONNX Runtime has folded them."""
    _, feeds, initializers, attributes = CASES["linear"]
    half = initializers["W"].astype(np.int32) // 2
    constants = without(initializers, "W") | {"half": half, "rest": initializers["W"].astype(np.int32) - half}
    nodes = [
        helper.make_node("Add", ["half", "rest"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["W"], to=TensorProto.INT8),
        helper.make_node("Linear", ["A", "W", "W_scale", "bias"], ["y"], domain=ops.DOMAIN, **attributes),
    ]
    folded = run(bytes_of(nodes, feeds, constants, TensorProto.FLOAT), feeds)
    assert np.array_equal(folded, run(native(*CASES["linear"]), feeds))


def test_the_library_itself_refuses_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv(ISA_VARIABLE, "avx1024")
    with pytest.raises(Exception, match='MPTQC_ISA is "avx1024"'):
        ort.SessionOptions().register_custom_ops_library(str(find_library()))
