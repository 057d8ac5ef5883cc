// Selective scan, backward. G threads a channel with NS states each; a tile of TILE steps starts from the forward's
// checkpoint. Sub-chunks of HT steps are run again forwards, states and decays kept in registers (never in device memory),
// then walked backwards. A warp holds 32 / G channels side by side, so that
// - sums over states (for du, d dt and the output before the gate) are butterflies over lane bits above, four steps at once,
// - sums over channels (for dB and dC) are a product with a 0/1 matrix on the tensor cores where the result is rounded to
//   bfloat16 anyway (so are their summands, then), and butterflies over the lane bits below elsewhere; then over warps through shared memory, once a
//   tile where that has room for all its sub-chunks, else once a sub-chunk. One partial of dB and dC a block goes to memory.
// `scan_sums` adds up what blocks and chunks left apart. No atomics: the same bits in every run.
// Where blocks fill the chip two of them may be one (HALVES), which leaves one partial.
//
// PASS 1 (only where time is cut into chunks) makes the adjoint that leaves a chunk at its start, from zero at its end.
#ifndef G
#define G 4
#endif
#ifndef NS
#define NS 4
#endif
#ifndef NT
#define NT 256
#endif
#ifndef HALVES
#define HALVES 1  // 2: a block is two of NT threads with channels, shared memory and barriers of their own; see Ring
#endif
#ifndef MINB
#define MINB 2  // blocks of NT threads that a multiprocessor holds
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
#ifndef HASY
#define HASY 0  // y is wanted again, too
#endif
#ifndef SOFTPLUS
#define SOFTPLUS 1
#endif
#ifndef VEC
#define VEC 0  // all activations are aligned to 16 bytes, and every block has all its channels
#endif
#ifndef VECB
#define VECB 0  // B and C are
#endif
#ifndef PARTS
#define PARTS 2  // sub-chunks whose partial dB and dC have room at once: all of a tile, two, or one
#endif
#if VEC
typedef u32 offset;  // from a tile's first row to any other: the host sees to it that it fits
#else
typedef i64 offset;
#endif
#define CPW (32 / G)  // channels of a warp
#define CB (NT / G)
#define CHANNEL(tid) ((tid) / 32 * CPW + (tid) % CPW)  // of a thread
#define NP (G * NS)
#define NQ (NS / 4)
#define PER (CB / 8)
#define SEGS (TILE * PER)
#if SEGS > NT
#error "a thread has one piece of a tile at most: TILE <= 32 and G >= 4"
#endif
#define SHARERS (SEGS < NT ? SEGS : NT)  // threads with an elementwise role
#define NSUB (TILE / HT)
#define WARPS (NT / 32)
#define R (HT < 4 ? HT : 4)  // steps of one butterfly over states
#define TENSOR (IN == 1 && G == 4 && NS == 4 && HT == 8)
#define PIPE (TENSOR && !VARLEN)  // the states of the next sub-chunk are made while this one is walked back
#define PIECES (TILE * N / 8)
#define TILES_A 4  // tiles whose dA is added up before it goes to the sum over time
#define AHEAD (VECB && 2 * PIECES <= NT)  // B and C, too, are asked for ahead
// The form that models use: bfloat16, a gate, B and C that change with time. A thread's registers are all taken, so that its
// time hangs on the order in which the compiler finds the statements: of thousands of orders with the same results that were
// timed on H200s, these were the fastest, for blocks of two halves 3 % below those for blocks by themselves. The other forms
// were not timed in them and keep the plain walk; what stands outside of it they share.
#define TUNED (PIPE && AHEAD && HASZ && !FIXB && !FIXC)
#if HALVES == 2 && !(TUNED && VEC && PASS == 0 && PARTS >= NSUB && NSUB * HT * NP == 2 * NT)
#error "halves are for the form that models use"
#endif

// A channel at a step. dv: dt; du: dt*u, afterwards the sum over states of adjoint * B; dy: gradient before the gate,
// afterwards the sum of adjoint * decay * h * A; y: the output before D and the gate.
struct alignas(16) Slot { real dv, du, dy, y; };
// `x`, made anew where it stands: the compiler would keep what follows from it over a whole tile, in memory.
DEV u32 opaque(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}
// Where a channel's bias and D are: the first halves of all pieces of eight, then the second ones, so that threads which read
// half a piece each meet no bank twice.
DEV int apart(int ch) { return (ch & 4 ? CB / 2 : 0) + (ch >> 3) * 4 + (ch & 3); }
// Neighbouring pieces of eight channels permute their slots differently, so that threads writing them meet no bank twice.
DEV int place(int ch) { return (ch & ~7) | ((ch ^ (ch >> 3)) & 7); }
// Channel j of piece `piece`, in row `row`: `first` is where that piece's first channel is.
DEV u32 first_slot(u32 row, u32 piece) { return (row * CB + piece * 8 + (piece & 7)) * u32(sizeof(Slot)); }
#define SLOT(first, j) (*reinterpret_cast<Slot*>(reinterpret_cast<char*>(&S.slots[0][0]) + ((first) ^ (u32(j) * u32(sizeof(Slot))))))

struct alignas(2 * sizeof(real)) Two { real a, b; };
// Addresses that move by a tile at a time: inputs of a tile, of the one after it (earlier in time), and results.
enum { NOW = 0, NEXT = 4, OUT = 8, STATE = 12, NEXT_B = 13, SUMS_C = 15, BASES = 17 };
typedef i64 Address;
template <class T> DEV T* global(Address base, i64 bytes) {
  char* p = reinterpret_cast<char*>(base) + bytes;
  __builtin_assume(__isGlobal(p));
  return reinterpret_cast<T*>(p);
}
template <int I> struct Number { static constexpr int value = I; };
// f of every number from FIRST to END - 1, each known when it is compiled.
template <int FIRST, int END, class F> DEV void each(const F& f) {
  if constexpr (FIRST < END) {
    f(Number<FIRST>());
    each<FIRST + 1, END>(f);
  }
}
// One block's shared memory; the host computes its size (plan in cuda.py).
struct Shared {
  Slot slots[TILE][CB];
  real sb[TILE][NP], sc[TILE][NP];
  real sbias[CB], sD[CB];
#if PASS == 0
  Four hs[NSUB][NQ][NT];             // the state at the start of every sub-chunk
  real part[PARTS][WARPS][HT][2][NP];  // each warp's dC (0) and dB (1)
  Four sums[4][SHARERS];             // each thread's share of dD and d dt_bias
  Four sumA[2][NQ][NT];              // dA over tiles, and what its additions lost
#endif
#if TENSOR && PASS == 0
  Four ones[4];                      // the 0/1 matrix of row_sums, as lanes hold it
#endif
  Address base[2][BASES];            // where a tile's rows begin, and how far from the tile before
  i64 apart[BASES];
#if VARLEN
  int start[TILE], end[TILE];
#endif
};

