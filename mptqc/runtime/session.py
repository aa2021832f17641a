"""The only maker of onnxruntime.InferenceSession: pinned options, checked providers.

Every option that can change a number is set here, and `options_as_text` lists them for `mptqc --verbose`.
"""

import contextlib
import ctypes
import io
import logging
import mmap
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError

from mptqc.errors import ModelError, ProviderError, RecipeError
from mptqc.reference.custom_ops import DOMAIN
from mptqc.runtime import cuda
from mptqc.runtime.library import HOW_TO_BUILD, chosen_isa, find_library, load_library

Session = ort.InferenceSession  # noqa: TID251 - made here only; other modules import this name for their types

logger = logging.getLogger(__name__)

PROVIDERS: Mapping[str, str] = MappingProxyType({"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"})

PROVIDER_KEY = "mptqc.provider"
"""Metadata of a model that was compiled for one provider: its name; other providers refuse the model."""

CONFIG_ENTRIES: Mapping[str, str] = MappingProxyType(
    {
        # By default (4) ONNX Runtime fuses a weight-only DequantizeLinear → MatMul into MatMulNBits and then quantizes
        # the float activations again: a silent relative error of 4e-3 to 2e-2.
        "session.qdq_matmulnbits_accuracy_level": "0",
        # Masks of −100 make denormals in softmax, which run 20 to 60 times slower. In ONNX Runtime this counts for the
        # first session of the process only, and then for its calling thread too.
        "session.set_denormal_as_zero": "1",
        # Threads of an idle session would otherwise spin and steal time from the next one.
        "session.force_spinning_stop": "1",
        # session.qdqisint8allowed stays unset: on x86 only uint8 × int8 products reach the integer hardware.
        # session.x64quantprecision stays unset too: services do not set it, and what is measured is what they run.
    }
)

CUDA_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "use_tf32": "0",  # TF32 keeps 10 bits of the mantissa: a float reference has to be float32
        "cudnn_conv_algo_search": "HEURISTIC",  # the default times the algorithms and may pick another one each time
    }
)

ERROR_SEVERITY = 3
FATAL_SEVERITY = 4
MAX_PROTOBUF_BYTES = 2**31 - 1
_ORT_ERROR_MODULE = "onnxruntime.capi.onnxruntime_pybind11_state"  # its exceptions share no base class but Exception


def create_session(
    model: bytes | str | Path,
    *,
    provider: str = "cpu",
    threads: int = 0,
    graph_optimization: bool = True,
    optimized_path: Path | None = None,
    profile_prefix: Path | None = None,
    keep_memory: bool = True,
    cuda_graph: bool = False,
) -> Session:
    """Make a session whose numbers depend on nothing but the model, its inputs and the named provider.

    Args:
        model: an ONNX file's path, or its bytes (under 2 GB, without external data).
        provider: "cpu" or "cuda"; the session never falls back from one to the other.
        threads: threads inside an operator; 0 lets ONNX Runtime take every core.
        graph_optimization: False runs the graph exactly as it is written.
        optimized_path: where ONNX Runtime writes the graph it really runs; its weights go to a file beside it.
        profile_prefix: how the file begins into which ONNX Runtime writes the time of every operator; `end_profiling`
            of the session closes it and returns its name.
        cuda_graph: whether a CUDA session captures its second run into a CUDA graph and replays that from then on: for
            inputs and outputs that are bound to the device and stay in place.
        keep_memory: whether the session holds on to the memory of its largest run; False where many live side by side.

    Raises:
        ProviderError: the provider is unknown, cannot start here or is not the one that the model was compiled for, or
            the kernel library does not work.
        ModelError: the model is missing, truncated, not ONNX, or ONNX Runtime cannot run it.
        RecipeError: threads is negative.
    """
    check_provider(provider)
    if threads < 0:
        raise RecipeError(f"threads is {threads}; give 0 (every core) or a positive number.")
    source, described = _model_source(model)
    options = _session_options(threads, graph_optimization, optimized_path)
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_prefix)
    options.enable_cpu_mem_arena = keep_memory
    if _names_custom_ops(source):
        _check_made_for(source, described, provider)
        _register_kernels(options, provider)
    if provider == "cuda":
        session = _create_cuda(source, described, options, cuda_graph=cuda_graph)
    else:
        session = _create(source, described, options, [PROVIDERS["cpu"]])
    if PROVIDERS[provider] not in session.get_providers():
        raise ProviderError(_not_started(provider))
    logger.info("session of %s: %s", described, options_as_text(provider=provider, threads=threads))
    return session


