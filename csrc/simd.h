// One vector type per precision, the same names on every instruction set: F32 (lanes of float) and F64 (lanes of double).
//
// A kernel file is compiled once per instruction set (SS_ISA_avx512, SS_ISA_avx2, SS_ISA_neon, else portable C++), so
// everything here lives in an inline namespace named after it: nothing of one build can be linked into another.
//
//   F32::W                      lanes
//   F32::load(p[, n])           from float, bf16 or f16; with n < W only n elements are touched, the other lanes are 0
//   v.store(p[, n])             to float, bf16 or f16 (round to nearest even)
//   F32::set(x), F32::zero()    + - * /   fma(a,b,c) = a*b+c   fnma(a,b,c) = c-a*b   max min abs   select_lt(a,b,x,y)
//   sum(v)                      horizontal, in a fixed order
//   exp_decay(x)                the scan's exponential: 2^x in float, e^x in double; in range only (see DecayRange)
//   exp(x) softplus(x) softplus_slope(x) sigmoid(x) silu(x)   any argument, inf and nan included
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(SS_ISA_avx512) || defined(SS_ISA_avx2)
#include <immintrin.h>
#elif defined(SS_ISA_neon)
#include <arm_neon.h>
#endif
#if defined(_MSC_VER)
#define SS_INLINE __forceinline
#define SS_RESTRICT __restrict
#define SS_NOINLINE __declspec(noinline)
#else
#define SS_INLINE inline __attribute__((always_inline))
#define SS_RESTRICT __restrict__
#define SS_NOINLINE __attribute__((noinline))
#endif

#include "statescan.h"

namespace ss {
inline namespace SS_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// ---- scalar conversions ----
SS_INLINE float to_float(float x) { return x; }
SS_INLINE float to_float(bf16 x) {
  uint32_t b = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
SS_INLINE float to_float(f16 x) {
#if defined(SS_ISA_avx512) || defined(SS_ISA_avx2)
  return _cvtsh_ss(x.bits);
#else
  // Exponent and mantissa shifted into place, times 2^112: exact for normal and subnormal numbers.
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 5.192296858534828e33f;
  uint32_t b;
  std::memcpy(&b, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) b = 0x7f800000u | (uint32_t(x.bits & 0x3ff) << 13);
  b |= sign;
  std::memcpy(&f, &b, 4);
  return f;
#endif
}
SS_INLINE void from_float(float x, float* p) { *p = x; }
SS_INLINE void from_float(float x, bf16* p) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  p->bits = (b & 0x7fffffffu) > 0x7f800000u ? uint16_t(b >> 16 | 0x40) : uint16_t((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}
SS_INLINE void from_float(float x, f16* p) {
#if defined(SS_ISA_avx512) || defined(SS_ISA_avx2)
  p->bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t b;
  std::memcpy(&b, &x, 4);
  uint32_t sign = b >> 16 & 0x8000u;
  b &= 0x7fffffffu;
  uint32_t h;
  if (b > 0x7f800000u) {
    h = 0x7e00u;
  } else if (b >= 0x47800000u) {
    h = 0x7c00u;
  } else if (b < 0x38800000u) {  // subnormal or zero: the addition rounds at the right bit
    float f;
    std::memcpy(&f, &b, 4);
    f += 0.5f;
    std::memcpy(&h, &f, 4);
    h -= 0x3f000000u;
  } else {
    h = (b - 0x38000000u + 0xfffu + (b >> 13 & 1)) >> 13;
  }
  p->bits = uint16_t(h | sign);
#endif
}

// ---- the vector types ----
#if defined(SS_ISA_avx512)

#define SS_VECTOR_REGISTERS 32
struct F32 {
  using scalar = float;
  static constexpr int W = 16;
  __m512 v;
  static SS_INLINE F32 set(float x) { return {_mm512_set1_ps(x)}; }
  static SS_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
  static SS_INLINE __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1); }
  static SS_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SS_INLINE F32 load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static SS_INLINE F32 widen(__m256i x, bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
  static SS_INLINE F32 widen(__m256i x, f16) { return {_mm512_cvtph_ps(x)}; }
  template <class S> static SS_INLINE F32 load(const S* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), S());
  }
  template <class S> static SS_INLINE F32 load(const S* p, int64_t n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), S());
  }
  SS_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  SS_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  SS_INLINE __m256i narrow(bf16) const {
    __m512i b = _mm512_castps_si512(v);
    __m512i lsb = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(b, _mm512_add_epi32(lsb, _mm512_set1_epi32(0x7fff))), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
  }
  SS_INLINE __m256i narrow(f16) const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  template <class S> SS_INLINE void store(S* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(S())); }
  template <class S> SS_INLINE void store(S* p, int64_t n) const { _mm256_mask_storeu_epi16(p, first(n), narrow(S())); }
};
SS_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
SS_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SS_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SS_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
SS_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
SS_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
SS_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
SS_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
SS_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
SS_INLINE F32 select_lt(F32 a, F32 b, F32 x, F32 y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
SS_INLINE bool all_lt(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ) == 0xffff; }
SS_INLINE float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
template <int K> SS_INLINE F32 shift_left_bits(F32 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a.v), K))}; }
SS_INLINE F32 add_bits(F32 a, F32 b) {
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}

