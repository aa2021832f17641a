"""tools/gpu_check.py as far as it goes without a GPU."""

import json
import sys
from pathlib import Path

import gpu_check
import pytest
from gpu import stages
from gpu.packing import INDEX, PackError, pack, unpack

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


def check(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> tuple[dict, str]:
    """The results and the Markdown of one call."""
    options = ["--rehearse", "--seconds", "0.01", "--work", str(folder / "work"), "--output", str(folder / "out")]
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options, *arguments])
    gpu_check.main()
    path = next((folder / "out").glob("*.json"))
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def test_a_rehearsal_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if find_library() is None:
        pytest.skip("the kernel library was not built: no C++17 compiler")
    results, text = check(monkeypatch, tmp_path, "--stages", "products,e2e,bench")
    found = results["stages"]
    assert found["products"]["outcome"] == "not whole: products are measured on a GPU only"
    assert found["e2e"]["outcome"] == "done"
    assert found["e2e"]["found"][0]["equal outputs"] == 1
    rows = found["bench"]["found"]
    assert len(rows) == 5 * 2
    assert [row["form"] for row in rows if "median_ms" in row] == [form for form in stages.FORMS for _ in range(2)]
    assert "| tiny | mptqc | " in text
    assert text.count("Missing: timm has no such model") == 2


def test_a_stage_that_fails_keeps_no_other_from_running(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(settings, report):
        report({"so far": 1})
        raise RuntimeError("the kernel is broken")

    def run(settings, report):
        report({"ran": 1})

    monkeypatch.setitem(stages.STAGES, "build", fail)
    monkeypatch.setitem(stages.STAGES, "e2e", run)
    results, text = check(monkeypatch, tmp_path, "--stages", "build,e2e")
    assert results["stages"]["build"] == {
        "outcome": "failed: RuntimeError: the kernel is broken",
        "found": [{"so far": 1}],
    }
    assert results["stages"]["e2e"] == {"outcome": "done", "found": [{"ran": 1}]}
    assert "## build: failed: RuntimeError: the kernel is broken" in text


def test_when_the_time_is_up_nothing_new_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    results, _ = check(monkeypatch, tmp_path, "--stages", "e2e,bench", "--minutes", "0")
    assert results["stages"]["e2e"]["outcome"] == "not whole: no time was left for tiny and what follows it"
    assert {row["left out"] for row in results["stages"]["bench"]["found"]} == {"no time was left"}


def test_stages_of_an_earlier_call_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    check(monkeypatch, tmp_path, "--stages", "products")
    results, _ = check(monkeypatch, tmp_path, "--stages", "e2e", "--minutes", "0")
    assert list(results["stages"]) == ["products", "e2e"]


def test_an_unknown_stage_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--stages", "build,fly"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "unknown fly; the stages are build, kernels, products, e2e, bench" in capsys.readouterr().err
