// The threads of an emulated device: fibers that run in any order until they wait, and what they wait for.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

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

}  // namespace mptqc
