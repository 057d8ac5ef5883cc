// Selective scan, forward. G threads a channel with NS states each in registers; time is walked in tiles of TILE steps.
// A block keeps two tiles in shared memory. Between two barriers every warp gates and writes the outputs of tile k - 1, puts
// softplus(dt) and dt*u of tile k + 1 into the very slots it took them from, and scans tile k: the warps of a block drift
// apart, so one's elementwise instructions fill the cycles in which another waits for exponentials. Inputs are asked for a
// whole tile ahead, in 16-byte pieces. Sums over states go through a butterfly that leaves each lane one step.
//
// Grid (groups * blocks per group, batch, chunks). PASS 1 writes only a chunk's end state and its sum of dt: the decay of a
// whole chunk is exp(A * sum dt). `scan_combine` turns these into every chunk's start state; PASS 0 writes the outputs. To
// share its work more evenly, PASS 1 may cut every chunk but the last, which it has no need of, in CUT pieces.
#ifndef G
#define G 4
#endif
#ifndef NS
#define NS 4
#endif
#ifndef NT
#define NT 256
#endif
#ifndef MINB
#define MINB 2
#endif
#ifndef TILE
#define TILE 32
#endif
#ifndef PASS
#define PASS 0
#endif
#ifndef VARLEN
#define VARLEN 0
#endif
#ifndef FIXB
#define FIXB 0  // B is (d_inner, d_state), the same at every position
#endif
#ifndef FIXC
#define FIXC 0
#endif
#ifndef N
#define N 16  // states
#endif
#ifndef HASZ
#define HASZ 1
#endif
#ifndef SOFTPLUS
#define SOFTPLUS 1
#endif
#ifndef CUT
#define CUT 1  // pieces that PASS 1 cuts a chunk in
#endif
#ifndef EVERY
#define EVERY 32  // steps between checkpoints
#endif
#ifndef VEC
#define VEC 0  // u, dt, z, y are aligned to 16 bytes, and every block has all its channels
#endif
#ifndef VECB
#define VECB 0  // the same of B and C
#endif
#ifndef SIDE
#define SIDE (G > 2)  // measured: no gain with two lanes
#endif
#define CPW (32 / G)       // channels of a warp
#define APART (SIDE ? CPW : 1)  // between the lanes of a channel
#define CB (NT / G)        // channels of a block
#define NP (G * NS)        // states, padded
#define PER (CB / 8)       // eight-channel pieces of a row
#define SEGS (TILE * PER)  // and of a tile
#define ITEMS ((SEGS + NT - 1) / NT)
#define ROWS_APART (NT / PER)
#define ROW (CB + 8)       // slots of a row in shared memory: two rows on other banks
#define PIECES (TILE * N / 8)
#define AHEAD (VECB && 2 * PIECES <= NT)  // B and C, too, are asked for a tile ahead
#define LAST_PASS (PASS == 0)
// The form that models use where they fill the chip. Of some 2,400 orders of the same statements that were timed on an H200
// this one was the fastest, by 2 %, and with the loads and the staging below by 5. The other forms were not timed in it and
// keep the plain one.
#define TUNED (LAST_PASS && IN == 1 && HASZ && G == 2 && NS == 8 && N == 16 && VEC && AHEAD && !VARLEN && !FIXB && !FIXC)

struct alignas(2 * sizeof(real)) Slot { real dv, du; };  // dt and dt*u; afterwards y stands where dt stood

// As load8, for what is read for the last time: it leaves the first-level cache alone. All of the fastest orders had it.
DEV Pack8 load8_late(const act* p, int n, bool vec) {
  if (sizeof(Pack8) > 16 || !vec || n < 8) return load8(p, n, vec);
  Pack8 r;
  uint4& v = reinterpret_cast<uint4&>(r);
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return r;
}

// Where a channel's slot is in its row: pairs of channels are permuted so that threads that write neighbouring pieces of
// eight channels meet no bank twice.
DEV int place(int ch) { return (ch & ~7) | ((((ch >> 1) ^ (ch >> 4)) & 3) << 1) | (ch & 1); }

