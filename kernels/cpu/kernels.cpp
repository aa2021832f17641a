// The C interface: which implementation, how many tasks.
#include "mptqc_kernels.h"

#include <cstring>

#include "arguments.h"
#include "implementation.h"
#include "scratch.h"
#include "sizes.h"

namespace mptqc {
namespace {

const char* const kNames[MPTQC_ISA_COUNT] = {"portable", "neon_dotprod", "neon_i8mm", "avx2",
                                             "avx_vnni", "avx512_vnni", "amx_int8"};

bool is_known(mptqc_isa isa) { return isa >= 0 && isa < MPTQC_ISA_COUNT; }

// Null if this build or this processor does not have it.
const Implementation* find(mptqc_isa isa) {
  switch (isa) {
    case MPTQC_PORTABLE:
      return &kPortable;
#if defined(MPTQC_NEON)
    case MPTQC_NEON_DOTPROD:
      return has_dotprod() ? &kNeonDotprod : nullptr;
    case MPTQC_NEON_I8MM:
      return has_dotprod() && has_i8mm() ? &kNeonI8mm : nullptr;
#elif defined(__x86_64__)
    case MPTQC_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kAvx2 : nullptr;
    case MPTQC_AVX_VNNI:
      return find(MPTQC_AVX2) != nullptr && has_avx_vnni() ? &kAvxVnni : nullptr;
    case MPTQC_AVX512_VNNI:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma")
                 ? &kAvx512Vnni
                 : nullptr;
    case MPTQC_AMX_INT8:
      return find(MPTQC_AVX512_VNNI) != nullptr && amx_is_permitted() ? &kAmxInt8 : nullptr;
#endif
    default:
      return nullptr;
  }
}

int64_t task_count(const mptqc_layer_norm& a) { return NormPlace::tasks(a.rows); }
int64_t task_count(const mptqc_layer_norm_add& a) { return NormPlace::tasks(a.rows); }
int64_t task_count(const mptqc_linear& a) { return LinearPlace::tasks(a); }
int64_t task_count(const mptqc_attention& a) { return AttentionPlace::tasks(a); }
int64_t task_count(const mptqc_trellis& a) { return a.rows; }
int64_t task_count(const mptqc_patches& a) { return a.batch * (a.height / a.patch_height); }

template <class Arguments>
int64_t tasks(const Arguments* arguments) {
  return is_sound(*arguments) ? task_count(*arguments) : 0;
}

// The implementation that is to run `task`; null if something is wrong.
template <class Arguments>
const Implementation* prepare(mptqc_isa isa, const Arguments& arguments, int64_t task) {
  if (!is_sound(arguments) || task < 0 || task >= task_count(arguments)) return nullptr;
  return find(isa);
}

// An operator that needs no scratch memory.
template <class Arguments>
mptqc_status run(
    mptqc_isa isa, const Arguments& arguments, int64_t task, void (*Implementation::*kernel)(const Arguments&, int64_t)) {
  const Implementation* implementation = prepare(isa, arguments, task);
  if (implementation == nullptr) return MPTQC_INVALID_ARGUMENT;
  (implementation->*kernel)(arguments, task);
  return MPTQC_OK;
}

}  // namespace
}  // namespace mptqc

using namespace mptqc;

const char* mptqc_isa_name(mptqc_isa isa) { return is_known(isa) ? kNames[isa] : nullptr; }

int mptqc_isa_runs_here(mptqc_isa isa) { return find(isa) != nullptr; }

mptqc_status mptqc_choose_isa(const char* name, mptqc_isa* isa) {
  const bool any = name == nullptr || name[0] == '\0';
  for (int candidate = MPTQC_ISA_COUNT - 1; candidate >= 0; --candidate) {
    *isa = static_cast<mptqc_isa>(candidate);
    if ((any || std::strcmp(name, kNames[candidate]) == 0) && find(*isa) != nullptr) return MPTQC_OK;
  }
  return MPTQC_INVALID_ARGUMENT;
}

int64_t mptqc_layer_norm_tasks(const mptqc_layer_norm* arguments) { return tasks(arguments); }

mptqc_status mptqc_layer_norm_run(mptqc_isa isa, const mptqc_layer_norm* arguments, int64_t task) {
  return run(isa, *arguments, task, &Implementation::layer_norm);
}

int64_t mptqc_layer_norm_add_tasks(const mptqc_layer_norm_add* arguments) { return tasks(arguments); }

mptqc_status mptqc_layer_norm_add_run(mptqc_isa isa, const mptqc_layer_norm_add* arguments, int64_t task) {
  return run(isa, *arguments, task, &Implementation::layer_norm_add);
}

int64_t mptqc_linear_tasks(const mptqc_linear* arguments) { return tasks(arguments); }

mptqc_status mptqc_linear_run(mptqc_isa isa, const mptqc_linear* arguments, int64_t task) {
  return run(isa, *arguments, task, &Implementation::linear);
}

int64_t mptqc_attention_tasks(const mptqc_attention* arguments) { return tasks(arguments); }

mptqc_status mptqc_attention_run(mptqc_isa isa, const mptqc_attention* arguments, int64_t task) {
  const Implementation* implementation = prepare(isa, *arguments, task);
  if (implementation == nullptr) return MPTQC_INVALID_ARGUMENT;
  uint8_t* scratch = thread_scratch(static_cast<size_t>(AttentionScratch(*arguments).bytes));
  if (scratch == nullptr) return MPTQC_OUT_OF_MEMORY;
  implementation->attention(*arguments, task, scratch);
  return MPTQC_OK;
}

int64_t mptqc_patches_tasks(const mptqc_patches* arguments) { return tasks(arguments); }

mptqc_status mptqc_patches_run(mptqc_isa isa, const mptqc_patches* arguments, int64_t task) {
  return run(isa, *arguments, task, &Implementation::patches);
}

int64_t mptqc_trellis_tasks(const mptqc_trellis* arguments) { return tasks(arguments); }

mptqc_status mptqc_trellis_run(mptqc_isa isa, const mptqc_trellis* arguments, int64_t task) {
  const Implementation* implementation = prepare(isa, *arguments, task);
  if (implementation == nullptr) return MPTQC_INVALID_ARGUMENT;
  uint8_t* scratch = thread_scratch(static_cast<size_t>(trellis_scratch_bytes(*arguments)));
  if (scratch == nullptr) return MPTQC_OUT_OF_MEMORY;
  implementation->trellis(*arguments, task, scratch);
  return MPTQC_OK;
}
