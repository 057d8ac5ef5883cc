// What lies between in_proj and out_proj in a decoding step of several rows: convolution, x_proj, dt_proj, state and gate in
// one launch. A block owns CE channels of all rows.
//
// The states are most of what a step moves, and nothing but their use waits for the sums over channels. So a warp streams
// them into a ring of shared memory from the start, by bulk copies, while the others convolve, give their channels' part of
// x_proj's sums to all, meet, add up the parts of a few sums each, meet again, and make dt of their own channels. Products
// run on tensor cores, sums are float32 and have an order that the shape fixes: a row doesn't depend on its company.
//
// All blocks must be resident at once: launch cooperatively. Macros: IN (1 bfloat16, 2 float16), E d_inner, R dt_rank,
// W width, CE channels of a block, ROWS most rows (a multiple of 16), SLOTS of the ring, FLIGHT of them asked for at once.
#define N 16
#define X (R + 2 * N)
#define NT 512                     // threads that compute; one warp more streams
#define WARPS (NT / 32)
#define THREADS (NT + 32)
#define BLOCKS (E / CE)
#define OCTETS (CE / 8)            // a warp takes eight channels of a row, four lanes a channel
#define TOGETHER (WARPS / OCTETS)  // rows that the block takes at once
#ifndef PER
#define PER 2                      // times that, in a slot: what a thread waits for, it waits for together
#endif
#define SLOT_ROWS (PER * TOGETHER)
#define SLOT (SLOT_ROWS * CE * N * 4)
#define GROUPS 8                   // partial sums over the blocks' parts
#define UNITS ((ROWS * X / 4 + BLOCKS - 1) / BLOCKS)  // of four sums, that a block adds up, at most
#define X_ROW (CE + 8)             // of x_proj in shared memory: shifted, so that eight rows lie in different banks
#define DT_ROW (R + 8)             // of dt_proj, too
#define PAIRS (CE / 2)
#define ITEMS ((ROWS * PAIRS + NT - 1) / NT)
#define MAX2(a, b) ((a) > (b) ? (a) : (b))
#ifndef EARLY
#define EARLY 0
#endif
#ifndef HINT
#define HINT 1
#endif
#ifndef CS
#define CS 1
#endif
#ifndef HOLD
#define HOLD 0
#endif
typedef unsigned long long u64;

struct Shared {
  u64 full[SLOTS], empty[SLOTS];
  alignas(16) u32 uz[ROWS][CE];              // u and the gate, 16 bits each
  union {
    float dt[ROWS][CE];
    float4 groups[GROUPS][UNITS];            // before dt is there
  };
  alignas(16) float bc[ROWS][2 * N];
  alignas(16) act dt_proj[CE][DT_ROW];
  alignas(16) act x_proj[X][X_ROW];
};

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
DEV void sync() { asm volatile("bar.sync 1, %0;" ::"n"(NT) : "memory"); }

