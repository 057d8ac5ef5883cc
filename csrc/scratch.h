// Memory for the time of a call.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace ss {
inline namespace SS_ISA {

// Uninitialised (or zeroed) scratch; `ok()` is false where the machine has no memory left.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n, bool zero = false) {
    const size_t count = size_t(n > 0 ? n : 1);
    data = static_cast<T*>(zero ? std::calloc(count, sizeof(T)) : std::malloc(count * sizeof(T)));
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data != nullptr; }
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace SS_ISA
}  // namespace ss
