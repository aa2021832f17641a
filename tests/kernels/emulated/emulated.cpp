// What kernels/cuda/device.cu is to a device.
#include "emulator.h"

const char* mptqc_cuda_failure(void) { return "no failure"; }
int mptqc_cuda_device_count(void) { return 1; }
