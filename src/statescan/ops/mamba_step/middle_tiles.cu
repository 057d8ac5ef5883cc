// What lies between in_proj and out_proj in a decoding step of many rows, in one launch as in middle.cu, cut the other way: a
// block owns CE channels of 16 rows, and only the blocks of the same rows need anything of each other.
//
// convolution -> the block's part of x_proj's sums over its channels, to memory -> one meeting of the E / CE blocks of these
// rows -> every block adds the parts up, makes dt of its channels, and moves the states on. The states stream into shared
// memory meanwhile, a row's channels (CE * 64 bytes, one piece) a slot; x_proj's weights lie in the ring's last slots until
// they have been used. Sums are float32 and have an order that the shape fixes: a row doesn't depend on its company.
//
// All blocks must be resident at once: launch cooperatively. The launch begins before uz is there, and reads both states
// before: they must be there when the launch in front begins. Grid (E / CE, tiles of rows). Macros: IN (1 bfloat16,
// 2 float16), E d_inner, R dt_rank (a multiple of 32), W width, CE channels of a block (a multiple of 128), SLOTS of the
// ring (at least x_proj's), CONV: the convolution's state has the activations' 16 bits (else float32). EACH: every lane
// says that it has read its states, not one for its warp after __syncwarp; racecheck takes the others' reads as unordered.
#ifndef CONV
#define CONV 0
#endif
#ifndef EACH
#define EACH 0
#endif
#define N 16
#define X (R + 2 * N)
#define NT 512
#define WARPS (NT / 32)
#define STREAMER 32                  // the thread that asks for states; another one speaks to the other blocks
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
#define W_ROW (CE + 32)              // of x_proj in the ring: shifted as u is
#define W_SLOTS ((X * W_ROW * 2 + SLOT - 1) / SLOT)
#define FIRST (SLOTS - W_SLOTS)      // filled at once, the others when the block has given its part
// Of a part: 16-byte packets of what becomes dt, row by row, in the activations' 16 bits, to which their sum is rounded
// anyway; and then those of B and C in float32.
#define LOW_PACKETS (ROWS * R / 8)
#define PART_PACKETS (LOW_PACKETS + ROWS * 8)
#if CONV
typedef act kept;
typedef uint2 kept4;
#else
typedef float kept;
typedef float4 kept4;
#endif

