// System headers come first: what they define must not be compiled for this file's instruction set.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avxvnni,fma")
#endif

// Tests emulate VNNI on other processors: they name a header that defines its intrinsic.
#if defined(MPTQC_EMULATED_AVX_VNNI)
#include MPTQC_EMULATED_AVX_VNNI
#endif

#include "implement.h"
#include "lanes_avx_vnni.h"

namespace mptqc {
const Implementation kAvxVnni = Kernels<LanesAvxVnni>::table();
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
