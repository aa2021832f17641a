from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptqc.errors import RecipeError
from mptqc.recipe import PRESETS, RangeMethod, Recipe, SiteOverride, make_recipe


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_bits_of_its_name(preset):
    recipe = make_recipe(preset)
    assert preset == f"w{recipe.weight_bits}a{recipe.activation_bits}"


def test_nothing_asked_for_gives_the_defaults():
    assert make_recipe() == Recipe()


def test_a_file_overrides_a_preset_and_an_option_overrides_the_file(tmp_path):
    path = toml(tmp_path, 'activation_bits = 6\nsamples = 8\nrange_method = "mse"\n')
    recipe = make_recipe("w4a4", path, {"samples": 16})
    assert (recipe.weight_bits, recipe.activation_bits, recipe.samples) == (4, 6, 16)
    assert recipe.range_method is RangeMethod.MSE


def test_an_option_of_none_was_not_given():
    assert make_recipe("w4a4", options={"weight_bits": None}).weight_bits == 4


def test_ends_keep_their_own_bits():
    recipe = make_recipe("w4a4")
    assert [recipe.bits_of(site) for site in ("patch_embed", "head", "head.1", "block00.fc1")] == [
        (8, 8),
        (8, 8),
        (8, 8),
        (4, 4),
    ]


def test_the_last_matching_override_wins(tmp_path):
    path = toml(
        tmp_path, '[sites."block*"]\nweight_bits = 6\nactivation_bits = 6\n[sites."*.fc2"]\nactivation_bits = 8\n'
    )
    recipe = make_recipe("w4a4", path)
    assert recipe.bits_of("block03.fc1") == (6, 6)
    assert recipe.bits_of("block03.fc2") == (6, 8)
    assert recipe.bits_of("head") == (8, 8)


def test_an_override_reaches_the_ends_too():
    recipe = Recipe(sites={"head*": SiteOverride(weight_bits=3)})
    assert recipe.bits_of("head") == (3, 8)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(RecipeError, match="'w1a1'") as caught:
        make_recipe("w1a1")
    assert all(preset in str(caught.value) for preset in PRESETS)


def test_an_unknown_key_names_the_known_ones():
    with pytest.raises(RecipeError, match="'weight_bit'") as caught:
        make_recipe(options={"weight_bit": 4})
    assert all(key in str(caught.value) for key in Recipe.model_fields)


def test_an_unknown_key_of_an_override_names_the_known_ones(tmp_path):
    with pytest.raises(RecipeError, match=r"sites\.head\.bits") as caught:
        make_recipe(path=toml(tmp_path, "[sites.head]\nbits = 4\n"))
    assert "weight_bits, activation_bits" in str(caught.value)
    assert "range_method" not in str(caught.value)


@given(
    st.integers().filter(lambda bits: not 2 <= bits <= 8),
    st.sampled_from(["weight_bits", "activation_bits", "end_bits"]),
)
def test_bits_out_of_range_are_named_with_the_limit(bits, key):
    with pytest.raises(RecipeError, match=rf"^{key} = {bits}: .* (2|8)$"):
        make_recipe(options={key: bits})


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("range_method", "median", "'min-max', 'percentile', 'mse' or 'output'"),
        ("target", "tpu", "'portable'"),
        ("samples", 0, "greater than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("alphas", [0.5, 1.5], "less than or equal to 1"),
        ("weight_bits", "four", "integer"),
    ],
)
def test_a_value_out_of_range_is_named(key, value, answer):
    with pytest.raises(RecipeError, match=key) as caught:
        make_recipe(options={key: value})
    assert answer in str(caught.value)


def test_every_mistake_is_named():
    with pytest.raises(RecipeError) as caught:
        make_recipe(options={"weight_bits": 9, "colour": "red"})
    assert "weight_bits" in str(caught.value)
    assert "colour" in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"absent\.toml: No such file"):
        make_recipe(path=tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"weight_bits = = 4", b"\xff\xfe\x00"])
def test_a_file_that_is_no_toml(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match="not TOML"):
        make_recipe(path=path)


def test_a_recipe_cannot_be_edited():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().weight_bits = 4


def test_a_budget_is_a_first_guess_of_bits_for_ends_too():
    recipe = make_recipe(options={"budget": {"average_bits": 4.4}, "sites": {"head": {"weight_bits": 6}}})
    assert recipe.bits_of("patch_embed") == recipe.bits_of("block00.fc1") == (4, 4)
    assert recipe.bits_of("head") == (6, 4)


def test_what_a_budget_leaves_free_keeps_its_bits():
    assert make_recipe("w4a8", options={"budget": {"average_weight_bits": 3}}).bits_of("block00.fc1") == (3, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {}}, "a budget needs a limit"),
        ({"budget": {"max_accuracy_drop": 0.1, "max_bytes": 9}}, "give no other limit"),
        ({"budget": {"average_bits": 1}}, r"budget\.average_bits = 1"),
        ({"budget": {"max_watts": 1}}, r"unknown recipe key 'budget\.max_watts'; the known ones are average_bits"),
        ({"bit_limits": {"weight": (6, 4)}}, r"bit_limits\.weight = \[6, 4\]"),
        ({"bit_limits": {"kinds": {"p": (6, 4)}}}, r"bit_limits\.p = \[6, 4\]"),
        (
            {"bit_limits": {"kinds": {"softmax": (4, 8)}}},
            "no activation is a .softmax.; known: input, q, k, p, v",
        ),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(options=options)


def test_a_recipe_with_a_budget_survives_json():
    recipe = make_recipe(options={"budget": {"max_bytes": 10**7}, "bit_limits": {"kinds": {"p": (4, 8)}}})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_an_effort_gives_way_to_single_options():
    assert make_recipe(effort="balanced").views == 4
    recipe = make_recipe("w4a4", options={"views": 2}, effort="balanced")
    assert (recipe.samples, recipe.views, recipe.weight_bits) == (512, 2, 4)


@pytest.mark.parametrize(("images", "views"), [(1, 4), (128, 4), (129, 3), (256, 2), (257, 1), (5000, 1)])
def test_many_images_get_fewer_views(images: int, views: int):
    assert make_recipe(effort="balanced").views_of(images) == views
    assert make_recipe(options={"views": 4}).views_of(images) == 4


def test_an_effort_gives_way_to_a_recipe_file(tmp_path: Path):
    path = tmp_path / "recipe.toml"
    path.write_text("samples = 7\n")
    assert make_recipe(path=path, effort="best").samples == 7


def test_an_unknown_effort_names_the_known_ones():
    with pytest.raises(RecipeError, match=r"unknown effort 'most'; the known ones are fast, balanced, best"):
        make_recipe(effort="most")
