// Sixteen lanes in plain C++: the baseline that the vector versions equal bit for bit, and what ARM runs.
//
// Every Lanes type has the members of this one. F holds 16 floats, I 16 int32; Weights 16 outputs' groups of 4 int8,
// Inputs one group of 4 uint8 for all outputs. Sums across lanes fold halves: 8 + 8, 4 + 4, 2 + 2, 1 + 1.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mptqc {
namespace {

struct LanesPortable {
  static constexpr int kValues = 16;
  static constexpr int kRows = 4, kVectors = 1;  // of the product's register tile
  static constexpr int32_t kTaken = 0;  // what `spread` takes off codes: 0 or 128
  static constexpr bool kLooksUpTwo = false;  // whether `look_up` is there for two indices, as in lanes_avx2.h
  static constexpr bool kBlocksWholeTiles = false;  // whether blocks are made at once, as in lanes_avx512_vnni.h

  struct F {
    float lane[16];
  };
  struct I {
    int32_t lane[16];
  };
  // Sixteen values to look up.
  struct Table {
    const float* entry;

    Table() = default;
    explicit Table(const float (&entries)[16]) : entry(entries) {}
  };
  struct Inputs {
    uint8_t code[4];
  };
  struct Weights {
    const int8_t* code;
  };

  static F set(float x) {
    F out;
    for (float& lane : out.lane) lane = x;
    return out;
  }
  static I set(int32_t x) {
    I out;
    for (int32_t& lane : out.lane) lane = x;
    return out;
  }
  static F load(const float* from) { return load(from, 16); }
  static I load(const int32_t* from) {
    I out;
    std::memcpy(out.lane, from, sizeof out.lane);
    return out;
  }
  // The first n floats, zeros behind them.
  static F load(const float* from, int n) {
    F out = {};
    std::memcpy(out.lane, from, sizeof(float) * n);
    return out;
  }
  static void store(float* to, F a) { store(to, a, 16); }
  static void store(float* to, F a, int n) { std::memcpy(to, a.lane, sizeof(float) * n); }
  static void store(int32_t* to, I a) { std::memcpy(to, a.lane, sizeof a.lane); }

  // The first n codes: steps + zero_point, held between minimum and maximum. Steps may be anything that is less than
  // 2^31 - 256.
  static void store_codes(uint8_t* to, I steps, int32_t zero_point, int32_t minimum, int32_t maximum, int n) {
    for (int i = 0; i < n; ++i) {
      const int32_t code = steps.lane[i] + zero_point, least = code > minimum ? code : minimum;
      to[i] = static_cast<uint8_t>(least < maximum ? least : maximum);
    }
  }
  // The same of four vectors.
  static void store_codes(uint8_t* to, const I (&steps)[4], int32_t zero_point, int32_t minimum, int32_t maximum) {
    for (int i = 0; i < 4; ++i) store_codes(to + 16 * i, steps[i], zero_point, minimum, maximum, 16);
  }

  // The first n lanes of a, the others of b.
  static F first(int n, F a, F b) {
    for (int i = n; i < 16; ++i) a.lane[i] = b.lane[i];
    return a;
  }

  static F add(F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static F subtract(F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] -= b.lane[i];
    return a;
  }
  static F multiply(F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] *= b.lane[i];
    return a;
  }
  // a * b + c, rounded once.
  static F multiply_add(F a, F b, F c) {
    for (int i = 0; i < 16; ++i) a.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
    return a;
  }
  // c - a * b, rounded once.
  static F subtract_product(F c, F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = std::fma(-a.lane[i], b.lane[i], c.lane[i]);
    return a;
  }
  // b where a is NaN, as on x86.
  static F minimum(F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static F maximum(F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  // |a|, at most `bound`.
  static F least_magnitude(F a, F bound) {
    for (float& lane : a.lane) lane = std::fabs(lane);
    return minimum(a, bound);
  }
  // a + max(x, 0)
  static F add_positive(F a, F x) {
    for (int i = 0; i < 16; ++i) a.lane[i] += x.lane[i] > 0.0f ? x.lane[i] : 0.0f;
    return a;
  }
  // The entry that the low 4 bits of each lane name.
  static F look_up(const Table& table, I index) {
    F out;
    for (int i = 0; i < 16; ++i) out.lane[i] = table.entry[index.lane[i] & 15];
    return out;
  }
  // To nearest, ties to even; a < 2^22. What is below -2^22, or not a number, gives a number as low or lower.
  static I to_int(F a) {
    const float shifter = 12582912.0f, low = -4194304.0f;  // 1.5 * 2^23, whose last bit is worth 1, and -2^22
    I out;
    for (int i = 0; i < 16; ++i) {
      out.lane[i] = static_cast<int32_t>(((a.lane[i] > low ? a.lane[i] : low) + shifter) - shifter);
    }
    return out;
  }
  static F to_float(I a) {
    F out;
    for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<float>(a.lane[i]);
    return out;
  }
  static I add(I a, I b) {  // wrapping
    for (int i = 0; i < 16; ++i) a.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]));
    return a;
  }
  static I maximum(I a, I b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static I shift_left(I a, int bits) {
    for (int32_t& lane : a.lane) lane = static_cast<int32_t>(static_cast<uint32_t>(lane) << bits);
    return a;
  }
  // a where x >= bound, else b.
  static F where_at_least(F x, F bound, F a, F b) {
    for (int i = 0; i < 16; ++i) a.lane[i] = x.lane[i] >= bound.lane[i] ? a.lane[i] : b.lane[i];
    return a;
  }
  static F as_float(I a) {
    F out;
    std::memcpy(out.lane, a.lane, sizeof out.lane);
    return out;
  }
  static I as_int(F a) {
    I out;
    std::memcpy(out.lane, a.lane, sizeof out.lane);
    return out;
  }

  static float sum(F a) {
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) a.lane[i] += a.lane[i + half];
    return a.lane[0];
  }
  static float largest(F a) {
    for (int half = 8; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
    return a.lane[0];
  }
  static int32_t largest(I a) {
    for (int i = 1; i < 16; ++i) a.lane[0] = a.lane[i] > a.lane[0] ? a.lane[i] : a.lane[0];
    return a.lane[0];
  }

  static int32_t sum_codes(const uint8_t* codes, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += codes[i];
    return total;
  }

  static Inputs spread(const uint8_t* codes) {
    Inputs out;
    std::memcpy(out.code, codes, sizeof out.code);
    return out;
  }
  static Weights weights(const int8_t* block) { return {block}; }
  // sum + (a - kTaken) · w, exact.
  static I dot(I sum, Inputs a, Weights w) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) sum.lane[i] += a.code[j] * w.code[4 * i + j];
    return sum;
  }

  // Sixteen columns of four rows of codes as one block, each code minus 128.
  static void block_of_rows(const uint8_t* const rows[4], int8_t* block) {
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 4; ++j) block[4 * i + j] = static_cast<int8_t>(rows[j][i] - 128);
  }
  // Sixteen codes of four rows, each code minus 128: the w-th four codes of row r become word r of the w-th block.
  static void words_of_rows(const uint8_t* const rows[4], int8_t* first_block) {
    for (int w = 0; w < 4; ++w)
      for (int r = 0; r < 4; ++r)
        for (int j = 0; j < 4; ++j) first_block[64 * w + 4 * r + j] = static_cast<int8_t>(rows[r][4 * w + j] - 128);
  }
};

}  // namespace
}  // namespace mptqc
