import json
import shutil

import imagenet
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from random_vit import VitShape, write_random_vit

from mptqc.data.preprocess import METADATA_KEY, Preprocessing
from mptqc.export import export_timm
from mptqc.export.packages import import_timm
from mptqc.export.timm_models import SUPPORTED_FAMILIES
from mptqc.runtime.session import create_session

WNIDS = ("n01440764", "n01443537", "n02007558")
TRAIN_IMAGES, VAL_IMAGES = 2, 4  # of each class
SIZE, GAIN = 16, 10
MINE = ("--models", "ViT-S", "--presets", "w4a4", "w8a8", "--samples", "4")
STEPS = Preprocessing(image_size=(SIZE, SIZE), resize=SIZE, crop="center", mean=(0.5,) * 3, std=(0.5,) * 3)


class StubExport:
    """Writes a tiny ViT with three classes for every name, and remembers the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, name, output, *, pretrained, seed):
        self.calls.append((name, pretrained, seed))
        write_random_vit(output, VitShape(image=SIZE, patch=8, width=16, depth=2, heads=2, classes=len(WNIDS)), seed)
        model = onnx.load(output)
        for value in model.graph.initializer:
            if "_w" in value.name:  # large weights, so that it tells pictures apart
                value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value) * np.float32(GAIN), value.name))
        model.metadata_props.add(key=METADATA_KEY, value=STEPS.to_json())
        onnx.save(model, output)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for part, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for wnid in WNIDS:
            (folder / part / wnid).mkdir(parents=True)
            for index in range(count):
                # Small blocks of few colours survive JPEG and give the model something to tell apart.
                pixels = generator.integers(0, 256, (4, 4, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
                Image.fromarray(pixels).save(folder / part / wnid / f"{wnid}_{index}.JPEG")
    return folder


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The lines of a results file of one model at two presets; tests go on from there."""
    results = tmp_path_factory.mktemp("finished") / "results.jsonl"
    imagenet.main(["--data", str(data), "--output", str(results), *MINE], StubExport())
    return results.read_bytes().splitlines(keepends=True)


@pytest.fixture
def run(data, tmp_path, capsys):
    """run(*options, export, data, output): the printed table; results go to run.results."""

    def run_tool(*options, export=None, data=data, output=tmp_path / "results.jsonl"):
        imagenet.main(["--data", str(data), "--output", str(output), *options], export or StubExport())
        return capsys.readouterr().out

    run_tool.results = tmp_path / "results.jsonl"
    return run_tool


def fails(run, capsys, *options, **others):
    with pytest.raises(SystemExit) as stopped:
        run(*options, **others)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def float_top1(data, model):
    """Share of the pictures in val/ whose class the model finds, computed without our loader."""
    session, hits = create_session(model, threads=1), []
    for label, wnid in enumerate(sorted(WNIDS)):
        for path in (data / "val" / wnid).iterdir():
            pixels = np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)
            (logits,) = session.run(None, {"images": (pixels / 255 - 0.5)[None] / 0.5})
            hits.append(logits.argmax() == label)
    return np.mean(hits)


def test_figures_and_their_table(run, finished, data, tmp_path):
    run.results.write_bytes(b"".join(finished))
    cells = {line["preset"]: line["evaluation"] for line in lines_of(run.results)}
    assert list(cells) == ["float32", "w4a4", "w8a8"]
    StubExport()("any", tmp_path / "float.onnx", pretrained=True, seed=0)
    assert cells["float32"]["top1"] == float_top1(data, tmp_path / "float.onnx")
    assert all(evaluation["images"] == len(WNIDS) * VAL_IMAGES for evaluation in cells.values())
    assert cells["w8a8"]["sqnr_db"] > cells["w4a4"]["sqnr_db"]
    top1 = [f"{100 * cells[preset]['top1']:.2f}" for preset in ("float32", "w8a8", "w4a4")]
    assert run(*MINE).strip().splitlines() == [
        "ImageNet, 4 calibration images, 12 test images; top-1 in %",
        "",
        "| | float32 | W8A8 | W4A4 |",
        "|--|--:|--:|--:|",
        f"| ViT-S | {' | '.join(top1)} |",
        "",
        imagenet.NOTES,
    ]


def test_limit_and_seed_reach_the_figures(run):
    export = StubExport()
    run("--models", "ViT-S", "--presets", "w8a8", "--samples", "4", "--limit", "5", "--seed", "7", export=export)
    assert export.calls == [(imagenet.MODELS["ViT-S"], True, 7)]
    assert [line["evaluation"]["images"] for line in lines_of(run.results)] == [5, 5]


def test_random_weights_give_nearness_to_float_and_no_accuracy(run):
    export = StubExport()
    table = run("--models", "ViT-S", "--presets", "w8a8", "--samples", "4", "--random-weights", export=export)
    assert export.calls == [(imagenet.MODELS["ViT-S"], False, 0)]
    (line,) = lines_of(run.results)
    assert table.strip().splitlines() == [
        "ImageNet, 4 calibration images, 12 test images; random weights, so no accuracy: SQNR against float in dB",
        "",
        "| | W8A8 |",
        "|--|--:|",
        f"| ViT-S | {line['evaluation']['sqnr_db']:.1f} |",
    ]


