from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from mptqc.errors import ModelError, OutputError
from mptqc.graph import io
from mptqc.graph.convert_precision import SOURCE_PRECISION_KEY
from mptqc.graph.io import load_model, model_digest, save_model, serialize
from mptqc.passes.base import STAGE_KEY

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
LINEAR = "g (float[n,3] x) => (float[n,2] y) <float[3,2] W = {1,2,3,4,5,6}> { [linear] y = MatMul(x, W) }"


def proto_of(text: str = LINEAR, header: str = HEADER) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f"{header}\n{text}")
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return proto


@pytest.fixture
def write(tmp_path):
    """write(proto): the path of a file that holds it."""

    def write_proto(proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
        path = tmp_path / name
        path.write_bytes(proto.SerializeToString())
        return path

    return write_proto


@pytest.fixture
def external(tmp_path):
    """external(location): the path of a model whose weight W lies in `location`, and that data file beside it."""

    def write_external(location: str = "weights.bin", offset: int = 0, length: int = 24) -> Path:
        proto = proto_of()
        (tensor,) = proto.graph.initializer
        (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": str(offset), "length": str(length)}.items():
            tensor.external_data.add(key=key, value=value)
        path = tmp_path / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return write_external


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_loads_and_writes_the_same(write, tmp_path):
    model = load_model(write(proto_of()))
    save_model(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == serialize(model)
    assert ir.to_onnx_text(load_model(tmp_path / "again.onnx")) == ir.to_onnx_text(model)


def test_missing_file(tmp_path):
    refused(tmp_path / "none.onnx", "does not exist")


def test_folder(tmp_path):
    refused(tmp_path, "is a folder")


def test_empty_file(tmp_path):
    (tmp_path / "empty.onnx").touch()
    refused(tmp_path / "empty.onnx", "is empty")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"hello, this is text", b"PK\x03\x04" * 20])
def test_other_files(tmp_path, content):
    path = tmp_path / "image.onnx"
    path.write_bytes(content)
    refused(path, "not an ONNX")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
def test_truncated_file(write, kept):
    path = write(proto_of())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    refused(path, "truncated")


def test_external_data_is_read_and_kept_inline(external, tmp_path):
    path = external()
    model = load_model(path)
    expected = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    assert np.array_equal(model.graph.initializers["W"].const_value.numpy(), expected)
    copied = onnx.load_from_string(serialize(model))
    assert np.array_equal(onnx.numpy_helper.to_array(copied.graph.initializer[0]), expected)


def test_missing_external_data(external, tmp_path):
    path = external()
    (tmp_path / "weights.bin").unlink()
    refused(path, "weights.bin", "missing")


def test_truncated_external_data(external):
    refused(external(offset=4), "W", "weights.bin", "truncated")


@pytest.mark.parametrize("location", ["/etc/passwd", "../weights.bin", "a/../../weights.bin", ""])
def test_external_data_outside_the_folder(external, location):
    refused(external(location), "W", "outside the model's folder")


def test_external_data_behind_a_link(external, tmp_path):
    (tmp_path / "link.bin").symlink_to("/etc/hostname")
    refused(external("link.bin"), "outside the model's folder")


def test_sparse_initializer(write):
    proto = proto_of()
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "S")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "I")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3]))
    refused(write(proto), "sparse", "S")


def test_sparse_constant(write):
    proto = proto_of()
    values = onnx.numpy_helper.from_array(np.ones(1, np.float32), "S")
    indices = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "I")
    sparse = onnx.helper.make_sparse_tensor(values, indices, [3])
    proto.graph.node.append(onnx.helper.make_node("Constant", [], ["c"], "odd", sparse_value=sparse))
    refused(write(proto), "sparse", "odd")


def test_training_graph(write):
    proto = proto_of()
    proto.training_info.add()
    refused(write(proto), "training")


