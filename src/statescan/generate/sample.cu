// Draws the next token of every row on the device: what `statescan.generate.sample` does, with a cluster of CL blocks a row.
//
// Order: repetition penalty, temperature, top-k, top-p, min-p, one draw. A row's logits stay in registers, ITEMS a thread. A
// filter becomes a threshold on their keys (their bits, ordered), found eight bits at a time from histograms: of counts for
// top-k, of probability for top-p. Of equal logits at a threshold the first ids stay. Probabilities are whole multiples of
// 2^-44 of the largest: integers add up to the same whatever the order, and the draw, which inverts the distribution
// function in the order of ids, meets exactly one token. The number it takes is Philox-4x64's for (seed, stream, position):
// the row's own, whatever stands beside it.
#define THREADS 1024
#define WARPS 32
#ifndef CL
#define CL 8     // blocks of a row
#endif
#ifndef ITEMS
#define ITEMS 7  // logits of a thread
#endif
#define MINUS_INFINITY __int_as_float(0xff800000)

struct alignas(8) Slot {  // mirrors generate/graphs.py
  u64 seed, stream, position;
  float temperature, top_p, log_min_p, penalty;
  int top_k, flags;  // 1: greedy, 2: the log probability is wanted
  u64 unused;
};

struct Shared {
  u64 exchange[2];           // a number for all blocks, in turns
  u32 counts[2][256];        // histograms, in turns
  u32 mass[2][3][256];       // probability in limbs of 15 bits, whose sums fit 32
  u64 bins[256];
  u64 parts[WARPS];
  u64 shares[ITEMS][WARPS];  // of a prefix sum: what the warps hold, item by item
  u64 before;
  int bin;
};

DEV u32 key_of(float v) {  // larger logits, larger keys; NaN above all, so that the largest tells of it
  const u32 b = __float_as_uint(v);
  return v != v ? 0xffffffffu : b & 0x80000000u ? ~b : b | 0x80000000u;
}
DEV float value_of(u32 k) { return __uint_as_float(k & 0x80000000u ? k & 0x7fffffffu : ~k); }
DEV u64 weight_of(float v, float peak) { return __float2ull_rz(exp_down(v - peak) * 17592186044416.f); }  // 0 for NaN

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

DEV void cluster_sync() {  // of all threads of all blocks of the row
  if (CL == 1) __syncthreads();
  else asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEV u32 remote(const void* p, int rank) {  // where `p` lies in another block
  u32 a = (u32)__cvta_generic_to_shared(p);
  if (CL > 1) asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(a) : "r"(rank));
  return a;
}
DEV u32 remote_word(const u32* p, int rank) {
  u32 v;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(remote(p, rank)) : "memory");
  return v;
}
DEV u64 remote_long(const u64* p, int rank) {
  u64 v;
  asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(v) : "r"(remote(p, rank)) : "memory");
  return v;
}
DEV u64 joined(bool largest, u64 a, u64 b) { return largest ? (a > b ? a : b) : a + b; }

// The sum or maximum over the row, known to all its threads. Two turns alternate, so nobody writes what another still reads.
DEV u64 row_reduce(Shared& sh, int& turn, bool largest, u64 v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) v = joined(largest, v, __shfl_xor_sync(~0u, v, m));
  if (threadIdx.x % 32 == 0) sh.parts[threadIdx.x / 32] = v;
  __syncthreads();
  v = sh.parts[threadIdx.x % 32];
#pragma unroll
  for (int m = 16; m; m >>= 1) v = joined(largest, v, __shfl_xor_sync(~0u, v, m));
  if (CL == 1) { __syncthreads(); return v; }
  if (threadIdx.x == 0) sh.exchange[turn] = v;
  cluster_sync();
  v = remote_long(&sh.exchange[turn], 0);
#pragma unroll
  for (int r = 1; r < CL; r++) v = joined(largest, v, remote_long(&sh.exchange[turn], r));
  turn ^= 1;
  return v;
}

// For every item the sum over all ids before it; ids go by block, item, thread. Returns the row's sum.
DEV u64 row_prefix(Shared& sh, int& turn, int rank, const u64 (&v)[ITEMS], u64 (&prefix)[ITEMS]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    u64 s = v[i];
#pragma unroll
    for (int m = 1; m < 32; m <<= 1) {
      const u64 o = __shfl_up_sync(~0u, s, m);
      if (lane >= m) s += o;
    }
    prefix[i] = s - v[i];
    if (lane == 31) sh.shares[i][warp] = s;
  }
  __syncthreads();
  u64 run = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const u64 mine = sh.shares[i][lane];
    u64 s = mine;
