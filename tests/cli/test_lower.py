from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from mptqc.analysis.inspect import inspect_model
from mptqc.cli.app import main
from mptqc.graph.io import save_model
from mptqc.graph.native_nodes import native_nodes
from mptqc.passes.base import run_passes
from mptqc.passes.pack_weights import PackWeights
from mptqc.passes.quantize_attentions import QuantizeAttentions
from mptqc.passes.quantize_linears import QuantizeLinears
from mptqc.plan import PLAN_KEY, QuantPlan


@pytest.fixture
def portable(block: Callable[[], ir.Model], block_plan: Callable[..., QuantPlan], tmp_path: Path) -> Path:
    plan = block_plan(5, 4)
    model = run_passes(block(), [QuantizeLinears(plan), QuantizeAttentions(plan), PackWeights()])
    model.metadata_props[PLAN_KEY] = plan.model_dump_json()
    save_model(model, tmp_path / "portable.onnx")
    return tmp_path / "portable.onnx"


def exit_code(*arguments: object) -> object:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def test_a_portable_file_is_lowered_and_says_so(portable: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "native.onnx"
    assert not exit_code("lower", portable, "-o", output)
    printed = capsys.readouterr().out
    assert "lowered: 5 LinearQuantize, 1 LayerNormQuantize, 1 AttentionQuantize, 1 Linear\n" in printed
    assert "not lowered" not in printed
    assert len(native_nodes(ir.load(output))) == 8


def test_a_native_file_shows_the_same_layers(portable: Path, tmp_path: Path) -> None:
    output = tmp_path / "native.onnx"
    assert not exit_code("lower", portable, "-o", output)
    before, after = inspect_model(portable), inspect_model(output)
    assert (before.target, after.target) == ("portable", "cpu-native")
    operand = [
        [(row.site, row.operand, row.weight_bits, row.activation_bits, row.scale, row.alpha) for row in each.layers]
        for each in (before, after)
    ]
    assert operand[0] == operand[1]
    assert after.totals.average_weight_bits == 5


def test_the_cpu_target_is_there_too(portable: Path, tmp_path: Path) -> None:
    assert not exit_code("lower", portable, "-o", tmp_path / "cpu.onnx", "--target", "cpu")
    assert inspect_model(tmp_path / "cpu.onnx").target == "cpu"


def test_a_lowered_file_is_not_lowered_again(portable: Path, tmp_path: Path, capsys) -> None:
    assert not exit_code("lower", portable, "-o", tmp_path / "native.onnx")
    assert exit_code("lower", tmp_path / "native.onnx", "-o", tmp_path / "again.onnx") == 2
    assert "was compiled for target 'cpu-native'" in capsys.readouterr().err
    assert not (tmp_path / "again.onnx").exists()


def test_a_file_that_runs_at_batch_1_alone_is_told_so(portable: Path, tmp_path: Path, capsys) -> None:
    model = ir.load(portable)
    heads = model.graph.initializers["heads"]
    heads.const_value = ir.tensor([1, *heads.const_value.numpy()[1:]], ir.DataType.INT64, name="heads")
    save_model(model, portable)
    assert exit_code("lower", portable, "-o", tmp_path / "native.onnx") == 2
    assert "does not run at batch 2: export it with a fixed batch" in " ".join(capsys.readouterr().err.split())


def test_wrong_use_is_one_paragraph(portable: Path, block: Callable[[], ir.Model], tmp_path: Path, capsys) -> None:
    save_model(block(), tmp_path / "float.onnx")
    for arguments, problem in (
        ((tmp_path / "float.onnx", "-o", tmp_path / "out.onnx"), "was not compiled by mptqc"),
        ((portable, "-o", portable), "is the model itself"),
        (
            (portable, "-o", tmp_path / "out.onnx", "--target", "portable"),
            "the targets are cpu, cpu-native, cuda, tensorrt",
        ),
    ):
        assert exit_code("lower", *arguments) == 2
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()
