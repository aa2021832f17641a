"""The records of kernels/include/mptqc_kernels.h for ctypes."""

import ctypes
from typing import Any

from mptqc.reference.custom_ops import CodeQuantizer

I32, I64, F32, POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


UPPER_REGIONS = 3
Quantizer = structure(
    "Quantizer", scale=F32, zero_point=I32, minimum=I32, maximum=I32, regions=I32, m=I32 * UPPER_REGIONS,
    split=I32 * UPPER_REGIONS,
)  # fmt: skip
Addend = structure("Addend", data=POINTER, windows=I64, heads=I64, rows=I64)
LayerNorm = structure(
    "LayerNorm",
    rows=I64,
    width=I64,
    input=POINTER,
    gamma=POINTER,
    beta=POINTER,
    epsilon=F32,
    table_size=I64,
    table=POINTER,
    quantizer=Quantizer,
    output=POINTER,
)
LayerNormAdd = structure(
    "LayerNormAdd",
    rows=I64,
    width=I64,
    input=POINTER,
    gamma=POINTER,
    beta=POINTER,
    epsilon=F32,
    table_size=I64,
    table=POINTER,
    residual=POINTER,
    output=POINTER,
    quantizer=ctypes.POINTER(Quantizer),
    code_table_size=I64,
    code_table=POINTER,
    codes=POINTER,
)
Rotary = structure("Rotary", tokens=I64, columns=I64, width=I64, cosine=POINTER, sine=POINTER)
UnitHeads = structure("UnitHeads", width=I64, epsilon=F32)
Linear = structure(
    "Linear",
    rows=I64,
    inputs=I64,
    outputs=I64,
    input=POINTER,
    weight=POINTER,
    offset=POINTER,
    scale=POINTER,
    bias=POINTER,
    activation=I32,
    multiplier=POINTER,
    residual=POINTER,
    table_size=I64,
    table=POINTER,
    quantizer=ctypes.POINTER(Quantizer),
    output=POINTER,
    span=I32,
    rotary=Rotary,
    factor=POINTER,
    unit_heads=UnitHeads,
    by_rows=I32,
)
Attention = structure(
    "Attention",
    batch=I64,
    heads=I64,
    rows=I64,
    columns=I64,
    width=I64,
    value_width=I64,
    q=POINTER,
    k=POINTER,
    v=POINTER,
    q_zero_point=I32,
    k_zero_point=I32,
    v_zero_point=I32,
    score_scale=F32,
    context_scale=F32,
    bias=Addend,
    mask=Addend,
    row_scale=I32,
    probability=Quantizer,
    quantizer=ctypes.POINTER(Quantizer),
    output=POINTER,
    by_heads=I32,
)
Patches = structure(
    "Patches",
    batch=I64,
    channels=I64,
    height=I64,
    width=I64,
    patch_height=I64,
    patch_width=I64,
    input=POINTER,
    quantizer=Quantizer,
    output=POINTER,
)


def c_quantizer(quantizer: CodeQuantizer) -> Any:
    codes = (quantizer.zero_point, quantizer.minimum, quantizer.maximum)
    lists = ((I32 * UPPER_REGIONS)(*numbers) for numbers in (quantizer.m, quantizer.split))
    return Quantizer(quantizer.scale, *codes, len(quantizer.m), *lists)
