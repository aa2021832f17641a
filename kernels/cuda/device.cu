#include "device.h"
#include "memory.h"

namespace mptqc {
namespace {

thread_local cudaError_t failure = cudaSuccess;

}  // namespace

mptqc_status status_of(cudaError_t error) {
  if (error == cudaSuccess) return MPTQC_OK;
  failure = error;
  return MPTQC_CUDA_FAILURE;
}

int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
  return count;
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
