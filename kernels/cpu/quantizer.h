// The quantizer of docs/custom-ops.md, sixteen values at a time.
#pragma once

#include "sizes.h"

namespace mptqc {

template <class L>
struct Quantizer {
  using F = typename L::F;
  using I = typename L::I;

  F scale, inverse_scale, bound, low, split, inverse_coarse, first, last;
  I offset;
  int m;

  explicit Quantizer(const mptqc_quantizer& q) : m(q.m) {
    const float low_limit = static_cast<float>(q.minimum - q.zero_point);
    const float high_limit = static_cast<float>(q.maximum - q.zero_point);
    const float coarse = static_cast<float>(1 << q.m), middle = static_cast<float>(q.split);
    scale = L::set(q.scale);
    inverse_scale = L::set(1.0f / q.scale);
    bound = L::set(512.0f * q.scale);  // no code lies beyond 255 steps
    low = L::set(low_limit);
    split = L::set(q.m == 0 ? high_limit : middle);
    inverse_coarse = L::set(1.0f / coarse);
    first = L::set(middle / coarse);
    last = L::set(high_limit / coarse);
    offset = L::set(static_cast<int32_t>(q.m == 0 ? q.zero_point : q.zero_point - q.split));
  }

  // x / scale rounded as a division is, by Markstein's theorem: one Newton step makes the quotient faithful, a second
  // one correct, as inverse_scale is the correctly rounded reciprocal.
  F divide(F x) const {
    x = L::maximum(L::minimum(x, bound), L::subtract(L::set(0.0f), bound));
    F quotient = L::multiply(x, inverse_scale);
    quotient = L::multiply_add(L::subtract_product(x, quotient, scale), inverse_scale, quotient);
    return L::multiply_add(L::subtract_product(x, quotient, scale), inverse_scale, quotient);
  }

  // The codes of x, given x / scale.
  I codes_of_quotient(F quotient) const {
    const I fine = L::to_int(L::maximum(L::minimum(quotient, split), low));
    if (m == 0) return L::add(fine, offset);
    const F steps = L::multiply(quotient, inverse_coarse);
    const I coarse = L::to_int(L::maximum(L::minimum(steps, last), first));
    return L::add(L::add(fine, L::shift_left(coarse, m)), offset);
  }

  I codes(F x) const { return codes_of_quotient(divide(x)); }
};

// A float or a code output, sixteen values at a time.
template <class L>
struct Output {
  bool quantized;
  Quantizer<L> quantizer;
  void* data;

  Output(const mptqc_quantizer* q, void* data)
      : quantized(q != nullptr), quantizer(q != nullptr ? *q : mptqc_quantizer{1.0f, 0, 0, 255, 0, 0}), data(data) {}

  // The first n lanes of y, from element `index` on.
  void store(int64_t index, typename L::F y, int n) const {
    if (quantized) {
      L::store_codes(static_cast<uint8_t*>(data) + index, quantizer.codes(y), n);
    } else {
      L::store(static_cast<float*>(data) + index, y, n);
    }
  }
};

}  // namespace mptqc
