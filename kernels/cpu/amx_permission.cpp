#include "implementation.h"

#if defined(__x86_64__)

#if defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace mptqc {

bool amx_is_permitted() {
  // Linux keeps the tiles' state from a process until it asks, once for all its threads; it refuses where the kernel has
  // no AMX, or where a signal stack is too small for the state.
  static const bool permitted = [] {
    constexpr unsigned tile = 1u << 24, int8 = 1u << 25;           // of EDX, CPUID leaf 7
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & tile) == 0 || (d & int8) == 0) return false;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return permitted;
}

}  // namespace mptqc
#else
namespace mptqc {
bool amx_is_permitted() { return false; }
}
#endif

#endif
