// A CUDA device in plain C++, for the kernels of kernels/cuda: each thread of a block is a fiber, 32 of them a warp, and
// whatever a warp does together happens when all of its lanes have come to it. As unkind as the real one may be: shared
// memory begins as garbage, copies in the background arrive only when they are waited for, threads run in any order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "launch.h"
#include "mptqc_cuda.h"

#define MPTQC_KERNEL(threads, blocks) void
#define MPTQC_DEVICE inline
#define MPTQC_ROLL
#define MPTQC_GRID_CONSTANT
#define MPTQC_WARPGROUPS 1

namespace mptqc {

struct BoxShape {
  uint64_t size[3], stride[2];
  uint32_t box[3];
};
struct BoxMap {
  const uint8_t* tensor;
  BoxShape shape;
};
struct alignas(8) Barrier {
  uint64_t state;
};

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated CUDA device: %s\n", what);
  std::abort();
}

inline void require(bool holds, const char* what) {
  if (!holds) fail(what);
}

struct Copy {
  uint8_t* to;
  const uint8_t* from;
  int bytes;
  bool valid;
};

// A product of a warpgroup that nothing has waited for: this lane's part of it.
struct Product {
  int32_t (*sums)[4];  // [kTiles][4]
  int tiles;
  uint8_t left[4][4][4];  // of the four lanes of its rows: words of codes
  const uint8_t* rows;
  int row_bytes;
};

// Where several fibers wait for each other.
struct Meeting {
  int arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  static constexpr size_t kSlotBytes = 64;
  Meeting meeting;
  alignas(16) uint8_t slots[2][32][kSlotBytes];  // what each lane brought, for this meeting and the one before
};

// A box on its way to shared memory, which arrives when its barrier is waited for.
struct Box {
  uint8_t* to;
  BoxMap map;
  int64_t first[3];

  int64_t bytes() const { return int64_t{map.shape.box[0]} * map.shape.box[1] * map.shape.box[2]; }
};

// A phase ends once `count` threads have arrived, and all bytes that they expect.
struct BarrierState {
  int count = 1, phase = 0, arrived = 0;
  int64_t awaited = 0;
  std::vector<Box> boxes;
};

struct Fiber {
  static constexpr size_t kStackBytes = 256 * 1024;
  ucontext_t context;  // where it begins; from then on `place` says where it goes on, which costs no system call
  jmp_buf place;
  bool started = false;
  std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
  int index = 0;
  bool done = false;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  bool begun = false;
  std::vector<Product> open_products;
  std::vector<std::vector<Product>> product_groups;
};

struct Block {
  int64_t index = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<uint8_t> room;
  uint8_t* shared = nullptr;
  size_t shared_bytes = 0;
  Meeting meeting;
  Meeting group_meetings[16];  // of every four warps
  std::map<const Barrier*, BarrierState> barriers;
  jmp_buf scheduler;
  Fiber* running = nullptr;
  bool progressed = false;
  const std::function<void()>* body = nullptr;

  bool owns(const void* pointer, size_t bytes) const {
    const auto at = static_cast<const uint8_t*>(pointer);
    return at >= shared && at + bytes <= shared + shared_bytes;
  }
};

inline thread_local Block* block = nullptr;

// What a stream that is captured is to run; null: launches run at once.
inline std::vector<std::function<void()>>* recording = nullptr;

inline void pause() {
  if (_setjmp(block->running->place) == 0) _longjmp(block->scheduler, 1);
}

// Lets a fiber run until it pauses or ends.
inline __attribute__((noinline)) void resume(Fiber& fiber) {
  block->running = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline void meet(Meeting& meeting, int expected) {
  const unsigned mine = meeting.generation;
  block->progressed = true;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  while (meeting.generation == mine) pause();
}

inline Warp& warp() { return block->warps[block->running->index / 32]; }

// What every lane of the warp brings, lane 0's first; valid until this lane shares again.
template <class T>
const T* share(const T& mine) {
  static_assert(sizeof(T) <= Warp::kSlotBytes);
  Warp& shared = warp();
  auto& slots = shared.slots[shared.meeting.generation % 2];
  T* all = reinterpret_cast<T*>(slots);
  std::memcpy(&all[block->running->index % 32], &mine, sizeof mine);
  meet(shared.meeting, 32);
  return all;
}

inline void arrive(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

// Where a product finds a byte of a row of 64 or 128 in shared memory, and a box puts it.
inline uint8_t& exchanged(const uint8_t* straight, int row_bytes) {
  const size_t at = straight - block->shared;
  return block->shared[at ^ (at >> 7 & (row_bytes == 64 ? 3 : 7)) << 4];
}

inline void arrive(const Box& box) {
  const BoxShape& shape = box.map.shape;
  const uint8_t* to = box.to;
  int64_t place[3];
  for (uint32_t z = 0; z < shape.box[2]; ++z) {
    for (uint32_t y = 0; y < shape.box[1]; ++y) {
      for (uint32_t x = 0; x < shape.box[0]; ++x, ++to) {
        const int64_t step[3] = {x, y, z};
        bool inside = true;
        for (int axis = 0; axis < 3; ++axis) {
          place[axis] = box.first[axis] + step[axis];
          inside = inside && place[axis] >= 0 && place[axis] < static_cast<int64_t>(shape.size[axis]);
        }
        const int64_t offset = place[0] + place[1] * shape.stride[0] + place[2] * shape.stride[1];
        exchanged(to, shape.box[0]) = inside ? box.map.tensor[offset] : 0;
      }
    }
  }
}

inline void enter() {
  Block& mine = *block;
  (*mine.body)();
  mine.running->done = true;
  mine.progressed = true;
  pause();
}

// Runs all fibers to their end, in an order that changes from round to round.
inline void run(Block& shared, int threads) {
  constexpr uint8_t garbage = 0xA5;
  std::memset(shared.shared, garbage, shared.shared_bytes);
  shared.warps = std::vector<Warp>((threads + 31) / 32);
  shared.meeting = {};
  for (auto& meeting : shared.group_meetings) meeting = {};
  shared.barriers.clear();
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = shared.fibers[i];
    fiber.index = i;
    fiber.done = false;
    fiber.open.clear();
    fiber.groups.clear();
    fiber.begun = false;
    fiber.open_products.clear();
    fiber.product_groups.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.started = false;
    makecontext(&fiber.context, enter, 0);
  }
  for (int round = 0, left = threads; left > 0; ++round) {
    shared.progressed = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = shared.fibers[(round % 2 == 0 ? i : threads - 1 - i)];
      if (fiber.done) continue;
      resume(fiber);
      if (fiber.done) --left;
    }
    require(shared.progressed || left == 0, "threads wait for each other for ever");
  }
}

}  // namespace emulated

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
