// Shared by every CUDA kernel of statescan; compiled by NVRTC, so it includes nothing.
// IN: activation type, 0 float32, 1 bfloat16, 2 float16, 3 float64. `real` is the type of the arithmetic and the state.
#ifndef IN
#define IN 1
#endif
typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

#if IN == 3
typedef double real;
#else
typedef float real;
#endif
#if IN == 0
typedef float act;
#elif IN == 3
typedef double act;
#else
typedef u16 act;  // the 16 bits of a bfloat16 or a float16
#endif

#define DEV __device__ __forceinline__
#define LOG2E real(1.44269504088896340736)
#define LN2 real(0.69314718055994530942)

#if IN == 3
DEV double ex2(double x) { return exp2(x); }
DEV double rcp(double x) { return 1.0 / x; }
#else
DEV float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEV float rcp(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
#endif
DEV real fma_(real a, real b, real c) { return IN == 3 ? (real)fma((double)a, (double)b, (double)c) : (real)fmaf((float)a, (float)b, (float)c); }

// exp2(dv * a) for dv * a <= 0: what a state keeps over a step. The hardware's ex2 is 1.6e-8 to 2.6e-8 low on average over
// [-1, -0.01] (measured), and a state adds such errors up over 1 / (1 - decay) steps; shifting the argument makes the mean
// good to 5e-9 and costs nothing. A step of zero still gives exactly 1.
DEV real decay(real dv, real a) {
#if IN == 3
  return exp2(dv * a);
#else
  return ex2(fmaf(dv, a, 2.9e-8f));
#endif
}

#if IN != 3
#if __CUDA_ARCH__ >= 800
DEV float max_nan(float a, float b) { float y; asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }
#else
DEV float max_nan(float a, float b) { return a >= b ? a : b < a ? a : a != a ? a : b; }
#endif
// exp(x) for x <= 0 with the rounding of x * log2(e) made good: at x = -8 it alone would cost four units in the last
// place. 5e-8 is by how much ex2 is low on average below -1. Infinities come out as 0, NaN as NaN.
DEV float exp_down(float x) {
  x = max_nan(x, -126.f);
  const float t = x * 1.44269502f, rest = fmaf(x, 1.92596299e-8f, fmaf(x, 1.44269502f, -t)), e = ex2(t);
  return fmaf(e, fmaf(rest, 0.693147181f, 5e-8f), e);
}
#endif
// log(1 + exp(x)) without cancellation: max(x, 0) + log1p(e), e = exp(-|x|); log1p(e) / e is a polynomial on [0, 1], good
// to 5e-9. Above 20 this is x to the last bit, which is what torch defines there.
DEV real softplus(real x) {
#if IN == 3
  return x > 20.0 ? x : log1p(exp(x));
#else
  const float e = exp_down(-fabsf(x));
  float p = fmaf(e, -3.244004445e-03f, 1.985136978e-02f);
  p = fmaf(e, p, -5.695936084e-02f);
  p = fmaf(e, p, 1.060363725e-01f);
  p = fmaf(e, p, -1.530558169e-01f);
  p = fmaf(e, p, 1.967593580e-01f);
  p = fmaf(e, p, -2.495413274e-01f);
  p = fmaf(e, p, 3.332996368e-01f);
  p = fmaf(e, p, -4.999990165e-01f);
  p = fmaf(e, p, 1.f);
  return fmaf(e, p, max_nan(x, 0.f));
#endif
}
DEV real sigmoid(real x) {
#if IN == 3
  return 1.0 / (1.0 + exp(-x));
#else
  const float e = exp_down(-fabsf(x)), r = rcp(1.f + e);
  return x >= 0.f ? r : e * r;
#endif
}

// Where the result is rounded to 16 bits the plain form is exact enough.
DEV real quick_sigmoid(real x) {
#if IN == 1 || IN == 2
  return rcp(1.f + ex2(-x * LOG2E));
#else
  return sigmoid(x);
#endif
}
DEV real silu(real x) { return x * quick_sigmoid(x); }

DEV real to_real(act x) {
#if IN == 1
  return __uint_as_float(u32(x) << 16);
#elif IN == 2
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;
#else
  return x;
#endif
}
DEV act to_act(real x) {
#if IN == 1
  u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
#elif IN == 2
  u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y;
#else
  return x;
#endif
}

// Every q < count once over NT threads, of which `tid` is this one; how often a thread comes by is known when compiling.
#define FOR_EACH(q, count)                                                \
  _Pragma("unroll") for (int q##_ = 0; q##_ < ((count) + NT - 1) / NT; q##_++) \
    if (const int q = tid + q##_ * NT; (count) % NT == 0 || q < (count))

// Four numbers that move as one (16 bytes in float32).
struct alignas(16) Four { real v[4]; };

// Eight neighbouring channels of one position. 16-bit numbers stay in pairs until they are used: taken apart where they
// arrive, they would make the thread wait for memory there. `n` of the eight exist; `vec`: 16-byte aligned and whole.
#if IN == 1 || IN == 2
struct alignas(16) Pack8 { u32 w[4]; };
DEV real part(const Pack8& p, int j) {
#if IN == 1
  return __uint_as_float(j & 1 ? p.w[j / 2] & 0xffff0000u : p.w[j / 2] << 16);
#else
  return to_real(act(j & 1 ? p.w[j / 2] >> 16 : p.w[j / 2]));
#endif
}
DEV void set_pair(Pack8& p, int j, real low, real high) { p.w[j / 2] = u32(to_act(low)) | u32(to_act(high)) << 16; }
DEV act piece(const Pack8& p, int j) { return act(j & 1 ? p.w[j / 2] >> 16 : p.w[j / 2]); }
#else
struct alignas(16) Pack8 { act v[8]; };
DEV real part(const Pack8& p, int j) { return p.v[j]; }
DEV void set_pair(Pack8& p, int j, real low, real high) { p.v[j] = low; p.v[j + 1] = high; }
DEV act piece(const Pack8& p, int j) { return p.v[j]; }
#endif
DEV Pack8 load8(const act* p, int n, bool vec) {
  Pack8 r;
  if (vec && n >= 8) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(Pack8) / 16; i++) reinterpret_cast<uint4*>(&r)[i] = reinterpret_cast<const uint4*>(p)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i += 2) set_pair(r, i, i < n ? to_real(p[i]) : real(0), i + 1 < n ? to_real(p[i + 1]) : real(0));
  }
  return r;
}
DEV void store8(act* p, const Pack8& r, int n, bool vec) {
  if (vec && n >= 8) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(Pack8) / 16; i++) reinterpret_cast<uint4*>(p)[i] = reinterpret_cast<const uint4*>(&r)[i];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) if (i < n) p[i] = piece(r, i);
  }
}

