#include "backend.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <string>

namespace mptqc::ort {
namespace {

// Runs all tasks of an operator on the session's threads. Returns how many of these took part.
template <class Arguments>
int run_tasks(const Context& context, mptqc_isa isa, const Arguments& arguments, int64_t tasks,
              mptqc_status (*run_task)(mptqc_isa, const Arguments*, int64_t)) {
  static std::atomic<uint64_t> runs{0};
  struct Work {
    mptqc_isa isa;
    const Arguments& arguments;
    mptqc_status (*run_task)(mptqc_isa, const Arguments*, int64_t);
    const uint64_t run;
    std::atomic<int> worst, threads;
  } work{isa, arguments, run_task, ++runs, {MPTQC_OK}, {0}};
  const auto run_one = [](void* user, size_t task) {
    static thread_local uint64_t last_run = 0;
    Work& shared = *static_cast<Work*>(user);
    if (last_run != shared.run) ++shared.threads;
    last_run = shared.run;
    const mptqc_status status = shared.run_task(shared.isa, &shared.arguments, static_cast<int64_t>(task));
    if (status != MPTQC_OK) shared.worst = status;
  };
  context.parallel_for(run_one, static_cast<size_t>(tasks), &work);
  if (work.worst == MPTQC_OUT_OF_MEMORY) throw std::bad_alloc();
  require(work.worst == MPTQC_OK, kRefusedSizes);
  return work.threads;
}

}  // namespace

Backend Backend::choose(ElementType) {
  const char* name = std::getenv("MPTQC_ISA");
  mptqc_isa isa;
  if (mptqc_choose_isa(name, &isa) != MPTQC_OK) {
    throw std::invalid_argument("MPTQC_ISA is \"" + std::string(name) + "\", which this processor or build lacks");
  }
  return Backend(isa);
}

void Backend::run(const Context& context, const mptqc_layer_norm& arguments) const {
  run_tasks(context, isa_, arguments, mptqc_layer_norm_tasks(&arguments), mptqc_layer_norm_run);
}

void Backend::run(const Context& context, const mptqc_layer_norm_add& arguments) const {
  run_tasks(context, isa_, arguments, mptqc_layer_norm_add_tasks(&arguments), mptqc_layer_norm_add_run);
}

void Backend::run(const Context& context, mptqc_linear arguments) const {
  arguments.by_rows = threads_ > 1;
  threads_ = run_tasks(context, isa_, arguments, mptqc_linear_tasks(&arguments), mptqc_linear_run);
}

void Backend::run(const Context& context, mptqc_attention arguments) const {
  // Whole heads, where that leaves no thread idle: two or more for each.
  const int64_t heads = arguments.batch * arguments.heads, threads = threads_;
  arguments.by_heads = threads <= 1 || (heads % threads == 0 && heads >= 2 * threads);
  threads_ = run_tasks(context, isa_, arguments, mptqc_attention_tasks(&arguments), mptqc_attention_run);
}

void Backend::run(const Context& context, const mptqc_patches& arguments) const {
  run_tasks(context, isa_, arguments, mptqc_patches_tasks(&arguments), mptqc_patches_run);
}

}  // namespace mptqc::ort
