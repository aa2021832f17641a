#include "backend.h"

#include <string>

#include "mptqc_cuda.h"

namespace mptqc::ort {
namespace {

void check(mptqc_status status) {
  if (status == MPTQC_CUDA_FAILURE) throw std::runtime_error(std::string("CUDA: ") + mptqc_cuda_failure());
  require(status == MPTQC_OK, kRefusedSizes);
}

}  // namespace

Backend Backend::choose() {
  require(mptqc_cuda_device_count() > 0, "there is no CUDA device, or its driver is older than CUDA 13");
  return {};
}

void Backend::run(const Context& context, const mptqc_layer_norm& arguments) const {
  check(mptqc_cuda_layer_norm(&arguments, context.stream()));
}

void Backend::run(const Context& context, const mptqc_linear& arguments) const {
  check(mptqc_cuda_linear(&arguments, MPTQC_TILE_AUTO, context.stream()));
}

void Backend::run(const Context& context, const mptqc_attention& arguments) const {
  check(mptqc_cuda_attention(&arguments, context.stream()));
}

void Backend::run(const Context& context, const mptqc_patches& arguments) const {
  check(mptqc_cuda_patches(&arguments, context.stream()));
}

}  // namespace mptqc::ort