#pragma unroll
    for (int m = 1; m < 32; m <<= 1) {
      const u64 o = __shfl_up_sync(~0u, s, m);
      if (lane >= m) s += o;
    }
    prefix[i] += run + __shfl_sync(~0u, s - mine, warp);
    run += __shfl_sync(~0u, s, 31);
  }
  u64 whole = run;
  if (CL > 1) {
    if (threadIdx.x == 0) sh.exchange[turn] = run;
    cluster_sync();
    u64 before = 0;
    whole = 0;
#pragma unroll
    for (int r = 0; r < CL; r++) {
      const u64 o = remote_long(&sh.exchange[turn], r);
      if (r < rank) before += o;
      whole += o;
    }
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) prefix[i] += before;
  } else {
    __syncthreads();
  }
  return whole;
}

// The bin in which the sum from the top reaches `wanted` (the lowest with anything in it, if none does), and the sum above.
DEV void choose_bin(Shared& sh, u64 wanted) {
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    u64 own[8], sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) sum += own[j] = sh.bins[255 - 8 * lane - j];
    u64 upto = sum;
#pragma unroll
    for (int m = 1; m < 32; m <<= 1) {
      const u64 o = __shfl_up_sync(~0u, upto, m);
      if (lane >= m) upto += o;
    }
    u64 above = upto - sum;
    int bin = -1;
    u64 at = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      if (bin < 0 && own[j] && above + own[j] >= wanted) { bin = 255 - 8 * lane - j; at = above; }
      if (bin < 0) above += own[j];
    }
    const u32 reach = __ballot_sync(~0u, bin >= 0), any = __ballot_sync(~0u, sum > 0);
    if (reach) {
      if (lane == __ffs(reach) - 1) { sh.bin = bin; sh.before = at; }
    } else if (lane == (any ? 31 - __clz(any) : 0)) {
      int low = 0;
      u64 rest = 0;
#pragma unroll
      for (int j = 0; j < 8; j++) if (own[j]) { low = 255 - 8 * lane - j; rest = own[j]; }
      sh.bin = low;
      sh.before = upto - rest;
    }
  }
  __syncthreads();
}

