// Prints the most integer operations that one core does, in 1e9 a second, multiplication and addition counted apart: the
// instruction that the kernels multiply with, on registers alone. The argument is the instruction set's name.
#include <immintrin.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <ctime>

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int kRepeats = 20000, kRounds = 40;

double seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// 24 chains of 16 lanes of 4 products. Assembler: compilers move an array of vectors to and from memory.
__attribute__((target("avx512f"))) double vnni() {
  for (int i = 0; i < kRepeats; ++i) {
    __asm__ volatile(
        ".irp r,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
        "vpdpbusd %%zmm1, %%zmm0, %%zmm\\r\n"
        ".endr" ::
            : "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19",
              "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
  }
  return 24.0 * 16 * 4 * 2 * kRepeats;
}

// 4 tiles of 16 x 16 sums of 64 products.
__attribute__((target("amx-tile,amx-int8"))) double amx() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // see kernels/cpu/processor.cpp
  if (syscall(SYS_arch_prctl, request_permission, tile_data) != 0) return 0;
  alignas(64) unsigned char configuration[64] = {1};
  for (int tile = 0; tile < 8; ++tile) {
    configuration[16 + 2 * tile] = 64;
    configuration[48 + tile] = 16;
  }
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(configuration);
  for (int i = 0; i < kRepeats; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 16 * 16 * 64 * 2 * kRepeats;
}

}  // namespace

int main(int count, char** arguments) {
  double (*const work)() = count == 2 && std::strcmp(arguments[1], "amx_int8") == 0 ? amx : vnni;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    const double start = seconds(), operations = work();
    best = std::max(best, operations / (seconds() - start));
  }
  std::printf("%.1f\n", best * 1e-9);
}