extern "C" __global__ void __launch_bounds__(NT, MINB) scan_forward(
    const act* __restrict__ u, i64 u_b, i64 u_l, const act* __restrict__ dt, i64 dt_b, i64 dt_l,
    const act* __restrict__ z, i64 z_b, i64 z_l, const act* __restrict__ Bm, i64 B_b, i64 B_l, i64 B_g,
    const act* __restrict__ Cm, i64 C_b, i64 C_l, i64 C_g, const real* __restrict__ A, const real* __restrict__ Bfix,
    const real* __restrict__ Cfix, const real* __restrict__ D, const real* __restrict__ bias,
    const real* __restrict__ init, const int* __restrict__ starts, const int* __restrict__ ends,
    act* __restrict__ y, i64 y_b, i64 y_l, real* __restrict__ final_state, real* __restrict__ ckpt, real* __restrict__ chunk_state,
    real* __restrict__ chunk_dt, int L, int d_inner, int group_channels, int blocks_per_group, int chunk_len,
    int chunks) {
  __shared__ __align__(16) Slot slots[2][TILE][ROW];
  __shared__ __align__(16) real sb[2][TILE][NP], sc[2][TILE][NP];
  __shared__ __align__(16) real sbias[CB], sD[CB];
#if VARLEN
  __shared__ int sstart[2][TILE], send[2][TILE];
#endif
  #if SIDE
  // A warp's lanes with the same states are neighbours: reads of B and C, 16 bytes a lane, then take two wavefronts, not four.
  const int tid = threadIdx.x, lane = tid & 31, g = lane / CPW, ch = tid / 32 * CPW + lane % CPW, at = place(ch);
#else
  const int tid = threadIdx.x, ch = tid / G, g = tid % G, at = place(ch);
#endif
  const int grp = blockIdx.x / blocks_per_group, first = (blockIdx.x % blocks_per_group) * CB;
  const int c0 = grp * group_channels + first, width = VEC ? CB : min(CB, group_channels - first);
  const int c = c0 + ch;
  const bool live = VEC || ch < width;
  FOR_EACH(q, CB) {
    sbias[q] = bias && q < width ? bias[c0 + q] : real(0);
    sD[q] = D && q < width ? D[c0 + q] : real(0);
  }
#if N < NP
  FOR_EACH(q, 2 * TILE * (NP - N)) {
    (&sb[0][0][0])[q / (NP - N) * NP + N + q % (NP - N)] = real(0);
    (&sc[0][0][0])[q / (NP - N) * NP + N + q % (NP - N)] = real(0);
  }
#endif
  __syncthreads();
  const i64 b = blockIdx.y;
  const int k0 = blockIdx.z, t_begin = k0 * chunk_len, t_end = min(L, t_begin + chunk_len);

  real a[NS], h[NS];
#if FIXB
  real bf[NS];
#endif
#if FIXC
  real cf[NS];
#endif
#pragma unroll
  for (int n = 0; n < NS; n++) {
    const int s = g * NS + n;
    const bool here = live && s < N;
    a[n] = here ? A[(i64)c * N + s] * LOG2E : real(0);
#if FIXB
    bf[n] = here ? Bfix[(i64)c * N + s] : real(0);
#endif
#if FIXC
    cf[n] = here ? Cfix[(i64)c * N + s] : real(0);
#endif
    h[n] = real(0);
    if (here) {
      if (LAST_PASS && chunks > 1) h[n] = chunk_state[((b * ((chunks - 1) * CUT + 1) + k0 * CUT) * d_inner + c) * N + s];
      else if (LAST_PASS && !VARLEN && init && k0 == 0) h[n] = init[(b * d_inner + c) * N + s];
    }
  }
  real dt_sum = real(0);
#if PASS == 1
  bool was_reset = false;
#endif

  // The elementwise role: piece i of this thread is row `row0 + i * ROWS_APART`, channels seg..seg+7 of the block.
  const int row0 = tid / PER, seg = (tid % PER) * 8, swap = (tid % PER) >> 1;
  const bool busy = SEGS >= NT || tid < SEGS;
  const int count = busy ? max(0, min(8, width - seg)) : 0;
  const act *pu = u + b * u_b + (i64)(t_begin + row0) * u_l + c0 + seg, *pd = dt + b * dt_b + (i64)(t_begin + row0) * dt_l + c0 + seg;
  const act *pu_late = pu, *pz = HASZ ? z + b * z_b + (i64)(t_begin + row0) * z_l + c0 + seg : nullptr;
  act* py = y + b * y_b + (t_begin + row0) * y_l + c0 + seg;
  Pack8 nu[ITEMS], nd[ITEMS], lu[ITEMS], lz[ITEMS];  // tile k + 1: u, dt; tile k: u once more, z
#if AHEAD
  const bool is_c = tid >= PIECES;
  const int brow = (is_c ? tid - PIECES : tid) / (N / 8), bn = (is_c ? tid - PIECES : tid) % (N / 8) * 8;
  const bool brings = is_c ? (LAST_PASS && !FIXC && tid < 2 * PIECES) : !FIXB;
  const i64 pb_l = is_c ? C_l : B_l;
  const act* pb = brings ? (is_c ? Cm + b * C_b + grp * C_g : Bm + b * B_b + grp * B_g) + (i64)(t_begin + brow) * pb_l + bn : nullptr;
  Pack8 nb;
#endif
  auto fetch = [&](int t0) {  // u, dt, B, C of the tile that starts at t0
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int n = t0 + row0 + i * ROWS_APART < t_end && (ITEMS * NT == SEGS || row0 + i * ROWS_APART < TILE) ? count : 0;
      if (!VEC || n) {
        nu[i] = load8(pu + (i64)(i * ROWS_APART) * u_l, VEC ? 8 : n, VEC);
        nd[i] = load8(pd + (i64)(i * ROWS_APART) * dt_l, VEC ? 8 : n, VEC);
      }
    }
    pu += TILE * u_l;
    pd += TILE * dt_l;
#if AHEAD
    if (brings && t0 + brow < t_end) nb = load8(pb, 8, true);
    pb += TILE * pb_l;
#endif
  };
  auto fetch_late = [&](int t0) {
    if (!LAST_PASS) return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int n = t0 + row0 + i * ROWS_APART < t_end && (ITEMS * NT == SEGS || row0 + i * ROWS_APART < TILE) ? count : 0;
      if (!VEC || n) {
        lu[i] = load8_late(pu_late + (i64)(i * ROWS_APART) * u_l, VEC ? 8 : n, VEC);
        if (HASZ) lz[i] = load8_late(pz + (i64)(i * ROWS_APART) * z_l, VEC ? 8 : n, VEC);
      }
    }
    pu_late += TILE * u_l;
    if (HASZ) pz += TILE * z_l;
  };
  // Outputs of the tile at t0, from the slots of buffer w.
  auto gate = [&](int t0, int w) {
    if (!LAST_PASS) return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int row = row0 + i * ROWS_APART;
      const int n = t0 + row < t_end && (ITEMS * NT == SEGS || row < TILE) ? count : 0;
      if (n > 0) {
        Pack8 out;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          real v2[2];
#pragma unroll
          for (int m = 0; m < 2; m++) v2[m] = HASZ ? silu(part(lz[i], 2 * j + m)) : real(1);
          const Four f = *reinterpret_cast<const Four*>(&slots[w][row][seg + ((j ^ swap) & 3) * 2]);
#pragma unroll
          for (int m = 0; m < 2; m++) {
            const int e = 2 * j + m;
            const real v = fma_(sD[seg + e], part(lu[i], e), f.v[2 * m]);
            v2[m] = HASZ ? v * v2[m] : v;
          }
          set_pair(out, 2 * j, v2[0], v2[1]);
        }
        store8(py + (i64)(i * ROWS_APART) * y_l, out, VEC ? 8 : n, VEC);
      }
    }
    py += TILE * y_l;
  };
  // softplus(dt) and dt*u of the tile at t0 into buffer w, with its B and C.
  auto stage = [&](int t0, int w) {
#if AHEAD
    if (brings) {
      real* to = is_c ? &sc[w][brow][bn] : &sb[w][brow][bn];
      const bool here = t0 + brow < t_end;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        Four f;
#pragma unroll
        for (int m = 0; m < 4; m++) f.v[m] = here ? part(nb, 4 * j + m) : real(0);
        reinterpret_cast<Four*>(to)[j] = f;
      }
    }
