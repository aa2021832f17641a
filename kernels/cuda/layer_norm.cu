// LayerNorm and quantizer: a warp a row. A row that fits stays in the warp's registers; others are read three times.
#include "../cpu/arguments.h"
#include "tiles.h"

namespace mptqc {
namespace {

constexpr int kWarps = 4, kVector = 4;

struct LayerNormParameters {
  mptqc_layer_norm a;
  QuantizerConstants quantizer;
};

bool is_multiple(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

MPTQC_DEVICE float sum_of_warp(float x) {
  MPTQC_UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += exchange(x, mask);
  return x;
}

MPTQC_DEVICE int64_t source_row(const mptqc_layer_norm& a, int64_t row) {
  if (a.table_size == 0) return row;
  return row - row % a.table_size + a.table[row % a.table_size];
}

// The codes of kCount channels from `channel` on.
template <int kCount>
MPTQC_DEVICE CodesOf<kCount> normalized(
    const LayerNormParameters& p, const float (&centred)[kCount], float factor, int64_t channel) {
  struct alignas(4 * kCount) Channels {
    float value[kCount];
  };
  const auto gamma = *reinterpret_cast<const Channels*>(p.a.gamma + channel);
  const auto beta = *reinterpret_cast<const Channels*>(p.a.beta + channel);
  float y[kCount];
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i) y[i] = fmaf(centred[i] * factor, gamma.value[i], beta.value[i]);
  return codes_of(p.quantizer, y, Steps::kNear);
}

// Rows of at most 128 * kParts channels of type T, a multiple of 4, each beginning on as many bytes as 4 channels take.
template <class T, int kParts>
MPTQC_KERNEL(kWarps* kWarp, 4)
layer_norm_in_registers(const LayerNormParameters p) {
  wait_for_inputs();
  let_next_begin();
  const int64_t row = block_index() * kWarps + thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  if (row >= p.a.rows) return;
  const T* from = reinterpret_cast<const T*>(p.a.input) + source_row(p.a, row) * p.a.width;
  Floats4 x[kParts];
  float total = 0;
  MPTQC_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const int64_t channel = kVector * (kWarp * i + lane);
    x[i] = channel < p.a.width ? load_floats(reinterpret_cast<const typename FloatsOf<T>::Four*>(from + channel)) : Floats4{};
    total += (x[i].value[0] + x[i].value[1]) + (x[i].value[2] + x[i].value[3]);
  }
  const float width = static_cast<float>(p.a.width), mean = sum_of_warp(total) / width;
  float squares = 0;
  MPTQC_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const int64_t channel = kVector * (kWarp * i + lane);
    MPTQC_UNROLL
    for (int j = 0; j < kVector; ++j) {
      x[i].value[j] -= mean;
      if (channel < p.a.width) squares = fmaf(x[i].value[j], x[i].value[j], squares);
    }
  }
  const float factor = 1.0f / sqrtf(sum_of_warp(squares) / width + p.a.epsilon);
  uint8_t* to = p.a.output + row * p.a.width;
  MPTQC_UNROLL
  for (int i = 0; i < kParts; ++i) {
    const int64_t channel = kVector * (kWarp * i + lane);
    if (channel >= p.a.width) continue;
    *reinterpret_cast<Codes4*>(to + channel) = {normalized(p, x[i].value, factor, channel)};
  }
}

template <class T>
MPTQC_KERNEL(kWarps* kWarp, 4)
layer_norm_of_any_width(const LayerNormParameters p) {
  wait_for_inputs();
  let_next_begin();
  const int64_t row = block_index() * kWarps + thread_index() / kWarp;
  const int lane = thread_index() % kWarp;
  if (row >= p.a.rows) return;
  const T* from = reinterpret_cast<const T*>(p.a.input) + source_row(p.a, row) * p.a.width;
  const float width = static_cast<float>(p.a.width);
  float total = 0, squares = 0;
  for (int64_t channel = lane; channel < p.a.width; channel += kWarp) total += load_float(from + channel);
  const float mean = sum_of_warp(total) / width;
  for (int64_t channel = lane; channel < p.a.width; channel += kWarp) {
    const float centred = load_float(from + channel) - mean;
    squares = fmaf(centred, centred, squares);
  }
  const float factor = 1.0f / sqrtf(sum_of_warp(squares) / width + p.a.epsilon);
  for (int64_t channel = lane; channel < p.a.width; channel += kWarp) {
    const float centred[] = {load_float(from + channel) - mean};
    p.a.output[row * p.a.width + channel] = normalized(p, centred, factor, channel).code[0];
  }
}

template <class T>
mptqc_status start(const mptqc_layer_norm& a, void* stream) {
  const LayerNormParameters parameters = {a, QuantizerConstants(a.quantizer)};
  const auto run = [&](void (*kernel)(LayerNormParameters)) {
    return launch({ceil_divide(a.rows, kWarps), kWarps * kWarp, 0, stream}, kernel, parameters);
  };
  const bool vectors = a.width % kVector == 0 && is_multiple(a.input, kVector * sizeof(T)) &&
                       is_multiple(a.output, sizeof(Codes4)) && is_multiple(a.gamma, sizeof(Floats4)) &&
                       is_multiple(a.beta, sizeof(Floats4));
  const int64_t parts = ceil_divide(a.width, kVector * kWarp);
  if (!vectors || parts > 16) return run(layer_norm_of_any_width<T>);
  if (parts <= 3) return run(layer_norm_in_registers<T, 3>);
  if (parts <= 6) return run(layer_norm_in_registers<T, 6>);
  return run(layer_norm_in_registers<T, 16>);
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

mptqc_status mptqc_cuda_layer_norm(const mptqc_layer_norm* arguments, mptqc_cuda_float type, void* stream) {
  const mptqc_layer_norm& a = *arguments;
  if (!is_sound(a)) return MPTQC_INVALID_ARGUMENT;
  return type == MPTQC_FLOAT16 ? start<Half>(a, stream) : start<float>(a, stream);
}
