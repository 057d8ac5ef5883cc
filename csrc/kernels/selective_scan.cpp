// The selective scan, forward and backward.
//
//   h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,   y_t = C_t . h_t + D u_t,   y_t *= silu(z_t)
//
// A vector holds W neighbouring channels. A task is one block of up to 64 channels of one sequence; it walks time in
// chunks: first the chunk's rows are read, converted and prepared into small buffers (whole cache lines at a time), then
// each vector of channels runs through the chunk with its states in registers, then the rows are finished and written.
// In training the state before each chunk is kept; the backward walks the chunks from the last to the first, makes the
// chunk's states again into a buffer that fits the second-level cache, and runs the adjoint recurrence over it.
//
// Every sum is cut by shape alone, never by the number of threads: gradients of B and C are summed over the channels of a
// block, then over blocks in order; those of A, D, dt_bias over a fixed number of groups of sequences, then over groups.
#include "selective_scan.h"

#include <cstdlib>
#include <initializer_list>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "parallel.h"
#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#define SS_UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define SS_UNROLL _Pragma("unroll")
#else
#define SS_UNROLL
#endif

namespace {
using namespace ss;

constexpr int64_t kBlock = 64;      // channels whose parts of dB and dC are summed together; a multiple of every W
constexpr int64_t kPitch = kBlock;  // row of a block's [states][channels] matrix
constexpr int64_t kPanel = 4;       // most blocks of a task
constexpr int64_t kSkew = 7;        // cache lines between buffers, see lay_out
constexpr int64_t kRow = kPanel * kPitch;  // row of a task's [chunk][channels] buffers
constexpr int64_t kSlots = 16;      // groups of sequences whose gradients of A, D, dt_bias are summed apart
constexpr int kStates = SS_VECTOR_REGISTERS == 32 ? 16 : 8;  // states of a vector of channels that registers hold
// Vectors of channels that the adjoint handles at once: their parts of dB and dC are added in registers.
#if defined(SS_ISA_avx512) || defined(SS_ISA_neon)
constexpr int kTogether = 4;
#elif defined(SS_ISA_avx2)
constexpr int kTogether = 2;
#else
constexpr int kTogether = 1;
#endif

// Memory of one thread, kept between calls; grows to the largest request. On Linux it asks for a large page: the buffers
// are walked in strides that would use up the first level of the address cache.
class Workspace {
 public:
  ~Workspace() { std::free(raw_); }
  char* get(size_t bytes) {
    const size_t unit = size_t(2) << 20;
    bytes = (bytes + unit - 1) / unit * unit;
    if (bytes > size_) {
      std::free(raw_);
      raw_ = static_cast<char*>(std::malloc(bytes + unit));
      size_ = raw_ ? bytes : 0;
#if defined(__linux__)
      if (raw_) madvise(raw_ + (unit - reinterpret_cast<uintptr_t>(raw_) % unit) % unit, bytes, MADV_HUGEPAGE);
#endif
    }
    return raw_ ? raw_ + (unit - reinterpret_cast<uintptr_t>(raw_) % unit) % unit : nullptr;
  }

 private:
  char* raw_ = nullptr;
  size_t size_ = 0;
};
thread_local Workspace t_workspace;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A run of neighbouring channels that share their groups of B and C.
struct Block {
  int64_t begin, width, b_group, c_group;
};

// Cuts the channels every kBlock and wherever a group of B or C ends. Returns the number of blocks.
int64_t cut(const ss_scan_args& p, Block* blocks) {
  int64_t b_width = p.channels / p.b_groups, c_width = p.channels / p.c_groups, count = 0;
  for (int64_t c = 0; c < p.channels;) {
    int64_t bg = c / b_width, cg = c / c_width, end = c + kBlock;
    if ((bg + 1) * b_width < end) end = (bg + 1) * b_width;
    if ((cg + 1) * c_width < end) end = (cg + 1) * c_width;
    if (p.channels < end) end = p.channels;
    if (blocks) blocks[count] = {c, end - c, bg, cg};
    ++count;
    c = end;
  }
  return count;
}

struct Sequence {
  int64_t row, begin, length, checkpoint;  // batch row, first position, positions, first checkpoint's slot
};

Sequence sequence(const ss_scan_args& p, int64_t s) {
  if (!p.cu_seqlens) return {s, 0, p.length, s * divide_up(p.length, p.chunk)};
  // Sequence s owns the slots from cu[s] / chunk + s: never fewer than it needs, found without a sum over sequences.
  int64_t begin = p.cu_seqlens[s], end = p.cu_seqlens[s + 1];
  return {0, begin, end - begin, begin / p.chunk + s};
}

// Tasks that one thread should at least take: about 64K exponentials are worth waking another.
int64_t grain(const ss_scan_args& p) {
  int64_t width = p.channels < kBlock ? p.channels : kBlock;
  int64_t work = divide_up(p.batch * p.length, p.sequences > 0 ? p.sequences : 1) * width * p.states;
  return divide_up(65536, work > 0 ? work : 1);
}

// Sums of W rows of W lanes: lane i of the result is the sum of row i.
template <class V> SS_INLINE V sum_rows(const typename V::scalar* rows) {
  typename V::scalar sums[V::W];
  for (int i = 0; i < V::W; ++i) sums[i] = sum(V::load(rows + i * V::W));
  return V::load(sums);
}
#if defined(SS_ISA_avx512)
SS_INLINE F32 sum_four_rows(const float* rows) {
  __m512 a = _mm512_loadu_ps(rows), b = _mm512_loadu_ps(rows + 16), c = _mm512_loadu_ps(rows + 32), d = _mm512_loadu_ps(rows + 48);
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return {_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee))};
}
template <> SS_INLINE F32 sum_rows<F32>(const float* rows) {
  F32 p0 = sum_four_rows(rows), p1 = sum_four_rows(rows + 64), p2 = sum_four_rows(rows + 128), p3 = sum_four_rows(rows + 192);
  __m512 q01 = _mm512_add_ps(_mm512_shuffle_f32x4(p0.v, p1.v, 0x44), _mm512_shuffle_f32x4(p0.v, p1.v, 0xee));
  __m512 q23 = _mm512_add_ps(_mm512_shuffle_f32x4(p2.v, p3.v, 0x44), _mm512_shuffle_f32x4(p2.v, p3.v, 0xee));
  return {_mm512_add_ps(_mm512_shuffle_f32x4(q01, q23, 0x88), _mm512_shuffle_f32x4(q01, q23, 0xdd))};
}
#endif

