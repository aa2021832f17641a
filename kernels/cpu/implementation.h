// One instruction set's kernels, as a table; implement.h fills it for a Lanes type.
#pragma once

#include "mptqc_kernels.h"

// Clang before 16 has the intrinsics of dot products only where all code may use them.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)
#define MPTQC_NEON
#endif

namespace mptqc {

// Each runs one task of arguments that were checked.
struct Implementation {
  void (*layer_norm)(const mptqc_layer_norm&, int64_t task);
  void (*layer_norm_add)(const mptqc_layer_norm_add&, int64_t task);
  void (*linear)(const mptqc_linear&, int64_t task);
  void (*attention)(const mptqc_attention&, int64_t task, uint8_t* scratch);
  void (*patches)(const mptqc_patches&, int64_t task);
  void (*trellis)(const mptqc_trellis&, int64_t task, uint8_t* scratch);
};

extern const Implementation kPortable;
#if defined(MPTQC_NEON)
extern const Implementation kNeonDotprod;
extern const Implementation kNeonI8mm;

// Whether the processor has dot products of signed bytes, and of unsigned with signed bytes.
bool has_dotprod();
bool has_i8mm();
#elif defined(__x86_64__)
extern const Implementation kAvx2;
extern const Implementation kAvxVnni;
extern const Implementation kAvx512Vnni;
extern const Implementation kAmxInt8;

// Whether the processor has the VNNI that goes without AVX-512.
bool has_avx_vnni();

// Whether the processor has AMX for int8, and the system lets this process use it: asks for that at the first call.
bool amx_is_permitted();
#endif

}  // namespace mptqc
