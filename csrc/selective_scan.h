// Arguments of the selective scan's and the state update's kernels; mirrored by ctypes structures in
// src/statescan/ops/selective_scan/cpu.py and selective_state_update/cpu.py. Absent tensors are null.
#pragma once
#include "statescan.h"

// R is the state's type: double where dtype is SS_F64, else float. S is the activations' type, named by dtype.
struct ss_scan_args {
  int64_t dtype, softplus, b_fixed, c_fixed;
  int64_t batch, length, channels, states, b_groups, c_groups;
  int64_t sequences;  // batch, or what cu_seqlens holds
  int64_t chunk;      // positions between two checkpoints
  int64_t threads;    // that will share the work: sizes tasks, changes no result
  // Strides in elements; the last axis of every tensor is contiguous.
  int64_t u_batch, u_step, dt_batch, dt_step, z_batch, z_step, dy_batch, dy_step;
  int64_t b_batch, b_step, b_group, c_batch, c_step, c_group;
  const void* u;        // S (batch, length, channels)
  const void* dt;       // S, as u
  const void* z;        // S, as u
  const void* B;        // S (batch, length, b_groups, states), or where b_fixed R (channels, states), contiguous
  const void* C;        // likewise
  const void* A;        // R (channels, states), contiguous
  const void* D;        // R (channels)
  const void* dt_bias;  // R (channels)
  const void* initial;  // R (sequences, channels, states), contiguous
  const int32_t* cu_seqlens;
  // forward
  void* y;            // S, contiguous
  void* final_state;  // R (sequences, channels, states)
  void* checkpoints;  // R (slots, states, channels): the state before each chunk; see checkpoint_slot
  // backward: gradients of the results, then of the inputs (contiguous; activations in S, the rest in R)
  const void* dy;
  const void* dfinal;
  void *du, *ddt, *dz, *dB, *dC, *dA, *dD, *ddt_bias, *dinitial;
};

struct ss_update_args {
  int64_t dtype, softplus, b_fixed, c_fixed;
  int64_t batch, channels, states, b_groups, c_groups;
  int64_t u_batch, dt_batch, z_batch, b_batch, b_group, c_batch, c_group;
  const void *u, *dt, *z, *B, *C, *A, *D, *dt_bias, *state;
  void *y, *new_state;  // new_state may be state itself
};
