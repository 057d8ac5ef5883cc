// A decoding step of a Mamba block for several rows, in pieces around the matrix products. Activations are of type IN, sums
// and states float32 (float64 for float64). Every sum has an order fixed by the shape, so a row doesn't depend on its company.
#ifndef WT
#define WT IN  // weights of `linear`: 0 float32, 1 bfloat16, 2 float16, 3 float64, 4 int8 with a scale a row
#endif
#if WT == 4
typedef signed char wt;
#elif WT == 3
typedef double wt;
#elif WT == 0
typedef float wt;
#else
typedef u16 wt;
#endif
DEV real widen(wt w) {
#if WT == 1
  return __uint_as_float(u32(w) << 16);
#elif WT == 2
  float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(w)); return y;
#else
  return real(w);
#endif
}
DEV real warp_sum(real s) {
#pragma unroll
  for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(~0u, s, m);
  return s;
}

// stream = x + stream; normed = stream / rms * weight. One block of 256 threads a row; CHUNKS > 0: rows of up to 2048 CHUNKS
// numbers, a multiple of eight, stay in registers between the two passes. x is the sum of PARTS tensors, one after the other.
#ifndef CHUNKS
#define CHUNKS 0
#endif
#ifndef PARTS
#define PARTS 1
#endif
#ifndef EARLY
#define EARLY 0  // the launch may begin before its inputs are there
#endif
DEV real inverse_rms(real square, int d_model, double epsilon, real* parts) {
  square = warp_sum(square);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = square;
  __syncthreads();
  square = real(0);
#pragma unroll
  for (int i = 0; i < 8; i++) square += parts[i];
#if IN == 3
  return 1.0 / sqrt(square / d_model + epsilon);
#else
  return 1.f / sqrtf(square / d_model + (float)epsilon);
#endif
}
extern "C" __global__ void __launch_bounds__(256) add_norm(
    const act* __restrict__ x, const real* before, real* stream, const real* __restrict__ weight, act* __restrict__ normed,
    int d_model, double epsilon) {
  __shared__ real parts[8];
#if EARLY && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const i64 row = (i64)blockIdx.x * d_model, apart = (i64)gridDim.x * d_model;
  real square = real(0);
#if CHUNKS > 0
  real v[CHUNKS][8], w[CHUNKS][8];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int k = (threadIdx.x + i * 256) * 8;
    if (k >= d_model) continue;
    Pack8 p[PARTS];
#pragma unroll
    for (int m = 0; m < PARTS; m++) p[m] = load8(x + m * apart + row + k, 8, true);
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const Four f = before ? *reinterpret_cast<const Four*>(before + row + k + j) : Four{};
      const Four g = *reinterpret_cast<const Four*>(weight + k + j);
#pragma unroll
      for (int m = 0; m < 4; m++) { v[i][j + m] = f.v[m]; w[i][j + m] = g.v[m]; }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      real s = part(p[0], j);
#pragma unroll
      for (int m = 1; m < PARTS; m++) s += part(p[m], j);
      v[i][j] += s;
      square = fma_(v[i][j], v[i][j], square);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 4) *reinterpret_cast<Four*>(stream + row + k + j) = Four{v[i][j], v[i][j + 1], v[i][j + 2], v[i][j + 3]};
  }
  const real inverse = inverse_rms(square, d_model, epsilon, parts);
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int k = (threadIdx.x + i * 256) * 8;
    if (k >= d_model) continue;
    Pack8 out;
#pragma unroll
    for (int j = 0; j < 8; j += 2) set_pair(out, j, v[i][j] * inverse * w[i][j], v[i][j + 1] * inverse * w[i][j + 1]);
    store8(normed + row + k, out, 8, true);
  }
#else
  for (int k = threadIdx.x; k < d_model; k += 256) {
    real v = to_real(x[row + k]);
#pragma unroll
    for (int m = 1; m < PARTS; m++) v += to_real(x[m * apart + row + k]);
    if (before) v += before[row + k];
    stream[row + k] = v;
    square = fma_(v, v, square);
  }
  const real inverse = inverse_rms(square, d_model, epsilon, parts);
  for (int k = threadIdx.x; k < d_model; k += 256) normed[row + k] = to_act(stream[row + k] * inverse * weight[k]);
#endif
}

// y = x W^T * scale + bias, in float32 throughout: a warp an output, ROWS rows at a time. Grid (outputs / 8, rows / ROWS).
#define ROWS 8
extern "C" __global__ void __launch_bounds__(256) linear(
    const act* __restrict__ x, i64 x_row, const wt* __restrict__ weight, const real* __restrict__ scale,
    const real* __restrict__ bias, act* __restrict__ y, int rows, int outputs, int columns) {
  const int o = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, r0 = blockIdx.y * ROWS;
  if (o >= outputs) return;
  const wt* w = weight + (i64)o * columns;
  real acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) acc[r] = real(0);
  for (int k = lane; k < columns; k += 32) {
    const real v = widen(w[k]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) acc[r] = fma_(v, r0 + r < rows ? to_real(x[(i64)(r0 + r) * x_row + k]) : real(0), acc[r]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    real s = warp_sum(acc[r]);
    if (scale) s *= scale[o];
    if (bias) s += bias[o];
    if (lane == 0 && r0 + r < rows) y[(i64)(r0 + r) * outputs + o] = to_act(s);
  }
}

