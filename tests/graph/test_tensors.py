from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.compiler import load_canonical
from mptqc.graph.edit import add_initializer, is_op
from mptqc.graph.match import find_linears
from mptqc.graph.tensors import find_tensors
from mptqc.passes.prune_tokens import PruneTokens
from mptqc.recipe import TensorKind

MakeModel = Callable[[], ir.Model]
ZOO = Path(__file__).parents[2] / "zoo"
BLOCKS = 4
OF_A_BLOCK = ("attention.scores", "proj.output", "norm2.input", "fc1.output", "fc2.output")


def sites(model: ir.Model) -> list[str]:
    return [tensor.site for tensor in find_tensors(model).found]


def vit_sites() -> set[str]:
    found = {f"block{block:02d}.{name}" for block in range(BLOCKS) for name in ("norm1.input", *OF_A_BLOCK)}
    return found | {"patch_embed.output", "head.norm.input"}


def swin_sites() -> set[str]:
    """The streams begin at the norm of the patches and at the merging Linear, which norm1 of blocks 0 and 2 read."""
    found = {f"block{block:02d}.{name}" for block in range(BLOCKS) for name in OF_A_BLOCK}
    found |= {"block01.norm1.input", "block03.norm1.input", "linear00.output", "norm00.output"}
    return found | {"linear01.norm.input", "linear01.output", "norm01.input", "norm01.output"}


@pytest.mark.parametrize(
    ("model", "expected", "outputs"),
    [
        ("vit", vit_sites(), {"head.output"}),
        ("deit", vit_sites(), {"head.output", "head.1.output", "head.1.sum"}),
        ("swin", swin_sites(), {"head.output"}),
    ],
)
def test_every_tensor_of_the_zoo_has_a_site(model: str, expected: set[str], outputs: set[str]) -> None:
    found = find_tensors(load_canonical(ZOO / f"{model}.onnx"))
    assert Counter(tensor.site for tensor in found.found) == Counter(expected)
    assert {refusal.site for refusal in found.refusals} == outputs
    assert all("only the model's output is computed from it" in refusal.reason for refusal in found.refusals)


def test_kinds_follow_from_what_reads_a_tensor() -> None:
    kinds = Counter(tensor.kind for tensor in find_tensors(load_canonical(ZOO / "vit.onnx")).found)
    assert kinds == {
        TensorKind.NORM_INPUT: 2 * BLOCKS + 1,
        TensorKind.SCORES: BLOCKS,
        TensorKind.GELU_INPUT: BLOCKS,
        TensorKind.PRODUCT_OUTPUT: 2 * BLOCKS + 1,
    }


@pytest.mark.parametrize("name", ["vit", "deit", "swin"])
def test_pruned_tokens_leave_every_site(name: str) -> None:
    model = load_canonical(ZOO / f"{name}.onnx")
    before = sites(model)
    PruneTokens(concrete_shapes(model))(model)
    assert sites(model) == before


def test_a_block_without_residuals(block: MakeModel) -> None:
    found = find_tensors(block())
    assert [(tensor.site, str(tensor.value.name)) for tensor in found.found] == [
        ("block00.attention.scores", "sm"),
        ("block00.fc1.output", "f"),
    ]
    assert [refusal.site for refusal in found.refusals] == ["block00.fc2.output"]


def test_a_tensor_that_is_an_output_too_is_refused(block: MakeModel) -> None:
    model = block()
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.name == "f"))
    found = find_tensors(model)
    assert [tensor.site for tensor in found.found] == ["block00.attention.scores"]
    assert found.refusals[0].site == "block00.fc1.output"
    assert "it is an output of the model" in found.refusals[0].reason


def test_an_operand_with_an_extra_reader_is_a_tensor(block: MakeModel) -> None:
    model = block()
    gelu = next(node for node in model.graph if is_op(node, "Gelu"))
    extra = ir.node("Add", [gelu.inputs[0], gelu.outputs[0]], outputs=[ir.val("extra")], name="extra")
    model.graph.insert_after(gelu, extra)
    fc2 = next(linear for linear in find_linears(model) if linear.site == "block00.fc2")
    fc2.matmul.replace_input_with(0, extra.outputs[0])
    found = find_tensors(model)
    assert [tensor.site for tensor in found.found] == ["block00.attention.scores", "block00.fc1.output"]
    assert "the output of Gelu is no tensor that is known" in found.refusals[0].reason


def test_a_sum_that_no_norm_reads_is_named_after_the_linear(block: MakeModel) -> None:
    model = block()
    fc1 = next(linear for linear in find_linears(model) if linear.site == "block00.fc1")
    source, o = model.graph.inputs[0], fc1.input
    added = ir.node("Add", [source, o], outputs=[ir.val("added")], name="added")
    model.graph.insert_before(fc1.matmul, added)
    doubled = ir.node("Add", [added.outputs[0], o], outputs=[ir.val("doubled")], name="doubled")
    model.graph.insert_before(fc1.matmul, doubled)
    fc1.matmul.replace_input_with(0, doubled.outputs[0])
    kinds = {tensor.site: tensor.kind for tensor in find_tensors(model).found}
    assert kinds["block00.proj.sum"] is TensorKind.SUM
    assert kinds["block00.proj.output"] is TensorKind.PRODUCT_OUTPUT


def test_tensors_of_one_name_are_numbered(block: MakeModel) -> None:
    model = block()
    fc1 = next(linear for linear in find_linears(model) if linear.site == "block00.fc1")
    value = fc1.input
    assert isinstance(model.graph, ir.Graph)
    constant = add_initializer(model.graph, "constant", np.ones(12, np.float32))
    for name in ("one", "two"):
        sums = ir.node("Add", [value, fc1.input], outputs=[ir.val(name)], name=name)
        model.graph.insert_before(fc1.matmul, sums)
        value = sums.outputs[0]
    last = ir.node("Mul", [value, constant], outputs=[ir.val("last")], name="last")
    model.graph.insert_before(fc1.matmul, last)
    fc1.matmul.replace_input_with(0, last.outputs[0])
    assert {"block00.proj.sum", "block00.proj.sum.1"} <= set(sites(model))
