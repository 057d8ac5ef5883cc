// Argument structs of mamba_step: one decoding step of a stack of Mamba blocks, and of the head after it.
#pragma once
#include <cstdint>

#include "packed_linear.h"

struct ss_block {
  ss_packed_matrix in_proj, x_proj, dt_proj, out_proj;  // dt_proj's bias is dt_bias
  const float* norm;                                    // (d_model,)
  const float* conv_weight;                             // (d_inner, width)
  const float* conv_bias;                               // (d_inner,) or nullptr
  const float* A;                                       // (d_inner, d_state), negative
  const float* D;                                       // (d_inner,) or nullptr
  double epsilon;
};

struct ss_step_args {
  int64_t batch, layers, threads, d_model, d_inner, d_state, dt_rank, width;
  const ss_block* blocks;
  const float* x;         // (batch, d_model)
  const float* residual;  // (batch, d_model) or nullptr
  float* conv_state;      // (layers, batch, width - 1, d_inner)
  float* ssm_state;       // (layers, batch, d_inner, d_state)
  float* output;          // (batch, d_model): of the last block
  float* residual_out;    // (batch, d_model): what the last block added to
  // The head: logits = head(norm(output + residual_out)); nullptr logits leave it out.
  ss_packed_matrix head;
  const float* head_norm;
  double head_epsilon;
  float* logits;  // (batch, head.rows)
};