// What other blocks of this launch have written is read past the first-level cache.
DEV uint4 fresh4(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEV uint2 fresh2(const void* p) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
// `count` more of what the others wait for is there: all threads' writes before.
DEV void announce(u32* counter) {
  sync();
  if (threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
DEV void await(const u32* counter, u32 count) {
  if (threadIdx.x == 0) {
    u32 v;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(counter) : "memory"); while (v < count);
  }
  sync();
}
// acc (16, 8) += a (16, 16) b (8, 16)^T; lane 4 g + t holds of row g and g + 8 of a and of row g of b any four columns, the
// same in all: a sum over columns doesn't ask for their order.
DEV void mma(float (&acc)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if IN == 1
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
               : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) middle_step(
    const act* __restrict__ uz, float* __restrict__ conv_state, float* __restrict__ state, const float* __restrict__ conv,
    const float* __restrict__ conv_bias, const act* __restrict__ x_proj, const float* __restrict__ x_bias,
    const act* __restrict__ dt_proj, const float* __restrict__ dt_bias, const float* __restrict__ A,
    const float* __restrict__ skip, float* parts, act* low, float* bc, act* __restrict__ y, u32* counters, int rows) {
  extern __shared__ __align__(128) char memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, block = blockIdx.x, c0 = block * CE;
  const int slots = (rows + SLOT_ROWS - 1) / SLOT_ROWS, row_tiles = (rows + 15) / 16;
  u32 *given = counters, *summed = counters + 32, *gone = counters + 64;
  if (tid == 0) {
    for (int i = 0; i < SLOTS; i++) {
      bar_init(&sh.full[i], 1);
      bar_init(&sh.empty[i], WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (warp == WARPS) {  // streams the states
#if HOLD
    asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory");
#endif
    if (lane == 0) {
      u64 policy;
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
      for (int s = 0; s < slots; s++) {
        const int slot = s % SLOTS, r0 = s * SLOT_ROWS, n = min(SLOT_ROWS, rows - r0);
        if (s >= FLIGHT) bar_wait(&sh.full[(s - FLIGHT) % SLOTS], (s - FLIGHT) / SLOTS & 1);
        if (s >= SLOTS) bar_wait(&sh.empty[slot], (s / SLOTS - 1) & 1);
        bar_expect(&sh.full[slot], n * CE * N * 4);
        for (int r = 0; r < n; r++)
#if HINT
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                       ::"r"(address(memory + slot * SLOT + r * CE * N * 4)), "l"(state + ((i64)(r0 + r) * E + c0) * N),
                       "r"(CE * N * 4), "r"(address(&sh.full[slot])), "l"(policy) : "memory");
#else
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                       ::"r"(address(memory + slot * SLOT + r * CE * N * 4)), "l"(state + ((i64)(r0 + r) * E + c0) * N),
                       "r"(CE * N * 4), "r"(address(&sh.full[slot])) : "memory");
#endif
      }
    }
    return;
  }

#if EARLY
  asm volatile("griddepcontrol.wait;" ::: "memory");  // the launch began before its inputs were there
#endif
  // u = silu(conv(u)); the state keeps the last W - 1 inputs. A thread takes two channels of a row at a time.
  {
    u32 now[ITEMS], gate[ITEMS];
    float2 past[ITEMS][W - 1];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int item = tid + i * NT, r = item / PAIRS, c = c0 + item % PAIRS * 2;
      if (r >= rows) continue;
      now[i] = *reinterpret_cast<const u32*>(uz + (i64)r * 2 * E + c);
      gate[i] = *reinterpret_cast<const u32*>(uz + (i64)r * 2 * E + E + c);
#pragma unroll
      for (int k = 0; k < W - 1; k++) past[i][k] = *reinterpret_cast<const float2*>(conv_state + ((i64)r * (W - 1) + k) * E + c);
    }
    for (int i = tid; i < CE * (R / 8); i += NT) {
      const int c = i / (R / 8), k = i % (R / 8) * 8;
      *reinterpret_cast<uint4*>(&sh.dt_proj[c][k]) = *reinterpret_cast<const uint4*>(dt_proj + (i64)(c0 + c) * R + k);
    }
    for (int i = tid; i < X * (CE / 8); i += NT) {
      const int o = i / (CE / 8), c = i % (CE / 8) * 8;
      *reinterpret_cast<uint4*>(&sh.x_proj[o][c]) = *reinterpret_cast<const uint4*>(x_proj + (i64)o * E + c0 + c);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int item = tid + i * NT, r = item / PAIRS, p = item % PAIRS * 2, c = c0 + p;
      if (r >= rows) continue;
      float2 s = conv_bias ? *reinterpret_cast<const float2*>(conv_bias + c) : make_float2(0.f, 0.f);
      const float2 fresh = make_float2(to_real(act(now[i])), to_real(act(now[i] >> 16)));
#pragma unroll
      for (int k = 0; k < W; k++) {
        const float2 v = k < W - 1 ? past[i][k < W - 1 ? k : 0] : fresh;
        s.x = fmaf(conv[(i64)c * W + k], v.x, s.x);
        s.y = fmaf(conv[(i64)c * W + W + k], v.y, s.y);
        if (k > 0) *reinterpret_cast<float2*>(conv_state + ((i64)r * (W - 1) + k - 1) * E + c) = v;
      }
      const u32 a = to_act(silu(s.x)), b = to_act(silu(s.y));
      *reinterpret_cast<uint2*>(&sh.uz[r][p]) = make_uint2(a | gate[i] << 16, b | (gate[i] & 0xffff0000u));
    }
  }
#if HOLD
  asm volatile("bar.arrive 2, %0;" ::"n"(THREADS) : "memory");
#endif
  sync();

  // This block's part of x_proj's sums
  const int g = lane / 4, t = lane % 4;
  const i64 sums = (i64)rows * X;
  for (int i = warp; i < row_tiles * (X / 8); i += WARPS) {
    const int r0 = i % row_tiles * 16, o = i / row_tiles * 8;
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int k = 0; k < (CE + 15) / 16; k++) {
      const int c = k * 16 + t * 4;
      const bool in = CE % 16 == 0 || c < CE;
      const uint4 none = make_uint4(0, 0, 0, 0);
      const uint4 a = in ? *reinterpret_cast<const uint4*>(&sh.uz[r0 + g][c]) : none;
      const uint4 b = in ? *reinterpret_cast<const uint4*>(&sh.uz[r0 + g + 8][c]) : none;
      const uint2 w = in ? *reinterpret_cast<const uint2*>(&sh.x_proj[o + g][c]) : make_uint2(0, 0);
      mma(acc, __byte_perm(a.x, a.y, 0x5410), __byte_perm(b.x, b.y, 0x5410), __byte_perm(a.z, a.w, 0x5410),
          __byte_perm(b.z, b.w, 0x5410), w.x, w.y);
    }
    float* to = parts + block * sums + (i64)(r0 + g) * X + o + 2 * t;
    if (r0 + g < rows) *reinterpret_cast<float2*>(to) = make_float2(acc[0], acc[1]);
    if (r0 + g + 8 < rows) *reinterpret_cast<float2*>(to + 8 * X) = make_float2(acc[2], acc[3]);
  }
  announce(given);
  await(given, BLOCKS);

  // The sums that are this block's to add up
  {
    const int all = (int)(sums / 4), units = (all + BLOCKS - 1) / BLOCKS, first = block * units;
    const int mine = max(0, min(units, all - first));
    for (int i = tid; i < GROUPS * mine; i += NT) {
      const int group = i / mine, unit = i % mine;
      const float* from = parts + group * sums + (i64)(first + unit) * 4;
      uint4 v[BLOCKS / GROUPS];
#pragma unroll
      for (int k = 0; k < BLOCKS / GROUPS; k++) v[k] = fresh4(from + k * GROUPS * sums);
      float4 s = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int k = 0; k < BLOCKS / GROUPS; k++) {
        s.x += __uint_as_float(v[k].x);
        s.y += __uint_as_float(v[k].y);
        s.z += __uint_as_float(v[k].z);
        s.w += __uint_as_float(v[k].w);
      }
      sh.groups[group][unit] = s;
    }
    sync();
    for (int unit = tid; unit < mine; unit += NT) {
      const int r = (first + unit) * 4 / X, o = (first + unit) * 4 % X;
      float4 s = x_bias ? *reinterpret_cast<const float4*>(x_bias + o) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int k = 0; k < GROUPS; k++) {
        const float4 v = sh.groups[k][unit];
        s.x += v.x; s.y += v.y; s.z += v.z; s.w += v.w;
      }
      if (o < R)
        *reinterpret_cast<uint2*>(low + r * R + o) = make_uint2(u32(to_act(s.x)) | u32(to_act(s.y)) << 16, u32(to_act(s.z)) | u32(to_act(s.w)) << 16);
      else
        *reinterpret_cast<float4*>(bc + r * 2 * N + o - R) = s;
    }
  }
  announce(summed);
  await(summed, BLOCKS);
  if (tid == 0) {  // every block has seen all it waits for: the last one makes the counters ready for the next launch
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(gone) : "memory");
    if (before == BLOCKS - 1) *given = *summed = *gone = 0;
  }

  // dt of the block's channels, B and C
  for (int i = tid; i < rows * 8; i += NT) *reinterpret_cast<uint4*>(&sh.bc[i / 8][i % 8 * 4]) = fresh4(bc + i * 4);
  for (int i = warp; i < row_tiles * OCTETS; i += WARPS) {
    const int r0 = i / OCTETS * 16, p = i % OCTETS * 8;
    const bool upper = r0 + g < rows, lower = r0 + g + 8 < rows;
    float acc[4] = {0.f, 0.f, 0.f, 0.f};
    uint2 a[R / 16], b[R / 16];
#pragma unroll
    for (int k = 0; k < R / 16; k++) {
      a[k] = upper ? fresh2(low + (r0 + g) * R + k * 16 + t * 4) : make_uint2(0, 0);
      b[k] = lower ? fresh2(low + (r0 + g + 8) * R + k * 16 + t * 4) : make_uint2(0, 0);
    }
#pragma unroll
    for (int k = 0; k < R / 16; k++) {
      const uint2 v = *reinterpret_cast<const uint2*>(&sh.dt_proj[p + g][k * 16 + t * 4]);
      mma(acc, a[k].x, b[k].x, a[k].y, b[k].y, v.x, v.y);
    }
    const int c = p + 2 * t;
    const float2 shift = dt_bias ? *reinterpret_cast<const float2*>(dt_bias + c0 + c) : make_float2(0.f, 0.f);
    *reinterpret_cast<float2*>(&sh.dt[r0 + g][c]) = make_float2(softplus(acc[0] + shift.x), softplus(acc[1] + shift.y));
    *reinterpret_cast<float2*>(&sh.dt[r0 + g + 8][c]) = make_float2(softplus(acc[2] + shift.x), softplus(acc[3] + shift.y));
  }
  sync();

  // h = exp(dt A) h + dt B u; y = (C . h + D u) silu(z)
  const int among = warp / OCTETS, p = warp % OCTETS * 8 + g;
  float4 a = *reinterpret_cast<const float4*>(A + (i64)(c0 + p) * N + t * 4);
  a.x *= LOG2E; a.y *= LOG2E; a.z *= LOG2E; a.w *= LOG2E;
  const float by = skip ? skip[c0 + p] : 0.f;
  for (int s = 0; s < slots; s++) {
    const int slot = s % SLOTS;
    bar_wait(&sh.full[slot], s / SLOTS & 1);
    float4 h[PER], b[PER], c[PER];
    float dt[PER], uv[PER], gate[PER], sum[PER];
    int row[PER];
    bool mine[PER];
#pragma unroll
    for (int k = 0; k < PER; k++) {
      const int in_slot = k * TOGETHER + (TOGETHER * OCTETS == WARPS ? among : min(among, TOGETHER - 1));
      row[k] = s * SLOT_ROWS + in_slot;
      mine[k] = among < TOGETHER && row[k] < rows;
      h[k] = *reinterpret_cast<const float4*>(memory + slot * SLOT + (in_slot * CE + p) * N * 4 + t * 16);
    }
    __syncwarp();
    if (lane == 0) bar_arrive(&sh.empty[slot]);
#pragma unroll
    for (int k = 0; k < PER; k++) {
      const int r = min(row[k], rows - 1);
      const u32 word = sh.uz[r][p];
      dt[k] = sh.dt[r][p];
      uv[k] = to_real(act(word));
      gate[k] = to_real(act(word >> 16));
      b[k] = *reinterpret_cast<const float4*>(&sh.bc[r][t * 4]);
      c[k] = *reinterpret_cast<const float4*>(&sh.bc[r][N + t * 4]);
    }
#pragma unroll
    for (int k = 0; k < PER; k++) {
      const float du = dt[k] * uv[k];
      h[k].x = fmaf(decay(dt[k], a.x), h[k].x, du * b[k].x);
      h[k].y = fmaf(decay(dt[k], a.y), h[k].y, du * b[k].y);
      h[k].z = fmaf(decay(dt[k], a.z), h[k].z, du * b[k].z);
      h[k].w = fmaf(decay(dt[k], a.w), h[k].w, du * b[k].w);
      sum[k] = fmaf(h[k].x, c[k].x, fmaf(h[k].y, c[k].y, fmaf(h[k].z, c[k].z, h[k].w * c[k].w)));
    }
#pragma unroll
    for (int k = 0; k < PER; k++) sum[k] += __shfl_xor_sync(~0u, sum[k], 1);
#pragma unroll
    for (int k = 0; k < PER; k++) {
      sum[k] += __shfl_xor_sync(~0u, sum[k], 2);
      if (!mine[k]) continue;
      float4* to = reinterpret_cast<float4*>(state + ((i64)row[k] * E + c0 + p) * N + t * 4);
#if CS
      __stcs(to, h[k]);
#else
      *to = h[k];
#endif
      if (t == 0) y[(i64)row[k] * E + c0 + p] = to_act(fmaf(by, uv[k], sum[k]) * silu(gate[k]));
    }
  }
}
