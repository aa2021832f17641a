#include "device.h"

#include "hopper.h"
#include "memory.h"

namespace mptqc {
namespace {

thread_local cudaError_t failure = cudaSuccess;

// Is compiled for what all kernels are compiled for.
__global__ void probe() {}

}  // namespace

mptqc_status status_of(cudaError_t error) {
  if (error == cudaSuccess) return MPTQC_OK;
  failure = error;
  return MPTQC_CUDA_FAILURE;
}

int current_device() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess ? device : 0;
}

int multiprocessors() {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()) == cudaSuccess ? count : 1;
}

mptqc_status map_box(BoxMap* map, const void* tensor, const BoxShape& shape) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    constexpr unsigned since = 12000;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, since, cudaEnableDefault, &result);
    return reinterpret_cast<Encode>(found);
  }();
  if (encode == nullptr) return status_of(cudaErrorNotSupported);
  constexpr cuuint32_t steps[] = {1, 1, 1};
  const CUresult found = encode(&map->map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(tensor), shape.size,
                                shape.stride, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                shape.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status_of(found == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

bool may_begin_early() {
  constexpr int first_that_waits = 90;  // of the architectures
  static DeviceFact fact;
  return fact.holds([] {
    cudaFuncAttributes found = {};
    return cudaFuncGetAttributes(&found, probe) == cudaSuccess && found.ptxVersion >= first_that_waits;
  });
}

bool has_code(const void* kernel) {
  constexpr int most_of_an_empty_one = 24;
  cudaFuncAttributes found = {};
  return cudaFuncGetAttributes(&found, kernel) == cudaSuccess && found.numRegs > most_of_an_empty_one;
}

void* allocate_device_memory(size_t bytes) {
  void* memory = nullptr;
  return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
}

void free_device_memory(void* memory) { cudaFree(memory); }

bool copy_memory(void* to, const void* from, size_t bytes) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault) == cudaSuccess;
}

}  // namespace mptqc

const char* mptqc_cuda_failure(void) { return cudaGetErrorString(mptqc::failure); }

int mptqc_cuda_device_count(void) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
