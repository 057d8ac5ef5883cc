// Vectors of channels for kernels that walk rows with contiguous channels: a few lanes of float (or double) loaded from and
// stored to any activation dtype. Everything sits in an unnamed namespace: these names are compiled once per instruction
// set, and the linker must never take one set's code for another's.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(SS_ISA_avx2) || defined(SS_ISA_avx512)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wignored-attributes"  // vector types as template arguments: their alignment is kept
#endif

namespace {

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) { return bits_to_float(uint32_t(v.bits) << 16); }
inline float widen(half v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, exponent = v.bits >> 10 & 31u, fraction = v.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return bits_to_float(sign | float_to_bits(float(fraction) * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | fraction << 13);
}

// Round to nearest, ties to even.
inline void narrow(float v, float& out) { out = v; }
inline void narrow(double v, double& out) { out = v; }
inline void narrow(double v, float& out) { out = float(v); }
inline void narrow(float v, bf16& out) {
  const uint32_t u = float_to_bits(v);
  out.bits = v != v ? uint16_t(u >> 16 | 0x40u) : uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
inline void narrow(float v, half& out) {
  const uint32_t u = float_to_bits(v), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) { out.bits = uint16_t(sign | 0x7e00u); return; }
  if (magnitude >= 0x477ff000u) { out.bits = uint16_t(sign | 0x7c00u); return; }
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float adder do the rounding
    out.bits = uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
    return;
  }
  out.bits = uint16_t(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1u) - 0x38000000u) >> 13));
}
inline void narrow(double v, bf16& out) { narrow(float(v), out); }
inline void narrow(double v, half& out) { narrow(float(v), out); }

// A sigmoid below that of -87 is taken for 0, so that silu goes to 0 however far p goes; the error is under 2e-38.
// exp on [-ln2/2, ln2/2]: Chebyshev interpolation of degree 6, relative error 2.6e-9.
constexpr float kExp[7] = {1.000000000e+00f, 1.000000038e+00f, 5.000000047e-01f, 1.666641541e-01f,
                           4.166635277e-02f, 8.375134775e-03f, 1.394111894e-03f};
constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f, kExpLimit = 87.0f;

// ---- any compiler, any dtype: an array of lanes ----
template <class C, int N>
struct Lanes {
  C v[N];
};
#define SS_LANES for (int i = 0; i < N; ++i)

#if defined(SS_ISA_avx512)
using VecF = __m512;
constexpr int kLanesF = 16;
#elif defined(SS_ISA_avx2)
using VecF = __m256;
constexpr int kLanesF = 8;
#else
using VecF = Lanes<float, 8>;
constexpr int kLanesF = 8;
#endif
using VecD = Lanes<double, 8>;

template <class C> struct VecOf;
template <> struct VecOf<float> { using type = VecF; static constexpr int lanes = kLanesF; };
template <> struct VecOf<double> { using type = VecD; static constexpr int lanes = 8; };
template <class C> using Vec = typename VecOf<C>::type;

template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };

inline float multiply_add(float a, float b, float c) {
#if defined(SS_ISA_neon)
  return fmaf(a, b, c);
#else
  return a * b + c;  // without the instruction, fma would be a slow library call
#endif
}
inline double multiply_add(double a, double b, double c) {
#if defined(SS_ISA_generic)
  return a * b + c;
#else
  return fma(a, b, c);
#endif
}

