// The quantizer of docs/custom-ops.md, on four vectors (V is a Wide) or one (V is a Lanes type).
#pragma once

#include "wide.h"

namespace mptqc {
namespace {

// Its constants, as scalars: they become vectors where they are used, and stay in registers there.
struct QuantizerConstants {
  float scale, inverse_scale, inverse_rest, high;
  int32_t zero_point, minimum, maximum;
  int regions;
  float split[MPTQC_UPPER_REGIONS];    // where upper regions begin, in steps of scale
  float shifter[MPTQC_UPPER_REGIONS];  // what rounds to their steps, 2^m as large, when it is added

  explicit QuantizerConstants(const mptqc_quantizer& q)
      : scale(q.scale),
        inverse_scale(1.0f / q.scale),
        inverse_rest(static_cast<float>((1.0 - static_cast<double>(inverse_scale) * q.scale) / q.scale)),
        high(static_cast<float>(q.maximum - q.zero_point)),
        zero_point(q.zero_point),
        minimum(q.minimum),
        maximum(q.maximum),
        regions(q.regions),
        split(),
        shifter() {
    for (int i = 0; i < regions; ++i) {
      split[i] = static_cast<float>(q.split[i]);
      shifter[i] = kShifter * static_cast<float>(1 << q.m[i]);
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

// x / scale, the inverse of scale being the sum of two floats. That is rounded as a division is, but for a few x of some scales
// (Brisebarre, Muller, Raina: Accelerating correctly rounded floating-point division when the divisor is known in advance,
// 2004). None of their quotients is a half or a whole number below 512 or next to one: no step depends on them.
//
// Let X and Y be the integers of 24 bits of x and scale, so that the quotient is below 2 and above a half. Before it is
// rounded, the sum is less than 2^-48 off. Nearer to the middle of two floats is no quotient above 1, and one below 1 only if
// X * 2^25 - M * Y is 1 or -1, M / 2^25 being the middle. The tests find all such X and Y next to a half or a whole number.
template <class V>
MPTQC_INLINE typename V::F divide(const QuantizerConstants& q, typename V::F x) {
  return V::multiply_add(x, V::set(q.inverse_scale), V::multiply(x, V::set(q.inverse_rest)));
}

template <class V>
MPTQC_INLINE typename V::F rounded_by_region(const QuantizerConstants& q, typename V::F quotient) {
  auto shifter = V::set(kShifter);
  MPTQC_UNROLL
  for (int i = 0; i < MPTQC_UPPER_REGIONS; ++i) {
    if (i >= q.regions) break;
    shifter = V::where_at_least(quotient, V::set(q.split[i]), V::set(q.shifter[i]), shifter);
  }
  return V::subtract(V::add(quotient, shifter), shifter);
}

// The steps from the zero point of x, given x / scale, give or take its own rounding, where that is not too high. The lowest
// code is seen to when codes are stored. A region begins and ends at a step of its own, so that none of its values is rounded
// beyond it.
template <class V>
MPTQC_INLINE typename V::I steps_of_held(const QuantizerConstants& q, typename V::F quotient) {
  return V::to_int(q.regions == 0 ? quotient : rounded_by_region<V>(q, quotient));
}

template <class V>
MPTQC_INLINE typename V::I steps_of_quotient(const QuantizerConstants& q, typename V::F quotient) {
  return steps_of_held<V>(q, V::minimum(quotient, V::set(q.high)));
}

// x is held before it is divided. The quotient of minus infinity is not a number, which counts as the lowest.
template <class V>
MPTQC_INLINE typename V::I steps_of(const QuantizerConstants& q, typename V::F x) {
  return steps_of_held<V>(q, divide<V>(q, V::minimum(x, V::set(q.high * q.scale))));
}

// The same of an x whose steps fit 32 bits: codes are held as they are stored.
template <class V>
MPTQC_INLINE typename V::I steps_of_unheld(const QuantizerConstants& q, typename V::F x) {
  return steps_of_held<V>(q, divide<V>(q, x));
}

// The same of an x that is approximated: what a reciprocal in place of the division adds is less than that.
template <class V>
MPTQC_INLINE typename V::I steps_near(const QuantizerConstants& q, typename V::F x) {
  return steps_of_quotient<V>(q, V::multiply(x, V::set(q.inverse_scale)));
}

// The steps of x * factor / scale, given factor / scale, where that is above -2^22 and need not be held: rounding takes the
// place of an addition, and codes are held as they are stored.
template <class V>
MPTQC_INLINE typename V::I steps_of_product(const QuantizerConstants& q, typename V::F x, typename V::F factor) {
  const auto shifter = V::set(kShifter);
  const auto shifted = q.regions == 0 ? V::multiply_add(x, factor, shifter)
                                      : V::add(rounded_by_region<V>(q, V::multiply(x, factor)), shifter);
  return V::add(V::as_int(shifted), V::set(-kShifterBits));
}

// Stores the first n codes.
template <class V>
MPTQC_INLINE void store_codes(const QuantizerConstants& q, uint8_t* to, typename V::I steps, int n) {
  V::store_codes(to, steps, q.zero_point, q.minimum, q.maximum, n);
}

// The first n of y, from element `index` on.
template <class V>
MPTQC_INLINE void write(const Output& output, int64_t index, typename V::F y, int n) {
  if (output.quantized) {
    store_codes<V>(output.quantizer, static_cast<uint8_t*>(output.data) + index, steps_of<V>(output.quantizer, y), n);
  } else {
    V::store(static_cast<float*>(output.data) + index, y, n);
  }
}

}  // namespace mptqc
