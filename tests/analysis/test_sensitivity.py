"""The simulation is the emitted model: the same outputs at any bits, whatever was run before."""

import pickle

import numpy as np
import onnx_ir as ir
import pytest

from mptqc.analysis.observe import with_outputs
from mptqc.analysis.sensitivity import Problem, Simulator, measure
from mptqc.analysis.widths import at_bits
from mptqc.compiler import emit
from mptqc.recipe import Loss
from mptqc.runtime.session import create_session

SEEDS = range(4)


def random_bits(variables, seed):
    random = np.random.default_rng(seed)
    return tuple(int(random.choice(variable.widths)) for variable in variables)


def emitted_outputs(made, bits):
    """What the compiled model gives for the scoring images."""
    model = ir.from_proto(ir.to_proto(made.model))
    named = {variable.name: number for variable, number in zip(made.variables, bits, strict=True)}
    emit(model, at_bits(made.plan, made.variables, named))
    session = create_session(with_outputs(model, made.problem.outputs), threads=1)
    batches = [session.run(None, {made.problem.image: images}) for images in made.problem.batches]
    return [np.concatenate(parts)[: made.problem.count] for parts in zip(*batches, strict=True)]


def relative_error(exact, found):
    error = exact.astype(np.float64) - found
    error -= error.mean(axis=1, keepdims=True)
    exact = exact - exact.mean(axis=1, keepdims=True, dtype=np.float64)
    return np.square(error).sum(axis=1) / np.square(exact).sum(axis=1).mean()


@pytest.mark.parametrize("coverage", ["partial", "full"])
@pytest.mark.parametrize("batch", ["b", "3"])
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_are_those_of_the_emitted_model(bench, batch, seed, coverage):
    made = bench(batch=batch, coverage=coverage)
    bits = random_bits(made.variables, seed)
    (found,) = emitted_outputs(made, bits)
    exact = np.concatenate([outputs[0] for outputs in made.problem.reference])[: made.problem.count]
    # The float parts are fused alike in segments and in the whole, so even the logits are equal bit for bit.
    assert np.array_equal(Simulator(made.problem).measure(made.start, bits).losses, relative_error(exact, found))


def test_changes_are_counted_from_the_state(bench):
    made = bench()
    state, bits = random_bits(made.variables, 0), random_bits(made.variables, 1)
    found = Simulator(made.problem).measure(state, bits)
    scale = np.concatenate([outputs[0] for outputs in made.problem.reference])[: made.problem.count]
    power = np.square(scale - scale.mean(axis=1, keepdims=True, dtype=np.float64)).sum(axis=1).mean()
    before, after = (emitted_outputs(made, one)[0].astype(np.float64) for one in (state, bits))
    error = before - after
    error -= error.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found.changes, np.square(error).sum(axis=1) / power, rtol=1e-12)


def test_nothing_depends_on_what_was_measured_before(bench):
    made = bench()
    used = Simulator(made.problem)
    states = [random_bits(made.variables, seed) for seed in SEEDS]
    for state in states:
        for bits in states:
            fresh = Simulator(made.problem).measure(state, bits)
            found = used.measure(state, bits)
            assert np.array_equal(found.losses, fresh.losses)
            assert np.array_equal(found.changes, fresh.changes)


def test_the_state_itself_changes_nothing(bench):
    made = bench()
    assert not Simulator(made.problem).measure(made.start, made.start).changes.any()


def test_divergence_is_of_the_softmax(bench):
    made = bench(loss="kl")
    assert made.problem.loss is Loss.KL
    bits = random_bits(made.variables, 0)
    exact = np.concatenate([outputs[0] for outputs in made.problem.reference])[: made.problem.count].astype(np.float64)
    (found,) = emitted_outputs(made, bits)
    p, q = (np.exp(one) / np.exp(one).sum(axis=1, keepdims=True) for one in (exact, found.astype(np.float64)))
    expected = (p * np.log(p / q)).sum(axis=1)
    np.testing.assert_allclose(Simulator(made.problem).measure(bits, bits).losses, expected, rtol=1e-9, atol=1e-15)


def test_hits_are_floats_answers_without_labels(bench):
    made = bench()
    (found,) = emitted_outputs(made, made.start)
    exact = np.concatenate([outputs[0] for outputs in made.problem.reference])[: made.problem.count]
    expected = found.argmax(axis=1) == exact.argmax(axis=1)
    assert np.array_equal(Simulator(made.problem).measure(made.start, made.start).hits, expected)


def test_a_dense_output_has_no_hits(bench):
    made = bench(head="dense", loss="kl")
    assert made.problem.loss is Loss.OUTPUT
    assert Simulator(made.problem).measure(made.start, made.start).accuracy is None


def test_a_problem_travels_to_other_processes(bench):
    made = bench()
    copy: Problem = pickle.loads(pickle.dumps(made.problem))
    bits = random_bits(made.variables, 0)
    expected = measure(made.problem, made.start, bits)
    assert np.array_equal(Simulator(copy).measure(made.start, bits).losses, expected.losses)
