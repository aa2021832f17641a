import sys
from types import MappingProxyType

import bench_models
import pytest

pytest.importorskip("torch")


def test_a_model_is_made_once_and_gets_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_models, "TIMM", MappingProxyType({"tiny": ("vit_tiny_patch16_224", 32)}))
    monkeypatch.setattr(
        sys, "argv", ["bench_models.py", "--models", "tiny", "--seconds", "0", "--output", str(tmp_path)]
    )
    bench_models.main()
    made = (tmp_path / "tiny.w8a8.onnx").stat().st_mtime_ns
    bench_models.main()
    assert (tmp_path / "tiny.w8a8.onnx").stat().st_mtime_ns == made
    heading, rule, line, blank, *_ = capsys.readouterr().out.splitlines()
    assert blank == "" and set(rule) <= set("|-:")
    assert line.count("|") == heading.count("|")
    assert line.startswith("| vit_tiny_patch16_224 | ")
    assert line.split(" | ")[2] == "98 / 0"


def test_an_unknown_model_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_models.py", "--models", "resnet", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        bench_models.main()
    assert "unknown resnet; the models are vit, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
