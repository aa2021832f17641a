"""The zoo, opened and compiled once a session."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from mptqc.cli.progress import set_quiet
from mptqc.compiler import Compiled, compile_model
from mptqc.data.load import load_samples
from mptqc.data.preprocess_sources import load_preprocessing
from mptqc.data.samples import Samples
from mptqc.graph.io import save_model
from mptqc.plan import save_plan
from mptqc.recipe import make_recipe

ZOO = Path(__file__).parents[2] / "zoo"
QUICK_SAMPLES = 8  # calibration images where only the graph counts, not the accuracy


@dataclass(frozen=True)
class File:
    """A compiled model and where it was saved."""

    compiled: Compiled
    path: Path

    def save_plan(self, path: Path) -> None:
        """Write the plan and its arrays."""
        save_plan(self.compiled.plan, path)


OpenZoo = Callable[[str], Samples]


@pytest.fixture(autouse=True, scope="module")
def _global_options_end_with_the_module() -> Iterator[None]:
    """Commands set the log level and quietness of the process; give them back."""
    logger = logging.getLogger("mptqc")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
    set_quiet(False)


@pytest.fixture(scope="session")
def zoo_samples() -> OpenZoo:
    """zoo_samples("calibration" or "test"): images and labels, ready for the zoo's models."""

    def open_samples(name: str) -> Samples:
        return load_samples(
            ZOO / f"{name}.npz",
            input_name="images",
            input_shape=(None, 1, 28, 28),
            preprocessing=load_preprocessing(ZOO / "preprocess.json"),
        )

    return open_samples


class CompileZoo:
    """compile_zoo(model, preset, **recipe options): each set of arguments is compiled once."""

    # Options for tests of the graph, not of the accuracy: nothing is searched for long.
    quick = MappingProxyType(
        {
            "range_method": "min-max",
            "smoothing": False,
            "attention_folds": False,
            "opt_m": False,
            "compensation": False,
            "samples": QUICK_SAMPLES,
        }
    )

    def __init__(self, folder: Path, calibration: Samples) -> None:
        self._folder = folder
        self._calibration = calibration
        self._made: dict[tuple[object, ...], File] = {}

    def __call__(self, model: str, preset: str | None, **options: object) -> File:
        """Compile a zoo model."""
        key = (model, preset, repr(sorted(options.items())))
        if key not in self._made:
            recipe = make_recipe(preset, options=options)
            preprocess = load_preprocessing(ZOO / "preprocess.json").to_json()
            compiled = compile_model(ZOO / f"{model}.onnx", self._calibration, recipe, preprocess=preprocess)
            path = self._folder / f"{model}.{preset}.{len(self._made)}.onnx"
            save_model(compiled.model, path)
            self._made[key] = File(compiled, path)
        return self._made[key]


@pytest.fixture(scope="session")
def compile_zoo(tmp_path_factory: pytest.TempPathFactory, zoo_samples: OpenZoo) -> CompileZoo:
    """The zoo's models, compiled once a session for the same options."""
    return CompileZoo(tmp_path_factory.mktemp("compiled"), zoo_samples("calibration"))
