// K_l = C A^l B of a small dense matrix for every channel: S4's kernel by squaring.
//
// With l = a T + b, K_l = (C A^(aT)) (A^b B): rows R_a and X_b of states, each made four at a time from the four before by
// one power, and a product of both in float. The powers A^(2^i) are squares of squares; all of them are held transposed, as
// S_i, so that X_(b + 2^i) = X_b S_i and R_(a + 2^i) = R_a S_(log2 T + i)^T. All but the last product is in double.
//
// Backwards everything is made again, and walked from its end: the product, the two orbits, the squares.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "flush.h"
#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "ssm_kernel.h"
#include "tile.h"

namespace {
using namespace ss;

constexpr int64_t kOrbit = 3;  // powers of an orbit: 1, 2 and 4 steps
constexpr int64_t kStretch = 16;  // products in float that are summed one after the other

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// c = a b, or c += a b; rows a multiple of kRows, columns one of V::W.
template <class V, class T = typename V::scalar>
void multiply(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t rows, int64_t depth,
              int64_t columns, bool add) {
  constexpr int64_t kWidth = kVectors * V::W;
  for (int64_t j = 0; j < columns;) {
    const bool whole = j + kWidth <= columns;
    for (int64_t i = 0; i < rows; i += kRows) {
      if (whole)
        tile<V, kVectors>(a + i * lda, lda, b + j, ldb, depth, c + i * ldc + j, ldc, add);
      else
        tile<V, 1>(a + i * lda, lda, b + j, ldb, depth, c + i * ldc + j, ldc, add);
    }
    j += whole ? kWidth : V::W;
  }
}
void multiply_in_stretches(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows,
                           int64_t depth, int64_t columns) {
  for (int64_t k = 0; k < depth; k += kStretch)
    multiply<F32>(a + k, lda, b + k * ldb, ldb, c, ldc, rows, std::min(kStretch, depth - k), columns, k > 0);
}

template <class A, class B>
void transpose(const A* a, int64_t lda, int64_t rows, int64_t columns, B* b, int64_t ldb) {
  for (int64_t i = 0; i < rows; i += 8)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = i; k < std::min(i + 8, rows); ++k) b[j * ldb + k] = B(a[k * lda + j]);
}

// The sizes of a call. Rows lie a cache line further apart than they are long, so that columns don't share their sets.
struct Plan {
  int64_t states, padded, pitch, inner, outer, inner_rows, outer_rows, first_outer, powers;
  explicit Plan(const ss_powers_args& p) {
    states = p.states, padded = round_up(states, 16), pitch = padded + 8;
    inner = int64_t(1) << p.bits, outer = (p.length + inner - 1) / inner;
    inner_rows = round_up(inner, 16), outer_rows = round_up(outer, 16);
    first_outer = p.bits;  // S_i of the first power that the outer orbit takes
    powers = std::max(std::min(steps(inner), p.bits), outer > 1 ? p.bits + steps(outer) : 0);
  }
  static int64_t steps(int64_t count) { return count > 4 ? 3 : count > 2 ? 2 : count > 1 ? 1 : 0; }
  int64_t matrix() const { return padded * pitch; }
  int64_t doubles(bool backward) const {
    const int64_t rows = (inner_rows + outer_rows) * pitch;
    const int64_t most = std::max(inner_rows, outer_rows);
    return (std::max(powers, int64_t(1)) * (backward ? 2 : 1) + kOrbit + 1) * matrix() +
           rows * (backward ? 2 : 1) + (backward ? padded * most : 0);
  }
  int64_t floats(bool backward) const {
    const int64_t rows = (inner_rows + outer_rows) * padded, grid = inner_rows * outer_rows;
    return backward ? 2 * rows + 2 * grid : rows + kRows * inner_rows;
  }
};

// to += row m, or to = row m.
void times(const double* row, const double* m, double* to, const Plan& z, bool add) {
  for (int64_t j = 0; j < z.padded && !add; ++j) to[j] = 0;
  for (int64_t k = 0; k < z.padded; ++k)
    for (int64_t j = 0; j < z.padded; ++j) to[j] += row[k] * m[k * z.pitch + j];
}

// Row 0 is set; each other of `count` rows is the row 2^i before it times power i.
void orbit(double* rows, int64_t count, double* const* power, const Plan& z) {
  const int64_t pitch = z.pitch;
  if (count > 1) times(rows, power[0], rows + pitch, z, false);
  for (int64_t at = 2; at < 4 && count > 2; ++at) times(rows + (at - 2) * pitch, power[1], rows + at * pitch, z, false);
  for (int64_t at = 4; at < count; at += 4)
    multiply<F64>(rows + (at - 4) * pitch, pitch, power[2], pitch, rows + at * pitch, pitch, kRows, z.padded, z.padded, false);
}

