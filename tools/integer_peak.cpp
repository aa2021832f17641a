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

// 24 chains of 16 lanes of 4 products.
__attribute__((target("avx512f,avx512vnni"))) double vnni() {
  __m512i sum[24];
  for (int chain = 0; chain < 24; ++chain) sum[chain] = _mm512_set1_epi32(chain);  // alike, they would be made one
  __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  for (int i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 24
    for (int chain = 0; chain < 24; ++chain) sum[chain] = _mm512_dpbusd_epi32(sum[chain], a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b));
  }
  for (__m512i& each : sum) __asm__ volatile("" : "+v"(each));
  return 24.0 * 16 * 4 * 2 * kRepeats;
}

// 4 tiles of 16 x 16 sums of 64 products.
__attribute__((target("amx-tile,amx-int8"))) double amx() {
  constexpr long request_permission = 0x1023, tile_data = 18;
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
