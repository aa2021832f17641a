// The quantizer of docs/custom-ops.md, on four vectors (V is a Wide) or one (V is a Lanes type).
#pragma once

#include "wide.h"

namespace mptqc {
namespace {

// Its constants, as scalars: they become vectors where they are used, and stay in registers there.
struct QuantizerConstants {
  struct Region {
    float first, last, inverse_step;
    int m;
  };

  float scale, inverse_scale, low, high, split;
  int32_t offset;
  int regions;
  Region upper[MPTQC_UPPER_REGIONS];

  explicit QuantizerConstants(const mptqc_quantizer& q)
      : scale(q.scale),
        inverse_scale(1.0f / q.scale),
        low(static_cast<float>(q.minimum - q.zero_point)),
        high(static_cast<float>(q.maximum - q.zero_point)),
        split(q.regions > 0 ? static_cast<float>(q.split[0]) : high),
        offset(q.zero_point),
        regions(q.regions),
        upper() {
    for (int i = 0; i < regions; ++i) {
      const int32_t end = i + 1 < regions ? q.split[i + 1] : q.maximum - q.zero_point;
      upper[i] = {static_cast<float>(q.split[i] >> q.m[i]), static_cast<float>(end >> q.m[i]),
                  1.0f / static_cast<float>(1 << q.m[i]), q.m[i]};
      offset -= q.split[i];
    }
  }
};

// A float or a code output.
struct Output {
  bool quantized;
  QuantizerConstants quantizer;
  void* data;

  Output(const mptqc_quantizer* q, void* to)
      : quantized(q != nullptr), quantizer(q != nullptr ? *q : mptqc_quantizer{1.0f, 0, 0, 255, 0, {}, {}}), data(to) {}
};

}  // namespace

// x / scale rounded as a division is, by Markstein's theorem: one Newton step makes the quotient faithful, a second one
// correct, as inverse_scale is the correctly rounded reciprocal.
template <class V>
MPTQC_INLINE typename V::F divide(const QuantizerConstants& q, typename V::F x) {
  const auto scale = V::set(q.scale), inverse_scale = V::set(q.inverse_scale);
  auto quotient = V::multiply(x, inverse_scale);
  quotient = V::multiply_add(V::subtract_product(x, quotient, scale), inverse_scale, quotient);
  return V::multiply_add(V::subtract_product(x, quotient, scale), inverse_scale, quotient);
}

template <class V>
MPTQC_INLINE typename V::F clamp(typename V::F x, float low, float high) {
  return V::maximum(V::minimum(x, V::set(high)), V::set(low));
}

// The codes of x, given x / scale where that lies between low and high, give or take its own rounding.
template <class V>
MPTQC_INLINE typename V::I codes_in_range(const QuantizerConstants& q, typename V::F quotient) {
  if (q.regions == 0) return V::add(V::to_int(quotient), V::set(q.offset));
  auto codes = V::add(V::to_int(V::minimum(quotient, V::set(q.split))), V::set(q.offset));
  MPTQC_UNROLL
  for (int i = 0; i < MPTQC_UPPER_REGIONS; ++i) {
    if (i >= q.regions) break;
    const auto& region = q.upper[i];
    const auto steps = clamp<V>(V::multiply(quotient, V::set(region.inverse_step)), region.first, region.last);
    codes = V::add(codes, V::shift_left(V::to_int(steps), region.m));
  }
  return codes;
}

template <class V>
MPTQC_INLINE typename V::I codes_of_quotient(const QuantizerConstants& q, typename V::F quotient) {
  return codes_in_range<V>(q, clamp<V>(quotient, q.low, q.high));
}

// x is held between low and high steps before it is divided: that also keeps infinities out.
template <class V>
MPTQC_INLINE typename V::I codes_of(const QuantizerConstants& q, typename V::F x) {
  return codes_in_range<V>(q, divide<V>(q, clamp<V>(x, q.low * q.scale, q.high * q.scale)));
}

// The first n of y, from element `index` on.
template <class V>
MPTQC_INLINE void write(const Output& output, int64_t index, typename V::F y, int n) {
  if (output.quantized) {
    V::store_codes(static_cast<uint8_t*>(output.data) + index, codes_of<V>(output.quantizer, y), n);
  } else {
    V::store(static_cast<float*>(output.data) + index, y, n);
  }
}

}  // namespace mptqc
