// What lies between in_proj and out_proj in a decoding step of several rows: convolution, x_proj, dt_proj, state and gate in
// one launch. A block owns CE channels of all rows.
//
// The states are most of what a step moves, and nothing but their use waits for the sums over channels. So a warp streams
// them into a ring of shared memory from the start, by bulk copies, while the others convolve (u goes to memory), meet,
// take a tile of x_proj over all channels each, meet again, and make dt of their own channels. Products run on tensor
// cores, sums are float32 and have an order that the shape fixes: a row doesn't depend on its company.
//
// All blocks must be resident at once: launch cooperatively. Macros: IN (1 bfloat16, 2 float16), E d_inner, R dt_rank,
// W width, CE channels of a block, ROWS most rows (a multiple of 16), NX tiles of eight outputs of x_proj that a block takes
// together, SLOTS of the ring, FLIGHT of them asked for at once.
#define N 16
#define X (R + 2 * N)
#define NT 512                     // threads that compute; one warp more streams
#define WARPS (NT / 32)
#define THREADS (NT + 32)
#define BLOCKS (E / CE)
#define OCTETS (CE / 8)            // a warp takes eight channels of a row, four lanes a channel
#define TOGETHER (WARPS / OCTETS)  // rows of a slot
#define SLOT (TOGETHER * CE * N * 4)
#define KW (E / WARPS)             // columns of x_proj of a warp
#define CHUNKS (KW / 32)
#define DT_ROW (R + 8)             // of dt_proj in shared memory: shifted, so that eight rows lie in different banks
#define PAIRS (CE / 2)
#define ITEMS ((ROWS * PAIRS + NT - 1) / NT)
#define MAX2(a, b) ((a) > (b) ? (a) : (b))
#ifndef CONV
#define CONV 0
#endif
#if CONV  // the convolution's state has the activations' 16 bits
typedef act kept;
typedef u32 kept2;
#else
typedef float kept;
typedef float2 kept2;
#endif

struct Shared {
  u64 full[SLOTS], empty[SLOTS];
  alignas(16) u32 uz[ROWS][CE];              // u and the gate, 16 bits each
  union {
    float dt[ROWS][CE];
    float parts[WARPS][16 * 8 * NX];         // of a tile of x_proj, before dt is there
  };
  alignas(16) float bc[ROWS][2 * N];
  alignas(16) act dt_proj[CE][DT_ROW];
};

DEV float2 wide2(const float2& v) { return v; }
DEV float2 wide2(u32 v) { return make_float2(to_real(act(v)), to_real(act(v >> 16))); }
DEV void keep(float2& to, u32 v) { to = wide2(v); }
DEV void keep(u32& to, u32 v) { to = v; }
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
    const act* __restrict__ uz, kept* __restrict__ conv_state, float* __restrict__ state, const float* __restrict__ conv,
    const float* __restrict__ conv_bias, const act* __restrict__ x_proj, const float* __restrict__ x_bias,
    const act* __restrict__ dt_proj, const float* __restrict__ dt_bias, const float* __restrict__ A,
    const float* __restrict__ skip, act* u, act* low, float* bc, act* __restrict__ y, u32* counters, int rows) {
  extern __shared__ __align__(128) char memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, block = blockIdx.x, c0 = block * CE;
  const int slots = (rows + TOGETHER - 1) / TOGETHER, row_tiles = (rows + 15) / 16, tiles = row_tiles * (X / 8 / NX);
  u32 *convolved = counters, *summed = counters + 32, *gone = counters + 64;
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
    if (lane == 0) {
      u64 policy;
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
      for (int s = 0; s < slots; s++) {
        const int slot = s % SLOTS, r0 = s * TOGETHER, n = min(TOGETHER, rows - r0);
        if (s >= FLIGHT) bar_wait(&sh.full[(s - FLIGHT) % SLOTS], (s - FLIGHT) / SLOTS & 1);
        if (s >= SLOTS) bar_wait(&sh.empty[slot], (s / SLOTS - 1) & 1);
        bar_expect(&sh.full[slot], n * CE * N * 4);
        for (int r = 0; r < n; r++)
          asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                       ::"r"(address(memory + slot * SLOT + r * CE * N * 4)), "l"(state + ((i64)(r0 + r) * E + c0) * N),
                       "r"(CE * N * 4), "r"(address(&sh.full[slot])), "l"(policy) : "memory");
      }
    }
    return;
  }

  // u = silu(conv(u)); the state keeps the last W - 1 inputs. A thread takes two channels of a row at a time.
  {
    u32 now[ITEMS], gate[ITEMS];
    kept2 past[ITEMS][W];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int item = tid + i * NT, r = item / PAIRS, c = c0 + item % PAIRS * 2;
      if (r >= rows) continue;
      now[i] = *reinterpret_cast<const u32*>(uz + (i64)r * 2 * E + c);
      gate[i] = *reinterpret_cast<const u32*>(uz + (i64)r * 2 * E + E + c);
#pragma unroll
      for (int k = 0; k < W - 1; k++) past[i][k] = *reinterpret_cast<const kept2*>(conv_state + ((i64)r * (W - 1) + k) * E + c);
    }
    for (int i = tid; i < CE * (R / 8); i += NT) {
      const int c = i / (R / 8), k = i % (R / 8) * 8;
      *reinterpret_cast<uint4*>(&sh.dt_proj[c][k]) = *reinterpret_cast<const uint4*>(dt_proj + (i64)(c0 + c) * R + k);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int item = tid + i * NT, r = item / PAIRS, p = item % PAIRS * 2, c = c0 + p;
      if (r >= rows) continue;
      float2 s = conv_bias ? *reinterpret_cast<const float2*>(conv_bias + c) : make_float2(0.f, 0.f);
      keep(past[i][W - 1], now[i]);
#pragma unroll
      for (int k = 0; k < W; k++) {
        const float2 v = wide2(past[i][k]);
        s.x = fmaf(conv[(i64)c * W + k], v.x, s.x);
        s.y = fmaf(conv[(i64)c * W + W + k], v.y, s.y);
        if (k > 0) *reinterpret_cast<kept2*>(conv_state + ((i64)r * (W - 1) + k - 1) * E + c) = past[i][k];
      }
      const u32 a = to_act(silu(s.x)), b = to_act(silu(s.y));
      *reinterpret_cast<u32*>(u + (i64)r * E + c) = a | b << 16;
      *reinterpret_cast<uint2*>(&sh.uz[r][p]) = make_uint2(a | gate[i] << 16, b | (gate[i] & 0xffff0000u));
    }
  }
  announce(convolved);

  // x_proj: tiles of 16 rows and 8 NX outputs, a sixteenth of the channels a warp
  const int g = lane / 4, t = lane % 4;
  for (int tile = block; tile < tiles; tile += BLOCKS) {
    const int r0 = tile % row_tiles * 16, o0 = tile / row_tiles * 8 * NX, k0 = warp * KW + t * 8;
    float acc[NX][4];
    uint4 w[NX][CHUNKS];
#pragma unroll
    for (int j = 0; j < NX; j++) {
#pragma unroll
      for (int k = 0; k < 4; k++) acc[j][k] = 0.f;
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) w[j][i] = fresh4(x_proj + (i64)(o0 + j * 8 + g) * E + k0 + i * 32);
    }
    if (tile == block) await(convolved, BLOCKS);
    const uint4 none = make_uint4(0, 0, 0, 0);
    const bool upper = r0 + g < rows, lower = r0 + g + 8 < rows;
    const act* from = u + (i64)(r0 + g) * E + k0;
    constexpr int HALF = CHUNKS > 4 ? (CHUNKS + 1) / 2 : CHUNKS;