// softplus and its slope from one exponential.
template <class V> SS_INLINE V softplus_with_slope(V x, V* slope) {
  V e = exp(V::zero() - abs(x)), one = V::set(1), twenty = V::set(20);
  V r = one / (one + e);
  *slope = select_lt(twenty, x, one, select_lt(x, V::zero(), e * r, r));
  return select_lt(twenty, x, x, max(V::zero(), x) + log1p_unit(e));
}

// A long sum: chunks' sums added with what each addition lost carried along (Kahan), so that it is as good at a million
// positions as at one chunk's.
template <class R> struct Total {
  R *sum, *lost;
};

// The buffers of one task. A panel's blocks lie side by side in the rows, one after the other as matrices.
template <class R> struct Buffers {
  R *A, *h, *b_fixed, *c_fixed;        // kPanel x [states][kPitch]; A times DecayRange::scale
  R *D, *bias;                         // [kRow]
  R *dt, *dtu, *y;                     // [chunk][kRow]
  R *B, *C;                            // [chunk][states] of the block at work
  R *slope, *dyz, *s, *ddt;            // [chunk][kRow], backward
  R *states, *decays;                  // chunk + 1 and chunk of the block at work's [states][kPitch], history() apart, backward
  R *dh, *dA, *db_fixed, *dc_fixed;    // kPanel x [states][kPitch], backward; the sums over one chunk
  R *dD, *dbias;                       // [kRow], backward; the sums over a few positions
  Total<R> dA_all, db_fixed_all, dc_fixed_all, dD_all, dbias_all;  // the sums over all chunks
  R *db_lanes, *dc_lanes;              // [states rounded up to W][W], backward

  // The same buffers seen from the panel's i-th block.
  Buffers block(int64_t i, int64_t states_) const {
    Buffers b = *this;
    const int64_t matrix = i * states_ * kPitch, row = i * kPitch;
    for (R** q : {&b.A, &b.h, &b.b_fixed, &b.c_fixed, &b.dh, &b.dA, &b.db_fixed, &b.dc_fixed}) *q += *q ? matrix : 0;
    for (R** q : {&b.D, &b.bias, &b.dt, &b.dtu, &b.y, &b.slope, &b.dyz, &b.s, &b.ddt, &b.dD, &b.dbias}) *q += *q ? row : 0;
    for (Total<R>* q : {&b.dA_all, &b.db_fixed_all, &b.dc_fixed_all}) q->sum += q->sum ? matrix : 0, q->lost += q->lost ? matrix : 0;
    for (Total<R>* q : {&b.dD_all, &b.dbias_all}) q->sum += q->sum ? row : 0, q->lost += q->lost ? row : 0;
    return b;
  }
};

// Distance between two positions in the states and decays that the backward keeps, off a page's length as in lay_out.
SS_INLINE constexpr int64_t history(int64_t states) { return states * kPitch + 5 * 16; }

// Lays the buffers out from `base`; returns the bytes taken (base may be null to measure).
template <class R> size_t lay_out(Buffers<R>& w, const ss_scan_args& p, bool backward, char* base) {
  w = Buffers<R>();
  // Matrices are often a whole page long: without the few lines between them the same element of each would fall into the
  // same set of the first-level cache, which the adjoint's streams then fill up.
  size_t at = 0;
  auto take = [&](R*& pointer, int64_t count) {
    pointer = base ? reinterpret_cast<R*>(base + at) : nullptr;
    at += (size_t(count) * sizeof(R) + 63) / 64 * 64 + kSkew * 64;
  };
  int64_t n = p.states, k = p.chunk, rows = n * kPitch, panel = kPanel * rows, tile = k * kRow;
  take(w.A, panel), take(w.h, panel), take(w.b_fixed, panel), take(w.c_fixed, panel);
  take(w.D, kRow), take(w.bias, kRow);
  take(w.dt, tile), take(w.dtu, tile), take(w.y, tile);
  take(w.B, k * n), take(w.C, k * n);
  if (backward) {
    take(w.slope, tile), take(w.dyz, tile), take(w.s, tile), take(w.ddt, tile);
    take(w.states, (k + 1) * history(n)), take(w.decays, k * history(n));
    take(w.dh, panel), take(w.dA, panel), take(w.db_fixed, panel), take(w.dc_fixed, panel);
    take(w.dD, kRow), take(w.dbias, kRow);
    for (Total<R>* q : {&w.dA_all, &w.db_fixed_all, &w.dc_fixed_all}) take(q->sum, panel), take(q->lost, panel);
    for (Total<R>* q : {&w.dD_all, &w.dbias_all}) take(q->sum, kRow), take(q->lost, kRow);
    take(w.db_lanes, (n + 16) * 16), take(w.dc_lanes, (n + 16) * 16);
  }
  return at;
}

