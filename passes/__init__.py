"""Passes: each edits an `onnx_ir.Model` and never runs it. One pass, one file, one frozen dataclass."""

if __name__ == "passes":
    raise ImportError(
        "import mptqc.passes, not the top-level folder passes/: two copies of a pass would not compare equal"
    )