// Numbers of any stored type K (as IN), for tensors whose type is not the activations'.
template <int K> struct Stored { typedef u16 type; };
template <> struct Stored<0> { typedef float type; };
template <> struct Stored<3> { typedef double type; };
template <int K> DEV real wide(typename Stored<K>::type v) {
  if constexpr (K == 1) return __uint_as_float(u32(v) << 16);
  else if constexpr (K == 2) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(v)); return y; }
  else return real(v);
}
template <int K> DEV typename Stored<K>::type narrow(real v) {
  if constexpr (K == 1) { u16 y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(float(v))); return y; }
  else if constexpr (K == 2) { u16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(float(v))); return y; }
  else return typename Stored<K>::type(v);
}
template <int K> DEV real load_as(const void* p, i64 i) { return wide<K>(static_cast<const typename Stored<K>::type*>(p)[i]); }
template <int K> DEV void store_as(void* p, i64 i, real v) { static_cast<typename Stored<K>::type*>(p)[i] = narrow<K>(v); }

// Sum over `rows` partial sums of one column each for 32 columns, in an order that the sizes fix; block of 1024 threads.
// True in the one thread that has the sum of column blockIdx.x * 32 + threadIdx.x % 32.
DEV bool column_sum(const real* partial, int rows, i64 columns, real& total) {
  __shared__ real part[32][33];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const i64 column = i64(blockIdx.x) * 32 + lane;
  real sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int i = row; i < rows; i += 32) sum += partial[i * columns + column];
  }
  part[row][lane] = sum;
  __syncthreads();
  sum = part[lane][row];
#pragma unroll
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  __syncthreads();
  if (lane == 0) part[0][row] = sum;
  __syncthreads();
  total = part[0][lane];
  return row == 0 && column < columns;
}

// Barriers in shared memory that count arrivals and, from compute capability 9.0 on, bytes of bulk copies.
typedef unsigned long long u64;
DEV u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEV void bar_init(u64* b, u32 n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(n)); }
DEV void bar_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
}
DEV void bar_arrive(u64* b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory"); }
DEV void bar_wait(u64* b, u32 parity) {
  u32 done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(address(b)), "r"(parity) : "memory");
  } while (!done);
}
