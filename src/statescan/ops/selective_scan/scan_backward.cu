// Selective scan, backward. A thread holds CPT channels x NS states, G lanes a channel; a tile of TILE steps starts from the
// forward's checkpoint. Sub-chunks of HT steps are run again forwards into registers (never into device memory) and then
// walked backwards. Sums over states (for du and d dt) and over channels (for dB and dC) go through shared memory once a
// sub-chunk, which costs half the instructions of butterflies and none of their latency; one partial of dB and dC a block
// goes to memory. No atomics: the same bits in every run.
//
// PASS 1 (only where time is cut into chunks) makes the adjoint that leaves a chunk at its start, from zero at its end.
#ifndef CPT
#define CPT 2
#endif
#ifndef G
#define G 4
#endif
#ifndef NS
#define NS 4
#endif
#ifndef NT
#define NT 128
#endif
#ifndef MINB
#define MINB 2
#endif
#ifndef TILE
#define TILE 32
#endif
#ifndef HT
#define HT 8
#endif
#ifndef PASS
#define PASS 0
#endif
#ifndef VARLEN
#define VARLEN 0
#endif
#ifndef FIXB
#define FIXB 0
#endif
#ifndef FIXC
#define FIXC 0
#endif
#ifndef N
#define N 16
#endif
#ifndef HASZ
#define HASZ 1
#endif
#define CB (NT / G * CPT)
#define NP (G * NS)
#define SEGS (TILE * CB / 8)
#define ITEMS ((SEGS + NT - 1) / NT)
#define NSUB (TILE / HT)
#define PAIRS (NT / G)

// One block's shared memory; the host computes its size (plan in cuda.py).
struct Shared {
  real sdd[TILE][CB][2];  // dt and dt*u; afterwards y and the sum over states of adjoint * B
  real sdy[TILE][CB];     // gradient before the gate; afterwards the sum of adjoint * decay * h * A
  real sb[TILE][NP], sc[TILE][NP];
  real sbias[CB], sD[CB];
#if PASS == 0
  real hs[NSUB][CPT * NS][NT];  // the state at the start of every sub-chunk
  // What threads have to sum: over channels for dC (0) and dB (1); over lanes for y, adjoint*B, adjoint*decay*h*A.
  real over_channels[HT][2][PAIRS][G][NS];
  real over_lanes[HT][3][G][CB];
#endif
#if VARLEN
  int start[TILE], end[TILE];
#endif
};

