// What becomes of a Linear's sums: scale, bias, activation, multiplier, residual, rows, quantizer.
#pragma once

#include "tiles.h"

namespace mptqc {
namespace {

struct LinearParameters {
  mptqc_linear a;
  Output output;
  mptqc_cuda_float type;
  int unit;  // outputs that lie as a vector does, in any row: 8, 4 or 1

  LinearParameters(const mptqc_linear& linear, mptqc_cuda_float float_type)
      : a(linear), output(linear.quantizer, linear.output), type(float_type), unit(1) {
    for (const int each : {4, 8}) {
      const int64_t size = float_type == MPTQC_FLOAT16 ? 2 : 4;
      const int64_t bytes = output.quantized ? each : 4 * size;  // floats go by fours
      const bool fits = reinterpret_cast<uintptr_t>(a.output) % bytes == 0 &&
                        reinterpret_cast<uintptr_t>(a.residual) % (4 * size) == 0;
      if (fits && a.outputs % each == 0) unit = each;
    }
  }
};

// What the sums of kCount columns need to become outputs.
template <int kCount>
struct LinearColumns {
  float scale[kCount], bias[kCount];

  MPTQC_DEVICE LinearColumns(const mptqc_linear& a, int64_t column) {
    MPTQC_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      const auto scales = *reinterpret_cast<const Floats4*>(a.scale + column + i);
      const auto biases = *reinterpret_cast<const Floats4*>(a.bias + column + i);
      MPTQC_UNROLL
      for (int k = 0; k < 4; ++k) {
        scale[i + k] = scales.value[k];
        bias[i + k] = biases.value[k];
      }
    }
  }
};

// Where a row goes; rows of a table are fewer than 2^32.
MPTQC_DEVICE int64_t target_row(const mptqc_linear& a, int64_t row) {
  if (a.table_size == 0) return row;
  const uint32_t place = static_cast<uint32_t>(row) % static_cast<uint32_t>(a.table_size);
  return row - place + a.table[place];
}

// Where the outputs of some rows go: first + row_of(0), first + row_of(1), ..., from `column` on.
template <class RowOf>
struct StraightRows {
  int64_t start, apart;  // element of the first; from row to row
  int64_t left;          // how many rows there are from the first on
  RowOf row_of;

  MPTQC_DEVICE StraightRows(const mptqc_linear& a, int64_t first, RowOf rows, int64_t column)
      : start(first * a.outputs + column), apart(a.outputs), left(a.rows - first), row_of(rows) {}

  MPTQC_DEVICE bool has(int i) const { return row_of(i) < left; }
  MPTQC_DEVICE int64_t index(int i) const { return start + row_of(i) * apart; }
};

// The same by way of the table.
template <class RowOf>
struct TableRows {
  const mptqc_linear& a;
  int64_t first;
  RowOf row_of;
  int64_t column;

  MPTQC_DEVICE bool has(int i) const { return first + row_of(i) < a.rows; }
  MPTQC_DEVICE int64_t index(int i) const { return target_row(a, first + row_of(i)) * a.outputs + column; }
};

// kRows rows of kCount outputs each, from a column on: `count` of them, or all if they are `whole`, and lie as vectors do.
template <int kRows, int kCount>
struct LinearOutputs {
  float y[kRows][kCount];
  int64_t count;
  bool whole;

  template <class F, class Rows>
  MPTQC_DEVICE void add_residual(const void* residual, const Rows& rows) {
    MPTQC_UNROLL
    for (int r = 0; r < kRows; ++r)
      if (rows.has(r)) add_floats(y[r], static_cast<const F*>(residual) + rows.index(r), count, whole);
  }

  template <class F, class Rows>
  MPTQC_DEVICE void write_as(void* to, const Rows& rows) const {
    MPTQC_UNROLL
    for (int r = 0; r < kRows; ++r)
      if (rows.has(r)) write_floats(static_cast<F*>(to) + rows.index(r), y[r], count, whole);
  }

