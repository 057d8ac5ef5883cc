// One decoding step of a whole stack of Mamba blocks and its head for one row, in one launch: a block an SM, which stays.
//
// Weights. A producer warp streams the block's rows of every matrix, in the order in which they are used, through a ring of
// shared memory by bulk copies. It waits for nothing but room in the ring, so the memory works on while the block waits for
// the others. In numbers: at d_model 2048 a layer's 53 MB take 17.6 us at 3 TB/s; the ring holds 8 us of that.
//
// Exchange. What every block needs of all others (the stream, C . h, sums over channels) goes through words of 8 bytes:
// the number, and a tag that names layer and step. A reader asks for the word itself until the tag is right. There is no
// barrier, no fence and no counter: one store and one load lie between two dependent phases. A word is written again only
// after every block has read it, because each phase needs something of every block that comes after its reading.
//
//   x words -> stream, norm, in_proj's rows of the block's channels: u -> conv, SiLU -> its part of x_proj's sums
//   p words -> the block that owns an output of x_proj adds the parts (a warp of its own, while in_proj's z rows run)
//   s words -> dt, B, C -> dt_proj, softplus, state, gate
//   y words -> out_proj's rows of the block
//
// All blocks must be resident at once: launch cooperatively. Every sum has a fixed order: results are equal bit for bit.
// Macros: D d_model, E d_inner, N d_state (16), R dt_rank, W width, V rows of the head, NB blocks, WT weights (0 float32,
// 1 bfloat16, 2 float16), SLOTS ring slots, a multiple of four: then the tile that was in a slot before belonged to the same
// warps, or to a phase that is over, and none can take one round of its barrier for another.
#define NT 512          // threads that compute
#define THREADS (NT + 64)  // one warp more streams, one adds x_proj's parts
#define KS 4            // warps that share a row
#define RA 4            // rows of a tile of in_proj and of the head
#define RC 2            // of out_proj
#define X (R + 2 * N)
#define CE ((E + NB - 1) / NB)     // most channels of a block
#define OE ((D + NB - 1) / NB)     // most rows of out_proj
#define HE ((V + NB - 1) / NB)     // and of the head
#define UP4(x) (((x) + 3) / 4 * 4)
#define OWN ((X + NB - 1) / NB)    // outputs of x_proj that a block adds up, at most
#ifndef POLL
#define POLL 0          // ns between two looks at a word
#endif
#ifdef PROFILE         // cycle counts behind the words, ten a layer and block
#define MARK(k) if (tid == 0) { u64 now_; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now_)); p_words[(i64)X * NB + (l * 10 + k) * NB + block] = PROFILE == 1 ? clock64() : now_; }
#else
#define MARK(k)
#endif
// Tiles a block has asked for and not got: enough to keep the memory busy, no more. Whatever is asked for after them, the
// words among it, waits behind them; with all the ring asked for at once that was up to 8 us. At most SLOTS.
#ifndef FLIGHT
#define FLIGHT MAX2(3, 24 * 1024 / SLOT)
#endif
#ifndef CACHE_HINT
#define CACHE_HINT 1    // weights leave the cache first: the states stay
#endif
#if WT == 0
typedef float wt;
#define WB 4  // bytes of a weight
#else
typedef u16 wt;
#define WB 2
#endif
#define TILE_A (RA * D * WB)
#define TILE_C (RC * E * WB)
#define TILE_X (CE * X * WB)
#define MAX2(a, b) ((a) > (b) ? (a) : (b))
#define SLOT ((MAX2(MAX2(TILE_A, TILE_C), TILE_X) + 127) / 128 * 128)
#define KA (D / KS)     // columns of a warp
#define KC (E / KS)
#define CHUNKS_A ((KA / 8 + 31) / 32)
#define CHUNKS_C ((KC / 8 + 31) / 32)

struct Layer {
  const wt *in, *xt, *dt, *out;  // (2E, D), (E, X): x_proj transposed, (E, R), (D, E)
  const float *norm, *conv, *conv_bias, *A, *skip, *dt_bias, *in_bias, *x_bias, *out_bias;
};

