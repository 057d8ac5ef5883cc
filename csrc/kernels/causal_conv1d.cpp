// Causal depthwise convolution over time, channels last.
//
// One item of work is a tile of time of one sequence x a block of channels. Rows before a sequence's start are rows of its
// initial state (or a row of zeros), reached through a table of row pointers: the inner loops see no boundary. A vector of
// channels takes four positions at once, so each input row is read from cache once per four outputs and each tap once.
#include "causal_conv1d.h"

#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "statescan.h"

namespace {
using namespace ss;

template <class T> struct ComputeOf { using type = float; };
template <> struct ComputeOf<double> { using type = double; };

constexpr int64_t kBlock = 512;         // channels of an item of the forward
constexpr int64_t kTile = 128;          // positions of an item of the forward
constexpr int64_t kBackwardBlock = 256;
constexpr int64_t kBackwardTile = 256;  // also the span of one partial sum of the weights' gradient
constexpr int kRows = 4;

struct Tile {
  int64_t sequence, begin, end;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t sequence_length(const ss_conv_args& a, int64_t s) {
  return a.cu_seqlens ? a.cu_seqlens[s + 1] - a.cu_seqlens[s] : a.length;
}

// Offsets are checked here too: while a graph is compiled nobody could look at their values.
bool offsets_fit(const ss_conv_args& a) {
  if (!a.cu_seqlens) return a.sequences == a.batch;
  if (a.batch != 1 || a.cu_seqlens[0] != 0 || a.cu_seqlens[a.sequences] != a.length) return false;
  for (int64_t s = 0; s < a.sequences; ++s)
    if (a.cu_seqlens[s + 1] < a.cu_seqlens[s]) return false;
  return true;
}

// Tiles by shape alone, in the order of sequences and time; an empty sequence gets one empty tile if `empty_too`.
int64_t count_tiles(const ss_conv_args& a, int64_t tile, bool empty_too) {
  int64_t n = 0;
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t length = sequence_length(a, s);
    n += (length + tile - 1) / tile + (empty_too && length == 0);
  }
  return n;
}
void fill_tiles(const ss_conv_args& a, int64_t tile, bool empty_too, Tile* out) {
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t length = sequence_length(a, s);
    if (empty_too && length == 0) *out++ = {s, 0, 0};
    for (int64_t t = 0; t < length; t += tile) *out++ = {s, t, smaller(t + tile, length)};
  }
}

// Taps one row each, then the bias: (width + 1, features).
template <class C>
void pack_weights(const ss_conv_args& a, C* out) {
  const C* weight = static_cast<const C*>(a.weight);
  const C* bias = static_cast<const C*>(a.bias);
  for (int64_t k = 0; k < a.width; ++k)
    for (int64_t c = 0; c < a.features; ++c) out[k * a.features + c] = weight[c * a.weight_channel + k * a.weight_tap];
  for (int64_t c = 0; c < a.features; ++c) out[a.width * a.features + c] = bias ? bias[c] : C(0);
}

template <class T>
struct Inputs {
  const ss_conv_args& a;
  const T* zeros;  // a row of zeros
  const T* row(int64_t s, int64_t t) const {
    if (t >= 0) {
      const int64_t base = a.cu_seqlens ? a.cu_seqlens[s] * a.x_row : s * a.x_batch;
      return static_cast<const T*>(a.x) + base + t * a.x_row;
    }
    if (!a.initial_state) return zeros;
    return static_cast<const T*>(a.initial_state) + s * a.initial_batch + (a.width - 1 + t) * a.initial_row;
  }
};

// Runs body(c, n) over the channels [0, n): whole vectors, then what is left.
#define SS_FOR_CHANNELS(C, count, call_whole, call_rest)                 \
  do {                                                                   \
    int64_t c = 0;                                                       \
    for (; c + Vec<C>::W <= (count); c += Vec<C>::W) {                   \
      const int n = Vec<C>::W;                                           \
      (void)n;                                                           \
      call_whole;                                                        \
    }                                                                    \
    if (c < (count)) {                                                   \
      const int n = int((count) - c);                                    \
      call_rest;                                                         \
    }                                                                    \
  } while (0)

