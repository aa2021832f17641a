"""What this installation can run, what is missing, and how to get it."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import onnxruntime as ort
from onnx import TensorProto, helper

from mptqc import __version__
from mptqc.errors import ProviderError
from mptqc.runtime import cuda
from mptqc.runtime.library import HOW_TO_BUILD, chosen_isa, find_library, load_library
from mptqc.runtime.machine import core_count, cpu_features, cpu_info, processor_name, saturates_in_16_bits
from mptqc.runtime.session import PROVIDERS, create_session

PACKAGES = ("onnx", "onnx-ir", "onnxsim", "onnxruntime", "onnxruntime-gpu", "numpy", "torch", "onnxscript", "timm")
FLAVOURS = ("onnxruntime", "onnxruntime-gpu")
EXPORT_PACKAGES = ("torch", "onnxscript", "timm")

NO_KERNELS = "none: everything runs through standard ops"
NO_CUDA_KERNELS = "none"
BROKEN = "does not work"

SATURATION_WARNING = (
    "this processor has AVX2 without VNNI: ONNX Runtime adds pairs of uint8 x int8 products in saturating 16 bits. "
    "Models that mptqc compiles are exact here too, unless with --full-range; 8-bit models of other tools may not be. "
    "mptqc's kernels multiply weights of 6 bits faster than those of 8 here: --preset w6a8 --target cpu-native."
)


@dataclass(frozen=True)
class ProviderState:
    """Whether a provider is built into the installed onnxruntime, and whether it really starts; if not, why."""

    built_in: bool
    starts: bool
    reason: str | None


@dataclass(frozen=True)
class Missing:
    """Something absent, and the command that brings it."""

    what: str
    how: str


@dataclass(frozen=True)
class Diagnosis:
    """The report of `mptqc doctor`.

    `packages` maps a distribution to its version, None if it is not installed; `cpu_features` is None where the
    system does not tell.
    """

    mptqc: str
    python: str
    platform: str
    packages: Mapping[str, str | None]
    onnxruntime_flavour: str
    providers: Mapping[str, ProviderState]
    processor: str
    cores: int
    cpu_features: Mapping[str, bool] | None
    kernel_library: str
    cuda_kernel_library: str
    warnings: tuple[str, ...]
    missing: tuple[Missing, ...]


def diagnose() -> Diagnosis:
    """Look at the installation; starts a tiny session on every provider."""
    packages = {name: _installed_version(name) for name in PACKAGES}
    flavours = [name for name in FLAVOURS if packages[name]]
    info = cpu_info()
    features = cpu_features(info)
    kernels, cuda_kernels = _kernel_library(), _cuda_kernel_library()
    providers = {name: _provider_state(name) for name in PROVIDERS}
    return Diagnosis(
        mptqc=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        onnxruntime_flavour=" and ".join(flavours) or f"unknown build {ort.__version__}",
        providers=providers,
        processor=processor_name(info),
        cores=core_count(),
        cpu_features=features,
        kernel_library=kernels,
        cuda_kernel_library=cuda_kernels,
        warnings=_warnings(features, flavours),
        missing=_missing(packages, providers, kernels, cuda_kernels),
    )


def _warnings(features: Mapping[str, bool] | None, flavours: list[str]) -> tuple[str, ...]:
    warnings = []
    if features is not None and saturates_in_16_bits(features):
        warnings.append(SATURATION_WARNING)
    if len(flavours) > 1:
        warnings.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: pip uninstall both, "
            "then install one."
        )
    return tuple(warnings)


def _kernel_library() -> str:
    try:
        path = find_library()
        return NO_KERNELS if path is None else f"{path}, runs on {chosen_isa(load_library(path))}"
    except ProviderError as error:
        return f"{BROKEN}: {error}"


def _cuda_kernel_library() -> str:
    try:
        path = cuda.find_cuda_library()
        if path is None:
            return NO_CUDA_KERNELS
        devices = cuda.load_cuda_library(path).mptqc_cuda_device_count()
        return f"{path}, {devices or 'no'} CUDA device{'' if devices == 1 else 's'}"
    except ProviderError as error:
        return f"{BROKEN}: {error}"


def _missing(
    packages: Mapping[str, str | None], providers: Mapping[str, ProviderState], kernels: str, cuda_kernels: str
) -> tuple[Missing, ...]:
    missing = []
    if kernels == NO_KERNELS:
        missing.append(Missing("the kernel library (for models compiled for cpu-native)", HOW_TO_BUILD))
    elif kernels.startswith(BROKEN):
        missing.append(Missing("a kernel library that works (for models compiled for cpu-native)", "see above"))
    absent = [name for name in EXPORT_PACKAGES if packages[name] is None]
    if absent:
        missing.append(Missing(f"{', '.join(absent)} (for mptqc export)", "pip install 'mptqc[export]'"))
    provider = providers["cuda"]
    if not provider.built_in:
        missing.append(
            Missing("the CUDA provider", "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'")
        )
    elif not provider.starts:
        missing.append(
            Missing(
                "a CUDA provider that starts (for --provider cuda)",
                "an NVIDIA GPU and driver, and pip install 'onnxruntime-gpu[cuda,cudnn]'",
            )
        )
    elif cuda_kernels.startswith(BROKEN):
        missing.append(Missing("a CUDA kernel library that works (for models compiled for cuda)", "see above"))
    elif cuda_kernels == NO_CUDA_KERNELS:
        missing.append(Missing("the CUDA kernel library (for models compiled for cuda)", cuda.HOW_TO_BUILD))
    return tuple(missing)


def _provider_state(provider: str) -> ProviderState:
    built_in = PROVIDERS[provider] in ort.get_available_providers()
    try:
        create_session(_tiny_model(), provider=provider, threads=1)
    except ProviderError as error:
        return ProviderState(built_in, starts=False, reason=str(error))
    return ProviderState(built_in, starts=True, reason=None)


def _tiny_model() -> bytes:
    shape = [1]
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = model.SerializeToString()  # type: ignore[no-untyped-call] # protobuf has no types
    return serialized


def _installed_version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
