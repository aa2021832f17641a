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

// Something that is true of a device or is not, found out once for each.
class DeviceFact {
 public:
  template <class Find>
  bool holds(Find find) {
    constexpr int no = 1, yes = 2;
    const int device = current_device();
    if (device >= kMostDevices) return find();
    if (known_[device] == 0) known_[device] = find() ? yes : no;
    return known_[device] == yes;
  }

 private:
  static constexpr int kMostDevices = 64;
  std::atomic<int> known_[kMostDevices] = {};
};

}  // namespace mptqc
