// Selective scan, forward. G threads a channel with NS states each in registers; time is walked in tiles of TILE steps.
// For every tile the block makes softplus(dt), dt*u once (elementwise phase, 16-byte loads, next tile already on its way in
// registers), scans it, sums over states by a butterfly that leaves each lane one step, and gates the output.
//
// Grid (groups * blocks per group, batch, chunks). PASS 1 writes only a chunk's end state and its sum of dt: the decay of a
// whole chunk is exp(A * sum dt). `combine` turns these into every chunk's start state; PASS 0 writes the outputs.
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
#define CB (NT / G)        // channels of a block
#define NP (G * NS)        // states, padded
#define SEGS (TILE * CB / 8)  // eight-channel pieces of a tile
#define ITEMS ((SEGS + NT - 1) / NT)
#define R (G < 4 ? G : 4)  // steps that one butterfly spreads over lanes
#define YS (CB + 8)        // row of the y tile: four rows on four sets of banks

extern "C" __global__ void __launch_bounds__(NT, MINB) scan_forward(
    const act* __restrict__ u, i64 u_b, i64 u_l, const act* __restrict__ dt, i64 dt_b, i64 dt_l,
    const act* __restrict__ z, i64 z_b, i64 z_l, const act* __restrict__ Bm, i64 B_b, i64 B_l, i64 B_g,
    const act* __restrict__ Cm, i64 C_b, i64 C_l, i64 C_g, const real* __restrict__ A, const real* __restrict__ Bfix,
    const real* __restrict__ Cfix, const real* __restrict__ D, const real* __restrict__ bias,
    const real* __restrict__ init, const int* __restrict__ starts, const int* __restrict__ ends,
    act* __restrict__ y, real* __restrict__ final_state, real* __restrict__ ckpt, real* __restrict__ chunk_state,
    real* __restrict__ chunk_dt, int L, int d_inner, int group_channels, int blocks_per_group, int chunk_len,
    int chunks, int ckpt_every, int flags) {
  const bool vec = flags & 1, has_softplus = flags & 2;
  __shared__ __align__(16) real sdu[TILE][CB][2];
  __shared__ __align__(16) real sbias[CB], sD[CB];
  __shared__ __align__(16) real sb[TILE][NP], sc[TILE][NP];
#if PASS == 0
  __shared__ __align__(16) real sy[TILE][YS];
#endif
#if VARLEN
  __shared__ int sstart[TILE], send[TILE];
#endif
  const int tid = threadIdx.x, ch = tid / G, g = tid % G;
  const int grp = blockIdx.x / blocks_per_group, first = (blockIdx.x % blocks_per_group) * CB;
  const int c0 = grp * group_channels + first, width = min(CB, group_channels - first);
  const int c = c0 + ch;
  const bool live = ch < width;
  for (int q = threadIdx.x; q < CB; q += NT) {
    sbias[q] = bias && q < width ? bias[c0 + q] : real(0);
    sD[q] = D && q < width ? D[c0 + q] : real(0);
  }
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
      if (PASS == 0 && chunks > 1) h[n] = chunk_state[((b * chunks + k0) * d_inner + c) * N + s];
      else if (PASS == 0 && !VARLEN && init && k0 == 0) h[n] = init[(b * d_inner + c) * N + s];
    }
  }
  real dt_sum = real(0);
#if PASS == 1
  bool was_reset = false;
#endif

  // The elementwise role: piece i of this thread is row `row[i]`, channels seg[i]..seg[i]+7 of the block.
  Pack8 nu[ITEMS], nd[ITEMS], nz[ITEMS];
  auto prefetch = [&](int t0) {
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int q = tid + i * NT, row = q / (CB / 8), seg = (q % (CB / 8)) * 8;
      const int n = (q < SEGS && t0 + row < t_end) ? max(0, min(8, width - seg)) : 0;
      const i64 t = t0 + row;
      nu[i] = load8(u + b * u_b + t * u_l + c0 + seg, n, vec);
      nd[i] = load8(dt + b * dt_b + t * dt_l + c0 + seg, n, vec);
      if (PASS == 0 && HASZ) nz[i] = load8(z + b * z_b + t * z_l + c0 + seg, n, vec);
    }
  };
  prefetch(t_begin);
  __syncthreads();
  for (int t0 = t_begin; t0 < t_end; t0 += TILE) {
    const int steps = min(TILE, t_end - t0);
#if PASS == 0
    if (ckpt && live && t0 % ckpt_every == 0) {
      real* p = ckpt + ((b * ((L + ckpt_every - 1) / ckpt_every) + t0 / ckpt_every) * d_inner + c) * N;
#pragma unroll
      for (int n = 0; n < NS; n++) if (g * NS + n < N) p[g * NS + n] = h[n];
    }
#endif
    Pack8 cu[ITEMS], cz[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int q = tid + i * NT, row = q / (CB / 8), seg = (q % (CB / 8)) * 8;
      cu[i] = nu[i];
      if (PASS == 0 && HASZ) cz[i] = nz[i];
      if (q < SEGS) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
          real v = to_real(nd[i].v[j]) + sbias[seg + j];
          if (has_softplus) v = softplus(v);
          if (row >= steps) v = real(0);  // a step of length zero leaves the state as it is
          sdu[row][seg + j][0] = v;
          sdu[row][seg + j][1] = v * to_real(nu[i].v[j]);
        }
      }
    }
