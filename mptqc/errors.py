"""The few errors that mptqc raises on purpose; each names what was wrong, where, and what to do."""


class MptqcError(Exception):
    """Base of every error that a user can mend; the command line prints it as one paragraph and exits with 2."""


class ModelError(MptqcError):
    """The ONNX model cannot be read, or is not one that mptqc compiles."""


class DataError(MptqcError):
    """Calibration or evaluation data is missing, unreadable or does not fit the model."""


class RecipeError(MptqcError):
    """A recipe, preset or option is unknown or out of range."""


class PlanError(MptqcError):
    """A plan does not fit the model, or was tampered with."""


class ProviderError(MptqcError):
    """An execution provider was asked for and is not there."""


class OutputError(MptqcError):
    """The result cannot be written."""


class RefusalError(MptqcError):
    """A graph has the shape a pass looks for, yet the rewrite would not be exact; says which node and why."""


class VerifyError(MptqcError):
    """A compiled model does not do what its plan says."""


class ExecutorError(MptqcError):
    """Workers cannot be reached, or were lost again and again."""


class BudgetError(MptqcError):
    """No choice of bits keeps the budget; says what the least is."""
