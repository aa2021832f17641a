#include "implementation.h"

#if defined(MPTQC_NEON)

#if defined(__linux__)
#include <sys/auxv.h>
#endif

namespace mptqc {

// HWCAP_ASIMDDP and HWCAP2_I8MM.
#if defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) & 1ul << 20) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & 1ul << 13) != 0; }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

}  // namespace mptqc

#elif defined(__x86_64__)

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mptqc {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// CPUID leaf 7, which says what a processor can do; all 0 where it has no such leaf.
Registers features(unsigned subleaf) {
  Registers found;
  if (__get_cpuid_count(7, subleaf, &found.a, &found.b, &found.c, &found.d) == 0) return {};
  return found;
}

}  // namespace

bool has_avx_vnni() {
  static const bool has = (features(1).a & 1u << 4) != 0;  // once: CPUID takes long in a virtual machine
  return has;
}

bool amx_is_permitted() {
#if defined(__linux__)
  // Linux keeps the tiles' state from a process until it asks, once for all its threads; it refuses where the kernel has
  // no AMX, or where a signal stack is too small for the state.
  static const bool permitted = [] {
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    const unsigned found = features(0).d;
    return (found & tile) != 0 && (found & int8) != 0 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}

}  // namespace mptqc

#endif
