"""What a pass is: a frozen dataclass of options with `call(model) -> PassResult`, applied between stages."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

import onnx_ir as ir

from mptqc.errors import MptqcError

logger = logging.getLogger(__name__)

STAGE_KEY = "mptqc.stage"


class Stage(StrEnum):
    """How far a model has come; kept in its metadata so that no pass runs twice or out of order."""

    RAW = "raw"
    CANONICAL = "canonical"
    NORMS_SMOOTHED = "norms-smoothed"
    SMOOTHED = "smoothed"
    QUANTIZED = "quantized"
    LOWERED = "lowered"


def stage_of(model: ir.Model) -> Stage:
    """Return the stage recorded in the model's metadata (`raw` for a model that mptqc has not touched).

    Raises:
        StageError: the metadata holds a stage that this version does not know.
    """
    recorded = model.metadata_props.get(STAGE_KEY, Stage.RAW)
    if recorded not in set(Stage):
        raise StageError(
            f"the model's metadata says {STAGE_KEY} = {recorded!r}; the known stages are {', '.join(Stage)}. "
            "Compile from the original float model"
        )
    return Stage(recorded)


class StageError(MptqcError):
    """A pass was applied to a model of the wrong stage."""


@dataclass(frozen=True)
class PassResult:
    """The edited model (the same object) and how many edits were made."""

    model: ir.Model
    edits: int

    @property
    def modified(self) -> bool:
        """True if at least one real edit was made."""
        return self.edits > 0


@dataclass(frozen=True)
class Pass(ABC):
    """An edit of the model, in place. Subclasses set `name`, and `requires`/`ensures` if they move between stages."""

    name: ClassVar[str]
    requires: ClassVar[tuple[Stage, ...]] = (Stage.RAW,)
    ensures: ClassVar[Stage | None] = None

    @abstractmethod
    def call(self, model: ir.Model) -> PassResult:
        """Edit `model` in place; find every site first, then edit."""

    def __call__(self, model: ir.Model) -> PassResult:
        """Check the stage, run `call`, record the new stage, log the number of edits.

        Raises:
            StageError: the model is at a stage that this pass does not take.
        """
        stage = stage_of(model)
        if stage not in self.requires:
            raise StageError(
                f"pass {self.name} takes a model at stage {' or '.join(self.requires)}, this one is at stage {stage}; "
                "compile from the original float model"
            )
        result = self.call(model)
        if self.ensures is not None:
            model.metadata_props[STAGE_KEY] = self.ensures
        logger.info("%s: %d edits", self.name, result.edits)
        return result


def run_passes(model: ir.Model, passes: Sequence[Pass]) -> ir.Model:
    """Apply the passes in order, in place."""
    for each in passes:
        each(model)
    return model