struct F64 {
  using scalar = double;
  static constexpr int W = 8;
  __m512d v;
  static SS_INLINE F64 set(double x) { return {_mm512_set1_pd(x)}; }
  static SS_INLINE F64 zero() { return {_mm512_setzero_pd()}; }
  static SS_INLINE __mmask8 first(int64_t n) { return __mmask8((1u << n) - 1); }
  static SS_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static SS_INLINE F64 load(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first(n), p)}; }
  SS_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  SS_INLINE void store(double* p, int64_t n) const { _mm512_mask_storeu_pd(p, first(n), v); }
};
SS_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
SS_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
SS_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
SS_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
SS_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
SS_INLINE F64 fnma(F64 a, F64 b, F64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
SS_INLINE F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
SS_INLINE F64 min(F64 a, F64 b) { return {_mm512_min_pd(a.v, b.v)}; }
SS_INLINE F64 abs(F64 a) { return {_mm512_abs_pd(a.v)}; }
SS_INLINE F64 select_lt(F64 a, F64 b, F64 x, F64 y) {
  return {_mm512_mask_mov_pd(y.v, _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}
SS_INLINE bool all_lt(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ) == 0xff; }
SS_INLINE double sum(F64 a) { return _mm512_reduce_add_pd(a.v); }
template <int K> SS_INLINE F64 shift_left_bits(F64 a) { return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(a.v), K))}; }
SS_INLINE F64 add_bits(F64 a, F64 b) {
  return {_mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(a.v), _mm512_castpd_si512(b.v)))};
}

#else  // ---- avx2, neon, generic: partial loads and stores go through a small buffer ----

#if defined(SS_ISA_avx2)

#define SS_VECTOR_REGISTERS 16
#define SS_F32_REG __m256
#define SS_F64_REG __m256d
#define SS_W32 8
#define SS_W64 4
#elif defined(SS_ISA_neon)
#define SS_VECTOR_REGISTERS 32
#define SS_F32_REG float32x4_t
#define SS_F64_REG float64x2_t
#define SS_W32 4
#define SS_W64 2
#else
#define SS_VECTOR_REGISTERS 16
struct Lanes32 {
  float a[4];
};
struct Lanes64 {
  double a[2];
};
#define SS_F32_REG Lanes32
#define SS_F64_REG Lanes64
#define SS_W32 4
#define SS_W64 2
#endif

