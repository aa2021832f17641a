// What Hopper's devices have besides: copies of whole boxes, barriers that count their bytes, products of four warps together.
// For other devices, whose kernels use none of it, all of this is empty.
#pragma once

#include "device.h"

#if !defined(MPTQC_EMULATED)

#include <cuda.h>

namespace mptqc {

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
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 12, "the sizes that are used");
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
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n96k32.s32.s8.u8 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
        "{%48, %49, %50, %51}, %52, add;\n}\n"
        : MPTQC_SUMS(0), MPTQC_SUMS(4), MPTQC_SUMS(8)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
#undef MPTQC_SUMS
#undef MPTQC_SUM
#endif
}

}  // namespace mptqc

#endif