// Two halves of a block leave one partial of dB and dC: the second one's sums of a tile go to the first, which adds them to
// its own. There is room for two tiles, so that the second may be ahead by as much; it waits for room where its threads
// meet anyway. The first one waits for its sums last of all. Otherwise the halves walk apart, as two blocks would.
struct Ring { Four sums[2][NT]; };
enum { OWN = 1, FULL = 3, EMPTY = 5 };  // named barriers: each half's own, each tile's of the ring
DEV void meet(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
DEV void pass(int barrier) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(2 * NT) : "memory"); }

#if TENSOR
// Two neighbouring rows of a product's second factor.
DEV u32 bf16_pair(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
// Sums over four neighbouring lanes of four values each (a: two of them, b: the others): d = rows * (a, b), rows 16 x 16 with
// row r for value r % 4. No sum goes on from one step to the next: a product that had to wait for another took longer.
DEV void row_sums(float (&d)[4], const Four& rows, u32 a, u32 b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(__float_as_uint(rows.v[0])), "r"(__float_as_uint(rows.v[1])), "r"(__float_as_uint(rows.v[2])),
        "r"(__float_as_uint(rows.v[3])), "r"(a), "r"(b), "f"(0.f));
}
#endif
struct Raw { Pack8 u, dt, dout, z; };
// As load8 and store8, for what is read for the last time and for what is written: 16-bit activations leave the cache to the
// partial sums, which are read again after the last block.
DEV Pack8 load8_last(const act* p, int n, bool vec) {
  if (sizeof(Pack8) > 16 || !vec || n < 8) return load8(p, n, vec);
  Pack8 r;
  uint4& v = reinterpret_cast<uint4&>(r);
  asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return r;
}
DEV void store8_once(act* p, const Pack8& r, int n, bool vec) {
  if (sizeof(Pack8) > 16 || !vec || n < 8) return store8(p, r, n, vec);
  const uint4& v = reinterpret_cast<const uint4&>(r);
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

extern "C" __global__ void __launch_bounds__(HALVES * NT, MINB / HALVES) scan_backward(
    const act* __restrict__ u, i64 u_b, i64 u_l, const act* __restrict__ dt, i64 dt_b, i64 dt_l,
    const act* __restrict__ z, i64 z_b, i64 z_l, const act* __restrict__ Bm, i64 B_b, i64 B_l, i64 B_g,
    const act* __restrict__ Cm, i64 C_b, i64 C_l, i64 C_g, const real* __restrict__ A, const real* __restrict__ Bfix,
    const real* __restrict__ Cfix, const real* __restrict__ D, const real* __restrict__ bias,
    const real* __restrict__ init, const int* __restrict__ starts, const int* __restrict__ ends,
    const act* __restrict__ dout, i64 o_b, i64 o_l, const real* __restrict__ dfinal, const real* __restrict__ ckpt,
    act* __restrict__ gu, i64 gu_b, i64 gu_l, act* __restrict__ gdt, i64 gdt_b, i64 gdt_l, act* __restrict__ gz, i64 gz_b,
    i64 gz_l, act* __restrict__ y, i64 y_b, i64 y_l, real* __restrict__ gA, real* __restrict__ gB, real* __restrict__ gC, real* __restrict__ gD, real* __restrict__ gbias, real* __restrict__ ginit,
    real* __restrict__ chunk_state, real* __restrict__ chunk_dt, int L, int d_inner, int group_channels,
    int blocks_per_group, int chunk_len, int chunks) {
  extern __shared__ __align__(16) unsigned char raw_shared[];
#if HALVES == 2
  const int half = __shfl_sync(~0u, int(threadIdx.x) / NT, 0);  // the same for a warp: the compiler keeps it apart
  Ring& ring = *reinterpret_cast<Ring*>(raw_shared + 2 * sizeof(Shared));
  auto meet_own = [&]() { meet(OWN + half, NT); };
#else
  constexpr int half = 0;
  auto meet_own = [&]() { __syncthreads(); };
#endif
  Shared& S = reinterpret_cast<Shared*>(raw_shared)[half];
#if PASS == 0
  __builtin_assume(threadIdx.x < HALVES * NT);  // fewer instructions and no spills; in PASS 1 it is more of them
#endif
  const int tid = HALVES == 2 ? threadIdx.x % NT : threadIdx.x, lane = tid & 31, warp = tid >> 5, g = lane / CPW, ch = warp * CPW + lane % CPW, at = TUNED ? int(opaque(place(ch))) : place(ch);
  const int grp = blockIdx.x / blocks_per_group, first = ((blockIdx.x % blocks_per_group) * HALVES + half) * CB;
  const int c0 = grp * group_channels + first, width = VEC ? CB : min(CB, group_channels - first);
  const int c = c0 + ch;
  const bool live = VEC || ch < width;
  const i64 b = blockIdx.y;
  const int k0 = blockIdx.z + (PASS == 1), t_begin = k0 * chunk_len, t_end = min(L, t_begin + chunk_len);
  FOR_EACH(q, CB) {
    S.sbias[apart(q)] = bias && q < width ? bias[c0 + q] : real(0);
    S.sD[apart(q)] = D && q < width ? D[c0 + q] : real(0);
  }
#if N < NP
  FOR_EACH(q, TILE * (NP - N)) {
    (&S.sb[0][0])[q / (NP - N) * NP + N + q % (NP - N)] = real(0);
    (&S.sc[0][0])[q / (NP - N) * NP + N + q % (NP - N)] = real(0);
  }
#endif
#if PASS == 0
#pragma unroll
  for (int i = 0; i < 4; i++) if (tid < SHARERS) S.sums[i][tid] = Four{};
#pragma unroll
  for (int i = 0; i < NQ; i++) S.sumA[0][i][tid] = S.sumA[1][i][tid] = Four{};
#endif
  meet_own();

  real a[NS], carry[NS];
#if FIXB
  real bf[NS], gB_[NS];
#endif
#if FIXC
  real cf[NS], gC_[NS];
#endif
#pragma unroll
  for (int n = 0; n < NS; n++) {
    const int s = g * NS + n;
    const bool here = live && s < N;
    a[n] = here ? A[(i64)c * N + s] * LOG2E : real(0);
    carry[n] = real(0);
#if FIXB
    bf[n] = here ? Bfix[(i64)c * N + s] : real(0);
    gB_[n] = real(0);
#endif
#if FIXC
    cf[n] = here ? Cfix[(i64)c * N + s] : real(0);
    gC_[n] = real(0);
#endif
    if (here) {
      if (PASS == 0 && chunks > 1) carry[n] = chunk_state[((b * chunks + k0) * d_inner + c) * N + s];
      else if (PASS == 0 && !VARLEN && dfinal && k0 == chunks - 1) carry[n] = dfinal[(b * d_inner + c) * N + s];
    }
  }
#if PASS == 1
  real dt_sum = real(0);
  bool was_reset = false;
#elif TENSOR
  FOR_EACH(q, 4) {
    const float low = __uint_as_float(q == 0 ? 0x3f80u : q == 1 ? 0x3f800000u : 0u);
    const float high = __uint_as_float(q == 2 ? 0x3f80u : q == 3 ? 0x3f800000u : 0u);
    S.ones[q] = Four{low, low, high, high};
  }
#else
  int kept = 0;  // which of its 2 * NS values a lane ends with after the butterfly over channels
  {
    int others = NS;
#pragma unroll
    for (int m = 1; m < CPW; m <<= 1) { if (lane & m) kept += others; others >>= 1; }
  }
#endif
  const int t_last = t_begin + (t_end - t_begin - 1) / TILE * TILE;
  if (tid == 0) {
    const int t_next = max(t_last - TILE, t_begin);
    auto set = [&](int k, const void* p, i64 first_row, i64 stride, int size, bool ahead) {
      S.base[0][k] = reinterpret_cast<Address>(p) + (first_row + t_last * stride) * size;
      S.base[1][k] = reinterpret_cast<Address>(p) + (first_row + (ahead ? t_next : t_last) * stride) * size;
      S.apart[k] = TILE * stride * size;
    };
    constexpr int act_ = sizeof(act), real_ = sizeof(real);
#pragma unroll
    for (int k = NOW; k <= NEXT; k += NEXT - NOW) {
      set(k, u, b * u_b + c0, u_l, act_, k == NEXT);
      set(k + 1, dt, b * dt_b + c0, dt_l, act_, k == NEXT);
      set(k + 2, dout, b * o_b + c0, o_l, act_, k == NEXT);
      set(k + 3, z, b * z_b + c0, z_l, act_, k == NEXT);
    }
    set(NEXT_B, Bm, b * B_b + grp * B_g, B_l, act_, true);
    set(NEXT_B + 1, Cm, b * C_b + grp * C_g, C_l, act_, true);
#if PASS == 0
    set(OUT, gu, b * gu_b + c0, gu_l, act_, false);
    set(OUT + 1, gdt, b * gdt_b + c0, gdt_l, act_, false);
    set(OUT + 2, gz, b * gz_b + c0, gz_l, act_, false);
    set(OUT + 3, y, b * y_b + c0, y_l, act_, false);
    const i64 rows_before = ((i64)blockIdx.x * gridDim.y + b) * L, states = (i64)d_inner * N;
    set(SUMS_C, gC, rows_before * N, N, real_, false);
    set(SUMS_C + 1, gB, rows_before * N, N, real_, false);
    const Address kept = reinterpret_cast<Address>(ckpt) + (b * ((L + TILE - 1) / TILE) * states + (i64)c0 * N) * real_;
    S.base[0][STATE] = kept + t_last / TILE * states * real_;
    S.base[1][STATE] = kept + t_next / TILE * states * real_;
    S.apart[STATE] = states * real_;
#endif
  }
  meet_own();
#if TENSOR && PASS == 0
  const Four ones = S.ones[lane >> 2 & 3];  // read from memory, or the compiler would make it anew for every product
#endif
  int now = 0;  // which of the two S.base: a tile's own, the other is for the one before or after
  // Where the tile after this one finds everything; between the barrier after which a tile's inputs stand in shared memory and
  // its next one, when nobody reads what is written here.
  auto advance = [&](int t0) {
    if (tid < BASES) {
      const bool ahead = (tid >= NEXT && tid < OUT) || (tid >= STATE && tid < SUMS_C);
      S.base[now ^ 1][tid] = S.base[now][tid] - (ahead && t0 - TILE <= t_begin ? 0 : S.apart[tid]);
    }
  };
  // The elementwise role: this thread has row `row` of a tile, channels seg..seg+7 of the block.
  const int row = tid / PER, seg = (tid % PER) * 8;
  const int count = VEC && SEGS == NT ? 8 : tid < SEGS ? max(0, min(8, width - seg)) : 0;
  // Rows past the end read the last one instead, so that every call writes all of `r`: what it held need not be kept.
  auto fetch = [&](int from, int t0) {
    Raw r{};
    const u32 me = opaque(tid), r0 = me / PER, s0 = me % PER * 8;
    const offset t = min(int(r0), t_end - 1 - t0);
    const int n = VEC ? 8 : count;
    if (count > 0) {
      const Address* p = &S.base[now][from];
      auto load = [&](int k, i64 stride) {
        const act* q = global<const act>(p[k], (t * offset(stride) + s0) * offset(sizeof(act)));
        return from == NOW ? load8_last(q, n, VEC) : load8(q, n, VEC);
      };
      if (HALVES == 2 && from == NEXT) {  // the order found
        r.z = load(3, z_l);
        r.dout = load(2, o_l);
        r.dt = load(1, dt_l);
        r.u = load(0, u_l);
      } else {
        if (PASS == 0) r.u = load(0, u_l);
        r.dt = load(1, dt_l);
        r.dout = load(2, o_l);
        if (HASZ) r.z = load(3, z_l);
      }
    }
    return r;
  };
#if AHEAD
  // Which eight numbers of B or C a thread brings, found anew every time: it costs less than to keep it.
  struct Brought { bool is_c, here; u32 row, n; };
  auto brought = [&]() {
    const u32 me = opaque(tid), q = me % PIECES;
    const bool is_c = me >= PIECES;
    return Brought{is_c, is_c ? (!FIXC && me < 2 * PIECES) : !FIXB && PASS == 0, q / (N / 8), q % (N / 8) * 8};
  };
  auto fetch_bc = [&](int t0) {
    Pack8 r{};
    const Brought p = brought();
    if (p.here && t0 + int(p.row) < t_end)
      r = load8(global<const act>(S.base[now][NEXT_B + p.is_c], (p.row * (p.is_c ? C_l : B_l) + p.n) * i64(sizeof(act))), 8, true);
    return r;
  };
#endif

#if FIXB
#define BVAL(n) bf[n]
#else
#define BVAL(n) fb.v[n]
#endif
#if FIXC
#define CVAL(n) cf[n]
#else
#define CVAL(n) fc.v[n]
#endif
  struct Row { real v[NS]; };
  auto states_of = [&](const real* p) {
    Row r;
#pragma unroll
    for (int m = 0; m < NS; m += 4) {
      const Four f = *reinterpret_cast<const Four*>(p + g * NS + m);
#pragma unroll
      for (int q = 0; q < 4; q++) r.v[m + q] = f.v[q];
    }
    return r;
  };

#if PASS == 0
  auto fetch_state = [&]() {
    Row r{};
    const real* p = global<const real>(S.base[now][STATE], i64(CHANNEL(opaque(tid))) * (N * int(sizeof(real))));
#if N == NP
    if (live) r = states_of(p);
#else
#pragma unroll
    for (int n = 0; n < NS; n++) if (live && g * NS + n < N) r.v[n] = p[g * NS + n];
#endif
    return r;
  };
#endif
  Raw next = fetch(NEXT, t_last);
#if AHEAD
  Pack8 next_bc = fetch_bc(t_last);
#endif
#if PASS == 0
  Row next_h = fetch_state();
#endif
  auto ask = [&](int t0) {
    const int t1 = max(t0 - TILE, t_begin);
    next = fetch(NEXT, t1);
#if AHEAD
    next_bc = fetch_bc(t1);
#endif
#if PASS == 0 && !TUNED  // there the walk does this itself
    next_h = fetch_state();
#endif
  };
#if HALVES == 2
  if (!half) pass(EMPTY), pass(EMPTY + 1);
#endif
#if PASS == 0
  // A sub-chunk's dB and dC, of the tile from t0 on: the warps' sums, in order. `every`: those of all sub-chunks at once.
  auto reduce = [&](int j, bool every, int t0) {
    if (FIXB && FIXC) return;
#if TENSOR
    constexpr int pieces = HT * 2 * NP / 4;
#else
    constexpr int wide = N == NP ? 4 : 1, pieces = HT * 2 * NP / wide;
#endif
    const u32 first = opaque(tid);
    // One sub-chunk is less than a piece for every thread: another part of the block does it every time.
    const u32 turn = !every && pieces < NT ? (first + NT - j * pieces % NT) % NT : first;
    const int count = every ? NSUB * pieces : pieces;
#pragma unroll
    for (int q_ = 0; q_ < (count + NT - 1) / NT; q_++) {
      const u32 q = turn + q_ * NT;
      if (count % NT && q >= count) break;
#if TENSOR
      // Four numbers of a warp: dC and dB of a step, dC and dB two steps later.
      const int k = every ? q / pieces : j, n = q % NP, row = k * HT + q % pieces / 32 * 4 + q % 32 / NP, t = t0 + row;
      const u32 at_ = (row * N + n) * sizeof(real);
      real *to_c = global<real>(S.base[now][SUMS_C], at_), *to_b = global<real>(S.base[now][SUMS_C + 1], at_);
      Four total{};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const Four f = *reinterpret_cast<const Four*>(&S.part[k % PARTS][w][q % pieces / 32 * 4][0][q % 32 * 4]);
#pragma unroll
        for (int m = 0; m < 4; m++) total.v[m] += f.v[m];
      }
#if HALVES == 2
      if (half) {
        ring.sums[now][q] = total;
        pass(FULL + now);
        continue;
      }
      meet(FULL + now, 2 * NT);
      const Four other = ring.sums[now][q];
      pass(EMPTY + now);
#pragma unroll
      for (int m = 0; m < 4; m++) total.v[m] += other.v[m];
#endif
      if (t < t_end && n < N) {
        if (!FIXC) *to_c = total.v[0];
        if (!FIXB) *to_b = total.v[1];
      }
      if (t + 2 < t_end && n < N) {
        if (!FIXC) to_c[2 * N] = total.v[2];
        if (!FIXB) to_b[2 * N] = total.v[3];
      }
#else
      const int k = every ? q / pieces : j, r = q % pieces / (2 * NP / wide), which = q / (NP / wide) & 1, n = q % (NP / wide) * wide;
      const int t = t0 + k * HT + r;
      if ((which ? FIXB : FIXC) || t >= t_end || n >= N) continue;
      real* out = global<real>(S.base[now][SUMS_C + which], ((k * HT + r) * N + n) * int(sizeof(real)));
      auto part_of = [&](int w) { return &S.part[k % PARTS][w][r][which][n]; };
      constexpr int summands = WARPS;
      if (wide == 4) {
        Four total{};
#pragma unroll
        for (int w = 0; w < summands; w++) {
          const Four f = *reinterpret_cast<const Four*>(part_of(w));
#pragma unroll
          for (int m = 0; m < 4; m++) total.v[m] += f.v[m];
        }
        *reinterpret_cast<Four*>(out) = total;
      } else {
        real total = real(0);
#pragma unroll
        for (int w = 0; w < summands; w++) total += *part_of(w);
        *out = total;
      }
#endif
    }
  };
#endif
  // Puts a tile's inputs, which `next` holds, into shared memory. `whole`: all of its steps are there, as in all tiles but the last.
  auto enter = [&](int t0, bool whole) {
    const int steps = whole ? TILE : min(TILE, t_end - t0);
    if (tid < SEGS) {
      const u32 me = opaque(tid), row = me / PER, piece = me % PER, first = first_slot(row, piece);
      const int n = whole || int(row) < steps ? count : 0;
      if (n > 0) {
        constexpr int some = HALVES == 2 ? 8 : 4;  // at a time, so that their chains of instructions interleave
#pragma unroll
        for (int from = 0; from < 8; from += some) {
          Slot f[some];
          Four shift[some / 4];
#pragma unroll
          for (int q = 0; q < some / 4; q++) shift[q] = *reinterpret_cast<const Four*>(&S.sbias[apart(piece * 8 + from + 4 * q)]);
#pragma unroll
          for (int m = 0; m < some; m++) {
            const int j = from + m;
            f[m].dv = part(next.dt, j) + shift[m / 4].v[m % 4];
            if (SOFTPLUS) f[m].dv = softplus(f[m].dv);
            if (!VEC && j >= n) f[m].dv = real(0);
            f[m].dy = HASZ ? part(next.dout, j) * silu(part(next.z, j)) : part(next.dout, j);
            f[m].du = PASS == 0 ? f[m].dv * part(next.u, j) : f[m].dy;  // the chunk's end asks for no du
            f[m].y = real(0);
          }
#pragma unroll
          for (int m = 0; m < some; m++) SLOT(first, from + m) = f[m];
        }
      } else {  // a step of length zero
#pragma unroll
        for (int j = 0; j < 8; j++) SLOT(first, j) = Slot{};
      }
    }
#if AHEAD
    if (const Brought p = brought(); p.here) {
      Four* to = reinterpret_cast<Four*>(p.is_c ? &S.sc[p.row][p.n] : &S.sb[p.row][p.n]);
      const bool here = int(p.row) < steps;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        Four f;
#pragma unroll
        for (int m = 0; m < 4; m++) f.v[m] = here ? part(next_bc, 4 * j + m) : real(0);
        to[j] = f;
      }
    }
#else
    FOR_EACH(q, TILE * N) {
      const int r = q / N, n = q % N;
      const bool here = r < steps;
      if (!FIXB && PASS == 0) S.sb[r][n] = here ? to_real(Bm[b * B_b + (i64)(t0 + r) * B_l + grp * B_g + n]) : real(0);
      if (!FIXC) S.sc[r][n] = here ? to_real(Cm[b * C_b + (i64)(t0 + r) * C_l + grp * C_g + n]) : real(0);
    }
#endif
#if VARLEN
    FOR_EACH(q, TILE) {
      S.start[q] = q < steps ? starts[t0 + q] : 0;
      S.end[q] = q < steps ? ends[t0 + q] : 0;
    }
#endif
  };
