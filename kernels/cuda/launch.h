// How a kernel is run, and where.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace mptqc {

// Blocks 0 to blocks - 1 of so many threads each, with so much shared memory.
struct Launch {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  void* stream;
};

int current_device();

enum class Answer { kUnknown, kNo, kYes };

// Something that is true of a device or is not, found out once for each; until that succeeds it counts as not true.
class DeviceFact {
 public:
  template <class Find>
  bool holds(Find find) {
    const int device = current_device();
    if (device >= kMostDevices) return find() == Answer::kYes;
    if (known_[device] == Answer::kUnknown) known_[device] = find();
    return known_[device] == Answer::kYes;
  }

 private:
  static constexpr int kMostDevices = 64;
  std::atomic<Answer> known_[kMostDevices] = {};
};

}  // namespace mptqc
