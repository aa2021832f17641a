#include "scratch.h"

#include <new>

namespace mptqc {
namespace {

constexpr std::align_val_t kCacheLine{64};

struct Buffer {
  uint8_t* data = nullptr;
  size_t bytes = 0;

  ~Buffer() { ::operator delete(data, kCacheLine); }
};

}  // namespace

uint8_t* thread_scratch(size_t bytes) {
  thread_local Buffer buffer;
  if (bytes <= buffer.bytes) return buffer.data;
  ::operator delete(buffer.data, kCacheLine);
  buffer.data = static_cast<uint8_t*>(::operator new(bytes, kCacheLine, std::nothrow));
  buffer.bytes = buffer.data == nullptr ? 0 : bytes;
  return buffer.data;
}

}  // namespace mptqc