// Its adjoint: rows' derivatives walk back to row 0; those of the powers, transposed if `turned`, are added to `by`.
void orbit_adjoint(const double* rows, double* by_rows, int64_t count, double* const* transposed, double* const* by,
                   bool turned, double* columns, const Plan& z) {
  const int64_t n = z.padded, pitch = z.pitch;
  for (int64_t at = round_up(count, 4) - 4; at >= 4; at -= 4)
    multiply<F64>(by_rows + at * pitch, pitch, transposed[2], pitch, by_rows + (at - 4) * pitch, pitch, kRows, n, n, true);
  for (int64_t at = 3; at >= 2 && count > 2; --at)
    times(by_rows + at * pitch, transposed[1], by_rows + (at - 2) * pitch, z, true);
  if (count > 1) times(by_rows + pitch, transposed[0], by_rows, z, true);
  auto outer = [&](int64_t before, int64_t after, int64_t many, int i) {  // sum over rows of before^T after
    const double *a = rows + before * pitch, *b = by_rows + after * pitch;
    if (turned) std::swap(a, b);
    transpose(a, pitch, many, n, columns, many);
    multiply<F64>(columns, many, b, pitch, by[i], pitch, n, many, n, true);
  };
  if (count > 1) outer(0, 1, 1, 0);
  if (count > 2) outer(0, 2, 2, 1);
  if (count > 4) outer(0, 4, round_up(count, 4) - 4, 2);
}

// What forward and backward pass make of a channel.
struct Channel {
  double *S[64], *turned[kOrbit], *X, *R, *end;

  Channel(const Plan& z, double* memory) {
    for (int64_t i = 0; i < std::max(z.powers, int64_t(1)); ++i) S[i] = memory, memory += z.matrix();
    for (int64_t i = 0; i < kOrbit; ++i) turned[i] = memory, memory += z.matrix();
    X = memory, memory += z.inner_rows * z.pitch;
    R = memory, memory += z.outer_rows * z.pitch;
    end = memory;
  }
  void make(const Plan& z, const ss_powers_args& p, int64_t d) {
    const int64_t n = z.states;
    std::memset(S[0], 0, size_t(z.matrix()) * sizeof(double));
    transpose(p.A + d * n * n, n, n, n, S[0], z.pitch);
    for (int64_t i = 1; i < z.powers; ++i)
      multiply<F64>(S[i - 1], z.pitch, S[i - 1], z.pitch, S[i], z.pitch, z.padded, z.padded, z.padded, false);
    std::memset(X, 0, size_t((z.inner_rows + z.outer_rows) * z.pitch) * sizeof(double));
    std::memcpy(X, p.B + d * n, size_t(n) * sizeof(double));
    std::memcpy(R, p.C + d * n, size_t(n) * sizeof(double));
    orbit(X, z.inner, S, z);
    for (int64_t i = 0; i < Plan::steps(z.outer); ++i)
      transpose(S[z.first_outer + i], z.pitch, z.padded, z.padded, turned[i], z.pitch);
    orbit(R, z.outer, turned, z);
  }
};

// Channels that one thread should at least take: waking another is worth some 64K products.
int64_t grain(const Plan& z) { return 1 + 65536 / (z.padded * z.padded * (z.inner + z.outer)); }

int32_t powers(const ss_powers_args& p) {
  const Plan z(p);
  std::atomic<bool> no_memory{false};
  ss::parallel(p.channels, grain(z), [&](int64_t first, int64_t last) {
    FlushToZero flush;
    Scratch<double> memory(z.doubles(false));
    Scratch<float> floats(z.floats(false));
    if (!memory.ok() || !floats.ok()) {
      no_memory = true;
      return;
    }
    Channel made(z, memory.data);
    float *rows = floats.data, *columns = rows + z.outer_rows * z.padded, *apart = columns + z.inner_rows * z.padded;
    const int64_t width = z.inner_rows;
    for (int64_t d = first; d < last; ++d) {
      made.make(z, p, d);
      for (int64_t a = 0; a < z.outer_rows; ++a)
        for (int64_t j = 0; j < z.padded; ++j) rows[a * z.padded + j] = float(made.R[a * z.pitch + j]);
      transpose(made.X, z.pitch, width, z.padded, columns, width);
      float* out = p.kernel + d * p.length;
      for (int64_t a = 0; a < z.outer; a += kRows) {
        const bool whole = width == z.inner && (a + kRows) * z.inner <= p.length;
        float* to = whole ? out + a * z.inner : apart;
        multiply_in_stretches(rows + a * z.padded, z.padded, columns, width, to, width, kRows, z.padded, width);
        if (whole) continue;
        for (int64_t i = 0; i < kRows && (a + i) * z.inner < p.length; ++i)
          std::memcpy(out + (a + i) * z.inner, apart + i * width,
                      size_t(std::min(z.inner, p.length - (a + i) * z.inner)) * sizeof(float));
      }
    }
  });
  return no_memory ? -3 : 0;
}

