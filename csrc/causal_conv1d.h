// Arguments of the causal convolution; mirrored in src/statescan/ops/causal_conv1d/cpu.py.
// Strides are in elements; the channel axis of x, grad_y and the states is contiguous. Weights and their gradients are in
// the compute dtype (double for SS_F64, else float).
#pragma once
#include <cstdint>

struct ss_conv_args {
  int64_t batch, length, features, width, sequences;  // sequences: of cu_seqlens, else equal to batch
  int32_t dtype, silu;
  const void* x;
  int64_t x_batch, x_row;
  const void* weight;  // (features, width)
  int64_t weight_channel, weight_tap;
  const void* bias;  // (features,) contiguous, or null
  const void* initial_state;  // (sequences, width-1, features), or null
  int64_t initial_batch, initial_row;
  const int64_t* cu_seqlens;  // (sequences + 1,), or null
  // forward: written, contiguous
  void* y;
  void* final_state;
  // backward
  const void* grad_y;
  int64_t grad_y_batch, grad_y_row;
  const void* grad_final_state;  // contiguous, or null
  void* grad_x;                  // contiguous
  void* grad_weight;             // (features, width) contiguous
  void* grad_bias;               // (features,), or null
  void* grad_initial_state;      // contiguous, or null
};
