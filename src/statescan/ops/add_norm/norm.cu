// sum = x + residual, output = sum / sqrt(mean(sum^2) + eps) * weight over the last axis, and the gradients. One pass over
// memory each way: a row stays in the registers of LANES threads, EACH packets of eight numbers a thread.
// Macros: IN (3: arithmetic in float64, else 0), XT, RT, ST, WT types of x and output, residual (-1: none), the sum, the weight;
// KEEP: the sum is written (else it is x); GT: the sum has a gradient of its own; APART: the residual's gradient is written
// apart from x's; LANES threads a row, EACH, VEC (16-byte accesses), NT threads a block.
#ifndef XT
#define XT 1
#endif
#ifndef RT
#define RT 0
#endif
#ifndef ST
#define ST 0
#endif
#ifndef WT
#define WT 0
#endif
#ifndef KEEP
#define KEEP 1
#endif
#ifndef GT
#define GT 1
#endif
#ifndef APART
#define APART 1
#endif
#ifndef LANES
#define LANES 32
#endif
#ifndef EACH
#define EACH 4
#endif
#ifndef VEC
#define VEC 1
#endif
#ifndef NT
#define NT 128
#endif
#ifndef MINB
#define MINB 1
#endif

template <int K> struct alignas(16) Packet { typename Stored<K>::type v[8]; };
struct Eight { real v[8]; };
// Number j of a thread's packet e; without 16-byte accesses neighbouring threads hold neighbouring numbers.
DEV int index_of(int lane, int e, int j) { return VEC ? (e * LANES + lane) * 8 + j : (e * 8 + j) * LANES + lane; }
template <int K> DEV Packet<K> fetch(const void* base, i64 row, int lane, int e, int d) {
  const typename Stored<K>::type* p = static_cast<const typename Stored<K>::type*>(base) + row;
  Packet<K> r;
  if constexpr (VEC) {
    if (index_of(lane, e, 0) < d) {
      const uint4* from = reinterpret_cast<const uint4*>(p + index_of(lane, e, 0));
#pragma unroll
      for (int i = 0; i < int(sizeof(r)) / 16; i++) reinterpret_cast<uint4*>(&r)[i] = from[i];
      return r;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) r.v[j] = 0;
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) r.v[j] = index_of(lane, e, j) < d ? p[index_of(lane, e, j)] : typename Stored<K>::type(0);
  }
  return r;
}
template <int K> DEV Eight widen(const Packet<K>& p) {
  Eight r;
#pragma unroll
  for (int j = 0; j < 8; j++) r.v[j] = wide<K>(p.v[j]);
  return r;
}
template <int K> DEV void put(void* base, i64 row, int lane, int e, int d, const Eight& v) {
  typename Stored<K>::type* p = static_cast<typename Stored<K>::type*>(base) + row;
  Packet<K> r;
#pragma unroll
  for (int j = 0; j < 8; j++) r.v[j] = narrow<K>(v.v[j]);
  if constexpr (VEC) {
    if (index_of(lane, e, 0) < d) {
      uint4* to = reinterpret_cast<uint4*>(p + index_of(lane, e, 0));
#pragma unroll
      for (int i = 0; i < int(sizeof(r)) / 16; i++) to[i] = reinterpret_cast<uint4*>(&r)[i];
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (index_of(lane, e, j) < d) p[index_of(lane, e, j)] = r.v[j];
  }
}
// Over the LANES threads of a row, the same in all of them; called by the whole block where a row has several warps.
DEV real row_sum(real v) {
  constexpr int within = LANES < 32 ? LANES : 32;
#pragma unroll
  for (int o = within / 2; o; o /= 2) v += __shfl_xor_sync(~0u, v, o);
  if constexpr (LANES > 32) {
    __shared__ real parts[NT / 32];
    constexpr int warps = LANES / 32;
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
#pragma unroll
    for (int i = 0; i < warps; i++) v += parts[threadIdx.x / LANES * warps + i];
    __syncthreads();
  }
  return v;
}
DEV real inverse_root(real v) {
#if IN == 3
  return 1.0 / sqrt(v);
#else
  return 1.f / sqrtf(v);
#endif
}

extern "C" __global__ void __launch_bounds__(NT, MINB)
norm_forward(const void* x, i64 xr, const void* residual, i64 rr, const void* weight, void* total, void* output, real* rstd, i64 rows,
             int d, double eps) {
  const int lane = threadIdx.x % LANES;
  const i64 asked = i64(blockIdx.x) * (NT / LANES) + threadIdx.x / LANES, row = asked < rows ? asked : rows - 1;
  Packet<XT> in[EACH];
#if RT >= 0
  Packet<RT> old[EACH];
#endif
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    in[e] = fetch<XT>(x, row * xr, lane, e, d);
#if RT >= 0
    old[e] = fetch<RT>(residual, row * rr, lane, e, d);
#endif
  }
  Eight sum[EACH];
  real square = 0;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    sum[e] = widen<XT>(in[e]);
#if RT >= 0
    const Eight more = widen<RT>(old[e]);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[e].v[j] += more.v[j];
#endif
#pragma unroll
    for (int j = 0; j < 8; j++) {
      sum[e].v[j] = wide<ST>(narrow<ST>(sum[e].v[j]));  // what goes on is what is normalised
      square = fma_(sum[e].v[j], sum[e].v[j], square);
    }
  }