// Adds a chunk's sums to the totals and clears them.
template <class R> void settle(R* chunk, const Total<R>& all, int64_t count) {
  using V = typename VectorOf<R>::type;
  for (int64_t i = 0; i < count; i += V::W) {
    V old = V::load(all.sum + i), add = V::load(chunk + i) - V::load(all.lost + i), sum = old + add;
    ((sum - old) - add).store(all.lost + i);
    sum.store(all.sum + i);
    V::zero().store(chunk + i);
  }
}

// (channels, states) of one block -> [states][pitch], zeros beyond the width; null gives zeros.
template <class R> void turn_in(const void* from, const Block& b, int64_t states, R scale, R* to) {
  const R* f = static_cast<const R*>(from);
  for (int64_t n = 0; n < states; ++n)
    for (int64_t c = 0; c < kPitch; ++c) to[n * kPitch + c] = f && c < b.width ? f[(b.begin + c) * states + n] * scale : R(0);
}
template <class R> void turn_out(const R* from, const Block& b, int64_t states, void* to) {
  R* t = static_cast<R*>(to);
  for (int64_t c = 0; c < b.width; ++c)
    for (int64_t n = 0; n < states; ++n) t[(b.begin + c) * states + n] = from[n * kPitch + c];
}

// Rows that are soon read or written: touched while the recurrence computes, one line a position and vector of channels.
// A row is a page of its own in most shapes, so without this each chunk would begin with a burst of misses.
struct Ahead {
  static constexpr int kMost = 8;
  const char* at[kMost];
  int64_t step[kMost];  // bytes
  int64_t rows[kMost];
  int count = 0;
  template <class S> void add(const S* row, int64_t stride, int64_t n) {
    at[count] = reinterpret_cast<const char*>(row), step[count] = stride * int64_t(sizeof(S)), rows[count] = n, ++count;
  }
  SS_INLINE void touch(int64_t t, int64_t offset) const {
    for (int i = 0; i < count; ++i)
      if (t < rows[i]) prefetch(at[i] + t * step[i] + offset);
  }
  static SS_INLINE void prefetch(const char* line) {
#if defined(__GNUC__)
    __builtin_prefetch(line, 0, 2);
#else
    (void)line;
#endif
  }
};

// What a run of the recurrence over one chunk needs of one vector of channels.
template <class R> struct Run {
  int64_t steps, states;
  const R *A, *b_fixed, *c_fixed, *dt, *dtu, *B, *C;
  R *h, *y, *kept_states, *kept_decays;
  const Ahead* ahead;
  int64_t ahead_offset;  // bytes from a row's first channel to this vector's
};

// The recurrence for N states from n0 on. Any: arguments of exp may leave its range. Fixed: B or C belong to channels, not
// positions. Keep: every state and decay is stored for the adjoint. Out: y is wanted.
template <class V, int N, bool Any, bool Fixed, bool Keep, bool Out>
SS_NOINLINE void recur(const Run<typename V::scalar>& r, int64_t n0) {
  using R = typename V::scalar;
  V h[N];
  const R* SS_RESTRICT A = r.A + n0 * kPitch;
  SS_UNROLL
  for (int n = 0; n < N; ++n) h[n] = V::load(r.h + (n0 + n) * kPitch);
  for (int64_t t = 0; t < r.steps; ++t) {
    const R* SS_RESTRICT B = r.B + t * r.states + n0;
    const R* SS_RESTRICT C = r.C + t * r.states + n0;
    V dt = V::load(r.dt + t * kRow), dtu = V::load(r.dtu + t * kRow);
    V y = Out ? V::load(r.y + t * kRow) : V::zero();
    if (n0 == 0) r.ahead->touch(t, r.ahead_offset);
    R* SS_RESTRICT hs = Keep ? r.kept_states + (t + 1) * history(r.states) + n0 * kPitch : nullptr;
    R* SS_RESTRICT as = Keep ? r.kept_decays + t * history(r.states) + n0 * kPitch : nullptr;
    SS_UNROLL
    for (int n = 0; n < N; ++n) {
      V x = dt * V::load(A + n * kPitch);
      V a = Any ? exp_decay_any(x) : exp_decay(x);
      V b = Fixed && r.b_fixed ? V::load(r.b_fixed + (n0 + n) * kPitch) : V::set(B[n]);
      h[n] = fma(a, h[n], dtu * b);
      if (Out) {
        V c = Fixed && r.c_fixed ? V::load(r.c_fixed + (n0 + n) * kPitch) : V::set(C[n]);
        y = fma(c, h[n], y);
      }
      if (Keep) {
        h[n].store(hs + n * kPitch);
        a.store(as + n * kPitch);
      }
    }
    if (Out) y.store(r.y + t * kRow);
  }
  SS_UNROLL
  for (int n = 0; n < N; ++n) h[n].store(r.h + (n0 + n) * kPitch);
}

template <class V, bool Any, bool Fixed, bool Keep, bool Out> void recur_all(const Run<typename V::scalar>& r) {
  int64_t n = 0;
  for (; n + kStates <= r.states; n += kStates) recur<V, kStates, Any, Fixed, Keep, Out>(r, n);
  if (kStates > 8 && n + 8 <= r.states) recur<V, 8, Any, Fixed, Keep, Out>(r, n), n += 8;
  if (n + 4 <= r.states) recur<V, 4, Any, Fixed, Keep, Out>(r, n), n += 4;
  if (n + 2 <= r.states) recur<V, 2, Any, Fixed, Keep, Out>(r, n), n += 2;
  if (n < r.states) recur<V, 1, Any, Fixed, Keep, Out>(r, n);
}

