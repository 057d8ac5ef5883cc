// Draws the next token of every row on the device: what `statescan.generate.sample` does, with a block a row.
//
// Order: repetition penalty, temperature, top-k, top-p, min-p, one draw. A filter becomes a threshold on the logits' keys
// (their bits, ordered), found eight bits at a time from histograms: of counts for top-k, of probability in whole multiples
// of 2^-44 for top-p, because integers add up to the same whatever the order. Of equal logits at a threshold the first ids
// stay. The draw inverts the distribution function, in the order of ids and in float64, at the number that Philox-4x64
// gives for (seed, stream, position): the row's own, whatever stands beside it.
#define THREADS 1024
#define WARPS 32
typedef unsigned long long u64;

struct alignas(8) Slot {  // mirrors generate/graphs.py
  u64 seed, stream, position;
  float temperature, top_p, log_min_p, penalty;
  int top_k, flags;  // 1: greedy, 2: the log probability is wanted
  u64 unused;
};

DEV u32 key_of(float v) {  // larger logits, larger keys; NaN below all
  const u32 b = __float_as_uint(v);
  return v != v ? 0u : b & 0x80000000u ? ~b : b | 0x80000000u;
}
DEV float value_of(u32 k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }

DEV u64 philox(u64 k0, u64 k1, u64 c0) {
  u64 c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
  for (int i = 0; i < 10; i++) {
    const u64 m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
    const u64 h0 = __umul64hi(m0, c0), l0 = m0 * c0, h1 = __umul64hi(m1, c2), l1 = m1 * c2;
    c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
    k0 += 0x9E3779B97F4A7C15ull; k1 += 0xBB67AE8584CAA73Bull;
  }
  return c0;
}

template <class T, class F> DEV T block_reduce(T v, T* parts, F join) {  // every thread gets it; order fixed
#pragma unroll
  for (int m = 16; m; m >>= 1) v = join(v, __shfl_xor_sync(~0u, v, m));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = parts[0];
  for (int i = 1; i < WARPS; i++) v = join(v, parts[i]);
  return v;
}