struct F32 {
  using scalar = float;
  static constexpr int W = SS_W32;
  SS_F32_REG v;
  static SS_INLINE F32 set(float x);
  static SS_INLINE F32 zero() { return set(0.0f); }
  static SS_INLINE F32 load(const float* p);
  static SS_INLINE F32 load(const bf16* p);
  static SS_INLINE F32 load(const f16* p);
  template <class S> static SS_INLINE F32 load(const S* p, int64_t n) {
    if (n >= W) return load(p);
    float part[W] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = to_float(p[i]);
    return load(part);
  }
  SS_INLINE void store(float* p) const;
#if defined(SS_ISA_avx2)
  SS_INLINE void store(bf16* p) const;
  SS_INLINE void store(f16* p) const;
#endif
  template <class S> SS_INLINE void store(S* p) const {
    float all[W];
    store(all);
    for (int i = 0; i < W; ++i) from_float(all[i], p + i);
  }
  template <class S> SS_INLINE void store(S* p, int64_t n) const {
    if (n >= W) return store(p);
    float all[W];
    store(all);
    for (int64_t i = 0; i < n; ++i) from_float(all[i], p + i);
  }
};
struct F64 {
  using scalar = double;
  static constexpr int W = SS_W64;
  SS_F64_REG v;
  static SS_INLINE F64 set(double x);
  static SS_INLINE F64 zero() { return set(0.0); }
  static SS_INLINE F64 load(const double* p);
  static SS_INLINE F64 load(const double* p, int64_t n) {
    if (n >= W) return load(p);
    double part[W] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
  }
  SS_INLINE void store(double* p) const;
  SS_INLINE void store(double* p, int64_t n) const {
    if (n >= W) return store(p);
    double all[W];
    store(all);
    for (int64_t i = 0; i < n; ++i) p[i] = all[i];
  }
};

