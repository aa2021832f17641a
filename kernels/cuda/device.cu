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

int most_shared_bytes() {
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device());
  return error == cudaSuccess ? bytes : 0;
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
  thread_local int context_of = -1;  // the driver's own functions need a thread that has its device's context
  if (const int device = current_device(); device != context_of) {
    if (const cudaError_t error = cudaSetDevice(device); error != cudaSuccess) return status_of(error);
    context_of = device;
  }
  constexpr cuuint32_t steps[] = {1, 1, 1};
  const CUresult found = encode(&map->map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(tensor), shape.size,
                                shape.stride, shape.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                shape.box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status_of(found == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue);
}

bool may_begin_early() {
  constexpr int first_that_waits = 90;  // of the architectures
  static DeviceFact fact;
  return fact.holds([] {
    cudaFuncAttributes found = {};
    if (cudaFuncGetAttributes(&found, probe) != cudaSuccess) return Answer::kUnknown;
    return found.ptxVersion >= first_that_waits ? Answer::kYes : Answer::kNo;
  });
}

Answer has_code(const void* kernel) {
  constexpr int most_of_an_empty_one = 24;
  cudaFuncAttributes found = {};
  if (cudaFuncGetAttributes(&found, kernel) != cudaSuccess) return Answer::kUnknown;
  return found.numRegs > most_of_an_empty_one ? Answer::kYes : Answer::kNo;
}

void* allocate_device_memory(size_t bytes) {
  void* memory = nullptr;
  return cudaMalloc(&memory, bytes) == cudaSuccess ? memory : nullptr;
}

void free_device_memory(void* memory) { cudaFree(memory); }

bool copy_memory(void* to, const void* from, size_t bytes) {
  // From memory that is not pinned, the copy alone may return before it is done.
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault) == cudaSuccess && cudaStreamSynchronize(nullptr) == cudaSuccess;
}

}  // namespace mptqc

const char* mptqc_cuda_failure(void) { return cudaGetErrorString(mptqc::failure); }

int mptqc_cuda_device_count(void) {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}