class Stopping(StubExport):
    """Ctrl-C before the model number `after`."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def __call__(self, *arguments, **options):
        if len(self.calls) == self.after:
            raise KeyboardInterrupt
        super().__call__(*arguments, **options)


def test_a_stopped_run_goes_on(run, capsys):
    options = ("--models", "DeiT-T", "ViT-S", "--presets", "w8a8", "--samples", "4")
    with pytest.raises(KeyboardInterrupt):
        run(*options, export=Stopping(after=1))
    assert "| DeiT-T |" in capsys.readouterr().out
    first = run.results.read_text(encoding="utf-8")
    export = StubExport()
    table = run(*options, export=export)
    assert [name for name, *_ in export.calls] == [imagenet.MODELS["ViT-S"]]
    assert run.results.read_text(encoding="utf-8").startswith(first)
    assert [(line["model"], line["preset"]) for line in lines_of(run.results)] == [
        (name, preset) for name in ("DeiT-T", "ViT-S") for preset in ("float32", "w8a8")
    ]
    assert table.index("| ViT-S |") < table.index("| DeiT-T |")
    assert run(*options, export=Stopping(after=0)) == table


@pytest.mark.parametrize("kept", [1, 40, -2])
def test_a_half_written_line_is_measured_again(run, finished, caplog, kept):
    half, *others = finished
    run.results.write_bytes(b"".join(others) + half[:kept])
    run(*MINE)
    assert "line 3 of" in caplog.text
    assert run.results.read_bytes() == b"".join(others) + half[:kept] + b"\n" + half
    run(*MINE, export=Stopping(after=0))


def test_a_line_that_lacks_but_its_end_counts(run, finished):
    run.results.write_bytes(b"".join(finished)[:-1])
    run(*MINE, export=Stopping(after=0))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--limit", "5"], "limit None (now 5)"),
        (["--samples", "5"], "samples 4 (now 5)"),
        (["--seed", "5"], "seed 0 (now 5)"),
        (["--random-weights"], "random_weights False (now True)"),
    ],
)
def test_other_options_need_another_file(run, finished, capsys, option, message):
    run.results.write_bytes(b"".join(finished))
    assert f"holds results of other conditions: {message}. Name another file" in fails(run, capsys, *MINE, *option)
    assert run.results.read_bytes() == b"".join(finished)


@pytest.mark.parametrize("content", ["notes of mine\n", '{"model": "ViT-S"}\n', "[1, 2]\n"])
def test_a_file_of_something_else_is_left_alone(run, capsys, content):
    run.results.write_text(content, encoding="utf-8")
    assert "line 1 of" in (error := fails(run, capsys))
    assert "is no result of this tool" in error
    assert run.results.read_text(encoding="utf-8") == content


def test_a_place_that_cannot_be_written_is_told_before_the_work(run, capsys, tmp_path):
    export = StubExport()
    error = fails(run, capsys, output=tmp_path / "missing/results.jsonl", export=export)
    assert "missing/results.jsonl cannot be written" in error
    assert export.calls == []


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_folder_is_named(run, capsys, tmp_path, missing):
    (tmp_path / {"train": "val", "val": "train"}[missing]).mkdir()
    error = fails(run, capsys, data=tmp_path)
    assert f"{tmp_path / missing} is no folder; --data takes one that holds train/ and val/" in error


@pytest.mark.parametrize("layout", ["flat", "two of three classes"])
def test_test_pictures_without_their_classes_are_refused(run, capsys, data, tmp_path, layout):
    shutil.copytree(data / "train", tmp_path / "train")
    for wnid in WNIDS[:2]:
        target = tmp_path / "val" / ("" if layout == "flat" else wnid)
        shutil.copytree(data / "val" / wnid, target, dirs_exist_ok=True)
    error = fails(run, capsys, "--models", "ViT-S", data=tmp_path)
    assert "does not give the class of each picture; ViT-S takes 3 sub-folders" in error


@pytest.mark.parametrize(("option", "known"), [("--presets", "w4a4"), ("--models", "Swin-B")])
def test_an_unknown_choice_is_answered_with_the_known_ones(run, capsys, option, known):
    error = fails(run, capsys, option, "w1a1")
    assert "invalid choice: 'w1a1'" in error
    assert known in error


def test_every_model_has_published_weights_that_the_exporter_takes():
    pytest.importorskip("torch")
    published = import_timm().list_pretrained()
    assert set(imagenet.MODELS.values()) <= set(published)
    assert all(name.startswith(SUPPORTED_FAMILIES) for name in imagenet.MODELS.values())


def test_the_real_exporter_is_the_default():
    assert imagenet.main.__defaults__ == (None, export_timm)