#if defined(SS_ISA_avx2)
SS_INLINE F32 F32::set(float x) { return {_mm256_set1_ps(x)}; }
SS_INLINE F32 F32::load(const float* p) { return {_mm256_loadu_ps(p)}; }
SS_INLINE F32 F32::load(const bf16* p) {
  __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
}
SS_INLINE F32 F32::load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
SS_INLINE void F32::store(float* p) const { _mm256_storeu_ps(p, v); }
SS_INLINE void F32::store(bf16* p) const {
  __m256i b = _mm256_castps_si256(v);
  __m256i lsb = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(b, _mm256_add_epi32(lsb, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
SS_INLINE void F32::store(f16* p) const {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
SS_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
SS_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
SS_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
SS_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
SS_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
SS_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
SS_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
SS_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
SS_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
SS_INLINE F32 select_lt(F32 a, F32 b, F32 x, F32 y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
SS_INLINE bool all_lt(F32 a, F32 b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)) == 0xff; }
SS_INLINE float sum(F32 a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
template <int K> SS_INLINE F32 shift_left_bits(F32 a) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.v), K))}; }
SS_INLINE F32 add_bits(F32 a, F32 b) {
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)))};
}
SS_INLINE F64 F64::set(double x) { return {_mm256_set1_pd(x)}; }
SS_INLINE F64 F64::load(const double* p) { return {_mm256_loadu_pd(p)}; }
SS_INLINE void F64::store(double* p) const { _mm256_storeu_pd(p, v); }
SS_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
SS_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
SS_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
SS_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
SS_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
SS_INLINE F64 fnma(F64 a, F64 b, F64 c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
SS_INLINE F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
SS_INLINE F64 min(F64 a, F64 b) { return {_mm256_min_pd(a.v, b.v)}; }
SS_INLINE F64 abs(F64 a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
SS_INLINE F64 select_lt(F64 a, F64 b, F64 x, F64 y) {
  return {_mm256_blendv_pd(y.v, x.v, _mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ))};
}
SS_INLINE bool all_lt(F64 a, F64 b) { return _mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)) == 0xf; }
SS_INLINE double sum(F64 a) {
  __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
template <int K> SS_INLINE F64 shift_left_bits(F64 a) { return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(a.v), K))}; }
SS_INLINE F64 add_bits(F64 a, F64 b) {
  return {_mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a.v), _mm256_castpd_si256(b.v)))};
}
#elif defined(SS_ISA_neon)
SS_INLINE F32 F32::set(float x) { return {vdupq_n_f32(x)}; }
SS_INLINE F32 F32::load(const float* p) { return {vld1q_f32(p)}; }
SS_INLINE F32 F32::load(const bf16* p) {
  uint16x4_t x = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(x, 16))};
}
SS_INLINE F32 F32::load(const f16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
SS_INLINE void F32::store(float* p) const { vst1q_f32(p, v); }
SS_INLINE F32 operator+(F32 a, F32 b) { return {vaddq_f32(a.v, b.v)}; }
SS_INLINE F32 operator-(F32 a, F32 b) { return {vsubq_f32(a.v, b.v)}; }
SS_INLINE F32 operator*(F32 a, F32 b) { return {vmulq_f32(a.v, b.v)}; }
SS_INLINE F32 operator/(F32 a, F32 b) { return {vdivq_f32(a.v, b.v)}; }
SS_INLINE F32 fma(F32 a, F32 b, F32 c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
SS_INLINE F32 fnma(F32 a, F32 b, F32 c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
SS_INLINE F32 max(F32 a, F32 b) { return {vmaxq_f32(a.v, b.v)}; }
SS_INLINE F32 min(F32 a, F32 b) { return {vminq_f32(a.v, b.v)}; }
SS_INLINE F32 abs(F32 a) { return {vabsq_f32(a.v)}; }
SS_INLINE F32 select_lt(F32 a, F32 b, F32 x, F32 y) { return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)}; }
SS_INLINE bool all_lt(F32 a, F32 b) { return vminvq_u32(vcltq_f32(a.v, b.v)) != 0; }
SS_INLINE float sum(F32 a) { return vaddvq_f32(a.v); }
template <int K> SS_INLINE F32 shift_left_bits(F32 a) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(a.v), K))};
}
SS_INLINE F32 add_bits(F32 a, F32 b) {
  return {vreinterpretq_f32_u32(vaddq_u32(vreinterpretq_u32_f32(a.v), vreinterpretq_u32_f32(b.v)))};
}
SS_INLINE F64 F64::set(double x) { return {vdupq_n_f64(x)}; }
SS_INLINE F64 F64::load(const double* p) { return {vld1q_f64(p)}; }
SS_INLINE void F64::store(double* p) const { vst1q_f64(p, v); }
SS_INLINE F64 operator+(F64 a, F64 b) { return {vaddq_f64(a.v, b.v)}; }
SS_INLINE F64 operator-(F64 a, F64 b) { return {vsubq_f64(a.v, b.v)}; }
SS_INLINE F64 operator*(F64 a, F64 b) { return {vmulq_f64(a.v, b.v)}; }
SS_INLINE F64 operator/(F64 a, F64 b) { return {vdivq_f64(a.v, b.v)}; }
SS_INLINE F64 fma(F64 a, F64 b, F64 c) { return {vfmaq_f64(c.v, a.v, b.v)}; }
SS_INLINE F64 fnma(F64 a, F64 b, F64 c) { return {vfmsq_f64(c.v, a.v, b.v)}; }
SS_INLINE F64 max(F64 a, F64 b) { return {vmaxq_f64(a.v, b.v)}; }
SS_INLINE F64 min(F64 a, F64 b) { return {vminq_f64(a.v, b.v)}; }
SS_INLINE F64 abs(F64 a) { return {vabsq_f64(a.v)}; }
SS_INLINE F64 select_lt(F64 a, F64 b, F64 x, F64 y) { return {vbslq_f64(vcltq_f64(a.v, b.v), x.v, y.v)}; }
SS_INLINE bool all_lt(F64 a, F64 b) {
  uint64x2_t m = vcltq_f64(a.v, b.v);
  return (vgetq_lane_u64(m, 0) & vgetq_lane_u64(m, 1)) != 0;
}
SS_INLINE double sum(F64 a) { return vaddvq_f64(a.v); }
template <int K> SS_INLINE F64 shift_left_bits(F64 a) {
  return {vreinterpretq_f64_u64(vshlq_n_u64(vreinterpretq_u64_f64(a.v), K))};
}
SS_INLINE F64 add_bits(F64 a, F64 b) {
  return {vreinterpretq_f64_u64(vaddq_u64(vreinterpretq_u64_f64(a.v), vreinterpretq_u64_f64(b.v)))};
}
#else
// Portable: short arrays that any compiler keeps in whatever vectors its baseline has. No fma: in software it would crawl.
#define SS_EACH(V, expression)                      \
  V r;                                              \
  for (int i = 0; i < V::W; ++i) r.v.a[i] = expression; \
  return r;
