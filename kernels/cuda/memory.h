// Memory of the current CUDA device for what an operator keeps between runs; only touched while sessions are made.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <utility>
#include <vector>

namespace mptqc {

// Null if there is none left.
void* allocate_device_memory(size_t bytes);
void free_device_memory(void* memory);

// Copies between any two memories, and waits until it is done; false if that failed.
bool copy_memory(void* to, const void* from, size_t bytes);

template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;

  explicit DeviceArray(const std::vector<T>& content) : size_(content.size()) {
    if (content.empty()) return;
    const size_t bytes = sizeof(T) * content.size();
    data_ = static_cast<T*>(allocate_device_memory(bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (!copy_memory(data_, content.data(), bytes)) {
      free_device_memory(data_);
      throw std::runtime_error("constants cannot be copied to the CUDA device");
    }
  }

  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceArray() { free_device_memory(data_); }

  const T* data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace mptqc
