// What lies between in_proj and out_proj in a decoding step of many rows, in one launch as in middle.cu, cut the other way: a
// block owns CE channels of 16 rows, and only the blocks of the same rows need anything of each other.
//
// convolution -> the block's part of x_proj's sums over its channels, to memory -> one meeting of the E / CE blocks of these
// rows -> every block adds the parts up, makes dt of its channels, and moves the states on. The states stream into shared
// memory meanwhile, a row's channels (CE * 64 bytes, one piece) a slot. Weights are taken into registers before what they
// are multiplied by is there. Sums are float32 and have an order that the shape fixes: a row doesn't depend on its company.
//
// All blocks must be resident at once: launch cooperatively. Grid (E / CE, tiles of rows). Macros: IN (1 bfloat16,
// 2 float16), E d_inner, R dt_rank (a multiple of 32), W width, CE channels of a block (a multiple of 128), SLOTS of the
// ring, FIRST of them asked for at once and the others when the block has given its part, CONV: the convolution's state has
// the activations' 16 bits (else float32), EARLY: the launch may begin before its inputs are there.
#ifndef CONV
#define CONV 0
#endif
#ifndef EARLY
#define EARLY 0
#endif
#define N 16
#define X (R + 2 * N)
#define NT 512
#define WARPS (NT / 32)
#define ROWS 16
#define BLOCKS (E / CE)              // that share rows
#define SLOT (CE * N * 4)
#define PACKETS (CE / 4)             // of four channels, in a row
#define ITEMS (ROWS * PACKETS / NT)
#define QUARTER (CE / 4)             // channels of a warp in x_proj
#define CHUNKS (QUARTER / 32)
#define OWN ((X / 8 + 3) / 4)        // tiles of eight outputs of a warp there
#define PASSES (CE / 128)            // of dt and of the states: a warp takes eight channels in each
#define DCHUNKS (R / 32)
#define PART (ROWS * X)              // numbers of a part
#if CONV
typedef act kept;
typedef uint2 kept4;
#else
typedef float kept;
typedef float4 kept4;
#endif
#ifdef PROFILE  // nanoseconds behind the counters, eight a block
#define MARK(k) if (tid == 0) { u64 now_; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now_)); reinterpret_cast<u64*>(counters + gridDim.y * 64)[(blockIdx.y * gridDim.x + blockIdx.x) * 8 + k] = now_; }
#else
#define MARK(k)
#endif

struct Shared {
  u64 full[SLOTS], empty[SLOTS];
  alignas(16) act u[ROWS][CE + 32];  // the rows are shifted, so that two of them lie in different banks
  alignas(16) act z[ROWS][CE];
  union {
    alignas(16) float parts[4][ROWS][X + 8];
    float dt[ROWS][CE + 8];
  };
  alignas(16) float bc[ROWS][2 * N];
  alignas(16) act low[ROWS][R + (R % 64 ? 0 : 32)];
};

