"""Random weights that keep a model's whole graph alive through simplification."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NOISE = 0.1  # standard deviation of what is added to parameters that are all one value


def randomise_constant_parameters(model: "nn.Module", seed: int) -> int:
    """Add seeded normal noise to each parameter of `model` whose values are all equal; return how many there were.

    A fresh model has zero biases, LayerNorm γ = 1, β = 0 and a constant LayerScale. Simplifiers delete the additions
    of zero and the products with one, so an export with them is not the graph of a trained model.
    """
    import torch  # optional: only exporting needs it

    generator = torch.Generator().manual_seed(seed)
    changed = 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(NOISE * torch.randn(parameter.shape, generator=generator))
                changed += 1
    return changed