def test_compiled_model(write):
    proto = proto_of()
    proto.metadata_props.add(key=STAGE_KEY, value="quantized")
    refused(write(proto), "already compiled by mptqc")


def test_quantization_annotations(write):
    proto = proto_of()
    proto.graph.quantization_annotation.add(tensor_name="x")
    refused(write(proto), "already quantized")


@pytest.mark.parametrize(
    "body",
    [
        "q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z)",
        "q, a, b = DynamicQuantizeLinear(x) y = Cast<to=1>(q)",
    ],
)
def test_quantized_ops(write, body):
    text = f"g (float[n,3] x) => (float[n,3] y) <float s = {{1}}, uint8 z = {{0}}> {{ {body} }}"
    refused(write(proto_of(text)), "already quantized", "QuantizeLinear")


def test_quantized_contrib_ops(write):
    text = "g (float[n,3] x) => (float[n,3] y) { [att] y = com.microsoft.QAttention(x) }"
    refused(write(proto_of(text, HEADER[:-2] + ', "com.microsoft" : 1]>')), "already quantized", "att")


def test_custom_ops_are_named(write):
    text = "g (float[n,3] x) => (float[n,3] y) { [mine] z = org.custom.Magic(x) y = Relu(z) }"
    refused(write(proto_of(text, HEADER[:-2] + ', "org.custom" : 1]>')), "org.custom::Magic", "mine")


def test_control_flow_is_named(write):
    text = """g (float[n,3] x, bool c) => (float[n,3] y) {
      [choose] y = If (c) <then_branch = t () => (float[n,3] a) { a = Relu(x) },
                           else_branch = e () => (float[n,3] b) { b = Neg(x) }>
    }"""
    refused(write(proto_of(text)), "If", "choose")


@pytest.mark.parametrize("op", ["RandomUniformLike", "RandomNormalLike", "Bernoulli"])
def test_random_numbers_are_named(write, op):
    text = f"g (float[n,3] x) => (float[n,3] y) {{ [masking] noise = {op}(x) y = Mul(x, noise) }}"
    refused(write(proto_of(text)), op, "masking", "draws random numbers")


@pytest.mark.parametrize("opset", [9, 12, 25, 26])
def test_opset_out_of_range(write, opset):
    refused(write(proto_of(header=f'<ir_version: 8, opset_import: ["" : {opset}]>')), f"opset {opset}", "13 to 24")


@pytest.mark.parametrize("opset", [13, 24])
def test_opset_in_range(write, opset):
    assert (
        load_model(write(proto_of(header=f'<ir_version: 8, opset_import: ["" : {opset}]>'))).opset_imports[""] == opset
    )


def test_invalid_graph(write):
    proto = proto_of()
    proto.graph.node[0].input[0] = "nowhere"
    refused(write(proto), "not valid ONNX", "nowhere")


def test_two_float_inputs_are_named(write):
    text = "g (float[n,3] pixels, float[n,3] mask, int64 k) => (float[n,3] y) { y = Mul(pixels, mask) }"
    refused(write(proto_of(text)), "pixels", "mask", "2 float inputs")


def test_no_float_input(write):
    refused(write(proto_of("g (int64[n] ids) => (int64[n] y) { y = Neg(ids) }")), "no float input", "ids")


def test_double_input(write):
    refused(write(proto_of("g (double[n] x) => (double[n] y) { y = Neg(x) }")), "x", "DOUBLE")


def test_initializers_listed_as_inputs_are_no_inputs(write):
    proto = proto_of()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [3, 2]))
    assert [value.name for value in load_model(write(proto)).graph.inputs] == ["x"]


def test_functions_are_inlined(write):
    text = (
        'g (float[n,3] x) => (float[n,3] y) { y = local.twice(x) }\n<opset_import: ["" : 21], domain: "local">\n'
        "twice (a) => (b) { b = Add(a, a) }"
    )
    model = load_model(write(proto_of(text, HEADER[:-2] + ', "local" : 1]>')))
    assert [node.op_type for node in model.graph] == ["Add"]
    assert not model.functions
    assert dict(model.opset_imports) == {"": 21}


