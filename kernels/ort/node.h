// What an operator sees of its node: attributes and constants when it is made, tensors and threads when it runs.
// Errors are exceptions in here; register.cpp turns them into statuses at the boundary.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"
#include "mptqc_kernels.h"

namespace mptqc::ort {

struct Shape {
  static constexpr size_t kMostAxes = 8;
  size_t rank = 0;
  int64_t size[kMostAxes] = {};

  // The product of the sizes of axes first..end-1.
  int64_t elements(size_t first, size_t end) const;
  int64_t elements() const { return elements(0, rank); }
  int64_t last() const { return size[rank - 1]; }
  int64_t rows() const { return elements(0, rank - 1); }
};

std::string text(const Shape& shape);

struct Tensor {
  Shape shape;
  void* data = nullptr;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

// Throws std::invalid_argument(message) unless `holds`.
inline void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

// What a kernel's MPTQC_INVALID_ARGUMENT means once shapes and attributes were checked.
constexpr char kRefusedSizes[] = "the kernel refused its sizes; they are beyond what docs/custom-ops.md allows";

// Throws `what` and what `status` says, unless it is null.
void check(Api api, Status* status, const std::string& what);
inline void check(Api api, Status* status) {
  if (status != nullptr) check(api, status, "");
}

// A node while its kernel is made.
class Node {
 public:
  Node(Api api, const KernelInfo* info) : api_(api), info_(info) {}

  std::string name() const;

  // Attributes; none has a default, so that one of the wrong type is never overlooked.
  float number(const std::string& attribute) const;
  int64_t integer(const std::string& attribute) const;
  int64_t integer(const std::string& attribute, int64_t least, int64_t most) const;
  std::vector<int32_t> integers(const std::string& attribute, size_t most) const;  // each a code, 0 to 255
  std::string string(const std::string& attribute) const;
  mptqc_quantizer quantizer(const std::string& prefix) const;

  bool has_input(size_t index) const;
  // An input that must be an initializer, of `rank` axes.
  Tensor constant(size_t index, const char* name, size_t rank) const;

 private:
  Api api_;
  const KernelInfo* info_;
};

// A node while it runs.
class Context {
 public:
  Context(Api api, KernelContext* context) : api_(api), context_(context) {}

  // Of at least `rank` axes.
  Tensor input(size_t index, const char* name, size_t rank) const;
  bool has_input(size_t index) const { return value(index) != nullptr; }
  // The data of an input whose shape was seen when the node was made.
  const void* constant(size_t index) const;
  void* output(const Shape& shape, size_t index = 0) const;

  // Runs task(user, i) for each i below `total`, on the session's threads.
  void parallel_for(void (*task)(void*, size_t), size_t total, void* user) const;
  // The CUDA stream that the node is to run on; null on the CPU.
  void* stream() const;

 private:
  const Value* value(size_t index) const;

  Api api_;
  KernelContext* context_;
};

}  // namespace mptqc::ort