#if PASS == 0
  real gA_[NS];  // dA of the last few tiles
#pragma unroll
  for (int n = 0; n < NS; n++) gA_[n] = real(0);
#endif
  enter(t_last, false);
  for (int t0 = t_last; t0 >= t_begin; t0 -= TILE) {
    const int steps = min(TILE, t_end - t0);
    now ^= 1;
    meet_own();

    if (PASS == 1 || !TUNED) advance(t0);
#if PASS == 1
    ask(t0);
#pragma unroll 4
    for (int s = steps - 1; s >= 0; s--) {
#if VARLEN
      if (S.end[s] && dfinal)
#pragma unroll
        for (int n = 0; n < NS; n++)
          if (live && g * NS + n < N) carry[n] += dfinal[((i64)(S.end[s] - 1) * d_inner + c) * N + g * NS + n];
#endif
      const Two f = *reinterpret_cast<const Two*>(&S.slots[s][at]);  // dt and the gradient before the gate
#if !FIXC
      const Row fc = states_of(S.sc[s]);
#endif
      dt_sum += f.a;
#pragma unroll
      for (int n = 0; n < NS; n++) carry[n] = decay(f.a, a[n]) * fma_(f.b, CVAL(n), carry[n]);
#if VARLEN
      if (S.start[s]) {
        was_reset = true;
#pragma unroll
        for (int n = 0; n < NS; n++) carry[n] = real(0);
      }
#endif
    }
    __syncthreads();
    if (t0 > t_begin) enter(t0 - TILE, true);
#else  // PASS == 0
    real h[NS], e[NS];
#pragma unroll
    for (int n = 0; n < NS; n++) h[n] = next_h.v[n];
    auto step = [&](int s) {
#if VARLEN
      if (S.start[s])
#pragma unroll
        for (int n = 0; n < NS; n++)
          h[n] = (init && live && g * NS + n < N) ? init[((i64)(S.start[s] - 1) * d_inner + c) * N + g * NS + n] : real(0);
#endif
#if !FIXB
      const Row fb = states_of(S.sb[s]);  // before f: the best of all single changes
#endif
      const Two f = *reinterpret_cast<const Two*>(&S.slots[s][at]);  // dt and dt*u
#pragma unroll
      for (int n = 0; n < NS; n++) {
        e[n] = decay(f.a, a[n]);
        h[n] = fma_(e[n], h[n], f.b * BVAL(n));
      }
    };
    const int subs = TENSOR ? NSUB : (steps + HT - 1) / HT;
#pragma unroll 1
    for (int j = 0; j < subs - PIPE; j++) {
#pragma unroll
      for (int m = 0; m < NQ; m++) S.hs[j][m][tid] = Four{h[4 * m], h[4 * m + 1], h[4 * m + 2], h[4 * m + 3]};
      if (PIPE || j + 1 < subs)
#pragma unroll
        for (int s = 0; s < HT; s++) step(j * HT + s);
    }
    if (TUNED) advance(t0);  // 0.2 % faster than where the tile begins
    struct History { real before[HT + 1][NS], kept[HT][NS]; };  // the state before step r, its decay
    auto recompute = [&](History& to, int j, int r) {
      if (r == 0 && PIPE && j == NSUB - 1) {  // it goes on from where the first run ended
#pragma unroll
        for (int n = 0; n < NS; n++) to.before[0][n] = h[n];
      } else if (r == 0)
#pragma unroll
        for (int m = 0; m < NQ; m++) {
          const Four f = S.hs[j][m][tid];
#pragma unroll
          for (int q = 0; q < 4; q++) to.before[0][4 * m + q] = h[4 * m + q] = f.v[q];
        }
#if TUNED
      // As `step`, but in stages: both reads, all decays, all states.
      const Two f = *reinterpret_cast<const Two*>(&S.slots[j * HT + r][at]);
      const Row fb = states_of(S.sb[j * HT + r]);
#pragma unroll
      for (int n = 0; n < NS; n++) to.kept[r][n] = decay(f.a, a[n]);
#pragma unroll
      for (int n = 0; n < NS; n++) to.before[r + 1][n] = h[n] = fma_(to.kept[r][n], h[n], f.b * fb.v[n]);
#else
      step(j * HT + r);
#pragma unroll
      for (int n = 0; n < NS; n++) {
        to.before[r + 1][n] = h[n];
        to.kept[r][n] = e[n];
      }
#endif
    };
    // A lane's sums over states take the place of what made them, once the whole warp has read that.
    auto put = [&](int s, const real (&sums)[3]) {
      if (G == R || g < R) {
        Slot& to = S.slots[s + g % R][at];
        to.du = sums[1];
        to.dy = sums[2];
        if (HASZ) to.y = sums[0];
      }
    };
    Raw again;
    // Walks sub-chunk j back; `ahead`: the states of the one before it are made between its steps.
    auto walk = [&](const History& from, int j, History* ahead) {
      auto& hist = from.before;
      auto& kept_e = from.kept;
      real(*part)[2][NP] = S.part[j % PARTS][warp];
#if TENSOR
      constexpr int ROUNDS = TUNED ? HT / 4 : 1;  // each with sums of its own
      float sums[ROUNDS][2][2];
#endif
      real sum[3][R];
      real late[HT / R][3];
#if TUNED
      const bool b0 = g & 1, b1 = g & 2;
      // What this lane and the one `lanes` away have of two sums: the upper lane ends with the second one.
      auto fold = [&](real first, real second, bool up, int lanes) {
        return (up ? second : first) + __shfl_xor_sync(~0u, up ? first : second, lanes);
      };
#endif
#pragma unroll
      for (int r = HT - 1; r >= 0; r--) {
        if (PIPE && j == 0) {  // registers come free: what the rest of this tile and the next one need is asked for
#if TUNED
          if (r == 4) {
            ask(t0);
            next_h = fetch_state();
          }
          if (r == 0) again = fetch(NOW, t0);
#else
          if (r == 3) ask(t0);
          if (r == 1) again = fetch(NOW, t0);
#endif
        }
        const int s = j * HT + r;
        real v[2 * NS];
#if TENSOR
        auto add_channels = [&](int k) {  // dC, dB
          float d[4];
          row_sums(d, ones, bf16_pair(v[NS * k], v[NS * k + 1]), bf16_pair(v[NS * k + 2], v[NS * k + 3]));
          // Lanes have all four steps of a round: the lower half keeps the even ones, the upper one the odd ones.
          const float total = r % 4 < 2 ? d[0] + d[1] : d[2] + d[3];
          float& to = sums[r / 4 % ROUNDS][k][r % 4 / 2];
          to = r % 2 || !(lane & 16) ? total : to;
        };
        auto store_channels = [&]() {
          if (r % 4) return;
          const auto& x = sums[r / 4 % ROUNDS];
          *reinterpret_cast<Four*>(&part[r][0][0] + 4 * ((lane & 16) + 4 * (lane & 3) + (lane >> 2 & 3))) =
              Four{x[0][0], x[1][0], x[0][1], x[1][1]};
        };
#endif
#if TUNED
        Slot f;
        Row fb, fc;
        real gg[NS], q[NS];
        auto read = [&]() { f = S.slots[s][at], fb = states_of(S.sb[s]), fc = states_of(S.sc[s]); };
        auto recompute_one = [&]() { if (ahead) recompute(*ahead, j - 1, HT - 1 - r); };
        auto state = [&](auto number, int n) {  // of nine statements this one, for state n
          constexpr int k = number.value;
          if constexpr (k == 0) gg[n] = fma_(f.dy, fc.v[n], carry[n]);
          if constexpr (k == 1) carry[n] = kept_e[r][n] * gg[n];
          if constexpr (k == 2) q[n] = carry[n] * hist[r][n];  // not h - dt u B, which cancels where dt is large
          if constexpr (k == 3) sum[0][r % R] = n ? fma_(hist[r + 1][n], fc.v[n], sum[0][r % R]) : hist[r + 1][n] * fc.v[n];
          if constexpr (k == 4) sum[1][r % R] = n ? fma_(gg[n], fb.v[n], sum[1][r % R]) : gg[n] * fb.v[n];
          if constexpr (k == 5) sum[2][r % R] = n ? fma_(q[n], a[n], sum[2][r % R]) : q[n] * a[n];
          if constexpr (k == 6) gA_[n] = fma_(q[n], f.dv, gA_[n]);
          if constexpr (k == 7) v[n] = f.dy * hist[r + 1][n];
          if constexpr (k == 8) v[NS + n] = gg[n] * f.du;
        };
        auto add_states = [&]() {  // lane g ends with step s + g % R
          if (r % R) return;
#pragma unroll
          for (int k = 0; k < 3; k++)
            late[r / R][k] = fold(fold(sum[k][0], sum[k][1], b0, CPW), fold(sum[k][2], sum[k][3], b0, CPW), b1, 2 * CPW);
        };
        // Reads don't move from one pair of steps into the next.
        auto fence = [&]() { if (r % 2 == 0) asm volatile("" ::: "memory"); };
        auto finish = [&]() {
          add_channels(0);
          add_channels(1);
          store_channels();
          add_states();
          fence();
        };
        // The orders found. In halves one step of eight has another one than the rest, without which the compiler gives the
        // whole walk other registers and it takes 5 % longer.
        if (HALVES == 1) {
          read();
          recompute_one();  // after this step's own reads, which are needed first
          each<0, 9 * NS>([&](auto i) { state(Number<i.value % 9>(), i.value / 9); });  // one state after the other
          finish();
        } else if (r != 2) {
          recompute_one();
          read();
          each<0, (9 + NS - 1) * NS>([&](auto i) {  // each state a statement behind the one before
            constexpr int n = i.value % NS, k = i.value / NS - n;
            if constexpr (k >= 0 && k < 9) state(Number<k>(), n);
          });
          finish();
        } else {
          read();
          recompute_one();
          each<0, 9 * NS>([&](auto i) {
            if constexpr (i.value % 9 != 7) state(Number<i.value % 9>(), i.value / 9);
          });
          add_channels(1);
          state(Number<7>(), 0);
          fence();
#pragma unroll
          for (int n = 1; n < NS; n++) state(Number<7>(), n);
          add_channels(0);
        }
#else
        if (ahead) recompute(*ahead, j - 1, HT - 1 - r);
#if VARLEN
        if (S.end[s] && dfinal)
#pragma unroll
          for (int n = 0; n < NS; n++)
            if (live && g * NS + n < N) carry[n] += dfinal[((i64)(S.end[s] - 1) * d_inner + c) * N + g * NS + n];
#endif
        const Slot f = S.slots[s][at];
#if !FIXB
        const Row fb = states_of(S.sb[s]);
#endif
#if !FIXC
        const Row fc = states_of(S.sc[s]);
#endif
#pragma unroll
        for (int n = 0; n < NS; n++) {
          const real hh = hist[r + 1][n], gg = fma_(f.dy, CVAL(n), carry[n]);
          real before = hist[r][n];
#if VARLEN
          if (S.start[s]) before = (init && live && g * NS + n < N) ? init[((i64)(S.start[s] - 1) * d_inner + c) * N + g * NS + n] : real(0);
#endif
          carry[n] = kept_e[r][n] * gg;
          // Decay times the previous state, not h - dt u B, which cancels where dt is large.
          const real q = carry[n] * before;
          if (HASZ) sum[0][r % R] = n ? fma_(hh, CVAL(n), sum[0][r % R]) : hh * CVAL(n);
          sum[1][r % R] = n ? fma_(gg, BVAL(n), sum[1][r % R]) : gg * BVAL(n);
          sum[2][r % R] = n ? fma_(q, a[n], sum[2][r % R]) : q * a[n];
          gA_[n] = fma_(q, f.dv, gA_[n]);
          v[n] = v[NS + n] = real(0);
#if FIXC
          gC_[n] = fma_(f.dy, hh, gC_[n]);
#else
          v[n] = f.dy * hh;
#endif
#if FIXB
          gB_[n] = fma_(gg, f.du, gB_[n]);
#else
          v[NS + n] = gg * f.du;
#endif
        }
#if VARLEN
        if (S.start[s])
#pragma unroll
          for (int n = 0; n < NS; n++) {
            if (ginit && live && g * NS + n < N) ginit[((i64)(S.start[s] - 1) * d_inner + c) * N + g * NS + n] = carry[n];
            carry[n] = real(0);
          }
#endif
#if TENSOR
        add_channels(0);
        add_channels(1);
        store_channels();
#else
        if (!FIXB || !FIXC) {
          constexpr int left = 2 * NS / CPW;  // values that a lane ends with
          int others = NS;
#pragma unroll
          for (int m = 1; m < CPW; m <<= 1) {
            const bool up = lane & m;
#pragma unroll
            for (int i = 0; i < NS; i++)
              if (i < others) {
                const real mine = up ? v[i + others] : v[i], other = up ? v[i] : v[i + others];
                v[i] = mine + __shfl_xor_sync(~0u, other, m);
              }
            others >>= 1;
          }
#pragma unroll
          for (int i = 0; i < left; i++) part[r][(kept + i) / NS][g * NS + (kept + i) % NS] = v[i];
        }
#endif
        if (r % R == 0) {
          // Butterfly over the lanes of a channel: lane g ends with step s + g % R.
          const bool b0 = g & 1, b1 = g & 2;
#pragma unroll
          for (int k = HASZ ? 0 : 1; k < 3; k++) {
            real t_;
            if (R == 4) {
              real x = b0 ? sum[k][1] : sum[k][0], y_ = b0 ? sum[k][3 % R] : sum[k][2 % R];
              x += __shfl_xor_sync(~0u, b0 ? sum[k][0] : sum[k][1], CPW);
              y_ += __shfl_xor_sync(~0u, b0 ? sum[k][2 % R] : sum[k][3 % R], CPW);
              t_ = (b1 ? y_ : x) + __shfl_xor_sync(~0u, b1 ? x : y_, 2 * CPW);
            } else {
              t_ = (b0 ? sum[k][1] : sum[k][0]) + __shfl_xor_sync(~0u, b0 ? sum[k][0] : sum[k][1], CPW);
            }
#pragma unroll
            for (int m = R; m < G; m <<= 1) t_ += __shfl_xor_sync(~0u, t_, m * CPW);
            late[r / R][k] = t_;
          }
          if (!PIPE) {
            __syncwarp();
            put(s, late[r / R]);
          }
        }
#endif
      }
      if (PIPE) {  // not before: nothing moves across a store, and the compiler needs room to mix the two
        __syncwarp();
#pragma unroll
        for (int m = 0; m < HT / R; m++) put(j * HT + m * R, late[m]);
      }
    };
    auto between = [&](int j) {  // makes room for the partial sums of sub-chunk j
      if (PARTS < NSUB) {
        __syncthreads();
        reduce(j + 1, false, t0);
        if (PARTS == 1) __syncthreads();
      }
    };
#if PIPE
    History even, odd;
#pragma unroll
    for (int r = 0; r < HT; r++) recompute(even, NSUB - 1, r);
#pragma unroll
    for (int j = NSUB - 1; j >= 0; j--) {
      if (j < NSUB - 1) between(j);
      if ((NSUB - 1 - j) % 2) walk(odd, j, j ? &even : nullptr); else walk(even, j, j ? &odd : nullptr);
    }
#else
    int waiting = 0;
#pragma unroll 1
    for (int j = subs - 1; j >= 0; j--) {
      asm volatile("" : "+r"(waiting));  // or the first sub-chunk becomes a second copy of this loop
      if (waiting) between(j);
      History here;
#pragma unroll
      for (int r = 0; r < HT; r++) recompute(here, j, r);
      walk(here, j, nullptr);
      waiting = 1;
    }
#endif
    if (!PIPE) {
      again = fetch(NOW, t0);
      ask(t0);
    }
    // dA: sums of a few tiles, added with what earlier additions lost.
    if (t0 / TILE % TILES_A == 0 || t0 == t_begin)
#pragma unroll
      for (int m = 0; m < NQ; m++) {
        Four total = S.sumA[0][m][tid], lost = S.sumA[1][m][tid];
#pragma unroll
        for (int q = 0; q < 4; q++) {
          const real y_ = gA_[4 * m + q] - lost.v[q], t_ = total.v[q] + y_;
          lost.v[q] = (t_ - total.v[q]) - y_;
          total.v[q] = t_;
          gA_[4 * m + q] = real(0);
        }
        S.sumA[0][m][tid] = total;
        S.sumA[1][m][tid] = lost;
      }
#if HALVES == 2
    meet(half ? EMPTY + now : OWN, half ? 2 * NT : NT);  // and the ring has room
#else
    __syncthreads();
#endif
    {
      const u32 me = opaque(tid), row = me / PER, piece = me % PER, first = first_slot(row, piece);
      const int n = int(row) < steps ? count : 0;
      if (n > 0 || (VEC && SEGS == NT)) {  // without a branch where all threads have a piece
        Pack8 ou, od, oz, oy;
        real share[16];
#pragma unroll
        for (int j = 0; j < 4; j++) *reinterpret_cast<Four*>(share + 4 * j) = S.sums[j][tid];
#pragma unroll
        for (int pair = 0; pair < 8; pair += 2) {
          const Two bias_ = *reinterpret_cast<const Two*>(&S.sbias[apart(piece * 8 + pair)]);
          const Two D_ = *reinterpret_cast<const Two*>(&S.sD[apart(piece * 8 + pair)]);
          const real shift[2] = {bias_.a, bias_.b}, skip[2] = {D_.a, D_.b};
          real to_u[2], to_dt[2], to_z[2], to_y[2];
          Slot f[2];
#pragma unroll
          for (int m = 0; m < 2; m++) f[m] = SLOT(first, pair + m);
#pragma unroll
          for (int m = 0; m < 2; m++) {
            const int j = pair + m;
            const real uv = part(again.u, j), ov = part(again.dout, j), Dv = skip[m], raw = part(again.dt, j) + shift[m];
            real ddt = fma_(uv, f[m].du, f[m].dy * LN2);
            if (SOFTPLUS && (IN != 3 || !(raw > real(20)))) ddt *= quick_sigmoid(raw);
            real dyv = ov;
            if (HASZ) {
              const real zv = part(again.z, j), sig = quick_sigmoid(zv), os = ov * sig, before = fma_(Dv, uv, f[m].y);
              dyv = os * zv;
              to_z[m] = os * before * fma_(zv, real(1) - sig, real(1));
              if (HASY) to_y[m] = before * (zv * sig);
            }
            to_u[m] = fma_(f[m].dv, f[m].du, Dv * dyv);
            to_dt[m] = ddt;
            if (VEC ? n > 0 : j < n) {
              share[j] = fma_(dyv, uv, share[j]);
              share[8 + j] += ddt;
            }
          }
          set_pair(ou, pair, to_u[0], to_u[1]);
          set_pair(od, pair, to_dt[0], to_dt[1]);
          if (HASZ) set_pair(oz, pair, to_z[0], to_z[1]);
          if (HASY) set_pair(oy, pair, to_y[0], to_y[1]);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) S.sums[j][tid] = *reinterpret_cast<Four*>(share + 4 * j);
        const Address* p = &S.base[now][OUT];
        auto store = [&](int k, i64 stride, const Pack8& r) {
          if (n > 0) store8_once(global<act>(p[k], (offset(row) * offset(stride) + piece * 8) * offset(sizeof(act))), r, VEC ? 8 : n, VEC);
        };
        if (HASZ) store(2, gz_l, oz);
        store(1, gdt_l, od);
        store(0, gu_l, ou);
        if (HASY) store(3, y_l, oy);
      }
    }
    if (t0 > t_begin) enter(t0 - TILE, true);
    reduce(0, PARTS >= NSUB, t0);  // 0.5 % faster than before the results; a walk overwrites these sums after the barrier
#endif
  }
  meet_own();