// What other blocks of this launch have written is read past the first-level cache.
DEV float4 fresh4(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
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
// 32 columns: lane 4 g + t brings those from 8 t on of rows g and g + 8 of a and of row g of b.
DEV void mma32(float (&acc)[4], const uint4& a, const uint4& a8, const uint4& b) {
  mma(acc, a.x, a8.x, a.y, a8.y, b.x, b.y);
  mma(acc, a.z, a8.z, a.w, a8.w, b.z, b.w);
}
DEV u32 pair(act a, act b) { return (u32)a | (u32)b << 16; }
DEV float4 wide4(const float4& v) { return v; }
DEV float4 wide4(const uint2& v) {
  return make_float4(to_real(act(v.x)), to_real(act(v.x >> 16)), to_real(act(v.y)), to_real(act(v.y >> 16)));
}
// In this order and no other: loads of what is read once, and of weights.
DEV void once4(float4& v, const float* p) {
  asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
}
DEV void once4(uint2& v, const act* p) { asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); }
DEV void weights4(uint4& v, const act* p) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
}
DEV void cache(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEV void keep(float4& to, const uint2& v) { to = wide4(v); }
DEV void keep(uint2& to, const uint2& v) { to = v; }

extern "C" __global__ void __launch_bounds__(NT, 1) middle_tiles(
    const act* __restrict__ uz, kept* __restrict__ conv_state, float* __restrict__ state, const float* __restrict__ conv,
    const float* __restrict__ conv_bias, const act* __restrict__ x_proj, const float* __restrict__ x_bias,
    const act* __restrict__ dt_proj, const float* __restrict__ dt_bias, const float* __restrict__ A,
    const float* __restrict__ skip, float* parts, act* __restrict__ y, u32* counters, int rows) {
  extern __shared__ __align__(128) char memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, c0 = blockIdx.x * CE;
  const int r0 = blockIdx.y * ROWS, count = min(ROWS, rows - r0);
  u32 *come = counters + blockIdx.y * 64, *gone = come + 32;
#if EARLY
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  MARK(0)
  if (tid == 0) {
    for (int i = 0; i < SLOTS; i++) {
      bar_init(&sh.full[i], 1);
      bar_init(&sh.empty[i], WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  // A row's channels of the state, into the ring; by one thread.
  u64 policy = 0;
  if (tid == 0) asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  auto stream = [&](int s) {
    if (s >= count) return;
    u64* const full = &sh.full[s % SLOTS];
    bar_expect(full, SLOT);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(address(memory + s % SLOTS * SLOT)), "l"(state + ((i64)(r0 + s) * E + c0) * N), "r"(SLOT),
                 "r"(address(full)), "l"(policy) : "memory");
  };

  // Everything is asked for in the order in which it is needed, and before the states, behind which memory would let it wait:
  // the convolution's state; x_proj's weights (a quarter of the block's channels for OWN tiles of eight outputs a warp); what
  // dt and the states take later, into the second-level cache.
  const int g = lane / 4, t = lane % 4, quarter = warp % 4, first = warp / 4 * OWN;
  const int p = tid % PACKETS * 4, c = c0 + p;  // in the convolution a thread takes the same four channels of ITEMS rows
  kept4 past[ITEMS][W];
  uint4 w[OWN][CHUNKS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int r = tid / PACKETS + i * (NT / PACKETS);
#pragma unroll
    for (int k = 0; k < W - 1; k++) {
      past[i][k] = kept4();
      if (r < count) once4(past[i][k], conv_state + ((i64)(r0 + r) * (W - 1) + k) * E + c);
    }
  }
#pragma unroll
  for (int j = 0; j < OWN; j++)
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      const int o = min((first + j) * 8 + g, X - 1);
      weights4(w[j][i], x_proj + (i64)o * E + c0 + quarter * QUARTER + i * 32 + t * 8);
    }
  for (int i = tid; i < CE * R / 64; i += NT) cache(dt_proj + (i64)c0 * R + i * 64);
  for (int i = tid; i < CE * N / 32; i += NT) cache(A + (i64)c0 * N + i * 32);
#if EARLY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  MARK(1)

  // u = silu(conv(u)); the state keeps the last W - 1 inputs
  {
    uint2 now[ITEMS], gate[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int r = tid / PACKETS + i * (NT / PACKETS);
      now[i] = gate[i] = make_uint2(0, 0);
      if (r < count) {
        once4(now[i], uz + (i64)(r0 + r) * 2 * E + c);
        once4(gate[i], uz + (i64)(r0 + r) * 2 * E + E + c);
      }
    }
    if (tid == 0) for (int s = 0; s < FIRST; s++) stream(s);
    float4 taps[W];  // 4 W numbers, channel by channel
#pragma unroll
    for (int k = 0; k < W; k++) taps[k] = *reinterpret_cast<const float4*>(conv + (i64)c * W + 4 * k);
    const float4 shift = conv_bias ? *reinterpret_cast<const float4*>(conv_bias + c) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int r = tid / PACKETS + i * (NT / PACKETS);
      keep(past[i][W - 1], now[i]);
      float s[4] = {shift.x, shift.y, shift.z, shift.w};
      const float* tap = &taps[0].x;
#pragma unroll
      for (int k = 0; k < W; k++) {
        const float4 v = wide4(past[i][k]);
        s[0] = fmaf(tap[k], v.x, s[0]);
        s[1] = fmaf(tap[W + k], v.y, s[1]);
        s[2] = fmaf(tap[2 * W + k], v.z, s[2]);
        s[3] = fmaf(tap[3 * W + k], v.w, s[3]);
      }
      const uint2 u = make_uint2(pair(to_act(silu(s[0])), to_act(silu(s[1]))), pair(to_act(silu(s[2])), to_act(silu(s[3]))));
      *reinterpret_cast<uint2*>(&sh.u[r][p]) = r < count ? u : make_uint2(0, 0);
      *reinterpret_cast<uint2*>(&sh.z[r][p]) = gate[i];
    }
  }
  __syncthreads();
  MARK(2)

  // the block's part of x_proj's sums
  {
    float acc[OWN][4];
#pragma unroll
    for (int j = 0; j < OWN; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      const int k = quarter * QUARTER + i * 32 + t * 8;
      const uint4 a = *reinterpret_cast<const uint4*>(&sh.u[g][k]), a8 = *reinterpret_cast<const uint4*>(&sh.u[g + 8][k]);
#pragma unroll
      for (int j = 0; j < OWN; j++) mma32(acc[j], a, a8, w[j][i]);
    }
#pragma unroll
    for (int j = 0; j < OWN; j++) {
      const int o = (first + j) * 8 + 2 * t;
      if (o >= X) continue;
      *reinterpret_cast<float2*>(&sh.parts[quarter][g][o]) = make_float2(acc[j][0], acc[j][1]);
      *reinterpret_cast<float2*>(&sh.parts[quarter][g + 8][o]) = make_float2(acc[j][2], acc[j][3]);
    }
  }
  __syncthreads();
  float* const shared_rows = parts + (i64)blockIdx.y * BLOCKS * PART;
  for (int i = tid; i < PART / 4; i += NT) {
    const int r = i / (X / 4), o = i % (X / 4) * 4;
    float4 s = *reinterpret_cast<const float4*>(&sh.parts[0][r][o]);
#pragma unroll
    for (int k = 1; k < 4; k++) {
      const float4 v = *reinterpret_cast<const float4*>(&sh.parts[k][r][o]);
      s.x += v.x; s.y += v.y; s.z += v.z; s.w += v.w;
    }
    *reinterpret_cast<float4*>(shared_rows + blockIdx.x * PART + i * 4) = s;
  }
  __syncthreads();
  MARK(3)
  if (tid == 0) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(come) : "memory");
    for (int s = FIRST; s < SLOTS; s++) stream(s);
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {  // now that nobody waits for it
    const int r = tid / PACKETS + i * (NT / PACKETS);
    if (r >= count) continue;
#pragma unroll
    for (int k = 1; k < W; k++) __stcs(reinterpret_cast<kept4*>(conv_state + ((i64)(r0 + r) * (W - 1) + k - 1) * E + c), past[i][k]);
  }

  // dt_proj's weights of the warp's channels
  uint4 d[PASSES][DCHUNKS];
  const int mine = warp * (8 * PASSES);
#pragma unroll
  for (int j = 0; j < PASSES; j++)
#pragma unroll
    for (int i = 0; i < DCHUNKS; i++)
      d[j][i] = *reinterpret_cast<const uint4*>(dt_proj + (i64)(c0 + mine + j * 8 + g) * R + i * 32 + t * 8);

  if (tid == 0) {
    u32 v;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(come) : "memory"); while (v < BLOCKS);
  }
  __syncthreads();
  MARK(4)
  if (tid == 0) {  // the last one to have seen all makes the counters ready for the next launch
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(gone) : "memory");
    if (before == BLOCKS - 1) *come = *gone = 0;
  }
  // Four lanes share a sum: each adds up a quarter of the blocks' parts.
  {
    constexpr int SUMS = (PART + NT - 1) / NT, SHARE = (BLOCKS + 3) / 4, TOGETHER = 4;  // PART / 4 sums of four numbers, NT / 4 at a time
    float4 sums[SUMS];
#pragma unroll
    for (int j = 0; j < SUMS; j++) sums[j] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int b = 0; b < SHARE; b += TOGETHER) {
      float4 v[SUMS][TOGETHER];
#pragma unroll
      for (int j = 0; j < SUMS; j++)
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
          const int i = tid / 4 + j * (NT / 4), from = t * SHARE + b + k;
          v[j][k] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (b + k < SHARE && from < BLOCKS && i < PART / 4) v[j][k] = fresh4(shared_rows + from * PART + i * 4);
        }
