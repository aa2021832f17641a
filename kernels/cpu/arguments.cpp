#include "arguments.h"

#include <algorithm>

#include "sizes.h"

namespace mptqc {
namespace {

bool is_size(int64_t size) { return size >= 0 && size <= int64_t{1} << 40; }
bool is_code(int32_t code) { return code >= 0 && code <= 255; }
bool is_table(int64_t size, int64_t rows) { return size == 0 || (size > 0 && rows % size == 0); }
bool is_sound(const mptqc_quantizer& quantizer) { return mptqc_quantizer_fault(&quantizer) == nullptr; }
bool is_sound(const mptqc_quantizer* quantizer) { return quantizer == nullptr || is_sound(*quantizer); }

bool is_sound(const mptqc_addend& added, const mptqc_attention& a) {
  if (added.data == nullptr) return true;
  return added.windows > 0 && a.batch % added.windows == 0 && (added.heads == 1 || added.heads == a.heads) &&
         (added.rows == 1 || added.rows == a.rows);
}

bool is_sound_factor(const mptqc_linear& a) {
  return a.factor == nullptr || (a.activation == MPTQC_NO_ACTIVATION && a.table_size == 0);
}

bool is_sound(const mptqc_unit_heads& heads, const mptqc_linear& a) {
  if (heads.width == 0) return true;
  return (heads.width == 16 || heads.width == 32 || heads.width == 64) && a.outputs % heads.width == 0 &&
         heads.epsilon > 0 && a.activation == MPTQC_NO_ACTIVATION;
}

bool is_sound(const mptqc_rotary& rotary, const mptqc_linear& a) {
  if (rotary.cosine == nullptr) return true;
  const int64_t width = rotary.width;
  return rotary.sine != nullptr && rotary.tokens > 0 && a.rows % rotary.tokens == 0 && width >= 2 && width <= kPanel &&
         (width & (width - 1)) == 0 && a.outputs % width == 0 && rotary.columns > 0 && rotary.columns % kPanel == 0 &&
         (rotary.columns == kPanel || rotary.columns == a.outputs) && a.activation == MPTQC_NO_ACTIVATION &&
         a.residual == nullptr && a.table_size == 0;
}

// Whether sums over at most 16 groups of one block fit 16 bits whatever the codes: 255 times the positive weights of each two
// inputs, and 255 times the negative ones. 16 bits, so that compilers take many at once.
bool fits_in_16_bits(const int8_t* block, int64_t groups) {
  constexpr int64_t kPairs = kBlockBytes / 2;
  int16_t positive[kPairs] = {}, negative[kPairs] = {}, largest = 0;
  for (int64_t k = 0; k < groups; ++k) {
    for (int64_t i = 0; i < kPairs; ++i) {
      const int16_t first = block[k * kBlockBytes + 2 * i], second = block[k * kBlockBytes + 2 * i + 1];
      positive[i] = static_cast<int16_t>(positive[i] + std::max<int16_t>(first, 0) + std::max<int16_t>(second, 0));
      negative[i] = static_cast<int16_t>(negative[i] + std::min<int16_t>(first, 0) + std::min<int16_t>(second, 0));
    }
  }
  for (int64_t i = 0; i < kPairs; ++i) {
    largest = std::max({largest, positive[i], static_cast<int16_t>(-negative[i])});
  }
  return 255 * largest <= INT16_MAX;
}

bool fits_in_spans(const int8_t* block, int64_t groups, int64_t span) {
  const int64_t whole = groups / span * span;
  for (int64_t k = 0; k < groups; k += k < whole ? span : 1)
    if (!fits_in_16_bits(block + k * kBlockBytes, k < whole ? span : 1)) return false;
  return true;
}

}  // namespace

bool is_sound(const mptqc_layer_norm& a) {
  return is_size(a.rows) && is_size(a.width) && is_table(a.table_size, a.rows) && is_sound(a.quantizer);
}

bool is_sound(const mptqc_layer_norm_add& a) {
  return is_size(a.rows) && is_size(a.width) && is_table(a.table_size, a.rows) && is_table(a.code_table_size, a.rows) &&
         is_sound(a.quantizer);
}

bool is_sound(const mptqc_linear& a) {
  return is_size(a.rows) && is_size(a.outputs) && is_size(a.inputs) && a.inputs <= kMostLinearTerms &&
         is_table(a.table_size, a.rows) && is_sound_factor(a) && is_sound(a.rotary, a) && is_sound(a.unit_heads, a) &&
         a.activation >= MPTQC_NO_ACTIVATION && a.activation <= MPTQC_SILU && is_sound(a.quantizer);
}

bool is_sound(const mptqc_attention& a) {
  return is_size(a.batch) && a.heads > 0 && is_size(a.heads) && is_size(a.rows) && is_size(a.columns) &&
         a.columns <= kMostAttentionTerms && is_size(a.width) && a.width <= kMostAttentionTerms && is_size(a.value_width) && is_code(a.q_zero_point) && is_code(a.k_zero_point) &&
         is_code(a.v_zero_point) && is_sound(a.bias, a) && is_sound(a.mask, a) && is_sound(a.probability) &&
         is_sound(a.quantizer);
}

bool is_sound(const mptqc_patches& a) {
  return is_size(a.batch) && is_size(a.channels) && is_size(a.height) && is_size(a.width) && a.patch_height > 0 &&
         a.patch_width > 0 && a.height % a.patch_height == 0 && a.width % a.patch_width == 0 && is_sound(a.quantizer);
}

bool is_sound(const mptqc_trellis& a) {
  if (!is_size(a.rows) || !is_size(a.columns) || a.bits < 2 || a.bits > 5 || a.taps < 2 || a.taps > 6) return false;
  const int window = a.bits * a.taps;
  return window >= 10 && window <= 12 && a.first_state >= 0 && a.first_state < 1 << window;
}

}  // namespace mptqc