#define SS_GENERIC_OPS(V, T, U)                                                                                  \
  SS_INLINE V V::set(T x) { SS_EACH(V, x) }                                                                      \
  SS_INLINE V V::load(const T* p) { SS_EACH(V, p[i]) }                                                           \
  SS_INLINE void V::store(T* p) const {                                                                          \
    for (int i = 0; i < W; ++i) p[i] = v.a[i];                                                                   \
  }                                                                                                              \
  SS_INLINE V operator+(V a, V b) { SS_EACH(V, a.v.a[i] + b.v.a[i]) }                                            \
  SS_INLINE V operator-(V a, V b) { SS_EACH(V, a.v.a[i] - b.v.a[i]) }                                            \
  SS_INLINE V operator*(V a, V b) { SS_EACH(V, a.v.a[i] * b.v.a[i]) }                                            \
  SS_INLINE V operator/(V a, V b) { SS_EACH(V, a.v.a[i] / b.v.a[i]) }                                            \
  SS_INLINE V fma(V a, V b, V c) { SS_EACH(V, a.v.a[i] * b.v.a[i] + c.v.a[i]) }                                  \
  SS_INLINE V fnma(V a, V b, V c) { SS_EACH(V, c.v.a[i] - a.v.a[i] * b.v.a[i]) }                                 \
  SS_INLINE V max(V a, V b) { SS_EACH(V, a.v.a[i] > b.v.a[i] ? a.v.a[i] : b.v.a[i]) }                            \
  SS_INLINE V min(V a, V b) { SS_EACH(V, a.v.a[i] < b.v.a[i] ? a.v.a[i] : b.v.a[i]) }                            \
  SS_INLINE V abs(V a) { SS_EACH(V, std::fabs(a.v.a[i])) }                                                       \
  SS_INLINE V select_lt(V a, V b, V x, V y) { SS_EACH(V, a.v.a[i] < b.v.a[i] ? x.v.a[i] : y.v.a[i]) }            \
  SS_INLINE bool all_lt(V a, V b) {                                                                              \
    bool all = true;                                                                                             \
    for (int i = 0; i < V::W; ++i) all = all && a.v.a[i] < b.v.a[i];                                             \
    return all;                                                                                                  \
  }                                                                                                              \
  SS_INLINE T sum(V a) {                                                                                         \
    T s = 0;                                                                                                     \
    for (int i = 0; i < V::W; ++i) s += a.v.a[i];                                                                \
    return s;                                                                                                    \
  }                                                                                                              \
  template <int K> SS_INLINE V shift_left_bits(V a) {                                                            \
    U b[V::W];                                                                                                   \
    std::memcpy(b, a.v.a, sizeof b);                                                                             \
    for (int i = 0; i < V::W; ++i) b[i] <<= K;                                                                   \
    std::memcpy(a.v.a, b, sizeof b);                                                                             \
    return a;                                                                                                    \
  }                                                                                                              \
  SS_INLINE V add_bits(V x, V y) {                                                                               \
    U a[V::W], b[V::W];                                                                                          \
    std::memcpy(a, x.v.a, sizeof a);                                                                             \
    std::memcpy(b, y.v.a, sizeof b);                                                                             \
    for (int i = 0; i < V::W; ++i) a[i] += b[i];                                                                 \
    std::memcpy(x.v.a, a, sizeof a);                                                                             \
    return x;                                                                                                    \
  }
