// Softmax of a chunk of logits and its cross-entropy, one block a row: the row's loss goes out, and in place of the logits
// comes the loss's gradient, (softmax - onehot) * scale. A row is read once where it fits into shared memory, twice so that
// one block computes while another loads (HOLD), else twice. Sums are taken in one fixed order: the same bits in every run.
#ifndef NT
#define NT 512
#endif
#ifndef HOLD
#define HOLD 0
#endif
#ifndef MINB
#define MINB 1
#endif
#ifndef VEC
#define VEC 1  // rows are aligned to 16 bytes and of whole pieces
#endif
#ifndef BIAS
#define BIAS 0
#endif
#define WARPS (NT / 32)
#define NONE (-real(1) / real(0))

#if IN == 1 || IN == 2
// What is rounded to 16 bits afterwards; `log2` counts in powers of two.
DEV real unit(real x) { return x * LOG2E; }
DEV real power(real x) { return ex2(x); }
DEV real natural(real x) { return x * LN2; }
DEV real logarithm(real x) { return log2f(x); }
#elif IN == 0
DEV real unit(real x) { return x; }
DEV real power(real x) { return exp_down(x); }
DEV real natural(real x) { return x; }
DEV real logarithm(real x) { return logf(x); }
#else
DEV real unit(real x) { return x; }
DEV real power(real x) { return exp(x); }
DEV real natural(real x) { return x; }
DEV real logarithm(real x) { return log(x); }
#endif
DEV real larger(real a, real b) {
#if IN == 3
  return a > b || a != a ? a : b;
#else
  return max_nan(a, b);
#endif
}

// The greatest number so far and the sum of the powers under it.
struct Peak { real top, sum; };
// Where both are -inf their difference is no number, but then both sums are zero.
DEV Peak join(Peak a, Peak b) {
  const real top = larger(a.top, b.top), base = top == NONE ? real(0) : top;
  return Peak{top, fma_(a.sum, power(a.top - base), b.sum * power(b.top - base))};
}
DEV Peak other_lane(Peak a, int m) { return Peak{__shfl_xor_sync(~0u, a.top, m), __shfl_xor_sync(~0u, a.sum, m)}; }

extern "C" __global__ void __launch_bounds__(NT, MINB) softmax_gradient(
    act* __restrict__ logits, i64 row_stride, const i64* __restrict__ targets, const real* __restrict__ bias,
    const real* __restrict__ scale, real* __restrict__ losses, i64 vocabulary, int wanted) {
  __shared__ Peak peaks[WARPS];
  const int tid = threadIdx.x;
  const i64 row = blockIdx.x, target = targets[row];
  act* x = logits + row * row_stride;
  const i64 pieces = (vocabulary + 7) / 8;
  auto store = [&](i64 p, const Pack8& r) { store8(x + 8 * p, r, VEC ? 8 : (int)min(i64(8), vocabulary - 8 * p), VEC); };
  if (target == -(i64(1) << 62)) {  // not counted: what the logits were does not matter, not even NaN
    if (tid == 0) losses[row] = real(0);
    if (wanted) for (i64 p = tid; p < pieces; p += NT) store(p, Pack8{});
    return;
  }
#if !HOLD
  auto load = [&](i64 p) { return load8(x + 8 * p, VEC ? 8 : (int)min(i64(8), vocabulary - 8 * p), VEC); };
#endif
  auto value = [&](const Pack8& r, i64 p, int j) {
    const i64 v = 8 * p + j;
    if (!VEC && v >= vocabulary) return NONE;
    return unit(BIAS ? part(r, j) + bias[v] : part(r, j));
  };
  Peak mine{NONE, real(0)};
  auto take = [&](const Pack8& r, i64 p) {
    real v[8], top = mine.top;
#pragma unroll
    for (int j = 0; j < 8; j++) top = larger(top, v[j] = value(r, p, j));
    // A row of -inf alone has no softmax, but -inf beside numbers is a probability of zero.
    const real base = top == NONE ? real(0) : top;
    real sum = mine.sum * power(mine.top - base);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += power(v[j] - base);
    mine = Peak{top, sum};
  };
#if HOLD
  // Every thread brings the pieces that it looks at itself, so nobody waits for anybody.
  extern __shared__ __align__(16) Pack8 held[];
  for (int p = tid; p < pieces; p += NT) {
    const u32 to = (u32)__cvta_generic_to_shared(held + p);
#pragma unroll
    for (int i = 0; i < (int)sizeof(Pack8); i += 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i), "l"((const char*)(x + 8 * (i64)p) + i) : "memory");
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 2
  for (int p = tid; p < pieces; p += NT) take(held[p], p);
#else
  for (i64 p = tid; p < pieces; p += NT) take(load(p), p);
#endif
#pragma unroll
  for (int m = 16; m > 0; m >>= 1) mine = join(mine, other_lane(mine, m));
  if (tid % 32 == 0) peaks[tid / 32] = mine;
  // The target's logit, before the gradient takes its place.
  const bool fits = target >= 0 && target < vocabulary;
  const real aim = fits ? unit(BIAS ? to_real(x[target]) + bias[target] : to_real(x[target])) : real(0);
  __syncthreads();
  mine = peaks[0];
#pragma unroll
  for (int w = 1; w < WARPS; w++) mine = join(mine, peaks[w]);
  // Taken relative to the greatest logit, so that nothing of the small loss of a sure guess cancels away.
  const real rest = logarithm(mine.sum);
  if (tid == 0) losses[row] = fits ? natural(rest + (mine.top - aim)) : real(0) / real(0);
  if (!wanted) return;
  const real by = fits ? scale[row] : real(0) / real(0), inverse = by / mine.sum;
  auto give = [&](const Pack8& r, i64 p) {
    Pack8 g;
    real v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = power(value(r, p, j) - mine.top) * inverse;
    if (p == target / 8) {
#pragma unroll
      for (int j = 0; j < 8; j++) if (j == target % 8) v[j] -= by;
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) set_pair(g, j, v[j], v[j + 1]);
    store(p, g);
  };
#if HOLD
#pragma unroll 2
  for (int p = tid; p < pieces; p += NT) give(held[p], p);
#else
  for (i64 p = tid; p < pieces; p += NT) give(load(p), p);
#endif
}