#ifndef LAYERS
#define LAYERS 64
#endif
struct Shared {
  Layer layers[LAYERS];
  u64 full[SLOTS], empty[SLOTS];
  alignas(16) float vec[E];            // the stream times the norm's weight, then y
  float pu[KS][UP4(CE)], pz[KS][UP4(CE)], po[KS][UP4(OE)], ph[KS][UP4(HE)];
  float us[UP4(CE)], sums[X], xp[NT * 2];
  float squares[NT / 32];
};

DEV void bulk(void* to, const void* from, u32 bytes, u64* b, u64 policy) {
#if CACHE_HINT
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)), "l"(policy) : "memory");
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)) : "memory");
#endif
}
DEV void sync() { asm volatile("bar.sync 1, %0;" ::"n"(NT) : "memory"); }

// Words: one 8-byte access each, so number and tag come together.
DEV void put(u64* w, float v, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(w), "l"((u64)tag << 32 | __float_as_uint(v)) : "memory");
}
DEV u64 get(const u64* w) {
  u64 a;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(a) : "l"(w) : "memory");
  return a;
}
DEV void get2(const u64* w, u64& a, u64& b) {
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(w) : "memory");
}
#ifdef NOHOP  // for timing alone: nothing waits for another block
#define RIGHT(a, tag) true
#else
#define RIGHT(a, tag) ((u32)((a) >> 32) == (tag))
#endif
DEV void pause() { if (POLL) asm volatile("nanosleep.u32 %0;" ::"n"(POLL)); }
// Pairs of numbers [2 (tid + i NT)] of `count` words into v.
template <int LINES> DEV void collect(const u64* w, int tid, int count, u32 tag, float2 (&v)[LINES]) {
  bool ready;
  do {
    u64 a[LINES], b[LINES];
#pragma unroll
    for (int i = 0; i < LINES; i++) if (2 * (tid + i * NT) < count) get2(w + 2 * (tid + i * NT), a[i], b[i]);
    ready = true;
#pragma unroll
    for (int i = 0; i < LINES; i++) if (2 * (tid + i * NT) < count) {
      ready &= RIGHT(a[i], tag) && RIGHT(b[i], tag);
      v[i] = make_float2(__uint_as_float((u32)a[i]), __uint_as_float((u32)b[i]));
    }
    if (!ready) pause();
  } while (!ready);
}

