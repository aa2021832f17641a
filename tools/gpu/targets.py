"""What mptqc is to reach on a GPU of the H200's class, and what a check found of it."""

from collections.abc import Mapping, Sequence
from typing import Any

MODEL, LARGE, SMALL = "vit-b", 64, 1
LARGEST_PRODUCT = "8192 x 8192 x 8192"
LEAST_OVER_FLOAT16, LEAST_OVER_FLOAT32, LEAST_OVER_TORCH = 1.4, 3.0, 1.0
MOST_LATENCY, LEAST_OF_PEAK = 1.0, 0.55
VIT_B_PREFIX = "ViT-B"

Rows = Sequence[Mapping[str, Any]]


def targets(bench: Rows, products: Rows) -> list[dict[str, Any]]:
    """Rows of one target each; `reached` is None where its figures are missing."""
    large, small = times(bench, LARGE), times(bench, SMALL)
    ours, ours_small = large.get("mptqc"), best(small, "mptqc")
    over_torch = ratio(large.get("torch float16"), best(large, "mptqc"))
    share = least_share(products)
    return [
        target(f"ViT-B batch {LARGE}, throughput over float16", ratio(large.get("float16"), ours), LEAST_OVER_FLOAT16),
        target(f"ViT-B batch {LARGE}, throughput over float32", ratio(large.get("float32"), ours), LEAST_OVER_FLOAT32),
        target(f"ViT-B batch {LARGE}, throughput over torch's float16", over_torch, LEAST_OVER_TORCH),
        target(f"ViT-B batch {SMALL}, latency over float16", ratio(ours_small, best(small, "float16")), None),
        target("Linear at ViT-B's batch 64, of the fastest int8 product", share, LEAST_OF_PEAK),
    ]


def target(name: str, found: float | None, least: float | None) -> dict[str, Any]:
    """One row; without `least` the figure is to be at most MOST_LATENCY."""
    wanted = f"<= {MOST_LATENCY}" if least is None else f">= {least}"
    if found is None:
        return {"target": name, "wanted": wanted, "found": None, "reached": None}
    reached = found <= MOST_LATENCY if least is None else found >= least
    return {"target": name, "wanted": wanted, "found": round(found, 3), "reached": reached}


def times(bench: Rows, batch: int) -> dict[str, float]:
    """Median milliseconds of ViT-B by form."""
    found = [row for row in bench if row["model"] == MODEL and row["batch"] == batch and "median_ms" in row]
    return {row["form"]: row["median_ms"] for row in found}


def best(found: Mapping[str, float], form: str) -> float | None:
    """The least of a form's times, run from a CUDA graph or not."""
    return min((value for name, value in found.items() if name.split(",")[0] == form), default=None)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """A quotient, if both are known."""
    return None if numerator is None or denominator is None else numerator / denominator


def least_share(products: Rows) -> float | None:
    """The slowest of ViT-B's Linears at batch 64 over the fastest product of any kind."""
    fastest = max((row["cuBLASLt s8"] or 0.0 for row in products), default=0.0)
    shapes = [row for row in products if row["product"].startswith(VIT_B_PREFIX) and f"batch {LARGE}" in row["product"]]
    if not fastest or not shapes:
        return None
    return min(float(row["as chosen"]) for row in shapes) / fastest
