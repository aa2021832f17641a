// What kernels/cuda/device.cu is to a device.
#include "emulator.h"
#include "memory.h"

namespace mptqc {

void* allocate_device_memory(size_t bytes) { return ::operator new(bytes, std::align_val_t{256}, std::nothrow); }
void free_device_memory(void* memory) { ::operator delete(memory, std::align_val_t{256}); }

bool copy_memory(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  return true;
}

}  // namespace mptqc

const char* mptqc_cuda_failure(void) { return "no failure"; }
int mptqc_cuda_device_count(void) { return 1; }
