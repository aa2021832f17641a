// System headers come first: what they define must not be compiled for this file's instruction set.
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>

// Tests emulate AMX on other processors: they name a header that defines the intrinsics of tiles.
#if defined(MPTQC_EMULATED_AMX)
#include MPTQC_EMULATED_AMX
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,amx-tile,amx-int8")
#endif

#include "attention_product_amx.h"  // before what multiplies

#include "implement.h"

namespace mptqc {
const Implementation kAmxInt8 = Kernels<LanesAmx>::table();
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
