// Attention: a block takes 64 query rows of one head and up to 64 columns of its context, a warp 16 of the rows.
//
// Keys and values pass through shared memory in parts, all at once where they fit. The softmax is quantized, so that its
// sum must be known before the first code: a first pass over the keys finds each row's largest score and sum of powers,
// a second one makes the scores again, their codes and the context. The codes of P never leave the registers: the scores
// of a lane, two by two from four products, are its part of the left operand of the context once the values are laid out
// in the same order (value_row).
//
// All products are of unsigned codes; zero points are taken off the sums:
//   sum (a - z)(b - y) = sum ab - y sum a - z sum b + n z y
#include "../cpu/arguments.h"
#include "attention_layout.h"

namespace mptqc {
namespace {

// Inputs 4 * group + i of the context's right operand are value rows value_row(group, i): quad q of the lanes has the
// scores of columns 2q, 2q + 1, 8 + 2q and 9 + 2q of each 16.
MPTQC_DEVICE int value_row(int group, int i) { return group / 4 * 16 + group % 4 * 2 + i % 2 + i / 2 * 8; }

// kSteps: steps of the head's width, or 0 if not known here. kSpans: spans of the context's columns.
template <int kSteps, int kSpans>
struct AttentionBlock {
  static_assert(kSteps * kStep * 255 * 255 < 1 << 22, "small_to_float takes the scores");
  static constexpr int kColumns = kSpans * kSpan;

  const AttentionParameters& p;
  const int64_t first_row, first_column, head, batch;
  uint8_t* const shared;
  const int warp, lane;

  MPTQC_DEVICE const mptqc_attention& a() const { return p.a; }
  MPTQC_DEVICE int steps() const { return kSteps > 0 ? kSteps : static_cast<int>(p.layout.depth / kStep); }

  MPTQC_DEVICE void load_rows(
      const uint8_t* from, int64_t rows, int64_t first, int64_t count, int unit, uint8_t* to) const {
    const int chunks = static_cast<int>(p.layout.depth / kChunk);
    for (int64_t i = thread_index(); i < count * chunks; i += kThreads) {
      const int64_t row = i / chunks, column = i % chunks * kChunk;
      const bool valid = first + row < rows;
      const uint8_t* source = from + (valid ? first + row : 0) * a().heads * a().width;
      copy_codes(to + row * p.layout.stride + column, source, column, a().width, valid, unit);
    }
  }

  MPTQC_DEVICE void load_queries() const {
    const uint8_t* from = a().q + (batch * a().rows * a().heads + head) * a().width;
    load_rows(from, a().rows, first_row, kBlockRows, p.query_unit, shared);
  }

  MPTQC_DEVICE void load_keys(int64_t first) const {
    const uint8_t* from = a().k + (batch * a().columns * a().heads + head) * a().width;
    load_rows(from, a().columns, first, p.layout.columns, p.key_unit, shared + p.layout.keys);
  }

  // Four value rows by four columns become a chunk, transposed.
  MPTQC_DEVICE void load_values(int64_t first) const {
    const int64_t stride = a().heads * a().value_width, left = a().value_width - first_column;
    const uint8_t* from = a().v + (batch * a().columns * a().heads + head) * a().value_width + first_column;
    constexpr int quads = kColumns / 4;
    const bool words = stride % 4 == 0 && is_aligned(from, 4);
    for (int64_t i = thread_index(); i < p.layout.columns / 4 * quads; i += kThreads) {
      const int group = static_cast<int>(i / quads), quad = static_cast<int>(i % quads);
      uint32_t row[4] = {};
      MPTQC_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int64_t at = first + value_row(group, j);
        if (at >= a().columns) continue;
        const uint8_t* codes = from + at * stride + 4 * quad;
        if (words && 4 * quad + 4 <= left) {
          row[j] = *reinterpret_cast<const uint32_t*>(codes);
        } else {
          for (int k = 0; k < 4; ++k)
            if (4 * quad + k < left) row[j] |= static_cast<uint32_t>(codes[k]) << (8 * k);
        }
      }
      const uint32_t low01 = pick_bytes(row[0], row[1], 0x5140), high01 = pick_bytes(row[0], row[1], 0x7362);
      const uint32_t low23 = pick_bytes(row[2], row[3], 0x5140), high23 = pick_bytes(row[2], row[3], 0x7362);
      *reinterpret_cast<Words4*>(shared + p.layout.values + right_chunk<kColumns>(group, quad) * kChunk) = {
          {pick_bytes(low01, low23, 0x5410), pick_bytes(low01, low23, 0x7632), pick_bytes(high01, high23, 0x5410),
           pick_bytes(high01, high23, 0x7632)}};
    }
  }