#pragma unroll
  for (int n = 0; n < NS; n++) {
    const int s = g * NS + n;
    if (!live || s >= N) continue;
    const i64 to = ((b * chunks + k0) * d_inner + c) * N + s;
#if PASS == 1
    chunk_state[to] = carry[n];
#else
    gA[to] = S.sumA[0][n / 4][tid].v[n % 4];
#if FIXB
    gB[to] = gB_[n];
#endif
#if FIXC
    gC[to] = gC_[n];
#endif
    if (!VARLEN && ginit && k0 == 0) ginit[(b * d_inner + c) * N + s] = carry[n];
#endif
  }
#if PASS == 1
  if (live && g == 0) chunk_dt[(b * chunks + k0) * d_inner + c] = was_reset ? real(-1) : dt_sum;
#else
  // dD and d dt_bias: the threads that had a piece of eight channels, one after the other.
  constexpr int sharers = NT / PER < TILE ? NT / PER : TILE;
  for (int q = tid; q < width; q += NT) {
    real d = real(0), e = real(0);
    const int from = q / 8, j = q % 8;
    for (int k = 0; k < sharers; k++) {
      d += S.sums[j / 4][k * PER + from].v[j % 4];
      e += S.sums[2 + j / 4][k * PER + from].v[j % 4];
    }
    gD[(b * chunks + k0) * d_inner + c0 + q] = d;
    gbias[(b * chunks + k0) * d_inner + c0 + q] = e;
  }
