"""mptqc: compile float ONNX vision transformers to low-bit integer models for ONNX Runtime.

`mptqc.compile`, `mptqc.apply` and `mptqc.session` are the whole public interface; see their docstrings.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "apply", "compile", "session"]

if TYPE_CHECKING:
    from mptqc.api import apply, compile
    from mptqc.runtime.session import session


def __getattr__(name: str) -> Any:
    """Import the compiler on first use: `import mptqc` and the command line's help stay quick."""
    if name in ("apply", "compile"):
        from mptqc import api

        return getattr(api, name)
    if name == "session":
        from mptqc.runtime.session import session

        return session
    raise AttributeError(f"module 'mptqc' has no attribute {name!r}")
