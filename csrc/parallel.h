// Parallel loops on torch's own thread pool: the pointer to torch_parallel_for is handed over when the library is loaded.
#pragma once
#include <cstdint>

namespace ss {

using RangeFn = void (*)(int64_t begin, int64_t end, void* ctx);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx);
extern ParallelFor g_parallel_for;  // nullptr: serial

// Calls body(begin, end) over disjoint ranges that cover [0, n); ranges of at least `grain` items.
template <class Body>
inline void parallel(int64_t n, int64_t grain, Body&& body) {
  if (n <= 0) return;
  if (!g_parallel_for || n <= grain) {
    body(int64_t{0}, n);
    return;
  }
  g_parallel_for(0, n, grain, [](int64_t b, int64_t e, void* c) { (*static_cast<Body*>(c))(b, e); }, &body);
}

}  // namespace ss