extern "C" __global__ void __launch_bounds__(NT, MINB) scan_backward(
    const act* __restrict__ u, i64 u_b, i64 u_l, const act* __restrict__ dt, i64 dt_b, i64 dt_l,
    const act* __restrict__ z, i64 z_b, i64 z_l, const act* __restrict__ Bm, i64 B_b, i64 B_l, i64 B_g,
    const act* __restrict__ Cm, i64 C_b, i64 C_l, i64 C_g, const real* __restrict__ A, const real* __restrict__ Bfix,
    const real* __restrict__ Cfix, const real* __restrict__ D, const real* __restrict__ bias,
    const real* __restrict__ init, const int* __restrict__ starts, const int* __restrict__ ends,
    const act* __restrict__ dout, const real* __restrict__ dfinal, const real* __restrict__ ckpt,
    act* __restrict__ gu, act* __restrict__ gdt, act* __restrict__ gz, real* __restrict__ gA, real* __restrict__ gB,
    real* __restrict__ gC, real* __restrict__ gD, real* __restrict__ gbias, real* __restrict__ ginit,
    real* __restrict__ chunk_state, real* __restrict__ chunk_dt, int L, int d_inner, int group_channels,
    int blocks_per_group, int chunk_len, int chunks, int flags) {
  const bool vec = flags & 1, has_softplus = flags & 2, vec_out = flags & 4;
  extern __shared__ __align__(16) unsigned char raw_shared[];
  Shared& S = *reinterpret_cast<Shared*>(raw_shared);
  auto& sdd = S.sdd;
  auto &sb = S.sb, &sc = S.sc;
  auto &sdy = S.sdy;
  auto &sbias = S.sbias, &sD = S.sD;
#if PASS == 0
  auto& hs = S.hs;
  auto& over_channels = S.over_channels;
  auto& over_lanes = S.over_lanes;
#endif
#if VARLEN
  auto &sstart = S.start, &send = S.end;
#endif
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, p = tid / G, g = tid % G, ch = p * CPT;
  const int grp = blockIdx.x / blocks_per_group, first = (blockIdx.x % blocks_per_group) * CB;
  const int c0 = grp * group_channels + first, width = min(CB, group_channels - first);
  const i64 b = blockIdx.y;
  const int k0 = blockIdx.z, t_begin = k0 * chunk_len, t_end = min(L, t_begin + chunk_len);
  const i64 tiles = (L + TILE - 1) / TILE;
  for (int q = threadIdx.x; q < CB; q += NT) {
    sbias[q] = bias && q < width ? bias[c0 + q] : real(0);
    sD[q] = D && q < width ? D[c0 + q] : real(0);
  }
  __syncthreads();

  real a[CPT][NS], carry[CPT][NS], gA_[CPT][NS];
#if FIXB
  real bf[CPT][NS], gB_[CPT][NS];
#endif
#if FIXC
  real cf[CPT][NS], gC_[CPT][NS];
#endif
#pragma unroll
  for (int i = 0; i < CPT; i++)
#pragma unroll
    for (int n = 0; n < NS; n++) {
      const int s = g * NS + n, c = c0 + ch + i;
      const bool here = ch + i < width && s < N;
      a[i][n] = here ? A[(i64)c * N + s] * LOG2E : real(0);
      gA_[i][n] = carry[i][n] = real(0);
#if FIXB
      bf[i][n] = here ? Bfix[(i64)c * N + s] : real(0);
      gB_[i][n] = real(0);
#endif
#if FIXC
      cf[i][n] = here ? Cfix[(i64)c * N + s] : real(0);
      gC_[i][n] = real(0);
#endif
      if (here) {
        if (PASS == 0 && chunks > 1) carry[i][n] = chunk_state[((b * chunks + k0) * d_inner + c) * N + s];
        else if (PASS == 0 && !VARLEN && dfinal && k0 == chunks - 1) carry[i][n] = dfinal[(b * d_inner + c) * N + s];
      }
    }
  real dt_sum[CPT];
#pragma unroll
  for (int i = 0; i < CPT; i++) dt_sum[i] = real(0);
  bool was_reset = false;
  real accD[8], accb[8];
#pragma unroll
  for (int j = 0; j < 8; j++) accD[j] = accb[j] = real(0);

  for (int t0 = t_begin + (t_end - t_begin - 1) / TILE * TILE; t0 >= t_begin; t0 -= TILE) {
    const int steps = min(TILE, t_end - t0);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int q = tid + i * NT, row = q / (CB / 8), seg = (q % (CB / 8)) * 8;
      if (q < SEGS) {
        const i64 t = t0 + row;
        const int n = row < steps ? max(0, min(8, width - seg)) : 0;
        const Pack8 pu = load8(u + b * u_b + t * u_l + c0 + seg, n, vec), pd = load8(dt + b * dt_b + t * dt_l + c0 + seg, n, vec);
        const Pack8 po = load8(dout + (b * L + t) * d_inner + c0 + seg, n, vec_out);
        Pack8 pz;
        if (HASZ) pz = load8(z + b * z_b + t * z_l + c0 + seg, n, vec);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          real v = to_real(pd.v[j]) + sbias[seg + j];
          if (has_softplus) v = softplus(v);
          if (j >= n) v = real(0);
          sdd[row][seg + j][0] = v;
          sdd[row][seg + j][1] = v * to_real(pu.v[j]);
          real dyv = to_real(po.v[j]);
          if (HASZ) dyv *= silu(to_real(pz.v[j]));
          sdy[row][seg + j] = dyv;
        }
      }
    }
    for (int q = tid; q < TILE * NP; q += NT) {
      const int row = q / NP, n = q % NP;
      const bool here = row < steps && n < N;
      if (!FIXB) sb[row][n] = here ? to_real(Bm[b * B_b + (i64)(t0 + row) * B_l + grp * B_g + n]) : real(0);
      if (!FIXC) sc[row][n] = here ? to_real(Cm[b * C_b + (i64)(t0 + row) * C_l + grp * C_g + n]) : real(0);
    }
#if VARLEN
    for (int q = tid; q < TILE; q += NT) {
      sstart[q] = q < steps ? starts[t0 + q] : 0;
      send[q] = q < steps ? ends[t0 + q] : 0;
    }
#endif
    __syncthreads();

#if FIXB
#define BVAL(s, i, n) bf[i][n]
#else
#define BVAL(s, i, n) sb[s][g * NS + n]
#endif
#if FIXC
#define CVAL(s, i, n) cf[i][n]
#else
#define CVAL(s, i, n) sc[s][g * NS + n]
#endif