#pragma unroll 4
    for (int q = tid; q < TILE * N; q += NT) {
      const int row = q / N, n = q % N;
      const bool here = row < steps;
      if (!FIXB) sb[row][n] = here ? to_real(Bm[b * B_b + (i64)(t0 + row) * B_l + grp * B_g + n]) : real(0);
      if (PASS == 0 && !FIXC) sc[row][n] = here ? to_real(Cm[b * C_b + (i64)(t0 + row) * C_l + grp * C_g + n]) : real(0);
    }
    if (N < NP)
      for (int q = tid; q < TILE * (NP - N); q += NT) {
        sb[q / (NP - N)][N + q % (NP - N)] = real(0);
        sc[q / (NP - N)][N + q % (NP - N)] = real(0);
      }
#if VARLEN
    if (tid < TILE) {
      sstart[tid] = t0 + tid < t_end ? starts[t0 + tid] : 0;
      send[tid] = t0 + tid < t_end ? ends[t0 + tid] : 0;
    }
#endif
    if (t0 + TILE < t_end) prefetch(t0 + TILE);
    __syncthreads();

#pragma unroll 2
    for (int s0 = 0; s0 < TILE; s0 += R) {
      if (s0 >= steps) break;
      real acc[R];
#pragma unroll
      for (int r = 0; r < R; r++) {
        const int s = s0 + r;
#if VARLEN
        if (sstart[s]) {  // the same for every thread of the block
#if PASS == 1
          was_reset = true;
#endif
#pragma unroll
          for (int n = 0; n < NS; n++)
            h[n] = (init && live && g * NS + n < N) ? init[((i64)(sstart[s] - 1) * d_inner + c) * N + g * NS + n] : real(0);
        }
#endif
        const real dv = sdu[s][ch][0], du = sdu[s][ch][1];
        if (PASS == 1) dt_sum += dv;
        acc[r] = real(0);
#pragma unroll
        for (int n = 0; n < NS; n++) {
#if FIXB
          const real bv = bf[n];
#else
          const real bv = sb[s][g * NS + n];
#endif
          h[n] = fma_(ex2(dv * a[n]), h[n], du * bv);
#if PASS == 0 && FIXC
          acc[r] = fma_(h[n], cf[n], acc[r]);
#elif PASS == 0
          acc[r] = fma_(h[n], sc[s][g * NS + n], acc[r]);
#endif
        }
#if VARLEN && PASS == 0
        if (send[s] && final_state && live) {
#pragma unroll
          for (int n = 0; n < NS; n++)
            if (g * NS + n < N) final_state[((i64)(send[s] - 1) * d_inner + c) * N + g * NS + n] = h[n];
        }
#endif
      }
#if PASS == 0
      // Butterfly over the G lanes of a channel: lane g ends with step s0 + g % R.
      real keep = acc[0];
      if (R == 4) {
        const bool b0 = g & 1, b1 = g & 2;
        real k0_ = b0 ? acc[1] : acc[0], k1_ = b0 ? acc[3] : acc[2];
        k0_ += __shfl_xor_sync(~0u, b0 ? acc[0] : acc[1], 1);
        k1_ += __shfl_xor_sync(~0u, b0 ? acc[2] : acc[3], 1);
        keep = (b1 ? k1_ : k0_) + __shfl_xor_sync(~0u, b1 ? k0_ : k1_, 2);
      } else if (R == 2) {
        keep = ((g & 1) ? acc[1] : acc[0]) + __shfl_xor_sync(~0u, (g & 1) ? acc[0] : acc[1], 1);
      }
#pragma unroll
      for (int m = R; m < G; m <<= 1) keep += __shfl_xor_sync(~0u, keep, m);
      if (g < R) sy[s0 + g][ch] = keep;
#endif
    }
    __syncthreads();
#if PASS == 0
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int q = tid + i * NT, row = q / (CB / 8), seg = (q % (CB / 8)) * 8;
      const int n = (q < SEGS && row < steps) ? min(8, width - seg) : 0;
      if (n > 0) {
        Pack8 out;
#pragma unroll
        for (int j = 0; j < 8; j++) {
          real v = sy[row][seg + j];
          v = fma_(sD[seg + j], to_real(cu[i].v[j]), v);
          if (HASZ) v *= silu(to_real(cz[i].v[j]));
          out.v[j] = to_act(v);
        }
        store8(y + (b * L + t0 + row) * d_inner + c0 + seg, out, n, flags & 4);
      }
    }
#endif
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
  for (int k = 0; k < chunks; k++) {
    real* p = chunk_state + (b * chunks + k) * size + i;
    const real end = k + 1 < chunks ? *p : real(0), s = k + 1 < chunks ? chunk_dt[(b * chunks + k) * d_inner + c] : real(0);
    *p = h;
    h = s < real(0) ? end : fma_(ex2(s * a), h, end);
  }
}
