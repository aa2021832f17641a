// Attention of any number of columns. Keys and values pass through shared memory in parts, all at once where they fit. The
// softmax is quantized, so that its sum must be known before the first code: a first pass over the keys finds each row's
// largest score and sum of powers, a second one makes the scores again, their codes and the context.
#include "../cpu/arguments.h"
#include "attention_registers.h"

namespace mptqc {
namespace {

template <int kSteps, int kSpans>
struct AttentionInParts : AttentionBlock<kSteps, kSpans> {
  using Base = AttentionBlock<kSteps, kSpans>;
  using typename Base::Addends, typename Base::Context, typename Base::Left;
  using Base::a, Base::p, Base::shared, Base::lane, Base::warp, Base::kColumns;

  // score[t][i]: row lane / 4 + 8 * (i / 2), column 8t + 2 * (lane % 4) + i % 2 of the 32 from `column` of this part on;
  // minus infinity beyond the last column.
  MPTQC_DEVICE void scores(float (&score)[kSpanProducts][4], const Left& left, const int32_t (&row_offset)[2],
                           const Addends& added, int row, int64_t part, int column) const {
    int32_t sums[kSpanProducts][4] = {};
    for (int step = 0; step < this->steps(); ++step) {
      uint32_t query[4];
      if constexpr (kSteps == 0) {
        load_left(query, step);
      } else {
        MPTQC_UNROLL
        for (int i = 0; i < 4; ++i) query[i] = left[step][i];
      }
      MPTQC_UNROLL
      for (int pair = 0; pair < kSpanProducts / 2; ++pair) {
        uint32_t key[4];
        this->load_keys_of(key, column + 16 * pair, step);
        multiply_add<false>(sums[2 * pair], query, key[0], key[1]);
        multiply_add<false>(sums[2 * pair + 1], query, key[2], key[3]);
      }
    }
    const int32_t* key_offset = reinterpret_cast<const int32_t*>(shared + p.layout.key_offset);
    const int count = this->count_from(part + column);
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int32_t sum = sums[t][i] + key_offset[column + this->column_of(t, i)] + row_offset[i / 2];
        const float total = kSteps > 0 ? small_to_float(sum) : static_cast<float>(sum);
        score[t][i] = total * a().score_scale;
      }
    }
    this->add(score, added, row, part + column, count);
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t)
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) score[t][i] = this->column_of(t, i) < count ? score[t][i] : -INFINITY;
  }

  // Takes 8 scores of one row into its largest score and its sum of powers e^(score - largest).
  MPTQC_DEVICE static void add_powers(const float (&score)[kSpanProducts][4], int half, float& largest, float& total) {
    float most = largest;
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) most = fmaxf(most, fmaxf(score[t][2 * half], score[t][2 * half + 1]));
    float sum = 0;
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      sum += Base::power(score[t][2 * half], most) + Base::power(score[t][2 * half + 1], most);
    }
    total = fmaf(total, Base::power(largest, most), sum);
    largest = most;
  }

  // The four lanes of a row join what each has seen of it.
  MPTQC_DEVICE static void join(float& largest, float& total) {
    MPTQC_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = exchange(largest, mask), sum = exchange(total, mask), most = fmaxf(largest, other);
      total = total * Base::power(largest, most) + sum * Base::power(other, most);
      largest = most;
    }
  }

  // Makes codes of P from 32 columns of scores, adds them to code_sum, and their products with the values to `context`;
  // sums of the values alone go to `value_sum` where P has a zero point.
  MPTQC_DEVICE void add_context(Context& context, Context& value_sum, int32_t (&code_sum)[2],
                                const float (&score)[kSpanProducts][4], const float (&largest)[2],
                                const float (&quotient)[2], int64_t part, int column) const {
    const int count = this->count_from(part + column);
    using Values = Lanes<kSpan / 2>;
    typename Values::F quotient_of_p;
    MPTQC_UNROLL
    for (int i = 0; i < kSpan / 2; ++i) {
      quotient_of_p.value[i] = Base::power(score[i / 4][i % 4], largest[i % 4 / 2]) * quotient[i % 4 / 2];
    }
    const auto steps = steps_of_quotient<Values>(p.probability, quotient_of_p);
    uint32_t left[4] = {};
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int32_t code = this->column_of(t, i) < count ? code_of(p.probability, steps.value[4 * t + i]) : 0;
        code_sum[i / 2] += code;
        left[t / 2 * 2 + i / 2] |= static_cast<uint32_t>(code) << (8 * (t % 2 * 2 + i % 2));
      }
    }
    constexpr uint32_t ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
    MPTQC_UNROLL
    for (int j = 0; j < kSpans; ++j) {
      Words4 value[2];
      load_right<kColumns>(value, shared + p.layout.values, column / kStep, j, lane);
      MPTQC_UNROLL
      for (int t = 0; t < kSpanProducts; ++t) {
        multiply_add<false>(context[j][t], left, value[0].word[t], value[1].word[t]);
        if (a().probability.zero_point != 0) {
          multiply_add<false>(value_sum[j][t], ones, value[0].word[t], value[1].word[t]);
        }
      }
    }
  }

  MPTQC_DEVICE void load_left(uint32_t (&words)[4], int step) const {
    const int row = kWarpRows * warp + lane % 16, chunk = 2 * step + lane / 16;
    load_matrices(words, shared + row * this->stride() + chunk * kChunk);
  }

  MPTQC_DEVICE void run() const {
    const int64_t columns = p.layout.columns;
    const int row = this->first_row + kWarpRows * warp + lane / 4;
    const bool at_once = columns >= a().columns;
    wait_for_inputs();
    this->load_rows(this->queries(), a().rows, this->first_row, kBlockRows, p.query_unit, shared);
    this->load_keys(0);
    commit_copies();
    if (at_once) this->load_values(0);
    wait_copies<0>();
    sync_threads();
    this->offsets(shared, kBlockRows, a().k_zero_point, 0, p.layout.row_offset);
    this->key_offsets();
    sync_threads();
    const int32_t* offset = reinterpret_cast<const int32_t*>(shared + p.layout.row_offset) + kWarpRows * warp + lane / 4;
    const int32_t row_offset[2] = {offset[0], offset[8]};
    const Addends added = this->addends();
    Left left;
    if constexpr (kSteps > 0) {
      MPTQC_UNROLL
      for (int step = 0; step < kSteps; ++step) load_left(left[step], step);
    }

    float largest[2] = {kLowest, kLowest}, total[2] = {0, 0};
    float score[kSpanProducts][4];
    for (int64_t part = 0; part < a().columns; part += columns) {
      if (part > 0) reload(part, false);
      for (int column = 0; column < columns && part + column < a().columns; column += kSpan) {
        scores(score, left, row_offset, added, row, part, column);
        for (int half = 0; half < 2; ++half) add_powers(score, half, largest[half], total[half]);
      }
    }
    float quotient[2], factor[2];  // of each row: from powers to steps of P, and what P was divided by
    for (int half = 0; half < 2; ++half) {
      join(largest[half], total[half]);  // the largest power itself is 1
      quotient[half] = 1.0f / ((a().row_scale ? 1.0f : total[half]) * p.probability.scale);
      factor[half] = a().row_scale ? 1.0f / total[half] : 1.0f;
    }

    Context context = {}, value_sum = {};
    int32_t code_sum[2] = {};
    for (int64_t part = 0; part < a().columns; part += columns) {
      if (!at_once) reload(part, true);
      for (int column = 0; column < columns && part + column < a().columns; column += kSpan) {
        scores(score, left, row_offset, added, row, part, column);
        add_context(context, value_sum, code_sum, score, largest, quotient, part, column);
      }
    }
    for (int half = 0; half < 2; ++half) {
      code_sum[half] += exchange(code_sum[half], 1);
      code_sum[half] += exchange(code_sum[half], 2);
    }
    const int32_t p_zero = a().probability.zero_point, v_zero = a().v_zero_point;
    const int32_t constant = static_cast<int32_t>(a().columns) * p_zero * v_zero;
    MPTQC_UNROLL
    for (int i = 0; i < kSpans * kSpanProducts * 4; ++i) {
      const int j = i / 16, t = i / 4 % 4, k = i % 4;
      context[j][t][k] += constant - v_zero * code_sum[k / 2] - p_zero * value_sum[j][t][k];
    }
    let_next_begin();
    this->write(context, factor, row);
  }

  // Another part of the keys, and of the values if asked for.
  MPTQC_DEVICE void reload(int64_t part, bool with_values) const {
    sync_threads();  // all warps are done with the part before
    this->load_keys(part);
    commit_copies();
    if (with_values) this->load_values(part);
    wait_copies<0>();
    sync_threads();
    this->key_offsets();
    sync_threads();
  }
};

