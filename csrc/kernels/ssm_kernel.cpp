// The Vandermonde and the Cauchy product of S4D's and S4's kernels: a task is a channel, nothing of size states x length
// is held, and every sum runs in an order that the shape alone fixes.
//
// Vandermonde. With l = a T + b, z^l = z^(aT) z^b: a table of the T powers z^b stays in the first-level cache, the powers
// w z^(aT) of a few rows a are made as they are needed, both in double and rounded once, and what is left is a product of
// matrices of inner size 2 x states (states alone where z is real). Backwards the same with the sum over b in the product,
// once for g and once for b g, and the sum over a in double.
//
// Cauchy. Vectors of points; 1 / (p + i (y - c im)) and 1 / (p + i (y + c im)), p = -c re, give each state's pair, and four
// multiply-adds each of the sums. Backwards the pairs are made again.
#include "ssm_kernel.h"

#include <atomic>
#include <cmath>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"

#if defined(__GNUC__) && !defined(__clang__)
#define SS_UNROLL _Pragma("GCC unroll 8")
#elif defined(__clang__)
#define SS_UNROLL _Pragma("unroll")
#else
#define SS_UNROLL
#endif

namespace {
using namespace ss;

constexpr int64_t kLags = 64;  // T; a multiple of every panel
constexpr int kRows = 4;       // rows a at a time
constexpr int kVectors = SS_VECTOR_REGISTERS == 32 ? 4 : 2;  // of a panel
constexpr int kWidth = kVectors * F32::W;
static_assert(kLags % kWidth == 0, "a row of lags is whole panels");

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// c = a b: kRows rows of a, `depth` long and lda apart; b depth x (V vectors), ldb apart; c rows ldc apart.
template <int V>
SS_INLINE void tile(const float* SS_RESTRICT a, int64_t lda, const float* SS_RESTRICT b, int64_t ldb, int64_t depth,
                    float* SS_RESTRICT c, int64_t ldc) {
  F32 sum[kRows][V];
  SS_UNROLL
  for (int i = 0; i < kRows; ++i)
    SS_UNROLL
    for (int v = 0; v < V; ++v) sum[i][v] = F32::zero();
  for (int64_t k = 0; k < depth; ++k) {
    F32 row[V];
    SS_UNROLL
    for (int v = 0; v < V; ++v) row[v] = F32::load(b + k * ldb + v * F32::W);
    SS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const F32 x = F32::set(a[i * lda + k]);
      SS_UNROLL
      for (int v = 0; v < V; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
  }
  SS_UNROLL
  for (int i = 0; i < kRows; ++i)
    SS_UNROLL
    for (int v = 0; v < V; ++v) sum[i][v].store(c + i * ldc + v * F32::W);
}

// The same over all `width` columns (a multiple of F32::W); b in panels of kWidth columns, the last one as wide as is left.
void product(const float* a, int64_t lda, const float* b, int64_t depth, float* c, int64_t ldc, int64_t width) {
  int64_t at = 0;
  for (; at + kWidth <= width; at += kWidth) tile<kVectors>(a, lda, b + at * depth, kWidth, depth, c + at, ldc);
  const int64_t left = width - at;
  for (int64_t v = 0; v < left; v += F32::W) tile<1>(a, lda, b + at * depth + v, left, depth, c + at + v, ldc);
}

// Where column j of a matrix of `width` columns in panels stands: its panel's start, its row's length, its place in a row.
struct Place {
  int64_t start, row;
};
Place place(int64_t column, int64_t width, int64_t depth) {
  const int64_t at = column / kWidth * kWidth;
  return {at * depth + column - at, width - at < kWidth ? width - at : kWidth};
}

// Numbers under the smallest normal one are nothing: they would only be slow.
SS_INLINE float rounded(double x) { return std::fabs(x) < 1.1754943508222875e-38 ? 0.0f : float(x); }

// x *= step, state by state.
SS_INLINE void turn(double* SS_RESTRICT re, double* SS_RESTRICT im, const double* SS_RESTRICT step_re,
                    const double* SS_RESTRICT step_im, int64_t states) {
  for (int64_t n = 0; n < states; ++n) {
    const double x = re[n], y = im[n];
    re[n] = x * step_re[n] - y * step_im[n];
    im[n] = x * step_im[n] + y * step_re[n];
  }
}
SS_INLINE void turn(double* SS_RESTRICT re, const double* SS_RESTRICT step_re, int64_t states) {
  for (int64_t n = 0; n < states; ++n) re[n] *= step_re[n];
}

// One channel's z, z^T, and a running power; parts of `states` doubles each.
struct Powers {
  double *z_re, *z_im, *jump_re, *jump_im, *re, *im;
  int64_t states;
  bool real;  // all z are positive reals: imaginary parts are left out

  Powers(double* memory, int64_t n) : states(n), real(false) {
    z_re = memory, z_im = z_re + n, jump_re = z_im + n, jump_im = jump_re + n, re = jump_im + n, im = re + n;
  }
  static int64_t size(int64_t n) { return 6 * n; }

  void set(const double* log_re, const double* log_im) {
    real = true;
    for (int64_t n = 0; n < states; ++n) {
      const double size = std::exp(log_re[n]);
      z_re[n] = size * std::cos(log_im[n]), z_im[n] = size * std::sin(log_im[n]);
      real = real && log_im[n] == 0;
      jump_re[n] = z_re[n], jump_im[n] = z_im[n];
    }
    for (int64_t power = 1; power < kLags; power *= 2) square();
  }
  void square() {
    for (int64_t n = 0; n < states; ++n) {
      const double x = jump_re[n], y = jump_im[n];
      jump_re[n] = x * x - y * y, jump_im[n] = 2 * x * y;
    }
  }
  void restart() {
    for (int64_t n = 0; n < states; ++n) re[n] = 1, im[n] = 0;
  }
  void step() { real ? turn(re, z_re, states) : turn(re, im, z_re, z_im, states); }
  void jump() { real ? turn(re, jump_re, states) : turn(re, im, jump_re, jump_im, states); }
};

int32_t vandermonde(const ss_vandermonde_args& p) {
  const int64_t n = p.states, full = p.length / kLags, width = p.length < kLags ? round_up(p.length, F32::W) : kLags;
  std::atomic<bool> no_memory{false};
  ss::parallel(p.channels, 1, [&](int64_t first, int64_t last) {
    Scratch<double> memory(Powers::size(n));
    Scratch<float> floats(2 * n * kLags + kRows * 2 * n + kRows * kLags);
    if (!memory.ok() || !floats.ok()) {
      no_memory = true;
      return;
    }
    Powers powers(memory.data, n);
    float *table = floats.data, *rows = table + 2 * n * kLags, *apart = rows + kRows * 2 * n;
    for (int64_t d = first; d < last; ++d) {
      powers.set(p.log_re + d * n, p.log_im + d * n);
      const int64_t depth = powers.real ? n : 2 * n;
      // table[2 x states][T]: Re(z^b), -Im(z^b), by columns
      powers.restart();
      for (int64_t b = 0; b < width; ++b) {
        const Place at = place(b, width, depth);
        for (int64_t i = 0; i < n; ++i) table[at.start + i * at.row] = rounded(powers.re[i]);
        if (!powers.real)
          for (int64_t i = 0; i < n; ++i) table[at.start + (n + i) * at.row] = rounded(-powers.im[i]);
        powers.step();
      }
      for (int64_t i = 0; i < n; ++i) powers.re[i] = p.w_re[d * n + i], powers.im[i] = p.w_im[d * n + i];
      float* out = p.kernel + d * p.length;
      for (int64_t a = 0; a * kLags < p.length; a += kRows) {
        for (int64_t i = 0; i < kRows; ++i) {  // w z^(aT)
          float* row = rows + i * depth;
          for (int64_t j = 0; j < n; ++j) row[j] = rounded(powers.re[j]);
          if (!powers.real)
            for (int64_t j = 0; j < n; ++j) row[n + j] = rounded(powers.im[j]);
          powers.jump();
        }
        if (a + kRows <= full) {
          product(rows, depth, table, depth, out + a * kLags, kLags, width);
        } else {
          product(rows, depth, table, depth, apart, kLags, width);
          const int64_t left = p.length - a * kLags;
          std::memcpy(out + a * kLags, apart, size_t(left < kRows * kLags ? left : kRows * kLags) * sizeof(float));
        }
      }
    }
  });
  return no_memory ? -3 : 0;
}

int32_t vandermonde_backward(const ss_vandermonde_args& p) {
  const int64_t n = p.states, full = p.length / kLags, most = round_up(2 * n, F32::W);
  std::atomic<bool> no_memory{false};
  ss::parallel(p.channels, 1, [&](int64_t first, int64_t last) {
    Scratch<double> memory(Powers::size(n) + 4 * n);
    Scratch<float> floats(most * kLags + 2 * kRows * (most + kLags));
    if (!memory.ok() || !floats.ok()) {
      no_memory = true;
      return;
    }
    Powers powers(memory.data, n);
    double *s0_re = memory.data + Powers::size(n), *s0_im = s0_re + n, *s1_re = s0_im + n, *s1_im = s1_re + n;
    float *table = floats.data, *plain = table + most * kLags, *moved = plain + kRows * most;
    float *g = moved + kRows * most, *bg = g + kRows * kLags;
    for (int64_t d = first; d < last; ++d) {
      powers.set(p.log_re + d * n, p.log_im + d * n);
      const int64_t columns = powers.real ? n : 2 * n, width = round_up(columns, F32::W);
      // table[T][2 x states]: Re(z^b), Im(z^b)
      for (int64_t i = 0; i < width * kLags; ++i) table[i] = 0;
      powers.restart();
      for (int64_t b = 0; b < kLags; ++b) {
        for (int64_t j = 0; j < columns; ++j) {
          const Place at = place(j, width, kLags);
          table[at.start + b * at.row] = rounded(j < n ? powers.re[j] : powers.im[j - n]);
        }
        powers.step();
      }
      for (int64_t i = 0; i < n; ++i) s0_re[i] = s0_im[i] = s1_re[i] = s1_im[i] = 0;
      powers.restart();
      for (int64_t a = 0; a * kLags < p.length; a += kRows) {
        const float* rows = p.grad + d * p.length + a * kLags;
        if (a + kRows > full) {  // the lags past the end are 0
          const int64_t left = p.length - a * kLags, held = left < kRows * kLags ? left : kRows * kLags;
          for (int64_t i = 0; i < kRows * kLags; ++i) g[i] = i < held ? rows[i] : 0.0f;
          rows = g;
        }
        for (int64_t i = 0; i < kRows; ++i)
          for (int64_t b = 0; b < kLags; ++b) bg[i * kLags + b] = float(b) * rows[i * kLags + b];
        product(rows, kLags, table, kLags, plain, width, width);
        product(bg, kLags, table, kLags, moved, width, width);
        for (int64_t i = 0; i < kRows; ++i) {
          const double start = double((a + i) * kLags);
          const float *SS_RESTRICT u = plain + i * width, *SS_RESTRICT v = moved + i * width;
          if (powers.real) {
            for (int64_t j = 0; j < n; ++j) {
              s0_re[j] += powers.re[j] * u[j];
              s1_re[j] += powers.re[j] * (start * u[j] + v[j]);
            }
          } else {
            for (int64_t j = 0; j < n; ++j) {
              const double x = powers.re[j], y = powers.im[j], u_re = u[j], u_im = u[n + j];
              const double v_re = start * u_re + v[j], v_im = start * u_im + v[n + j];
              s0_re[j] += x * u_re - y * u_im, s0_im[j] += x * u_im + y * u_re;
              s1_re[j] += x * v_re - y * v_im, s1_im[j] += x * v_im + y * v_re;
            }
          }
          powers.jump();
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        p.s0_re[d * n + i] = float(s0_re[i]), p.s0_im[d * n + i] = float(s0_im[i]);
        p.s1_re[d * n + i] = float(s1_re[i]), p.s1_im[d * n + i] = float(s1_im[i]);
      }
    }
  });
  return no_memory ? -3 : 0;
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_vandermonde)(const ss_vandermonde_args* a) { return vandermonde(*a); }
extern "C" int32_t SS_KERNEL(ss_vandermonde_backward)(const ss_vandermonde_args* a) { return vandermonde_backward(*a); }
