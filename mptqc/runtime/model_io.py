"""What a session takes and gives: names, shapes, batch."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mptqc.errors import ModelError
from mptqc.runtime.session import Session

_FLOAT_TYPES = {"tensor(float)": np.dtype(np.float32)}


@dataclass(frozen=True)
class ModelInput:
    """A float32 input: its name, and its shape with None for dynamic dimensions."""

    name: str
    shape: tuple[int | None, ...]

    @property
    def fixed_batch(self) -> int | None:
        """The first dimension if it is static, else None."""
        return self.shape[0] if self.shape else None

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of an input [N, C, H, W] where both are static, else None."""
        if len(self.shape) != 4 or self.shape[2] is None or self.shape[3] is None:
            return None
        return self.shape[2], self.shape[3]


def model_inputs(session: Session) -> tuple[ModelInput, ...]:
    """Describe the inputs that a caller has to give.

    Raises:
        ModelError: one is not float32.
    """
    inputs = session.get_inputs()
    for value in inputs:
        if value.type not in _FLOAT_TYPES:
            raise ModelError(
                f"input {value.name!r} of the model is {value.type}; mptqc feeds float32 inputs, tensor(float), only."
            )
    return tuple(
        ModelInput(value.name, tuple(size if isinstance(size, int) else None for size in value.shape))
        for value in inputs
    )


def image_input(session: Session) -> ModelInput:
    """Describe the one input of a model that takes images.

    Raises:
        ModelError: it has none or several inputs, or the input is not float32.
    """
    inputs = model_inputs(session)
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise ModelError(f"the model has {len(inputs)} inputs ({names}); samples fit models with one image input.")
    return inputs[0]


def metadata(session: Session) -> dict[str, str]:
    """Return the model's metadata_props."""
    return dict(session.get_modelmeta().custom_metadata_map)


def run_batch(session: Session, value: ModelInput, images: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    """Run up to one fixed batch; a batch that is too short is padded with its last image, the padding's output dropped.

    Args:
        session: a session with one image input.
        value: that input, from `image_input`.
        images: float32 [B, C, H, W], B at most the model's fixed batch.

    Returns:
        The floating point outputs, in graph order, as float32.

    Raises:
        ModelError: an output's first dimension is not the batch although padding had to be dropped, or the images do
            not fit the input.
    """
    count = len(images)
    padding = 0 if value.fixed_batch is None else value.fixed_batch - count
    if padding:
        images = np.concatenate([images, np.repeat(images[-1:], padding, axis=0)])
    outputs = [np.asarray(output) for output in session.run(None, {value.name: images})]
    floats = [output.astype(np.float32, copy=False) for output in outputs if np.issubdtype(output.dtype, np.floating)]
    if not padding:
        return floats
    if any(output.ndim == 0 or len(output) != value.fixed_batch for output in floats):
        raise ModelError(
            f"the model takes batches of exactly {value.fixed_batch}, the last batch has {count} images, and its "
            "outputs do not lead with the batch, so padding cannot be dropped; use a multiple of the batch as --limit."
        )
    return [output[:count] for output in floats]
