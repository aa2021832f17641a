import os
import sys
from pathlib import Path

import numpy as np
import onnx
import peers.nncf_int8 as peer
import pytest
from peers.environment import PeerError
from random_vit import VitShape, write_random_images, write_random_vit

from mptqc.data.load import load_samples
from mptqc.runtime.evaluate import evaluate

SHAPE = VitShape(image=32, patch=8, width=32, depth=2, heads=2, classes=10)
READY = os.environ.get("MPTQC_NNCF_ENVIRONMENT")  # of an environment that write_nncf_int8 may make or use

MIN_SQNR_DB, FLOAT_SQNR_DB = 20, 100  # 8 bits lie between: 6 dB a bit less what ranges cost, and float32 rounding

COPY_AND_KEEP = """
import os, shutil, sys
model, images, output, *options = sys.argv[1:]
shutil.copy(images, {kept!r})
with open(output, "w") as file:
    print(model, *options, os.environ["CI"], sys.flags.isolated, file=file)
"""
FAIL = "raise SystemExit('ValidationError: opset 9 is too old')"


@pytest.fixture
def model(tmp_path):
    write_random_vit(tmp_path / "vit.onnx", SHAPE)
    return tmp_path / "vit.onnx"


@pytest.fixture
def samples(tmp_path):
    write_random_images(tmp_path / "noise.npz", SHAPE)
    shape = (None, 3, SHAPE.image, SHAPE.image)
    return load_samples(tmp_path / "noise.npz", input_name="images", input_shape=shape, preprocessing=None)


@pytest.fixture
def replace_script(tmp_path, monkeypatch):
    """replace_script(text): run this instead of nncf_script.py, with our Python."""

    def replace(text):
        (tmp_path / "script.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(peer, "SCRIPT", tmp_path / "script.py")
        monkeypatch.setattr(peer, "ensure_environment", lambda folder, requirements: Path(sys.executable))

    return replace


@pytest.mark.parametrize(("smooth_quant", "flag"), [(True, "--smooth-quant"), (False, "--no-smooth-quant")])
def test_the_script_gets_model_images_and_options(tmp_path, samples, replace_script, monkeypatch, smooth_quant, flag):
    monkeypatch.setattr(peer, "READ_BATCH", 3)
    replace_script(COPY_AND_KEEP.format(kept=str(tmp_path / "kept.npy")))
    output = tmp_path / "out.onnx"
    peer.write_nncf_int8(Path("m.onnx"), output, samples, "images", tmp_path, smooth_quant=smooth_quant)
    assert output.read_text(encoding="utf-8") == f"m.onnx --input-name images {flag} true 1\n"
    assert samples.count % 3
    np.testing.assert_array_equal(np.load(tmp_path / "kept.npy"), next(samples.batches(samples.count)))


def test_a_failure_is_told_and_leaves_no_file(tmp_path, model, samples, replace_script):
    replace_script(FAIL)
    with pytest.raises(PeerError, match=r"NNCF cannot quantize .*vit\.onnx: ValidationError: opset 9 is too old"):
        peer.write_nncf_int8(model, tmp_path / "out.onnx", samples, "images", tmp_path)
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.skipif(READY is None, reason="MPTQC_NNCF_ENVIRONMENT names no folder for NNCF's environment")
@pytest.mark.parametrize("smooth_quant", [True, False])
def test_onnxruntime_runs_what_nncf_writes(tmp_path, model, samples, smooth_quant):
    output = tmp_path / "out.onnx"
    peer.write_nncf_int8(model, output, samples, "images", Path(READY), smooth_quant=smooth_quant)
    assert [node.op_type for node in onnx.load(output).graph.node].count("QuantizeLinear") > 2 * 6
    assert MIN_SQNR_DB < evaluate(output, samples, reference=model).sqnr_db < FLOAT_SQNR_DB