#ifndef W
#define W 4
#endif
#ifndef CONV
#define CONV 0
#endif
#if CONV  // the convolution's state is kept as the activations are
typedef act kept;
#else
typedef real kept;
#endif
// u = silu(conv(u)); the state keeps the last W - 1 inputs. A thread a channel. Grid (channels / 256, rows).
extern "C" __global__ void __launch_bounds__(256) conv_step(
    const act* __restrict__ x, i64 x_row, kept* __restrict__ state, const real* __restrict__ weight,
    const real* __restrict__ bias, act* __restrict__ y, int d_inner) {
  const int c = blockIdx.x * 256 + threadIdx.x;
  const i64 row = blockIdx.y;
  if (c >= d_inner) return;
  kept* past = state + row * (W - 1) * d_inner + c;
  const act now = x[row * x_row + c];
  kept old[W];
  real v[W];
#pragma unroll
  for (int k = 0; k < W - 1; k++) old[k] = past[(i64)k * d_inner];
#if CONV
  old[W - 1] = now;
#pragma unroll
  for (int k = 0; k < W; k++) v[k] = to_real(old[k]);
#else
  old[W - 1] = to_real(now);
#pragma unroll
  for (int k = 0; k < W; k++) v[k] = old[k];
#endif
  real s = real(0);
#pragma unroll
  for (int k = 0; k < W; k++) s = fma_(weight[(i64)c * W + k], v[k], s);
#pragma unroll
  for (int k = 0; k < W - 1; k++) past[(i64)k * d_inner] = old[k + 1];
  if (bias) s += bias[c];
  y[row * d_inner + c] = to_act(s * sigmoid(s));
}

#ifndef N
#define N 16
#endif
#ifndef G
#define G 1   // threads of a channel
#endif
#ifndef NS
#define NS N  // states of a thread
#endif
#ifndef VBC
#define VBC 0 // state, A, B and C lie on 16-byte marks, row by row
#endif
#define WIDE (VBC && G * NS == N && NS == 4 && IN != 3)
#define CB (256 / G)
// h = exp(dt A) h + dt B u; y = (C . h + D u) silu(z), dt = softplus(. + bias). Grid (channels / CB, rows).
extern "C" __global__ void __launch_bounds__(256) state_step(
    real* __restrict__ state, const act* __restrict__ u, const act* __restrict__ z, i64 z_row, const act* __restrict__ dt,
    const act* __restrict__ B, const act* __restrict__ C, i64 BC_row, const real* __restrict__ A,
    const real* __restrict__ D, const real* __restrict__ bias, act* __restrict__ y, int d_inner) {
  const int c = blockIdx.x * CB + threadIdx.x / G, g = threadIdx.x % G;
  const i64 row = blockIdx.y;
  const bool live = c < d_inner;
  const int cc = live ? c : d_inner - 1;
  real h[NS];
  const real* from = state + (row * d_inner + cc) * N + g * NS;
#if WIDE
#pragma unroll
  for (int m = 0; m < NS; m += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + m);
    h[m] = v.x; h[m + 1] = v.y; h[m + 2] = v.z; h[m + 3] = v.w;
  }
#else
#pragma unroll
  for (int n = 0; n < NS; n++) h[n] = g * NS + n < N ? from[n] : real(0);
#endif
  real a[NS], b[NS], c4[NS];
#if WIDE
  const float4 a4 = *reinterpret_cast<const float4*>(A + (i64)cc * N + g * 4);
  a[0] = a4.x * LOG2E; a[1] = a4.y * LOG2E; a[2] = a4.z * LOG2E; a[3] = a4.w * LOG2E;
#else
#pragma unroll
  for (int n = 0; n < NS; n++) a[n] = g * NS + n < N ? A[(i64)cc * N + g * NS + n] * LOG2E : real(0);
#endif
#if WIDE && (IN == 1 || IN == 2)
  const uint2 bw = *reinterpret_cast<const uint2*>(B + row * BC_row + g * 4), cw = *reinterpret_cast<const uint2*>(C + row * BC_row + g * 4);
  b[0] = to_real(act(bw.x)); b[1] = to_real(act(bw.x >> 16)); b[2] = to_real(act(bw.y)); b[3] = to_real(act(bw.y >> 16));
  c4[0] = to_real(act(cw.x)); c4[1] = to_real(act(cw.x >> 16)); c4[2] = to_real(act(cw.y)); c4[3] = to_real(act(cw.y >> 16));
#else
#pragma unroll
  for (int n = 0; n < NS; n++) {
    const bool in = G * NS == N || g * NS + n < N;
    b[n] = in ? to_real(B[row * BC_row + g * NS + n]) : real(0);
    c4[n] = in ? to_real(C[row * BC_row + g * NS + n]) : real(0);
  }
#endif
  const real skip = D ? D[cc] : real(0), shift = bias ? bias[cc] : real(0);
  const real dv = softplus(to_real(dt[row * d_inner + cc]) + shift), uv = to_real(u[row * d_inner + cc]), du = dv * uv;
  real sum = real(0);
#pragma unroll
  for (int n = 0; n < NS; n++) {
    h[n] = fma_(decay(dv, a[n]), h[n], du * b[n]);
    sum = fma_(h[n], c4[n], sum);
  }
#pragma unroll
  for (int m = 1; m < G; m <<= 1) sum += __shfl_xor_sync(~0u, sum, m);
  if (!live) return;
  real* to = state + (row * d_inner + c) * N + g * NS;
#if WIDE
#pragma unroll
  for (int m = 0; m < NS; m += 4) *reinterpret_cast<float4*>(to + m) = make_float4(h[m], h[m + 1], h[m + 2], h[m + 3]);
#else
#pragma unroll
  for (int n = 0; n < NS; n++) if (g * NS + n < N) to[n] = h[n];
#endif
  if (g == 0) y[row * d_inner + c] = to_act(fma_(skip, uv, sum) * silu(to_real(z[row * z_row + c])));
}
