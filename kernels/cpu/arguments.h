// Are an operator's sizes and quantizers sound? The same for kernels of every device.
#pragma once

#include "mptqc_kernels.h"

namespace mptqc {

bool is_sound(const mptqc_layer_norm& arguments);
bool is_sound(const mptqc_layer_norm_add& arguments);
bool is_sound(const mptqc_linear& arguments);
bool is_sound(const mptqc_attention& arguments);
bool is_sound(const mptqc_patches& arguments);
bool is_sound(const mptqc_trellis& arguments);

}  // namespace mptqc
