// Residual addition and RMS norm: one pass over memory. A row's sum is written, squared and, while it is still in the first
// cache, read again to be scaled. The backward needs of each row its sum and one number, 1/rms.
#include "add_norm.h"

#include <atomic>
#include <type_traits>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "statescan.h"

namespace {
using namespace ss;

constexpr int64_t kRowsOfSum = 64;  // rows of one partial sum of the weight's gradient, by shape alone

inline double to_double(double x) { return x; }
template <class S> inline double to_double(S x) { return to_float(x); }
inline void from_double(double x, double* p) { *p = x; }
template <class S> inline void from_double(double x, S* p) { from_float(float(x), p); }

// Float vectors of doubles and double vectors of floats are rare: lane by lane.
template <class C, bool Whole, class S>
inline Vec<C> load_any(const S* p, int n) {
  if constexpr (std::is_same_v<C, double> == std::is_same_v<S, double>) {
    return load<C, Whole>(p, n);
  } else {
    C part[Vec<C>::W] = {};
    for (int i = 0; i < n; ++i) part[i] = C(to_double(p[i]));
    return Vec<C>::load(part);
  }
}
template <class C, bool Whole, class S>
inline void store_any(S* p, Vec<C> v, int n) {
  if constexpr (std::is_same_v<C, double> == std::is_same_v<S, double>) {
    store<Whole>(p, v, n);
  } else {
    C part[Vec<C>::W];
    v.store(part);
    for (int i = 0; i < n; ++i) from_double(double(part[i]), p + i);
  }
}

// Loads and stores by a dtype known at run time: the branch goes the same way every time, and memory is what takes the time.
template <class C, bool Whole>
inline Vec<C> load_as(int32_t dtype, const void* p, int64_t i, int n) {
  switch (dtype) {
    case SS_BF16: return load_any<C, Whole>(static_cast<const bf16*>(p) + i, n);
    case SS_F16: return load_any<C, Whole>(static_cast<const f16*>(p) + i, n);
    case SS_F64: return load_any<C, Whole>(static_cast<const double*>(p) + i, n);
    default: return load_any<C, Whole>(static_cast<const float*>(p) + i, n);
  }
}
template <class C, bool Whole>
inline void store_as(int32_t dtype, void* p, int64_t i, Vec<C> v, int n) {
  switch (dtype) {
    case SS_BF16: return store_any<C, Whole>(static_cast<bf16*>(p) + i, v, n);
    case SS_F16: return store_any<C, Whole>(static_cast<f16*>(p) + i, v, n);
    case SS_F64: return store_any<C, Whole>(static_cast<double*>(p) + i, v, n);
    default: return store_any<C, Whole>(static_cast<float*>(p) + i, v, n);
  }
}
inline int64_t bytes_of(int32_t dtype) { return dtype == SS_F64 ? 8 : dtype == SS_F32 ? 4 : 2; }

inline const void* row_of(const void* p, int32_t dtype, int64_t offset) {
  return p ? static_cast<const char*>(p) + offset * bytes_of(dtype) : nullptr;
}
inline void* row_of(void* p, int32_t dtype, int64_t offset) {
  return p ? static_cast<char*>(p) + offset * bytes_of(dtype) : nullptr;
}

template <class C>
constexpr int64_t whole_part(int64_t d) { return d / Vec<C>::W * Vec<C>::W; }

// One row: pointers at its start.
struct Row {
  const void *x, *residual, *grad_output, *grad_stream;
  void *stream, *output, *grad_x, *grad_residual;
};

template <class C, bool Whole>
inline Vec<C> sum_at(const ss_norm_args& a, const Row& r, int64_t c, int n) {
  const Vec<C> x = load_as<C, Whole>(a.x_dtype, r.x, c, n);
  Vec<C> v = r.residual ? x + load_as<C, Whole>(a.residual_dtype, r.residual, c, n) : x;
  if (r.stream) {
    store_as<C, Whole>(a.stream_dtype, r.stream, c, v, n);
    // What is normalised is the sum as it goes on. The fence keeps the compiler from reusing the unrounded value: GCC 12
    // does that for doubles stored as floats (-O3, gone with -fno-tree-pre).
    std::atomic_signal_fence(std::memory_order_seq_cst);
    v = load_as<C, Whole>(a.stream_dtype, r.stream, c, n);
  }
  return v;
}

template <class C, bool Whole>
inline void scale_at(const ss_norm_args& a, const Row& r, int64_t c, int n, Vec<C> rstd) {
  const Vec<C> v = r.stream ? load_as<C, Whole>(a.stream_dtype, r.stream, c, n) : load_as<C, Whole>(a.x_dtype, r.x, c, n);
  const Vec<C> w = load<C, Whole>(static_cast<const C*>(a.weight) + c, n);
  store_as<C, Whole>(a.x_dtype, r.output, c, v * rstd * w, n);
}

template <class C>
int32_t forward_run(const ss_norm_args& a) {
  const int64_t d = a.features, whole = whole_part<C>(d);
  constexpr int N = Vec<C>::W;
  ss::parallel(a.rows, 16, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Row r{};
      r.x = row_of(a.x, a.x_dtype, i * a.x_row);
      r.residual = row_of(a.residual, a.residual_dtype, i * a.residual_row);
      r.stream = row_of(a.stream, a.stream_dtype, i * d);
      r.output = row_of(a.output, a.x_dtype, i * d);
      // Four running sums, so that the additions don't wait for one another; which lane adds what depends on d alone.
      Vec<C> squares[4] = {Vec<C>::zero(), Vec<C>::zero(), Vec<C>::zero(), Vec<C>::zero()};
      int64_t c = 0;
      for (; c + 4 * N <= whole; c += 4 * N)
        for (int j = 0; j < 4; ++j) {
          const Vec<C> v = sum_at<C, true>(a, r, c + j * N, N);
          squares[j] = fma(v, v, squares[j]);
        }
      for (; c < whole; c += N) {
        const Vec<C> v = sum_at<C, true>(a, r, c, N);
        squares[0] = fma(v, v, squares[0]);
      }
      if (c < d) {
        const Vec<C> v = sum_at<C, false>(a, r, c, int(d - c));
        squares[1] = fma(v, v, squares[1]);
      }
      const C mean = sum(squares[0] + squares[1] + (squares[2] + squares[3])) / C(d);
      const C rstd = C(1) / C(sqrt(mean + C(a.eps)));
      static_cast<C*>(a.rstd)[i] = rstd;
      const Vec<C> scale = Vec<C>::set(rstd);
      for (c = 0; c < whole; c += N) scale_at<C, true>(a, r, c, N, scale);
      if (c < d) scale_at<C, false>(a, r, c, int(d - c), scale);
    }
  });
  return 0;
}

