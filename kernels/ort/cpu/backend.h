// Where the operators run: here on the processor, by the session's threads. ort/cuda/backend.h has
// the same members for CUDA devices; a build sees one of the two.
#pragma once

#include <atomic>
#include <vector>

#include "../node.h"

namespace mptqc::ort {

class Backend {
 public:
  static constexpr const char* kProvider = "CPUExecutionProvider";

  // Whether LayerNormQuantize and Linear exist for float16 too.
  static constexpr bool kHasFloat16 = false;

  // Whether Linears multiply by a factor, and LinearQuantize rotates heads or brings them to length 1.
  static constexpr bool kHasFactor = true, kHasRotary = true, kHasUnitHeads = true;

  // Whether an output may take the place of the residual.
  static constexpr bool kAddsInPlace = true;

  // Whether there are LayerNormAdd and LayerNormAddQuantize.
  static constexpr bool kHasLayerNormAdd = true;

  // Constants in the memory that the kernels read.
  template <class T>
  using Array = std::vector<T>;

  // A constant of a node in the memory of the processor.
  template <class T>
  class Constant {
   public:
    explicit Constant(const Tensor& tensor) : data_(tensor.as<T>()), size_(tensor.shape.elements()) {}
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }

   private:
    const T* data_;
    int64_t size_;
  };

  // The implementation that MPTQC_ISA names, or the best one; the operators' floats are float32.
  static Backend choose(ElementType);

  void run(const Context& context, const mptqc_layer_norm& arguments) const;
  void run(const Context& context, const mptqc_layer_norm_add& arguments) const;
  void run(const Context& context, mptqc_linear arguments) const;
  void run(const Context& context, mptqc_attention arguments) const;
  void run(const Context& context, const mptqc_patches& arguments) const;

 private:
  // A hint that a copy has of its own: runs may set it at once.
  struct Count : std::atomic<int> {
    Count() : std::atomic<int>(0) {}
    Count(const Count& other) : std::atomic<int>(other.load()) {}
    using std::atomic<int>::operator=;
  };

  explicit Backend(mptqc_isa isa) : isa_(isa) {}

  mptqc_isa isa_;
  mutable Count threads_;  // how many shared the last run
};

}  // namespace mptqc::ort
