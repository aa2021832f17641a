// What Hopper adds to an emulated device: boxes that a copy engine brings, barriers, products of four warps.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "fibers.h"
#include "mptqc_cuda.h"

namespace mptqc {

template <int kThreads>
void sync_all() {
  emulated::meet(emulated::block->group_meetings[15], kThreads);
}

template <int kGroups>
void sync_group(int group) {
  emulated::meet(emulated::block->group_meetings[group], 128);
}

inline mptqc_status map_box(BoxMap* map, const void* tensor, const BoxShape& shape) {
  emulated::require(reinterpret_cast<uintptr_t>(tensor) % 16 == 0, "a boxed tensor that is not aligned");
  emulated::require(shape.stride[0] % 16 == 0 && shape.stride[1] % 16 == 0, "strides of a boxed tensor");
  emulated::require((shape.box[0] == 64 || shape.box[0] == 128) && shape.box[1] <= 256 && shape.box[2] <= 256, "the size of a box");
  for (const auto size : shape.size) emulated::require(size > 0, "an empty boxed tensor");
  *map = {static_cast<const uint8_t*>(tensor), shape};
  return MPTQC_OK;
}

inline void begin_barrier(Barrier* barrier, int count) {
  emulated::require(emulated::block->owns(barrier, sizeof *barrier), "a barrier outside shared memory");
  emulated::block->barriers[barrier] = {};
  emulated::block->barriers[barrier].count = count;
}

inline emulated::BarrierState& state_of(Barrier* barrier) {
  const auto found = emulated::block->barriers.find(barrier);
  emulated::require(found != emulated::block->barriers.end(), "a barrier that was not begun");
  return found->second;
}

inline void expect_bytes(Barrier* barrier, int bytes) {
  auto& state = state_of(barrier);
  emulated::require(state.arrived < state.count, "more arrivals than a barrier counts");
  ++state.arrived;
  state.awaited += bytes;
  emulated::block->progressed = true;
}
inline void arrive(Barrier* barrier) { expect_bytes(barrier, 0); }

inline void copy_box(uint8_t* to, const BoxMap& map, int x, int y, int z, Barrier* barrier) {
  const emulated::Box box = {to, map, {x, y, z}};
  emulated::require(emulated::block->owns(to, box.bytes()), "a box leaves shared memory");
  emulated::require((to - emulated::block->shared) % 1024 == 0, "a box to an address that is not aligned");
  auto& state = state_of(barrier);
  state.boxes.push_back(box);
  if (state.phase % 2 != 0) emulated::arrive(box);
}

// Boxes arrive when they are waited for, those of every other phase at once: as late and as early as they may. A phase whose
// bytes do not come is waited for for ever.
inline void wait_for_phase(Barrier* barrier, int phase) {
  while (true) {
    auto& state = state_of(barrier);
    emulated::require(phase + 1 >= state.phase, "a phase that has been followed by another one");
    if (state.phase > phase) return;
    int64_t under_way = 0;
    for (const auto& box : state.boxes) under_way += box.bytes();
    emulated::require(state.arrived < state.count || under_way <= state.awaited, "more bytes than a barrier expects");
    if (state.arrived == state.count && under_way == state.awaited) {
      for (const auto& box : state.boxes) emulated::arrive(box);
      state = {state.count, state.phase + 1, 0, 0, {}};
      emulated::block->progressed = true;
      return;
    }
    emulated::pause();
  }
}

template <int kCount>
void take_registers() {}
template <int kCount>
void leave_registers() {}

inline void begin_products() { emulated::block->running->begun = true; }

inline void commit_products() {
  auto& fiber = *emulated::block->running;
  fiber.product_groups.push_back(std::move(fiber.open_products));
  fiber.open_products.clear();
  fiber.begun = false;
}

// Products read and write when they are waited for, not before.
template <int kGroups>
void wait_products() {
  auto& groups = emulated::block->running->product_groups;
  const int lane = emulated::block->running->index % 32;
  for (; groups.size() > kGroups; groups.erase(groups.begin())) {
    for (const auto& product : groups.front()) {
      for (int t = 0; t < product.tiles; ++t) {
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * t + 2 * (lane % 4) + i % 2;
          for (int k = 0; k < 32; ++k) {
            const auto left = static_cast<int8_t>(product.left[k % 16 / 4][i / 2 + k / 16 * 2][k % 4]);
            product.sums[t][i] += left * emulated::exchanged(product.rows + column * product.row_bytes + k, product.row_bytes);
          }
        }
      }
    }
  }
}

template <int kTiles>
void hold(int32_t (&)[kTiles][4]) {
  emulated::require(emulated::block->running->product_groups.empty(), "sums of products that are under way");
}

template <int kRowBytes, int kTiles>
void multiply_rows(int32_t (&sums)[kTiles][4], const uint32_t (&a)[4], const uint8_t* rows) {
  auto& fiber = *emulated::block->running;
  emulated::require(fiber.begun, "products that were not begun");
  emulated::require(reinterpret_cast<uintptr_t>(rows) % 16 == 0, "rows that are not aligned");
  emulated::require(emulated::block->owns(rows, kTiles * 8 * kRowBytes - (kRowBytes - 32)), "rows outside shared memory");
  emulated::Product product = {sums, kTiles, {}, rows, kRowBytes};
  struct Words {
    uint32_t word[4];
  } mine;
  std::memcpy(&mine, a, sizeof mine);
  const Words* all = emulated::share(mine);
  const int lane = fiber.index % 32;
  for (int quad = 0; quad < 4; ++quad) std::memcpy(product.left[quad], &all[lane / 4 * 4 + quad], 16);
  fiber.open_products.push_back(product);
}

}  // namespace mptqc
