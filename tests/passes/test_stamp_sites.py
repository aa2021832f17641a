"""StampSites: ids follow the structure, not the exporter's names."""

import onnx_ir as ir
import pytest

from mptqc.analysis.shapes import concrete_shapes
from mptqc.graph.match import SITE_KEY, find_attentions, find_convolutions, find_linears, find_norms, site_of
from mptqc.passes.base import STAGE_KEY, Stage, StageError, stage_of
from mptqc.passes.fold_affine import FoldAffine
from mptqc.passes.separate_projections import SeparateProjections
from mptqc.passes.stamp_sites import StampSites, name_sites
from mptqc.passes.unfold_patches import UnfoldPatches


def canonical(model: ir.Model) -> ir.Model:
    for make in (UnfoldPatches, FoldAffine, SeparateProjections):
        make(concrete_shapes(model))(model)
    return model


def stamp(model: ir.Model) -> list[str]:
    """The sites in graph order."""
    StampSites(concrete_shapes(model))(model)
    return [site for node in model.graph if (site := site_of(node))]


BLOCK = ["norm1", "q", "k", "v", "attention", "proj", "norm2", "fc1", "fc2"]


def test_a_vit_of_two_blocks(tiny_vit):
    sites = stamp(canonical(tiny_vit()))
    expected = [f"block{block:02d}.{part}" for block in range(2) for part in BLOCK]
    assert sorted(sites) == sorted(["patch_embed", *expected, "head.norm", "head"])
    assert len(sites) == len(set(sites))


def test_every_matched_structure_has_a_site(tiny_vit):
    model = canonical(tiny_vit("distilled", blocks=3))
    stamp(model)
    for found in (find_linears(model), find_norms(model), find_attentions(model), find_convolutions(model)):
        assert all(one.site for one in found)


def test_a_fused_projection_is_qkv_and_a_conv_embeds_patches(tiny_vit):
    model = tiny_vit()
    FoldAffine(concrete_shapes(model))(model)
    sites = stamp(model)
    assert {"patch_embed", "block00.qkv", "block01.qkv"} <= set(sites)


def test_two_heads_are_numbered(tiny_vit):
    assert {"head", "head.1", "head.norm"} <= set(stamp(canonical(tiny_vit("distilled"))))


@pytest.mark.parametrize("head", ["mean", "dense"])
def test_a_head_behind_pooling_or_over_all_tokens(tiny_vit, head):
    assert "head" in stamp(canonical(tiny_vit(head)))


def test_names_do_not_depend_on_the_exporters(tiny_vit):
    model, renamed = canonical(tiny_vit()), canonical(tiny_vit())
    for number, node in enumerate(renamed.graph):
        node.name = f"n{number}"
    assert stamp(renamed) == stamp(model)


def test_two_runs_give_the_same_names(tiny_vit):
    model = canonical(tiny_vit())
    shapes = concrete_shapes(model)
    assert name_sites(model, shapes) == name_sites(model, shapes)


def test_naming_edits_nothing(tiny_vit):
    model = canonical(tiny_vit())
    text = ir.to_onnx_text(model)
    name_sites(model, concrete_shapes(model))
    assert ir.to_onnx_text(model) == text


def test_edits_are_the_stamped_nodes(tiny_vit):
    model = canonical(tiny_vit())
    result = StampSites(concrete_shapes(model))(model)
    assert result.edits == sum(SITE_KEY in node.metadata_props for node in model.graph) == 2 * len(BLOCK) + 3


def test_the_model_is_canonical_after_it(tiny_vit):
    model = canonical(tiny_vit())
    stamp(model)
    assert stage_of(model) is Stage.CANONICAL
    with pytest.raises(StageError, match="stamp-sites"):
        StampSites({})(model)


CONSTANTS = (
    "float[4,4] W = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] b = {1,2,3,4}, float[4] gamma = {1,1,1,1}, "
    "float[1,2,1,1] kernel = {1,2}"
)


def test_what_belongs_to_nothing_is_numbered(parse):
    body = (
        "r = Relu(x)\nm = MatMul(r, W)\nl = Add(m, b)\ns = Sigmoid(l)\nn = LayerNormalization<axis=-1>(s, gamma, b)\n"
        "t = Tanh(n)\nm2 = MatMul(t, W)\nl2 = Add(m2, b)\ny = Relu(l2)"
    )
    model = parse(f"g (float[n,3,4] x) => (float[n,3,4] y) <{CONSTANTS}> {{\n{body}\n}}")
    assert stamp(model) == ["linear00", "norm00", "linear01"]


def test_a_conv_inside_is_numbered(parse):
    body = "r = Relu(x)\nc = Conv(r, kernel)\ny = Relu(c)"
    model = parse(f"g (float[n,2,4,4] x) => (float[n,1,4,4] y) <{CONSTANTS}> {{\n{body}\n}}")
    assert stamp(model) == ["conv00"]


def test_an_mlp_without_attention_belongs_to_the_first_block(parse):
    body = "r = Relu(x)\nm = MatMul(r, W)\nl = Add(m, b)\ng = Gelu(l)\nm2 = MatMul(g, W)\nl2 = Add(m2, b)\ny = Relu(l2)"
    model = parse(f"g (float[n,3,4] x) => (float[n,3,4] y) <{CONSTANTS}> {{\n{body}\n}}")
    assert stamp(model) == ["block00.fc1", "block00.fc2"]


def test_stage_is_kept_in_the_metadata(tiny_vit):
    model = canonical(tiny_vit())
    stamp(model)
    assert model.metadata_props[STAGE_KEY] == "canonical"
