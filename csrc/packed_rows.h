// Dot products of activations with rows of a packed matrix, and the way threads share rows out.
//
// A decoding step reads every weight once, so the loop is laid out for the memory: a thread walks one contiguous stream
// of weight rows. Measured on a Zen 4: one row at a time 30-34 GB/s on two threads, two or four rows side by side 22-29.
//
// Every output has one summation order, fixed by the number of columns alone: two accumulators of W lanes over the
// columns, added lane by lane, then summed across lanes. Neither the batch nor the threads nor the blocking enter it.
#pragma once
#include <atomic>
#include <thread>

#include "packed_linear.h"
#include "simd.h"

namespace ss {
inline namespace SS_ISA {

// ---- weights to float lanes ----
SS_INLINE F32 load_weight(const float* p) { return F32::load(p); }
SS_INLINE F32 load_weight(const bf16* p) { return F32::load(p); }
SS_INLINE F32 load_weight(const int8_t* p) {
#if defined(SS_ISA_avx512)
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif defined(SS_ISA_avx2)
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#elif defined(SS_ISA_neon)
  int32_t word;
  std::memcpy(&word, p, 4);
  int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
#else
  float lanes[F32::W];
  for (int i = 0; i < F32::W; ++i) lanes[i] = float(p[i]);
  return F32::load(lanes);
#endif
}
SS_INLINE F32 load_weight(const float* p, int64_t n) { return F32::load(p, n); }
SS_INLINE F32 load_weight(const bf16* p, int64_t n) { return F32::load(p, n); }
SS_INLINE F32 load_weight(const int8_t* p, int64_t n) {
  float lanes[F32::W] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = float(p[i]);
  return F32::load(lanes);
}

// A load kept apart from its uses: folded into each of them it would be read as often, and loads are the bottleneck.
SS_INLINE F32 in_register(F32 a) {
#if defined(SS_ISA_avx512) && defined(__GNUC__)
  __asm__("" : "+v"(a.v));
#endif
  return a;
}

SS_INLINE void prefetch(const void* p, int bytes) {
#if defined(SS_ISA_avx512) || defined(SS_ISA_avx2)
  for (int i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(p) + i, _MM_HINT_T0);
#elif defined(__GNUC__)
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
#endif
}

// ---- R weight rows against B activation rows ----
template <class S, int R, int B>
SS_INLINE void dot_block(const ss_packed_matrix& m, int64_t row, const float* x, int64_t x_row, float* y, int64_t y_row,
                         bool ahead = false) {
  constexpr int W = F32::W;
  const int64_t columns = m.columns;
  const S* w = static_cast<const S*>(m.data) + row * columns;
  F32 even[R][B], odd[R][B];
  for (int r = 0; r < R; ++r)
    for (int b = 0; b < B; ++b) even[r][b] = odd[r][b] = F32::zero();
  int64_t k = 0;
  for (; k + 2 * W <= columns; k += 2 * W) {
    // Where much is computed on each weight the processor looks too little ahead by itself: fetch the next rows.
    if (R > 1 && ahead)
      for (int r = 0; r < R; ++r) prefetch(w + (r + R) * columns + k, int(2 * W * sizeof(S)));
    F32 weight[R];
    for (int r = 0; r < R; ++r) weight[r] = load_weight(w + r * columns + k);
    for (int b = 0; b < B; ++b) {
      const F32 a = R > 1 ? in_register(F32::load(x + b * x_row + k)) : F32::load(x + b * x_row + k);
      for (int r = 0; r < R; ++r) even[r][b] = fma(weight[r], a, even[r][b]);
    }
    for (int r = 0; r < R; ++r) weight[r] = load_weight(w + r * columns + k + W);
    for (int b = 0; b < B; ++b) {
      const F32 a = R > 1 ? in_register(F32::load(x + b * x_row + k + W)) : F32::load(x + b * x_row + k + W);
      for (int r = 0; r < R; ++r) odd[r][b] = fma(weight[r], a, odd[r][b]);
    }
  }
  for (; k < columns; k += W) {  // the last, partly filled vectors
    const int64_t n = columns - k < W ? columns - k : W;
    for (int r = 0; r < R; ++r) {
      const F32 weight = load_weight(w + r * columns + k, n);
      for (int b = 0; b < B; ++b) even[r][b] = fma(weight, F32::load(x + b * x_row + k, n), even[r][b]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const float scale = m.scale ? m.scale[row + r] : 1.0f;
    const float bias = m.bias ? m.bias[row + r] : 0.0f;
    for (int b = 0; b < B; ++b) y[b * y_row + row + r] = sum(even[r][b] + odd[r][b]) * scale + bias;
  }
}

// Weight row(s) `row` against the whole batch, four activation rows at a time: as many sums fit the registers, and the
// weights come from the first cache for the next four.
template <class S, int R>
SS_INLINE void dot_batch(const ss_packed_matrix& m, int64_t row, const float* x, int64_t x_row, int64_t batch, float* y,
                         int64_t y_row) {
  int64_t b = 0;
  for (; b + 4 <= batch; b += 4) dot_block<S, R, 4>(m, row, x + b * x_row, x_row, y + b * y_row, y_row, b == 0);
  switch (batch - b) {
    case 1: dot_block<S, R, 1>(m, row, x + b * x_row, x_row, y + b * y_row, y_row); break;
    case 2: dot_block<S, R, 2>(m, row, x + b * x_row, x_row, y + b * y_row, y_row); break;
    case 3: dot_block<S, R, 3>(m, row, x + b * x_row, x_row, y + b * y_row, y_row); break;
    default: break;
  }
}

// Rows [begin, end) against the whole batch: y[b][row].
template <class S>
inline void dot_rows_of(const ss_packed_matrix& m, int64_t begin, int64_t end, const float* x, int64_t x_row, int64_t batch,
                        float* y, int64_t y_row) {
  int64_t row = begin;
#if SS_VECTOR_REGISTERS == 32
  // Two weight rows side by side halve the loads of x, which pays once four rows of x share them.
  if (batch >= 4)
    for (; row + 2 <= end; row += 2) dot_batch<S, 2>(m, row, x, x_row, batch, y, y_row);
#endif
  for (; row < end; ++row) dot_batch<S, 1>(m, row, x, x_row, batch, y, y_row);
}

inline void dot_rows(const ss_packed_matrix& m, int64_t begin, int64_t end, const float* x, int64_t x_row, int64_t batch,
                     float* y, int64_t y_row) {
  if (m.dtype == SS_F32) dot_rows_of<float>(m, begin, end, x, x_row, batch, y, y_row);
  if (m.dtype == SS_BF16) dot_rows_of<bf16>(m, begin, end, x, x_row, batch, y, y_row);
  if (m.dtype == SS_I8) dot_rows_of<int8_t>(m, begin, end, x, x_row, batch, y, y_row);
}

// ---- sharing a phase's items out among threads ----
//
// A thread takes ranges until none is left, then waits for those that others have taken. It waits only for threads that
// are running, so nothing can lock up where a pool starts fewer threads than were asked for, or one after the other.
struct Phase {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};

  // Ranges shrink as the end comes near, so that threads end together; at least `least` items, a multiple of `least`.
  template <class Body>
  void run(int64_t items, int64_t least, int64_t threads, Body&& body) {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < items) {
      const int64_t share = (items - begin) / (2 * threads) / least * least;
      const int64_t size = share > least ? share : least;
      const int64_t end = begin + size < items ? begin + size : items;
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      body(begin, end);
      done.fetch_add(end - begin, std::memory_order_release);
      begin = next.load(std::memory_order_relaxed);
    }
    for (int spins = 0; done.load(std::memory_order_acquire) < items; ++spins) {
      if (spins > 4000) {  // some 50 us: another process may have the core
        std::this_thread::yield();
      } else {
#if defined(SS_ISA_avx512) || defined(SS_ISA_avx2)
        _mm_pause();
#endif
      }
    }
  }
};

}  // namespace SS_ISA
}  // namespace ss
