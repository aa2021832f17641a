import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from mptqc.cli.app import main
from mptqc.graph.io import save_model
from mptqc.passes.base import run_passes
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import PLAN_KEY, QuantPlan

MakeModel = Callable[[], ir.Model]
MakePlan = Callable[..., QuantPlan]


@pytest.fixture
def compiled_path(block: MakeModel, block_plan: MakePlan, tmp_path: Path) -> Path:
    plan = block_plan()
    model = run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])
    model.metadata_props[PLAN_KEY] = plan.model_dump_json()
    save_model(model, tmp_path / "out.onnx")
    return tmp_path / "out.onnx"


def exit_code(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_json_has_the_documented_keys(compiled_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["inspect", str(compiled_path), "--json"]) in (0, None)
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"target", "layers", "totals"}
    assert set(shown["layers"][0]) == {
        *("site", "kind", "operand", "weight_bits", "activation_bits", "scale", "zero_point", "quantizer"),
        *("m", "split", "low_codes", "alpha", "weight_bytes", "trellis", "exponents"),
    }
    assert set(shown["totals"]) == {
        *("integer_linears", "integer_attentions", "quantized_tensors", "float_linears"),
        *("average_weight_bits", "average_activation_bits", "weight_bytes", "other_bytes", "file_bytes"),
        "budget_bytes",
    }


def test_the_table_names_every_site(compiled_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["inspect", str(compiled_path)]) in (0, None)
    shown = capsys.readouterr().out
    for site in ("block00.q", "block00.attention", "block00.fc2", "m=2 split=4 low=6", "average weight bits"):
        assert site in shown


def test_a_float_model_ends_with_code_2(block: MakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(block(), tmp_path / "float.onnx")
    assert exit_code(["inspect", str(tmp_path / "float.onnx")]) == 2
    assert "not compiled by mptqc" in capsys.readouterr().err