#if PASS == 1
    for (int s = steps - 1; s >= 0; s--) {
#if VARLEN
      if (send[s] && dfinal)
#pragma unroll
        for (int i = 0; i < CPT; i++)
#pragma unroll
          for (int n = 0; n < NS; n++)
            if (ch + i < width && g * NS + n < N) carry[i][n] += dfinal[((i64)(send[s] - 1) * d_inner + c0 + ch + i) * N + g * NS + n];
#endif
#pragma unroll
      for (int i = 0; i < CPT; i++) {
        const real dv = sdd[s][ch + i][0], dy = sdy[s][ch + i];
        dt_sum[i] += dv;
#pragma unroll
        for (int n = 0; n < NS; n++) carry[i][n] = ex2(dv * a[i][n]) * fma_(dy, CVAL(s, i, n), carry[i][n]);
      }
#if VARLEN
      if (sstart[s]) {
        was_reset = true;
#pragma unroll
        for (int i = 0; i < CPT; i++)
#pragma unroll
          for (int n = 0; n < NS; n++) carry[i][n] = real(0);
      }
#endif
    }
    __syncthreads();
#else  // PASS == 0
    real h[CPT][NS];
#pragma unroll
    for (int i = 0; i < CPT; i++)
#pragma unroll
      for (int n = 0; n < NS; n++) {
        const bool here = ch + i < width && g * NS + n < N;
        h[i][n] = here ? ckpt[((b * tiles + t0 / TILE) * d_inner + c0 + ch + i) * N + g * NS + n] : real(0);
      }
    auto step = [&](int s) {
#if VARLEN
      if (sstart[s])
#pragma unroll
        for (int i = 0; i < CPT; i++)
#pragma unroll
          for (int n = 0; n < NS; n++)
            h[i][n] = (init && ch + i < width && g * NS + n < N) ? init[((i64)(sstart[s] - 1) * d_inner + c0 + ch + i) * N + g * NS + n] : real(0);
#endif
#pragma unroll
      for (int i = 0; i < CPT; i++) {
        const real dv = sdd[s][ch + i][0], du = sdd[s][ch + i][1];
#pragma unroll
        for (int n = 0; n < NS; n++) h[i][n] = fma_(ex2(dv * a[i][n]), h[i][n], du * BVAL(s, i, n));
      }
    };
    const int subs = (steps + HT - 1) / HT;
    for (int j = 0; j < subs; j++) {
#pragma unroll
      for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int n = 0; n < NS; n++) hs[j][i * NS + n][tid] = h[i][n];
      if (j + 1 < subs)
