#include "implement.h"
#include "lanes_portable.h"

namespace mptqc {
const Implementation kPortable = Kernels<LanesPortable>::table();
}