  // Adds the residual, and writes floats or codes; `steps` says how a quantizer is to take y.
  template <class Rows>
  MPTQC_DEVICE void write(const LinearParameters& p, const Rows& rows, Steps steps) {
    const bool half = p.type == MPTQC_FLOAT16;
    if (p.a.residual != nullptr) half ? add_residual<Half>(p.a.residual, rows) : add_residual<float>(p.a.residual, rows);
    if (!p.output.quantized) return half ? write_as<Half>(p.output.data, rows) : write_as<float>(p.output.data, rows);
    float values[kRows * kCount];
    MPTQC_UNROLL
    for (int i = 0; i < kRows * kCount; ++i) values[i] = y[i / kCount][i % kCount];
    const auto codes = codes_of(p.output.quantizer, values, steps);
    MPTQC_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (!rows.has(r)) continue;
      write_codes<kCount>(static_cast<uint8_t*>(p.output.data) + rows.index(r), codes.code + r * kCount, count, whole);
    }
  }
};

// Makes and writes the outputs of kRows rows' sums, offsets in them, from `column` on: of rows first + row_of(0), first +
// row_of(1), ...; what lies beyond the last is left out. What is to be done is asked once for all of them.
template <int kRows, int kCount, class RowOf>
MPTQC_DEVICE void finish_rows(const LinearParameters& p, const LinearColumns<kCount>& columns,
                              const int32_t (&sums)[kRows][kCount], int64_t first, RowOf row_of, int64_t column) {
  LinearOutputs<kRows, kCount> out;
  out.count = p.a.outputs - column;
  out.whole = p.unit >= kCount;
  Steps steps = Steps::kExact;
  float factor[kCount];  // what the activation's outputs are multiplied by
  MPTQC_UNROLL
  for (int c = 0; c < kCount; ++c) factor[c] = 1;
  if (p.a.multiplier != nullptr) {
    MPTQC_UNROLL
    for (int c = 0; c < kCount; c += 4) {
      const auto four = *reinterpret_cast<const Floats4*>(p.a.multiplier + column + c);
      MPTQC_UNROLL
      for (int k = 0; k < 4; ++k) factor[c + k] = four.value[k];
    }
  }
  if (p.a.activation == MPTQC_GELU && p.output.quantized && p.a.residual == nullptr) {  // one factor does for both
    steps = Steps::kOfQuotient;
    MPTQC_UNROLL
    for (int c = 0; c < kCount; ++c) factor[c] *= p.output.quantizer.inverse_scale;
    MPTQC_UNROLL
    for (int i = 0; i < kRows * kCount; ++i) {
      const int r = i / kCount, c = i % kCount;
      out.y[r][c] = gelu(fmaf(static_cast<float>(sums[r][c]), columns.scale[c], columns.bias[c]), factor[c]);
    }
  } else {
    MPTQC_UNROLL
    for (int i = 0; i < kRows * kCount; ++i) {
      const int r = i / kCount, c = i % kCount;
      out.y[r][c] = static_cast<float>(sums[r][c]) * columns.scale[c] + columns.bias[c];
    }
    if (p.a.activation != MPTQC_NO_ACTIVATION) {
      steps = Steps::kNear;
      MPTQC_UNROLL
      for (int r = 0; r < kRows; ++r) activate(p.a.activation, out.y[r]);
    }
    if (p.a.multiplier != nullptr) {
      MPTQC_UNROLL
      for (int i = 0; i < kRows * kCount; ++i) out.y[i / kCount][i % kCount] *= factor[i % kCount];
    }
  }
  if (p.a.table_size == 0) return out.write(p, StraightRows<RowOf>(p.a, first, row_of, column), steps);
  out.write(p, TableRows<RowOf>{p.a, first, row_of, column}, steps);
}

}  // namespace
}  // namespace mptqc
