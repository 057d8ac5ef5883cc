// One step of the selective scan, for decoding: h = exp(dt A) h + dt u B, y = C . h + D u, y *= silu(z).
//
// States lie (batch, channels, states), so a vector holds neighbouring states of one channel; the sums over states of W
// channels are turned into one vector. A step reads and writes each state once: it runs at the memory's speed.
#include "parallel.h"
#include "selective_scan.h"
#include "simd.h"

namespace {
using namespace ss;

template <class S, class R> struct Update {
  using V = typename VectorOf<R>::type;
  const ss_update_args& p;

  static const S* at(const void* base, int64_t offset) { return static_cast<const S*>(base) + offset; }
  static V read(const S* q, int64_t left) { return left >= V::W ? V::load(q) : V::load(q, left); }

  // Row's channels [c, c + W) or as many as `width` says.
  void channels(int64_t row, int64_t c, int64_t width) const {
    const int64_t n = p.states;
    V u = read(at(p.u, row * p.u_batch + c), width), dt = read(at(p.dt, row * p.dt_batch + c), width);
    if (p.dt_bias) dt = dt + V::load(static_cast<const R*>(p.dt_bias) + c, width < V::W ? width : V::W);
    if (p.softplus) dt = softplus(dt);
    R dts[V::W], dtus[V::W], sums[V::W];
    dt.store(dts), (dt * u).store(dtus);
    for (int64_t i = 0; i < width; ++i) {
      const int64_t channel = c + i, at_state = (row * p.channels + channel) * n;
      const R* A = static_cast<const R*>(p.A) + channel * n;
      const R* h = static_cast<const R*>(p.state) + at_state;
      R* out = static_cast<R*>(p.new_state) + at_state;
      const V step = V::set(dts[i]), input = V::set(dtus[i]);
      V total = V::zero();
      for (int64_t k = 0; k < n; k += V::W) {
        const int64_t left = n - k;
        V b = vector_of(p.B, p.b_fixed, channel, row * p.b_batch + channel / (p.channels / p.b_groups) * p.b_group, k, left);
        V a = step * (left >= V::W ? V::load(A + k) : V::load(A + k, left)) * V::set(DecayRange<V>::scale);
        V old = left >= V::W ? V::load(h + k) : V::load(h + k, left);
        V state = fma(exp_decay_any(a), old, input * b);
        left >= V::W ? state.store(out + k) : state.store(out + k, left);
        V c_row = vector_of(p.C, p.c_fixed, channel, row * p.c_batch + channel / (p.channels / p.c_groups) * p.c_group, k, left);
        // Lanes beyond the states must not count even where the step is not finite.
        total = total + (left >= V::W ? c_row * state : kept(c_row * state, left));
      }
      sums[i] = sum(total);
    }
    V y = V::load(sums, width < V::W ? width : V::W);
    if (p.D) y = fma(V::load(static_cast<const R*>(p.D) + c, width < V::W ? width : V::W), u, y);
    if (p.z) y = y * silu(read(at(p.z, row * p.z_batch + c), width));
    S* to = static_cast<S*>(p.y) + row * p.channels + c;
    width >= V::W ? y.store(to) : y.store(to, width);
  }

  V vector_of(const void* base, bool fixed, int64_t channel, int64_t offset, int64_t k, int64_t left) const {
    if (fixed) {
      const R* q = static_cast<const R*>(base) + channel * p.states + k;
      return left >= V::W ? V::load(q) : V::load(q, left);
    }
    return read(at(base, offset + k), left);
  }
  static V kept(V v, int64_t left) {
    R lanes[V::W];
    v.store(lanes);
    return V::load(lanes, left);
  }
};

template <class S, class R> int32_t run(const ss_update_args& p) {
  Update<S, R> update{p};
  constexpr int64_t W = Update<S, R>::V::W;
  const int64_t vectors = (p.channels + W - 1) / W;
  // A thread is woken for 16K states or more.
  const int64_t grain = 16384 / (W * p.states) + 1;
  parallel(p.batch * vectors, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = i % vectors * W;
      update.channels(i / vectors, c, p.channels - c < W ? p.channels - c : W);
    }
  });
  return 0;
}

}  // namespace

extern "C" int32_t SS_KERNEL(ss_selective_state_update)(const ss_update_args* args) {
  switch (args->dtype) {
    case SS_F32: return run<float, float>(*args);
    case SS_BF16: return run<bf16, float>(*args);
    case SS_F16: return run<f16, float>(*args);
    case SS_F64: return run<double, double>(*args);
  }
  return -1;
}
