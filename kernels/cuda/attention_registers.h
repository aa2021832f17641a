// Attention whose scores stay in the registers: of at most 288 columns. A row's largest score is known before its powers are
// made, and their sum before their codes, so that each is made once.
#pragma once

#include "attention_block.h"

namespace mptqc {
namespace {

// kParts: spans of columns that there is room for. kAdds: whether there is a bias or a mask.
template <int kSteps, int kSpans, int kParts, bool kAdds>
struct AttentionInRegisters : AttentionBlock<kSteps, kSpans> {
  using Base = AttentionBlock<kSteps, kSpans>;
  using typename Base::Addends, typename Base::Context, typename Base::Left;
  using Base::a, Base::p, Base::shared, Base::lane, Base::warp;

  using Scores = float[kSpanProducts][4];  // as AttentionBlock's columns say

  MPTQC_DEVICE bool has(int part) const { return kSpan * part < a().columns; }

  // Scores of the columns of a part, minus infinity beyond the last one. `row_offset` has the bits of kShifter in it: what
  // the products add up to are the bits of kShifter + the sum then.
  MPTQC_DEVICE void make_scores(Scores& score, const Left& left, const int32_t (&row_offset)[2], const Addends& added,
                                int row, int part) const {
    const int32_t* key_offset = reinterpret_cast<const int32_t*>(shared + p.layout.key_offset) + kSpan * part;
    int32_t sums[kSpanProducts][4];
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      const auto offsets = *reinterpret_cast<const Ints2*>(key_offset + this->column_of(t, 0));
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) sums[t][i] = row_offset[i / 2] + offsets.value[i % 2];
    }
    MPTQC_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      MPTQC_UNROLL
      for (int pair = 0; pair < kSpanProducts / 2; ++pair) {
        uint32_t key[4];
        this->load_keys_of(key, kSpan * part + 16 * pair, step);
        multiply_add<false>(sums[2 * pair], left[step], key[0], key[1]);
        multiply_add<false>(sums[2 * pair + 1], left[step], key[2], key[3]);
      }
    }
    const int count = this->count_from(kSpan * part);
    MPTQC_UNROLL
    for (int i = 0; i < kSpan / 2; ++i) score[i / 4][i % 4] = (float_of(sums[i / 4][i % 4]) - kShifter) * a().score_scale;
    if constexpr (kAdds) this->add(score, added, row, kSpan * part, count);
    if (count < kSpan) {
      MPTQC_UNROLL
      for (int i = 0; i < kSpan / 2; ++i) {
        if (this->column_of(i / 4, i % 4) >= count) score[i / 4][i % 4] = -INFINITY;
      }
    }
  }

  // Codes of P, whose zero point and lowest code are 0, as a left operand.
  MPTQC_DEVICE void make_codes(uint32_t (&left)[4], const Scores& power, const float (&quotient)[2]) const {
    using Values = Lanes<kSpan / 2>;
    typename Values::F x;
    MPTQC_UNROLL
    for (int i = 0; i < kSpan / 2; ++i) x.value[i] = power[i / 4][i % 4] * quotient[i % 4 / 2];
    const auto code = steps_of_quotient<Values>(p.probability, x);
    const auto pair = [&](int t, int half) {
      return pick_bytes(code.value[4 * t + 2 * half], code.value[4 * t + 2 * half + 1], 0x0040);
    };
    MPTQC_UNROLL
    for (int i = 0; i < 4; ++i) left[i] = pick_bytes(pair(i / 2 * 2, i % 2), pair(i / 2 * 2 + 1, i % 2), 0x5410);
  }

  // The queries of rows `row` and row + 8 as a left operand.
  MPTQC_DEVICE void load_queries(Left& queries, int row) const {
    const int64_t apart = a().heads * a().width;
    MPTQC_UNROLL
    for (int i = 0; i < kSteps * 4; ++i) {
      const int half = i % 2, column = i / 2 * kChunk + lane % 4 * 4, width = static_cast<int>(a().width);
      const uint8_t* const from = this->queries() + int64_t{row + 8 * half} * apart + column;
      uint32_t& four = queries[i / 4][i % 4];
      if (row + 8 * half >= a().rows || column >= width) {
        four = 0;
      } else if (p.query_unit >= 4) {
        four = *reinterpret_cast<const uint32_t*>(from);
      } else {
        four = this->load_four(from, width - column);
      }
    }
  }

  MPTQC_DEVICE void run() const {
    wait_for_inputs();
    this->load_keys(0);
    commit_copies();
    Left queries;
    const int rows_left = a().rows - this->first_row;
    const int rows = static_cast<int>(rows_left < p.block_rows ? rows_left : p.block_rows);
    const int first = kWarpRows * warp;
    if (first < rows) load_queries(queries, this->first_row + first + lane / 4);
    this->load_values(0);
    wait_copies<0>();
    sync_threads();
    this->key_offsets();
    sync_threads();
    let_next_begin();
    const Addends added = kAdds ? this->addends() : Addends();
    MPTQC_ROLL
    for (int row = first; row < rows; row += kBlockRows) {
      const int own = worked_out_anew(lane);  // else what follows from it would fill the registers from turn to turn
      if (row > first) load_queries(queries, this->first_row + row + own / 4);
      AttentionInRegisters{{p, this->first_row, this->first_column, this->head, this->batch, shared, warp, own}}.attend(
          queries, added, this->first_row + row + own / 4);
    }
  }

  // Rows `row` and row + 8.
  MPTQC_DEVICE void attend(const Left& queries, const Addends& added, int row) const {
    int32_t row_offset[2];
    MPTQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t sum = 0;
      MPTQC_UNROLL
      for (int i = half; i < kSteps * 4; i += 2) sum = add_codes(queries[i / 4][i % 4], sum);
      sum += exchange(sum, 1);
      sum += exchange(sum, 2);
      row_offset[half] = kShifterBits - a().k_zero_point * static_cast<int32_t>(sum);
    }
    Scores score[kParts];
    float largest[2] = {kLowest, kLowest}, total[2] = {0, 0};
    MPTQC_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (!has(part)) {
        MPTQC_UNROLL
        for (int i = 0; i < kSpan / 2; ++i) score[part][i / 4][i % 4] = 0;  // or those of the rows before would be kept
        continue;
      }
      make_scores(score[part], queries, row_offset, added, row, part);
      MPTQC_UNROLL
      for (int i = 0; i < kSpan / 2; ++i) {
        float& most = largest[i % 4 / 2];
        most = fmaxf(most, score[part][i / 4][i % 4]);
      }
    }
    MPTQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], exchange(largest[half], 1));
      largest[half] = fmaxf(largest[half], exchange(largest[half], 2));
    }
    MPTQC_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (!has(part)) continue;
      MPTQC_UNROLL
      for (int i = 0; i < kSpan / 2; ++i) {
        float& x = score[part][i / 4][i % 4];
        x = Base::power(x, largest[i % 4 / 2]);
        total[i % 4 / 2] += x;
      }
    }
    float quotient[2], divisor[2];  // of each row: from powers to steps of P, and what P was divided by
    MPTQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      total[half] += exchange(total[half], 1);
      total[half] += exchange(total[half], 2);
      quotient[half] = 1.0f / ((a().row_scale ? 1.0f : total[half]) * p.probability.scale);
      divisor[half] = a().row_scale ? 1.0f / total[half] : 1.0f;
    }

    Context context = {};
    uint32_t code_sum[2] = {};
    MPTQC_UNROLL
    for (int part = 0; part < kParts; ++part) {
      if (!has(part)) continue;
      uint32_t codes[4];
      make_codes(codes, score[part], quotient);
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) code_sum[i % 2] = add_codes(codes[i], code_sum[i % 2]);
      MPTQC_UNROLL
      for (int j = 0; j < kSpans; ++j) {
        Words4 value[2];
        load_right<Base::kColumns>(value, shared + p.layout.values, part, j, lane);
        MPTQC_UNROLL
        for (int t = 0; t < kSpanProducts; ++t) multiply_add<false>(context[j][t], codes, value[0].word[t], value[1].word[t]);
      }
    }
    MPTQC_UNROLL
    for (int half = 0; half < 2; ++half) {
      code_sum[half] += exchange(code_sum[half], 1);
      code_sum[half] += exchange(code_sum[half], 2);
    }
    MPTQC_UNROLL
    for (int i = 0; i < kSpans * kSpanProducts * 4; ++i) {
      context[i / 16][i / 4 % 4][i % 4] -= a().v_zero_point * static_cast<int32_t>(code_sum[i % 4 / 2]);
    }
    this->write(context, divisor, row);
  }
};

}  // namespace
}  // namespace mptqc