#pragma unroll
    for (int h = 0; h < CHUNKS; h += HALF) {
      uint4 a[HALF], b[HALF];
#pragma unroll
      for (int i = 0; i < HALF; i++) if (h + i < CHUNKS) {
        a[i] = upper ? fresh4(from + (h + i) * 32) : none;
        b[i] = lower ? fresh4(from + 8 * E + (h + i) * 32) : none;
      }
#pragma unroll
      for (int i = 0; i < HALF; i++) if (h + i < CHUNKS) {
#pragma unroll
        for (int j = 0; j < NX; j++) {
          const uint4 v = w[j][h + i];
          mma(acc[j], a[i].x, b[i].x, a[i].y, b[i].y, v.x, v.y);
          mma(acc[j], a[i].z, b[i].z, a[i].w, b[i].w, v.z, v.w);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < NX; j++) {
      *reinterpret_cast<float2*>(&sh.parts[warp][g * 8 * NX + j * 8 + 2 * t]) = make_float2(acc[j][0], acc[j][1]);
      *reinterpret_cast<float2*>(&sh.parts[warp][(g + 8) * 8 * NX + j * 8 + 2 * t]) = make_float2(acc[j][2], acc[j][3]);
    }
    sync();
    if (tid < 128 * NX) {
      const int r = r0 + tid / (8 * NX), o = o0 + tid % (8 * NX);
      float s = x_bias ? x_bias[o] : 0.f;
#pragma unroll
      for (int k = 0; k < WARPS; k++) s += sh.parts[k][tid];
      if (r < rows) {
        if (o < R) low[r * R + o] = to_act(s);
        else bc[r * 2 * N + o - R] = s;
      }
    }
    announce(summed);
  }
  await(summed, tiles);
  if (tid == 0) {  // every block has seen all it waits for: the last one makes the counters ready for the next launch
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(gone) : "memory");
    if (before == BLOCKS - 1) *convolved = *summed = *gone = 0;
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
    const int slot = s % SLOTS, r = s * TOGETHER + among;
    const bool mine = among < TOGETHER && r < rows;
    bar_wait(&sh.full[slot], s / SLOTS & 1);
    float4 h = make_float4(0.f, 0.f, 0.f, 0.f);
    if (mine) h = *reinterpret_cast<const float4*>(memory + slot * SLOT + (among * CE + p) * N * 4 + t * 16);
    __syncwarp();
    if (lane == 0) bar_arrive(&sh.empty[slot]);
    if (!mine) continue;
    const float dt = sh.dt[r][p];
    const u32 word = sh.uz[r][p];
    const float uv = to_real(act(word)), du = dt * uv;
    const float4 b = *reinterpret_cast<const float4*>(&sh.bc[r][t * 4]), c = *reinterpret_cast<const float4*>(&sh.bc[r][N + t * 4]);
    h.x = fmaf(decay(dt, a.x), h.x, du * b.x);
    h.y = fmaf(decay(dt, a.y), h.y, du * b.y);
    h.z = fmaf(decay(dt, a.z), h.z, du * b.z);
    h.w = fmaf(decay(dt, a.w), h.w, du * b.w);
    float sum = fmaf(h.x, c.x, fmaf(h.y, c.y, fmaf(h.z, c.z, h.w * c.w)));
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    __stcs(reinterpret_cast<float4*>(state + ((i64)r * E + c0 + p) * N + t * 4), h);
    if (t == 0) y[(i64)r * E + c0 + p] = to_act(fmaf(by, uv, sum) * silu(to_real(act(word >> 16))));
  }
}
