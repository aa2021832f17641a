"""Whole models for the CUDA provider, in ONNX Runtime on the emulated device: the real operators, kernels and glue."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from cuda_kernels import ROOT

from mptqc import api
from mptqc.analysis.verify_native import check_native_numbers
from mptqc.cli.app import main
from mptqc.errors import ProviderError, RefusalError
from mptqc.graph.native_nodes import ATTENTION_OPS, native_nodes
from mptqc.recipe import Target
from mptqc.runtime.session import PROVIDER_KEY, Session, create_session

QUICK = {
    "range_method": "min-max",
    "smoothing": False,
    "attention_folds": False,
    "compensation": False,
    "samples": 8,
}


def on_emulated_device(model: onnx.ModelProto, library: Path) -> Session:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])  # noqa: TID251 - a library that create_session does not know


CASES = [
    ("vit", {"row_scale": True, "gelu_folds": True}),
    ("swin", {"row_scale": True, "gelu_folds": True}),
    ("vit", {"row_scale": False, "gelu_folds": False}),
    ("swin", {"row_scale": True, "gelu_folds": False, "coverage": "full"}),
]


@pytest.mark.parametrize(("model", "options"), CASES)
def test_every_operator_gives_what_the_plan_means(compile_zoo, zoo_samples, emulated_library, model, options):
    file = compile_zoo(model, "w4a4", **QUICK, **options)
    lowered = api.lower(file.path, target="cuda").model
    images = next(zoo_samples("test").batches(1))
    proto = ir.to_proto(lowered)

    def run(names):
        probing = onnx.ModelProto()
        probing.CopyFrom(proto)
        del probing.graph.output[:]
        wanted = [name for name in dict.fromkeys(names) if name != proto.graph.input[0].name]
        probing.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
        session = on_emulated_device(probing, emulated_library)
        feeds = {proto.graph.input[0].name: images}
        return feeds | dict(zip(wanted, session.run(wanted, feeds), strict=True))

    plan = file.compiled.plan
    nodes = native_nodes(lowered)
    by_row = [node for node in nodes if node.op_type in ATTENTION_OPS and node.attributes["row_scale"].as_int()]
    multiplied = [node for node in nodes if node.op_type == "LinearQuantize" and len(node.inputs) == 5]
    if "coverage" not in options:  # which leaves attentions in standard operators, and scales channels elsewhere
        assert (bool(by_row), bool(multiplied)) == (options["row_scale"], options["gelu_folds"])
    checks = check_native_numbers(nodes, plan, run)
    assert len(checks) == len(nodes)
    assert [check.site for check in checks if check.code_mismatches or check.error > 1] == []


def test_lowering_marks_the_model_and_the_cpu_refuses_it(compile_zoo, tmp_path, capsys):
    output = tmp_path / "cuda.onnx"
    with pytest.raises(SystemExit) as ended:
        main(["lower", str(compile_zoo("vit", "w4a4", **QUICK).path), "-o", str(output), "--target", "cuda"])
    assert not ended.value.code
    assert "lowered: 16 LinearQuantize" in capsys.readouterr().out
    model = onnx.load(output)
    assert {entry.key: entry.value for entry in model.metadata_props}[PROVIDER_KEY] == "cuda"
    with pytest.raises(ProviderError, match="was compiled for provider 'cuda'"):
        create_session(output)


def test_tensorrt_refuses_tensors_between_the_products(compile_zoo):
    path = compile_zoo("vit", "w8a8", coverage="full", **(QUICK | {"opt_m": False})).path
    with pytest.raises(RefusalError, match=r"\d+ tensors have others \(patch_embed\.output, .*--coverage partial"):
        api.lower(path, target="tensorrt")


@pytest.mark.parametrize("model", ["vit", "swin"])
def test_between_the_operators_it_is_float16(compile_zoo, model):
    path = compile_zoo(model, "w4a4", **QUICK).path
    cuda, native = (api.lower(path, target=target).model for target in (Target.CUDA, Target.CPU_NATIVE))
    wide = api.lower(path, target=Target.CUDA, float16=False).model
    assert ir.to_proto(wide).graph == ir.to_proto(native).graph
    types = {value.dtype for node in native_nodes(cuda) for value in (*node.inputs[4:5], *node.outputs)}
    assert types == {ir.DataType.UINT8, ir.DataType.FLOAT16, ir.DataType.FLOAT}
    for mine, theirs in ((cuda.graph.inputs, native.graph.inputs), (cuda.graph.outputs, native.graph.outputs)):
        assert [(value.name, value.dtype) for value in mine] == [(value.name, ir.DataType.FLOAT) for value in theirs]


@pytest.mark.parametrize(("float16", "least_db"), [(False, 45), (True, 35)])
def test_whole_models_agree_with_the_cpu(compile_zoo, zoo_samples, emulated_library, float16, least_db):
    """With float32 only softmax and norms differ; rounding to float16 moves codes, by less than quantization did."""
    path = compile_zoo("vit", "w8a8", samples=16, compensation=False).path
    images = next(zoo_samples("test").batches(4))
    lowered = ir.to_proto(api.lower(path, target="cuda", float16=float16).model)
    found = on_emulated_device(lowered, emulated_library).run(None, {lowered.graph.input[0].name: images})[0]
    session = create_session(path)
    expected = session.run(None, {lowered.graph.input[0].name: images})[0]
    assert found.dtype == np.float32
    noise = np.square(found - expected, dtype=np.float64).sum()
    assert noise < np.square(expected, dtype=np.float64).sum() * 10 ** (-least_db / 10)


def test_a_model_for_cuda_is_verified_on_the_cpu(tmp_path):
    """Its operators mean the same there."""
    zoo = ROOT / "zoo"
    result = api.compile(
        zoo / "vit.onnx",
        zoo / "calibration.npz",
        preset="w4a4",
        preprocess=str(zoo / "preprocess.json"),
        options={**QUICK, "target": "cuda"},
    )
    if result.report.checks is None:
        pytest.skip("the kernel library was not built: no C++17 compiler")
    assert result.report.checks.integer_products == 34
    assert np.isfinite(result.report.checks.sites[0].error)