template <class C, int N> inline Lanes<C, N> add(Lanes<C, N> a, Lanes<C, N> b) { SS_LANES a.v[i] += b.v[i]; return a; }
template <class C, int N> inline Lanes<C, N> sub(Lanes<C, N> a, Lanes<C, N> b) { SS_LANES a.v[i] -= b.v[i]; return a; }
template <class C, int N> inline Lanes<C, N> mul(Lanes<C, N> a, Lanes<C, N> b) { SS_LANES a.v[i] *= b.v[i]; return a; }
template <class C, int N> inline Lanes<C, N> fma_(Lanes<C, N> a, Lanes<C, N> b, Lanes<C, N> c) {
  SS_LANES c.v[i] = multiply_add(a.v[i], b.v[i], c.v[i]);
  return c;
}
template <class C, int N> inline C sum_lanes(Lanes<C, N> a) {
  for (int width = N / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
  return a.v[0];
}
template <int N> inline Lanes<float, N> sigmoid(Lanes<float, N> p) {
  Lanes<float, N> s;
  SS_LANES {
    float x = -p.v[i];
    x = x < -kExpLimit ? -kExpLimit : x;
    x = x > kExpLimit ? kExpLimit : x;
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
    const float shifted = x * kLog2e + 12582912.0f, n = shifted - 12582912.0f;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float e = kExp[6];
    for (int j = 5; j >= 0; --j) e = multiply_add(e, r, kExp[j]);
    const uint32_t scale = (float_to_bits(shifted) - 0x4b400000u + 127u) << 23;
    s.v[i] = -p.v[i] > kExpLimit ? 0.0f : 1.0f / (1.0f + e * bits_to_float(scale));
  }
  return s;
}
template <int N> inline Lanes<double, N> sigmoid(Lanes<double, N> p) {
  SS_LANES p.v[i] = 1.0 / (1.0 + exp(-p.v[i]));
  return p;
}

template <class V> struct Make;
template <class C, int N> struct Make<Lanes<C, N>> {
  using V = Lanes<C, N>;
  static V all(C value) { V a; SS_LANES a.v[i] = value; return a; }
  template <class T> static V load(const T* p) { V a; SS_LANES a.v[i] = C(widen(p[i])); return a; }
  template <class T> static void store(T* p, V a) { SS_LANES narrow(a.v[i], p[i]); }
};

#if defined(SS_ISA_avx512)
inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
inline __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
inline __m512 fma_(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum_lanes(__m512 a) { return _mm512_reduce_add_ps(a); }
inline __m512 sigmoid(__m512 p) {
  __m512 x = _mm512_sub_ps(_mm512_setzero_ps(), p);
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-kExpLimit)), _mm512_set1_ps(kExpLimit));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
  __m512 e = _mm512_set1_ps(kExp[6]);
  for (int j = 5; j >= 0; --j) e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(kExp[j]));
  const __m512 d = _mm512_add_ps(_mm512_scalef_ps(e, n), _mm512_set1_ps(1.0f));
  // 1/d by one Newton step from the 14-bit estimate: d lies in [1, 6.1e37], so nothing overflows on the way.
  const __m512 g = _mm512_rcp14_ps(d);
  const __m512 s = _mm512_fmadd_ps(g, _mm512_fnmadd_ps(d, g, _mm512_set1_ps(1.0f)), g);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(p, _mm512_set1_ps(-kExpLimit), _CMP_NLT_UQ), s);
}
template <> struct Make<__m512> {
  using V = __m512;
  static V all(float value) { return _mm512_set1_ps(value); }
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static V load(const bf16* p) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16));
  }
  static V load(const half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static V load(const double* p) { float f[16]; for (int i = 0; i < 16; ++i) f[i] = float(p[i]); return load(f); }
  static void store(float* p, V a) { _mm512_storeu_ps(p, a); }
  static void store(bf16* p, V a) {
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  static void store(half* p, V a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(double* p, V a) { float f[16]; store(f, a); for (int i = 0; i < 16; ++i) p[i] = double(f[i]); }
};
#elif defined(SS_ISA_avx2)
inline __m256 add(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
inline __m256 sub(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
inline __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
inline __m256 fma_(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum_lanes(__m256 a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline __m256 sigmoid(__m256 p) {
  __m256 x = _mm256_sub_ps(_mm256_setzero_ps(), p);
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-kExpLimit)), _mm256_set1_ps(kExpLimit));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(kLog2e)), 8);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
  __m256 e = _mm256_set1_ps(kExp[6]);
  for (int j = 5; j >= 0; --j) e = _mm256_fmadd_ps(e, r, _mm256_set1_ps(kExp[j]));
  const __m256i scale = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 d = _mm256_fmadd_ps(e, _mm256_castsi256_ps(scale), _mm256_set1_ps(1.0f));
  const __m256 inside = _mm256_cmp_ps(p, _mm256_set1_ps(-kExpLimit), _CMP_NLT_UQ);
  return _mm256_and_ps(inside, _mm256_div_ps(_mm256_set1_ps(1.0f), d));
}
template <> struct Make<__m256> {
  using V = __m256;
  static V all(float value) { return _mm256_set1_ps(value); }
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static V load(const bf16* p) {
    const __m128i u = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16));
  }
  static V load(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static V load(const double* p) { float f[8]; for (int i = 0; i < 8; ++i) f[i] = float(p[i]); return load(f); }
  static void store(float* p, V a) { _mm256_storeu_ps(p, a); }
  static void store(bf16* p, V a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40)), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static void store(half* p, V a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(double* p, V a) { float f[8]; store(f, a); for (int i = 0; i < 8; ++i) p[i] = double(f[i]); }
};
#endif

// The whole of a vector, or its first `n` lanes (the rest is zero, and is not touched in memory).
template <class C, bool Whole, class T>
inline Vec<C> load(const T* p, int n) {
  if (Whole) return Make<Vec<C>>::load(p);
  T part[VecOf<C>::lanes];
  memset(part, 0, sizeof part);
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return Make<Vec<C>>::load(part);
}
template <class C, bool Whole, class T>
inline void store(T* p, Vec<C> a, int n) {
  if (Whole) {
    Make<Vec<C>>::store(p, a);
    return;
  }
  T part[VecOf<C>::lanes];
  Make<Vec<C>>::store(part, a);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}
template <class C> inline Vec<C> all(C value) { return Make<Vec<C>>::all(value); }

// Uninitialised (or zeroed) scratch; `ok()` is false where the machine has no memory left.
template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t n, bool zero = false)
      : data(static_cast<T*>(zero ? calloc(size_t(n > 0 ? n : 1), sizeof(T)) : malloc(size_t(n > 0 ? n : 1) * sizeof(T)))) {}
  ~Scratch() { free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return data != nullptr; }
  T& operator[](int64_t i) { return data[i]; }
};

}  // namespace
