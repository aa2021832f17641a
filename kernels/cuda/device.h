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

#include <cuda.h>
#include <cuda_runtime.h>

// A kernel of at most `threads` a block, of which a multiprocessor is to hold `blocks` at a time.
#define MPTQC_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define MPTQC_DEVICE __device__ __forceinline__
#define MPTQC_UNROLL_TWICE _Pragma("unroll 2")
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

// The first kThreads of the block.
template <int kThreads>
MPTQC_DEVICE void sync_all() {
  asm volatile("bar.sync 15, %0;\n" ::"n"(kThreads) : "memory");
}

// The four warps of group `group` of kGroups that the block has.
template <int kGroups>
MPTQC_DEVICE void sync_group(int group) {
  if constexpr (kGroups == 1) return __syncthreads();  // the block has no other warps
  asm volatile("bar.sync %0, 128;\n" ::"r"(group + 1) : "memory");
}

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

// A box of a tensor of bytes, to be copied to shared memory as a whole: up to three axes, the innermost of 64 or 128 bytes in the
// box. Of its rows of 64 bytes in shared memory, bits 4 and 5 of an address are exchanged for their sum with bits 7 and 8; of rows
// of 128 bytes, bits 4 to 6 for their sum with bits 7 to 9.
struct BoxMap {
  CUtensorMap map;
};

// What follows of the tensor's sizes and of its box; strides, of all axes but the innermost, are multiples of 16 bytes, and the
// tensor begins on as many. What a box has beyond the tensor's end becomes zero.
struct BoxShape {
  uint64_t size[3], stride[2];
  uint32_t box[3];
};
mptqc_status map_box(BoxMap* map, const void* tensor, const BoxShape& shape);

// Counts threads that arrive, and bytes that they expect; a phase ends once all have come.
struct alignas(8) Barrier {
  uint64_t state;
};

// By one thread, before the others' next barrier.
MPTQC_DEVICE void begin_barrier(Barrier* barrier, int count) {
#if MPTQC_WARPGROUPS
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;\n" ::"r"(
                   shared_address(barrier)),
               "r"(count)
               : "memory");
#endif
}

// Arrives, and expects so many bytes.
MPTQC_DEVICE void expect_bytes(Barrier* barrier, int bytes) {
#if MPTQC_WARPGROUPS
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

MPTQC_DEVICE void arrive(Barrier* barrier) {
#if MPTQC_WARPGROUPS
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Waits for the end of phase `phase`, which is counted from 0.
MPTQC_DEVICE void wait_for_phase(Barrier* barrier, int phase) {
#if MPTQC_WARPGROUPS
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(phase & 1)
      : "memory");
#endif
}

// One thread copies the box that begins at element (x, y, z) to `to`, on 1024 bytes; the barrier counts the bytes.
MPTQC_DEVICE void copy_box(uint8_t* to, const BoxMap& box, int x, int y, int z, Barrier* barrier) {
#if MPTQC_WARPGROUPS
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];\n" ::"r"(shared_address(to)),
      "l"(&box.map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
#endif
}

// Four warps change the number of their registers: a block's threads begin with as many each, but one that only asks for boxes
// needs few of them.
template <int kCount>
MPTQC_DEVICE void take_registers() {
#if MPTQC_WARPGROUPS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount));
#endif
}
template <int kCount>
MPTQC_DEVICE void leave_registers() {
#if MPTQC_WARPGROUPS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount));
#endif
}

// Before the first product of a group, once its sums and left operands are in registers.
MPTQC_DEVICE void begin_products() {
#if MPTQC_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

// Ends a group of products.
MPTQC_DEVICE void commit_products() {
#if MPTQC_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Waits until at most kGroups groups of products are under way. Then the sums of the others are there, and what they read
// may be overwritten.
template <int kGroups>
MPTQC_DEVICE void wait_products() {
#if MPTQC_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kGroups) : "memory");
#endif
}

// Keeps what reads sums behind what was waited for.
template <int kTiles>
MPTQC_DEVICE void hold(int32_t (&sums)[kTiles][4]) {
  _Pragma("unroll")
  for (int t = 0; t < kTiles; ++t) {
    asm volatile("" : "+r"(sums[t][0]), "+r"(sums[t][1]), "+r"(sums[t][2]), "+r"(sums[t][3])::"memory");
  }
}

// sums[64, 8 * kTiles] += a[64, 32] * b[32, 8 * kTiles], begun by the four warps of a group together, each with 16 rows of a:
// there a lane holds of a and of sums[t], the columns 8t to 8t + 7, what multiply_add says; a is of signed codes. Column n of b
// are 32 unsigned codes of row n in shared memory from `rows` on, in rows of kRowBytes as copy_box leaves them.
template <int kRowBytes, int kTiles>
MPTQC_DEVICE void multiply_rows(int32_t (&s)[kTiles][4], const uint32_t (&a)[4], const uint8_t* rows) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 12 || kTiles == 16, "the sizes that are used");
#if MPTQC_WARPGROUPS
  static_assert(kRowBytes == 64 || kRowBytes == 128, "the layouts that are used");
  constexpr uint64_t swizzle = uint64_t{kRowBytes == 64 ? 2 : 1} << 62, eight_rows = uint64_t{8 * kRowBytes >> 4} << 32;
  constexpr uint64_t unused = uint64_t{1} << 16;
  const uint64_t b = swizzle | eight_rows | unused | (shared_address(rows) & 0x3FFFFu) >> 4;
#define MPTQC_SUM(t) "+r"(s[t][0]), "+r"(s[t][1]), "+r"(s[t][2]), "+r"(s[t][3])
#define MPTQC_SUMS(t) MPTQC_SUM(t), MPTQC_SUM(t + 1), MPTQC_SUM(t + 2), MPTQC_SUM(t + 3)
  if constexpr (kTiles == 4) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, add;\n}\n"
        : MPTQC_SUMS(0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kTiles == 8) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, add;\n}\n"
        : MPTQC_SUMS(0), MPTQC_SUMS(4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kTiles == 12) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, add;\n}\n"
        : MPTQC_SUMS(0), MPTQC_SUMS(4), MPTQC_SUMS(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add;\n}\n"
        : MPTQC_SUMS(0), MPTQC_SUMS(4), MPTQC_SUMS(8), MPTQC_SUMS(12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
#undef MPTQC_SUMS
#undef MPTQC_SUM
#endif
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

// Of the current device.
int multiprocessors();

// Whether kernels wait for their inputs by themselves on the current device, so that they may begin early.
bool may_begin_early();

// Whether the current device has code for a kernel that is written for some devices alone, and empty for others.
bool has_code(const void* kernel);

// MPTQC_OK, or MPTQC_CUDA_FAILURE, which mptqc_cuda_failure then explains.
mptqc_status status_of(cudaError_t error);

template <class... Parameters>
mptqc_status launch(const Launch& launch, void (*kernel)(Parameters...), Parameters... parameters) {
  constexpr size_t unasked = 48 * 1024;
  if (launch.blocks == 0) return MPTQC_OK;
  if (launch.blocks > INT32_MAX) return MPTQC_INVALID_ARGUMENT;
  if (launch.shared_bytes > unasked) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(launch.shared_bytes));
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