#pragma unroll
        for (int s = 0; s < HT; s++) step(j * HT + s);
    }
    for (int j = subs - 1; j >= 0; j--) {
      real hist[HT][CPT][NS];
#pragma unroll
      for (int i = 0; i < CPT; i++)
#pragma unroll
        for (int n = 0; n < NS; n++) h[i][n] = hs[j][i * NS + n][tid];
#pragma unroll
      for (int r = 0; r < HT; r++) {
        step(j * HT + r);
#pragma unroll
        for (int i = 0; i < CPT; i++)
#pragma unroll
          for (int n = 0; n < NS; n++) hist[r][i][n] = h[i][n];
      }
#pragma unroll
      for (int r = HT - 1; r >= 0; r--) {
        const int s = j * HT + r;
#if VARLEN
        if (send[s] && dfinal)
#pragma unroll
          for (int i = 0; i < CPT; i++)
#pragma unroll
            for (int n = 0; n < NS; n++)
              if (ch + i < width && g * NS + n < N) carry[i][n] += dfinal[((i64)(send[s] - 1) * d_inner + c0 + ch + i) * N + g * NS + n];
#endif
        // The state before step r: the one kept before it, the sub-chunk's first, or a packed sequence's initial one.
        auto before = [&](int r_, int i, int n) -> real {
#if VARLEN
          if (sstart[s]) return (init && ch + i < width && g * NS + n < N) ? init[((i64)(sstart[s] - 1) * d_inner + c0 + ch + i) * N + g * NS + n] : real(0);
#endif
          return r_ ? hist[r_ > 0 ? r_ - 1 : 0][i][n] : hs[j][i * NS + n][tid];
        };
        real v[2][NS], sum[3][CPT];
#pragma unroll
        for (int n = 0; n < NS; n++) v[0][n] = v[1][n] = real(0);
#pragma unroll
        for (int i = 0; i < CPT; i++) {
          const real dv = sdd[s][ch + i][0], du = sdd[s][ch + i][1], dy = sdy[s][ch + i];
          real y_ = real(0), s1 = real(0), s2 = real(0);
#pragma unroll
          for (int n = 0; n < NS; n++) {
            const real hh = hist[r][i][n], bv = BVAL(s, i, n), cv = CVAL(s, i, n);
            const real e = ex2(dv * a[i][n]), gg = fma_(dy, cv, carry[i][n]);
            carry[i][n] = e * gg;
            // Decay times the previous state, not h - dt u B, which cancels where dt is large.
            const real q = carry[i][n] * before(r, i, n);
            if (HASZ) y_ = fma_(hh, cv, y_);
            s1 = fma_(gg, bv, s1);
            s2 = fma_(q, a[i][n], s2);
            gA_[i][n] = fma_(q, dv, gA_[i][n]);
#if FIXC
            gC_[i][n] = fma_(dy, hh, gC_[i][n]);
#else
            v[0][n] = fma_(dy, hh, v[0][n]);
#endif
#if FIXB
            gB_[i][n] = fma_(gg, du, gB_[i][n]);
#else
            v[1][n] = fma_(gg, du, v[1][n]);
#endif
          }
          sum[0][i] = y_; sum[1][i] = s1; sum[2][i] = s2;
        }
#if VARLEN
        if (sstart[s]) {
#pragma unroll
          for (int i = 0; i < CPT; i++)
#pragma unroll
            for (int n = 0; n < NS; n++) {
              if (ginit && ch + i < width && g * NS + n < N) ginit[((i64)(sstart[s] - 1) * d_inner + c0 + ch + i) * N + g * NS + n] = carry[i][n];
              carry[i][n] = real(0);
            }
        }
#endif
#pragma unroll
        for (int k = 0; k < 3; k++)
#pragma unroll
          for (int i = 0; i < CPT; i++) over_lanes[r][k][g][ch + i] = sum[k][i];
#pragma unroll
        for (int n = 0; n < NS; n++) {
          if (!FIXC) over_channels[r][0][p][g][n] = v[0][n];
          if (!FIXB) over_channels[r][1][p][g][n] = v[1][n];
        }
      }
      __syncthreads();
      // Over lanes: the sums take the places of dt, dt*u and dy, which these steps no longer need.
      for (int q = tid; q < HT * CB; q += NT) {
        const int r = q / CB, k = q % CB, s = j * HT + r;
        real y_ = real(0), s1 = real(0), s2 = real(0);
#pragma unroll
        for (int m = 0; m < G; m++) { y_ += over_lanes[r][0][m][k]; s1 += over_lanes[r][1][m][k]; s2 += over_lanes[r][2][m][k]; }
        sdd[s][k][0] = y_;
        sdd[s][k][1] = s1;
        sdy[s][k] = s2;
      }
      // Over channels: a warp takes one (step, dC or dB) at a time; a lane sums NS states of every 32 / G-th pair, then the
      // lanes of the same states add up.
      if (!FIXB || !FIXC)
        for (int q = warp; q < HT * 2; q += NT / 32) {
          const int r = q >> 1, which = q & 1, t = t0 + j * HT + r;
          if (which ? FIXB : FIXC) continue;
          real total[NS];
#pragma unroll
          for (int n = 0; n < NS; n++) total[n] = real(0);
          const real* from = &over_channels[r][which][0][0][0];
#pragma unroll
          for (int i = 0; i < PAIRS * G / 32; i++)
#pragma unroll
            for (int n = 0; n < NS; n++) total[n] += from[(i * 32 + lane) * NS + n];
#pragma unroll
          for (int m = G; m < 32; m <<= 1)
#pragma unroll
            for (int n = 0; n < NS; n++) total[n] += __shfl_xor_sync(~0u, total[n], m);
          real* out = which ? gB : gC;
          if (out && lane < G && t < t_end)
#pragma unroll
            for (int n = 0; n < NS; n++)
              if (lane * NS + n < N) out[(((i64)blockIdx.x * gridDim.y + b) * L + t) * N + lane * NS + n] = total[n];
        }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      const int q = tid + i * NT, row = q / (CB / 8), seg = (q % (CB / 8)) * 8;
      const int n = (q < SEGS && row < steps) ? min(8, width - seg) : 0;
      if (n > 0) {
        const i64 t = t0 + row;
        const Pack8 pu = load8(u + b * u_b + t * u_l + c0 + seg, n, vec), pd = load8(dt + b * dt_b + t * dt_l + c0 + seg, n, vec);
        const Pack8 po = load8(dout + (b * L + t) * d_inner + c0 + seg, n, vec_out);
        Pack8 pz, ou, od, oz;
        if (HASZ) pz = load8(z + b * z_b + t * z_l + c0 + seg, n, vec);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          if (j >= n) continue;
          const real uv = to_real(pu.v[j]), s1 = sdd[row][seg + j][1], ov = to_real(po.v[j]);
          const real Dv = sD[seg + j], raw = to_real(pd.v[j]) + sbias[seg + j];
          real dyv = ov;
          const real dv = has_softplus ? softplus(raw) : raw;
          if (HASZ) {
            const real zv = to_real(pz.v[j]), sig = sigmoid(zv), yv = fma_(Dv, uv, sdd[row][seg + j][0]);
            dyv = ov * zv * sig;
            oz.v[j] = to_act(ov * yv * sig * fma_(zv, real(1) - sig, real(1)));
          }
          real ddt = fma_(uv, s1, sdy[row][seg + j] * LN2);
          if (has_softplus && !(raw > real(20))) ddt *= sigmoid(raw);
          accD[j] = fma_(dyv, uv, accD[j]);
          accb[j] += ddt;
          ou.v[j] = to_act(fma_(dv, s1, Dv * dyv));
          od.v[j] = to_act(ddt);
        }
        const i64 at = (b * L + t) * d_inner + c0 + seg;
        store8(gu + at, ou, n, vec_out);
        store8(gdt + at, od, n, vec_out);
        if (HASZ) store8(gz + at, oz, n, vec_out);
      }
    }
    __syncthreads();