// y for R positions and one vector of channels. x[j] is the input row of position t - (W-1) + j; W = 0: any width.
template <class T, class C, int W, int R, bool Silu, bool Whole>
inline void forward_vector(const T* const* x, T* y, int64_t y_row, const C* w, int64_t w_row, int64_t width, int64_t c, int n) {
  const int64_t taps = W ? W : width;
  Vec<C> sum[R];
  const Vec<C> bias = load<C, Whole>(w + taps * w_row + c, n);
  for (int i = 0; i < R; ++i) sum[i] = bias;
  if constexpr (W > 0) {
    Vec<C> in[W + R - 1];
    for (int j = 0; j < W + R - 1; ++j) in[j] = load<C, Whole>(x[j] + c, n);
    for (int k = 0; k < W; ++k) {
      const Vec<C> tap = load<C, Whole>(w + k * w_row + c, n);
      for (int i = 0; i < R; ++i) sum[i] = fma(tap, in[i + k], sum[i]);
    }
  } else {
    for (int64_t k = 0; k < taps; ++k) {
      const Vec<C> tap = load<C, Whole>(w + k * w_row + c, n);
      for (int i = 0; i < R; ++i) sum[i] = fma(tap, load<C, Whole>(x[i + k] + c, n), sum[i]);
    }
  }
  for (int i = 0; i < R; ++i) {
    if (Silu) sum[i] = silu(sum[i]);
    store<Whole>(y + i * y_row + c, sum[i], n);
  }
}

template <class T, class C, int W, int R, bool Silu>
inline void forward_rows(const T* const* x, T* y, int64_t y_row, const C* w, int64_t w_row, int64_t width, int64_t channels) {
  SS_FOR_CHANNELS(C, channels, (forward_vector<T, C, W, R, Silu, true>(x, y, y_row, w, w_row, width, c, n)),
                  (forward_vector<T, C, W, R, Silu, false>(x, y, y_row, w, w_row, width, c, n)));
}

template <class T, class C, int W, bool Silu>
int32_t forward_run(const ss_conv_args& a) {
  const int64_t d = a.features, past = a.width - 1, blocks = (d + kBlock - 1) / kBlock;
  const int64_t tiles = count_tiles(a, kTile, false);
  Scratch<C> weights((a.width + 1) * d);
  Scratch<T> zeros(d, true);
  Scratch<Tile> tile(tiles);
  if (!weights.ok() || !zeros.ok() || !tile.ok()) return -3;
  pack_weights(a, weights.data);
  fill_tiles(a, kTile, false, tile.data);
  const Inputs<T> inputs{a, zeros.data};
  bool memory = true;  // only ever set to false
  ss::parallel(tiles * blocks, 1, [&](int64_t first, int64_t last) {
    Scratch<const T*> x(kTile + past);
    if (!x.ok()) { memory = false; return; }
    for (int64_t item = first; item < last; ++item) {
      const Tile at = tile[item / blocks];
      const int64_t c0 = item % blocks * kBlock, channels = smaller(kBlock, d - c0);
      for (int64_t j = 0; j < at.end - at.begin + past; ++j) x[j] = inputs.row(at.sequence, at.begin - past + j) + c0;
      const int64_t base = a.cu_seqlens ? a.cu_seqlens[at.sequence] : at.sequence * a.length;
      T* y = static_cast<T*>(a.y) + (base + at.begin) * d + c0;
      const C* w = weights.data + c0;
      int64_t t = 0;
      for (; t + kRows <= at.end - at.begin; t += kRows)
        forward_rows<T, C, W, kRows, Silu>(x.data + t, y + t * d, d, w, d, a.width, channels);
      for (; t < at.end - at.begin; ++t)
        forward_rows<T, C, W, 1, Silu>(x.data + t, y + t * d, d, w, d, a.width, channels);
    }
  });
  if (!memory) return -3;
  if (a.final_state)
    for (int64_t s = 0; s < a.sequences; ++s)
      for (int64_t j = 0; j < past; ++j)
        memcpy(static_cast<T*>(a.final_state) + (s * past + j) * d, inputs.row(s, sequence_length(a, s) - past + j),
               size_t(d) * sizeof(T));
  return 0;
}

