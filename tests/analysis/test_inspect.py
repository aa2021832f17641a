from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mptqc.analysis.inspect import inspect_model
from mptqc.errors import ModelError
from mptqc.graph.edit import constant_of
from mptqc.graph.integer_products import find_integer_products
from mptqc.graph.io import save_model
from mptqc.passes.base import run_passes
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import PLAN_KEY, QuantPlan

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]
WEIGHTS = 4 * 12 * 12 + 2 * 12 * 20


def compiled(block: MakeModel, plan: QuantPlan) -> ir.Model:
    model = run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])
    model.metadata_props[PLAN_KEY] = plan.model_dump_json()
    return model


def saved(model: ir.Model, folder: Path) -> Path:
    save_model(model, folder / "out.onnx")
    return folder / "out.onnx"


def test_every_operand_has_a_row_in_graph_order(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    found = inspect_model(saved(compiled(block, block_plan()), tmp_path))
    assert [(row.site.removeprefix("block00."), row.kind, row.operand) for row in found.layers] == [
        *((letter, "linear", "input") for letter in "qkv"),
        *(("attention", "attention", operand) for operand in "qkpv"),
        *((name, "linear", "input") for name in ("proj", "fc1", "fc2")),
    ]
    assert found.target == "portable"


def test_a_linear_shows_its_quantizer_and_its_smoothing(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    rows = {row.site: row for row in inspect_model(saved(compiled(block, block_plan(3, 5)), tmp_path)).layers}
    q, fc2 = rows["block00.q"], rows["block00.fc2"]
    assert (q.weight_bits, q.activation_bits, q.quantizer, q.alpha) == (3, 5, "uniform", 0.85)
    assert (q.scale, q.zero_point, q.m, q.weight_bytes) == (6 / 32, 16, None, 12 * 12 * 3 // 8)
    assert (fc2.quantizer, fc2.m, fc2.split, fc2.low_codes, fc2.alpha) == ("multi-region", (2,), (4,), 6, None)


def test_totals_add_up(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    path = saved(compiled(block, block_plan(5, 4)), tmp_path)
    totals = inspect_model(path).totals
    assert (totals.integer_linears, totals.integer_attentions, totals.float_linears) == (6, 1, 0)
    assert (totals.average_weight_bits, totals.average_activation_bits) == (5, 4)
    assert totals.weight_bytes == WEIGHTS * 5 // 8
    assert totals.weight_bytes + totals.other_bytes == totals.file_bytes == path.stat().st_size


def test_a_float_model_is_refused(block: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not compiled by mptqc"):
        inspect_model(saved(block(), tmp_path))


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.onnx").write_bytes(b"not an onnx file")
    with pytest.raises(ModelError, match="not an ONNX model"):
        inspect_model(tmp_path / "out.onnx")
    with pytest.raises(ModelError, match="is not a file"):
        inspect_model(tmp_path / "missing.onnx")


def test_bits_that_differ_from_the_plan_are_refused(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    model = compiled(block, block_plan(4))
    model.metadata_props[PLAN_KEY] = block_plan(5).model_dump_json()
    with pytest.raises(ModelError, match=r"block00\.q is planned with 5 bits but stored with 4"):
        inspect_model(saved(model, tmp_path))


def test_a_scale_that_differs_from_the_plan_is_refused(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    model = compiled(block, block_plan())
    value = next(each for each in find_integer_products(model) if each.site == "block00.fc1").left_scale
    array = constant_of(value)
    assert array is not None
    value.const_value = ir.tensor(np.asarray(array * 2, np.float32), name=value.name)
    with pytest.raises(ModelError, match=r"block00\.fc1 is planned with scale"):
        inspect_model(saved(model, tmp_path))


def test_a_plan_that_cannot_be_read_is_refused(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> None:
    path = saved(compiled(block, block_plan()), tmp_path)
    proto = onnx.load(path)
    next(entry for entry in proto.metadata_props if entry.key == PLAN_KEY).value = '{"format": 99}'
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="cannot read"):
        inspect_model(path)
