"""A tiny ViT at stage smoothed with calibration images, and its problem of allocating bits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.bit_variables import BitVariable, find_variables
from mptqc.analysis.planner import plan_quantizers
from mptqc.analysis.sensitivity import Problem, make_problem
from mptqc.analysis.shapes import concrete_shapes
from mptqc.compiler import fold, load_canonical, marked, quantize, silent
from mptqc.data.arrays import Arrays, ArraySource
from mptqc.data.samples import Samples
from mptqc.graph.io import save_model
from mptqc.passes.base import STAGE_KEY
from mptqc.plan import QuantPlan
from mptqc.recipe import Recipe

SMALL = {"scoring_images": 12, "bit_limits": {"weight": (2, 4), "activation": (3, 4)}}
"""Recipe keys that leave few choices of bits."""


@dataclass(frozen=True)
class Bench:
    """A smoothed model, planned with all widths, and its scoring problem."""

    model: ir.Model
    shapes: dict[str, tuple[int, ...]]
    samples: Samples
    plan: QuantPlan
    variables: list[BitVariable]
    problem: Problem

    @property
    def start(self) -> tuple[int, ...]:
        """The most bits of every variable."""
        return tuple(variable.widths[-1] for variable in self.variables)


MakeBench = Callable[..., Bench]


@pytest.fixture(scope="session")
def bench(tiny_vit: Callable[..., ir.Model], tmp_path_factory: pytest.TempPathFactory) -> MakeBench:
    """bench(head="mean", batch="b", **recipe keys): the tiny ViT, ready for allocation; average 3.5 bits by default."""

    made: dict[str, Bench] = {}

    def make(head: str = "mean", batch: str = "b", **keys: object) -> Bench:
        name = f"{head} {batch} {sorted(keys.items())}"
        if name not in made:
            made[name] = build(name, head, batch, keys)
        return made[name]

    def build(name: str, head: str, batch: str, keys: dict[str, object]) -> Bench:
        path = Path(tmp_path_factory.mktemp("bench")) / "vit.onnx"
        model = tiny_vit(head, batch)
        model.metadata_props.pop(STAGE_KEY, None)
        save_model(model, path)
        model = load_canonical(path)
        recipe = Recipe.model_validate({"budget": {"average_bits": 3.5}, "seed": 1, **SMALL, **keys})
        empty = QuantPlan(model_digest="0", recipe=recipe)
        fold(model, empty)
        images = np.random.default_rng(0).standard_normal((12, 3, 8, 8)).astype(np.float32)
        samples = Samples(ArraySource(Arrays(images, None, "test"), None), range(12), None)
        shapes = concrete_shapes(model)
        plan = plan_quantizers(model, shapes, samples, empty, silent)
        variables = find_variables(model, shapes, recipe)
        problem = make_problem(marked(model), samples, plan, variables, quantize, name)
        return Bench(model, shapes, samples, plan, variables, problem)

    return make
