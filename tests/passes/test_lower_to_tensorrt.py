from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.errors import RefusalError
from mptqc.graph.edit import constant_of
from mptqc.graph.io import serialize
from mptqc.passes.base import Stage, StageError, run_passes, stage_of
from mptqc.passes.lower_to_tensorrt import LowerToTensorRt
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import QuantPlan
from mptqc.runtime.session import create_session

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
X = np.random.default_rng(1).normal(size=(3, 7, 12)).astype(np.float32)
# Float sums of at most 20 products where the portable form has exact ones: 20 · 2⁻²⁴ of magnitudes below 16. A float
# that lies so near a rounding boundary moves a code; none does with this seed.
FLOAT_SUM_TOLERANCE = 20 * 2**-24 * 16


def quantized(block: MakeModel, plan: QuantPlan) -> ir.Model:
    return run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])


def run(model: ir.Model) -> np.ndarray:
    return create_session(serialize(model), threads=1, graph_optimization=False).run(None, {"x": X})[0]


def test_every_product_reads_symmetric_int8_quantizers(block: MakeModel, block_plan: MakePlan) -> None:
    model = quantized(block, block_plan(8, 8, two_region=False))
    assert LowerToTensorRt()(model).edits == 8
    counts = Counter(node.op_type for node in model.graph)
    assert counts["MatMul"] == 8
    assert not {"MatMulInteger", "Cast", "BitShift"} & set(counts)
    assert stage_of(model) is Stage.LOWERED
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constant_of(node.inputs[2])
            assert zero_point is not None
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
        if node.op_type == "QuantizeLinear":
            assert [reader.op_type for reader in node.outputs[0].consumers()] == ["DequantizeLinear"]


def test_codes_that_fit_int8_are_kept(block: MakeModel, block_plan: MakePlan) -> None:
    model = quantized(block, block_plan(6, 6, two_region=False))
    before = run(model)
    LowerToTensorRt()(model)
    np.testing.assert_allclose(run(model), before, rtol=0, atol=FLOAT_SUM_TOLERANCE)


def test_wider_ranges_get_coarser_steps(block: MakeModel, block_plan: MakePlan) -> None:
    """Softmax at 8 bits has codes 0..255: 127 steps of twice the size reach as far."""
    model = quantized(block, block_plan(8, 8, two_region=False))
    before = run(model)
    LowerToTensorRt()(model)
    scales = [
        float(scale.item())
        for node in model.graph
        if node.op_type == "QuantizeLinear" and (scale := constant_of(node.inputs[1])) is not None
    ]
    assert [scale for scale in scales if scale == pytest.approx(1 / 127, rel=2**-22)]
    error = run(model) - before
    assert 0 < np.square(error).mean() < 1e-3 * np.square(before).mean()


def test_two_regions_are_refused(block: MakeModel, block_plan: MakePlan) -> None:
    model = quantized(block, block_plan())
    untouched = serialize(model)
    with pytest.raises(RefusalError, match=r"block00\.attention, block00\.fc2 read one.*--no-opt-m"):
        LowerToTensorRt()(model)
    assert serialize(model) == untouched


def test_a_model_that_is_not_quantized_is_refused(block: MakeModel) -> None:
    with pytest.raises(StageError, match="lower-to-tensorrt"):
        LowerToTensorRt()(block())
