"""Allocation on a tiny ViT: the budget is kept, the path is recorded, and neither executor nor interruption matters."""

import os
import signal
import threading

import numpy as np
import pytest

import mptqc.analysis.scoring as scoring
from mptqc.analysis.bit_variables import Kind
from mptqc.analysis.budget import average_of
from mptqc.analysis.mixed_precision import allocate, search_digest
from mptqc.analysis.widths import bits_of
from mptqc.compiler import emitted_bytes, marked, quantize, silent
from mptqc.errors import BudgetError, RecipeError
from mptqc.recipe import Recipe


def allocated(made, **options):
    return allocate(
        made.model, marked(made.model), made.shapes, made.samples, made.plan, quantize,
        lambda plan: emitted_bytes(made.model, plan), silent, **options,
    )  # fmt: skip


@pytest.mark.parametrize("allocator", ["greedy", "greedy-compensated", "greedy-in-place", "exact"])
def test_both_averages_are_kept_and_nearly_used(bench, allocator):
    if allocator == "exact":
        pytest.importorskip("scipy")
    made = bench(allocator=allocator)
    plan = allocated(made)
    bits = bits_of(plan, made.variables)
    for kind in Kind:
        assert 3.3 < average_of(plan.elements, bits, kind) <= 3.5


def test_greedy_compensated_measures_gptqs_codes_and_keeps_none_but_the_chosen(bench):
    made = bench(allocator="greedy-compensated")
    site = made.plan.layers[0].site
    trials = {key for key in made.plan.arrays if key.startswith(f"{site}/weight_codes/")}
    assert trials == {f"{site}/weight_codes/{bits}" for bits in (2, 3, 4)}
    plan = allocated(made)
    assert not any("/weight_codes/" in key for key in plan.arrays)
    for layer in plan.layers:
        chosen = made.plan.arrays[f"{layer.site}/weight_codes/{layer.weight_bits}"]
        assert np.array_equal(plan.arrays[f"{layer.site}/weight_codes"], chosen)
    assert f"{site}/weight_codes" not in allocated(bench()).arrays


@pytest.mark.parametrize("coverage", ["partial", "full"])
def test_the_plan_is_the_end_of_its_path(bench, coverage):
    made = bench(coverage=coverage)
    plan = allocated(made)
    assert plan.path is not None
    assert plan.path.bits_after(len(plan.path.steps)) == bits_of(plan, made.variables)
    assert plan.path.bits_after(0) == bits_of(made.plan, made.variables)
    assert plan.path.steps[-1].bytes == plan.path.end_bytes
    assert plan.path.steps[-1].loss is not None


def test_with_full_coverage_every_tensor_counts_and_is_lowered(bench):
    made = bench(coverage="full")
    plan = allocated(made)
    assert plan.tensors
    assert {f"{tensor.site}/tensor" for tensor in plan.tensors} <= plan.elements.keys()
    assert min(tensor.quantizer.bits for tensor in plan.tensors) < 4
    assert 3.3 < average_of(plan.elements, bits_of(plan, made.variables), Kind.ACTIVATION) <= 3.5


def test_patch_embedding_and_head_count_and_are_lowered(bench):
    plan = allocated(bench(budget={"average_weight_bits": 2.0}))
    ends = {layer.site: layer.weight_bits for layer in plan.layers if layer.site in ("patch_embed", "head")}
    assert ends == {"patch_embed": 2, "head": 2}
    assert {"patch_embed/weight", "patch_embed/input", "head/weight", "head/input"} <= plan.elements.keys()


def test_a_file_is_no_larger_than_asked(bench):
    made = bench()
    most = emitted_bytes(made.model, made.plan)
    limit = most - 60
    plan = allocated(bench(budget={"max_bytes": limit}))
    assert emitted_bytes(made.model, plan) <= limit


def test_bit_operations_are_kept(bench):
    made = bench(budget={"max_bops": 120_000})
    plan = allocated(made)
    bits = bits_of(plan, made.variables)
    assert len(set(bits.values())) > 1
    assert any(bits[f"{site}"] < 4 for site in bits)


