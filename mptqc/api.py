"""The same from Python: `mptqc.compile(...)`, `mptqc.apply(...)`; paths in, a saveable result out."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mptqc.analysis.fidelity import POOREST, Fidelity
from mptqc.analysis.observe import Progress, fitting_batches
from mptqc.analysis.verify import VerifyReport, verify_compiled
from mptqc.compiler import Compiled, apply_plan, compile_model, lower_compiled, silent
from mptqc.data.load import fit_preprocessing, load_samples
from mptqc.data.preprocess import Preprocessing
from mptqc.data.preprocess_sources import choose_preprocessing
from mptqc.data.samples import Samples
from mptqc.errors import OutputError, RecipeError
from mptqc.graph.io import load_model, save_model
from mptqc.plan import QuantPlan, load_plan, save_plan
from mptqc.recipe import Effort, Target, make_recipe
from mptqc.runtime.library import HOW_TO_BUILD, find_library

logger = logging.getLogger(__name__)

LOWER_TARGETS = tuple(target.value for target in Target if target is not Target.PORTABLE)


@dataclass(frozen=True)
class CompileReport:
    """What is known of a compiled model.

    Attributes:
        fidelity: SQNR against float on calibration images, in all and per Linear; None after `apply`.
        checks: integer execution and equality with the numpy reference; None if not verified.
    """

    fidelity: Fidelity | None
    checks: VerifyReport | None

    def summary(self) -> str:
        """A few lines for people."""
        lines = []
        if self.checks is not None:
            lines.append(
                f"verified: {self.checks.integer_products} products run in integers, {self.checks.float_products} in "
                f"floats{self._tensors()}; all equal the numpy reference"
            )
        if self.fidelity is not None and self.fidelity.sqnr_db is not None:
            poorest = ", ".join(f"{site} {rate:.1f} dB" for site, rate in self.fidelity.sites[:POOREST])
            lines.append(
                f"SQNR against float on {self.fidelity.images} calibration images: {self.fidelity.sqnr_db:.1f} dB; "
                f"poorest Linears: {poorest}"
            )
        return "\n".join(lines)

    def _tensors(self) -> str:
        count = 0 if self.checks is None else len(self.checks.tensors)
        return f"; {count} tensors between them are quantized too" if count else ""


@dataclass(frozen=True)
class CompileResult:
    """What `compile` gives: the integer model, the plan that rebuilds it, and what was found out about it."""

    model: ir.Model
    plan: QuantPlan
    report: CompileReport

    def save(self, path: str | Path, plan_path: str | Path | None = None) -> None:
        """Write the model, and the plan (with its .safetensors beside it) if a path is given.

        Raises:
            OutputError: a path cannot be written.
        """
        save_model(self.model, path)
        if plan_path is not None:
            save_plan(self.plan, Path(plan_path))


def compile(
    model: str | Path,
    calibration: str | Path,
    *,
    preset: str | None = None,
    effort: str = Effort.BALANCED,
    recipe: str | Path | None = None,
    preprocess: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    convert_fp16: bool = False,
    options: dict[str, Any] | None = None,
    executor: str = "in-process",
    checkpoint: str | Path | None = None,
    verify: bool = True,
    report: Progress = silent,
) -> CompileResult:
    """Compile a float ONNX vision transformer into one that runs in integers.

    Args:
        model: the float ONNX file.
        calibration: a folder of images, an .npz (`images` or the input's name) or an .npy.
        preset: "w8a8", "w6a6", "w4a4", …; see `mptqc.recipe.PRESETS`.
        effort: "fast", "balanced" or "best": how many images, and views of them; see `mptqc.recipe.EFFORTS`.
        recipe: a TOML file of `mptqc.recipe.Recipe` keys; wins over effort and preset.
        preprocess: preset name or JSON file of the preprocessing; mean, std: as flags. Default: the model's metadata.
        mean: per channel, of pixels scaled to 0..1.
        std: per channel, likewise.
        convert_fp16: accept a float16 model and convert it to float32.
        options: single `Recipe` fields, which win over preset and file.
        executor: where a search for bits measures: in-process, processes:N or dask://host:port; the same result.
        checkpoint: a file from which an interrupted search for bits goes on.
        verify: load the result in ONNX Runtime and check it against the numpy reference.
        report: called with (step, done, total).

    Raises:
        MptqcError: one of its kinds, naming what was wrong, where and what to do.
    """
    chosen = make_recipe(preset, None if recipe is None else Path(recipe), options, effort)
    path = Path(model)
    samples, preprocessing = open_samples(path, calibration, preprocess, mean, std, convert_fp16=convert_fp16)
    as_json = None if preprocessing is None else preprocessing.to_json()
    compiled = compile_model(
        path,
        samples,
        chosen,
        preprocess=as_json,
        convert_fp16=convert_fp16,
        executor=executor,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        report=report,
    )
    return _checked(compiled, samples, verify=verify, report=report)


def apply(
    model: str | Path,
    plan: str | Path,
    *,
    convert_fp16: bool = False,
    at: float | None = None,
    calibration: str | Path | None = None,
    preprocess: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    report: Progress = silent,
) -> CompileResult:
    """Rebuild a compiled model from the float model and its plan, byte for byte, with no data.

    Args:
        model: the float ONNX file.
        plan: the plan's .json.
        convert_fp16: as it was given to `compile`.
        at: average bits: emit this point of the plan's path instead. Its weights are rounded at searched scales, since
            only the compiled point was compensated, unless `calibration` is given.
        calibration: images to compensate that point with; preprocess, mean, std: theirs, as for `compile`.
        preprocess: see `calibration`.
        mean: see `calibration`.
        std: see `calibration`.
        report: called with (step, done, total).

    Raises:
        PlanError: the plan is damaged, was made for another model, or has no such point.
    """
    path, samples = Path(model), None
    if calibration is not None:
        if at is None:
            raise RecipeError("calibration images are for another point of the path: give `at` (--at) too")
        samples, _ = open_samples(path, calibration, preprocess, mean, std, convert_fp16=convert_fp16)
    loaded = load_plan(Path(plan))
    compiled = apply_plan(path, loaded, convert_fp16=convert_fp16, at=at, samples=samples, report=report)
    return CompileResult(compiled.model, compiled.plan, CompileReport(None, None))


def lower(model: str | Path, *, target: str = Target.CPU_NATIVE, float16: bool = True) -> CompileResult:
    """Write a compiled portable file with the operators of another target; needs neither the float model nor data.

    Raises:
        ModelError: not a file that mptqc compiled.
        StageError: it is lowered already.
        RecipeError: no such target, or "portable".
    """
    if target not in LOWER_TARGETS:
        raise RecipeError(
            f"a compiled file cannot be lowered to {target!r}; the targets are {', '.join(LOWER_TARGETS)}"
        )
    compiled = lower_compiled(Path(model), Target(target), float16=float16)
    return CompileResult(compiled.model, compiled.plan, CompileReport(None, None))


def open_samples(
    model: Path,
    source: str | Path,
    preprocess: str | None,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    *,
    convert_fp16: bool = False,
) -> tuple[Samples, Preprocessing | None]:
    """Open images for a float model's input, with the preprocessing chosen from flags or the model's metadata.

    Raises:
        ModelError: the model cannot be read; DataError: the images do not fit.
    """
    loaded = load_model(model, convert_fp16=convert_fp16)
    graph_input = loaded.graph.inputs[0]
    dims = () if graph_input.shape is None else tuple(graph_input.shape)
    shape = [dim if isinstance(dim, int) else None for dim in dims]
    size = (shape[2], shape[3]) if len(shape) == 4 and shape[2] is not None and shape[3] is not None else None
    chosen = choose_preprocessing(
        source=preprocess, mean=mean, std=std, metadata=loaded.metadata_props, image_size=size
    )
    samples = load_samples(source, input_name=str(graph_input.name), input_shape=shape, preprocessing=chosen)
    return samples, None if chosen is None else fit_preprocessing(chosen, shape)


def check_output(path: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        OutputError: the folder does not exist or is not writable.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of the .onnx file to write")
    try:
        probe = path.with_name(f".{path.name}.probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; choose another place") from error


def _checked(compiled: Compiled, samples: Samples, *, verify: bool, report: Progress) -> CompileResult:
    if verify and compiled.plan.recipe.target.is_native and find_library() is None:
        logger.warning("not verified: the kernel library is not there to run the model with; %s", HOW_TO_BUILD)
        verify = False
    if verify and compiled.plan.recipe.target is Target.TENSORRT:
        logger.warning("not verified: a model for TensorRT is checked as ONNX only, and was never run there")
        verify = False
    if not verify:
        return CompileResult(compiled.model, compiled.plan, CompileReport(compiled.fidelity, None))
    report("verify", 0, 1)
    batch = next(fitting_batches(compiled.model, samples, 1))
    found = verify_compiled(compiled.model, compiled.plan, batch)
    report("verify", 1, 1)
    return CompileResult(compiled.model, compiled.plan, CompileReport(compiled.fidelity, found))
