// What the kernels ask of a CUDA device: threads, shared memory, asynchronous copies, tensor cores, launches.
//
// Kernels use nothing of CUDA but this, so that tests can compile them for the CPU: MPTQC_EMULATED takes the same names
// from emulator.h (tests/kernels/emulated), where 32 plain C++ lanes make a warp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"
#include "mptqc_cuda.h"

#if defined(MPTQC_EMULATED)
#include "emulator.h"
#else

#include <cuda_runtime.h>

// A kernel of at most `threads` a block, of which a multiprocessor is to hold `blocks` at a time.
#define MPTQC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MPTQC_DEVICE __device__ __forceinline__
#define MPTQC_ROLL _Pragma("unroll 1")
#define MPTQC_GRID_CONSTANT __grid_constant__

// Whether this pass of the compiler is for devices whose warps multiply in groups: Hopper's, and no other's.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MPTQC_WARPGROUPS 1
#else
#define MPTQC_WARPGROUPS 0
#endif

namespace mptqc {

MPTQC_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MPTQC_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
MPTQC_DEVICE void sync_threads() { __syncthreads(); }
MPTQC_DEVICE void sync_warp() { __syncwarp(); }

// Kernels begin before those before them on their stream have ended: what a kernel reads but for constants, and all it
// writes, comes behind wait_for_inputs. let_next_begin lets the next one have what room there is.
MPTQC_DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
MPTQC_DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// x, but the compiler takes it for another number, and all that follows for unknown as well.
MPTQC_DEVICE int worked_out_anew(int x) {
  asm volatile("" : "+r"(x)::"memory");
  return x;
}

// The block's shared memory.
MPTQC_DEVICE uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

MPTQC_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies kBytes (4, 8 or 16) to shared memory in the background, or zeros if not `valid`: `from` is not read then.
template <int kBytes>
MPTQC_DEVICE void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(bytes)
                 : "memory");
  }
}

// Ends a group of this thread's copies.
MPTQC_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most kGroups of this thread's groups are under way.
template <int kGroups>
MPTQC_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroups) : "memory");
}

// Brings the line of `from` to the second cache.
MPTQC_DEVICE void fetch(const void* from) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(from)); }

// Four 8 x 8 matrices of 2-byte elements, that is 8 rows of 16 codes. Lane 8i + r gives the address of row r of matrix
// i; lane l gets word l % 4 of row l / 4 of each matrix.
MPTQC_DEVICE void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row))
               : "memory");
}

// sums[16, 8] += a[16, 32] * b[32, 8] on the tensor cores; b is of unsigned codes, a of signed ones or not. With row = lane / 4 and quad = lane % 4, a lane holds
//   a[i]: row + 8 * (i % 2), inputs 4 * quad + 16 * (i / 2) and the next three
//   b[i]: column lane / 4, the same inputs with i instead of i / 2
//   sums[i]: row + 8 * (i / 2), column 2 * quad + i % 2
template <bool kSignedA>
MPTQC_DEVICE void multiply_add(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kSignedA) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// IEEE binary16.
struct Half {
  uint16_t bits;
};

MPTQC_DEVICE float to_float(Half half) {
  float x;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(x) : "h"(half.bits));
  return x;
}

// To the nearest, ties to even; infinity from 65520 on.
MPTQC_DEVICE Half to_half(float x) {
  Half half;
  asm("cvt.rn.f16.f32 %0, %1;\n" : "=h"(half.bits) : "f"(x));
  return half;
}

// The value of the lane whose number differs in the bits of `mask`.
template <class T>
MPTQC_DEVICE T exchange(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// total + the sum of the four codes of a word.
MPTQC_DEVICE uint32_t add_codes(uint32_t word, uint32_t total) { return __dp4a(word, 0x01010101u, total); }

// Byte i of the result is byte (selector >> 4i) % 8 of the bytes of `low`, then of `high`.
MPTQC_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// 2^x, relative error under 2^-22; x below -126 gives 0.
MPTQC_DEVICE float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(power) : "f"(x));
  return power;
}

// Of the current device: what a block may have if it is asked for, too.
int multiprocessors();
int most_shared_bytes();

// Whether kernels wait for their inputs by themselves on the current device, so that they may begin early.
bool may_begin_early();

// Whether the current device has code for a kernel that is written for some devices alone, and empty for others.
Answer has_code(const void* kernel);

// MPTQC_OK, or MPTQC_CUDA_FAILURE, which mptqc_cuda_failure then explains.
mptqc_status status_of(cudaError_t error);

template <class... Parameters>
mptqc_status launch(const Launch& launch, void (*kernel)(Parameters...), Parameters... parameters) {
  constexpr size_t unasked = 48 * 1024;
  if (launch.blocks == 0) return MPTQC_OK;
  if (launch.blocks > INT32_MAX) return MPTQC_INVALID_ARGUMENT;
  if (launch.shared_bytes > unasked) {  // always the same number, as other threads may launch the kernel
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes());
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchAttribute early = {};
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  configuration.blockDim = dim3(static_cast<unsigned>(launch.threads));
  configuration.dynamicSmemBytes = launch.shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(launch.stream);
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  configuration.attrs = &early;
  configuration.numAttrs = may_begin_early() ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&configuration, kernel, parameters...));
}

}  // namespace mptqc

#endif