  // offset[r] = constant - zero_point * (the sum of row r of codes).
  MPTQC_DEVICE void offsets(
      const uint8_t* codes, int64_t rows, int32_t zero_point, int32_t constant, int64_t to) const {
    for (int64_t row = thread_index(); row < rows; row += kThreads) {
      uint32_t sum = 0;
      for (int64_t chunk = 0; chunk < p.layout.depth; chunk += kChunk) {
        const Words4 words = *reinterpret_cast<const Words4*>(codes + row * p.layout.stride + chunk);
        MPTQC_UNROLL
        for (int i = 0; i < 4; ++i) sum = add_codes(words.word[i], sum);
      }
      reinterpret_cast<int32_t*>(shared + to)[row] = constant - zero_point * static_cast<int32_t>(sum);
    }
  }

  MPTQC_DEVICE void key_offsets() const {
    const int32_t constant = static_cast<int32_t>(a().width) * a().q_zero_point * a().k_zero_point;
    offsets(shared + p.layout.keys, p.layout.columns, a().q_zero_point, constant, p.layout.key_offset);
  }

  using Left = uint32_t[kSteps > 0 ? kSteps : 1][4];

  MPTQC_DEVICE void load_left(uint32_t (&words)[4], int step) const {
    const int row = kWarpRows * warp + lane % 16, chunk = 2 * step + lane / 16;
    load_matrices(words, shared + row * p.layout.stride + chunk * kChunk);
  }

  struct Addends {
    const float *bias[2], *mask[2];  // of the lane's two rows
  };

  MPTQC_DEVICE const float* addend_row(const mptqc_addend& added, int64_t row) const {
    if (added.data == nullptr) return nullptr;
    const int64_t h = added.heads == 1 ? 0 : head, t = added.rows == 1 ? 0 : row < a().rows ? row : 0;
    return added.data + ((batch % added.windows * added.heads + h) * added.rows + t) * a().columns;
  }