// A block of threads runs `Block`; a multiprocessor is to hold kBlocks at a time.
template <class Block, int kBlocks>
MPTQC_KERNEL(kThreads, kBlocks)
attention(const AttentionParameters p) {
  const int down = static_cast<int>((p.a.rows + p.block_rows - 1) / p.block_rows), heads = static_cast<int>(p.a.heads);
  const int across = static_cast<int>((p.a.value_width + Block::kColumns - 1) / Block::kColumns);
  int rest = static_cast<int>(block_index());
  const int column = rest % across * Block::kColumns;
  rest /= across;
  const int row = rest % down * static_cast<int>(p.block_rows);
  rest /= down;
  const int head = rest % heads, batch = rest / heads;
  Block{{p, row, column, head, batch, shared_memory(), thread_index() / kWarp, thread_index() % kWarp}}.run();
}

int unit_of(const void* pointer, int64_t width) {
  for (const int unit : {16, 4}) {
    if (width % unit == 0 && reinterpret_cast<uintptr_t>(pointer) % unit == 0) return unit;
  }
  return 1;
}

// How many rows a block takes which can take any number: all of a head's, or fewer where there are not enough heads to give the
// device work.
int64_t rows_of_block(const mptqc_attention& a) {
  constexpr int64_t blocks_wanted = 3;  // a multiprocessor
  const int64_t heads = a.batch * a.heads, most = ceil_divide(a.rows, kBlockRows);
  const int64_t blocks = heads > 0 ? least(most, ceil_divide(blocks_wanted * multiprocessors(), heads)) : 1;
  return round_up(ceil_divide(a.rows, blocks > 0 ? blocks : 1), kWarpRows);
}