// Grid: clusters, one a row, from slot `first` on. `seen` (slots, vocabulary) bytes. `ring` and `ring_logprob` (slots,
// ring_size) lie in the host's memory: a word there is the token under the number of the draw, all ones where the logits are
// no numbers to draw from.
extern "C" __global__ void __launch_bounds__(THREADS, 1) draw(
    const float* __restrict__ logits, i64 logits_row, unsigned char* __restrict__ seen, int vocabulary, int first,
    Slot* __restrict__ slots, int* __restrict__ tokens, u32* __restrict__ draws, u64* __restrict__ ring,
    float* __restrict__ ring_logprob, int ring_size) {
  __shared__ Shared sh;
  const int tid = threadIdx.x, rank = blockIdx.x % CL, at_row = blockIdx.x / CL, slot = first + at_row;
  const Slot s = slots[slot];
  const float* row = logits + (i64)at_row * logits_row;
  unsigned char* seen_row = seen + (i64)slot * vocabulary;
  const bool greedy = s.flags & 1, wants = s.flags & 2, penal = s.penalty != 1.f;
  const u32 number = draws[slot] + 1;
  int turn = 0, id0 = rank * ITEMS * THREADS + tid;
  float x[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) x[i] = id0 + i * THREADS < vocabulary ? row[id0 + i * THREADS] : MINUS_INFINITY;

  double log_sum = 0;  // of the model's own probabilities, over the largest
  float raw_top = 0.f;
  if (wants) {
    u64 best = 0, sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) best = max(best, (u64)key_of(x[i]));
    raw_top = value_of((u32)row_reduce(sh, turn, true, best));
#pragma unroll
    for (int i = 0; i < ITEMS; i++) sum += weight_of(x[i], raw_top);
    log_sum = log((double)row_reduce(sh, turn, false, sum) * 0x1p-44);
  }
  if (penal) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
      if (id0 + i * THREADS < vocabulary && seen_row[id0 + i * THREADS]) x[i] = x[i] > 0.f ? x[i] / s.penalty : x[i] * s.penalty;
  }
  // the largest logit, the first of equals
  u64 best = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; i++)
    if (id0 + i * THREADS < vocabulary) best = max(best, (u64)key_of(x[i]) << 32 | (0xffffffffu - (id0 + i * THREADS)));
  best = row_reduce(sh, turn, true, best);
  int token = (int)(0xffffffffu - (u32)best);
  bool won = rank == 0 && tid == 0;  // the thread that writes the token
  float top = value_of((u32)(best >> 32));
  const bool broken = !(fabsf(top) < -MINUS_INFINITY);  // nan or infinity somewhere, or nothing may be drawn

  if (!greedy && !broken) {
    if (s.temperature != 1.f) {
      // shifted first, so that a tiny temperature overflows to minus infinity and never to plus infinity
#pragma unroll
      for (int i = 0; i < ITEMS; i++) x[i] = (x[i] - top) / s.temperature;
      top = 0.f;
    }
    // Of the keys equal to `low` the first `room` stay, all above, none below.
    auto keep = [&](u32 low, u64 room) {
      u64 equal[ITEMS], before[ITEMS];
#pragma unroll
      for (int i = 0; i < ITEMS; i++) equal[i] = key_of(x[i]) == low && id0 + i * THREADS < vocabulary;
      row_prefix(sh, turn, rank, equal, before);
#pragma unroll
      for (int i = 0; i < ITEMS; i++)
        if (key_of(x[i]) < low || (equal[i] && before[i] >= room)) x[i] = MINUS_INFINITY;
    };
    if (s.top_k > 0 && s.top_k < vocabulary) {
      u32 prefix = 0;
      u64 left = s.top_k;  // of the keys that begin with `prefix`, so many are wanted
      for (int shift = 24; shift >= 0; shift -= 8) {
        const int h = shift / 8 & 1;
        if (tid < 256) sh.counts[h][tid] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
          const u32 k = key_of(x[i]);
          if (id0 + i * THREADS < vocabulary && (shift == 24 || k >> (shift + 8) == prefix)) atomicAdd(&sh.counts[h][k >> shift & 255u], 1u);
        }
        cluster_sync();
        if (tid < 256) {
          u64 sum = 0;
#pragma unroll
          for (int r = 0; r < CL; r++) sum += remote_word(&sh.counts[h][tid], r);
          sh.bins[tid] = sum;
        }
        __syncthreads();
        choose_bin(sh, left);
        prefix = prefix << 8 | (u32)sh.bin;
        left -= sh.before;
      }
      keep(prefix, left);
    }
    if (s.top_p < 1.f) {
      u64 weight[ITEMS], total = 0;
#pragma unroll
      for (int i = 0; i < ITEMS; i++) total += weight[i] = weight_of(x[i], top);
      total = row_reduce(sh, turn, false, total);
      // Tokens stay while those before them hold less than this.
      u64 left = max((u64)((double)s.top_p * (double)total), 1ull);
      u32 prefix = 0;
      for (int shift = 24; shift >= 0; shift -= 8) {
        const int h = shift / 8 & 1;
        if (tid < 256) sh.mass[h][0][tid] = sh.mass[h][1][tid] = sh.mass[h][2][tid] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
          const u32 k = key_of(x[i]), bin = k >> shift & 255u;
          if (weight[i] && (shift == 24 || k >> (shift + 8) == prefix)) {
#pragma unroll
            for (int j = 0; j < 3; j++) {
              const u32 limb = (u32)(weight[i] >> 15 * j) & 0x7fffu;
              if (limb) atomicAdd(&sh.mass[h][j][bin], limb);
            }
          }
        }
        cluster_sync();
        if (tid < 256) {
          u64 sum = 0;
#pragma unroll
          for (int r = 0; r < CL; r++)
#pragma unroll
            for (int j = 0; j < 3; j++) sum += (u64)remote_word(&sh.mass[h][j][tid], r) << 15 * j;
          sh.bins[tid] = sum;
        }
        __syncthreads();
        choose_bin(sh, left);
        prefix = prefix << 8 | (u32)sh.bin;
        left -= min(sh.before, left - 1);
      }
      const u64 one = max(weight_of(value_of(prefix), top), 1ull);
      keep(prefix, (left + one - 1) / one);
    }
    if (s.log_min_p > MINUS_INFINITY) {
#pragma unroll
      for (int i = 0; i < ITEMS; i++) if (x[i] < top + s.log_min_p) x[i] = MINUS_INFINITY;
    }
    u64 weight[ITEMS], before[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) weight[i] = weight_of(x[i], top);
    const u64 whole = row_prefix(sh, turn, rank, weight, before);
    // floor(u whole) for u = bits / 2^53
    const u64 bits = philox(s.seed, s.stream, s.position + 1) >> 11;
    const u64 at = __umul64hi(bits << 11, whole);
    won = false;
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
      if (at >= before[i] && at < before[i] + weight[i]) { token = id0 + i * THREADS; won = true; }
  }

  if (won) {
    draws[slot] = number;
    tokens[slot] = broken ? 0 : token;
    slots[slot].position = s.position + 1;
    if (!broken) seen_row[token] = 1;
    const i64 place = (i64)slot * ring_size + number % ring_size;
    if (wants && !broken) {
      *(volatile float*)&ring_logprob[place] = (float)((double)row[token] - (double)raw_top - log_sum);
      __threadfence_system();
    }
    *(volatile u64*)&ring[place] = (u64)number << 32 | (broken ? 0xffffffffu : (u32)token);
  }
  cluster_sync();  // nobody leaves while another may read its memory
}
