"""Quantize an ONNX model with NNCF; run by nncf_int8.py with the Python of the environment that nncf.txt describes.

python nncf_script.py MODEL IMAGES.npy OUTPUT --input-name NAME [--no-smooth-quant]
"""

import argparse
from pathlib import Path

import nncf
import numpy as np
import onnx

OFF = -1.0  # NNCF's strength of a SmoothQuant that is not applied


def main() -> None:
    """Read the command line, quantize, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path, help="float32 [N, C, H, W], preprocessed")
    parser.add_argument("output", type=Path)
    parser.add_argument("--input-name", required=True)
    parser.add_argument("--smooth-quant", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    images = np.load(arguments.images, mmap_mode="r")
    options = nncf.AdvancedQuantizationParameters()
    if not arguments.smooth_quant:
        options.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(convolution=OFF, matmul=OFF)
    quantized = nncf.quantize(
        onnx.load(arguments.model),
        nncf.Dataset(images, lambda image: {arguments.input_name: image[None]}),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(images),
        advanced_parameters=options,
    )
    onnx.save(quantized, arguments.output)


if __name__ == "__main__":
    main()