// d act / d p * dy.
template <class C, bool Silu>
inline Vec<C> through_activation(Vec<C> p, Vec<C> dy) {
  if (!Silu) return dy;
  const Vec<C> s = sigmoid(p);
  return dy * (s * fma(p, Vec<C>::set(1) - s, Vec<C>::set(1)));
}

template <class T, class C>
struct BackwardRows {
  const T* const* x;      // x[j]: input row of position t - (W-1) + j
  const T* const* dy;     // dy[i]: of position t + i
  T* const* dx;           // dx[i]: of position t - (W-1) + i, a row nobody reads where that one isn't ours
  const T* extra;         // gradient that reaches dx[0] through the final state (R = 1 only), or null
  const C* w;             // taps, then the bias
  int64_t w_row, width;
  C* carry;               // gradients of the pre-activation at positions t - (W-1) .. t - 1, one row each
  C** carry_rows;         // the same rows, in turning order (any width)
  C* sums;                // gradients of the taps, then of the bias
  int64_t carry_row, sums_row;
};

// A step of R positions: their pre-activations again, their gradients g, the weights' sums, and dx of the R positions whose
// last contribution this is: dx[s] = sum_k w_k g[s + W-1 - k].
template <class T, class C, int W, int R, bool Silu, bool Sum, bool Whole>
inline void backward_vector(const BackwardRows<T, C>& at, int64_t c, int n) {
  if constexpr (W > 0) {
    Vec<C> in[W + R - 1], tap[W], g[W + R - 1];
    for (int j = 0; j < W + R - 1; ++j) in[j] = load<C, Whole>(at.x[j] + c, n);
    for (int k = 0; k < W; ++k) tap[k] = load<C, Whole>(at.w + k * at.w_row + c, n);
    const Vec<C> bias = load<C, Whole>(at.w + W * at.w_row + c, n);
    for (int j = 0; j < W - 1; ++j) g[j] = load<C, Whole>(at.carry + j * at.carry_row + c, n);
    for (int i = 0; i < R; ++i) {
      Vec<C> p = bias;
      if (Silu)
        for (int k = 0; k < W; ++k) p = fma(tap[k], in[i + k], p);
      g[W - 1 + i] = through_activation<C, Silu>(p, load<C, Whole>(at.dy[i] + c, n));
    }
    for (int j = 0; j < W - 1; ++j) store<Whole>(at.carry + j * at.carry_row + c, g[R + j], n);
    if (Sum) {
      for (int k = 0; k < W; ++k) {
        Vec<C> part = g[W - 1] * in[k];
        for (int i = 1; i < R; ++i) part = fma(g[W - 1 + i], in[i + k], part);
        C* sum = at.sums + k * at.sums_row + c;
        store<Whole>(sum, load<C, Whole>(sum, n) + part, n);
      }
      Vec<C> part = g[W - 1];
      for (int i = 1; i < R; ++i) part = part + g[W - 1 + i];
      C* sum = at.sums + W * at.sums_row + c;
      store<Whole>(sum, load<C, Whole>(sum, n) + part, n);
    }
    for (int i = 0; i < R; ++i) {
      Vec<C> dx = tap[W - 1] * g[i];
      for (int k = W - 2; k >= 0; --k) dx = fma(tap[k], g[i + W - 1 - k], dx);
      if (R == 1 && at.extra) dx = dx + load<C, Whole>(at.extra + c, n);
      store<Whole>(at.dx[i] + c, dx, n);
    }
  } else {
    static_assert(R == 1, "any width: one position at a time");
    const int64_t width = at.width;
    const Vec<C> dy = load<C, Whole>(at.dy[0] + c, n);
    Vec<C> p = load<C, Whole>(at.w + width * at.w_row + c, n);
    if (Silu)
      for (int64_t k = 0; k < width; ++k)
        p = fma(load<C, Whole>(at.w + k * at.w_row + c, n), load<C, Whole>(at.x[k] + c, n), p);
    const Vec<C> g = through_activation<C, Silu>(p, dy);
    if (Sum) {
      for (int64_t k = 0; k <= width; ++k) {
        C* sum = at.sums + k * at.sums_row + c;
        const Vec<C> was = load<C, Whole>(sum, n);
        store<Whole>(sum, k < width ? fma(g, load<C, Whole>(at.x[k] + c, n), was) : was + g, n);
      }
    }
    Vec<C> dx = load<C, Whole>(at.w + c, n) * g;
    for (int64_t k = 1; k < width; ++k)
      dx = fma(load<C, Whole>(at.w + k * at.w_row + c, n), load<C, Whole>(at.carry_rows[width - 1 - k] + c, n), dx);
    if (at.extra) dx = dx + load<C, Whole>(at.extra + c, n);
    store<Whole>(at.dx[0] + c, dx, n);
    if (width > 1) store<Whole>(at.carry_rows[0] + c, g, n);  // the oldest is used up; its row becomes the newest
  }
}

