// A tile of a matrix product in registers: four rows of the one factor, up to kVectors vectors of columns of the other.
#pragma once
#include <cstdint>

#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#define SS_UNROLL _Pragma("GCC unroll 8")
#elif defined(__clang__)
#define SS_UNROLL _Pragma("unroll")
#else
#define SS_UNROLL
#endif

namespace ss {
inline namespace SS_ISA {

constexpr int kRows = 4;
constexpr int kVectors = SS_VECTOR_REGISTERS == 32 ? 4 : 2;

// c = a b, or c += a b: kRows rows of a, `depth` long and lda apart; b depth x (N vectors), ldb apart; c rows ldc apart.
template <class V, int N, class T = typename V::scalar>
SS_INLINE void tile(const T* SS_RESTRICT a, int64_t lda, const T* SS_RESTRICT b, int64_t ldb, int64_t depth,
                    T* SS_RESTRICT c, int64_t ldc, bool add) {
  V sum[kRows][N];
  SS_UNROLL
  for (int i = 0; i < kRows; ++i)
    SS_UNROLL
    for (int v = 0; v < N; ++v) sum[i][v] = V::zero();
  for (int64_t k = 0; k < depth; ++k) {
    V row[N];
    SS_UNROLL
    for (int v = 0; v < N; ++v) row[v] = V::load(b + k * ldb + v * V::W);
    SS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const V x = V::set(a[i * lda + k]);
      SS_UNROLL
      for (int v = 0; v < N; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
  }
  SS_UNROLL
  for (int i = 0; i < kRows; ++i)
    SS_UNROLL
    for (int v = 0; v < N; ++v) {
      T* to = c + i * ldc + v * V::W;
      (add ? V::load(to) + sum[i][v] : sum[i][v]).store(to);
    }
}

}  // namespace SS_ISA
}  // namespace ss