// Runs the block's vectors through a chunk of `steps` positions.
template <class S, class R, bool Keep, bool Out>
void recur_block(const Buffers<R>& w, int64_t steps, int64_t states, int64_t width, bool b_fixed, bool c_fixed, const Ahead& ahead) {
  using V = typename VectorOf<R>::type;
  for (int64_t v = 0; v < width; v += V::W) {
    // One look decides for the whole chunk whether the fast exponential may be used. max may drop a nan: 0 * nan keeps it.
    V top = V::zero(), steepest = V::zero(), doubt = V::zero();
    for (int64_t t = 0; t < steps; ++t) {
      V dt = abs(V::load(w.dt + t * kRow + v));
      top = max(top, dt), doubt = fma(dt, V::zero(), doubt);
    }
    for (int64_t n = 0; n < states; ++n) {
      V a = abs(V::load(w.A + n * kPitch + v));
      steepest = max(steepest, a), doubt = fma(a, V::zero(), doubt);
    }
    bool fits = all_lt(fma(top, steepest, doubt), V::set(-DecayRange<V>::low));
    Run<R> r{steps, states, w.A + v, b_fixed ? w.b_fixed + v : nullptr, c_fixed ? w.c_fixed + v : nullptr, w.dt + v, w.dtu + v,
             w.B, w.C, w.h + v, w.y + v, Keep ? w.states + v : nullptr, Keep ? w.decays + v : nullptr,
             &ahead, v * int64_t(sizeof(S))};
    bool fixed = b_fixed || c_fixed;
    if (fits)
      fixed ? recur_all<V, false, true, Keep, Out>(r) : recur_all<V, false, false, Keep, Out>(r);
    else
      fixed ? recur_all<V, true, true, Keep, Out>(r) : recur_all<V, true, false, Keep, Out>(r);
  }
}

// One group's rows of B or C of a chunk, converted.
template <class R, class S> void read_rows(const S* from, int64_t step, int64_t steps, int64_t states, R* to) {
  using V = typename VectorOf<R>::type;
  for (int64_t t = 0; t < steps; ++t, from += step, to += states)
    for (int64_t n = 0; n < states; n += V::W) {
      int64_t left = states - n;
      left >= V::W ? V::load(from + n).store(to + n) : V::load(from + n, left).store(to + n, left);
    }
}

// A vector of a row, or what the row still holds of it.
template <class V, class S> SS_INLINE V read(const S* p, int64_t left) { return left >= V::W ? V::load(p) : V::load(p, left); }
template <class V, class S> SS_INLINE void write(V v, S* p, int64_t left) { left >= V::W ? v.store(p) : v.store(p, left); }


// The adjoint of one position for G vectors of channels side by side, over all states:
//   dh += C g;  dC += h g;  dB += dh dtu;  s += dh B;  dh *= a;  q = dh h_{t-1};  ddt += q A;  dA += q dt
template <class V, int G, bool Fixed>
SS_INLINE void step_back(const Buffers<typename V::scalar>& w, int64_t t, int64_t v, int64_t states, bool b_fixed, bool c_fixed, bool first) {
  using R = typename V::scalar;
  const int64_t o = t * kRow + v;
  V g[G], dtu[G], dt[G], s[G], ddt[G];
  SS_UNROLL
  for (int i = 0; i < G; ++i) {
    g[i] = V::load(w.dyz + o + i * V::W), dtu[i] = V::load(w.dtu + o + i * V::W), dt[i] = V::load(w.dt + o + i * V::W);
    s[i] = ddt[i] = V::zero();
  }
  const R* SS_RESTRICT B = w.B + t * states;
  const R* SS_RESTRICT C = w.C + t * states;
  const R* SS_RESTRICT before = w.states + t * history(states) + v;
  const R* SS_RESTRICT after = before + history(states);
  const R* SS_RESTRICT decays = w.decays + t * history(states) + v;
  R* SS_RESTRICT dh_row = w.dh + v;
  R* SS_RESTRICT dA_row = w.dA + v;
  const R* SS_RESTRICT A_row = w.A + v;
  for (int64_t n = 0; n < states; ++n) {
    V db = V::zero(), dc = V::zero();
    V b = V::set(Fixed && b_fixed ? R(0) : B[n]), c = V::set(Fixed && c_fixed ? R(0) : C[n]);
    SS_UNROLL
    for (int i = 0; i < G; ++i) {
      const int64_t at = n * kPitch + i * V::W;
      if (Fixed && b_fixed) b = V::load(w.b_fixed + v + at);
      if (Fixed && c_fixed) c = V::load(w.c_fixed + v + at);
      V dh = fma(c, g[i], V::load(dh_row + at));
      if (Fixed && c_fixed)
        fma(V::load(after + at), g[i], V::load(w.dc_fixed + v + at)).store(w.dc_fixed + v + at);
      else
        dc = fma(V::load(after + at), g[i], dc);
      if (Fixed && b_fixed)
        fma(dh, dtu[i], V::load(w.db_fixed + v + at)).store(w.db_fixed + v + at);
      else
        db = fma(dh, dtu[i], db);
      s[i] = fma(dh, b, s[i]);
      dh = dh * V::load(decays + at);
      dh.store(dh_row + at);
      V q = dh * V::load(before + at);
      ddt[i] = fma(q, V::load(A_row + at), ddt[i]);
      fma(q, dt[i], V::load(dA_row + at)).store(dA_row + at);
    }
    R* db_lane = w.db_lanes + n * V::W;
    R* dc_lane = w.dc_lanes + n * V::W;
    if (!first) db = db + V::load(db_lane), dc = dc + V::load(dc_lane);
    db.store(db_lane), dc.store(dc_lane);
  }
  SS_UNROLL
  for (int i = 0; i < G; ++i) s[i].store(w.s + o + i * V::W), ddt[i].store(w.ddt + o + i * V::W);
}

