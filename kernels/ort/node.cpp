#include "node.h"

#include <algorithm>

namespace mptqc::ort {

int64_t Shape::elements(size_t first, size_t end) const {
  int64_t product = 1;
  for (size_t axis = first; axis < end; ++axis) product *= size[axis];
  return product;
}

std::string text(const Shape& shape) {
  std::string joined;
  for (size_t axis = 0; axis < shape.rank; ++axis) joined += (axis > 0 ? ", " : "") + std::to_string(shape.size[axis]);
  return "[" + joined + "]";
}

void check(Api api, Status* status, const std::string& what) {
  if (status == nullptr) return;
  const std::string message = api.message(status);
  api.release(status);
  throw std::invalid_argument(what + message);
}

namespace {

Tensor read(Api api, const Value* value, const char* name) {
  struct Info {
    Api api;
    ShapeInfo* pointer = nullptr;
    ~Info() {
      if (pointer != nullptr) api.release(pointer);
    }
  } info{api};
  Tensor tensor;
  check(api, api.shape_info(value, &info.pointer));
  check(api, api.rank(info.pointer, &tensor.shape.rank));
  if (tensor.shape.rank > Shape::kMostAxes) {
    throw std::invalid_argument(std::string(name) + " has more than 8 axes");
  }
  check(api, api.shape(info.pointer, tensor.shape.size, tensor.shape.rank));
  check(api, api.data(const_cast<Value*>(value), &tensor.data));
  return tensor;
}

}  // namespace

std::string Node::name() const {
  size_t size = 0;
  check(api_, api_.node_name(info_, nullptr, &size));
  std::string name(size, '\0');
  check(api_, api_.node_name(info_, name.data(), &size));
  name.resize(size > 0 ? size - 1 : 0);
  return name;
}

namespace {

bool succeeds(Api api, Status* status) {
  if (status != nullptr) api.release(status);
  return status == nullptr;
}

}  // namespace

float Node::number(const std::string& attribute) const {
  float value = 0;
  check(api_, api_.attribute(info_, attribute.c_str(), &value), attribute + ": ");
  return value;
}

int64_t Node::integer(const std::string& attribute) const {
  int64_t value = 0;
  check(api_, api_.attribute(info_, attribute.c_str(), &value), attribute + ": ");
  return value;
}

int64_t Node::integer(const std::string& attribute, int64_t least, int64_t most) const {
  const int64_t value = integer(attribute);
  if (value < least || value > most) {
    throw std::invalid_argument(attribute + " is " + std::to_string(value) + ", not between " + std::to_string(least) +
                                " and " + std::to_string(most));
  }
  return value;
}

std::vector<int32_t> Node::integers(const std::string& attribute, size_t most) const {
  size_t count = 0;
  check(api_, api_.integers(info_, attribute.c_str(), nullptr, &count), attribute + ": ");
  int64_t whole = 0;
  float number = 0;
  if (count == 0 && (succeeds(api_, api_.attribute(info_, attribute.c_str(), &whole)) ||
                     succeeds(api_, api_.attribute(info_, attribute.c_str(), &number)))) {
    throw std::invalid_argument(attribute + " must be a list of integers");
  }
  if (count > most) throw std::invalid_argument(attribute + " holds more than " + std::to_string(most) + " numbers");
  std::vector<int64_t> values(count);
  if (count > 0) check(api_, api_.integers(info_, attribute.c_str(), values.data(), &count), attribute + ": ");
  std::vector<int32_t> small;
  for (const int64_t value : values) {
    if (value < 0 || value > 255) throw std::invalid_argument(attribute + " holds a number not between 0 and 255");
    small.push_back(static_cast<int32_t>(value));
  }
  return small;
}

std::string Node::string(const std::string& attribute) const {
  size_t size = 0;
  check(api_, api_.attribute(info_, attribute.c_str(), nullptr, &size), attribute + ": ");
  std::string value(size, '\0');
  check(api_, api_.attribute(info_, attribute.c_str(), value.data(), &size));
  value.resize(size > 0 ? size - 1 : 0);
  return value;
}

mptqc_quantizer Node::quantizer(const std::string& prefix) const {
  const auto code = [&](const char* name) { return static_cast<int32_t>(integer(prefix + name, 0, 255)); };
  mptqc_quantizer quantizer = {
      number(prefix + "_scale"), code("_zero_point"), code("_minimum"), code("_maximum"), 0, {}, {}};
  const auto m = integers(prefix + "_m", MPTQC_UPPER_REGIONS);
  const auto split = integers(prefix + "_split", MPTQC_UPPER_REGIONS);
  if (m.size() != split.size()) throw std::invalid_argument(prefix + "_m and " + prefix + "_split differ in length");
  quantizer.regions = static_cast<int32_t>(m.size());
  std::copy(m.begin(), m.end(), quantizer.m);
  std::copy(split.begin(), split.end(), quantizer.split);
  const char* fault = mptqc_quantizer_fault(&quantizer);
  if (fault != nullptr) throw std::invalid_argument("the quantizer " + prefix + "_* is not sound: " + fault);
  return quantizer;
}

bool Node::has_input(size_t index) const {
  size_t count = 0, size = 0;
  check(api_, api_.input_count(info_, &count));
  if (index >= count) return false;
  check(api_, api_.input_name(info_, index, nullptr, &size));
  return size > 1;
}

Tensor Node::constant(size_t index, const char* name, size_t rank) const {
  int is_constant = 0;
  const Value* value = nullptr;
  check(api_, api_.constant_input(info_, index, &is_constant, &value));
  if (is_constant == 0) throw std::invalid_argument(std::string(name) + " must be constant");
  Tensor tensor = read(api_, value, name);
  if (tensor.shape.rank != rank) {
    throw std::invalid_argument(std::string(name) + " has shape " + text(tensor.shape) + "; expected " +
                                std::to_string(rank) + " axes");
  }
  return tensor;
}

const Value* Context::value(size_t index) const {
  const Value* value = nullptr;
  check(api_, api_.input(context_, index, &value));
  return value;
}

Tensor Context::input(size_t index, const char* name, size_t rank) const {
  const Value* found = value(index);
  if (found == nullptr) throw std::invalid_argument(std::string(name) + " is absent");
  Tensor tensor = read(api_, found, name);
  if (tensor.shape.rank < rank) {
    throw std::invalid_argument(std::string(name) + " has shape " + text(tensor.shape) + "; expected " +
                                std::to_string(rank) + " axes or more");
  }
  return tensor;
}

const void* Context::constant(size_t index) const {
  void* data = nullptr;
  check(api_, api_.data(const_cast<Value*>(value(index)), &data));
  return data;
}

void* Context::output(const Shape& shape, size_t index) const {
  Value* value = nullptr;
  void* data = nullptr;
  check(api_, api_.output(context_, index, shape.size, shape.rank, &value));
  check(api_, api_.data(value, &data));
  return data;
}

void Context::parallel_for(void (*task)(void*, size_t), size_t total, void* user) const {
  check(api_, api_.parallel_for(context_, task, total, user));
}

void* Context::stream() const {
  void* stream = nullptr;
  check(api_, api_.stream(context_, &stream));
  return stream;
}

}  // namespace mptqc::ort
