// Arguments of the fused residual addition and RMS norm; mirrored in src/statescan/ops/add_norm/cpu.py.
// Strides are in elements between rows; the last axis is contiguous. dtypes are ss_dtype; sums are taken in double where
// `wide` is set, else in float, and weight, rstd and grad_weight have that dtype.
#pragma once
#include <cstdint>

struct ss_norm_args {
  int64_t rows, features;
  double eps;
  int32_t wide, x_dtype, residual_dtype, stream_dtype;
  const void* x;
  int64_t x_row;
  const void* residual;  // or null
  int64_t residual_row;
  const void* weight;
  // forward: written, contiguous
  void* stream;  // the sum in stream_dtype, or null where x itself is the sum
  void* output;  // in x_dtype
  void* rstd;    // (rows,)
  // backward: x is the sum as it was normalised (in stream_dtype), rstd is read
  const void* grad_output;  // in x_dtype
  int64_t grad_output_row;
  const void* grad_stream;  // in stream_dtype, or null
  int64_t grad_stream_row;
  void* grad_x;         // contiguous, in x_dtype
  void* grad_residual;  // contiguous, in residual_dtype, or null
  void* grad_weight;    // (features,)
};