#else
    FOR_EACH(q, TILE * N) {
      const int row = q / N, n = q % N;
      const bool here = t0 + row < t_end;
      if (!FIXB) sb[w][row][n] = here ? to_real(Bm[b * B_b + (i64)(t0 + row) * B_l + grp * B_g + n]) : real(0);
      if (LAST_PASS && !FIXC) sc[w][row][n] = here ? to_real(Cm[b * C_b + (i64)(t0 + row) * C_l + grp * C_g + n]) : real(0);
    }
#endif
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int row = row0 + i * ROWS_APART;
      if (!busy || (ITEMS * NT != SEGS && row >= TILE)) continue;
      if (t0 + row < t_end) {
#pragma unroll
        for (int half = 0; half < 4; half += 2) {  // four at a time, so that their chains of instructions interleave
          Four f[2];
#pragma unroll
          for (int q = 0; q < 2; q++) {
#pragma unroll
            for (int m = 0; m < 2; m++) {
              const int e = 2 * (half + q) + m;
              real v = part(nd[i], e) + sbias[seg + e];
              if (SOFTPLUS) v = softplus(v);
              f[q].v[2 * m] = v;
              f[q].v[2 * m + 1] = v * part(nu[i], e);
            }
          }
#pragma unroll
          for (int q = 0; q < 2; q++)
            *reinterpret_cast<Four*>(&slots[w][row][seg + (((half + q) ^ swap) & 3) * 2]) = f[q];
        }
      } else {  // a step of length zero leaves the state as it is
#pragma unroll
        for (int j = 0; j < 4; j++) *reinterpret_cast<Four*>(&slots[w][row][seg + j * 2]) = Four{};
      }
    }