#if KEEP
  if (asked < rows)
#pragma unroll
    for (int e = 0; e < EACH; e++) put<ST>(total, row * d, lane, e, d, sum[e]);
#endif
  square = row_sum(square);
  const real scale = inverse_root(square / d + real(eps));
  if (asked >= rows) return;
  if (lane == 0) rstd[row] = scale;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const Eight w = widen<WT>(fetch<WT>(weight, 0, lane, e, d));
#pragma unroll
    for (int j = 0; j < 8; j++) sum[e].v[j] *= scale * w.v[j];
    put<XT>(output, row * d, lane, e, d, sum[e]);
  }
}

// Every group of LANES threads walks rows at a distance of all groups and adds up the weight's gradient on the way; a block
// leaves one row of partial sums.
extern "C" __global__ void __launch_bounds__(NT, MINB)
norm_backward(const void* total, i64 sr, const void* weight, const real* rstd, const void* dout, i64 gr, const void* dtotal, i64 tr,
              void* dx, void* dresidual, real* partial, i64 rows, int d) {
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  Eight w[EACH], dw[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    w[e] = widen<WT>(fetch<WT>(weight, 0, lane, e, d));
#pragma unroll
    for (int j = 0; j < 8; j++) dw[e].v[j] = 0;
  }
  const i64 stride = i64(gridDim.x) * (NT / LANES), begin = i64(blockIdx.x) * (NT / LANES);
  Packet<ST> s[EACH];
  Packet<XT> g[EACH];
#if GT
  Packet<ST> t[EACH];
#endif
  real scale;
  auto load = [&](i64 first) {
    const i64 row = first + group < rows ? first + group : rows - 1;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      s[e] = fetch<ST>(total, row * sr, lane, e, d);
      g[e] = fetch<XT>(dout, row * gr, lane, e, d);
#if GT
      t[e] = fetch<ST>(dtotal, row * tr, lane, e, d);
#endif
    }
    scale = rstd[row];
  };
  if (begin < rows) load(begin);
#pragma unroll 1
  for (i64 first = begin; first < rows; first += stride) {
    const bool mine = first + group < rows;
    const i64 row = first + group;
    Eight normed[EACH], up[EACH];
#if GT
    Packet<ST> more[EACH];
#endif
    real dot = 0;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      up[e] = widen<XT>(g[e]);
      normed[e] = widen<ST>(s[e]);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        normed[e].v[j] *= scale;
        if (mine) dw[e].v[j] = fma_(up[e].v[j], normed[e].v[j], dw[e].v[j]);
        up[e].v[j] *= w[e].v[j];
        dot = fma_(up[e].v[j], normed[e].v[j], dot);
      }
#if GT
      more[e] = t[e];
#endif
    }
    const real factor = scale;
    if (first + stride < rows) load(first + stride);  // under way while this row's sum goes round
    dot = row_sum(dot) / d;
    if (!mine) continue;
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      Eight out;
#if GT
      const Eight plus = widen<ST>(more[e]);
#endif
#pragma unroll
      for (int j = 0; j < 8; j++) {
        out.v[j] = factor * fma_(-normed[e].v[j], dot, up[e].v[j]);
#if GT
        out.v[j] += plus.v[j];
#endif
      }
      put<XT>(dx, row * d, lane, e, d, out);
#if APART
      put<RT>(dresidual, row * d, lane, e, d, out);
#endif
    }
  }
  // the block's groups in their order, one packet of each thread at a time
  constexpr int groups = NT / LANES;
  if constexpr (groups > 1) {
    __shared__ real sums[8][NT];
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      __syncthreads();
#pragma unroll
      for (int j = 0; j < 8; j++) sums[j][threadIdx.x] = dw[e].v[j];
      __syncthreads();
      for (int q = threadIdx.x; q < 8 * LANES; q += NT) {
        const int j = VEC ? q % 8 : q / LANES, from = VEC ? q / 8 : q % LANES;
        real sum = 0;
#pragma unroll
        for (int r = 0; r < groups; r++) sum += sums[j][r * LANES + from];
        if (index_of(from, e, j) < d) partial[i64(blockIdx.x) * d + index_of(from, e, j)] = sum;
      }
    }
  } else {
#pragma unroll
    for (int e = 0; e < EACH; e++)
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (index_of(lane, e, j) < d) partial[i64(blockIdx.x) * d + index_of(lane, e, j)] = dw[e].v[j];
  }
}

extern "C" __global__ void __launch_bounds__(1024) norm_sums(const real* partial, int rows, int d, void* dweight) {
  real total;
  if (column_sum(partial, rows, d, total)) store_as<WT>(dweight, i64(blockIdx.x) * 32 + threadIdx.x % 32, total);
}
