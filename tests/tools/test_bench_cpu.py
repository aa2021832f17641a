import argparse
import json

import bench_cpu
import pytest
from bench_cpu import FLOAT, FORMS, NNCF, Store
from native_products import Product


def row(form, milliseconds):
    return {
        "form": form,
        "megabytes": 1.0,
        "median_ms": milliseconds,
        "p10_ms": 7.0,
        "p90_ms": 9.0,
        "speedup": 8.0 / milliseconds,
    }


def lines_of(table):
    """Title, heading and lines of a table, after a look at its shape."""
    title, blank, heading, rule, *lines = table.strip().splitlines()
    assert blank == "" and set(rule) <= set("|-:")
    assert {line.count("|") for line in (heading, rule, *lines)} == {heading.count("|")}
    return title, heading, lines


def test_times_have_a_line_a_form():
    cell = {"clock": "cpu", "rounds": 10, "rows": [row(form, 1.0 + i) for i, form in enumerate(FORMS)]}
    title, _, lines = lines_of(bench_cpu.as_markdown("vit-s, batch 1, 1 thread(s)", cell))
    assert title == "vit-s, batch 1, 1 thread(s): 10 rounds, CPU time"
    assert [line.split(" | ")[0] for line in lines] == [f"| {form}" for form in FORMS]
    assert lines[1] == "| ORT static | 1.0 | 2.00 | 7.00..9.00 | 4.00 |"


def test_memory_is_given_for_a_weight():
    title, _, lines = lines_of(
        bench_cpu.memory_as_markdown("vit-s", {FLOAT: 88_000_000, "cpu": 33_000_000}, 22_000_000)
    )
    assert title.endswith("22.0 million weights")
    assert lines == ["| float32 | 88.0 | 4.00 |", "| cpu | 33.0 | 1.50 |"]


def test_products_are_given_as_a_share_of_the_peak():
    products = [Product("Linear", "2 × 3 × 4", 2, 0.5, 250_000_000), Product("LayerNormQuantize", "2 × 3", 1, 0.25, 0)]
    title, _, lines = lines_of(bench_cpu.products_as_markdown("vit-s", products, 1e12))
    assert title.endswith("measured peak 1000 GOP/s")
    assert lines == [
        "| Linear | 2 × 3 × 4 | 2 | 0.50 | 500 | 50% |",
        "| LayerNormQuantize | 2 × 3 | 1 | 0.25 | – | – |",
    ]


def test_measurements_outlive_the_process(tmp_path):
    store = Store(tmp_path / "results.json")
    assert "a" not in store
    store["a"] = {"rounds": 3}
    assert Store(tmp_path / "results.json")["a"] == {"rounds": 3}
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"rounds": 3}}


def test_what_was_measured_is_printed_not_measured_again(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError

    cell = {"clock": "wall", "rounds": 10, "rows": [row(FLOAT, 8.0)]}
    store = Store(tmp_path / "results.json")
    store["vit-s, batch 8, 2 thread(s)"] = cell
    store["vit-s, memory"] = {FLOAT: 4}
    store["vit-s, operators"] = {"peak": 1e12, "products": []}
    for name in ("make_missing", "weight_count", "measure"):
        monkeypatch.setattr(bench_cpu, name, refuse if name == "measure" else lambda *_: 1)
    options = ["--models", "vit-s", "--batches", "8", "--threads", "2", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench_cpu.py", *options])
    bench_cpu.main()
    printed = capsys.readouterr().out
    assert bench_cpu.as_markdown("vit-s, batch 8, 2 thread(s)", cell) in printed
    assert "| float32 | 0.0 | 4.00 |" in printed
    assert "measured peak 1000 GOP/s" in printed


@pytest.mark.parametrize(
    ("features", "precisions"), [({}, ["f32", "f32"]), ({"amx_bf16": True}, ["f32", "bf16", "f32"])]
)
def test_openvino_gets_the_precisions_of_the_processor(tmp_path, monkeypatch, features, precisions):
    class Peer:
        def open_model(self, model, shape, *, threads, precision):
            return model.name, tuple(shape), threads, precision

    monkeypatch.setattr(bench_cpu, "cpu_features", lambda _: features)
    files = {FLOAT: tmp_path / "float", NNCF: tmp_path / "nncf"}
    found = list(bench_cpu.openvino_runs(Peer(), files, (8, 3), 2))
    assert [run[3] for _, _, run in found] == precisions
    assert [run[:3] for _, _, run in found] == [(path.name, (8, 3), 2) for _, path, _ in found]
    assert found[-1][:2] == ("OpenVINO NNCF int8", tmp_path / "nncf")


def test_bench_cpu_refuses_an_unknown_model():
    assert bench_cpu.names_of_models("vit-s,swin-t") == ["vit-s", "swin-t"]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown vit-x; the models are vit-s"):
        bench_cpu.names_of_models("vit-s,vit-x")
