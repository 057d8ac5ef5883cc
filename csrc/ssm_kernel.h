// Arguments of the Vandermonde and the Cauchy product and of the powers of dense matrices; mirrored in src/statescan/ops/ssm_kernel/cpu_products.py. All contiguous.
#pragma once
#include <cstdint>

// K[d, l] = Re(sum_n w[d, n] z^l), z = exp(log[d, n]); backwards s0 = sum_l g[d, l] z^l, s1 = sum_l l g[d, l] z^l.
struct ss_vandermonde_args {
  int64_t channels, states, length;
  const double *log_re, *log_im;          // (channels, states)
  const float *w_re, *w_im;               // (channels, states), forward
  float* kernel;                          // (channels, length), forward
  const float* grad;                      // (channels, length), backward
  float *s0_re, *s0_im, *s1_re, *s1_im;   // (channels, states), backward
};

// out[d, s, k] = sum_n v[d, s, n] / (i y[k] - c[k] lam[d, n]) + conj(v) / (i y - c conj(lam)); backwards the derivatives of
// sum(grad_re out_re + grad_im out_im).
struct ss_cauchy_args {
  int64_t channels, sums, states, points;
  const float *lam_re, *lam_im;                 // (channels, states)
  const float *v_re, *v_im;                     // (channels, sums, states)
  const float *y, *c;                           // (points,)
  float *out_re, *out_im;                       // (channels, sums, points), forward
  const float *grad_re, *grad_im;               // (channels, sums, points), backward
  float *dlam_re, *dlam_im, *dv_re, *dv_im;     // as lam and v, backward
};

// K[d, l] = C[d] A[d]^l B[d], l = a T + b; backwards the derivatives of sum(grad K).
struct ss_powers_args {
  int64_t channels, states, length;
  int64_t bits;                    // T = 1 << bits
  const double *A, *B, *C;         // (channels, states, states), (channels, states), (channels, states)
  float* kernel;                   // (channels, length), forward
  const float* grad;               // (channels, length), backward
  double *dA, *dB, *dC;            // as A, B, C, backward
};