// What is counted in 32 bits.
bool is_small(const mptqc_attention& a) {
  return a.batch <= INT32_MAX && a.rows <= INT32_MAX / 2 && a.columns <= INT32_MAX / 2;
}
bool is_small(const mptqc_addend& added) {
  return added.data == nullptr || added.windows * added.heads * added.rows <= UINT32_MAX;
}

// How many blocks a multiprocessor is to hold: as many as their registers allow.
constexpr int blocks_of(int spans, int parts, bool adds) {
  if (parts == 2) return spans == 1 ? 5 : 4;
  return parts == 7 && !(spans == 2 && adds) ? 3 : 2;
}

// The one with room for so many columns.
template <int kSpans, bool kAdds>
void (*in_registers_for(int64_t columns))(AttentionParameters) {
  if (columns <= 2 * kSpan) return attention<AttentionInRegisters<kSpans, kSpans, 2, kAdds>, blocks_of(kSpans, 2, kAdds)>;
  if (columns <= 7 * kSpan) return attention<AttentionInRegisters<kSpans, kSpans, 7, kAdds>, blocks_of(kSpans, 7, kAdds)>;
  return attention<AttentionInRegisters<kSpans, kSpans, 9, kAdds>, blocks_of(kSpans, 9, kAdds)>;
}

template <int kSpans>
mptqc_status start(const mptqc_attention& a, void* stream) {
  const AttentionLayout layout(a, kSpans * kSpan);
  const bool in_registers = layout.depth == kSpans * kStep && layout.columns >= a.columns &&
                            a.probability.zero_point == 0 && a.probability.minimum == 0;
  const int64_t block_rows = in_registers && a.rows > 0 ? rows_of_block(a) : kBlockRows;
  const AttentionParameters parameters = {a,
                                          layout,
                                          QuantizerConstants(a.probability),
                                          Output(a.quantizer, a.output),
                                          unit_of(a.q, a.width),
                                          unit_of(a.k, a.width),
                                          block_rows};
  const int64_t blocks =
      a.batch * a.heads * ceil_divide(a.rows, block_rows) * ceil_divide(a.value_width, kSpans * kSpan);
  const auto run = [&](void (*kernel)(AttentionParameters)) {
    return launch({blocks, kThreads, static_cast<size_t>(layout.bytes), stream}, kernel, parameters);
  };
  const bool adds = a.bias.data != nullptr || a.mask.data != nullptr;
  if (in_registers) return run(adds ? in_registers_for<kSpans, true>(a.columns) : in_registers_for<kSpans, false>(a.columns));
  if (layout.depth == 1 * kStep) return run(attention<AttentionInParts<1, kSpans>, 3>);
  if (layout.depth == 2 * kStep) return run(attention<AttentionInParts<2, kSpans>, 3>);
  return run(attention<AttentionInParts<0, kSpans>, 2>);
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

mptqc_status mptqc_cuda_attention(const mptqc_attention* arguments, void* stream) {
  const mptqc_attention& a = *arguments;
  if (!is_sound(a) || a.width > kMostWidth || !is_small(a.bias) || !is_small(a.mask) || !is_small(a)) return MPTQC_INVALID_ARGUMENT;
  return a.value_width <= kSpan ? start<1>(a, stream) : start<2>(a, stream);
}