// The adjoint over a chunk. part_B and part_C get the sums over the block's channels, one row a position.
template <class R, bool Fixed> SS_NOINLINE void adjoint(const Buffers<R>& w, int64_t steps, int64_t states, int64_t width, bool b_fixed, bool c_fixed, R* part_B, R* part_C) {
  using V = typename VectorOf<R>::type;
  for (int64_t t = steps - 1; t >= 0; --t) {
    int64_t v = 0;
    for (; v + (kTogether - 1) * V::W < width; v += kTogether * V::W) step_back<V, kTogether, Fixed>(w, t, v, states, b_fixed, c_fixed, v == 0);
    for (; v < width; v += V::W) step_back<V, 1, Fixed>(w, t, v, states, b_fixed, c_fixed, v == 0);
    for (int64_t n = 0; n < states; n += V::W) {
      int64_t left = states - n;
      if (!b_fixed) write(sum_rows<V>(w.db_lanes + n * V::W), part_B + t * states + n, left);
      if (!c_fixed) write(sum_rows<V>(w.dc_lanes + n * V::W), part_C + t * states + n, left);
    }
  }
}

// Where the backward's tasks leave their parts of the sums.
template <class R> struct Parts {
  R *B, *C;                        // [blocks][batch * length][states]
  R *A, *b_fixed, *c_fixed;        // [slots][states][channels]
  R *D, *bias;                     // [slots][channels]
};