template <class T, class C, int W, int R, bool Silu, bool Sum>
inline void backward_rows(BackwardRows<T, C>& at, int64_t channels) {
  SS_FOR_CHANNELS(C, channels, (backward_vector<T, C, W, R, Silu, Sum, true>(at, c, n)),
                  (backward_vector<T, C, W, R, Silu, Sum, false>(at, c, n)));
  if (W == 0 && at.width > 1) {
    C* newest = at.carry_rows[0];
    for (int64_t j = 0; j + 2 < at.width; ++j) at.carry_rows[j] = at.carry_rows[j + 1];
    at.carry_rows[at.width - 2] = newest;
  }
}

template <class T, class C, int W, bool Silu>
int32_t backward_run(const ss_conv_args& a) {
  const int64_t d = a.features, past = a.width - 1, blocks = (d + kBackwardBlock - 1) / kBackwardBlock;
  const int64_t tiles = count_tiles(a, kBackwardTile, true), sums_size = (a.width + 1) * d;
  constexpr int kStep = W ? kRows : 1;
  Scratch<C> weights(sums_size);
  Scratch<T> zeros(d, true);
  Scratch<Tile> tile(tiles);
  Scratch<C> sums(tiles * sums_size, true);
  if (!weights.ok() || !zeros.ok() || !tile.ok() || !sums.ok()) return -3;
  pack_weights(a, weights.data);
  fill_tiles(a, kBackwardTile, true, tile.data);
  const Inputs<T> inputs{a, zeros.data};
  bool memory = true;
  ss::parallel(tiles * blocks, 1, [&](int64_t first, int64_t last) {
    const int64_t most = kBackwardTile + past;
    Scratch<const T*> x(most + past), dy(most);
    Scratch<T*> dx(most);
    Scratch<C> carry(past * kBackwardBlock);
    Scratch<C*> carry_rows(past);
    Scratch<T> nobody(kBackwardBlock);
    if (!x.ok() || !dy.ok() || !dx.ok() || !carry.ok() || !carry_rows.ok() || !nobody.ok()) { memory = false; return; }
    for (int64_t item = first; item < last; ++item) {
      const Tile& own = tile[item / blocks];
      const int64_t s = own.sequence, length = sequence_length(a, s), size = own.end - own.begin;
      const int64_t c0 = item % blocks * kBackwardBlock, channels = smaller(kBackwardBlock, d - c0);
      const int64_t base = a.cu_seqlens ? a.cu_seqlens[s] : s * a.length;
      const int64_t dy_base = a.cu_seqlens ? base * a.grad_y_row : s * a.grad_y_batch;
      for (int64_t j = 0; j < size + past + past; ++j) {
        const int64_t t = own.begin - past + j;
        x[j] = (t < length ? inputs.row(s, t) : zeros.data) + c0;
      }
      for (int64_t j = 0; j < size + past; ++j) {
        const int64_t t = own.begin + j, out = t - past;
        dy[j] = (t < length ? static_cast<const T*>(a.grad_y) + dy_base + t * a.grad_y_row : zeros.data) + c0;
        if (out >= own.begin) dx[j] = static_cast<T*>(a.grad_x) + (base + out) * d + c0;
        else if (own.begin == 0 && a.grad_initial_state)
          dx[j] = static_cast<T*>(a.grad_initial_state) + (s * past + past + out) * d + c0;
        else dx[j] = nobody.data;
      }
      memset(carry.data, 0, size_t(past * kBackwardBlock) * sizeof(C));
      for (int64_t j = 0; j < past; ++j) carry_rows[j] = carry.data + j * kBackwardBlock;
      BackwardRows<T, C> at{x.data, dy.data, dx.data, nullptr, weights.data + c0, d, a.width, carry.data,
                            carry_rows.data, sums.data + item / blocks * sums_size + c0, kBackwardBlock, d};
      int64_t t = 0;
      for (; t + kStep <= size; t += kStep) {
        at.x = x.data + t, at.dy = dy.data + t, at.dx = dx.data + t;
        backward_rows<T, C, W, kStep, Silu, true>(at, channels);
      }
      for (; t < size; ++t) {
        at.x = x.data + t, at.dy = dy.data + t, at.dx = dx.data + t;
        backward_rows<T, C, W, 1, Silu, true>(at, channels);
      }
      // The positions after the tile, as far as the tile's inputs reach: their outputs belong to the next tile. Past the
      // sequence's end there are none, but the final state holds the last inputs.
      for (; t < size + past; ++t) {
        const int64_t beyond = own.begin + t - length;
        at.x = x.data + t, at.dy = dy.data + t, at.dx = dx.data + t;
        at.extra = a.grad_final_state && beyond >= 0
                       ? static_cast<const T*>(a.grad_final_state) + (s * past + beyond) * d + c0
                       : nullptr;
        backward_rows<T, C, W, 1, Silu, false>(at, channels);
      }
    }
  });
  if (!memory) return -3;
  C* grad_weight = static_cast<C*>(a.grad_weight);
  C* grad_bias = static_cast<C*>(a.grad_bias);
  ss::parallel(d, 64, [&](int64_t first, int64_t last) {
    for (int64_t k = 0; k <= a.width; ++k)
      for (int64_t c = first; c < last; ++c) {
        double total = 0;
        for (int64_t i = 0; i < tiles; ++i) total += double(sums[i * sums_size + k * d + c]);
        if (k < a.width) grad_weight[c * a.width + k] = C(total);
        else if (grad_bias) grad_bias[c] = C(total);
      }
  });
  return 0;
}

