// One decoding step of a stack of Mamba blocks in a single parallel region.
//
// A step is a chain of small phases (four a block), each waiting for the one before. Opening a parallel region for each
// would cost some microseconds a time, 98 times at 24 blocks; here the threads stay, and hand over by two counters a
// phase (see Phase). What every thread needs whole and is cheap, the normalised input, each computes for itself.
#include <cstdlib>
#include <new>

#include "mamba_step.h"
#include "packed_rows.h"
#include "parallel.h"

namespace ss {
inline namespace SS_ISA {
namespace {

// out = (x + residual) / rms * weight; the sum goes to `stream` where it is not nullptr.
void add_norm(const float* x, const float* residual, const float* weight, double epsilon, int64_t n, float* out,
              float* stream) {
  constexpr int W = F32::W;
  F32 squares = F32::zero();
  for (int64_t i = 0; i < n; i += W) {
    const int64_t m = n - i < W ? n - i : W;
    F32 s = F32::load(x + i, m);
    if (residual) s = s + F32::load(residual + i, m);
    s.store(out + i, m);
    if (stream) s.store(stream + i, m);
    squares = fma(s, s, squares);
  }
  const F32 scale = F32::set(1.0f / std::sqrt(sum(squares) / float(n) + float(epsilon)));
  for (int64_t i = 0; i < n; i += W) {
    const int64_t m = n - i < W ? n - i : W;
    (F32::load(out + i, m) * scale * F32::load(weight + i, m)).store(out + i, m);
  }
}

// The convolution's step for channels [begin, end) of one row: u becomes silu(conv(u)), the state moves on.
void conv_step(const ss_block& w, int64_t width, int64_t d_inner, int64_t begin, int64_t end, float* u, float* state) {
  constexpr int64_t kTile = 64;
  constexpr int W = F32::W;
  for (int64_t c0 = begin; c0 < end; c0 += kTile) {
    const int64_t n = end - c0 < kTile ? end - c0 : kTile;
    const float* weight = w.conv_weight + c0 * width;
    float total[kTile];
    for (int64_t c = 0; c < n; ++c) total[c] = w.conv_bias ? w.conv_bias[c0 + c] : 0.0f;
    for (int64_t k = 0; k + 1 < width; ++k) {
      float* past = state + k * d_inner + c0;
      const float* next = k + 2 < width ? past + d_inner : u + c0;
      for (int64_t c = 0; c < n; ++c) {
        total[c] += weight[c * width + k] * past[c];
        past[c] = next[c];
      }
    }
    for (int64_t c = 0; c < n; ++c) total[c] += weight[c * width + width - 1] * u[c0 + c];
    for (int64_t c = 0; c < n; c += W) silu(F32::load(total + c, n - c < W ? n - c : W)).store(u + c0 + c, n - c < W ? n - c : W);
  }
}

// The recurrence's step for channels [begin, end) of one row; dt already has its bias. y may be u's place.
void state_step(const ss_block& w, int64_t d_state, int64_t begin, int64_t end, const float* u, const float* gate,
                const float* dt_raw, const float* B, const float* C, float* state, float* y) {
  constexpr int W = F32::W;
  for (int64_t c0 = begin; c0 < end; c0 += W) {
    const int64_t n = end - c0 < W ? end - c0 : W;
    float dt[W], dtu[W], dots[W];
    const F32 step = softplus(F32::load(dt_raw + c0, n));
    step.store(dt);
    (step * F32::load(u + c0, n)).store(dtu);
    for (int64_t c = 0; c < n; ++c) {
      const float* A = w.A + (c0 + c) * d_state;
      float* h = state + (c0 + c) * d_state;
      F32 dot = F32::zero();
      for (int64_t s = 0; s < d_state; s += W) {
        const int64_t m = d_state - s < W ? d_state - s : W;
        const F32 decay = exp(F32::set(dt[c]) * F32::load(A + s, m));
        const F32 now = fma(decay, F32::load(h + s, m), F32::set(dtu[c]) * F32::load(B + s, m));
        now.store(h + s, m);
        dot = fma(now, F32::load(C + s, m), dot);
      }
      dots[c] = sum(dot);
    }
    for (int64_t c = n; c < W; ++c) dots[c] = 0.0f;
    F32 result = F32::load(dots);
    if (w.D) result = fma(F32::load(w.D + c0, n), F32::load(u + c0, n), result);
    (result * F32::load(gate + c0, n)).store(y + c0, n);
  }
}

int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace
}  // namespace SS_ISA
}  // namespace ss

extern "C" int32_t SS_KERNEL(ss_mamba_step)(const ss_step_args* a) {
  using namespace ss;
  const int64_t batch = a->batch, d_model = a->d_model, d_inner = a->d_inner, d_state = a->d_state, rank = a->dt_rank;
  const int64_t width = a->width, threads = a->threads, layers = a->layers, select = rank + 2 * d_state;
  const int64_t model_row = padded(d_model), inner_row = padded(2 * d_inner), select_row = padded(select);
  const int64_t dt_row = padded(d_inner);

  // One block: shared activations (block inputs twice, residuals twice, xz, dt/B/C, dt, y), each thread's normed input.
  const int64_t floats = batch * (4 * model_row + inner_row + select_row + 2 * dt_row + threads * model_row);
  const int64_t phases = layers * 4 + 1;
  char* memory = static_cast<char*>(std::malloc(size_t(floats) * sizeof(float) + size_t(phases) * sizeof(Phase) + 128));
  if (!memory) return -3;
  char* place = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  Phase* phase = reinterpret_cast<Phase*>(place);
  for (int64_t i = 0; i < phases; ++i) new (phase + i) Phase;
  float* next = reinterpret_cast<float*>(place + size_t(phases) * sizeof(Phase));
  auto take = [&](int64_t row) {
    float* taken = next;
    next += batch * row;
    return taken;
  };
  float* const xs[2] = {take(model_row), take(model_row)};
  float* const residuals[2] = {take(model_row), take(model_row)};
  float* const xz = take(inner_row);
  float* const selected = take(select_row);
  float* const dt = take(dt_row);
  float* const y = take(dt_row);
  float* const normed_all = next;

  auto work = [&](int64_t thread) {
    float* normed = normed_all + thread * batch * model_row;
    // What goes into the norm of block i (i == layers: of the head): the caller's arrays first, then the ping-pong ones.
    auto norm_rows = [&](int64_t i, const float* weight, double epsilon, float* stream, int64_t stream_row) {
      for (int64_t b = 0; b < batch; ++b) {
        const float* x = i ? xs[(i + 1) % 2] + b * model_row : a->x + b * d_model;
        const float* residual = i ? residuals[(i + 1) % 2] + b * model_row : (a->residual ? a->residual + b * d_model : nullptr);
        add_norm(x, residual, weight, epsilon, d_model, normed + b * model_row, stream ? stream + b * stream_row : nullptr);
      }
    };
    for (int64_t i = 0; i < layers; ++i) {
      const ss_block& w = a->blocks[i];
      float* conv_state = a->conv_state + i * batch * (width - 1) * d_inner;
      float* ssm_state = a->ssm_state + i * batch * d_inner * d_state;
      // The thread that takes the first rows also writes the sum; the others read only their own copy.
      norm_rows(i, w.norm, w.epsilon, nullptr, 0);
      phase[4 * i].run(2 * d_inner, 8, threads, [&](int64_t begin, int64_t end) {
        if (begin == 0) norm_rows(i, w.norm, w.epsilon, residuals[i % 2], model_row);
        dot_rows(w.in_proj, begin, end, normed, model_row, batch, xz, inner_row);
        for (int64_t b = 0; b < batch; ++b) {
          float* row = xz + b * inner_row;
          if (begin < d_inner)
            conv_step(w, width, d_inner, begin, end < d_inner ? end : d_inner, row, conv_state + b * (width - 1) * d_inner);
          for (int64_t c = begin > d_inner ? begin : d_inner; c < end; c += F32::W) {
            const int64_t n = end - c < F32::W ? end - c : F32::W;
            silu(F32::load(row + c, n)).store(row + c, n);
          }
        }
      });
      phase[4 * i + 1].run(select, 2, threads, [&](int64_t begin, int64_t end) {
        dot_rows(w.x_proj, begin, end, xz, inner_row, batch, selected, select_row);
      });
      phase[4 * i + 2].run(d_inner, 32, threads, [&](int64_t begin, int64_t end) {
        dot_rows(w.dt_proj, begin, end, selected, select_row, batch, dt, dt_row);
        for (int64_t b = 0; b < batch; ++b) {
          const float* row = xz + b * inner_row;
          const float* sel = selected + b * select_row;
          state_step(w, d_state, begin, end, row, row + d_inner, dt + b * dt_row, sel + rank, sel + rank + d_state,
                     ssm_state + b * d_inner * d_state, y + b * dt_row);
        }
      });
      phase[4 * i + 3].run(d_model, 4, threads, [&](int64_t begin, int64_t end) {
        dot_rows(w.out_proj, begin, end, y, dt_row, batch, xs[i % 2], model_row);
      });
    }
    if (a->logits) {
      norm_rows(layers, a->head_norm, a->head_epsilon, nullptr, 0);
      phase[4 * layers].run(a->head.rows, 16, threads, [&](int64_t begin, int64_t end) {
        dot_rows(a->head, begin, end, normed, model_row, batch, a->logits, a->head.rows);
      });
    }
  };
  ss::parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) work(thread);
  });
  for (int64_t b = 0; b < batch; ++b) {
    if (a->output) std::memcpy(a->output + b * d_model, xs[(layers + 1) % 2] + b * model_row, size_t(d_model) * sizeof(float));
    if (a->residual_out)
      std::memcpy(a->residual_out + b * d_model, residuals[(layers + 1) % 2] + b * model_row, size_t(d_model) * sizeof(float));
  }
  std::free(memory);
  return 0;
}