template <class S, class R> struct Scan {
  using V = typename VectorOf<R>::type;
  const ss_scan_args& p;

  static const S* at(const void* base, int64_t offset) { return static_cast<const S*>(base) + offset; }
  static S* at(void* base, int64_t offset) { return static_cast<S*>(base) + offset; }

  // Calls body(vector's first channel, its place in a row of buffers, channels left in its block) for the panel's vectors.
  template <class Body> static SS_INLINE void each_vector(const Block* panel, int64_t blocks, Body&& body) {
    for (int64_t i = 0; i < blocks; ++i)
      for (int64_t v = 0; v < panel[i].width; v += V::W) body(panel[i].begin + v, i * kPitch + v, panel[i].width - v);
  }

  void load_panel(Buffers<R>& w, const Block* panel, int64_t blocks) const {
    std::memset(static_cast<void*>(w.D), 0, kRow * sizeof(R));
    std::memset(static_cast<void*>(w.bias), 0, kRow * sizeof(R));
    for (int64_t i = 0; i < blocks; ++i) {
      const Block& b = panel[i];
      const int64_t matrix = i * p.states * kPitch;
      turn_in<R>(p.A, b, p.states, DecayRange<V>::scale, w.A + matrix);
      if (p.b_fixed) turn_in<R>(p.B, b, p.states, 1, w.b_fixed + matrix);
      if (p.c_fixed) turn_in<R>(p.C, b, p.states, 1, w.c_fixed + matrix);
      const size_t bytes = size_t(b.width) * sizeof(R);
      if (p.D) std::memcpy(w.D + i * kPitch, static_cast<const R*>(p.D) + b.begin, bytes);
      if (p.dt_bias) std::memcpy(w.bias + i * kPitch, static_cast<const R*>(p.dt_bias) + b.begin, bytes);
    }
  }

  // B and C of a chunk, unless the block before had the same.
  void read_projections(Buffers<R>& w, const Block& b, const Block* before, const Sequence& q, int64_t t0, int64_t steps) const {
    const int64_t row = q.begin + t0;
    if (!p.b_fixed && !(before && before->b_group == b.b_group))
      read_rows<R>(at(p.B, q.row * p.b_batch + row * p.b_step + b.b_group * p.b_group), p.b_step, steps, p.states, w.B);
    if (!p.c_fixed && !(before && before->c_group == b.c_group))
      read_rows<R>(at(p.C, q.row * p.c_batch + row * p.c_step + b.c_group * p.c_group), p.c_step, steps, p.states, w.C);
  }

  // dt, dt u and what y starts from (D u), for a chunk. Slope: also the slope of softplus.
  template <bool Slope> void prepare(Buffers<R>& w, const Block* panel, int64_t blocks, const Sequence& q, int64_t t0, int64_t steps) const {
    const S* u = at(p.u, q.row * p.u_batch + (q.begin + t0) * p.u_step);
    const S* dt = at(p.dt, q.row * p.dt_batch + (q.begin + t0) * p.dt_step);
    for (int64_t t = 0; t < steps; ++t, u += p.u_step, dt += p.dt_step)
      each_vector(panel, blocks, [&](int64_t c, int64_t place, int64_t left) {
        const int64_t o = t * kRow + place;
        V x = read<V>(u + c, left), d = read<V>(dt + c, left) + V::load(w.bias + place), slope = V::set(1);
        if (p.softplus) d = Slope ? softplus_with_slope(d, &slope) : softplus(d);
        d.store(w.dt + o);
        (d * x).store(w.dtu + o);
        (V::load(w.D + place) * x).store(w.y + o);
        if (Slope) slope.store(w.slope + o);
      });
  }

  // The inputs' rows of the chunk at t0.
  void look_ahead(Ahead& ahead, const Block& b, const Sequence& q, int64_t t0, int64_t steps) const {
    const int64_t row = q.begin + t0;
    ahead.add(at(p.u, q.row * p.u_batch + row * p.u_step + b.begin), p.u_step, steps);
    ahead.add(at(p.dt, q.row * p.dt_batch + row * p.dt_step + b.begin), p.dt_step, steps);
    if (p.z) ahead.add(at(p.z, q.row * p.z_batch + row * p.z_step + b.begin), p.z_step, steps);
    if (p.dy) ahead.add(at(p.dy, q.row * p.dy_batch + row * p.dy_step + b.begin), p.dy_step, steps);
  }

  void forward(Buffers<R>& w, const Block* panel, int64_t blocks, int64_t s) const {
    const Sequence q = sequence(p, s);
    const int64_t state_at = s * p.channels * p.states, matrix = p.states * kPitch;
    const R* initial = p.initial ? static_cast<const R*>(p.initial) + state_at : nullptr;
    for (int64_t i = 0; i < blocks; ++i) turn_in<R>(initial, panel[i], p.states, 1, w.h + i * matrix);
    for (int64_t t0 = 0; t0 < q.length; t0 += p.chunk) {
      const int64_t left = q.length - t0, steps = left < p.chunk ? left : p.chunk;
      const int64_t next = left - steps < p.chunk ? left - steps : p.chunk, out = (q.row * p.length + q.begin + t0) * p.channels;
      prepare<false>(w, panel, blocks, q, t0, steps);
      for (int64_t i = 0; i < blocks; ++i) {
        const Block& b = panel[i];
        const Buffers<R> own = w.block(i, p.states);
        if (p.checkpoints) {
          R* kept = static_cast<R*>(p.checkpoints) + (q.checkpoint + t0 / p.chunk) * p.states * p.channels + b.begin;
          for (int64_t n = 0; n < p.states; ++n) std::memcpy(kept + n * p.channels, own.h + n * kPitch, size_t(b.width) * sizeof(R));
        }
        read_projections(w, b, i ? &b - 1 : nullptr, q, t0, steps);
        Ahead ahead;
        look_ahead(ahead, b, q, t0 + steps, next);
        ahead.add(at(p.y, out + b.begin), p.channels, steps);
        recur_block<S, R, false, true>(own, steps, p.states, b.width, p.b_fixed, p.c_fixed, ahead);
      }
      S* y = at(p.y, out);
      const S* z = p.z ? at(p.z, q.row * p.z_batch + (q.begin + t0) * p.z_step) : nullptr;
      for (int64_t t = 0; t < steps; ++t, y += p.channels)
        each_vector(panel, blocks, [&](int64_t c, int64_t place, int64_t left_) {
          V result = V::load(w.y + t * kRow + place);
          if (z) result = result * silu(read<V>(z + t * p.z_step + c, left_));
          write(result, y + c, left_);
        });
    }
    if (p.final_state)
      for (int64_t i = 0; i < blocks; ++i) turn_out<R>(w.h + i * matrix, panel[i], p.states, static_cast<R*>(p.final_state) + state_at);
  }

  // The gradient that reaches C . h.
  void prepare_gradient(Buffers<R>& w, const Block* panel, int64_t blocks, const Sequence& q, int64_t t0, int64_t steps) const {
    const S* dy = at(p.dy, q.row * p.dy_batch + (q.begin + t0) * p.dy_step);
    const S* z = p.z ? at(p.z, q.row * p.z_batch + (q.begin + t0) * p.z_step) : nullptr;
    for (int64_t t = 0; t < steps; ++t)
      each_vector(panel, blocks, [&](int64_t c, int64_t place, int64_t left) {
        V g = read<V>(dy + t * p.dy_step + c, left);
        if (z) g = g * silu(read<V>(z + t * p.z_step + c, left));
        g.store(w.dyz + t * kRow + place);
      });
  }

  // From the sums over states to du, ddt and dz; sums of dD and ddt_bias.
  void finish(Buffers<R>& w, const Block* panel, int64_t blocks, const Sequence& q, int64_t t0, int64_t steps) const {
    const int64_t row = q.begin + t0, out = (q.row * p.length + row) * p.channels;
    const S* u = at(p.u, q.row * p.u_batch + row * p.u_step);
    const S* dy = at(p.dy, q.row * p.dy_batch + row * p.dy_step);
    const S* z = p.z ? at(p.z, q.row * p.z_batch + row * p.z_step) : nullptr;
    for (int64_t t = steps - 1; t >= 0; --t) {
      each_vector(panel, blocks, [&](int64_t c, int64_t place, int64_t left) {
        const int64_t o = t * kRow + place, to = out + t * p.channels + c;
        V x = read<V>(u + t * p.u_step + c, left), g = V::load(w.dyz + o), s = V::load(w.s + o);
        V du = fma(g, V::load(w.D + place), s * V::load(w.dt + o));
        V ddt = fma(s, x, V::load(w.ddt + o) * V::set(R(1 / double(DecayRange<V>::scale)))) * V::load(w.slope + o);
        write(du, at(p.du, to), left);
        write(ddt, at(p.ddt, to), left);
        fma(g, x, V::load(w.dD + place)).store(w.dD + place);
        (ddt + V::load(w.dbias + place)).store(w.dbias + place);
        if (z) {
          V gate = read<V>(z + t * p.z_step + c, left), open = sigmoid(gate);
          V slope = open * fma(gate, V::set(1) - open, V::set(1));
          write(read<V>(dy + t * p.dy_step + c, left) * V::load(w.y + o) * slope, at(p.dz, to), left);
        }
      });
      if (t % 4 == 0) settle(w.dD, w.dD_all, kRow), settle(w.dbias, w.dbias_all, kRow);
    }
  }

  void backward(Buffers<R>& w, const Block* panel, int64_t first, int64_t blocks, int64_t s, const Parts<R>& parts) const {
    const Sequence q = sequence(p, s);
    const int64_t state_at = s * p.channels * p.states, matrix = p.states * kPitch;
    const R* dfinal = p.dfinal ? static_cast<const R*>(p.dfinal) + state_at : nullptr;
    for (int64_t i = 0; i < blocks; ++i) turn_in<R>(dfinal, panel[i], p.states, 1, w.dh + i * matrix);
    for (int64_t chunk = divide_up(q.length, p.chunk) - 1; chunk >= 0; --chunk) {
      const int64_t t0 = chunk * p.chunk, steps = q.length - t0 < p.chunk ? q.length - t0 : p.chunk;
      const int64_t out = (q.row * p.length + q.begin + t0) * p.channels;
      prepare<true>(w, panel, blocks, q, t0, steps);
      prepare_gradient(w, panel, blocks, q, t0, steps);
      for (int64_t i = 0; i < blocks; ++i) {
        const Block& b = panel[i];
        const Buffers<R> own = w.block(i, p.states);
        const R* kept = static_cast<const R*>(p.checkpoints) + (q.checkpoint + chunk) * p.states * p.channels + b.begin;
        for (int64_t n = 0; n < p.states; ++n) {
          std::memcpy(own.h + n * kPitch, kept + n * p.channels, size_t(b.width) * sizeof(R));
          std::memset(static_cast<void*>(own.h + n * kPitch + b.width), 0, size_t(kPitch - b.width) * sizeof(R));
        }
        std::memcpy(w.states, own.h, size_t(matrix) * sizeof(R));
        read_projections(w, b, i ? &b - 1 : nullptr, q, t0, steps);
        Ahead ahead;
        if (chunk > 0) look_ahead(ahead, b, q, t0 - p.chunk, p.chunk);
        ahead.add(at(p.du, out + b.begin), p.channels, steps);
        ahead.add(at(p.ddt, out + b.begin), p.channels, steps);
        if (p.z) ahead.add(at(p.dz, out + b.begin), p.channels, steps);
        if (p.z)
          recur_block<S, R, true, true>(own, steps, p.states, b.width, p.b_fixed, p.c_fixed, ahead);
        else
          recur_block<S, R, true, false>(own, steps, p.states, b.width, p.b_fixed, p.c_fixed, ahead);
        const int64_t part = (((first + i) * p.batch + q.row) * p.length + q.begin + t0) * p.states;
        R* part_B = p.b_fixed ? nullptr : parts.B + part;
        R* part_C = p.c_fixed ? nullptr : parts.C + part;
        if (p.b_fixed || p.c_fixed)
          adjoint<R, true>(own, steps, p.states, b.width, p.b_fixed, p.c_fixed, part_B, part_C);
        else
          adjoint<R, false>(own, steps, p.states, b.width, false, false, part_B, part_C);
        settle(own.dA, own.dA_all, matrix);
        if (p.b_fixed) settle(own.db_fixed, own.db_fixed_all, matrix);
        if (p.c_fixed) settle(own.dc_fixed, own.dc_fixed_all, matrix);
      }
      finish(w, panel, blocks, q, t0, steps);
    }
    if (p.dinitial)
      for (int64_t i = 0; i < blocks; ++i) turn_out<R>(w.dh + i * matrix, panel[i], p.states, static_cast<R*>(p.dinitial) + state_at);
  }

  // Adds the blocks' rows of dB or dC, in order, group by group.
  void gather(const R* part, const Block* blocks, int64_t count, bool of_B, int64_t groups, void* to) const {
    const int64_t rows = p.batch * p.length;
    parallel(rows, 256, [&](int64_t begin, int64_t end) {
      for (int64_t g = 0, k = 0; g < groups; ++g) {
        int64_t from = k;
        while (k < count && (of_B ? blocks[k].b_group : blocks[k].c_group) == g) ++k;
        for (int64_t row = begin; row < end; ++row)
          for (int64_t n = 0; n < p.states; n += V::W) {
            int64_t left = p.states - n;
            V sum = V::zero();
            for (int64_t i = from; i < k; ++i) sum = sum + read<V>(part + (i * rows + row) * p.states + n, left);
            write(sum, at(to, (row * groups + g) * p.states + n), left);
          }
      }
    });
  }
};

