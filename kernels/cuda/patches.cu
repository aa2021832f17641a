// Quantizer and disjoint patches: a thread makes up to 4 neighbouring codes of one row of one patch.
#include "../cpu/arguments.h"
#include "tiles.h"

namespace mptqc {
namespace {

constexpr int kThreads = 256;

struct PatchesParameters {
  mptqc_patches a;
  QuantizerConstants quantizer;
};

// kCodes is 4 where all rows of patches and images are multiples of 4, else 1.
template <int kCodes>
MPTQC_KERNEL(kThreads, 4)
patches(const PatchesParameters p) {
  wait_for_inputs();
  let_next_begin();
  const int64_t down = p.a.height / p.a.patch_height, across = p.a.width / p.a.patch_width;
  const int64_t runs = p.a.patch_width / kCodes, index = block_index() * kThreads + thread_index();
  if (index >= p.a.batch * p.a.channels * p.a.height * across * runs) return;
  int64_t rest = index;  // output[b, i, j, c, p, run]
  const int64_t run = rest % runs;
  rest /= runs;
  const int64_t patch_row = rest % p.a.patch_height;
  rest /= p.a.patch_height;
  const int64_t channel = rest % p.a.channels;
  rest /= p.a.channels;
  const int64_t j = rest % across;
  rest /= across;
  const int64_t i = rest % down, image = rest / down;
  const int64_t row = (image * p.a.channels + channel) * p.a.height + i * p.a.patch_height + patch_row;
  const float* from = p.a.input + row * p.a.width + j * p.a.patch_width + run * kCodes;
  uint8_t* to = p.a.output + index * kCodes;
  if constexpr (kCodes == 4) {
    const Floats4 x = *reinterpret_cast<const Floats4*>(from);
    *reinterpret_cast<Codes4*>(to) = {codes_of(p.quantizer, x.value, Steps::kExact)};
  } else {
    const float x[] = {*from};
    *to = codes_of(p.quantizer, x, Steps::kExact).code[0];
  }
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

mptqc_status mptqc_cuda_patches(const mptqc_patches* arguments, void* stream) {
  const mptqc_patches& a = *arguments;
  if (!is_sound(a)) return MPTQC_INVALID_ARGUMENT;
  const PatchesParameters parameters = {a, QuantizerConstants(a.quantizer)};
  const int64_t codes = a.batch * a.channels * a.height * a.width;
  const bool vectors = a.patch_width % 4 == 0 && a.width % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(a.input) % sizeof(Floats4) == 0 &&
                       reinterpret_cast<uintptr_t>(a.output) % sizeof(Codes4) == 0;
  const auto start = [&](void (*kernel)(PatchesParameters), int each) {
    return launch({ceil_divide(codes / each, kThreads), kThreads, 0, stream}, kernel, parameters);
  };
  return vectors ? start(patches<4>, 4) : start(patches<1>, 1);
}