template <class T, class C, bool Backward, bool Silu, int W>
int32_t run(const ss_conv_args& a) {
  if constexpr (Backward) return backward_run<T, C, W, Silu>(a);
  else return forward_run<T, C, W, Silu>(a);
}

// The published width keeps its taps in registers; every other width goes through one loop over taps.
template <class T, class C, bool Backward, bool Silu>
int32_t by_width(const ss_conv_args& a) {
  return a.width == 4 ? run<T, C, Backward, Silu, 4>(a) : run<T, C, Backward, Silu, 0>(a);
}

template <class T, bool Backward>
int32_t by_activation(const ss_conv_args& a) {
  using C = typename ComputeOf<T>::type;
  return a.silu ? by_width<T, C, Backward, true>(a) : by_width<T, C, Backward, false>(a);
}

template <bool Backward>
int32_t by_dtype(const ss_conv_args& a) {
  if (a.width < 1 || !offsets_fit(a)) return -2;
  switch (a.dtype) {
    case SS_F32: return by_activation<float, Backward>(a);
    case SS_BF16: return by_activation<bf16, Backward>(a);
    case SS_F16: return by_activation<f16, Backward>(a);
    case SS_F64: return by_activation<double, Backward>(a);
    default: return -1;
  }
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_causal_conv1d)(const ss_conv_args* a) { return by_dtype<false>(*a); }
extern "C" int32_t SS_KERNEL(ss_causal_conv1d_backward)(const ss_conv_args* a) { return by_dtype<true>(*a); }