  // score[t][i]: row lane / 4 + 8 * (i / 2), column 8t + 2 * (lane % 4) + i % 2 of the 32 from `column` of this part on;
  // minus infinity beyond the last column.
  MPTQC_DEVICE void scores(float (&score)[kSpanProducts][4], const Left& left, const int32_t (&row_offset)[2],
                           const Addends& added, int64_t part, int column) const {
    int32_t sums[kSpanProducts][4] = {};
    const uint8_t* keys = shared + p.layout.keys;
    for (int step = 0; step < steps(); ++step) {
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
        const int row = column + 16 * pair + lane / 16 * 8 + lane % 8, chunk = 2 * step + lane / 8 % 2;
        load_matrices(key, keys + row * p.layout.stride + chunk * kChunk);
        multiply_add<false>(sums[2 * pair], query, key[0], key[1]);
        multiply_add<false>(sums[2 * pair + 1], query, key[2], key[3]);
      }
    }
    const int32_t* key_offset = reinterpret_cast<const int32_t*>(shared + p.layout.key_offset);
    const int count = count_from(part + column);
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int32_t sum = sums[t][i] + key_offset[column + column_of(t, i)] + row_offset[i / 2];
        const float total = kSteps > 0 ? small_to_float(sum) : static_cast<float>(sum);
        score[t][i] = total * a().score_scale;
      }
    }
    if (added.bias[0] != nullptr) add(score, added.bias, part + column, count);
    if (added.mask[0] != nullptr) add(score, added.mask, part + column, count);
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t)
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) score[t][i] = column_of(t, i) < count ? score[t][i] : -INFINITY;
  }

  // How many of the 32 columns from `column` on there are.
  MPTQC_DEVICE int count_from(int64_t column) const {
    return a().columns - column < kSpan ? static_cast<int>(a().columns - column) : kSpan;
  }

  // Of 32, that of score[t][i].
  MPTQC_DEVICE int column_of(int t, int i) const { return 8 * t + 2 * (lane % 4) + i % 2; }

  MPTQC_DEVICE void add(
      float (&score)[kSpanProducts][4], const float* const (&rows)[2], int64_t column, int count) const {
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t)
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i)
        if (column_of(t, i) < count) score[t][i] += rows[i / 2][column + column_of(t, i)];
  }

  // Takes 8 scores of one row into its largest score and its sum of powers e^(score - largest).
  MPTQC_DEVICE static void add_powers(const float (&score)[kSpanProducts][4], int half, float& largest, float& total) {
    float most = largest;
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) most = fmaxf(most, fmaxf(score[t][2 * half], score[t][2 * half + 1]));
    float sum = 0;
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      sum += power(score[t][2 * half], most) + power(score[t][2 * half + 1], most);
    }
    total = fmaf(total, power(largest, most), sum);
    largest = most;
  }

  MPTQC_DEVICE static float power(float score, float largest) {
    return power_of_two((score - largest) * kInverseLn2);
  }

  // The four lanes of a row join what each has seen of it.
  MPTQC_DEVICE static void join(float& largest, float& total) {
    MPTQC_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = exchange(largest, mask), sum = exchange(total, mask), most = fmaxf(largest, other);
      total = total * power(largest, most) + sum * power(other, most);
      largest = most;
    }
  }

  using Context = int32_t[kSpans][kSpanProducts][4];

  // Makes codes of P from 32 columns of scores, adds them to code_sum, and their products with the values to `context`;
  // sums of the values alone go to `value_sum` where P has a zero point.
  MPTQC_DEVICE void add_context(Context& context, Context& value_sum, int32_t (&code_sum)[2],
                                const float (&score)[kSpanProducts][4], const float (&largest)[2],
                                const float (&quotient)[2], int64_t part, int column) const {
    const int count = count_from(part + column);
    uint32_t left[4] = {};
    MPTQC_UNROLL
    for (int t = 0; t < kSpanProducts; ++t) {
      MPTQC_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float quotient_of_p = power(score[t][i], largest[i / 2]) * quotient[i / 2];
        const int32_t steps = steps_of_quotient<Lane>(p.probability, quotient_of_p);
        const int32_t code = column_of(t, i) < count ? code_of(p.probability, steps) : 0;
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

  MPTQC_DEVICE void write(const Context& context, const Context& value_sum, const int32_t (&code_sum)[2],
                          const float (&factor)[2], int64_t row) const {
    const int32_t p_zero = a().probability.zero_point, v_zero = a().v_zero_point;
    const int32_t constant = static_cast<int32_t>(a().columns) * p_zero * v_zero;
    MPTQC_UNROLL
    for (int j = 0; j < kSpans; ++j) {
      const int64_t column = first_column + kSpan * j + kLaneColumns * (lane % 4);
      MPTQC_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (column >= a().value_width || row + 8 * half >= a().rows) continue;
        float y[kLaneColumns];
        MPTQC_UNROLL
        for (int c = 0; c < kLaneColumns; ++c) {
          const int i = 2 * half + c / 4;
          const int32_t sum = context[j][c % 4][i] - v_zero * code_sum[half] - p_zero * value_sum[j][c % 4][i];
          y[c] = static_cast<float>(sum + constant) * a().context_scale * factor[half];
        }
        const int64_t at = ((batch * a().rows + row + 8 * half) * a().heads + head) * a().value_width + column;
        write_eight(p.output, at, y, a().value_width - column, true);
      }
    }
  }

  MPTQC_DEVICE void run() const {
    const int64_t row = first_row + kWarpRows * warp + lane / 4, columns = p.layout.columns;
    const bool at_once = columns >= a().columns;
    load_queries();
    load_keys(0);
    commit_copies();
    if (at_once) load_values(0);
    wait_copies<0>();
    sync_threads();
    offsets(shared, kBlockRows, a().k_zero_point, 0, p.layout.row_offset);
    key_offsets();
    sync_threads();

    const int32_t* offset = reinterpret_cast<const int32_t*>(shared + p.layout.row_offset) + kWarpRows * warp + lane / 4;
    const int32_t row_offset[2] = {offset[0], offset[8]};
    const Addends added = {{addend_row(a().bias, row), addend_row(a().bias, row + 8)},
                           {addend_row(a().mask, row), addend_row(a().mask, row + 8)}};
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
        scores(score, left, row_offset, added, part, column);
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
        scores(score, left, row_offset, added, part, column);
        add_context(context, value_sum, code_sum, score, largest, quotient, part, column);
      }
    }
    for (int half = 0; half < 2; ++half) {
      code_sum[half] += exchange(code_sum[half], 1);
      code_sum[half] += exchange(code_sum[half], 2);
    }
    write(context, value_sum, code_sum, factor, row);
  }

  // Another part of the keys, and of the values if asked for.
  MPTQC_DEVICE void reload(int64_t part, bool with_values) const {
    sync_threads();  // all warps are done with the part before
    load_keys(part);
    commit_copies();
    if (with_values) load_values(part);
    wait_copies<0>();
    sync_threads();
    key_offsets();
    sync_threads();
  }
};

