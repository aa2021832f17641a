// What the tests and tools/gpu_check.py call of the CUDA runtime, for the emulated device: its memory is the processor's,
// a kernel is done when its launch returns, and a stream that is captured keeps what it is given for the graph.
#include <chrono>
#include <utility>

#include "emulator.h"

#define RUNTIME extern "C" MPTQC_EXPORT

namespace {

using Graph = std::vector<std::function<void()>>;
using Clock = std::chrono::steady_clock;

constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2;

}  // namespace

RUNTIME int cudaMalloc(void** memory, size_t bytes) {
  *memory = ::operator new(bytes, std::align_val_t{256}, std::nothrow);
  return *memory == nullptr ? kOutOfMemory : kSuccess;
}

RUNTIME int cudaFree(void* memory) {
  ::operator delete(memory, std::align_val_t{256});
  return kSuccess;
}

RUNTIME int cudaMemcpy(void* to, const void* from, size_t bytes, int) {
  std::memcpy(to, from, bytes);
  return kSuccess;
}

RUNTIME int cudaDeviceSynchronize() { return kSuccess; }

RUNTIME int cudaStreamCreate(void** stream) {
  *stream = new char;
  return kSuccess;
}

RUNTIME int cudaStreamBeginCapture(void*, int) {
  if (mptqc::emulated::recording != nullptr) return kInvalidValue;
  mptqc::emulated::recording = new Graph;
  return kSuccess;
}

RUNTIME int cudaStreamEndCapture(void*, void** graph) {
  *graph = std::exchange(mptqc::emulated::recording, nullptr);
  return *graph == nullptr ? kInvalidValue : kSuccess;
}

RUNTIME int cudaGraphInstantiate(void** executable, void* graph, unsigned long long) {
  *executable = graph;
  return kSuccess;
}

RUNTIME int cudaGraphLaunch(void* executable, void*) {
  for (const auto& kernel : *static_cast<Graph*>(executable)) kernel();
  return kSuccess;
}

RUNTIME int cudaEventCreate(void** event) {
  *event = new Clock::time_point;
  return kSuccess;
}

RUNTIME int cudaEventRecord(void* event, void*) {
  *static_cast<Clock::time_point*>(event) = Clock::now();
  return kSuccess;
}

RUNTIME int cudaEventSynchronize(void*) { return kSuccess; }

RUNTIME int cudaEventElapsedTime(float* milliseconds, void* from, void* to) {
  const auto passed = *static_cast<Clock::time_point*>(to) - *static_cast<Clock::time_point*>(from);
  *milliseconds = std::chrono::duration<float, std::milli>(passed).count();
  return kSuccess;
}