// Reads that must leave now, ahead of a wait, whatever the compiler thinks.
DEV float early(const float* p) { float v; asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
DEV float2 early2(const float* p) { float2 v; asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p)); return v; }
DEV u32 early_bits(const u16* p) { u16 v; asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(p)); return v; }
DEV uint4 early4(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
#ifndef PREFETCH
#define PREFETCH 1
#endif
DEV void prefetch(const void* p, i64 bytes, int lane) {
  if (!p || !PREFETCH) return;
  for (i64 at = (i64)p / 128 * 128 + lane * 128; at < (i64)p + bytes; at += 32 * 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

DEV float low_half(u32 w) {
#if WT == 2
  float y; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(w)); return y;
#else
  return __uint_as_float(w << 16);
#endif
}
DEV float high_half(u32 w) {
#if WT == 2
  float y; asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(w)); return y;
#else
  return __uint_as_float(w & 0xffff0000u);
#endif
}
DEV float widen(wt w) {
#if WT == 0
  return w;
#else
  return low_half(w);
#endif
}
// acc += eight weights times x[0..8)
DEV void dot8(const char* p, const float* x, float& acc) {
#if WT == 0
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  acc = fmaf(a.x, x[0], acc); acc = fmaf(a.y, x[1], acc); acc = fmaf(a.z, x[2], acc); acc = fmaf(a.w, x[3], acc);
  acc = fmaf(b.x, x[4], acc); acc = fmaf(b.y, x[5], acc); acc = fmaf(b.z, x[6], acc); acc = fmaf(b.w, x[7], acc);
#else
  const uint4 q = *reinterpret_cast<const uint4*>(p);
  acc = fmaf(low_half(q.x), x[0], acc); acc = fmaf(high_half(q.x), x[1], acc);
  acc = fmaf(low_half(q.y), x[2], acc); acc = fmaf(high_half(q.y), x[3], acc);
  acc = fmaf(low_half(q.z), x[4], acc); acc = fmaf(high_half(q.z), x[5], acc);
  acc = fmaf(low_half(q.w), x[6], acc); acc = fmaf(high_half(q.w), x[7], acc);
#endif
}
// This warp's columns of `vec`, in registers; zero past its share.
template <int CHUNKS, int K> DEV void slice(const float* vec, int part, int lane, float (&x)[CHUNKS * 8]) {
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int at = (lane + 32 * i) * 8;
    const bool in = K % 256 == 0 || at < K;
    const float4 a = in ? *reinterpret_cast<const float4*>(vec + part * K + at) : make_float4(0, 0, 0, 0);
    const float4 b = in ? *reinterpret_cast<const float4*>(vec + part * K + at + 4) : make_float4(0, 0, 0, 0);
    x[8 * i] = a.x; x[8 * i + 1] = a.y; x[8 * i + 2] = a.z; x[8 * i + 3] = a.w;
    x[8 * i + 4] = b.x; x[8 * i + 5] = b.y; x[8 * i + 6] = b.z; x[8 * i + 7] = b.w;
  }
}
// Sums of ROWS rows of a tile over this warp's columns; sums[row] of the tile by one lane each.
template <int ROWS, int CHUNKS, int K, int COLUMNS>
DEV void rows_of_tile(const char* tile, int part, int lane, const float (&x)[CHUNKS * 8], float* sums) {
  float acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) acc[r] = 0.f;
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) {
    const int at = (lane + 32 * i) * 8;
    if (K % 256 == 0 || at < K) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) dot8(tile + (r * COLUMNS + part * K + at) * WB, x + 8 * i, acc[r]);
    }
  }
  if (ROWS == 4) {
    const bool h = lane & 16, q = lane & 8;
    float a = h ? acc[2] : acc[0], b = h ? acc[3 % ROWS] : acc[1];
    a += __shfl_xor_sync(~0u, h ? acc[0] : acc[2 % ROWS], 16);
    b += __shfl_xor_sync(~0u, h ? acc[1] : acc[3 % ROWS], 16);
    float s = q ? b : a;
    s += __shfl_xor_sync(~0u, q ? a : b, 8);
    s += __shfl_xor_sync(~0u, s, 4);
    s += __shfl_xor_sync(~0u, s, 2);
    s += __shfl_xor_sync(~0u, s, 1);
    if ((lane & 7) == 0) sums[lane >> 3] = s;
  } else {
    const bool h = lane & 16;
    float s = h ? acc[1] : acc[0];
    s += __shfl_xor_sync(~0u, h ? acc[0] : acc[1], 16);
    s += __shfl_xor_sync(~0u, s, 8);
    s += __shfl_xor_sync(~0u, s, 4);
    s += __shfl_xor_sync(~0u, s, 2);
    s += __shfl_xor_sync(~0u, s, 1);
    if ((lane & 15) == 0) sums[lane >> 4] = s;
  }
}

// Share of block b of `total` things: from (first) to (next).
DEV int share(int total, int b) { return (int)((i64)total * b / NB); }

