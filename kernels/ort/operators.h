// The operators of docs/custom-ops.md: each is made from its node, then run any number of times, on any thread.
#pragma once

#include "backend.h"

namespace mptqc::ort {

// A permutation of the rows of a group; empty: rows stay where they are.
class RowTable {
 public:
  // Inverted, `row r is made from row t` becomes `row t goes to row r`.
  RowTable(const Node& node, size_t input, const char* name = "rows", bool inverted = false);

  int64_t size() const { return static_cast<int64_t>(rows_.size()); }
  const int64_t* data() const { return rows_.data(); }
  void check_rows(int64_t rows) const;

 private:
  std::string name_;
  Backend::Array<int64_t> rows_;
};

class LayerNormQuantize {
 public:
  LayerNormQuantize(const Node& node, const Backend& backend);
  void run(const Context& context) const;

 private:
  Backend backend_;
  float epsilon_;
  mptqc_quantizer quantizer_;
  Backend::Array<float> gamma_, beta_;
  RowTable table_;
};

// LayerNormAdd and LayerNormAddQuantize.
class LayerNormAddBase {
 public:
  LayerNormAddBase(const Node& node, const Backend& backend);

 protected:
  // The arguments but for the codes; `shape` becomes the outputs'.
  mptqc_layer_norm_add prepare(const Context& context, Shape* shape) const;

  Backend backend_;
  float epsilon_;
  Backend::Array<float> gamma_, beta_;
  RowTable table_;
};

class LayerNormAdd : LayerNormAddBase {
 public:
  using LayerNormAddBase::LayerNormAddBase;
  void run(const Context& context) const;
};

class LayerNormAddQuantize : LayerNormAddBase {
 public:
  LayerNormAddQuantize(const Node& node, const Backend& backend);
  void run(const Context& context) const;

 private:
  mptqc_quantizer quantizer_;
  RowTable code_table_;
};

// Linear and LinearQuantize.
class LinearBase {
 public:
  LinearBase(const Node& node, const Backend& backend);

 protected:
  // The arguments but for output and residual; `shape` becomes the product's.
  mptqc_linear prepare(const Context& context, Shape* shape) const;
  // Whether input `index`, a factor, is there.
  bool has_factor(const Node& node, size_t index) const;
  // The factor or residual: input `index`, as large as the product, whose `shape` becomes the input's.
  const float* beside(
      const Context& context, size_t index, const char* name, const mptqc_linear& arguments, Shape* shape) const;

  Backend backend_;
  int32_t activation_, span_;
  mptqc_unit_heads unit_heads_ = {};
  int64_t outputs_, groups_;
  Backend::Array<float> scale_, bias_;
  Backend::Array<int32_t> offset_;
};

class Linear : LinearBase {
 public:
  Linear(const Node& node, const Backend& backend);
  void run(const Context& context) const;

 private:
  RowTable table_;
  bool has_factor_;
};

class LinearQuantize : LinearBase {
 public:
  LinearQuantize(const Node& node, const Backend& backend);
  void run(const Context& context) const;

 private:
  mptqc_rotary rotary(const Context& context, int64_t rows) const;

  mptqc_quantizer quantizer_;
  Backend::Array<float> multiplier_;  // empty: none
  bool rotates_ = false, has_factor_;
};

// Attention and AttentionQuantize.
class AttentionBase {
 public:
  AttentionBase(const Node& node, const Backend& backend);

 protected:
  // Runs with the output's quantizer, or null for a float output.
  void run(const Context& context, const mptqc_quantizer* quantizer) const;

 private:
  Backend backend_;
  int64_t heads_;
  int32_t row_scale_, q_zero_point_, k_zero_point_, v_zero_point_;
  mptqc_quantizer probability_;
  float score_scale_, context_scale_;
};

class Attention : AttentionBase {
 public:
  using AttentionBase::AttentionBase;
  void run(const Context& context) const { AttentionBase::run(context, nullptr); }
};

class AttentionQuantize : AttentionBase {
 public:
  AttentionQuantize(const Node& node, const Backend& backend)
      : AttentionBase(node, backend), quantizer_(node.quantizer("output")) {}
  void run(const Context& context) const { AttentionBase::run(context, &quantizer_); }

 private:
  mptqc_quantizer quantizer_;
};

class QuantizePatches {
 public:
  QuantizePatches(const Node& node, const Backend& backend);
  void run(const Context& context) const;

 private:
  Backend backend_;
  int64_t patch_height_, patch_width_;
  mptqc_quantizer quantizer_;
};

}  // namespace mptqc::ort