SS_GENERIC_OPS(F32, float, uint32_t)
SS_GENERIC_OPS(F64, double, uint64_t)
SS_INLINE F32 F32::load(const bf16* p) { SS_EACH(F32, to_float(p[i])) }
SS_INLINE F32 F32::load(const f16* p) { SS_EACH(F32, to_float(p[i])) }
#undef SS_GENERIC_OPS
#undef SS_EACH
#endif
#endif  // not avx512

// The vector type of a scalar type.
template <class T> struct VectorOf;
template <> struct VectorOf<float> { using type = F32; };
template <> struct VectorOf<double> { using type = F64; };
template <class T> using Vec = typename VectorOf<T>::type;

// The whole of a vector, or its first n lanes: for loops over rows that are written once for both.
template <class T, bool Whole, class S> SS_INLINE Vec<T> load(const S* p, int64_t n) {
  return Whole ? Vec<T>::load(p) : Vec<T>::load(p, n);
}
template <bool Whole, class S, class V> SS_INLINE void store(S* p, V v, int64_t n) { Whole ? v.store(p) : v.store(p, n); }

// Horner's rule, lowest coefficient first.
template <class V> SS_INLINE V polynomial(V, typename V::scalar c) { return V::set(c); }
template <class V, class... Rest> SS_INLINE V polynomial(V x, typename V::scalar c, Rest... rest) {
  return fma(polynomial(x, rest...), x, V::set(c));
}

// ---- exponentials ----
// Arguments for which exp_decay is right; outside, use exp_decay_any. The scale is what A is multiplied by beforehand.
template <class V> struct DecayRange;
template <> struct DecayRange<F32> {
  static constexpr float low = -126.0f, high = 127.5f, scale = 1.4426950408889634f;
};
template <> struct DecayRange<F64> {
  static constexpr double low = -708.0, high = 709.0, scale = 1.0;
};

