// Memory of the calling thread that outlives a task, so that no task allocates once the largest has run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mptqc {

// At least `bytes` bytes on a cache line, of unspecified content, valid until this thread asks again; null if there is
// no memory left.
uint8_t* thread_scratch(size_t bytes);

}  // namespace mptqc