#define RPL ((R + 15) / 16)            // rows of x_proj's dt part that a lane of dt_proj takes
#define DT_VEC (R % 16 == 0 && RPL * WB % 16 == 0)
#define ITEMS ((CE * 16 + NT - 1) / NT)  // channels a thread takes a sixteenth of
#define XL ((D / 2 + NT - 1) / NT)
#define YL ((E / 2 + NT - 1) / NT)
#define PAIRS (X / 2)
#define PARTS (NT / PAIRS)

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_step(
    const Layer* __restrict__ table, int count, const wt* __restrict__ embedding, const wt* __restrict__ head,
    const float* __restrict__ norm_f, const float* __restrict__ head_bias, float eps, float eps_f,
    const int* __restrict__ token, float* __restrict__ conv_state, i64 conv_layer, float* __restrict__ ssm_state,
    i64 ssm_layer, float* __restrict__ logits, u64* __restrict__ words, u32* __restrict__ epoch) {
  extern __shared__ __align__(128) char memory[];
  Shared& sh = *reinterpret_cast<Shared*>(memory + SLOTS * SLOT);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, block = blockIdx.x;
  const int c0 = share(E, block), nc = share(E, block + 1) - c0;
  const int o0 = share(D, block), no = share(D, block + 1) - o0;
  const int v0 = share(V, block), nv = share(V, block + 1) - v0;
  const int tiles_u = (nc + RA - 1) / RA, tiles_o = (no + RC - 1) / RC, tiles_h = (nv + RA - 1) / RA;
  u64 *x_words = words, *y_words = x_words + D, *s_words = y_words + E, *p_words = s_words + X;
  const Layer* layers = sh.layers;  // a pointer read from memory would cost each phase as much as an exchange
  for (int i = tid; i < count * (int)(sizeof(Layer) / 8); i += THREADS)
    reinterpret_cast<u64*>(sh.layers)[i] = reinterpret_cast<const u64*>(table)[i];
  if (tid == 0) {
    for (int i = 0; i < SLOTS; i++) {
      bar_init(&sh.full[i], 1);
      bar_init(&sh.empty[i], KS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (warp == NT / 32) {  // streams the weights
    u64 policy = 0;
#if CACHE_HINT
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
    u32 t = 0;
    auto tile = [&](const wt* from, int numbers) {
      const u32 slot = t % SLOTS, round = t / SLOTS;
      if (t >= FLIGHT) bar_wait(&sh.full[(t - FLIGHT) % SLOTS], (t - FLIGHT) / SLOTS & 1);
      if (round) bar_wait(&sh.empty[slot], (round - 1) & 1);
      bar_expect(&sh.full[slot], numbers * WB);
      bulk(memory + slot * SLOT, from, numbers * WB, &sh.full[slot], policy);
      t++;
    };
    for (int l = 0; l < count; l++) {
      const Layer& w = layers[l];
      prefetch(ssm_state + l * ssm_layer + (i64)c0 * N, nc * N * 4, lane);
      prefetch(w.A + (i64)c0 * N, nc * N * 4, lane);
      prefetch(w.dt + (i64)c0 * R, (i64)nc * R * WB, lane);
      prefetch(w.conv + c0 * W, nc * W * 4, lane);
      for (int k = 0; k < W - 1; k++) prefetch(conv_state + l * conv_layer + (i64)k * E + c0, nc * 4, lane);
      if (lane == 0) {
        prefetch(w.conv_bias ? w.conv_bias + c0 : nullptr, 4, 0);
        prefetch(w.skip ? w.skip + c0 : nullptr, 4, 0);
        prefetch(w.dt_bias ? w.dt_bias + c0 : nullptr, 4, 0);
      }
      if (block % 8 == 0) prefetch(w.norm, D * 4, lane);
      if (lane == 0) {
        for (int i = 0; i < tiles_u; i++) tile(w.in + (i64)(c0 + i * RA) * D, min(RA, nc - i * RA) * D);
        tile(w.xt + (i64)c0 * X, nc * X);
        for (int i = 0; i < tiles_u; i++) tile(w.in + (i64)(E + c0 + i * RA) * D, min(RA, nc - i * RA) * D);
        for (int i = 0; i < tiles_o; i++) tile(w.out + (i64)(o0 + i * RC) * E, min(RC, no - i * RC) * E);
      }
      __syncwarp();
    }
    if (lane == 0)
      for (int i = 0; i < tiles_h; i++) tile(head + (i64)(v0 + i * RA) * D, min(RA, nv - i * RA) * D);
    return;
  }

  const u32 base = *epoch * (u32)count + 1u;
  if (warp == NT / 32 + 1) {  // adds up the parts of its outputs of x_proj
    constexpr int LOADS = (NB + 31) / 32;
    for (int l = 0; l < count; l++) {
      const u32 tag = base + l;
      float v[OWN][LOADS];
      bool ready;
      do {
        u64 a[OWN][LOADS];
        ready = true;
#pragma unroll
        for (int q = 0; q < OWN; q++)
#pragma unroll
          for (int i = 0; i < LOADS; i++) {
            const int o = block + q * NB, from = lane + 32 * i;
            if (o < X && from < NB) a[q][i] = get(p_words + (i64)o * NB + from);
          }
#pragma unroll
        for (int q = 0; q < OWN; q++)
#pragma unroll
          for (int i = 0; i < LOADS; i++) {
            const int o = block + q * NB, from = lane + 32 * i;
            v[q][i] = 0.f;
            if (o < X && from < NB) {
              ready &= RIGHT(a[q][i], tag);
              v[q][i] = __uint_as_float((u32)a[q][i]);
            }
          }
        ready = __all_sync(~0u, ready);
        if (!ready) pause();
      } while (!ready);
#pragma unroll
      for (int q = 0; q < OWN; q++) {
        const int o = block + q * NB;
        float s = v[q][0];
#pragma unroll
        for (int i = 1; i < LOADS; i++) s += v[q][i];
#pragma unroll
        for (int m = 16; m; m >>= 1) s += __shfl_xor_sync(~0u, s, m);
        if (lane == 0 && o < X) put(s_words + o, layers[l].x_bias ? s + layers[l].x_bias[o] : s, tag);
      }
    }
    return;
  }

  const int group = warp / KS, part = warp % KS;
  u32 t = 0;  // the first tile of what comes next
// BODY for every tile of the next `tiles` that is this group's: `tile` lies at its weights, `i` is its number.
#define MINE(tiles, BODY)                                        \
  for (int i = group; i < (tiles); i += NT / 32 / KS) {          \
    const u32 at = t + i, slot = at % SLOTS;                     \
    const char* tile = memory + slot * SLOT;                     \
    bar_wait(&sh.full[slot], (at / SLOTS) & 1);                  \
    BODY;                                                        \
    __syncwarp();                                                \
    if (lane == 0) bar_arrive(&sh.empty[slot]);                  \
  }                                                              \
  t += (tiles);

  float2 stream[XL];
  {
    const wt* row = embedding + (i64)*token * D;
#pragma unroll
    for (int i = 0; i < XL; i++) {
      const int k = 2 * (tid + i * NT);
      stream[i] = k < D ? make_float2(widen(row[k]), widen(row[k + 1])) : make_float2(0.f, 0.f);
    }
  }
  for (int l = 0; l <= count; l++) {
    const bool last = l == count;
    const Layer& w = layers[last ? 0 : l];
    const u32 tag = base + l;
    // What this layer needs of its own is asked for before the wait.
    float2 scale[XL];
#pragma unroll
    for (int i = 0; i < XL; i++) {
      const int k = 2 * (tid + i * NT);
      if (k < D) scale[i] = early2((last ? norm_f : w.norm) + k);
    }
    float taps[W], past[W], conv_bias = 0.f, u_bias = 0.f;
    float* own_conv = conv_state + l * conv_layer + c0 + tid;
    if (!last) {
      if (tid < nc) {
#pragma unroll
        for (int k = 0; k < W; k++) taps[k] = early(w.conv + (c0 + tid) * W + k);
#pragma unroll
        for (int k = 0; k + 1 < W; k++) past[k] = early(own_conv + (i64)k * E);
        if (w.conv_bias) conv_bias = early(w.conv_bias + c0 + tid);
        if (w.in_bias) u_bias = early(w.in_bias + c0 + tid);
      }
    }
    MARK(0);
    // The stream and its norm: the factor 1 / rms is applied to the sums, so nothing waits for it.
    if (l > 0) {
      float2 add[XL];
      collect<XL>(x_words, tid, D, tag - 1, add);
#pragma unroll
      for (int i = 0; i < XL; i++) if (2 * (tid + i * NT) < D) { stream[i].x += add[i].x; stream[i].y += add[i].y; }
    }
    MARK(1);
    float square = 0.f;
#pragma unroll
    for (int i = 0; i < XL; i++) {
      const int k = 2 * (tid + i * NT);
      if (k < D) {
        square = fmaf(stream[i].x, stream[i].x, square);
        square = fmaf(stream[i].y, stream[i].y, square);
        *reinterpret_cast<float2*>(&sh.vec[k]) = make_float2(stream[i].x * scale[i].x, stream[i].y * scale[i].y);
      }
    }
#pragma unroll
    for (int m = 16; m; m >>= 1) square += __shfl_xor_sync(~0u, square, m);
    if (lane == 0) sh.squares[warp] = square;
    sync();
    float mean = 0.f;
#pragma unroll
    for (int i = 0; i < NT / 32; i++) mean += sh.squares[i];
    const float inverse = rsqrtf(mean / D + (last ? eps_f : eps));
    float xr[CHUNKS_A * 8];
    slice<CHUNKS_A, KA>(sh.vec, part, lane, xr);

    if (last) {
      MINE(tiles_h, (rows_of_tile<RA, CHUNKS_A, KA, D>(tile, part, lane, xr, &sh.ph[part][i * RA])))
      sync();
      for (int v = tid; v < nv; v += NT) {
        const float s = ((sh.ph[0][v] + sh.ph[1][v]) + (sh.ph[2][v] + sh.ph[3][v])) * inverse;
        logits[v0 + v] = head_bias ? s + head_bias[v0 + v] : s;
      }
      break;
    }

    // u, its convolution, and this block's part of x_proj's sums
    MINE(tiles_u, (rows_of_tile<RA, CHUNKS_A, KA, D>(tile, part, lane, xr, &sh.pu[part][i * RA])))
    sync();
    MARK(2);
    if (tid < nc) {
      const float u = fmaf((sh.pu[0][tid] + sh.pu[1][tid]) + (sh.pu[2][tid] + sh.pu[3][tid]), inverse, u_bias);
      past[W - 1] = u;
      float s = 0.f;
#pragma unroll
      for (int k = 0; k < W; k++) s = fmaf(taps[k], past[k], s);
#pragma unroll
      for (int k = 0; k + 1 < W; k++) own_conv[(i64)k * E] = past[k + 1];
      s += conv_bias;
      sh.us[tid] = s * sigmoid(s);
    }
    sync();
    {
      const u32 slot = t % SLOTS;
      bar_wait(&sh.full[slot], (t / SLOTS) & 1);
      const wt* xt = reinterpret_cast<const wt*>(memory + slot * SLOT);
      const int pair = tid % PAIRS, first = tid / PAIRS;
      float a = 0.f, b = 0.f;
      if (first < PARTS) {
        for (int c = first; c < nc; c += PARTS) {
          const float u = sh.us[c];
#if WT == 0
          const float2 v = *reinterpret_cast<const float2*>(xt + c * X + 2 * pair);
          a = fmaf(v.x, u, a);
          b = fmaf(v.y, u, b);
#else
          const u32 v = *reinterpret_cast<const u32*>(xt + c * X + 2 * pair);
          a = fmaf(low_half(v), u, a);
          b = fmaf(high_half(v), u, b);
#endif
        }
        *reinterpret_cast<float2*>(&sh.xp[first * X + 2 * pair]) = make_float2(a, b);
      }
      sync();
      if (warp < KS && lane == 0) bar_arrive(&sh.empty[slot]);
      t++;
      for (int o = tid; o < X; o += NT) {
        float s = sh.xp[o];
#pragma unroll
        for (int k = 1; k < PARTS; k++) s += sh.xp[k * X + o];
        put(p_words + (i64)o * NB + block, s, tag);
      }
    }

    MARK(3);
    // z, while x_proj's sums are made
    MINE(tiles_u, (rows_of_tile<RA, CHUNKS_A, KA, D>(tile, part, lane, xr, &sh.pz[part][i * RA])))
    MARK(4);
    // What the state's phase needs of its own leaves before the wait.
    float h[ITEMS], A[ITEMS], skip[ITEMS], dt_bias[ITEMS], z_bias[ITEMS];
#if DT_VEC
    uint4 dtw[ITEMS][RPL * WB / 16];
#else
    float dtw[ITEMS][RPL];
#endif
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int c = tid / 16 + i * (NT / 16), n = tid % 16;
      skip[i] = dt_bias[i] = z_bias[i] = h[i] = A[i] = 0.f;
      if (c < nc) {
        h[i] = early(ssm_state + l * ssm_layer + (i64)(c0 + c) * N + n);
        A[i] = early(w.A + (i64)(c0 + c) * N + n);
        const wt* from = w.dt + (i64)(c0 + c) * R + n * RPL;
#if DT_VEC
#pragma unroll
        for (int k = 0; k < RPL * WB / 16; k++) dtw[i][k] = early4(from + k * (16 / WB));
#else
#pragma unroll
        for (int k = 0; k < RPL; k++) {
#if WT == 0
          dtw[i][k] = n * RPL + k < R ? early(from + k) : 0.f;
#else
          dtw[i][k] = n * RPL + k < R ? low_half(early_bits(from + k)) : 0.f;
#endif
        }
#endif
        if (w.skip) skip[i] = early(w.skip + c0 + c);
        if (w.dt_bias) dt_bias[i] = early(w.dt_bias + c0 + c);
        if (w.in_bias) z_bias[i] = early(w.in_bias + E + c0 + c);
      }
    }
    for (int o = tid; o < X; o += NT) {
      u64 a = get(s_words + o);
      while (!RIGHT(a, tag)) { pause(); a = get(s_words + o); }
      sh.sums[o] = __uint_as_float((u32)a);
    }
    sync();

    MARK(5);
    // the state: sixteen threads a channel
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int c = tid / 16 + i * (NT / 16), n = tid % 16;
      float dt = 0.f;
#if DT_VEC
#pragma unroll
      for (int k = 0; k < RPL * WB / 16; k++) {
        float x[16 / WB];
#pragma unroll
        for (int j = 0; j < 16 / WB; j++) x[j] = sh.sums[n * RPL + k * (16 / WB) + j];
        const uint4 q = dtw[i][k];
#if WT == 0
        dt = fmaf(__uint_as_float(q.x), x[0], dt); dt = fmaf(__uint_as_float(q.y), x[1], dt);
        dt = fmaf(__uint_as_float(q.z), x[2], dt); dt = fmaf(__uint_as_float(q.w), x[3], dt);
#else
        dt = fmaf(low_half(q.x), x[0], dt); dt = fmaf(high_half(q.x), x[1], dt);
        dt = fmaf(low_half(q.y), x[2], dt); dt = fmaf(high_half(q.y), x[3], dt);
        dt = fmaf(low_half(q.z), x[4], dt); dt = fmaf(high_half(q.z), x[5], dt);
        dt = fmaf(low_half(q.w), x[6], dt); dt = fmaf(high_half(q.w), x[7], dt);
#endif
      }
#else
#pragma unroll
      for (int k = 0; k < RPL; k++) if (n * RPL + k < R) dt = fmaf(dtw[i][k], sh.sums[n * RPL + k], dt);
#endif
#pragma unroll
      for (int m = 8; m; m >>= 1) dt += __shfl_xor_sync(~0u, dt, m);
      dt = softplus(dt + dt_bias[i]);
      const float u = sh.us[min(c, CE - 1)];
      const float now = fmaf(decay(dt, A[i] * LOG2E), h[i], dt * u * sh.sums[R + n]);
      float y = now * sh.sums[R + N + n];
#pragma unroll
      for (int m = 8; m; m >>= 1) y += __shfl_xor_sync(~0u, y, m);
      if (c < nc) {
        ssm_state[l * ssm_layer + (i64)(c0 + c) * N + n] = now;
        if (n == 0) {
          const float z = fmaf((sh.pz[0][c] + sh.pz[1][c]) + (sh.pz[2][c] + sh.pz[3][c]), inverse, z_bias[i]);
          put(y_words + c0 + c, fmaf(skip[i], u, y) * (z * sigmoid(z)), tag);
        }
      }
    }

    MARK(6);
    // out_proj
    float2 yv[YL];
    collect<YL>(y_words, tid, E, tag, yv);
#pragma unroll
    for (int i = 0; i < YL; i++) if (2 * (tid + i * NT) < E) *reinterpret_cast<float2*>(&sh.vec[2 * (tid + i * NT)]) = yv[i];
    MARK(7);
    float out_bias = 0.f;
    if (w.out_bias && tid < no) out_bias = w.out_bias[o0 + tid];
    sync();
    float yr[CHUNKS_C * 8];
    slice<CHUNKS_C, KC>(sh.vec, part, lane, yr);
    MARK(8);
    MINE(tiles_o, (rows_of_tile<RC, CHUNKS_C, KC, E>(tile, part, lane, yr, &sh.po[part][i * RC])))
    sync();
    MARK(9);
    if (tid < no) put(x_words + o0 + tid, (sh.po[0][tid] + sh.po[1][tid]) + (sh.po[2][tid] + sh.po[3][tid]) + out_bias, tag);
  }
  // Every block has read the epoch by now: this one has had numbers of each.
  if (block == 0 && tid == 0) *epoch += 1;
}