// Grid: rows, from `first` on. `seen` (slots, vocabulary) bytes or null; `work` (slots, vocabulary) float32; `ring` and
// `ring_logprob` (slots, ring_size) lie in the host's memory: a word there is the token under the number of the draw.
extern "C" __global__ void __launch_bounds__(THREADS, 1) draw(
    const float* __restrict__ logits, i64 logits_row, float* __restrict__ work, unsigned char* __restrict__ seen, int vocabulary,
    int first, Slot* __restrict__ slots, int* __restrict__ tokens, u32* __restrict__ draws, u64* __restrict__ ring,
    float* __restrict__ ring_logprob, int ring_size) {
  __shared__ u64 parts64[WARPS];
  __shared__ double partsd[WARPS];
  __shared__ u64 mass[256];
  __shared__ u32 counts[256];
  __shared__ u32 chosen_bin, found;
  __shared__ u64 before_bin;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, slot = first + blockIdx.x;
  Slot s = slots[slot];
  const float* row = logits + (i64)blockIdx.x * logits_row;
  float* mine = work + (i64)slot * vocabulary;
  unsigned char* seen_row = seen ? seen + (i64)slot * vocabulary : nullptr;
  const bool greedy = s.flags & 1, wants = s.flags & 2, penal = s.penalty != 1.f && seen_row;
  auto penalised = [&](int v) {
    const float x = row[v];
    return penal && seen_row[v] ? (x > 0.f ? x / s.penalty : x * s.penalty) : x;
  };
  auto larger = [](u64 a, u64 b) { return a > b ? a : b; };

  // the largest logit, the first of equals
  u64 best = 0;
  for (int v = tid; v < vocabulary; v += THREADS) best = larger(best, (u64)key_of(penalised(v)) << 32 | (0xffffffffu - v));
  best = block_reduce(best, parts64, larger);
  int token = (int)(0xffffffffu - (u32)best);
  const float top = value_of((u32)(best >> 32));

  if (!greedy) {
    // shifted first, so that a tiny temperature overflows to minus infinity and never to plus infinity
    const float peak = s.temperature == 1.f ? top : 0.f;
    for (int v = tid; v < vocabulary; v += THREADS) {
      const float x = penalised(v);
      mine[v] = s.temperature == 1.f ? x : (x - top) / s.temperature;
    }
    __syncthreads();
    // Keys of at least `low` stay; of those equal to it, the first `room`.
    u32 low = 0, room = 0xffffffffu;
    if (s.top_k > 0 && s.top_k < vocabulary) {
      u32 prefix = 0, left = s.top_k;  // the key sought begins with `prefix`; `left` of the keys that do are wanted
      for (int shift = 24; shift >= 0; shift -= 8) {
        if (tid < 256) counts[tid] = 0;
        __syncthreads();
        for (int v0 = 0; v0 < vocabulary; v0 += THREADS) {
          const int v = v0 + tid;
          const u32 k = v < vocabulary ? key_of(mine[v]) : 0u;
          const bool in = v < vocabulary && (shift == 24 || k >> (shift + 8) == prefix);
          const u32 bin = in ? k >> shift & 255u : 256u;
          const u32 same = __match_any_sync(~0u, bin);
          if (in && lane == __ffs(same) - 1) atomicAdd(&counts[bin], (u32)__popc(same));
        }
        __syncthreads();
        if (tid == 0) {
          u32 above = 0;
          int b = 255;
          while (b > 0 && above + counts[b] < left) above += counts[b--];
          chosen_bin = b;
          before_bin = above;
        }
        __syncthreads();
        prefix = prefix << 8 | chosen_bin;
        left -= (u32)before_bin;
        __syncthreads();
      }
      low = prefix;
      room = left;
    }
    // Whether token v passes: above the threshold, or one of the first `room` equals. Called with whole warps, ids in order.
    u32 equals = 0;
    auto count_equals = [&](int from, int to) {
      u32 n = 0;
      for (int v0 = from; v0 < to; v0 += 32) {
        const int v = v0 + lane;
        n += __popc(__ballot_sync(~0u, v < to && key_of(mine[v]) == low));
      }
      return n;
    };
    auto passes = [&](int v, int to) {
      const u32 k = v < to ? key_of(mine[v]) : 0u;
      const bool equal = v < to && k == low;
      const u32 same = __ballot_sync(~0u, equal);
      const bool in = v < to && (k > low || (equal && equals + __popc(same & ((1u << lane) - 1u)) < room));
      equals += __popc(same);
      return in;
    };
    const int each = ((vocabulary + WARPS - 1) / WARPS + 31) / 32 * 32, from = min(vocabulary, warp * each), to = min(vocabulary, from + each);
    auto equals_before = [&]() {  // the equals in the shares of the warps before this one
      const u32 n = room == 0xffffffffu ? 0 : count_equals(from, to);
      __syncthreads();
      if (lane == 0) parts64[warp] = n;
      __syncthreads();
      equals = 0;
      for (int i = 0; i < warp; i++) equals += (u32)parts64[i];
      __syncthreads();
    };
    // What top-k leaves out becomes minus infinity, and so on: the next filter finds only what stays.
    auto apply = [&]() {
      equals_before();
      for (int v0 = from; v0 < to; v0 += 32) {
        const bool in = passes(v0 + lane, to);
        if (v0 + lane < to && !in) mine[v0 + lane] = -__int_as_float(0x7f800000);
      }
      __syncthreads();
    };
    if (low) apply();
    if (s.top_p < 1.f) {
      auto weight = [&](int v) { return (u64)(exp((double)mine[v] - (double)peak) * 17592186044416.0); };  // 2^44
      auto add = [](u64 a, u64 b) { return a + b; };
      u64 total = 0;
      for (int v = tid; v < vocabulary; v += THREADS) total += weight(v);
      total = block_reduce(total, parts64, add);
      // Tokens stay while those before them hold less than this.
      const u64 wanted = (u64)((double)s.top_p * (double)total);
      u32 prefix = 0;
      u64 left = wanted ? wanted : 1;
      for (int shift = 24; shift >= 0; shift -= 8) {
        if (tid < 256) mass[tid] = 0;
        __syncthreads();
        for (int v = tid; v < vocabulary; v += THREADS) {
          const u32 k = key_of(mine[v]);
          if (shift != 24 && k >> (shift + 8) != prefix) continue;
          const u64 m = weight(v);
          if (m) atomicAdd(&mass[k >> shift & 255u], m);
        }
        __syncthreads();
        if (tid == 0) {
          u64 above = 0;
          int b = 255;
          while (b > 0 && above + mass[b] < left) above += mass[b--];
          if (mass[b] == 0) while (b < 255 && mass[b] == 0) b++;  // nothing reaches it: the smallest there is
          chosen_bin = b;
          before_bin = above;
        }
        __syncthreads();
        prefix = prefix << 8 | chosen_bin;
        left -= min(before_bin, left - 1);
        __syncthreads();
      }
      low = prefix;
      const u64 one = (u64)(exp((double)value_of(low) - (double)peak) * 17592186044416.0);
      room = one ? (u32)min((left + one - 1) / one, (u64)0x7fffffff) : 0x7fffffffu;
      room = max(room, 1u);
      apply();
    }
    if (s.log_min_p > -__int_as_float(0x7f800000)) {
      const float bound = peak + s.log_min_p;
      for (int v = tid; v < vocabulary; v += THREADS) if (mine[v] < bound) mine[v] = -__int_as_float(0x7f800000);
      __syncthreads();
    }
    // The distribution function: sums of the warps' shares, then the one in which it is reached, 32 ids at a time.
    double sum = 0;
    for (int v0 = from; v0 < to; v0 += 32) sum += v0 + lane < to ? exp((double)mine[v0 + lane] - (double)peak) : 0.0;
#pragma unroll
    for (int m = 16; m; m >>= 1) sum += __shfl_xor_sync(~0u, sum, m);
    __syncthreads();
    if (lane == 0) partsd[warp] = sum;
    if (tid == 0) found = 0xffffffffu;
    __syncthreads();
    double whole = 0, start = 0;
    for (int i = 0; i < WARPS; i++) {
      if (i == warp) start = whole;
      whole += partsd[i];
    }
    const double at = (double)(philox(s.seed, s.stream, s.position + 1) >> 11) * 0x1p-53 * whole;
    // The last share that has any probability takes what rounding leaves over.
    bool is_last = sum > 0;
    for (int i = warp + 1; i < WARPS; i++) is_last = is_last && !(partsd[i] > 0);
    if (sum > 0 && at >= start && (at < start + sum || is_last)) {
      double run = start;
      int last = -1;
      u32 hit = 0xffffffffu;
      for (int v0 = from; v0 < to && hit == 0xffffffffu; v0 += 32) {
        const double p = v0 + lane < to ? exp((double)mine[v0 + lane] - (double)peak) : 0.0;
        double c = p;
#pragma unroll
        for (int m = 1; m < 32; m <<= 1) {
          const double o = __shfl_up_sync(~0u, c, m);
          if (lane >= m) c += o;
        }
        const u32 over = __ballot_sync(~0u, p > 0 && run + c > at), any = __ballot_sync(~0u, p > 0);
        if (any) last = v0 + 31 - __clz(any);
        if (over) hit = v0 + __ffs(over) - 1;
        run += __shfl_sync(~0u, c, 31);
      }
      if (hit == 0xffffffffu && last >= 0) hit = last;
      if (lane == 0) atomicMin(&found, hit);
    }
    __syncthreads();
    if (found != 0xffffffffu) token = (int)found;  // else no logit is finite: the first id, as for greedy
  }

  float logprob = 0.f;
  if (wants) {
    double high = -1e300, sum = 0;
    for (int v = tid; v < vocabulary; v += THREADS) high = fmax(high, (double)row[v]);
    high = block_reduce(high, partsd, [](double a, double b) { return fmax(a, b); });
    for (int v = tid; v < vocabulary; v += THREADS) sum += exp((double)row[v] - high);
    sum = block_reduce(sum, partsd, [](double a, double b) { return a + b; });
    logprob = (float)((double)row[token] - high - log(sum));
  }
  if (tid == 0) {
    const u32 number = draws[slot] + 1;
    draws[slot] = number;
    tokens[slot] = token;
    slots[slot].position = s.position + 1;
    if (seen_row) seen_row[token] = 1;
    const i64 at = (i64)slot * ring_size + number % ring_size;
    if (wants) {
      *(volatile float*)&ring_logprob[at] = logprob;
      __threadfence_system();
    }
    *(volatile u64*)&ring[at] = (u64)number << 32 | (u32)token;
  }
}