template <int kSteps, int kSpans>
MPTQC_KERNEL(kThreads, kSteps == 0 ? 2 : 3)
attention(const AttentionParameters p) {
  const int64_t down = (p.a.rows + kBlockRows - 1) / kBlockRows;
  const int64_t across = (p.a.value_width + kSpans * kSpan - 1) / (kSpans * kSpan);
  int64_t rest = block_index();
  const int64_t column = rest % across * kSpans * kSpan;
  rest /= across;
  const int64_t row = rest % down * kBlockRows;
  rest /= down;
  const int64_t head = rest % p.a.heads, batch = rest / p.a.heads;
  AttentionBlock<kSteps, kSpans>{
      p, row, column, head, batch, shared_memory(), thread_index() / kWarp, thread_index() % kWarp}
      .run();
}

int unit_of(const void* pointer, int64_t width) {
  for (const int unit : {16, 4}) {
    if (width % unit == 0 && reinterpret_cast<uintptr_t>(pointer) % unit == 0) return unit;
  }
  return 1;
}

template <int kSpans>
mptqc_status start(const mptqc_attention& a, void* stream) {
  const AttentionLayout layout(a, kSpans * kSpan);
  const AttentionParameters parameters = {a,
                                          layout,
                                          QuantizerConstants(a.probability),
                                          {Output(a.quantizer, a.output), MPTQC_FLOAT32},
                                          unit_of(a.q, a.width),
                                          unit_of(a.k, a.width)};
  const int64_t blocks =
      a.batch * a.heads * ceil_divide(a.rows, kBlockRows) * ceil_divide(a.value_width, kSpans * kSpan);
  const auto run = [&](void (*kernel)(AttentionParameters)) {
    return launch(kernel, blocks, kThreads, static_cast<size_t>(layout.bytes), stream, parameters);
  };
  if (layout.depth == 1 * kStep) return run(attention<1, kSpans>);
  if (layout.depth == 2 * kStep) return run(attention<2, kSpans>);
  return run(attention<0, kSpans>);
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

mptqc_status mptqc_cuda_attention(const mptqc_attention* arguments, void* stream) {
  const mptqc_attention& a = *arguments;
  if (!is_sound(a) || a.width > kMostWidth) return MPTQC_INVALID_ARGUMENT;
  return a.value_width <= kSpan ? start<1>(a, stream) : start<2>(a, stream);
}
