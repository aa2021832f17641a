#include "operators.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

namespace mptqc::ort {
namespace {

constexpr int64_t kBlockOutputs = MPTQC_BLOCK_OUTPUTS, kBlockInputs = MPTQC_BLOCK_INPUTS;

// What is thrown where a tensor's shape does not fit. Runs make no message that they do not need.
std::invalid_argument misfit(const char* name, const Tensor& tensor, const std::string& expected) {
  return std::invalid_argument(std::string(name) + " has shape " + text(tensor.shape) + "; " + expected);
}

std::vector<float> vector_of(const Node& node, size_t input, const char* name) {
  const Backend::Constant<float> content(node.constant(input, name, 1));
  return {content.begin(), content.end()};
}

float positive(const Node& node, const std::string& attribute) {
  const float value = node.number(attribute);
  if (!(value > 0) || !std::isfinite(value)) throw std::invalid_argument(attribute + " must be above 0 and finite");
  return value;
}

int32_t code(const Node& node, const std::string& attribute) {
  return static_cast<int32_t>(node.integer(attribute, 0, 255));
}

}  // namespace

RowTable::RowTable(const Node& node, size_t input, const char* name, bool inverted) : name_(name) {
  if (!node.has_input(input)) return;
  const Backend::Constant<int64_t> table(node.constant(input, name, 1));
  const std::vector<int64_t> rows(table.begin(), table.end());
  const int64_t size = static_cast<int64_t>(rows.size());
  std::vector<int64_t> inverse(rows.size(), -1);
  for (int64_t to = 0; to < size; ++to) {
    const int64_t row = rows[to];
    if (row < 0 || row >= size || inverse[row] >= 0) {
      throw std::invalid_argument(name_ + " must be a permutation of 0 to its size - 1");
    }
    inverse[row] = to;
  }
  if (rows.empty()) throw std::invalid_argument(name_ + " is empty; leave the input out instead");
  rows_ = Backend::Array<int64_t>(inverted ? inverse : rows);
}

void RowTable::check_rows(int64_t rows) const {
  if (size() > 0 && rows % size() != 0) {
    throw std::invalid_argument(name_ + " has " + std::to_string(size()) + " entries, which do not divide the " +
                                std::to_string(rows) + " rows of the input");
  }
}

LayerNormQuantize::LayerNormQuantize(const Node& node, const Backend& backend)
    : backend_(backend),
      epsilon_(positive(node, "epsilon")),
      quantizer_(node.quantizer("output")),
      gamma_(vector_of(node, 1, "gamma")),
      beta_(vector_of(node, 2, "beta")),
      table_(node, 3) {
  require(gamma_.size() == beta_.size(), "gamma and beta differ in size");
}

void LayerNormQuantize::run(const Context& context) const {
  const Tensor x = context.input(0, "X", 1);
  const int64_t width = static_cast<int64_t>(gamma_.size());
  if (x.shape.last() != width) throw misfit("X", x, "expected " + std::to_string(width) + " channels, as gamma has");
  table_.check_rows(x.shape.rows());
  const mptqc_layer_norm arguments = {
      x.shape.rows(), width,         x.as<float>(),  gamma_.data(), beta_.data(),
      epsilon_,       table_.size(), table_.data(),  quantizer_,    static_cast<uint8_t*>(context.output(x.shape))};
  backend_.run(context, arguments);
}

LayerNormAddBase::LayerNormAddBase(const Node& node, const Backend& backend)
    : backend_(backend),
      epsilon_(positive(node, "epsilon")),
      gamma_(vector_of(node, 1, "gamma")),
      beta_(vector_of(node, 2, "beta")),
      table_(node, 4) {
  require(Backend::kHasLayerNormAdd, "there is no such operator on this device");
  require(gamma_.size() == beta_.size(), "gamma and beta differ in size");
}

mptqc_layer_norm_add LayerNormAddBase::prepare(const Context& context, Shape* shape) const {
  const Tensor x = context.input(0, "X", 1);
  const int64_t width = static_cast<int64_t>(gamma_.size());
  if (x.shape.last() != width) throw misfit("X", x, "expected " + std::to_string(width) + " channels, as gamma has");
  table_.check_rows(x.shape.rows());
  mptqc_layer_norm_add arguments = {};
  *shape = x.shape;
  if (context.has_input(3)) {
    const Tensor residual = context.input(3, "residual", 1);
    const bool fits = residual.shape.last() == width && residual.shape.rows() == x.shape.rows();
    if (!fits) throw misfit("residual", residual, "X has shape " + text(x.shape));
    arguments.residual = residual.as<float>();
    *shape = residual.shape;
  }
  arguments.rows = x.shape.rows();
  arguments.width = width;
  arguments.input = x.as<float>();
  arguments.gamma = gamma_.data();
  arguments.beta = beta_.data();
  arguments.epsilon = epsilon_;
  arguments.table_size = table_.size();
  arguments.table = table_.data();
  arguments.output = static_cast<float*>(context.output(*shape));
  return arguments;
}

void LayerNormAdd::run(const Context& context) const {
  Shape shape;
  backend_.run(context, prepare(context, &shape));
}

LayerNormAddQuantize::LayerNormAddQuantize(const Node& node, const Backend& backend)
    : LayerNormAddBase(node, backend), quantizer_(node.quantizer("output")), code_table_(node, 5, "code_rows", true) {}

void LayerNormAddQuantize::run(const Context& context) const {
  Shape shape;
  mptqc_layer_norm_add arguments = prepare(context, &shape);
  code_table_.check_rows(arguments.rows);
  arguments.quantizer = &quantizer_;
  arguments.code_table_size = code_table_.size();
  arguments.code_table = code_table_.data();
  arguments.codes = static_cast<uint8_t*>(context.output(shape, 1));
  backend_.run(context, arguments);
}

LinearBase::LinearBase(const Node& node, const Backend& backend) : backend_(backend) {
  const Tensor weight = node.constant(1, "W", 4);
  std::vector<float> scale = vector_of(node, 2, "W_scale"), bias = vector_of(node, 3, "bias");
  const int64_t* shape = weight.shape.size;
  outputs_ = static_cast<int64_t>(scale.size());
  groups_ = shape[1];
  const int64_t blocks = (outputs_ + kBlockOutputs - 1) / kBlockOutputs;
  if (shape[0] != blocks || shape[2] != kBlockOutputs || shape[3] != kBlockInputs) {
    throw misfit("W", weight,
                 "expected [" + std::to_string(blocks) + ", K/4, 16, 4] for " + std::to_string(outputs_) + " outputs");
  }
  require(bias.size() == scale.size(), "bias and W_scale differ in size");

  const std::string activation = node.string("activation");
  const std::string names[] = {"none", "gelu", "gelu_tanh", "quick_gelu", "silu", "unit_heads"};  // as mptqc_activation
  const auto* const found = std::find(std::begin(names), std::end(names), activation);
  require(found != std::end(names), "activation must be none, gelu, gelu_tanh, quick_gelu, silu or unit_heads");
  activation_ = static_cast<int32_t>(found - std::begin(names));
  if (activation == "unit_heads") {
    require(Backend::kHasUnitHeads, "there is no activation unit_heads on this device");
    unit_heads_ = {node.integer("head_width", 16, MPTQC_PANEL), positive(node, "head_epsilon")};
    const int64_t width = unit_heads_.width;
    require((width & (width - 1)) == 0 && outputs_ % width == 0, "head_width must be 16, 32 or 64 and divide the outputs");
    activation_ = MPTQC_NO_ACTIVATION;
  }

  const float input_scale = positive(node, "input_scale");
  for (float& each : scale) each *= input_scale;
  const int64_t padded = (outputs_ + MPTQC_PANEL - 1) / MPTQC_PANEL * MPTQC_PANEL;
  scale.resize(padded);
  bias.resize(padded);
  std::vector<int32_t> offset(padded);
  const Backend::Constant<int8_t> codes(weight);
  const int64_t inputs = groups_ * kBlockInputs;
  mptqc_linear_offset(codes.begin(), inputs, outputs_, code(node, "input_zero_point"), offset.data());
  span_ = mptqc_linear_span(codes.begin(), inputs, outputs_);
  scale_ = Backend::Array<float>(scale);
  bias_ = Backend::Array<float>(bias);
  offset_ = Backend::Array<int32_t>(offset);
}

mptqc_linear LinearBase::prepare(const Context& context, Shape* shape) const {
  const Tensor a = context.input(0, "A", 1);
  const int64_t inputs = a.shape.last(), groups = (inputs + kBlockInputs - 1) / kBlockInputs;
  if (groups != groups_) {
    throw misfit("A", a, "its last axis does not fit W's " + std::to_string(groups_) + " groups of 4");
  }
  *shape = a.shape;
  shape->size[shape->rank - 1] = outputs_;
  mptqc_linear arguments = {};
  arguments.rows = a.shape.rows();
  arguments.inputs = inputs;
  arguments.outputs = outputs_;
  arguments.input = a.as<uint8_t>();
  arguments.weight = static_cast<const int8_t*>(context.constant(1));
  arguments.offset = offset_.data();
  arguments.scale = scale_.data();
  arguments.bias = bias_.data();
  arguments.activation = activation_;
  arguments.span = span_;
  arguments.unit_heads = unit_heads_;
  return arguments;
}

bool LinearBase::has_factor(const Node& node, size_t index) const {
  if (!node.has_input(index)) return false;
  require(Backend::kHasFactor, "there is no factor on this device");
  require(activation_ == MPTQC_NO_ACTIVATION, "a factor goes with activation none");
  return true;
}

const float* LinearBase::beside(
    const Context& context, size_t index, const char* name, const mptqc_linear& arguments, Shape* shape) const {
  const Tensor tensor = context.input(index, name, 1);
  const bool fits = tensor.shape.last() == outputs_ && tensor.shape.rows() == arguments.rows;
  if (!fits) throw misfit(name, tensor, "the product has shape " + text(*shape));
  *shape = tensor.shape;
  return tensor.as<float>();
}

Linear::Linear(const Node& node, const Backend& backend)
    : LinearBase(node, backend), table_(node, 5), has_factor_(has_factor(node, 6)) {
  require(!has_factor_ || table_.size() == 0, "a factor and rows exclude each other");
}

void Linear::run(const Context& context) const {
  Shape shape;
  mptqc_linear arguments = prepare(context, &shape);
  if (has_factor_) arguments.factor = beside(context, 6, "factor", arguments, &shape);
  if (context.has_input(4)) arguments.residual = beside(context, 4, "residual", arguments, &shape);
  table_.check_rows(arguments.rows);
  arguments.table_size = table_.size();
  arguments.table = table_.data();
  arguments.output = context.output(shape);
  backend_.run(context, arguments);
}

LinearQuantize::LinearQuantize(const Node& node, const Backend& backend)
    : LinearBase(node, backend), quantizer_(node.quantizer("output")), has_factor_(has_factor(node, 7)) {
  if (node.has_input(5)) {
    require(Backend::kHasRotary, "there is no rotation (cosine, sine) on this device");
    require(!node.has_input(4), "multiplier and rotation exclude each other");
    require(activation_ == MPTQC_NO_ACTIVATION && unit_heads_.width == 0, "a rotation goes with activation none");
    const Tensor cosine = node.constant(5, "cosine", 3), sine = node.constant(6, "sine", 3);
    const int64_t heads = cosine.shape.size[1], width = cosine.shape.size[2], columns = heads * width;
    if (text(sine.shape) != text(cosine.shape)) throw misfit("sine", sine, "cosine has " + text(cosine.shape));
    if (width < 2 || width > MPTQC_PANEL || (width & (width - 1)) != 0 || outputs_ % width != 0) {
      throw misfit("cosine", cosine,
                   "heads must be 2 to 64 wide, a power of two, and divide " + std::to_string(outputs_) + " outputs");
    }
    if (columns != MPTQC_PANEL && (columns != outputs_ || columns % MPTQC_PANEL != 0)) {
      throw misfit("cosine", cosine, "its heads must fill 64 columns, or be all heads if those fill multiples of 64");
    }
    rotates_ = true;
    return;
  }
  if (!node.has_input(4)) return;
  std::vector<float> multiplier = vector_of(node, 4, "multiplier");
  require(multiplier.size() == static_cast<size_t>(outputs_), "multiplier and W_scale differ in size");
  multiplier.resize(bias_.size());
  multiplier_ = Backend::Array<float>(multiplier);
}

mptqc_rotary LinearQuantize::rotary(const Context& context, int64_t rows) const {
  const Tensor cosine = context.input(5, "cosine", 3), sine = context.input(6, "sine", 3);
  const int64_t* size = cosine.shape.size;
  if (size[0] == 0 || rows % size[0] != 0) {
    throw misfit("cosine", cosine, "its tokens do not divide the " + std::to_string(rows) + " rows of the input");
  }
  return {size[0], size[1] * size[2], size[2], cosine.as<float>(), sine.as<float>()};
}

void LinearQuantize::run(const Context& context) const {
  Shape shape;
  mptqc_linear arguments = prepare(context, &shape);
  if (has_factor_) arguments.factor = beside(context, 7, "factor", arguments, &shape);
  if (rotates_) arguments.rotary = rotary(context, arguments.rows);
  arguments.multiplier = multiplier_.empty() ? nullptr : multiplier_.data();
  arguments.quantizer = &quantizer_;
  arguments.output = context.output(shape);
  backend_.run(context, arguments);
}

AttentionBase::AttentionBase(const Node& node, const Backend& backend)
    : backend_(backend),
      heads_(node.integer("heads", 1, 65536)),
      row_scale_(static_cast<int32_t>(node.integer("row_scale", 0, 1))),
      q_zero_point_(code(node, "q_zero_point")),
      k_zero_point_(code(node, "k_zero_point")),
      v_zero_point_(code(node, "v_zero_point")),
      probability_(node.quantizer("p")),
      score_scale_(positive(node, "q_scale") * positive(node, "k_scale")),
      context_scale_(probability_.scale * positive(node, "v_scale")) {}

void AttentionBase::run(const Context& context, const mptqc_quantizer* quantizer) const {
  const Tensor q = context.input(0, "q", 3), k = context.input(1, "k", 3), v = context.input(2, "v", 3);
  const int64_t batch = q.shape.size[0], rows = q.shape.size[1], columns = k.shape.size[1];
  for (const Tensor& tensor : {q, k, v}) {
    if (tensor.shape.rank != 3 || tensor.shape.last() % heads_ != 0) {
      throw misfit("an operand", tensor, "expected [batch, tokens, a multiple of " + std::to_string(heads_) + " heads]");
    }
  }
  const bool k_fits = k.shape.size[0] == batch && k.shape.last() == q.shape.last();
  if (!k_fits) throw misfit("k", k, "q has " + text(q.shape));
  const bool v_fits = v.shape.size[0] == batch && v.shape.size[1] == columns;
  if (!v_fits) throw misfit("v", v, "k has " + text(k.shape));

  const auto addend = [&](size_t index, const char* name) -> mptqc_addend {
    if (!context.has_input(index)) return {};
    const Tensor added = context.input(index, name, 4);
    const int64_t* size = added.shape.size;
    const bool fits = added.shape.rank == 4 && size[0] > 0 && batch % size[0] == 0 &&
                      (size[1] == 1 || size[1] == heads_) && (size[2] == 1 || size[2] == rows) && size[3] == columns;
    if (!fits) {
      throw misfit(name, added, "it does not broadcast to " + text({4, {batch, heads_, rows, columns}}));
    }
    return {added.as<float>(), size[0], size[1], size[2]};
  };
  Shape shape = q.shape;
  shape.size[2] = v.shape.last();
  mptqc_attention arguments = {};
  arguments.batch = batch;
  arguments.heads = heads_;
  arguments.rows = rows;
  arguments.columns = columns;
  arguments.width = q.shape.last() / heads_;
  arguments.value_width = v.shape.last() / heads_;
  arguments.q = q.as<uint8_t>();
  arguments.k = k.as<uint8_t>();
  arguments.v = v.as<uint8_t>();
  arguments.q_zero_point = q_zero_point_;
  arguments.k_zero_point = k_zero_point_;
  arguments.v_zero_point = v_zero_point_;
  arguments.score_scale = score_scale_;
  arguments.context_scale = context_scale_;
  arguments.bias = addend(3, "bias");
  arguments.mask = addend(4, "mask");
  arguments.row_scale = row_scale_;
  arguments.probability = probability_;
  arguments.quantizer = quantizer;
  arguments.output = context.output(shape);
  backend_.run(context, arguments);
}

QuantizePatches::QuantizePatches(const Node& node, const Backend& backend)
    : backend_(backend),
      patch_height_(node.integer("patch_height", 1, INT32_MAX)),
      patch_width_(node.integer("patch_width", 1, INT32_MAX)),
      quantizer_(node.quantizer("output")) {}

void QuantizePatches::run(const Context& context) const {
  const Tensor x = context.input(0, "X", 4);
  const int64_t* size = x.shape.size;
  if (x.shape.rank != 4 || size[2] % patch_height_ != 0 || size[3] % patch_width_ != 0) {
    throw misfit("X", x, "expected [batch, channels, height, width] in whole patches of " +
                             std::to_string(patch_height_) + " x " + std::to_string(patch_width_));
  }
  const Shape shape = {
      4, {size[0], size[2] / patch_height_, size[3] / patch_width_, size[1] * patch_height_ * patch_width_}};
  const mptqc_patches arguments = {size[0],       size[1],      size[2],       size[3],    patch_height_,
                                   patch_width_,  x.as<float>(), quantizer_,
                                   static_cast<uint8_t*>(context.output(shape))};
  backend_.run(context, arguments);
}

}  // namespace mptqc::ort