def session(path: str | Path, *, provider: str = "cpu", threads: int = 0) -> Session:
    """Open a compiled model with the options that mptqc measures and verifies it with.

    What widening its weights took is given back to the system, where that is Linux with glibc, which would keep it.
    """
    made = create_session(path, provider=provider, threads=threads)
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
    return made


def check_provider(provider: str) -> None:
    """Raise ProviderError unless `provider` is a name that mptqc runs models on ("cpu", "cuda")."""
    if provider in PROVIDERS:
        return
    if provider == "tensorrt":
        raise ProviderError(
            "provider 'tensorrt' is refused: TensorRT rebuilds quantized graphs by rules of its own, so what mptqc "
            "verified would not be what runs. Use one of: cpu, cuda."
        )
    raise ProviderError(f"unknown provider {provider!r}. Known providers: {', '.join(PROVIDERS)}.")


def options_as_text(*, provider: str = "cpu", threads: int = 0, graph_optimization: bool = True) -> str:
    """List every pinned session option as `name=value`, separated by commas."""
    pairs = {
        "onnxruntime": ort.__version__,
        "provider": PROVIDERS.get(provider, provider),
        "intra_op_num_threads": str(threads),
        "inter_op_num_threads": "1",
        "graph_optimization_level": "all" if graph_optimization else "none",
        "use_deterministic_compute": "1",
        **CONFIG_ENTRIES,
        **(CUDA_OPTIONS if provider == "cuda" else {}),
    }
    return ", ".join(f"{name}={value}" for name, value in pairs.items())


def _session_options(threads: int, graph_optimization: bool, optimized_path: Path | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERROR_SEVERITY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if graph_optimization else level.ORT_DISABLE_ALL
    for key, value in CONFIG_ENTRIES.items():
        options.add_session_config_entry(key, value)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized_path.name}.data"
        )
    return options


def _model_source(model: bytes | str | Path) -> tuple[bytes | str, str]:
    """Return what ONNX Runtime is given, and how a message names it."""
    if isinstance(model, bytes):
        if len(model) > MAX_PROTOBUF_BYTES:
            raise ModelError(
                f"a model of {len(model)} bytes in memory is over protobuf's limit of 2 GB; save it with external data "
                "and give the path."
            )
        if not model:
            raise ModelError("the model in memory is empty (0 bytes).")
        return model, "the model in memory"
    path = Path(model)
    if not path.is_file():
        kind = "is a folder, not an ONNX file" if path.is_dir() else "does not exist"
        raise ModelError(f"{path} {kind}; give the path of an .onnx file.")
    if path.stat().st_size == 0:
        raise ModelError(f"{path} is empty (0 bytes); it is not an ONNX file.")
    return str(path), str(path)


def _names_custom_ops(source: bytes | str) -> bool:
    """Whether the domain's name is anywhere in the model; a model that imports it must contain it."""
    name = DOMAIN.encode()
    if isinstance(source, bytes):
        return name in source
    with Path(source).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0


def _check_made_for(source: bytes | str, described: str, provider: str) -> None:
    try:
        model = (
            onnx.load_model_from_string(source)
            if isinstance(source, bytes)
            else onnx.load(source, load_external_data=False)
        )
    except DecodeError:
        return  # ONNX Runtime says what is wrong with it
    made_for = {entry.key: entry.value for entry in model.metadata_props}.get(PROVIDER_KEY, provider)
    if made_for != provider:
        raise ProviderError(
            f"{described} was compiled for provider {made_for!r} and is not run on {provider!r}: use --provider "
            f"{made_for}, or lower its portable file to another target (mptqc lower --target cpu-native)."
        )


def _register_kernels(options: ort.SessionOptions, provider: str) -> None:
    """Let ONNX Runtime load the provider's kernel library.

    Without that for the CPU, a model that needs it fails to load.
    """
    if provider == "cuda":
        _register_cuda_kernels(options)
        return
    library = find_library()
    if library is None:
        return
    logger.info("kernel library %s, instruction set %s", library, chosen_isa(load_library(library)))
    options.register_custom_ops_library(str(library))


def _register_cuda_kernels(options: ort.SessionOptions) -> None:
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise ProviderError(_not_started("cuda"))
    path = cuda.find_cuda_library()
    if path is None:
        raise ProviderError(f"the model needs mptqc's CUDA kernels, which are not there; {cuda.HOW_TO_BUILD}.")
    if not cuda.load_cuda_library(path).mptqc_cuda_device_count():
        raise ProviderError(_not_started("cuda"))
    logger.info("CUDA kernel library %s", path)
    options.register_custom_ops_library(str(path))