int32_t powers_backward(const ss_powers_args& p) {
  const Plan z(p);
  std::atomic<bool> no_memory{false};
  ss::parallel(p.channels, grain(z), [&](int64_t first, int64_t last) {
    FlushToZero flush;
    Scratch<double> memory(z.doubles(true));
    Scratch<float> floats(z.floats(true));
    if (!memory.ok() || !floats.ok()) {
      no_memory = true;
      return;
    }
    const int64_t n = z.states, pitch = z.pitch, held = std::max(z.powers, int64_t(1));
    Channel made(z, memory.data);
    double *by_X = made.end, *by_R = by_X + z.inner_rows * pitch, *again = by_R + z.outer_rows * pitch;
    double* by_S[64];
    for (int64_t i = 0; i < held; ++i) by_S[i] = again + z.matrix() + i * z.matrix();
    double* columns = again + (1 + held) * z.matrix();
    float *X = floats.data, *R = X + z.inner_rows * z.padded, *dX = R + z.outer_rows * z.padded;
    float *dR = dX + z.inner_rows * z.padded, *g = dR + z.outer_rows * z.padded, *gT = g + z.inner_rows * z.outer_rows;
    for (int64_t d = first; d < last; ++d) {
      made.make(z, p, d);
      for (int64_t a = 0; a < z.outer_rows; ++a)
        for (int64_t j = 0; j < z.padded; ++j) R[a * z.padded + j] = float(made.R[a * pitch + j]);
      for (int64_t b = 0; b < z.inner_rows; ++b)
        for (int64_t j = 0; j < z.padded; ++j) X[b * z.padded + j] = float(made.X[b * pitch + j]);
      std::memset(g, 0, size_t(z.inner_rows * z.outer_rows) * sizeof(float));
      for (int64_t a = 0; a < z.outer; ++a)
        std::memcpy(g + a * z.inner_rows, p.grad + d * p.length + a * z.inner,
                    size_t(std::min(z.inner, p.length - a * z.inner)) * sizeof(float));
      transpose(g, z.inner_rows, z.outer_rows, z.inner_rows, gT, z.outer_rows);
      multiply_in_stretches(g, z.inner_rows, X, z.padded, dR, z.padded, z.outer_rows, z.inner_rows, z.padded);
      multiply_in_stretches(gT, z.outer_rows, R, z.padded, dX, z.padded, z.inner_rows, z.outer_rows, z.padded);
      for (int64_t a = 0; a < z.outer_rows; ++a)
        for (int64_t j = 0; j < z.padded; ++j) by_R[a * pitch + j] = dR[a * z.padded + j];
      for (int64_t b = 0; b < z.inner_rows; ++b)
        for (int64_t j = 0; j < z.padded; ++j) by_X[b * pitch + j] = dX[b * z.padded + j];

      std::memset(by_S[0], 0, size_t(held * z.matrix()) * sizeof(double));
      // The outer orbit went by S^T: the transposes of its powers are the S themselves.
      orbit_adjoint(made.R, by_R, z.outer, made.S + z.first_outer, by_S + z.first_outer, true, columns, z);
      for (int64_t i = 0; i < std::min(Plan::steps(z.inner), kOrbit); ++i)
        transpose(made.S[i], pitch, z.padded, z.padded, made.turned[i], pitch);
      orbit_adjoint(made.X, by_X, z.inner, made.turned, by_S, false, columns, z);
      for (int64_t i = z.powers - 1; i > 0; --i) {
        transpose(made.S[i - 1], pitch, z.padded, z.padded, again, pitch);
        multiply<F64>(by_S[i], pitch, again, pitch, by_S[i - 1], pitch, z.padded, z.padded, z.padded, true);
        multiply<F64>(again, pitch, by_S[i], pitch, by_S[i - 1], pitch, z.padded, z.padded, z.padded, true);
      }
      transpose(by_S[0], pitch, n, n, p.dA + d * n * n, n);
      std::memcpy(p.dB + d * n, by_X, size_t(n) * sizeof(double));
      std::memcpy(p.dC + d * n, by_R, size_t(n) * sizeof(double));
    }
  });
  return no_memory ? -3 : 0;
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_powers)(const ss_powers_args* a) { return powers(*a); }
extern "C" int32_t SS_KERNEL(ss_powers_backward)(const ss_powers_args* a) { return powers_backward(*a); }