#endif
  }
#pragma unroll
  for (int i = 0; i < CPT; i++) {
    const int c = c0 + ch + i;
    if (ch + i >= width) continue;
#pragma unroll
    for (int n = 0; n < NS; n++) {
      const int s = g * NS + n;
      if (s >= N) continue;
#if PASS == 1
      chunk_state[((b * chunks + k0) * d_inner + c) * N + s] = carry[i][n];
#else
      const i64 at = ((b * chunks + k0) * d_inner + c) * N + s;
      gA[at] = gA_[i][n];
#if FIXB
      gB[at] = gB_[i][n];
#endif
#if FIXC
      gC[at] = gC_[i][n];
#endif
      if (!VARLEN && ginit && k0 == 0) ginit[(b * d_inner + c) * N + s] = carry[i][n];
#endif
    }
    if (PASS == 1 && g == 0) chunk_dt[(b * chunks + k0) * d_inner + c] = was_reset ? real(-1) : dt_sum[i];
  }
#if PASS == 0
  // dD and d dt_bias: every thread has eight channels of some rows; summed over rows in fixed order.
  real* scratch = &sdd[0][0][0];
  constexpr int lanes = NT / (CB / 8) < TILE ? NT / (CB / 8) : TILE;  // rows that a thread's pieces begin in
  const int seg = (tid % (CB / 8)) * 8, row = tid / (CB / 8);
  if (row < lanes)
#pragma unroll
    for (int j = 0; j < 8; j++) {
      scratch[(row * CB + seg + j) * 2] = accD[j];
      scratch[(row * CB + seg + j) * 2 + 1] = accb[j];
    }
  __syncthreads();
  for (int q = tid; q < width; q += NT) {
    real d = real(0), e = real(0);
    for (int k = 0; k < lanes; k++) { d += scratch[(k * CB + q) * 2]; e += scratch[(k * CB + q) * 2 + 1]; }
    if (gD) gD[(b * chunks + k0) * d_inner + c0 + q] = d;
    if (gbias) gbias[(b * chunks + k0) * d_inner + c0 + q] = e;
  }
#endif
}

#if PASS == 1
// The adjoint that enters every chunk at its end, in place of the one that left it at its start; last chunk first.
extern "C" __global__ void __launch_bounds__(128) scan_combine_backward(
    real* __restrict__ chunk_state, const real* __restrict__ chunk_dt, const real* __restrict__ A,
    const real* __restrict__ dfinal, int d_inner, int chunks) {
  const i64 i = (i64)blockIdx.x * 128 + threadIdx.x, b = blockIdx.y, size = (i64)d_inner * N;
  if (i >= size) return;
  const i64 c = i / N;
  const real a = A[i] * LOG2E;
  real carry = dfinal ? dfinal[b * size + i] : real(0);
  for (int k = chunks - 1; k >= 0; k--) {
    real* p = chunk_state + (b * chunks + k) * size + i;
    const real out = *p, s = chunk_dt[(b * chunks + k) * d_inner + c];
    *p = carry;
    carry = s < real(0) ? out : fma_(ex2(s * a), carry, out);
  }
}
#endif