// Adds the slots' [states][channels], in order, into (channels, states).
template <class R> void add_slots(const R* part, int64_t slots, int64_t states, int64_t channels, void* to) {
  parallel(channels, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for (int64_t n = 0; n < states; ++n) {
        R total = 0;
        for (int64_t i = 0; i < slots; ++i) total += part[(i * states + n) * channels + c];
        static_cast<R*>(to)[c * states + n] = total;
      }
  });
}

// Blocks of a task: the more, the fewer pages a position touches, but every thread must get its share.
int64_t panel_width(const ss_scan_args& p, int64_t blocks, int64_t others) {
  for (int64_t k = kPanel; k > 1; --k) {
    const int64_t tasks = divide_up(blocks, k) * others;
    if (tasks >= 4 * p.threads || tasks % p.threads == 0) return k;
  }
  return 1;
}

template <class S, class R> int32_t run_forward(const ss_scan_args& p, const Block* blocks, int64_t count) {
  Scan<S, R> scan{p};
  const int64_t width = panel_width(p, count, p.sequences), panels = divide_up(count, width);
  parallel(panels * p.sequences, divide_up(grain(p), width), [&](int64_t begin, int64_t end) {
    Buffers<R> w;
    char* memory = t_workspace.get(lay_out<R>(w, p, false, nullptr));
    lay_out<R>(w, p, false, memory);
    // Panels outermost: each thread gets its share of every sequence, however unequal they are.
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / p.sequences * width, wide = count - first < width ? count - first : width;
      if (i == begin || i % p.sequences == 0) scan.load_panel(w, blocks + first, wide);
      scan.forward(w, blocks + first, wide, i % p.sequences);
    }
  });
  return 0;
}