#pragma unroll
      for (int j = 0; j < SUMS; j++)
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) { sums[j].x += v[j][k].x; sums[j].y += v[j][k].y; sums[j].z += v[j][k].z; sums[j].w += v[j][k].w; }
    }
#pragma unroll
    for (int j = 0; j < SUMS; j++) {
      const int i = tid / 4 + j * (NT / 4), r = i / (X / 4), o = i % (X / 4) * 4;
      float4 s = sums[j];
#pragma unroll
      for (int m = 1; m < 4; m <<= 1) {
        s.x += __shfl_xor_sync(~0u, s.x, m);
        s.y += __shfl_xor_sync(~0u, s.y, m);
        s.z += __shfl_xor_sync(~0u, s.z, m);
        s.w += __shfl_xor_sync(~0u, s.w, m);
      }
      if (t != j % 4 || i >= PART / 4) continue;
      if (x_bias) {
        const float4 shift = *reinterpret_cast<const float4*>(x_bias + o);
        s.x += shift.x; s.y += shift.y; s.z += shift.z; s.w += shift.w;
      }
      if (o < R) *reinterpret_cast<uint2*>(&sh.low[r][o]) = make_uint2(pair(to_act(s.x), to_act(s.y)), pair(to_act(s.z), to_act(s.w)));
      else *reinterpret_cast<float4*>(&sh.bc[r][o - R]) = s;
    }
  }
  __syncthreads();
  MARK(5)

  // dt of the warp's channels
  {
    float acc[PASSES][4];
#pragma unroll
    for (int j = 0; j < PASSES; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
#pragma unroll
    for (int i = 0; i < DCHUNKS; i++) {
      const int k = i * 32 + t * 8;
      const uint4 a = *reinterpret_cast<const uint4*>(&sh.low[g][k]), a8 = *reinterpret_cast<const uint4*>(&sh.low[g + 8][k]);
#pragma unroll
      for (int j = 0; j < PASSES; j++) mma32(acc[j], a, a8, d[j][i]);
    }
#pragma unroll
    for (int j = 0; j < PASSES; j++) {
      const int c = mine + j * 8 + 2 * t;
      const float2 shift = dt_bias ? *reinterpret_cast<const float2*>(dt_bias + c0 + c) : make_float2(0.f, 0.f);
      *reinterpret_cast<float2*>(&sh.dt[g][c]) = make_float2(softplus(acc[j][0] + shift.x), softplus(acc[j][1] + shift.y));
      *reinterpret_cast<float2*>(&sh.dt[g + 8][c]) = make_float2(softplus(acc[j][2] + shift.x), softplus(acc[j][3] + shift.y));
    }
  }
  __syncwarp();  // a warp uses what it has made itself, of channels that no other warp has

  // h = exp(dt A) h + dt B u; y = (C . h + D u) silu(z). Four lanes a channel.
  float4 a[PASSES];
  float by[PASSES];
  MARK(6)
#pragma unroll
  for (int j = 0; j < PASSES; j++) {
    const int c = c0 + mine + j * 8 + g;
    a[j] = *reinterpret_cast<const float4*>(A + (i64)c * N + t * 4);
    a[j].x *= LOG2E; a[j].y *= LOG2E; a[j].z *= LOG2E; a[j].w *= LOG2E;
    by[j] = skip ? skip[c] : 0.f;
  }
  for (int s = 0; s < count; s++) {
    const int slot = s % SLOTS;
    const float4 b = *reinterpret_cast<const float4*>(&sh.bc[s][t * 4]), c = *reinterpret_cast<const float4*>(&sh.bc[s][N + t * 4]);
    float4 h[PASSES];
    bar_wait(&sh.full[slot], s / SLOTS & 1);
#pragma unroll
    for (int j = 0; j < PASSES; j++) h[j] = *reinterpret_cast<const float4*>(memory + slot * SLOT + ((mine + j * 8 + g) * N + t * 4) * 4);
    __syncwarp();
    if (lane == 0) bar_arrive(&sh.empty[slot]);
    if (tid == 0 && s > 0 && s - 1 + SLOTS < count) {  // the row before was in a slot that is free again
      bar_wait(&sh.empty[(s - 1) % SLOTS], (s - 1) / SLOTS & 1);
      stream(s - 1 + SLOTS);
    }
#pragma unroll
    for (int j = 0; j < PASSES; j++) {
      const int p = mine + j * 8 + g;
      const float dt = sh.dt[s][p], uv = to_real(sh.u[s][p]), du = dt * uv;
      h[j].x = fmaf(decay(dt, a[j].x), h[j].x, du * b.x);
      h[j].y = fmaf(decay(dt, a[j].y), h[j].y, du * b.y);
      h[j].z = fmaf(decay(dt, a[j].z), h[j].z, du * b.z);
      h[j].w = fmaf(decay(dt, a[j].w), h[j].w, du * b.w);
      float sum = fmaf(h[j].x, c.x, fmaf(h[j].y, c.y, fmaf(h[j].z, c.z, h[j].w * c.w)));
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      __stcs(reinterpret_cast<float4*>(state + ((i64)(r0 + s) * E + c0 + p) * N + t * 4), h[j]);
      if (t == 0) y[(i64)(r0 + s) * E + c0 + p] = to_act(fmaf(by[j], uv, sum) * silu(to_real(sh.z[s][p])));
    }
  }
  MARK(7)
}
