"""What was found of one integer product, or of one quantized tensor, on one batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

EPSILON = 2.0**-23

Values: TypeAlias = Mapping[str, NDArray[np.generic]]
"""Values of a model on one batch, by name."""


@dataclass(frozen=True)
class SiteCheck:
    """One integer product, or one quantized tensor, on one batch.

    Attributes:
        site: site id.
        product: name of the product's node, or of the tensor's codes.
        code_mismatches: codes that are not the reference's, of `codes` compared; of an operator of `ai.mptqc`, outputs.
        codes: how many were compared.
        error: largest |output − reference|, in units of its own tolerance; at most 1 passes.
        fused: ONNX Runtime runs it as one operator (else as MatMulInteger and what follows: right, but slower).
    """

    site: str
    product: str
    code_mismatches: int
    codes: int
    error: float
    fused: bool