using namespace mptqc;

const char* mptqc_quantizer_fault(const mptqc_quantizer* q) {
  if (!(q->scale >= 0x1p-100f && q->scale <= 0x1p100f)) return "scale must lie between 2^-100 and 2^100";
  if (!is_code(q->zero_point)) return "zero_point must lie between 0 and 255";
  if (q->minimum < 0 || q->minimum > q->maximum || q->maximum > 255) return "0 <= minimum <= maximum <= 255 must hold";
  if (q->regions < 0 || q->regions > MPTQC_UPPER_REGIONS) return "there are at most 3 upper regions";
  if (q->regions > 0 && q->minimum > q->zero_point) return "minimum must not be above zero_point where there are regions";
  for (int i = 0; i < q->regions; ++i) {
    const int32_t m = q->m[i], split = q->split[i];
    if (m < 1 || m > 7 || (i > 0 && m <= q->m[i - 1])) return "m must rise, between 1 and 7";
    if (split < 0 || split > 255 || split % (1 << m) != 0) return "split must be a multiple of 2^m from 0 to 255";
    const int32_t end = i + 1 < q->regions ? q->split[i + 1] : q->maximum - q->zero_point;
    if (end < split || (end - split) % (1 << m) != 0) {
      return "regions must not fall and hold whole steps of 2^m, the last up to maximum - zero_point";
    }
  }
  return nullptr;
}

void mptqc_linear_offset(
    const int8_t* weight, int64_t inputs, int64_t outputs, int32_t zero_point, int32_t* offset) {
  const int64_t groups = ceil_divide(inputs, kBlockInputs);
  for (int64_t n = 0; n < outputs; ++n) {
    const int8_t* column = weight + n / kBlockOutputs * groups * kBlockBytes + n % kBlockOutputs * kBlockInputs;
    int32_t sum = 0;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t j = 0; j < kBlockInputs; ++j) sum += column[group * kBlockBytes + j];
    offset[n] = -zero_point * sum;
  }
}

int32_t mptqc_linear_span(const int8_t* weight, int64_t inputs, int64_t outputs) {
  const int64_t groups = ceil_divide(inputs, kBlockInputs), blocks = ceil_divide(outputs, kBlockOutputs);
  constexpr int64_t kSpans[] = {16, 8, 6, 4, 3, 2, 1};
  for (const int64_t span : kSpans) {
    int64_t block = 0;
    while (block < blocks && fits_in_spans(weight + block * groups * kBlockBytes, groups, span)) ++block;
    if (block == blocks) return static_cast<int32_t>(span);
  }
  return 0;
}
