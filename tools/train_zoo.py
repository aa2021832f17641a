"""Train the zoo on Fashion-MNIST and write zoo/: three ONNX models, calibration and test images, preprocessing.

    nice python tools/train_zoo.py --data DIR_WITH_IDX_GZ --checkpoints DIR [--output zoo] [--models vit deit swin]

A model whose checkpoint exists is exported again, not trained again. The DeiT is distilled from the ViT.
"""

import argparse
import gzip
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from zoo_files import CALIBRATION_COUNT, TEST_COUNT, Split, onnx_top1, preprocessing, write_data, write_model
from zoo_models import IMAGE_SIZE, build

logger = logging.getLogger("train_zoo")

MEAN, STD = 0.2860, 0.3530  # of the training images as pixel / 255
IDX_IMAGE_HEADER_BYTES, IDX_LABEL_HEADER_BYTES = 16, 8


@dataclass(frozen=True)
class Schedule:
    """How one model is trained: AdamW, one linear warm-up epoch, then a cosine to zero."""

    epochs: int
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    moved_pixels: int = 2
    """How far the random crop moves an image, at most."""


SCHEDULES = {
    "vit": Schedule(epochs=28),
    "deit": Schedule(epochs=16, learning_rate=1.5e-3),
    "swin": Schedule(epochs=12, learning_rate=2e-3, moved_pixels=0),
}


def read_split(folder: Path, stem: str) -> Split:
    """Read ``<stem>-images-idx3-ubyte.gz`` and its labels; ``stem`` is train or t10k."""
    pixels = gzip.decompress((folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=IDX_IMAGE_HEADER_BYTES)
    return Split(
        images.reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE).copy(),
        np.frombuffer(labels, np.uint8, offset=IDX_LABEL_HEADER_BYTES).astype(np.int64),
    )


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 pixels into the float32 values that the models read."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, moved_pixels: int, generator: torch.Generator) -> Tensor:
    """Return uint8 [N, 1, 28, 28], each image moved by up to `moved_pixels` and mirrored half of the time."""
    count = images.shape[0]
    padded = nn.functional.pad(images, (moved_pixels,) * 4)[:, 0]
    offsets = torch.randint(0, 2 * moved_pixels + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < 0.5
    steps = torch.arange(IMAGE_SIZE)[None, :]
    columns = torch.where(mirrored, IMAGE_SIZE - 1 - steps, steps) + offsets[1]
    rows = steps + offsets[0]
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


def train(model: nn.Module, split: Split, schedule: Schedule, *, seed: int, teacher: nn.Module | None) -> None:
    """Train ``model`` in place, in bfloat16 autocast; with ``teacher`` its second head learns the teacher's labels."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(split.images), torch.from_numpy(split.labels)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    other = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)
    steps_per_epoch = len(labels) // schedule.batch
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps_per_epoch, schedule.epochs))
    loss_of = nn.CrossEntropyLoss(label_smoothing=schedule.label_smoothing)
    model.train()
    for epoch in range(schedule.epochs):
        started, total = time.perf_counter(), 0.0
        order = torch.randperm(len(labels), generator=generator)[: steps_per_epoch * schedule.batch]
        for chosen in order.split(schedule.batch):
            batch = normalise(augment(images[chosen], schedule.moved_pixels, generator))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = model(batch)
                taught = None if teacher is None else _labels_of(teacher, batch)
            if taught is None:
                loss = loss_of(output.float(), labels[chosen])
            else:
                loss = (loss_of(output[0].float(), labels[chosen]) + loss_of(output[1].float(), taught)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            total += loss.item()
        seconds = time.perf_counter() - started
        logger.info("epoch %d/%d loss %.4f in %.0f s", epoch + 1, schedule.epochs, total / steps_per_epoch, seconds)
    model.eval()


def _labels_of(teacher: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return teacher(batch).argmax(dim=1)


def _warm_cosine(steps_per_epoch: int, epochs: int) -> Callable[[int], float]:
    total = steps_per_epoch * epochs

    def factor(step: int) -> float:
        warm_up = (step + 1) / steps_per_epoch
        return min(warm_up, 0.5 * (1 + math.cos(math.pi * step / total)))

    return factor


def trained(name: str, arguments: argparse.Namespace, train_split: Split, teacher: nn.Module | None) -> nn.Module:
    """Return model ``name`` in evaluation mode: from its checkpoint, or trained now and saved there."""
    torch.manual_seed(arguments.seed)
    model = build(name)
    checkpoint: Path = arguments.checkpoints / f"{name}.pt"
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
        return model.eval()
    logger.info("training %s: %s", name, SCHEDULES[name])
    train(model, train_split, SCHEDULES[name], seed=arguments.seed, teacher=teacher)
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), checkpoint)
    return model


def main() -> None:
    """Parse the command line, train what has no checkpoint, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the four idx .gz files of Fashion-MNIST")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for the trained weights (.pt)")
    parser.add_argument("--output", type=Path, default=Path("zoo"))
    parser.add_argument("--models", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(arguments.threads)
    train_split, test_split = read_split(arguments.data, "train"), read_split(arguments.data, "t10k")
    steps = preprocessing(MEAN, STD)
    committed_test = test_split.sample(TEST_COUNT, arguments.seed)
    write_data(arguments.output, train_split.sample(CALIBRATION_COUNT, arguments.seed), committed_test, steps)
    for name in arguments.models:
        teacher = trained("vit", arguments, train_split, None) if name == "deit" else None
        path = write_model(arguments.output, name, trained(name, arguments, train_split, teacher), steps)
        for split in (test_split, committed_test):
            accuracy = onnx_top1(path, split, steps)
            logger.info("%s: float top-1 %.4f on %d test images", name, accuracy, len(split.labels))


if __name__ == "__main__":
    main()