#if VARLEN
    if (tid < TILE) {
      sstart[w][tid] = t0 + tid < t_end ? starts[t0 + tid] : 0;
      send[w][tid] = t0 + tid < t_end ? ends[t0 + tid] : 0;
    }
#endif
  };
  auto scan = [&](int t0, int w) {
#if PASS == 0
    if (ckpt && live && t0 % EVERY == 0) {
      real* p = ckpt + ((b * ((L + EVERY - 1) / EVERY) + t0 / EVERY) * d_inner + c) * N;
#if N == NP
#pragma unroll
      for (int m = 0; m < NS; m += 4) *reinterpret_cast<Four*>(p + g * NS + m) = Four{h[m], h[m + 1], h[m + 2], h[m + 3]};
#else
#pragma unroll
      for (int n = 0; n < NS; n++) if (g * NS + n < N) p[g * NS + n] = h[n];
#endif
    }
#endif
    Slot ahead[4];
#pragma unroll
    for (int r = 0; r < 4; r++) ahead[r] = slots[w][r][at];
    constexpr int rounds = G > 2 ? 8 : 4;  // measured: with two lanes a whole tile at once is slower
#if TUNED
    // Four steps at a time: the states of the first two come together, those of the others one after the other.
    real ahead_b[NS];
    auto read = [&](real (&to)[NS], const real (*from)[NP], int s, int m) {
      const Four f = *reinterpret_cast<const Four*>(&from[s][g * NS + m]);
#pragma unroll
      for (int q = 0; q < 4; q++) to[m + q] = f.v[q];
    };
    read(ahead_b, sb[w], 0, 0);
    read(ahead_b, sb[w], 0, 4);
    const bool odd = g & 1;
#pragma unroll rounds
    for (int s0 = 0; s0 < TILE; s0 += 4) {
      Slot f[4];
      real b[4][NS], c[4][NS], e[4][NS], in[4][NS], after[4][NS], acc[4];
      auto decays = [&](int r, int first, int last) {
#pragma unroll
        for (int n = first; n < last; n++) e[r][n] = decay(f[r].dv, a[n]);
      };
      auto inputs = [&](int r, int first, int last) {
#pragma unroll
        for (int n = first; n < last; n++) in[r][n] = f[r].du * b[r][n];
      };
      auto state = [&](int r, int n) { after[r][n] = fma_(e[r][n], r ? after[r ? r - 1 : 0][n] : h[n], in[r][n]); };
      auto output = [&](int r, int n) { acc[r] = n ? fma_(after[r][n], c[r][n], acc[r]) : after[r][n] * c[r][n]; };
      auto first_two = [&](int n) {
        state(0, n);
        if (n % 4 == 3) output(0, n);
        state(1, n);
        output(1, n);
        if (n % 4 != 3) output(0, n);
      };
      // Lane g ends with the sums of the step `r + g`, which take the place of its dt.
      auto meet = [&](int r) {
        real sum = odd ? acc[r + 1] : acc[r];
        sum += __shfl_xor_sync(~0u, odd ? acc[r] : acc[r + 1], APART);
        if (r == 0) __syncwarp();
        (&slots[w][s0 + r][at])[g * ROW].dv = sum;
      };
      auto take = [&](int r) {
        f[r] = ahead[r];
        ahead[r] = slots[w][(s0 + 4 + r) % TILE][at];
      };
      take(0);
      take(3);
      take(1);
      take(2);
#pragma unroll
      for (int m = 0; m < NS; m += 4) {
#pragma unroll
        for (int q = 0; q < 4; q++) b[0][m + q] = ahead_b[m + q];
        read(ahead_b, sb[w], (s0 + 4) % TILE, m);
      }
      read(c[0], sc[w], s0, 0);
      read(c[0], sc[w], s0, 4);
      decays(0, 0, 4);
      inputs(0, 0, 4);
      decays(0, 4, 8);
      inputs(0, 4, 8);
      read(b[1], sb[w], s0 + 1, 0);
      read(c[1], sc[w], s0 + 1, 0);
#pragma unroll
      for (int n = 0; n < 4; n++) {
        decays(1, n, n + 1);
        inputs(1, n, n + 1);
      }
      read(b[1], sb[w], s0 + 1, 4);
      read(c[1], sc[w], s0 + 1, 4);
#pragma unroll
      for (int n = 4; n < 7; n++) {
        decays(1, n, n + 1);
        if (n < 6) inputs(1, n, n + 1);
      }
#pragma unroll
      for (int n = 0; n < 4; n++) {
        first_two(n);
        if (n == 0) inputs(1, 6, 7);
      }
      decays(1, 7, 8);
      inputs(1, 7, 8);
      asm volatile("" ::: "memory");
      read(b[2], sb[w], s0 + 2, 0);
      read(c[2], sc[w], s0 + 2, 0);
      decays(2, 0, 1);
#pragma unroll
      for (int n = 4; n < NS; n++) {
        first_two(n);
        if (n == 4) inputs(2, 0, 1);
      }
#pragma unroll
      for (int n = 0; n < NS; n++) {
        if (n == 4) {
          read(b[2], sb[w], s0 + 2, 4);
          read(c[2], sc[w], s0 + 2, 4);
        }
        if (n) {
          decays(2, n, n + 1);
          inputs(2, n, n + 1);
        }
        state(2, n);
        output(2, n);
      }
      read(b[3], sb[w], s0 + 3, 0);
      read(b[3], sb[w], s0 + 3, 4);
      read(c[3], sc[w], s0 + 3, 0);
      read(c[3], sc[w], s0 + 3, 4);
      decays(3, 0, 4);
      inputs(3, 0, 4);
      decays(3, 4, 8);
      inputs(3, 4, 8);
      meet(0);
#pragma unroll
      for (int n = 0; n < NS; n++) {
        state(3, n);
        h[n] = after[3][n];
        output(3, n);
      }
      meet(2);
    }
#else
#pragma unroll rounds
    for (int s0 = 0; s0 < TILE; s0 += 4) {
      real acc[4];
      // The next four steps' slots come before this round's store, across which the compiler moves no load.
      Slot now[4];
#pragma unroll
      for (int r = 0; r < 4; r++) {
        now[r] = ahead[r];
        ahead[r] = slots[w][(s0 + 4 + r) % TILE][at];
      }
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int s = s0 + r;
#if VARLEN
        if (sstart[w][s]) {  // the same for every thread of the block
#if PASS == 1
          was_reset = true;
#endif
#pragma unroll
          for (int n = 0; n < NS; n++)
            h[n] = (init && live && g * NS + n < N) ? init[((i64)(sstart[w][s] - 1) * d_inner + c) * N + g * NS + n] : real(0);
        }
#endif
        const Slot f = now[r];
        if (PASS == 1) dt_sum += f.dv;
        acc[r] = real(0);
#pragma unroll
        for (int m = 0; m < NS; m += 4) {
#if !FIXB
          const Four fb = *reinterpret_cast<const Four*>(&sb[w][s][g * NS + m]);
#endif
#if PASS == 0 && !FIXC
          const Four fc = *reinterpret_cast<const Four*>(&sc[w][s][g * NS + m]);
#endif
#pragma unroll
          for (int q = 0; q < 4; q++) {
            const int n = m + q;
#if FIXB
            const real bv = bf[n];
#else
            const real bv = fb.v[q];
#endif
            h[n] = fma_(decay(f.dv, a[n]), h[n], f.du * bv);
#if PASS == 0 && FIXC
            acc[r] = fma_(h[n], cf[n], acc[r]);
#elif PASS == 0
            acc[r] = n ? fma_(h[n], fc.v[q], acc[r]) : h[n] * fc.v[q];
#endif
          }
        }
#if VARLEN && PASS == 0
        if (send[w][s] && final_state && live) {
#pragma unroll
          for (int n = 0; n < NS; n++)
            if (g * NS + n < N) final_state[((i64)(send[w][s] - 1) * d_inner + c) * N + g * NS + n] = h[n];
        }
#endif
      }
#if PASS == 0
      // Butterfly over the G lanes of a channel: lane g ends with step s0 + g % 4
      // (of two lanes each with two steps). It comes back from the shuffles only
      // when every lane of the channel has read the slot it now writes.
      const bool b0 = g & 1;
      real k0_ = b0 ? acc[1] : acc[0], k1_ = b0 ? acc[3] : acc[2];
      k0_ += __shfl_xor_sync(~0u, b0 ? acc[0] : acc[1], APART);
      k1_ += __shfl_xor_sync(~0u, b0 ? acc[2] : acc[3], APART);
#if G == 2
      __syncwarp();
      slots[w][s0 + g][at].dv = k0_;
      slots[w][s0 + 2 + g][at].dv = k1_;
#else
      const bool b1 = g & 2;
      real keep = (b1 ? k1_ : k0_) + __shfl_xor_sync(~0u, b1 ? k0_ : k1_, 2 * APART);
#pragma unroll
      for (int m = 4; m < G; m <<= 1) keep += __shfl_xor_sync(~0u, keep, m * APART);
      __syncwarp();
      if (G == 4 || g < 4) slots[w][s0 + g % 4][at].dv = keep;
#endif
#endif
    }
