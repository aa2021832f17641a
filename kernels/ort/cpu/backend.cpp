#include "backend.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <string>
#include <thread>

namespace mptqc::ort {
namespace {

// Runs all tasks of an operator on the session's threads. Returns whether others than this one took part.
template <class Arguments>
bool run_tasks(const Context& context, mptqc_isa isa, const Arguments& arguments, int64_t tasks,
               mptqc_status (*run_task)(mptqc_isa, const Arguments*, int64_t)) {
  struct Work {
    mptqc_isa isa;
    const Arguments& arguments;
    mptqc_status (*run_task)(mptqc_isa, const Arguments*, int64_t);
    const std::thread::id caller;
    std::atomic<int> worst;
    std::atomic<bool> has_others;
  } work{isa, arguments, run_task, std::this_thread::get_id(), {MPTQC_OK}, {false}};
  const auto run_one = [](void* user, size_t task) {
    Work& shared = *static_cast<Work*>(user);
    const mptqc_status status = shared.run_task(shared.isa, &shared.arguments, static_cast<int64_t>(task));
    if (status != MPTQC_OK) shared.worst = status;
    if (std::this_thread::get_id() != shared.caller) shared.has_others = true;
  };
  context.parallel_for(run_one, static_cast<size_t>(tasks), &work);
  if (work.worst == MPTQC_OUT_OF_MEMORY) throw std::bad_alloc();
  require(work.worst == MPTQC_OK, kRefusedSizes);
  return work.has_others;
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
  arguments.by_rows = has_others_;
  has_others_ = run_tasks(context, isa_, arguments, mptqc_linear_tasks(&arguments), mptqc_linear_run);
}

void Backend::run(const Context& context, mptqc_attention arguments) const {
  arguments.by_heads = !has_others_;
  has_others_ = run_tasks(context, isa_, arguments, mptqc_attention_tasks(&arguments), mptqc_attention_run);
}

void Backend::run(const Context& context, const mptqc_patches& arguments) const {
  run_tasks(context, isa_, arguments, mptqc_patches_tasks(&arguments), mptqc_patches_run);
}

}  // namespace mptqc::ort
