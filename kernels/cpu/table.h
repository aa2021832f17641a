// Sixteen values that lanes look up by the low 4 bits of an index.
#pragma once

namespace mptqc {
namespace {

// For Lanes types that look values up where they are.
struct TableInPlace {
  const float* entry = nullptr;

  TableInPlace() = default;
  explicit TableInPlace(const float (&entries)[16]) : entry(entries) {}
};

}  // namespace
}  // namespace mptqc
