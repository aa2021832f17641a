// Where the operators run: here on a CUDA device, on the stream that ONNX Runtime gives.
#pragma once

#include <vector>

#include "../node.h"
#include "../../cuda/memory.h"
#include "mptqc_cuda.h"

namespace mptqc::ort {

class Backend {
 public:
#if defined(MPTQC_EMULATED)
  static constexpr const char* kProvider = "CPUExecutionProvider";
#else
  static constexpr const char* kProvider = "CUDAExecutionProvider";
#endif

  // Whether LayerNormQuantize and Linear exist for float16 too.
  static constexpr bool kHasFloat16 = true;

  // Whether Linears multiply by a factor, and LinearQuantize rotates heads or brings them to length 1.
  static constexpr bool kHasFactor = false, kHasRotary = false, kHasUnitHeads = false;

  // Whether an output may take the place of the residual: not tried on a device.
  static constexpr bool kAddsInPlace = false;

  // Whether there are LayerNormAdd and LayerNormAddQuantize.
  static constexpr bool kHasLayerNormAdd = false;

  // Constants in the memory that the kernels read.
  template <class T>
  using Array = DeviceArray<T>;

  // A constant of a node in the memory of the processor: a copy, wherever ONNX Runtime has put the node's own.
  template <class T>
  class Constant {
   public:
    explicit Constant(const Tensor& tensor) : content_(static_cast<size_t>(tensor.shape.elements())) {
      if (content_.empty()) return;
      if (!copy_memory(content_.data(), tensor.data, sizeof(T) * content_.size())) {
        throw std::runtime_error("a constant cannot be copied from the CUDA device");
      }
    }
    const T* begin() const { return content_.data(); }
    const T* end() const { return content_.data() + content_.size(); }

   private:
    std::vector<T> content_;
  };

  // For operators whose floats are of this type; throws if there is no CUDA device.
  static Backend choose(ElementType type);

  void run(const Context& context, const mptqc_layer_norm& arguments) const;
  void run(const Context&, const mptqc_layer_norm_add&) const {}  // refused when the node is made
  void run(const Context& context, const mptqc_linear& arguments) const;
  void run(const Context& context, const mptqc_attention& arguments) const;
  void run(const Context& context, const mptqc_patches& arguments) const;

 private:
  explicit Backend(mptqc_cuda_float type) : type_(type) {}

  mptqc_cuda_float type_;
};

}  // namespace mptqc::ort