HALF_TEXT = """g (float16[n,3] x) => (float16[n,2] y) <float16[3,2] W> {
  c = Constant<value = float16 {16384}>()
  d = Cast<to=10>(c)
  z = Mul(x, d)
  y = MatMul(z, W)
}"""


def half_proto(dtype: type, name: str, number: int) -> onnx.ModelProto:
    text = HALF_TEXT.replace("float16", name).replace("to=10", f"to={number}").replace(f"<{name}[3,2] W>", "")
    text = text.replace(f"Constant<value = {name} {{16384}}>()", "Identity(two)")
    proto = onnx.parser.parse_model(f"{HEADER}\n{text}")
    weight = np.arange(6).reshape(3, 2).astype(dtype)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "W"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2, dtype), "two"))
    return proto


HALVES = {"float16": (np.float16, 10), "bfloat16": (ml_dtypes.bfloat16, 16)}


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_is_refused_by_name(write, name):
    refused(write(half_proto(HALVES[name][0], name, HALVES[name][1])), name, "--convert-fp16")


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_is_converted(write, name):
    model = load_model(write(half_proto(HALVES[name][0], name, HALVES[name][1])), convert_fp16=True)
    proto = onnx.load_from_string(serialize(model))
    onnx.checker.check_model(proto, full_check=True)
    x = np.array([[1, 2, 3]], np.float32)
    (got,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    assert got.dtype == np.float32
    assert np.array_equal(got, 2 * x @ np.arange(6, dtype=np.float32).reshape(3, 2))
    assert model.metadata_props[SOURCE_PRECISION_KEY] == name


def test_half_precision_constants_are_converted(write):
    text = HALF_TEXT.replace(" <float16[3,2] W>", "").replace("MatMul(z, W)", "Relu(z)").replace("n,2", "n,3")
    model = load_model(write(proto_of(text)), convert_fp16=True)
    onnx.checker.check_model(onnx.load_from_string(serialize(model)), full_check=True)


def test_digest_depends_on_every_byte(write, external, tmp_path):
    inline = model_digest(write(proto_of()))
    assert inline == model_digest(write(proto_of()))
    path = external()
    digest = model_digest(path)
    assert digest != inline
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[-1] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert model_digest(path) != digest


def test_large_model_gets_a_data_file(write, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "EXTERNAL_DATA_BYTES", 16)
    monkeypatch.setattr(io, "EXTERNAL_TENSOR_BYTES", 16)
    model = load_model(write(proto_of()))
    with pytest.raises(OutputError, match="save_model"):
        serialize(model)
    save_model(model, tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["model.onnx", "out.onnx", "out.onnx.data"]
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1, "the new files may be read by whoever could read the old one"
    loaded = load_model(tmp_path / "out.onnx")
    assert ir.to_onnx_text(loaded) == ir.to_onnx_text(model)
    assert model_digest(tmp_path / "out.onnx") != model_digest(tmp_path / "model.onnx")


def test_saving_over_the_source(write):
    path = write(proto_of())
    model = load_model(path)
    save_model(model, path)
    assert ir.to_onnx_text(load_model(path)) == ir.to_onnx_text(model)


@pytest.mark.parametrize("place", ["missing/out.onnx", "model.onnx/out.onnx", "."])
def test_unwritable_place(write, tmp_path, place):
    model = load_model(write(proto_of()))
    with pytest.raises(OutputError, match=r"folder|written"):
        save_model(model, tmp_path / place)
    assert names_in(tmp_path) == ["model.onnx"]


def test_failure_leaves_no_file(write, tmp_path, monkeypatch):
    model = load_model(write(proto_of()))
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left"):
        save_model(model, tmp_path / "out.onnx")
    assert names_in(tmp_path) == ["model.onnx"]
