// Runs every kernel on random small shapes, in memory of exactly the size it needs, and compares each implementation with
// the portable one. Built with the address and undefined-behaviour sanitizers, which see what a comparison cannot.
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "mptqc_kernels.h"

namespace {

std::mt19937 generator(1);

int64_t size(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

std::vector<uint8_t> codes(int64_t count) {
  std::vector<uint8_t> out(count);
  for (uint8_t& code : out) code = static_cast<uint8_t>(generator());
  return out;
}

// Codes of so many bits around 128, as keys and values have them.
std::vector<uint8_t> codes(int64_t count, int64_t bits) {
  std::vector<uint8_t> out = codes(count);
  for (uint8_t& code : out) code = static_cast<uint8_t>(128 + (static_cast<int8_t>(code) >> (8 - bits)));
  return out;
}

std::vector<float> floats(int64_t count) {
  std::vector<float> out(count);
  for (float& x : out) x = std::normal_distribution<float>(0, 2)(generator);
  return out;
}

mptqc_quantizer quantizer() {
  switch (generator() % 3) {
    case 0: return {0.05f, 100, 3, 250, 0, {}, {}};
    case 1: return {0.01f, 4, 1, 196, 1, {3}, {64}};
    default: return {0.01f, 4, 1, 196, 3, {3, 5, 6}, {64, 96, 128}};
  }
}

int failures = 0;

// The second output of those that have one.
template <class Arguments>
void set_codes(Arguments&, uint8_t*) {}
void set_codes(mptqc_layer_norm_add& arguments, uint8_t* codes) { arguments.codes = codes; }

// Runs all tasks on each implementation into fresh outputs, and compares.
template <class Arguments>
void compare(const char* name, Arguments arguments, size_t output_bytes, int64_t tasks,
             mptqc_status (*run)(mptqc_isa, const Arguments*, int64_t), size_t code_bytes = 0) {
  std::vector<uint8_t> portable;
  for (int isa = 0; isa < MPTQC_ISA_COUNT; ++isa) {
    if (!mptqc_isa_runs_here(static_cast<mptqc_isa>(isa))) continue;
    const std::unique_ptr<uint8_t[]> output(new uint8_t[output_bytes]()), codes(new uint8_t[code_bytes]());
    arguments.output = static_cast<decltype(arguments.output)>(static_cast<void*>(output.get()));
    set_codes(arguments, codes.get());
    for (int64_t task = 0; task < tasks; ++task) {
      if (run(static_cast<mptqc_isa>(isa), &arguments, task) != MPTQC_OK) ++failures;
    }
    std::vector<uint8_t> outputs(output.get(), output.get() + output_bytes);
    outputs.insert(outputs.end(), codes.get(), codes.get() + code_bytes);
    if (isa == MPTQC_PORTABLE) {
      portable = outputs;
    } else if (outputs != portable) {
      std::printf("%s: %s differs from portable\n", name, mptqc_isa_name(static_cast<mptqc_isa>(isa)));
      ++failures;
    }
  }
}

std::vector<int64_t> table(int64_t rows) {
  std::vector<int64_t> out(rows);
  for (int64_t row = 0; row < rows; ++row) out[row] = rows - 1 - row;
  return out;
}

void layer_norm() {
  const int64_t rows = size(0, 40), width = size(1, 150);
  const auto x = floats(rows * width), gamma = floats(width), beta = floats(width);
  const auto rows_table = table(rows);
  const mptqc_layer_norm arguments = {rows, width, x.data(),          gamma.data(), beta.data(), 1e-6f,
                                      rows, rows_table.data(), quantizer(),  nullptr};
  compare("layer_norm", arguments, rows * width, mptqc_layer_norm_tasks(&arguments), mptqc_layer_norm_run);
}

void layer_norm_add() {
  const int64_t rows = size(0, 40), width = size(1, 150);
  const auto x = floats(rows * width), gamma = floats(width), beta = floats(width), residual = floats(rows * width);
  const auto rows_table = table(rows);
  const mptqc_quantizer output = quantizer();
  const bool quantized = generator() % 2 == 0;
  mptqc_layer_norm_add arguments = {};
  arguments.rows = rows;
  arguments.width = width;
  arguments.input = x.data();
  arguments.gamma = gamma.data();
  arguments.beta = beta.data();
  arguments.epsilon = 1e-6f;
  arguments.table_size = rows;
  arguments.table = rows_table.data();
  arguments.residual = generator() % 2 == 0 ? residual.data() : nullptr;
  arguments.quantizer = quantized ? &output : nullptr;
  arguments.code_table_size = rows;
  arguments.code_table = rows_table.data();
  compare("layer_norm_add", arguments, x.size() * 4, mptqc_layer_norm_add_tasks(&arguments),
          mptqc_layer_norm_add_run, quantized ? x.size() : 0);
}

void linear() {
  const int64_t rows = generator() % 32 == 0 ? size(129, 260) : size(0, 40), inputs = size(0, 200), outputs = size(0, 150);
  const int64_t blocked = (outputs + 15) / 16 * 16, padded = (outputs + MPTQC_PANEL - 1) / MPTQC_PANEL * MPTQC_PANEL;
  const auto input = codes(rows * inputs);
  auto weight = codes(blocked * ((inputs + 3) / 4 * 4));
  const int bits = static_cast<int>(size(2, 8));
  for (auto& code : weight) code = static_cast<uint8_t>(static_cast<int8_t>(code) >> (8 - bits));
  const auto residual = floats(rows * outputs), factor = floats(rows * outputs), scale = floats(padded), bias = floats(padded);
  const auto rows_table = table(rows);
  std::vector<int32_t> offset(padded);
  const int8_t* blocks = reinterpret_cast<const int8_t*>(weight.data());
  mptqc_linear_offset(blocks, inputs, outputs, static_cast<int32_t>(size(0, 255)), offset.data());
  const mptqc_quantizer output = quantizer();
  const bool quantized = generator() % 2 == 0;
  mptqc_linear arguments = {};
  arguments.rows = rows;
  arguments.inputs = inputs;
  arguments.outputs = outputs;
  arguments.input = input.data();
  arguments.weight = blocks;
  arguments.offset = offset.data();
  arguments.scale = scale.data();
  arguments.bias = bias.data();
  arguments.activation = static_cast<int32_t>(size(MPTQC_NO_ACTIVATION, MPTQC_SILU));
  arguments.multiplier = generator() % 2 == 0 ? bias.data() : nullptr;
  arguments.residual = generator() % 2 == 0 ? residual.data() : nullptr;
  arguments.table_size = rows;
  arguments.table = rows_table.data();
  arguments.quantizer = quantized ? &output : nullptr;
  arguments.span = mptqc_linear_span(blocks, inputs, outputs);
  arguments.by_rows = static_cast<int32_t>(generator() % 2);
  const int64_t width = int64_t{2} << size(0, 5), tokens = generator() % 2 == 0 ? rows : 1;
  const auto cosine = floats(tokens * MPTQC_PANEL), sine = floats(tokens * MPTQC_PANEL);
  if (rows > 0 && outputs % width == 0 && generator() % 2 == 0) {
    arguments.activation = MPTQC_NO_ACTIVATION;
    arguments.residual = nullptr;
    arguments.table_size = 0;
    arguments.rotary = {tokens, MPTQC_PANEL, width, cosine.data(), sine.data()};
  }
  if (generator() % 4 == 0) {
    arguments.activation = MPTQC_NO_ACTIVATION;
    arguments.table_size = 0;
    arguments.factor = factor.data();
  }
  const int64_t head = int64_t{16} << size(0, 2);
  if (outputs % head == 0 && generator() % 2 == 0) {
    arguments.activation = MPTQC_NO_ACTIVATION;
    arguments.unit_heads = {head, 1e-6f};
  }
  compare("linear", arguments, rows * outputs * (quantized ? 1 : 4), mptqc_linear_tasks(&arguments), mptqc_linear_run);
}

void attention() {
  mptqc_attention arguments = {};
  arguments.batch = size(0, 2);
  arguments.heads = size(1, 3);
  arguments.rows = generator() % 32 == 0 ? size(129, 260) : size(0, 30);
  arguments.columns = size(0, 90);
  arguments.width = size(0, 140);
  arguments.value_width = size(0, 70);
  const auto q = codes(arguments.batch * arguments.rows * arguments.heads * arguments.width);
  const int64_t bits = size(6, 8);
  const auto k = codes(arguments.batch * arguments.columns * arguments.heads * arguments.width, bits);
  const auto v = codes(arguments.batch * arguments.columns * arguments.heads * arguments.value_width, bits);
  const auto bias = floats(arguments.heads * arguments.rows * arguments.columns), mask = floats(arguments.columns);
  arguments.row_scale = static_cast<int32_t>(generator() % 2);
  arguments.by_heads = static_cast<int32_t>(generator() % 2);
  arguments.q = q.data();
  arguments.k = k.data();
  arguments.v = v.data();
  arguments.q_zero_point = static_cast<int32_t>(size(0, 255));
  arguments.k_zero_point = static_cast<int32_t>(size(0, 255));
  arguments.v_zero_point = static_cast<int32_t>(size(0, 255));
  arguments.score_scale = 2e-4f;
  arguments.context_scale = 1e-4f;
  if (generator() % 2 == 0) arguments.bias = {bias.data(), 1, arguments.heads, arguments.rows};
  if (generator() % 2 == 0) arguments.mask = {mask.data(), 1, 1, 1};
  arguments.probability = {1 / 255.0f, 0, 0, 255, 0, 0};
  const mptqc_quantizer output = quantizer();
  const bool quantized = generator() % 2 == 0;
  arguments.quantizer = quantized ? &output : nullptr;
  const int64_t elements = arguments.batch * arguments.rows * arguments.heads * arguments.value_width;
  compare("attention", arguments, elements * (quantized ? 1 : 4), mptqc_attention_tasks(&arguments),
          mptqc_attention_run);
}

void patches() {
  const int64_t patch_height = size(1, 5), patch_width = size(1, 20), down = size(0, 3), across = size(0, 3);
  const int64_t batch = size(0, 2), channels = size(0, 3), height = down * patch_height, width = across * patch_width;
  const auto x = floats(batch * channels * height * width);
  const mptqc_patches arguments = {batch,       channels, height,      width,  patch_height,
                                   patch_width, x.data(), quantizer(), nullptr};
  compare("patches", arguments, x.size(), mptqc_patches_tasks(&arguments), mptqc_patches_run);
}

void trellis() {
  mptqc_trellis arguments = {};
  arguments.rows = size(0, 3);
  arguments.columns = size(0, 40);
  arguments.bits = static_cast<int32_t>(size(2, 5));
  arguments.taps = arguments.bits == 5 ? 2 : 12 / arguments.bits;
  const int64_t states = int64_t{1} << (arguments.bits * arguments.taps);
  arguments.first_state = static_cast<int32_t>(size(0, states - 1));
  const auto values = floats(states), x = floats(arguments.rows * arguments.columns);
  const std::vector<float> importance(arguments.columns, 1.5f);
  arguments.values = values.data();
  arguments.input = x.data();
  arguments.importance = importance.data();
  compare("trellis", arguments, x.size(), mptqc_trellis_tasks(&arguments), mptqc_trellis_run);
}

}  // namespace

int main() {
  for (int round = 0; round < 60; ++round) {
    layer_norm();
    layer_norm_add();
    linear();
    attention();
    patches();
    trellis();
  }
  return failures == 0 ? 0 : 1;
}
