import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quantizers import THREE_REGIONS, opt_m

from mptqc.errors import OutputError, PlanError
from mptqc.plan import (
    AttentionFold,
    AttentionPlan,
    LayerPlan,
    MultiRegion,
    NormFold,
    QuantPlan,
    Refusal,
    TensorKind,
    TensorPlan,
    Uniform,
    load_plan,
    save_plan,
)
from mptqc.recipe import Recipe, SiteOverride

U8 = Uniform(bits=8, scale=0.25, zero_point=128)
LONG_TAIL = opt_m(bits=4, scale=0.1, zero_point=1, m=3, low_codes=10)


@pytest.fixture
def plan() -> QuantPlan:
    return QuantPlan(
        model_digest="abc",
        recipe=Recipe(weight_bits=4, sites={"head": SiteOverride(weight_bits=6)}),
        norm_folds=(NormFold(site="block00.norm1", alpha=0.7),),
        attention_folds=(AttentionFold(site="block00.attention"),),
        layers=(LayerPlan(site="block00.fc2", weight_bits=3, input=LONG_TAIL),),
        attentions=(AttentionPlan(site="block00.attention", q=U8, k=U8, p=LONG_TAIL, v=U8),),
        tensors=(
            TensorPlan(site="block00.norm1.input", kind=TensorKind.NORM_INPUT, quantizer=U8, exponents=True),
            TensorPlan(site="block00.attention.scores", kind=TensorKind.SCORES, quantizer=U8),
        ),
        refusals=(Refusal(site="block00.norm2", what="smoothing", reason="also read by ReduceMean"),),
        preprocess='{"size": 224}',
        arrays={
            "block00.norm1.input/exponents": np.array([0, 3], np.int8),
            "block00.norm1/scale": np.array([0.5, 2], np.float32),
            "block00.fc2/weight_codes": np.arange(-4, 4, dtype=np.int8).reshape(2, 4),
        },
    )


@pytest.fixture
def saved(plan: QuantPlan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    save_plan(plan, path)
    return path


def test_round_trip(plan, saved):
    loaded = load_plan(saved)
    assert loaded == plan
    assert isinstance(loaded.layers[0].input, MultiRegion)
    assert loaded.arrays["block00.fc2/weight_codes"].dtype == np.int8


@settings(max_examples=50)
@given(st.floats(1e-12, 1e12, allow_subnormal=False), st.integers(2, 8))
def test_scales_survive_the_text_exactly(scale, bits):
    quantizer = Uniform(bits=bits, scale=scale, zero_point=0)
    assert Uniform.model_validate_json(quantizer.model_dump_json()) == quantizer


def test_the_same_plan_gives_the_same_bytes(plan, saved, tmp_path):
    again = tmp_path / "again.json"
    reordered = QuantPlan(**{**dict(plan), "arrays": dict(reversed(plan.arrays.items()))})
    save_plan(reordered, again)
    assert again.read_bytes() == saved.read_bytes()
    assert again.with_suffix(".safetensors").read_bytes() == saved.with_suffix(".safetensors").read_bytes()


def test_plans_of_other_arrays_differ(plan):
    assert plan != plan.with_arrays({"block00.norm1/scale": np.array([0.5, 3], np.float32)})
    assert plan != plan.with_arrays({"block00.norm1/scale": np.array([[0.5, 2]], np.float32)})
    assert plan != plan.with_arrays({"more": np.zeros(1, np.float32)})


def test_plans_of_other_decisions_differ(plan):
    assert plan != plan.model_copy(update={"layers": ()})


def test_with_arrays_leaves_the_old_plan_alone(plan):
    plan.with_arrays({"more": np.zeros(1, np.float32)})
    assert "more" not in plan.arrays


def test_a_missing_array_is_named(plan):
    with pytest.raises(PlanError, match="'head/weight_scale'"):
        plan.array("head/weight_scale")


def test_an_array_of_another_shape_is_named(plan):
    with pytest.raises(PlanError, match=r"'block00\.norm1/scale' has shape \(2,\), the model needs \(3,\)"):
        plan.array("block00.norm1/scale", (3,))


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.nan, np.inf])
def test_scales_are_above_zero(plan, wrong):
    changed = plan.with_arrays({"s": np.array([1, wrong], np.float32)})
    with pytest.raises(PlanError, match="above zero"):
        changed.scales("s", (2,))


def test_two_regions_meet_on_the_coarse_grid():
    assert (LONG_TAIL.upper[0].codes, LONG_TAIL.splits, LONG_TAIL.top_code) == (6, (8,), 57)


def test_each_region_begins_where_the_one_below_ends():
    assert (THREE_REGIONS.splits, THREE_REGIONS.top_code) == ((4, 16), 2 + 4 + 6 * 2 + 3 * 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 1},
        {"bits": 9},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"scale": float("nan")},
        {"zero_point": 256},
        {"kind": "log"},
        {"offset": 1},
    ],
    ids=str,
)
def test_a_quantizer_out_of_range_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Uniform(**{"bits": 8, "scale": 1.0, "zero_point": 0, **fields})


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(saved, suffix):
    saved.with_suffix(suffix).unlink()
    with pytest.raises(PlanError, match=rf"plan\{suffix}: No such file"):
        load_plan(saved)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [(".json", b"{"), (".json", b"\xff"), (".json", b"[]"), (".json", b"{}"), (".safetensors", b"short")],
)
def test_a_damaged_file_is_named(saved, suffix, content):
    saved.with_suffix(suffix).write_bytes(content)
    with pytest.raises(PlanError, match="plan"):
        load_plan(saved)


def test_a_truncated_arrays_file(saved):
    beside = saved.with_suffix(".safetensors")
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(PlanError, match="plan"):
        load_plan(saved)


def test_arrays_of_another_plan(plan, saved, tmp_path):
    other = tmp_path / "other.json"
    save_plan(plan.with_arrays({"block00.norm1/scale": np.array([1, 2], np.float32)}), other)
    other.with_suffix(".safetensors").replace(saved.with_suffix(".safetensors"))
    with pytest.raises(PlanError, match=r"does not belong to plan\.json"):
        load_plan(saved)


@pytest.mark.parametrize(
    ("key", "value", "where"),
    [
        (
            "layers",
            [{"site": "a", "weight_bits": 1, "input": json.loads(U8.model_dump_json())}],
            "layers.0.weight_bits",
        ),
        ("format", 2, "format"),
        ("colour", "red", "colour"),
        ("recipe", {"weight_bits": 12}, "recipe.weight_bits"),
    ],
)
def test_an_edited_plan_is_refused_where_it_is_wrong(saved, key, value, where):
    content = json.loads(saved.read_text(encoding="utf-8"))
    saved.write_text(json.dumps({**content, key: value}), encoding="utf-8")
    with pytest.raises(PlanError, match=rf"not valid at {where}"):
        load_plan(saved)


def test_an_output_folder_that_is_missing(plan, tmp_path):
    with pytest.raises(OutputError, match=r"absent/plan\.json"):
        save_plan(plan, tmp_path / "absent" / "plan.json")


def test_a_failed_write_leaves_nothing(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.mkdir()
    with pytest.raises(OutputError):
        save_plan(plan, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["plan", "plan.safetensors", "plan.w4a4"])
def test_a_plan_is_called_json(plan, tmp_path, name):
    with pytest.raises(OutputError, match=r"\.json"):
        save_plan(plan, tmp_path / name)
    assert not list(tmp_path.iterdir())
