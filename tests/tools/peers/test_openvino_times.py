import os
import sys
from pathlib import Path

import peers.openvino_times as peer
import pytest
from peers.environment import PeerError
from random_vit import VitShape, write_random_vit

READY = os.environ.get("MPTQC_OPENVINO_ENVIRONMENT")  # of an environment that OpenVino may make or use

ANSWERS = """
import json, sys
opened = []
for line in sys.stdin:
    request = json.loads(line)
    if "run" in request:
        print(json.dumps({"nanoseconds": 1000 * opened[request["run"]]["threads"]}), flush=True)
    else:
        opened.append(request)
        print(json.dumps({"index": len(opened) - 1}), flush=True)
        assert request["model"] != "bad.onnx" and request["shape"] == [1, 3] and request["precision"] == "f32"
"""


@pytest.fixture
def replaced(tmp_path, monkeypatch):
    """A script of our own Python stands in for OpenVINO."""
    (tmp_path / "script.py").write_text(ANSWERS, encoding="utf-8")
    monkeypatch.setattr(peer, "SCRIPT", tmp_path / "script.py")
    monkeypatch.setattr(peer, "ensure_environment", lambda folder, requirements: Path(sys.executable))


def test_each_model_is_run_when_it_is_its_turn(replaced, tmp_path):
    with peer.OpenVino(tmp_path) as openvino:
        one = openvino.open_model(Path("one.onnx"), (1, 3), threads=1)
        two = openvino.open_model(Path("two.onnx"), (1, 3), threads=2)
        assert [two(), one(), two()] == [2000, 1000, 2000]
    assert openvino._process.returncode == 0


def test_a_failure_is_told(replaced, tmp_path, capfd):
    with peer.OpenVino(tmp_path) as openvino:
        bad = openvino.open_model(Path("bad.onnx"), (1, 3), threads=1)
        with pytest.raises(PeerError, match=r"OpenVINO's process ended|OpenVINO failed on"):
            bad()
    assert "AssertionError" in capfd.readouterr().err


@pytest.mark.skipif(READY is None, reason="MPTQC_OPENVINO_ENVIRONMENT names no folder for OpenVINO's environment")
def test_openvino_itself(tmp_path):
    write_random_vit(tmp_path / "vit.onnx", VitShape(image=32, patch=8, width=32, depth=2, heads=2, classes=10))
    with peer.OpenVino(Path(READY)) as openvino:
        run = openvino.open_model(tmp_path / "vit.onnx", (2, 3, 32, 32), threads=1)
        assert all(0 < run() < 1e10 for _ in range(3))
