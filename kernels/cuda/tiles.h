// How the kernels lay tiles of codes out in shared memory, and which outputs a lane ends up with.
//
// The right operand of a product is kept in chunks of 16 bytes: 4 columns times 4 inputs, as in a blocked weight. A lane
// reads whole chunks, so that it holds the same inputs of columns 4g .. 4g + 3 (g = lane / 4) and uses each as the
// column g of another tensor-core product. The sums of these four products in a lane are then 8 consecutive columns of
// one row: outputs are written from registers in vectors, and no weight is ever rearranged.
#pragma once

#include "device.h"
#include "lane.h"

namespace mptqc {

constexpr int kWarp = 32;
constexpr int kChunk = 16;          // bytes
constexpr int kStep = 32;           // inputs of one tensor-core product
constexpr int kSpan = 32;           // columns of the four products that share chunks
constexpr int kSpanProducts = 4;    // products, of 8 columns each
constexpr int kLaneColumns = 8;     // columns of a span that one lane ends up with

template <int kCount>
struct CodesOf {
  uint8_t code[kCount];
};
struct alignas(4) Codes4 : CodesOf<4> {};
struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(16) Floats4 {
  float value[4];
};
struct alignas(8) Halves4 {
  Half value[4];
};
struct alignas(8) Ints2 {
  int32_t value[2];
};
struct alignas(16) Ints4 {
  int32_t value[4];
};

MPTQC_DEVICE bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Where the chunk of inputs 4 * group .. + 3 and columns 4 * quad .. + 3 lies in a right operand of kColumns columns, in
// chunks. The eight lanes that read together have two neighbouring quads and four groups: they hit all banks once.
template <int kColumns>
MPTQC_DEVICE int right_chunk(int group, int quad) {
  return group * (kColumns / 4) + (quad ^ ((group & 1) << 2 | (group & 2)));
}

// b[i] of the four products of span `span` over inputs 32 * step .. + 31 of a right operand.
template <int kColumns>
MPTQC_DEVICE void load_right(Words4 (&b)[2], const uint8_t* operand, int step, int span, int lane) {
  MPTQC_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int chunk = right_chunk<kColumns>(8 * step + 4 * i + lane % 4, 8 * span + lane / 4);
    b[i] = *reinterpret_cast<const Words4*>(operand + chunk * kChunk);
  }
}

// Codes `row`, `column` .. + 15 of a row-major matrix go to shared memory, zeros where they are not `valid` or beyond
// `width`. `unit` is 16, 4 or 1: what pointer and stride are multiples of; copies of 16 and 4 run in the background.
MPTQC_DEVICE void copy_codes(uint8_t* to, const uint8_t* row, int64_t column, int64_t width, bool valid, int unit) {
  if (unit == 16) {
    const bool whole = valid && column < width;
    return copy_async<16>(to, whole ? row + column : row, whole);
  }
  if (unit == 4) {
    MPTQC_UNROLL
    for (int i = 0; i < kChunk; i += 4) {
      const bool whole = valid && column + i < width;
      copy_async<4>(to + i, whole ? row + column + i : row, whole);
    }
    return;
  }
  Words4 chunk;
  MPTQC_UNROLL
  for (int i = 0; i < 4; ++i) {
    chunk.word[i] = 0;
    MPTQC_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t at = column + 4 * i + j;
      if (valid && at < width) chunk.word[i] |= static_cast<uint32_t>(row[at]) << (8 * j);
    }
  }
  *reinterpret_cast<Words4*>(to) = chunk;
}

MPTQC_DEVICE Floats4 load_floats(const Floats4* from) { return *from; }
MPTQC_DEVICE Floats4 load_floats(const Halves4* from) {
  const Halves4 half = *from;
  return {{to_float(half.value[0]), to_float(half.value[1]), to_float(half.value[2]), to_float(half.value[3])}};
}
MPTQC_DEVICE void store_floats(Floats4* to, const float* y) { *to = {{y[0], y[1], y[2], y[3]}}; }
MPTQC_DEVICE void store_floats(Halves4* to, const float* y) {
  *to = {{to_half(y[0]), to_half(y[1]), to_half(y[2]), to_half(y[3])}};
}
MPTQC_DEVICE float load_float(const float* from) { return *from; }
MPTQC_DEVICE float load_float(const Half* from) { return to_float(*from); }
MPTQC_DEVICE void store_float(float* to, float y) { *to = y; }
MPTQC_DEVICE void store_float(Half* to, float y) { *to = to_half(y); }

template <class T>
struct FloatsOf;
template <>
struct FloatsOf<float> {
  using Four = Floats4;
};
template <>
struct FloatsOf<Half> {
  using Four = Halves4;
};

// Adds the first `count` floats to y; if they are `whole`, all of them, which lie as vectors do.
template <class T, int kCount>
MPTQC_DEVICE void add_floats(float (&y)[kCount], const T* from, int64_t count, bool whole) {
  using Four = typename FloatsOf<T>::Four;
  if (whole) {
    MPTQC_UNROLL
    for (int four = 0; four < kCount / 4; ++four) {
      const Floats4 added = load_floats(reinterpret_cast<const Four*>(from) + four);
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) y[4 * four + i] += added.value[i];
    }
    return;
  }
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (i < count) y[i] += load_float(from + i);
}

template <class T, int kCount>
MPTQC_DEVICE void write_floats(T* to, const float (&y)[kCount], int64_t count, bool whole) {
  using Four = typename FloatsOf<T>::Four;
  if (whole) {
    MPTQC_UNROLL
    for (int four = 0; four < kCount / 4; ++four) store_floats(reinterpret_cast<Four*>(to) + four, y + 4 * four);
    return;
  }
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (i < count) store_float(to + i, y[i]);
}

// What a quantizer is given: values, to be divided as a division is or nearly so, or quotients.
enum class Steps { kExact, kNear, kOfQuotient };

// The codes of y.
template <int kCount>
MPTQC_DEVICE CodesOf<kCount> codes_of(const QuantizerConstants& q, const float (&y)[kCount], Steps how) {
  using Values = Lanes<kCount>;
  typename Values::F x;
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i) x.value[i] = y[i];
  const auto steps = how == Steps::kExact      ? steps_of<Values>(q, x)
                     : how == Steps::kNear ? steps_near<Values>(q, x)
                                           : steps_of_quotient<Values>(q, x);
  CodesOf<kCount> codes;
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i) codes.code[i] = code_of(q, steps.value[i]);
  return codes;
}

template <int kCount>
MPTQC_DEVICE void write_codes(uint8_t* to, const uint8_t* codes, int64_t count, bool whole) {
  struct alignas(kCount) Codes {
    uint8_t code[kCount];
  } own;
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i) own.code[i] = codes[i];
  if (whole) {
    *reinterpret_cast<Codes*>(to) = own;
    return;
  }
  MPTQC_UNROLL
  for (int i = 0; i < kCount; ++i)
    if (i < count) to[i] = own.code[i];
}

// Writes the first `count` <= kCount of y, codes or floats of 4 bytes, from element `index` of the output on.
template <int kCount>
MPTQC_DEVICE void write_outputs(const Output& output, int64_t index, const float (&y)[kCount], int64_t count) {
  if (output.quantized) {
    uint8_t* const to = static_cast<uint8_t*>(output.data) + index;
    return write_codes<kCount>(to, codes_of(output.quantizer, y, Steps::kExact).code, count, count >= kCount && is_aligned(to, kCount));
  }
  float* const to = static_cast<float*>(output.data) + index;
  write_floats(to, y, count, count >= kCount && is_aligned(to, sizeof(Floats4)));
}

}  // namespace mptqc