struct Shared {
  u64 full[SLOTS], empty[SLOTS], weights;
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
DEV uint4 fresh4(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
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
DEV void bulk(void* to, const void* from, u32 bytes, u64* b, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)), "l"(policy) : "memory");
}
DEV void bulk(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)) : "memory");
}
// In this order and no other: loads of what is read once, and of weights.
DEV void once4(float4& v, const float* p) {
  asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
}
DEV void once4(uint2& v, const act* p) { asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p)); }
DEV void weights4(float4& v, const float* p) {
  asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p));
}
DEV void cache(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEV void keep(float4& to, const uint2& v) { to = wide4(v); }
DEV void keep(uint2& to, const uint2& v) { to = v; }

extern "C" __global__ void __launch_bounds__(NT, 1) middle_tiles(
    const act* __restrict__ uz, kept* __restrict__ conv_state, float* __restrict__ state, const float* __restrict__ conv,
    const float* __restrict__ conv_bias, const act* __restrict__ x_proj, const float* __restrict__ x_bias,
    const act* __restrict__ dt_proj, const float* __restrict__ dt_bias, const float* __restrict__ A,
    const float* __restrict__ skip, uint4* parts, act* __restrict__ y, u32* counters, int rows) {
  extern __shared__ __align__(128) char memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, c0 = blockIdx.x * CE;
  const int r0 = blockIdx.y * ROWS, count = min(ROWS, rows - r0);
  u32 *come = counters + blockIdx.y * 64, *gone = come + 32;
  asm volatile("griddepcontrol.launch_dependents;");
  if (tid == 0) {
    for (int i = 0; i < SLOTS; i++) {
      bar_init(&sh.full[i], 1);
      bar_init(&sh.empty[i], EACH ? NT : WARPS);
    }
    bar_init(&sh.weights, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  // A row's channels of the state, into the ring.
  auto stream = [&](int s) {
    if (s >= count) return;
    bar_expect(&sh.full[s % SLOTS], SLOT);
    bulk(memory + s % SLOTS * SLOT, state + ((i64)(r0 + s) * E + c0) * N, SLOT, &sh.full[s % SLOTS], policy);
  };
  act* const x_weights = reinterpret_cast<act*>(memory + (SLOTS - W_SLOTS) * SLOT);
  if (warp == WARPS - 1) {
    if (lane == 0) bar_expect(&sh.weights, X * CE * 2);
    __syncwarp();
    for (int o = lane; o < X; o += 32) bulk(x_weights + o * W_ROW, x_proj + (i64)o * E + c0, CE * 2, &sh.weights);
  }

  // What doesn't depend on the launch in front is asked for before that has ended, and before the states, behind which memory
  // would let it wait; what dt and the states take later goes into the second-level cache.
  const int g = lane / 4, t = lane % 4, quarter = warp % 4, first = warp / 4 * OWN;
  const int p = tid % PACKETS * 4, c = c0 + p;  // in the convolution a thread takes the same four channels of ITEMS rows
  kept4 past[ITEMS][W];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int r = tid / PACKETS + i * (NT / PACKETS);
#pragma unroll
    for (int k = 0; k < W - 1; k++) {
      past[i][k] = kept4();
      if (r < count) once4(past[i][k], conv_state + ((i64)(r0 + r) * (W - 1) + k) * E + c);
    }
  }
  float4 taps[W];  // 4 W numbers, channel by channel
#pragma unroll
  for (int k = 0; k < W; k++) weights4(taps[k], conv + (i64)c * W + 4 * k);
  float4 shift = make_float4(0.f, 0.f, 0.f, 0.f);
  if (conv_bias) weights4(shift, conv_bias + c);
  for (int i = tid; i < CE * R / 64; i += NT) cache(dt_proj + (i64)c0 * R + i * 64);
  for (int i = tid; i < CE * N / 32; i += NT) cache(A + (i64)c0 * N + i * 32);
  if (tid == STREAMER) for (int s = 0; s < FIRST; s++) stream(s);
  asm volatile("griddepcontrol.wait;" ::: "memory");

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

  // the block's part of x_proj's sums
  {
    float acc[OWN][4];
#pragma unroll
    for (int j = 0; j < OWN; j++) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0.f;
    bar_wait(&sh.weights, 0);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
      const int k = quarter * QUARTER + i * 32 + t * 8;
      const uint4 a = *reinterpret_cast<const uint4*>(&sh.u[g][k]), a8 = *reinterpret_cast<const uint4*>(&sh.u[g + 8][k]);
#pragma unroll
      for (int j = 0; j < OWN; j++) {
        const int o = min((first + j) * 8 + g, X - 1);
        mma32(acc[j], a, a8, *reinterpret_cast<const uint4*>(x_weights + o * W_ROW + k));
      }
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
  uint4* const shared_rows = parts + (i64)blockIdx.y * BLOCKS * PART_PACKETS;
  auto summed = [&](int r, int o) {
    float4 s = *reinterpret_cast<const float4*>(&sh.parts[0][r][o]);
#pragma unroll
    for (int k = 1; k < 4; k++) {
      const float4 v = *reinterpret_cast<const float4*>(&sh.parts[k][r][o]);
      s.x += v.x; s.y += v.y; s.z += v.z; s.w += v.w;
    }
    return s;
  };
  for (int i = tid; i < PART_PACKETS; i += NT) {
    uint4 v;
    if (i < LOW_PACKETS) {
      const float4 s = summed(i / (R / 8), i % (R / 8) * 8), f = summed(i / (R / 8), i % (R / 8) * 8 + 4);
      v = make_uint4(pair(to_act(s.x), to_act(s.y)), pair(to_act(s.z), to_act(s.w)), pair(to_act(f.x), to_act(f.y)), pair(to_act(f.z), to_act(f.w)));
    } else {
      const int j = i - LOW_PACKETS;
      const float4 s = summed(j / 8, R + j % 8 * 4);
      v = make_uint4(__float_as_uint(s.x), __float_as_uint(s.y), __float_as_uint(s.z), __float_as_uint(s.w));
    }
    shared_rows[blockIdx.x * PART_PACKETS + i] = v;
  }
  __syncthreads();
  if (tid == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(come) : "memory");
  if (tid == STREAMER) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // x_proj's weights have been read
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
  // The last one to have seen all makes the counters ready for the next launch. Relaxed: a fence would cost a microsecond here.
  if (tid == 0) {
    u32 before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(gone) : "memory");
    if (before == BLOCKS - 1) *come = *gone = 0;
  }
  // Four lanes share a packet: each adds up a quarter of the blocks' parts.
  {
    constexpr int PACKS = (PART_PACKETS + NT / 4 - 1) / (NT / 4), SHARE = (BLOCKS + 3) / 4;
    uint4 v[PACKS][SHARE];
#pragma unroll
    for (int j = 0; j < PACKS; j++)
#pragma unroll
      for (int k = 0; k < SHARE; k++) {
        const int i = tid / 4 + j * (NT / 4), from = t * SHARE + k;
        v[j][k] = make_uint4(0, 0, 0, 0);
        if (from < BLOCKS && i < PART_PACKETS) v[j][k] = fresh4(shared_rows + from * PART_PACKETS + i);
      }
#pragma unroll
    for (int j = 0; j < PACKS; j++) {
      const int i = tid / 4 + j * (NT / 4);
      const bool half = i < LOW_PACKETS;
      float s[8];
#pragma unroll
      for (int m = 0; m < 8; m++) s[m] = 0.f;
#pragma unroll
      for (int k = 0; k < SHARE; k++) {
        const u32 words[4] = {v[j][k].x, v[j][k].y, v[j][k].z, v[j][k].w};
#pragma unroll
        for (int m = 0; m < 4; m++) {
          s[2 * m] += half ? to_real(act(words[m])) : __uint_as_float(words[m]);
          if (half) s[2 * m + 1] += to_real(act(words[m] >> 16));
        }
      }
#pragma unroll
      for (int m = 0; m < 8; m++) {
        s[m] += __shfl_xor_sync(~0u, s[m], 1);
        s[m] += __shfl_xor_sync(~0u, s[m], 2);
      }
      if (t != j % 4 || i >= PART_PACKETS) continue;
      if (half) {
        const int r = i / (R / 8), o = i % (R / 8) * 8;
#pragma unroll
        for (int m = 0; m < 8; m += 2)
          *reinterpret_cast<u32*>(&sh.low[r][o + m]) =
              pair(to_act(x_bias ? s[m] + x_bias[o + m] : s[m]), to_act(x_bias ? s[m + 1] + x_bias[o + m + 1] : s[m + 1]));
      } else {
        const int r = (i - LOW_PACKETS) / 8, o = (i - LOW_PACKETS) % 8 * 4;
#pragma unroll
        for (int m = 0; m < 4; m++) sh.bc[r][o + m] = x_bias ? s[2 * m] + x_bias[R + o + m] : s[2 * m];
      }
    }
  }
  __syncthreads();

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
    if (EACH || lane == 0) bar_arrive(&sh.empty[slot]);
    if (tid == STREAMER && s > 0 && s - 1 + SLOTS < count) {  // the row before was in a slot that is free again
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
}
