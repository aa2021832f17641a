// The quantizer of docs/custom-ops.md, on four vectors (V is a Wide) or one (V is a Lanes type).
#pragma once

#include "wide.h"

namespace mptqc {
namespace {

constexpr int kExponentBit = 23;           // of a float
constexpr int32_t kOneBits = 0x3F800000;  // 1.0f

// Its constants, as scalars: they become vectors where they are used, and stay in registers there.
struct QuantizerConstants {
  float scale, inverse_scale, low, high;
  int32_t offset;
  int regions;
  float split[MPTQC_UPPER_REGIONS];  // where upper regions begin, in steps of scale
  int32_t exponent[MPTQC_UPPER_REGIONS];  // m where a float has its exponent: their steps are 2^m as large

  explicit QuantizerConstants(const mptqc_quantizer& q)
      : scale(q.scale),
        inverse_scale(1.0f / q.scale),
        low(static_cast<float>(q.minimum - q.zero_point)),
        high(static_cast<float>(q.maximum - q.zero_point)),
        offset(q.zero_point),
        regions(q.regions),
        split(),
        exponent() {
    for (int i = 0; i < regions; ++i) {
      split[i] = static_cast<float>(q.split[i]);
      exponent[i] = q.m[i] << kExponentBit;
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

// The codes of x, given x / scale where that lies between low and high, give or take its own rounding. A region begins and
// ends at a step of its own, so that none of its values is rounded beyond it.
template <class V>
MPTQC_INLINE typename V::I codes_in_range(const QuantizerConstants& q, typename V::F quotient) {
  if (q.regions == 0) return V::add(V::to_int(quotient), V::set(q.offset));
  auto exponent = V::set(int32_t{0});
  MPTQC_UNROLL
  for (int i = 0; i < MPTQC_UPPER_REGIONS; ++i) {
    if (i >= q.regions) break;
    exponent = V::where_at_least(quotient, V::set(q.split[i]), V::set(q.exponent[i]), exponent);
  }
  const auto inverse_step = V::as_float(V::subtract(V::set(kOneBits), exponent));
  const auto steps = V::to_int(V::multiply(quotient, inverse_step));
  return V::add(V::shift_left(steps, V::shift_right(exponent, kExponentBit)), V::set(q.offset));
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

// The same of an x that is approximated: what a reciprocal in place of the division adds is less than that.
template <class V>
MPTQC_INLINE typename V::I codes_near(const QuantizerConstants& q, typename V::F x) {
  return codes_of_quotient<V>(q, V::multiply(x, V::set(q.inverse_scale)));
}

// The first n of y, from element `index` on; `exact` tells codes_of from codes_near.
template <class V>
MPTQC_INLINE void write(const Output& output, int64_t index, typename V::F y, int n, bool exact) {
  if (output.quantized) {
    const auto codes = exact ? codes_of<V>(output.quantizer, y) : codes_near<V>(output.quantizer, y);
    V::store_codes(static_cast<uint8_t*>(output.data) + index, codes, n);
  } else {
    V::store(static_cast<float*>(output.data) + index, y, n);
  }
}

}  // namespace mptqc