template <class S, class R> int32_t run_backward(const ss_scan_args& p, const Block* blocks, int64_t count) {
  using V = typename VectorOf<R>::type;
  Scan<S, R> scan{p};
  const int64_t slots = p.sequences < kSlots ? (p.sequences > 0 ? p.sequences : 1) : kSlots, matrix = p.channels * p.states;
  const int64_t positions = count * p.batch * p.length * p.states;
  R* memory = static_cast<R*>(std::malloc(
      size_t((p.b_fixed ? 0 : positions) + (p.c_fixed ? 0 : positions) + slots * (3 * matrix + 2 * p.channels)) * sizeof(R)));
  if (!memory) return -3;
  Parts<R> parts;
  parts.A = memory, parts.b_fixed = parts.A + slots * matrix, parts.c_fixed = parts.b_fixed + slots * matrix;
  parts.D = parts.c_fixed + slots * matrix, parts.bias = parts.D + slots * p.channels;
  parts.B = parts.bias + slots * p.channels, parts.C = parts.B + (p.b_fixed ? 0 : positions);
  const int64_t width = panel_width(p, count, slots), panels = divide_up(count, width);
  parallel(panels * slots, divide_up(grain(p), width), [&](int64_t begin, int64_t end) {
    Buffers<R> w;
    char* own = t_workspace.get(lay_out<R>(w, p, true, nullptr));
    lay_out<R>(w, p, true, own);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / slots * width, slot = i % slots, wide = count - first < width ? count - first : width;
      const Block* panel = blocks + first;
      if (i == begin || slot == 0) scan.load_panel(w, panel, wide);
      const size_t matrices = size_t(kPanel * p.states * kPitch) * sizeof(R), lanes = size_t((p.states + 16) * 16) * sizeof(R);
      for (R* sums : {w.dA, w.db_fixed, w.dc_fixed, w.dA_all.sum, w.dA_all.lost, w.db_fixed_all.sum, w.db_fixed_all.lost,
                      w.dc_fixed_all.sum, w.dc_fixed_all.lost})
        std::memset(static_cast<void*>(sums), 0, matrices);
      for (R* sums : {w.dD, w.dbias, w.dD_all.sum, w.dD_all.lost, w.dbias_all.sum, w.dbias_all.lost})
        std::memset(static_cast<void*>(sums), 0, kRow * sizeof(R));
      for (R* sums : {w.db_lanes, w.dc_lanes}) std::memset(static_cast<void*>(sums), 0, lanes);
      for (int64_t s = slot * p.sequences / slots; s < (slot + 1) * p.sequences / slots; ++s) scan.backward(w, panel, first, wide, s, parts);
      for (int64_t k = 0; k < wide; ++k) {
        const Buffers<R> block = w.block(k, p.states);
        const size_t bytes = size_t(panel[k].width) * sizeof(R);
        for (int64_t n = 0; n < p.states; ++n) {
          const int64_t to = (slot * p.states + n) * p.channels + panel[k].begin;
          std::memcpy(parts.A + to, block.dA_all.sum + n * kPitch, bytes);
          if (p.b_fixed) std::memcpy(parts.b_fixed + to, block.db_fixed_all.sum + n * kPitch, bytes);
          if (p.c_fixed) std::memcpy(parts.c_fixed + to, block.dc_fixed_all.sum + n * kPitch, bytes);
        }
        std::memcpy(parts.D + slot * p.channels + panel[k].begin, block.dD_all.sum, bytes);
        std::memcpy(parts.bias + slot * p.channels + panel[k].begin, block.dbias_all.sum, bytes);
      }
    }
  });
  if (p.b_fixed) add_slots(parts.b_fixed, slots, p.states, p.channels, p.dB);
  else scan.gather(parts.B, blocks, count, true, p.b_groups, p.dB);
  if (p.c_fixed) add_slots(parts.c_fixed, slots, p.states, p.channels, p.dC);
  else scan.gather(parts.C, blocks, count, false, p.c_groups, p.dC);
  add_slots(parts.A, slots, p.states, p.channels, p.dA);
  if (p.dD) add_slots(parts.D, slots, 1, p.channels, p.dD);
  if (p.ddt_bias) add_slots(parts.bias, slots, 1, p.channels, p.ddt_bias);
  std::free(memory);
  return 0;
}

// -2: cu_seqlens does not run from 0 to the length without falling.
int32_t check(const ss_scan_args& p) {
  if (!p.cu_seqlens) return 0;
  for (int64_t s = 0; s < p.sequences; ++s)
    if (p.cu_seqlens[s + 1] < p.cu_seqlens[s]) return -2;
  return p.cu_seqlens[0] == 0 && p.cu_seqlens[p.sequences] == p.length ? 0 : -2;
}

template <bool Backward> int32_t run(const ss_scan_args& p) {
  if (int32_t code = check(p)) return code;
  const int64_t count = cut(p, nullptr);
  Block* blocks = static_cast<Block*>(std::malloc(size_t(count) * sizeof(Block)));
  if (!blocks) return -3;
  cut(p, blocks);
  int32_t code = -1;
  switch (p.dtype) {
    case SS_F32: code = Backward ? run_backward<float, float>(p, blocks, count) : run_forward<float, float>(p, blocks, count); break;
    case SS_BF16: code = Backward ? run_backward<bf16, float>(p, blocks, count) : run_forward<bf16, float>(p, blocks, count); break;
    case SS_F16: code = Backward ? run_backward<f16, float>(p, blocks, count) : run_forward<f16, float>(p, blocks, count); break;
    case SS_F64: code = Backward ? run_backward<double, double>(p, blocks, count) : run_forward<double, double>(p, blocks, count); break;
  }
  std::free(blocks);
  return code;
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_selective_scan)(const ss_scan_args* args) { return run<false>(*args); }
extern "C" int32_t SS_KERNEL(ss_selective_scan_backward)(const ss_scan_args* args) { return run<true>(*args); }
