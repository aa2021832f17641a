import pytest

torch = pytest.importorskip("torch")

from mptqc.export.random_weights import NOISE, randomise_constant_parameters  # noqa: E402 - after importorskip

WIDTH = 400  # enough values that their standard deviation is near its expectation


def small_model() -> "torch.nn.Module":
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH))
    torch.nn.init.zeros_(model[1].bias)
    return model


def test_zero_bias_and_norm_are_randomised() -> None:
    model = small_model()
    assert randomise_constant_parameters(model, seed=0) == 3
    norm, linear = model
    for values, mean in ((norm.weight, 1.0), (norm.bias, 0.0), (linear.bias, 0.0)):
        # five standard errors of a mean, and of a standard deviation, of WIDTH normal values
        assert abs(values.mean().item() - mean) < 5 * NOISE / WIDTH**0.5
        assert abs(values.std().item() - NOISE) < 5 * NOISE / (2 * WIDTH) ** 0.5


def test_initialised_weight_is_left_alone() -> None:
    model = small_model()
    before = model[1].weight.clone()
    randomise_constant_parameters(model, seed=0)
    assert torch.equal(model[1].weight, before)


def test_second_run_changes_nothing() -> None:
    model = small_model()
    randomise_constant_parameters(model, seed=0)
    assert randomise_constant_parameters(model, seed=1) == 0


def test_seed_decides_the_values() -> None:
    biases = []
    for seed in (3, 3, 4):
        model = small_model()
        randomise_constant_parameters(model, seed)
        biases.append(model[1].bias)
    assert torch.equal(biases[0], biases[1])
    assert not torch.equal(biases[0], biases[2])


def test_global_generator_is_not_used() -> None:
    model = small_model()
    state = torch.random.get_rng_state()
    randomise_constant_parameters(model, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
