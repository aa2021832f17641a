"""What this machine is, as far as it decides how integer products run."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

CPU_FEATURES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flags": ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16"),  # x86-64
        "Features": ("asimddp", "i8mm"),  # 64-bit ARM
    }
)
"""Instruction sets that decide the speed of integer products, by their field and names in /proc/cpuinfo."""

CPU_INFO = Path("/proc/cpuinfo")


def cpu_info(text: str | None = None) -> Mapping[str, str]:
    """Return the first processor's fields of /proc/cpuinfo (or of `text`); empty where there is none."""
    if text is None:
        text = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.is_file() else ""
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def cpu_features(info: Mapping[str, str]) -> Mapping[str, bool] | None:
    """Say which of its architecture's CPU_FEATURES the processor has; None where the system does not tell."""
    for field, names in CPU_FEATURES.items():
        if field in info:
            present = set(info[field].split())
            return {name: name in present for name in names}
    return None


def saturates_in_16_bits(features: Mapping[str, bool]) -> bool:
    """Tell whether ONNX Runtime's uint8 × int8 products add pairs in saturating 16 bits here: AVX2 without VNNI.

    Two products of 255 · 127 pass 32767, so codes of 8 bits may overflow; 255 · 64 · 2 = 32640 does not.
    """
    return features.get("avx2", False) and not (features["avx512_vnni"] or features["avx_vnni"])


def saturates_here() -> bool:
    """Tell it of this machine; False where the system does not tell the processor's features."""
    features = cpu_features(cpu_info())
    return features is not None and saturates_in_16_bits(features)


def processor_name(info: Mapping[str, str]) -> str:
    """Return the processor's model name, or its architecture where that is all that is known."""
    return info.get("model name") or platform.processor() or platform.machine()


def core_count() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
