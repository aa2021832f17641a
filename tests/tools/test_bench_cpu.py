import argparse

import bench_cpu
import pytest

from mptqc.runtime.benchmark import BenchmarkRow


def test_bench_cpu_prints_a_line_a_form():
    rows = [
        BenchmarkRow("m", 8.0, 7.0, 9.0, 8.0 / milliseconds, 10**6, 2, 1, {}, 1, 1, "cpu", 10, "cpu")
        for milliseconds in range(1, len(bench_cpu.FORMS) + 1)
    ]
    title, blank, heading, rule, *lines = bench_cpu.as_markdown("vit-s", rows).strip().splitlines()
    assert title == "vit-s, batch 1, 1 thread(s), 10 rounds, CPU time"
    assert {line.count("|") for line in (heading, rule, *lines)} == {7}
    assert [line.split(" | ")[0] for line in lines] == [f"| {form}" for form in bench_cpu.FORMS]
    assert lines[1].endswith("| 1.0 | 2 / 1 | 8.00 | 7.00..9.00 | 4.00 |")
    assert blank == ""


def test_bench_cpu_refuses_an_unknown_model():
    assert bench_cpu.names_of_models("vit-s,swin-t") == ["vit-s", "swin-t"]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown vit-x; the models are vit-s"):
        bench_cpu.names_of_models("vit-s,vit-x")