#endif
}

#if PASS == 0
// All sums over partial results in one launch: blocks up to end0 for dB, then dC, dA (and fixed B, C), dD, d dt_bias. A thread adds up
// `rows` (or, for dB and dC, `blocks`) summands of four neighbouring results, or of one, always in the same order.
#define SUM_NT 256
#define WIDE_N (N % 4 == 0 ? 4 : 1)
// Four neighbouring partial sums, which nobody reads again: the first to go where the cache needs room (0.2 to 0.4 %).
DEV Four load4_last(const real* p) {
#if IN == 3
  return *reinterpret_cast<const Four*>(p);
#else
  Four f;
  asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3]) : "l"(p));
  return f;
#endif
}
template <int W> DEV void add_rows(real (&total)[W], const real* p, i64 apart, int count) {
#pragma unroll
  for (int m = 0; m < W; m++) total[m] = real(0);
#pragma unroll 8
  for (int i = 0; i < count; i++, p += apart) {
    if (W == 4) {
      const Four f = load4_last(p);
#pragma unroll
      for (int m = 0; m < W; m++) total[m] += f.v[m];
    } else {
      total[0] += *p;
    }
  }
}
extern "C" __global__ void __launch_bounds__(SUM_NT) scan_sums(
    const real* __restrict__ pB, act* __restrict__ dB, i64 dB_b, i64 dB_l, i64 dB_g, int B_groups,
    const real* __restrict__ pC, act* __restrict__ dC, i64 dC_b, i64 dC_l, i64 dC_g, int C_groups,
    const real* __restrict__ pBfix, real* __restrict__ dBfix, const real* __restrict__ pCfix, real* __restrict__ dCfix,
    const real* __restrict__ pA, real* __restrict__ dA, const real* __restrict__ pD, real* __restrict__ dD,
    const real* __restrict__ pbias, real* __restrict__ dbias, int batch, int L, int d_inner, int blocks, int rows,
    int end0, int end1, int end2, int end3) {
  const int x = blockIdx.x;
  if (x < end1) {
    const bool is_c = x >= end0;
    const i64 i = (i64)(x - (is_c ? end0 : 0)) * SUM_NT + threadIdx.x;
    const int groups = is_c ? C_groups : B_groups, summands = blocks / groups;
    const i64 size = (i64)batch * L * N, quad = i * WIDE_N, group = quad / size, at = quad % size;
    if (group >= groups) return;
    const int n = at % N;
    const i64 t = at / N % L, b = at / N / L;
    real total[WIDE_N];
    add_rows(total, (is_c ? pC : pB) + group * summands * size + at, size, summands);
    act* to = is_c ? dC + b * dC_b + t * dC_l + group * dC_g + n : dB + b * dB_b + t * dB_l + group * dB_g + n;
#pragma unroll
    for (int m = 0; m < WIDE_N; m++) to[m] = to_act(total[m]);
    return;
  }
  if (x < end2) {
    const i64 size = (i64)d_inner * N, i = ((i64)(x - end1) * SUM_NT + threadIdx.x) * WIDE_N;
    if (i >= size) return;
    const real* from[3] = {pA, pBfix, pCfix};
    real* into[3] = {dA, dBfix, dCfix};
#pragma unroll
    for (int k = 0; k < 3; k++) {
      if ((k == 1 && !FIXB) || (k == 2 && !FIXC)) continue;
      real total[WIDE_N];
      add_rows(total, from[k] + i, size, rows);
#pragma unroll
      for (int m = 0; m < WIDE_N; m++) into[k][i + m] = total[m];
    }
    return;
  }
  const bool is_bias = x >= end3;
  const int c = (x - (is_bias ? end3 : end2)) * SUM_NT + threadIdx.x;
  real* into = is_bias ? dbias : dD;
  if (c >= d_inner || !into) return;
  real total[1];
  add_rows(total, (is_bias ? pbias : pD) + c, d_inner, rows);
  into[c] = total[0];
}
#endif

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
  constexpr int AT_ONCE = 8;  // loads in flight
  for (int k0 = chunks - 1; k0 >= 0; k0 -= AT_ONCE) {
    real out[AT_ONCE], s[AT_ONCE];
#pragma unroll
    for (int m = 0; m < AT_ONCE; m++) {
      out[m] = k0 > m ? chunk_state[(b * chunks + k0 - m) * size + i] : real(0);
      s[m] = k0 > m ? chunk_dt[(b * chunks + k0 - m) * d_inner + c] : real(0);
    }
#pragma unroll
    for (int m = 0; m < AT_ONCE; m++) {
      if (k0 >= m) chunk_state[(b * chunks + k0 - m) * size + i] = carry;
      carry = s[m] < real(0) ? out[m] : fma_(decay(s[m], a), carry, out[m]);
    }
  }
}
#endif
