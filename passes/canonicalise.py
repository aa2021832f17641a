"""The canonical form: the passes that lead to it, in order."""

import onnx_ir as ir

from mptqc.passes.base import Pass, run_passes
from mptqc.passes.batch_first import BatchFirst
from mptqc.passes.canonicalise_linear import CanonicaliseLinear
from mptqc.passes.complete_layer_norm import CompleteLayerNorm
from mptqc.passes.convert_opset import ConvertOpset
from mptqc.passes.decompose_attention import DecomposeAttention
from mptqc.passes.eliminate_identity import EliminateIdentity
from mptqc.passes.fold_masks import FoldMasks
from mptqc.passes.freeze_shapes import FreezeShapes
from mptqc.passes.fuse_gelu import FuseGelu
from mptqc.passes.fuse_layer_norm import FuseLayerNorm
from mptqc.passes.infer_shapes import InferShapes
from mptqc.passes.lift_constants import LiftConstants
from mptqc.passes.narrow_doubles import NarrowDoubles
from mptqc.passes.normalise_softmax import NormaliseSoftmax
from mptqc.passes.simplify import Simplify
from mptqc.passes.unflatten_linear import UnflattenLinear
from mptqc.passes.unshare_weights import UnshareWeights

CANONICAL_PASSES: tuple[Pass, ...] = (
    ConvertOpset(),  # before the two that fold constants: they fold less at opset 13
    FreezeShapes(),
    FoldMasks(),
    Simplify(),
    LiftConstants(),
    InferShapes(),
    NarrowDoubles(),
    DecomposeAttention(),
    EliminateIdentity(),
    NormaliseSoftmax(),
    FuseLayerNorm(),
    CompleteLayerNorm(),
    FuseGelu(),
    CanonicaliseLinear(),
    UnflattenLinear(),
    UnshareWeights(),
    InferShapes(),
    BatchFirst(),
)


def canonicalise(model: ir.Model) -> ir.Model:
    """Bring a float model to the canonical form, in place; what it computes changes by rounding only.

    Raises:
        ModelError: an op cannot be brought to it, as each pass says.
    """
    return run_passes(model, CANONICAL_PASSES)
