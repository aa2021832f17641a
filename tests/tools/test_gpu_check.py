"""tools/gpu_check.py as far as it goes without a GPU."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_check
import numpy as np
import pytest
from gpu import stages
from gpu.packing import INDEX, PackError, pack, unpack
from gpu.targets import targets

from mptqc.runtime import session
from mptqc.runtime.library import find_library


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    (tmp_path / "a.whl").write_bytes(bytes(range(250)))
    (tmp_path / "b.whl").write_bytes(b"b")
    pack([tmp_path / "a.whl", tmp_path / "b.whl"], tmp_path / "parts", part_bytes=100)
    return tmp_path / "parts"


def test_parts_are_small_and_come_together_again(packed: Path, tmp_path: Path):
    assert sorted(part.name for part in packed.iterdir()) == ["a.whl.00", "a.whl.01", "a.whl.02", "b.whl.00", INDEX]
    assert max(part.stat().st_size for part in packed.glob("*.whl.*")) == 100
    whole, awaited = unpack(packed, tmp_path / "out")
    assert awaited == []
    assert [file.read_bytes() for file in whole] == [bytes(range(250)), b"b"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.whl", "b.whl"]


def test_parts_may_come_over_several_calls(packed: Path, tmp_path: Path):
    later = (packed / "a.whl.01").read_bytes()
    (packed / "a.whl.01").unlink()
    whole, awaited = unpack(packed, tmp_path / "out")
    assert ([file.name for file in whole], awaited) == (["b.whl"], ["a.whl.01"])
    for part in packed.glob("*.whl.*"):
        part.unlink()
    (packed / "a.whl.01").write_bytes(later)
    whole, awaited = unpack(packed, tmp_path / "out")
    assert ([file.name for file in whole], awaited) == (["a.whl", "b.whl"], [])
    assert whole[0].read_bytes() == bytes(range(250))


def test_a_damaged_part_is_told(packed: Path, tmp_path: Path):
    (packed / "a.whl.01").write_bytes(b"x" * 100)
    with pytest.raises(PackError, match=r"a\.whl is not what was packed"):
        unpack(packed, tmp_path / "out")


def test_parts_without_an_index_are_told(tmp_path: Path):
    with pytest.raises(PackError, match="has no index"):
        unpack(tmp_path, tmp_path / "out")


Check = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, emulated_library: Path, tmp_path: Path) -> Check:
    """check(arguments): the results and the Markdown of one call."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/libmptqc_emulated.so").symlink_to(emulated_library)

    def call(*arguments: str) -> tuple[dict[str, Any], str]:
        folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--rehearse", "--seconds", "0.01", *folders, *arguments])
        gpu_check.main()
        path = next((tmp_path / "out").glob("*.json"))
        return json.loads(path.read_text()), path.with_suffix(".md").read_text()

    return call


def test_a_rehearsal_runs_every_stage_on_an_emulated_gpu(check: Check):
    if find_library() is None:
        pytest.skip("no C++17 compiler")
    before = session.PROVIDERS
    results, text = check("--stages", "kernels,products,chain,e2e,bench")
    assert session.PROVIDERS is before
    found = results["stages"]
    assert re.match(r"\d\d passed", found["kernels"]["found"][0]["result"])
    assert {"as chosen", "as chosen, GELU", "64x64", "128x128, GELU"} < set(found["products"]["found"][0])
    assert "there is nothing to compare with" in found["products"]["outcome"]
    assert [row["batch"] for row in found["chain"]["found"]] == [1, 2]
    assert all(row["blocks, ms"] > 0 and row["fc2, us"] > 0 for row in found["chain"]["found"])
    assert found["e2e"]["outcome"] == "done"
    assert found["e2e"]["found"][0]["mptqc float32, dB to the CPU"] > 60
    rows = found["bench"]["found"]
    timed = [form for form in stages.TIMED_FORMS if form != stages.TORCH_FORM]
    assert [row["form"] for row in rows if "median_ms" in row] == [form for form in timed for _ in range(2)]
    assert "| tiny | mptqc, CUDA graph | " in text
    assert text.count("Missing: timm has no such model") == 2
    assert results["machine"]["gpu"] == "rehearsal"


def test_outputs_that_are_no_numbers_do_not_agree():
    expected = np.ones((2, 3))
    assert stages.agreement(expected, expected) > 100
    assert np.isnan(stages.agreement(np.full((2, 3), np.nan), expected))
    assert np.isnan(stages.agreement(expected, 0 * expected))


def test_targets_are_held_against_what_was_found():
    def timed(form: str, batch: int, milliseconds: float) -> dict[str, object]:
        return {"model": "vit-b", "form": form, "batch": batch, "median_ms": milliseconds}

    bench = [
        timed("float32", 64, 30.0), timed("float16", 64, 9.0), timed("mptqc", 64, 6.0), timed("mptqc", 1, 1.5),
        timed("mptqc, CUDA graph", 1, 0.9), timed("float16", 1, 1.0), timed("float16, CUDA graph", 1, 0.8),
        timed("torch float16", 64, 4.8),
        {"model": "vit-b", "form": "stock QDQ", "batch": 64, "failed": "no memory"},
        {**timed("mptqc", 64, 1.0), "model": "vit-s"},
    ]  # fmt: skip
    products = [
        {"product": "8192 x 8192 x 8192", "cuBLASLt s8": 1000.0, "as chosen": 700.0},
        {"product": "ViT-B fc1, batch 64", "cuBLASLt s8": 800.0, "as chosen": 540.0},
        {"product": "ViT-B fc2, batch 64", "cuBLASLt s8": None, "as chosen": 600.0},
        {"product": "ViT-B fc1, batch 1", "cuBLASLt s8": 90.0, "as chosen": 10.0},
    ]
    rows = targets(bench, products)
    assert [(row["found"], row["reached"]) for row in rows] == [
        (1.5, True), (5.0, True), (0.8, False), (1.125, False), (0.54, False)
    ]  # fmt: skip
    assert [row["reached"] for row in targets([], [])] == [None] * 5


def test_a_stage_that_fails_keeps_no_other_from_running(monkeypatch: pytest.MonkeyPatch, check: Check):
    def fail(settings, report):
        report({"so far": 1})
        raise RuntimeError("the kernel is broken")

    def run(settings, report):
        report({"ran": 1})

    monkeypatch.setitem(stages.STAGES, "build", fail)
    monkeypatch.setitem(stages.STAGES, "e2e", run)
    results, text = check("--stages", "build,e2e")
    assert results["stages"]["build"] == {
        "outcome": "failed: RuntimeError: the kernel is broken",
        "found": [{"so far": 1}],
    }
    assert results["stages"]["e2e"] == {"outcome": "done", "found": [{"ran": 1}]}
    assert "## build: failed: RuntimeError: the kernel is broken" in text


def test_when_the_time_is_up_nothing_new_is_begun(check: Check):
    results, _ = check("--stages", "e2e,bench", "--minutes", "0")
    assert results["stages"]["e2e"]["outcome"] == "not whole: no time was left for tiny and what follows it"
    assert {row["left out"] for row in results["stages"]["bench"]["found"]} == {"no time was left"}


def test_stages_of_an_earlier_call_are_kept(check: Check):
    check("--stages", "products")
    results, _ = check("--stages", "e2e", "--minutes", "0")
    assert list(results["stages"]) == ["products", "e2e"]


def test_an_unknown_stage_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--stages", "build,fly"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "unknown fly; the stages are build, kernels, products, chain, e2e, bench" in capsys.readouterr().err