// With v the row's sum, h = v * rstd and q = grad_output * weight: grad_weight += grad_output * h, and the row's gradient is
// rstd * (q - h * mean(q * h)) + grad_stream.
template <class C, bool Whole>
inline Vec<C> dot_at(const ss_norm_args& a, const Row& r, int64_t c, int n, Vec<C> rstd, C* sums, Vec<C> dot) {
  const Vec<C> h = load_as<C, Whole>(a.stream_dtype, r.x, c, n) * rstd;
  const Vec<C> gh = load_as<C, Whole>(a.x_dtype, r.grad_output, c, n) * h;
  store<Whole>(sums + c, load<C, Whole>(sums + c, n) + gh, n);
  return fma(gh, load<C, Whole>(static_cast<const C*>(a.weight) + c, n), dot);
}

template <class C, bool Whole>
inline void grad_at(const ss_norm_args& a, const Row& r, int64_t c, int n, Vec<C> rstd, Vec<C> mean) {
  const Vec<C> h = load_as<C, Whole>(a.stream_dtype, r.x, c, n) * rstd;
  const Vec<C> w = load<C, Whole>(static_cast<const C*>(a.weight) + c, n);
  const Vec<C> q = load_as<C, Whole>(a.x_dtype, r.grad_output, c, n) * w;
  Vec<C> g = rstd * (q - h * mean);
  if (r.grad_stream) g = g + load_as<C, Whole>(a.stream_dtype, r.grad_stream, c, n);
  store_as<C, Whole>(a.x_dtype, r.grad_x, c, g, n);
  if (r.grad_residual) store_as<C, Whole>(a.residual_dtype, r.grad_residual, c, g, n);
}

template <class C>
int32_t backward_run(const ss_norm_args& a) {
  const int64_t d = a.features, whole = whole_part<C>(d), groups = (a.rows + kRowsOfSum - 1) / kRowsOfSum;
  constexpr int N = Vec<C>::W;
  Scratch<C> sums(groups * d, true);
  if (!sums.ok()) return -3;
  ss::parallel(groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      C* own = sums.data + group * d;
      const int64_t end = (group + 1) * kRowsOfSum < a.rows ? (group + 1) * kRowsOfSum : a.rows;
      for (int64_t i = group * kRowsOfSum; i < end; ++i) {
        Row r{};
        r.x = row_of(a.x, a.stream_dtype, i * a.x_row);
        r.grad_output = row_of(a.grad_output, a.x_dtype, i * a.grad_output_row);
        r.grad_stream = row_of(a.grad_stream, a.stream_dtype, i * a.grad_stream_row);
        r.grad_x = row_of(a.grad_x, a.x_dtype, i * d);
        r.grad_residual = row_of(a.grad_residual, a.residual_dtype, i * d);
        const Vec<C> rstd = Vec<C>::set(static_cast<const C*>(a.rstd)[i]);
        Vec<C> dots[4] = {Vec<C>::zero(), Vec<C>::zero(), Vec<C>::zero(), Vec<C>::zero()};
        int64_t c = 0;
        for (; c + 4 * N <= whole; c += 4 * N)
          for (int j = 0; j < 4; ++j) dots[j] = dot_at<C, true>(a, r, c + j * N, N, rstd, own, dots[j]);
        for (; c < whole; c += N) dots[0] = dot_at<C, true>(a, r, c, N, rstd, own, dots[0]);
        if (c < d) dots[1] = dot_at<C, false>(a, r, c, int(d - c), rstd, own, dots[1]);
        const Vec<C> mean = Vec<C>::set(sum(dots[0] + dots[1] + (dots[2] + dots[3])) / C(d));
        for (c = 0; c < whole; c += N) grad_at<C, true>(a, r, c, N, rstd, mean);
        if (c < d) grad_at<C, false>(a, r, c, int(d - c), rstd, mean);
      }
    }
  });
  C* grad_weight = static_cast<C*>(a.grad_weight);
  ss::parallel(d, 64, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      double total = 0;
      for (int64_t group = 0; group < groups; ++group) total += double(sums[group * d + c]);
      grad_weight[c] = C(total);
    }
  });
  return 0;
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_add_rms_norm)(const ss_norm_args* a) {
  return a->wide ? forward_run<double>(*a) : forward_run<float>(*a);
}
extern "C" int32_t SS_KERNEL(ss_add_rms_norm_backward)(const ss_norm_args* a) {
  return a->wide ? backward_run<double>(*a) : backward_run<float>(*a);
}