def test_an_unattainable_budget_names_the_least(bench):
    with pytest.raises(BudgetError, match=r"average activation bits = 2\.5 cannot be kept: the least is 3 bits"):
        allocated(bench(budget={"average_activation_bits": 2.5}))
    with pytest.raises(BudgetError, match=r"max bytes = 10 cannot be kept: the least is \d+"):
        allocated(bench(budget={"max_bytes": 10}))


def test_the_accuracy_that_may_be_lost_is_not_exceeded(bench):
    made = bench(budget={"max_accuracy_drop": 0.5})
    plan = allocated(made)
    assert plan.path is not None
    last = plan.path.steps[-1]
    assert last.accuracy is not None
    assert last.accuracy >= 0.5
    assert {layer.input.bits for layer in plan.layers} == {8}


def test_accuracy_needs_classes(bench):
    with pytest.raises(BudgetError, match="needs a model whose first output is logits"):
        allocated(bench(head="dense", budget={"max_accuracy_drop": 0.1}))


def test_exact_refuses_costs_that_do_not_add_up(bench):
    with pytest.raises(RecipeError, match="costs that add up"):
        allocated(bench(allocator="exact", budget={"max_bops": 120_000}))


def test_processes_choose_the_same(bench):
    made = bench()
    assert allocated(made, executor="processes:2") == allocated(made)


def test_dask_chooses_the_same_with_a_worker_killed(bench):
    distributed = pytest.importorskip("distributed")
    made = bench(budget={"average_bits": 3.2})
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        victim = next(iter(cluster.workers.values())).process.pid
        steps = []

        def kill_midway(step, done, total):
            steps.append(done)
            if len(steps) == 2:
                threading.Timer(0.2, os.kill, (victim, signal.SIGKILL)).start()

        plan = allocate(
            made.model, marked(made.model), made.shapes, made.samples, made.plan, quantize,
            lambda plan: emitted_bytes(made.model, plan), kill_midway,
            executor=cluster.scheduler_address.replace("tcp", "dask"),
        )  # fmt: skip
        assert len(steps) > 2
    assert plan == allocated(made)


class Interruption(Exception):  # noqa: N818 - an event, no error
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("allocator", ["greedy", "greedy-in-place"])
def test_an_interrupted_search_goes_on(bench, tmp_path, monkeypatch, allocator):
    made = bench(allocator=allocator)
    measure, calls = scoring.measure, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 30:
            raise Interruption
        return measure(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "measure", stops)
        with pytest.raises(Interruption):
            allocated(made, checkpoint=tmp_path / "search")
    known = len((tmp_path / "search").read_text().splitlines()) - 1
    assert 0 < known < 30
    calls.clear()

    def counts(*arguments):
        calls.append(arguments)
        return measure(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(scoring, "measure", counts)
        resumed = allocated(made, checkpoint=tmp_path / "search")
        after = len(calls)
        calls.clear()
        assert allocated(made) == resumed
    assert after == len(calls) - known


def test_a_search_is_known_by_model_recipe_and_images(bench):
    made = bench()
    digest = search_digest(made.plan, made.samples)
    other_recipe = made.plan.model_copy(update={"recipe": Recipe()})
    other_model = made.plan.model_copy(update={"model_digest": "1"})
    digests = [
        search_digest(other_recipe, made.samples),
        search_digest(other_model, made.samples),
        search_digest(made.plan, made.samples.take(3, 0)),
    ]
    assert len({digest, *digests}) == 4


def test_compensation_does_not_change_the_size(bench):
    """So that a file keeps max_bytes after its weights were compensated."""
    made = bench()
    random = np.random.default_rng(0)
    arrays = {
        f"{layer.site}/weight_codes": random.integers(
            -2, 2, (made.plan.elements[f"{layer.site}/weight"],), np.int8
        ).reshape(-1, len(made.plan.arrays[f"{layer.site}/weight_scale"]))
        for layer in made.plan.layers
    }
    assert emitted_bytes(made.model, made.plan.with_arrays(arrays)) == emitted_bytes(made.model, made.plan)
