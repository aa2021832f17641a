#include "backend.h"

#include <string>

namespace mptqc::ort {
namespace {

void check(mptqc_status status) {
  if (status == MPTQC_CUDA_FAILURE) throw std::runtime_error(std::string("CUDA: ") + mptqc_cuda_failure());
  require(status == MPTQC_OK, kRefusedSizes);
}

}  // namespace

Backend Backend::choose(ElementType type) {
  require(mptqc_cuda_device_count() > 0, "there is no CUDA device, or its driver is older than CUDA 13");
  return Backend(type == kFloat16 ? MPTQC_FLOAT16 : MPTQC_FLOAT32);
}

void Backend::run(const Context& context, const mptqc_layer_norm& arguments) const {
  check(mptqc_cuda_layer_norm(&arguments, type_, context.stream()));
}

void Backend::run(const Context& context, const mptqc_linear& arguments) const {
  check(mptqc_cuda_linear(&arguments, type_, MPTQC_TILE_AUTO, context.stream()));
}

void Backend::run(const Context& context, const mptqc_attention& arguments) const {
  check(mptqc_cuda_attention(&arguments, context.stream()));
}

void Backend::run(const Context& context, const mptqc_patches& arguments) const {
  check(mptqc_cuda_patches(&arguments, context.stream()));
}

}  // namespace mptqc::ort