def _create(
    source: bytes | str,
    described: str,
    options: ort.SessionOptions,
    providers: list[str | tuple[str, dict[str, str]]],
) -> Session:
    try:
        # enable_fallback=0: without it a provider that fails to start is replaced by another one with a mere print.
        return Session(source, options, providers=providers, enable_fallback=0)
    except Exception as error:
        if type(error).__module__ != _ORT_ERROR_MODULE:
            raise
        raise ModelError(_load_failure(described, error)) from error


def _load_failure(described: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "INVALID_PROTOBUF" in text or "No graph was found" in text:
        return f"{described} is not an ONNX model, or it is truncated: ONNX Runtime cannot parse it ({text})."
    if DOMAIN in text and find_library() is None:
        return f"{described} uses the operators of {DOMAIN}, whose kernel library is not there; {HOW_TO_BUILD}."
    return f"ONNX Runtime {ort.__version__} cannot load {described}: {text}"


def _create_cuda(source: bytes | str, described: str, options: ort.SessionOptions, *, cuda_graph: bool) -> Session:
    """Start CUDA quietly: what ONNX Runtime would log on failure is told by the ProviderError instead."""
    if PROVIDERS["cuda"] not in ort.get_available_providers():
        raise ProviderError(_not_started("cuda"))
    _preload_cuda_libraries()
    ort.set_default_logger_severity(FATAL_SEVERITY)
    provider_options = {**CUDA_OPTIONS, **({"enable_cuda_graph": "1"} if cuda_graph else {})}
    try:
        # The CPU provider stays second: shape operators have no CUDA kernel.
        return _create(source, described, options, [(PROVIDERS["cuda"], provider_options), PROVIDERS["cpu"]])
    except (RuntimeError, ModelError) as error:
        if _names_custom_ops(source):
            if isinstance(error, ModelError):
                raise
            raise ModelError(_load_failure(described, error)) from error  # a CPU session has not these operators
        _create(source, described, options, [PROVIDERS["cpu"]])  # a broken model raises here; else CUDA is at fault
        raise ProviderError(f"{_not_started('cuda')} ONNX Runtime says: {' '.join(str(error).split())}") from error
    finally:
        ort.set_default_logger_severity(ERROR_SEVERITY)


def _preload_cuda_libraries() -> None:
    """Load CUDA and cuDNN from the nvidia wheels, if they are installed; ONNX Runtime prints what it misses."""
    preload = getattr(ort, "preload_dlls", None)
    if preload is None:
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        preload()
    for line in printed.getvalue().splitlines():
        logger.debug("preload_dlls: %s", line)


def _not_started(provider: str) -> str:
    available = ", ".join(ort.get_available_providers())
    name = PROVIDERS[provider]
    if name not in ort.get_available_providers():
        return (
            f"provider {provider!r} was asked for, but the installed onnxruntime {ort.__version__} is built without "
            f"{name} (it has: {available}). Install onnxruntime-gpu in place of onnxruntime, or use --provider cpu."
        )
    return (
        f"provider {provider!r} was asked for, but {name} does not start on this machine{_missing_cuda_library()}. "
        "It needs an NVIDIA GPU with its driver, and CUDA and cuDNN of the version that onnxruntime-gpu was built "
        "with: pip install 'onnxruntime-gpu[cuda,cudnn]'. Or use --provider cpu."
    )


def _missing_cuda_library() -> str:
    """Name the shared library that keeps the CUDA provider from loading, as ": NAME ..." or an empty string."""
    if not sys.platform.startswith("linux"):
        return ""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f": {error}"
    return ""


def run_arrays(
    session: Session, outputs: Sequence[str], feeds: Mapping[str, npt.NDArray[Any]]
) -> list[npt.NDArray[Any]]:
    """Run a session whose outputs are all tensors, and return those named, in order.

    Raises:
        ModelError: an output is no tensor, or ONNX Runtime fails on these inputs.
    """
    try:
        found = session.run(list(outputs), dict(feeds))
    except Exception as error:
        if type(error).__module__ != _ORT_ERROR_MODULE:
            raise
        given = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
        raise ModelError(
            f"ONNX Runtime {ort.__version__} cannot run the model on {given}: {' '.join(str(error).split())}"
        ) from error
    arrays = [value for value in found if isinstance(value, np.ndarray)]
    if len(arrays) != len(found):
        raise ModelError("an output of the model is a sequence or a map; only tensors can be compared")
    return arrays
