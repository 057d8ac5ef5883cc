// A decoding step of a Mamba block for several rows, in pieces around the matrix products. Activations are of type IN, sums
// and states float32 (float64 for float64). Every sum has an order fixed by the shape, so a row doesn't depend on its company.
#ifndef WT
#define WT IN  // weights of `linear` and of dt_proj: 0 float32, 1 bfloat16, 2 float16, 3 float64, 4 int8 with a scale a row
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
// A kernel launched while the one before it still runs waits here for what that writes.
#ifndef PDL
#define PDL 0
#endif
DEV void await() {
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEV real warp_sum(real s) {
#pragma unroll
  for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(~0u, s, m);
  return s;
}

// stream = x + stream; normed = stream / rms * weight. One block of 256 threads a row; CHUNKS > 0: rows of up to 2048 CHUNKS
// numbers, a multiple of eight, stay in registers between the two passes.
#ifndef CHUNKS
#define CHUNKS 0
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
  const i64 row = (i64)blockIdx.x * d_model;
  await();
  real square = real(0);
#if CHUNKS > 0
  real v[CHUNKS][8], w[CHUNKS][8];
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int k = (threadIdx.x + i * 256) * 8;
    if (k >= d_model) continue;
    const Pack8 p = load8(x + row + k, 8, true);
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      const Four f = before ? *reinterpret_cast<const Four*>(before + row + k + j) : Four{};
      const Four g = *reinterpret_cast<const Four*>(weight + k + j);
#pragma unroll
      for (int m = 0; m < 4; m++) { v[i][j + m] = f.v[m]; w[i][j + m] = g.v[m]; }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      v[i][j] += part(p, j);
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
    const real v = before ? to_real(x[row + k]) + before[row + k] : to_real(x[row + k]);
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
// u = silu(conv(u)); the state keeps the last W - 1 inputs. A thread a channel. Grid (channels / 256, rows).
extern "C" __global__ void __launch_bounds__(256) conv_step(
    const act* __restrict__ x, i64 x_row, real* __restrict__ state, const real* __restrict__ weight,
    const real* __restrict__ bias, act* __restrict__ y, int d_inner) {
  const int c = blockIdx.x * 256 + threadIdx.x;
  const i64 row = blockIdx.y;
  if (c >= d_inner) return;
  real* past = state + row * (W - 1) * d_inner + c;
  real v[W];
  await();
#pragma unroll
  for (int k = 0; k < W - 1; k++) v[k] = past[(i64)k * d_inner];
  v[W - 1] = to_real(x[row * x_row + c]);
  real s = real(0);
#pragma unroll
  for (int k = 0; k < W; k++) s = fma_(weight[(i64)c * W + k], v[k], s);
#pragma unroll
  for (int k = 0; k < W - 1; k++) past[(i64)k * d_inner] = v[k + 1];
  if (bias) s += bias[c];
  y[row * d_inner + c] = to_act(s * sigmoid(s));
}

// Reads memory into the cache, to be there for a product that comes later.
extern "C" __global__ void __launch_bounds__(256) warm(const char* __restrict__ data, i64 bytes) {
  for (i64 at = ((i64)blockIdx.x * 256 + threadIdx.x) * 128; at < bytes; at += (i64)gridDim.x * 256 * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(data + at));
}

// States pass by once a step and leave the cache first: weights that were read ahead stay.
DEV float4 streamed(const float4* p) {
  float4 v;
  asm("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
  return v;
}
DEV void stream_out(float4* p, float4 v) {
  asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
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
#ifndef R
#define R 0   // dt_proj's columns; 0: dt is given
#endif
#ifndef RPT
#define RPT 1 // rows of a thread
#endif
#ifndef VBC
#define VBC 0 // B, C and dt's low part lie on 16-byte marks, row by row
#endif
#define CB (256 / G)
#define RPL ((R + G - 1) / G)
// h = exp(dt A) h + dt B u; y = (C . h + D u) silu(z), dt = softplus(. + bias). Grid (channels / CB, rows / RPT).
extern "C" __global__ void __launch_bounds__(256) state_step(
    real* __restrict__ state, const act* __restrict__ u, const act* __restrict__ z, i64 z_row, const act* __restrict__ dt,
    const wt* __restrict__ dt_weight, const act* __restrict__ low, i64 low_row, const act* __restrict__ B,
    const act* __restrict__ C, i64 BC_row, const real* __restrict__ A, const real* __restrict__ D,
    const real* __restrict__ bias, act* __restrict__ y, int rows, int d_inner) {
  const int c = blockIdx.x * CB + threadIdx.x / G, g = threadIdx.x % G, r0 = blockIdx.y * RPT;
  const bool live = c < d_inner;
  const int cc = live ? c : d_inner - 1;
  real h[RPT][NS];
#pragma unroll
  for (int r = 0; r < RPT; r++) {
    if (r0 + r >= rows) continue;
    const real* from = state + ((i64)(r0 + r) * d_inner + cc) * N + g * NS;
#if G * NS == N && NS % 4 == 0 && IN != 3
#pragma unroll
    for (int m = 0; m < NS; m += 4) {
      const float4 v = streamed(reinterpret_cast<const float4*>(from + m));
      h[r][m] = v.x; h[r][m + 1] = v.y; h[r][m + 2] = v.z; h[r][m + 3] = v.w;
    }
#else
#pragma unroll
    for (int n = 0; n < NS; n++) h[r][n] = g * NS + n < N ? from[n] : real(0);
#endif
  }
  real a[NS];
#pragma unroll
  for (int n = 0; n < NS; n++) a[n] = g * NS + n < N ? A[(i64)cc * N + g * NS + n] * LOG2E : real(0);
  const real skip = D ? D[cc] : real(0), shift = bias ? bias[cc] : real(0);
  real step[RPT];
#if R > 0
#pragma unroll
  for (int r = 0; r < RPT; r++) step[r] = real(0);
#if R % (8 * G) == 0 && (WT == 1 || WT == 2) && IN == WT && VBC
#pragma unroll
  for (int k = 0; k < R; k += 8 * G) {
    const Pack8 w8 = load8(dt_weight + (i64)cc * R + k + g * 8, 8, true);
#pragma unroll
    for (int r = 0; r < RPT; r++) {
      if (r0 + r >= rows) continue;
      const Pack8 x8 = load8(low + (i64)(r0 + r) * low_row + k + g * 8, 8, true);
#pragma unroll
      for (int j = 0; j < 8; j++) step[r] = fma_(part(w8, j), part(x8, j), step[r]);
    }
  }
#else
  for (int k = 0; k < RPL; k++) {
    const int at = g * RPL + k;
    const real w1 = at < R ? widen(dt_weight[(i64)cc * R + at]) : real(0);
#pragma unroll
    for (int r = 0; r < RPT; r++)
      if (r0 + r < rows && at < R) step[r] = fma_(w1, to_real(low[(i64)(r0 + r) * low_row + at]), step[r]);
  }
#endif
#pragma unroll
  for (int r = 0; r < RPT; r++)
#pragma unroll
    for (int m = 1; m < G; m <<= 1) step[r] += __shfl_xor_sync(~0u, step[r], m);
#else
#pragma unroll
  for (int r = 0; r < RPT; r++) step[r] = r0 + r < rows ? to_real(dt[(i64)(r0 + r) * d_inner + cc]) : real(0);
#endif
#pragma unroll
  for (int r = 0; r < RPT; r++) {
    if (r0 + r >= rows) continue;
    const i64 row = r0 + r;
    const real dv = softplus(step[r] + shift), uv = to_real(u[row * d_inner + cc]), du = dv * uv;
    real sum = real(0), b[NS], c4[NS];
#if VBC && NS == 4 && G * NS == N && (IN == 1 || IN == 2)
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
#pragma unroll
    for (int n = 0; n < NS; n++) {
      h[r][n] = fma_(decay(dv, a[n]), h[r][n], du * b[n]);
      sum = fma_(h[r][n], c4[n], sum);
    }
#pragma unroll
    for (int m = 1; m < G; m <<= 1) sum += __shfl_xor_sync(~0u, sum, m);
    if (live) {
      real* to = state + (row * d_inner + c) * N + g * NS;
#if G * NS == N && NS % 4 == 0 && IN != 3
#pragma unroll
      for (int m = 0; m < NS; m += 4) stream_out(reinterpret_cast<float4*>(to + m), make_float4(h[r][m], h[r][m + 1], h[r][m + 2], h[r][m + 3]));
#else
#pragma unroll
      for (int n = 0; n < NS; n++) if (g * NS + n < N) to[n] = h[r][n];
#endif
      if (g == 0) {
        const real gate = to_real(z[row * z_row + c]);
        y[row * d_inner + c] = to_act(fma_(skip, uv, sum) * silu(gate));
      }
    }
  }
}
