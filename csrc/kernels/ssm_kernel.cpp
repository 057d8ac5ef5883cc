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
#include <cstring>
#include <type_traits>

#include "flush.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "tile.h"

#if defined(__GNUC__)
#define SS_LAMBDA_INLINE __attribute__((always_inline))
#else
#define SS_LAMBDA_INLINE
#endif

namespace {
using namespace ss;

constexpr int64_t kLags = 64;  // T; a multiple of every panel
constexpr int64_t kStretch = 16;  // products that are summed one after the other
constexpr int kWidth = kVectors * F32::W;
static_assert(kLags % kWidth == 0, "a row of lags is whole panels");

// Channels that one thread should at least take: waking another is worth some 64K products or quotients.
int64_t grain(int64_t work) { return 1 + 65536 / work; }

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// c = a b over all `width` columns (a multiple of F32::W); b in panels of kWidth columns, the last one as wide as is left.
// At most `stretch` products are summed one after the other, then these sums: fewer roundings on the way to each result.
void product(const float* a, int64_t lda, const float* b, int64_t depth, int64_t stretch, float* c, int64_t ldc, int64_t width) {
  for (int64_t k = 0; k < depth; k += stretch) {
    const int64_t most = depth - k < stretch ? depth - k : stretch;
    int64_t at = 0;
    for (; at + kWidth <= width; at += kWidth)
      tile<F32, kVectors>(a + k, lda, b + at * depth + k * kWidth, kWidth, most, c + at, ldc, k > 0);
    const int64_t left = width - at;
    for (int64_t v = 0; v < left; v += F32::W)
      tile<F32, 1>(a + k, lda, b + at * depth + k * left + v, left, most, c + at + v, ldc, k > 0);
  }
}

// Where column j of a matrix of `width` columns in panels stands: its panel's start, its row's length, its place in a row.
struct Place {
  int64_t start, row;
};
Place place(int64_t column, int64_t width, int64_t depth) {
  const int64_t at = column / kWidth * kWidth;
  return {at * depth + column - at, width - at < kWidth ? width - at : kWidth};
}

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
  ss::parallel(p.channels, grain(2 * n * p.length), [&](int64_t first, int64_t last) {
    FlushToZero flush;
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
        for (int64_t i = 0; i < n; ++i) table[at.start + i * at.row] = float(powers.re[i]);
        if (!powers.real)
          for (int64_t i = 0; i < n; ++i) table[at.start + (n + i) * at.row] = float(-powers.im[i]);
        powers.step();
      }
      for (int64_t i = 0; i < n; ++i) powers.re[i] = p.w_re[d * n + i], powers.im[i] = p.w_im[d * n + i];
      float* out = p.kernel + d * p.length;
      for (int64_t a = 0; a * kLags < p.length; a += kRows) {
        for (int64_t i = 0; i < kRows; ++i) {  // w z^(aT)
          float* row = rows + i * depth;
          for (int64_t j = 0; j < n; ++j) row[j] = float(powers.re[j]);
          if (!powers.real)
            for (int64_t j = 0; j < n; ++j) row[n + j] = float(powers.im[j]);
          powers.jump();
        }
        if (a + kRows <= full) {
          product(rows, depth, table, depth, kStretch, out + a * kLags, kLags, width);
        } else {
          product(rows, depth, table, depth, kStretch, apart, kLags, width);
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
  ss::parallel(p.channels, grain(2 * n * p.length), [&](int64_t first, int64_t last) {
    FlushToZero flush;
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
          table[at.start + b * at.row] = float(j < n ? powers.re[j] : powers.im[j - n]);
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
        product(rows, kLags, table, kLags, kStretch, plain, width, width);
        product(bg, kLags, table, kLags, kStretch, moved, width, width);
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

// Real and imaginary part of 1 / (p + i low) and of 1 / (p + i high).
struct Pair {
  F32 low_re, low_im, high_re, high_im;
};
SS_INLINE Pair quotients(F32 lam_re, F32 lam_im, F32 y, F32 c) {
  const F32 one = F32::set(1), p = F32::zero() - c * lam_re, low = fnma(c, lam_im, y), high = fma(c, lam_im, y);
  const F32 square = p * p, r_low = one / fma(low, low, square), r_high = one / fma(high, high, square);
  return {p * r_low, F32::zero() - low * r_low, p * r_high, F32::zero() - high * r_high};
}

constexpr int64_t kPoints = kWidth / 2;  // of a panel of the forward pass: their real parts, then their imaginary parts
static_assert(kPoints % F32::W == 0, "a panel is whole vectors");

// y and c with as many points behind them as a vector may run past the end, where every quotient is finite.
struct Points {
  Scratch<float> memory;
  float *y, *c;
  explicit Points(const ss_cauchy_args& p) : memory(2 * (p.points + kWidth)) {
    y = memory.data, c = memory.data + p.points + kWidth;
    if (!memory.ok()) return;
    for (int64_t k = 0; k < p.points + kWidth; ++k) y[k] = k < p.points ? p.y[k] : 1, c[k] = k < p.points ? p.c[k] : 0;
  }
};

int32_t cauchy(const ss_cauchy_args& p) {
  const int64_t n = p.states, depth = 2 * n, rows = round_up(p.sums, kRows);
  const Points points(p);
  if (!points.memory.ok()) return -3;
  std::atomic<bool> no_memory{false};
  ss::parallel(p.channels, grain(n * p.points), [&](int64_t first, int64_t last) {
    FlushToZero flush;
    Scratch<float> memory(rows * depth + depth * kWidth + kRows * kWidth);
    if (!memory.ok()) {
      no_memory = true;
      return;
    }
    float *v = memory.data, *table = v + rows * depth, *found = table + depth * kWidth;
    for (int64_t i = 0; i < rows * depth; ++i) v[i] = 0;
    for (int64_t d = first; d < last; ++d) {
      for (int64_t s = 0; s < p.sums; ++s)
        for (int64_t j = 0; j < n; ++j) {
          v[s * depth + j] = p.v_re[(d * p.sums + s) * n + j];
          v[s * depth + n + j] = p.v_im[(d * p.sums + s) * n + j];
        }
      for (int64_t k = 0; k < p.points; k += kPoints) {
        // What v's real part is multiplied by, then its imaginary part: real parts of the panel's points, imaginary parts.
        for (int64_t j = 0; j < n; ++j) {
          const F32 lam_re = F32::set(p.lam_re[d * n + j]), lam_im = F32::set(p.lam_im[d * n + j]);
          float *of_re = table + j * kWidth, *of_im = table + (n + j) * kWidth;
          SS_UNROLL
          for (int64_t i = 0; i < kPoints; i += F32::W) {
            const Pair q = quotients(lam_re, lam_im, F32::load(points.y + k + i), F32::load(points.c + k + i));
            (q.low_re + q.high_re).store(of_re + i), (q.low_im + q.high_im).store(of_re + kPoints + i);
            (q.high_im - q.low_im).store(of_im + i), (q.low_re - q.high_re).store(of_im + kPoints + i);
          }
        }
        const int64_t held = p.points - k < kPoints ? p.points - k : kPoints;
        for (int64_t s = 0; s < p.sums; s += kRows) {
          tile<F32, kVectors>(v + s * depth, depth, table, kWidth, depth, found, kWidth, false);
          for (int64_t i = 0; i < kRows && s + i < p.sums; ++i) {
            const int64_t at = (d * p.sums + s + i) * p.points + k;
            for (int64_t j = 0; j < held; ++j) {
              p.out_re[at + j] = found[i * kWidth + j];
              p.out_im[at + j] = found[i * kWidth + kPoints + j];
            }
          }
        }
      }
    }
  });
  return no_memory ? -3 : 0;
}

constexpr int kSums = 4;            // whose gradients are taken together: rank 1 has four
constexpr int64_t kVectorsOfSum = 32;  // of points that are summed in float; their sums in double

// Gradients of one state by up to kSums sums, added to those of the sums before.
void cauchy_backward_of(const ss_cauchy_args& p, const Points& points, int64_t d, int64_t j, int64_t s0, double* by_lam) {
  const int64_t count = p.sums - s0 < kSums ? p.sums - s0 : kSums;
  const F32 lam_re = F32::set(p.lam_re[d * p.states + j]), lam_im = F32::set(p.lam_im[d * p.states + j]);
  F32 v_re[kSums], v_im[kSums];
  const float *g_re[kSums], *g_im[kSums];
  for (int s = 0; s < kSums; ++s) {
    const int64_t at = d * p.sums + s0 + (s < count ? s : 0);
    // A sum that is not there repeats the first with a weight of 0; its own gradient is not written.
    v_re[s] = F32::set(s < count ? p.v_re[at * p.states + j] : 0), v_im[s] = F32::set(s < count ? p.v_im[at * p.states + j] : 0);
    g_re[s] = p.grad_re + at * p.points, g_im[s] = p.grad_im + at * p.points;
  }
  double by_v_re[kSums] = {}, by_v_im[kSums] = {};
  constexpr int64_t kTogether = kVectorsOfSum * F32::W;
  for (int64_t begin = 0; begin < p.points; begin += kTogether) {
    F32 dv_re[kSums], dv_im[kSums], dlam_re = F32::zero(), dlam_im = F32::zero();
    SS_UNROLL
    for (int s = 0; s < kSums; ++s) dv_re[s] = dv_im[s] = F32::zero();
    const int64_t end = begin + kTogether < p.points ? begin + kTogether : p.points;
    auto add = [&](int64_t k, auto whole, int64_t lanes) SS_LAMBDA_INLINE {
      const F32 y = F32::load(points.y + k), c = F32::load(points.c + k);
      const Pair q = quotients(lam_re, lam_im, y, c);
      const F32 a = q.low_re + q.high_re, e = q.low_im + q.high_im, b = q.high_im - q.low_im, f = q.low_re - q.high_re;
      F32 da = F32::zero(), db = F32::zero(), de = F32::zero(), df = F32::zero();
      SS_UNROLL
      for (int s = 0; s < kSums; ++s) {
        const F32 re = load<float, decltype(whole)::value>(g_re[s] + k, lanes);
        const F32 im = load<float, decltype(whole)::value>(g_im[s] + k, lanes);
        dv_re[s] = fma(re, a, fma(im, e, dv_re[s])), dv_im[s] = fma(re, b, fma(im, f, dv_im[s]));
        da = fma(re, v_re[s], da), db = fma(re, v_im[s], db), de = fma(im, v_re[s], de), df = fma(im, v_im[s], df);
      }
      // With z = 1 / w, what comes to z goes on to w times -conj(z^2): p has its real part, y -+ c im its imaginary part.
      const F32 low_a = da + df, low_b = de - db, high_a = da - df, high_b = de + db;
      const F32 low_x = fma(q.low_re, q.low_re, F32::zero() - q.low_im * q.low_im), low_y = q.low_re * (q.low_im + q.low_im);
      const F32 high_x = fma(q.high_re, q.high_re, F32::zero() - q.high_im * q.high_im);
      const F32 high_y = q.high_re * (q.high_im + q.high_im);
      const F32 by_p = fma(low_x, low_a, low_y * low_b) + fma(high_x, high_a, high_y * high_b);
      const F32 by_low = fnma(low_y, low_a, low_x * low_b), by_high = fnma(high_y, high_a, high_x * high_b);
      dlam_re = fma(c, by_p, dlam_re), dlam_im = fma(c, by_low - by_high, dlam_im);
    };
    int64_t k = begin;
    for (; k + F32::W <= end; k += F32::W) add(k, std::true_type(), F32::W);
    if (k < end) add(k, std::false_type(), end - k);
    for (int s = 0; s < kSums; ++s) by_v_re[s] += double(sum(dv_re[s])), by_v_im[s] += double(sum(dv_im[s]));
    by_lam[0] += double(sum(dlam_re)), by_lam[1] += double(sum(dlam_im));
  }
  for (int64_t s = 0; s < count; ++s) {
    p.dv_re[(d * p.sums + s0 + s) * p.states + j] = float(by_v_re[s]);
    p.dv_im[(d * p.sums + s0 + s) * p.states + j] = float(by_v_im[s]);
  }
}

int32_t cauchy_backward(const ss_cauchy_args& p) {
  const Points points(p);
  if (!points.memory.ok()) return -3;
  ss::parallel(p.channels, grain(p.states * p.points), [&](int64_t first, int64_t last) {
    FlushToZero flush;
    for (int64_t d = first; d < last; ++d)
      for (int64_t j = 0; j < p.states; ++j) {
        double by_lam[2] = {0, 0};
        for (int64_t s = 0; s < p.sums; s += kSums) cauchy_backward_of(p, points, d, j, s, by_lam);
        p.dlam_re[d * p.states + j] = float(by_lam[0]), p.dlam_im[d * p.states + j] = float(by_lam[1]);
      }
  });
  return 0;
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_vandermonde)(const ss_vandermonde_args* a) { return vandermonde(*a); }
extern "C" int32_t SS_KERNEL(ss_vandermonde_backward)(const ss_vandermonde_args* a) { return vandermonde_backward(*a); }
extern "C" int32_t SS_KERNEL(ss_cauchy)(const ss_cauchy_args* a) { return cauchy(*a); }
extern "C" int32_t SS_KERNEL(ss_cauchy_backward)(const ss_cauchy_args* a) { return cauchy_backward(*a); }
