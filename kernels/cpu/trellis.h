// Codes of a row of weights by Viterbi's algorithm; mptqc/reference/trellis.py says what they mean.
#pragma once

#include <cstdint>
#include <cstring>

#include "mptqc_kernels.h"
#include "sizes.h"

namespace mptqc {
namespace {

// States are windows of unsigned codes, the newest in the lowest bits. Those that differ in the oldest code alone lead to
// the same: state h * groups + g is followed by g * fan + u.
template <int kBits>
class TrellisRow {
 public:
  TrellisRow(const mptqc_trellis& a, uint8_t* scratch)
      : a_(a),
        groups_(int64_t{1} << (kBits * (a.taps - 1))),
        cost_(reinterpret_cast<float*>(scratch)),
        best_(cost_ + groups_ * kFan),
        oldest_(reinterpret_cast<uint8_t*>(best_ + groups_)) {}

  void run(int64_t row) {
    const float* x = a_.input + row * a_.columns;
    for (int64_t state = 0; state < groups_ * kFan; ++state) cost_[state] = kUnreachable;
    cost_[a_.first_state] = 0;
    for (int64_t n = 0; n < a_.columns; ++n) {
      const float least = choose_oldest(oldest_ + n * groups_);
      add_errors(x[n], a_.importance[n], least);
    }
    int64_t state = 0;
    for (int64_t other = 1; other < groups_ * kFan; ++other)
      if (cost_[other] < cost_[state]) state = other;
    int8_t* codes = a_.output + row * a_.columns;
    for (int64_t n = a_.columns - 1; n >= 0; --n) {
      codes[n] = static_cast<int8_t>((state & (kFan - 1)) - kFan / 2);
      const int64_t group = state >> kBits;
      state = oldest_[n * groups_ + group] * groups_ + group;
    }
  }

 private:
  static constexpr int kFan = 1 << kBits;
  static constexpr int kLanes = 8;
  static constexpr int kStrip = 4 * kLanes;  // divides every number of groups
  static constexpr float kUnreachable = __builtin_inff();

  // Vectors of the compiler's, which every instruction set has: two of SSE's or NEON's registers, one of AVX2's.
  typedef float Floats __attribute__((vector_size(kLanes * 4)));
  typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

  // The cheapest way into each group; returns the least of their costs.
  float choose_oldest(uint8_t* oldest) {
    Floats least = Floats{} + kUnreachable;
    for (int64_t strip = 0; strip < groups_; strip += kStrip) {
      Floats best[kStrip / kLanes];
      Ints chosen[kStrip / kLanes] = {};
      std::memcpy(best, cost_ + strip, sizeof best);
      for (int h = 1; h < kFan; ++h) {
        Floats cost[kStrip / kLanes];
        std::memcpy(cost, cost_ + h * groups_ + strip, sizeof cost);
        for (int i = 0; i < kStrip / kLanes; ++i) {
          const Ints less = cost[i] < best[i];
          chosen[i] = less ? Ints{} + h : chosen[i];
          best[i] = less ? cost[i] : best[i];
        }
      }
      std::memcpy(best_ + strip, best, sizeof best);
      for (int i = 0; i < kStrip / kLanes; ++i) least = best[i] < least ? best[i] : least;
      for (int i = 0; i < kStrip / kLanes; ++i) {
        const Bytes narrow = __builtin_convertvector(chosen[i], Bytes);
        std::memcpy(oldest + strip + i * kLanes, &narrow, sizeof narrow);
      }
    }
    float found = least[0];
    for (int i = 1; i < kLanes; ++i) found = least[i] < found ? least[i] : found;
    return found;
  }

  void add_errors(float x, float importance, float least) {
    for (int64_t state = 0; state < groups_ * kFan; state += kLanes) {
      Floats value, before;
      std::memcpy(&value, a_.values + state, sizeof value);
      const float* best = best_ + (state >> kBits);
      if constexpr (kFan < kLanes)
        before = Floats{best[0], best[0], best[0], best[0], best[1], best[1], best[1], best[1]};
      else
        before = Floats{} + best[0];
      const Floats error = x - value;
      const Floats cost = error * error * importance + (before - least);
      std::memcpy(cost_ + state, &cost, sizeof cost);
    }
  }

  const mptqc_trellis& a_;
  const int64_t groups_;
  float *cost_, *best_;
  uint8_t* oldest_;
};

void run_trellis(const mptqc_trellis& a, int64_t row, uint8_t* scratch) {
  switch (a.bits) {
    case 2:
      return TrellisRow<2>(a, scratch).run(row);
    case 3:
      return TrellisRow<3>(a, scratch).run(row);
    case 4:
      return TrellisRow<4>(a, scratch).run(row);
    default:
      return TrellisRow<5>(a, scratch).run(row);
  }
}

}  // namespace
}  // namespace mptqc
