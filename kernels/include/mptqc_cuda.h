/* The kernels of the operators in docs/custom-ops.md on CUDA devices: the records of mptqc_kernels.h with pointers to
 * device memory (the records themselves and their quantizers lie on the host), and a stream to run on.
 *
 * A call checks the record, launches on the current device and returns without waiting; it allocates nothing and may be
 * captured into a CUDA graph. weight, offset, scale, bias and multiplier of a Linear begin on 16 bytes; any other pointer may begin
 * on any element, and is read faster on 16 bytes. Beyond what the CPU kernels refuse, a head is at most 512 wide.
 */
#ifndef MPTQC_CUDA_H
#define MPTQC_CUDA_H

#include "mptqc_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Rows by outputs that one block of threads makes; AUTO takes the largest of which there are enough to fill the device. The last
 * three are on Hopper's products of four warps: only such devices have them, for inputs that lie on 16 bytes. */
typedef enum {
  MPTQC_TILE_AUTO = 0,
  MPTQC_TILE_64X64 = 1,
  MPTQC_TILE_128X128 = 2,
  MPTQC_TILE_32X128 = 3,
  MPTQC_TILE_64X128 = 4,
  MPTQC_TILE_288X128 = 5
} mptqc_cuda_tile;

/* The type of the floats between operators. With FLOAT16, input of a layer norm, and residual and float output of a Linear,
 * point to IEEE binary16; a kernel widens what it reads, computes as ever, and rounds what it writes to the nearest. */
typedef enum { MPTQC_FLOAT32 = 0, MPTQC_FLOAT16 = 1 } mptqc_cuda_float;

/* Each: MPTQC_INVALID_ARGUMENT if the record is not sound, MPTQC_CUDA_FAILURE if the launch failed. */
MPTQC_EXPORT mptqc_status mptqc_cuda_layer_norm(
    const mptqc_layer_norm* arguments, mptqc_cuda_float type, void* stream);
MPTQC_EXPORT mptqc_status mptqc_cuda_linear(
    const mptqc_linear* arguments, mptqc_cuda_float type, mptqc_cuda_tile tile, void* stream);
MPTQC_EXPORT mptqc_status mptqc_cuda_attention(const mptqc_attention* arguments, void* stream);
MPTQC_EXPORT mptqc_status mptqc_cuda_patches(const mptqc_patches* arguments, void* stream);

/* What CUDA said of this thread's last MPTQC_CUDA_FAILURE. */
MPTQC_EXPORT const char* mptqc_cuda_failure(void);

/* How many CUDA devices there are; 0 where there is no driver. */
MPTQC_EXPORT int mptqc_cuda_device_count(void);

#ifdef __cplusplus
}
#endif

#endif