// 2^x for low < x < high. Rounding by adding a large number and scaling by adding to the exponent keep the
// multiply-add pipes for the polynomial: on Zen 4 additions and integer operations have pipes of their own.
SS_INLINE F32 exp_decay(F32 x) {
#if defined(SS_ISA_avx512)
  // 2^(k/16) for k = 0..15 less k << 19: the rounded argument, shifted so that its integer part lands on the exponent,
  // brings k << 19 along. A cubic is then good to 0.04 ulp of itself.
  const F32 table = {_mm512_castsi512_ps(_mm512_setr_epi32(
      0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f, 0x3f7504f3,
      0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d))};
  const F32 big = F32::set(786432.0f);  // 1.5 * 2^19: the last bit kept is 1/16
  F32 t = x + big;
  F32 r = x - (t - big);
  F32 power = add_bits(shift_left_bits<19>(t), F32{_mm512_permutexvar_ps(_mm512_castps_si512(t.v), table.v)});
  F32 q = polynomial(r, 0x1.62e43p-1f, 0x1.ebff92p-3f, 0x1.c6b29ap-5f);
  return fma(power, r * q, power);
#else
  const F32 big = F32::set(12582912.0f);  // 1.5 * 2^23
  F32 t = x + big;
  F32 r = x - (t - big);
  F32 q = polynomial(r, 0x1.62e43p-1f, 0x1.ebfbep-3f, 0x1.c6af6cp-5f, 0x1.3b2a54p-7f, 0x1.5f089p-10f, 0x1.44138ap-13f);
  return add_bits(fma(q, r, F32::set(1.0f)), shift_left_bits<23>(t));
#endif
}
// e^x for low < x < high.
SS_INLINE F64 exp_decay(F64 x) {
  const F64 big = F64::set(6755399441055744.0);  // 1.5 * 2^52
  F64 t = fma(x, F64::set(1.4426950408889634), big);
  F64 k = t - big;
  F64 r = fnma(k, F64::set(0x1.62e42fee00000p-1), x);
  r = fnma(k, F64::set(0x1.a39ef35793c76p-33), r);
  F64 q = polynomial(r, 0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333326141, 0.0013888888888883752,
                     0.00019841269874800493, 2.4801587325533363e-05, 2.7557255425746435e-06, 2.7557273661348637e-07,
                     2.510520637395701e-08, 2.0914679376583935e-09);
  F64 p = fma(r * r, q, r) + F64::set(1.0);
  return add_bits(p, shift_left_bits<52>(t));
}
// Any argument: 0 below the range (numbers under 2^-126 and e^-708 are flushed), inf above, nan stays.
template <class V> SS_INLINE V exp_decay_any(V x) {
  V y = exp_decay(x);
  y = select_lt(x, V::set(DecayRange<V>::low), V::zero(), y);
  return select_lt(V::set(DecayRange<V>::high), x, V::set(std::numeric_limits<typename V::scalar>::infinity()), y);
}
SS_INLINE F64 exp(F64 x) { return exp_decay_any(x); }
// e^x with the argument reduced in two parts, so that a large x costs no accuracy.
SS_INLINE F32 exp(F32 x) {
  const F32 big = F32::set(12582912.0f);
  F32 t = fma(x, F32::set(1.44269504f), big);
  F32 k = t - big;
  F32 r = fnma(k, F32::set(0.693359375f), x);  // 9 bits: k times it is exact
  r = fnma(k, F32::set(-2.12194440e-4f), r);
  F32 q = polynomial(r, 0.5f, 0x1.555556p-3f, 0x1.5554eap-5f, 0x1.1110ep-7f, 0x1.6d4316p-10f, 0x1.a124e4p-13f);
  F32 p = fma(r * r, q, r) + F32::set(1.0f);
  F32 y = add_bits(p, shift_left_bits<23>(t));
  y = select_lt(x, F32::set(-87.0f), F32::zero(), y);
  return select_lt(F32::set(88.37f), x, F32::set(std::numeric_limits<float>::infinity()), y);
}

// ---- activations ----
// log(1 + e) for 0 <= e <= 1, to full relative accuracy: 2 atanh(e / (2 + e)).
SS_INLINE F32 log1p_unit(F32 e) {
  F32 s = e / (F32::set(2.0f) + e), w = s * s;
  F32 p = polynomial(w, 0.6666666865348816f, 0.3999970555305481f, 0.285923570394516f, 0.2170657515525818f, 0.23224329948425293f);
  return fma(s * w, p, s + s);
}
SS_INLINE F64 log1p_unit(F64 e) {
  F64 s = e / (F64::set(2.0) + e), w = s * s;
  F64 p = polynomial(w, 0.6666666666666666, 0.40000000000000013, 0.2857142857142194, 0.22222222223331986,
                     0.18181818086005655, 0.15384620253804163, 0.13333176949138179, 0.11767997767241035,
                     0.10480399234365274, 0.09942024896554735, 0.06334110851770246, 0.15231262619428984);
  return fma(s * w, p, s + s);
}
// log(1 + e^x); x itself above 20, as torch has it.
template <class V> SS_INLINE V softplus(V x) {
  V y = max(V::zero(), x) + log1p_unit(exp(V::zero() - abs(x)));
  return select_lt(V::set(20), x, x, y);
}
template <class V> SS_INLINE V sigmoid(V x) { return V::set(1) / (V::set(1) + exp(V::zero() - x)); }
// d softplus(x) / dx with the same threshold.
template <class V> SS_INLINE V softplus_slope(V x) { return select_lt(V::set(20), x, V::set(1), sigmoid(x)); }
// One division and no product: a rounding less than x times its sigmoid.
template <class V> SS_INLINE V silu(V x) { return x / (V::set(1) + exp(V::zero() - x)); }

}  // namespace SS_ISA
}  // namespace ss