#endif
  };

  const int tiles = (t_end - t_begin + TILE - 1) / TILE;
  fetch(t_begin);
  for (int k = -1; k <= tiles; k++) {
    const int t0 = t_begin + k * TILE, w = k & 1;
    if (k > 0) gate(t0 - TILE, w ^ 1);
    if (k + 1 < tiles) stage(t0 + TILE, w ^ 1);
    if (k == tiles) break;
    if (k + 2 < tiles) fetch(t0 + 2 * TILE);
    if (k >= 0) {
      fetch_late(t0);
      scan(t0, w);
    }
    __syncthreads();
  }
  if (!live) return;
#if PASS == 1
#pragma unroll
  for (int n = 0; n < NS; n++)
    if (g * NS + n < N) chunk_state[((b * chunks + k0) * d_inner + c) * N + g * NS + n] = h[n];
  if (g == 0) chunk_dt[(b * chunks + k0) * d_inner + c] = was_reset ? real(-1) : dt_sum;
#else
  if (!VARLEN && final_state && k0 == chunks - 1) {
#pragma unroll
    for (int n = 0; n < NS; n++)
      if (g * NS + n < N) final_state[(b * d_inner + c) * N + g * NS + n] = h[n];
  }
#endif
}

// Start state of every chunk, in place of its end state. Grid (d_inner * N / 128, batch); one thread a (channel, state).
// A chunk in which a packed sequence starts (chunk_dt = -1) forgets what came before.
extern "C" __global__ void __launch_bounds__(128) scan_combine(
    real* __restrict__ chunk_state, const real* __restrict__ chunk_dt, const real* __restrict__ A,
    const real* __restrict__ init, int d_inner, int chunks) {
  const i64 i = (i64)blockIdx.x * 128 + threadIdx.x, b = blockIdx.y, size = (i64)d_inner * N;
  if (i >= size) return;
  const i64 c = i / N;
  const real a = A[i] * LOG2E;
  real h = init ? init[b * size + i] : real(0);
  constexpr int AT_ONCE = 8;  // loads in flight
  for (int k0 = 0; k0 < chunks; k0 += AT_ONCE) {
    real end[AT_ONCE], s[AT_ONCE];
#pragma unroll
    for (int m = 0; m < AT_ONCE; m++) {
      const bool there = k0 + m + 1 < chunks;
      end[m] = there ? chunk_state[(b * chunks + k0 + m) * size + i] : real(0);
      s[m] = there ? chunk_dt[(b * chunks + k0 + m) * d_inner + c] : real(0);
    }
#pragma unroll
    for (int m = 0; m < AT_ONCE; m++) {
      if (k0 + m < chunks) chunk_state[(b * chunks + k0 + m) * size + i] = h;
      h = s[m] < real(0) ? end[m] : fma_(decay(s[m], a), h, end[m]);
    }
  }
}
