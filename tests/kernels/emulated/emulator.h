// A CUDA device in plain C++, for the kernels of kernels/cuda: each thread of a block is a fiber, 32 of them a warp, and
// whatever a warp does together happens when all of its lanes have come to it. As unkind as the real one may be: shared
// memory begins as garbage, copies in the background arrive only when they are waited for, threads run in any order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulated_hopper.h"
#include "fibers.h"
#include "launch.h"
#include "mptqc_cuda.h"

#define MPTQC_KERNEL(threads, blocks) void
#define MPTQC_DEVICE inline
#define MPTQC_ROLL
#define MPTQC_GRID_CONSTANT
#define MPTQC_WARPGROUPS 1

namespace mptqc {

inline int thread_index() { return emulated::block->running->index; }
inline int64_t block_index() { return emulated::block->index; }
inline uint8_t* shared_memory() { return emulated::block->shared; }
inline void sync_threads() {
  emulated::meet(emulated::block->meeting, static_cast<int>(emulated::block->fibers.size()));
}

inline void sync_warp() { emulated::meet(emulated::warp().meeting, 32); }

inline int worked_out_anew(int x) { return x; }
inline void wait_for_inputs() {}
inline void let_next_begin() {}

template <int kBytes>
void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulated::require(emulated::block->owns(to, kBytes), "a copy leaves shared memory");
  emulated::require(reinterpret_cast<uintptr_t>(to) % kBytes == 0, "a copy to an address that is not aligned");
  emulated::require(!valid || reinterpret_cast<uintptr_t>(from) % kBytes == 0, "a copy from one that is not aligned");
  emulated::block->running->open.push_back({static_cast<uint8_t*>(to), static_cast<const uint8_t*>(from), kBytes, valid});
}

inline void commit_copies() {
  auto& fiber = *emulated::block->running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int kGroups>
void wait_copies() {
  auto& groups = emulated::block->running->groups;
  while (groups.size() > kGroups) {
    for (const auto& copy : groups.front()) emulated::arrive(copy);
    groups.erase(groups.begin());
  }
}

inline void fetch(const void*) {}

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  emulated::require(emulated::block->owns(row, 16), "a matrix row outside shared memory");
  emulated::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "a matrix row that is not aligned");
  const auto* rows = emulated::share(static_cast<const uint8_t*>(row));
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) std::memcpy(&words[i], rows[8 * i + lane / 4] + 4 * (lane % 4), 4);
}

template <bool kSignedA>
void multiply_add(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint8_t a[4][4], b[2][4];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b[0], &b0, 4);
  std::memcpy(mine.b[1], &b1, 4);
  const Operands* all = emulated::share(mine);
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int word = k % 16 / 4, half = k / 16;
      const uint8_t left = all[row % 8 * 4 + word].a[row / 8 + 2 * half][k % 4];
      const uint8_t right = all[column * 4 + word].b[half][k % 4];
      sums[i] += (kSignedA ? static_cast<int8_t>(left) : static_cast<int>(left)) * right;
    }
  }
}

struct Half {
  uint16_t bits;
};

inline float to_float(Half half) {
  const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  float size = std::ldexp(static_cast<float>(exponent == 0 ? fraction : 1024 + fraction), std::max(exponent, 1) - 25);
  if (exponent == 31) size = fraction == 0 ? INFINITY : NAN;
  return half.bits >> 15 ? -size : size;
}

inline Half to_half(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (!(size < 65520)) return {static_cast<uint16_t>(sign | (std::isnan(x) ? 0x7FFF : 0x7C00))};
  int exponent = -13;
  if (size > 0) std::frexp(size, &exponent);
  exponent = std::max(exponent, -13);  // of the smallest normal number; below it steps stay as they are
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 2048: the next exponent's first
  return {static_cast<uint16_t>(sign | ((exponent + 13) * 1024 + steps))};
}

template <class T>
T exchange(T value, int mask) {
  return emulated::share(value)[thread_index() % 32 ^ mask];
}

inline uint32_t add_codes(uint32_t word, uint32_t total) {
  for (int i = 0; i < 4; ++i) total += word >> (8 * i) & 255;
  return total;
}

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}

inline float power_of_two(float x) { return x < -126 ? 0 : std::exp2(x); }

inline int multiprocessors() { return 4; }
inline int current_device() { return 0; }
inline Answer has_code(const void*) { return Answer::kYes; }

template <class... Parameters>
void run_blocks(void (*kernel)(Parameters...), const Launch& launch, Parameters... parameters) {
  constexpr size_t alignment = 1024;
  emulated::Block block;
  block.fibers = std::vector<emulated::Fiber>(launch.threads);
  block.room.resize(launch.shared_bytes + alignment);
  block.shared = block.room.data() + (alignment - reinterpret_cast<uintptr_t>(block.room.data()) % alignment);
  block.shared_bytes = launch.shared_bytes;
  const std::function<void()> body = [&] { kernel(parameters...); };
  block.body = &body;
  emulated::block = &block;
  for (block.index = 0; block.index < launch.blocks; ++block.index) emulated::run(block, launch.threads);
  emulated::block = nullptr;
}

template <class... Parameters>
mptqc_status launch(const Launch& launch, void (*kernel)(Parameters...), Parameters... parameters) {
  constexpr size_t most = 227 * 1024;
  emulated::require(launch.shared_bytes <= most, "more shared memory than any device has");
  if (emulated::recording != nullptr) {
    emulated::recording->push_back([=] { run_blocks(kernel, launch, parameters...); });
  } else {
    run_blocks(kernel, launch, parameters...);
  }
  return MPTQC_OK;
}

}  // namespace mptqc
