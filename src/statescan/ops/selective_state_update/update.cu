// One position of the selective scan: h' = exp(dt A) h + dt B u, y = (C . h' + D u) silu(z).
// LANES threads share a channel, four states each at a time; a state is read and written once, `next` may be `state`.
// Macros: NST states, LANES (a power of two, <= 32), VECS (16-byte accesses to states, A, B and C), FIXB, FIXC (the same for
// every row), HASZ, SOFTPLUS.
#ifndef NST
#define NST 16
#endif
#ifndef LANES
#define LANES 4
#endif
#ifndef VECS
#define VECS 1
#endif
#ifndef FIXB
#define FIXB 0
#endif
#ifndef FIXC
#define FIXC 0
#endif
#ifndef HASZ
#define HASZ 1
#endif
#ifndef SOFTPLUS
#define SOFTPLUS 1
#endif

DEV Four four(const real* p, int n) {
  Four r;
  if (VECS) return *reinterpret_cast<const Four*>(p);
#pragma unroll
  for (int i = 0; i < 4; i++) r.v[i] = i < n ? p[i] : real(0);
  return r;
}
#if IN == 1 || IN == 2
struct alignas(8) Acts { act v[4]; };
#else
struct alignas(16) Acts { act v[4]; };
#endif
DEV Four four_acts(const act* p, int n) {
  Four r;
  if (VECS) {
    const Acts a = *reinterpret_cast<const Acts*>(p);
#pragma unroll
    for (int i = 0; i < 4; i++) r.v[i] = to_real(a.v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) r.v[i] = i < n ? to_real(p[i]) : real(0);
  }
  return r;
}

extern "C" __global__ void __launch_bounds__(128)
state_update(const real* state, i64 sb, i64 sd, real* next, i64 nb, i64 nd, const act* u, i64 ub, const act* dt, i64 tb,
             const act* z, i64 zb, const act* B, i64 bb, i64 bg, const act* C, i64 cb, i64 cg, const real* A, i64 ad, const real* fixedB,
             const real* fixedC, const real* D, const real* bias, act* y, i64 yb, int d_inner, int per_B, int per_C) {
  const int across = (d_inner + 128 / LANES - 1) / (128 / LANES);
  const int lane = threadIdx.x % LANES, d = int(blockIdx.x % across) * (128 / LANES) + threadIdx.x / LANES;
  const i64 b = blockIdx.x / across;
  if (d >= d_inner) return;  // the lanes of a channel go together
  real step = to_real(dt[b * tb + d]);
  const real x = to_real(u[b * ub + d]);
  if (bias) step += bias[d];
  if (SOFTPLUS) step = softplus(step);
  const real drive = step * x;
  real sum = 0;
#pragma unroll
  for (int n = lane * 4; n < NST; n += LANES * 4) {
    const int count = NST - n;
    const Four h = four(state + b * sb + d * sd + n, count), a = four(A + d * ad + n, count);
    const Four p = FIXB ? four(fixedB + i64(d) * NST + n, count) : four_acts(B + b * bb + (d / per_B) * bg + n, count);
    const Four q = FIXC ? four(fixedC + i64(d) * NST + n, count) : four_acts(C + b * cb + (d / per_C) * cg + n, count);
    Four out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      out.v[i] = fma_(decay(step, a.v[i] * LOG2E), h.v[i], drive * p.v[i]);
      if (i < count) sum = fma_(out.v[i], q.v[i], sum);
    }
    real* to = next + b * nb + d * nd + n;
    if (VECS) {
      *reinterpret_cast<Four*>(to) = out;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (i < count) to[i] = out.v[i];
    }
  }
  const u32 mates = LANES == 32 ? ~0u : ((1u << (LANES % 32)) - 1) << (threadIdx.x % 32 / LANES * LANES);
#pragma unroll
  for (int o = LANES / 2; o; o /= 2) sum += __shfl_xor_sync(mates, sum, o);
  if (lane) return;
  if (D) sum = fma_(D[d], x, sum);
#if HASZ
  sum *= silu(to_real(z[b * zb + d]));
#endif
  y[b * yb + d] = to_act(sum);
}
