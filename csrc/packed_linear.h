// Argument structs of packed_linear. A packed matrix is row-major and contiguous, one row an output.
#pragma once
#include <cstdint>

struct ss_packed_matrix {
  int64_t rows, columns;
  const void* data;    // float, bf16 or int8, as dtype says
  const float* scale;  // (rows,) for int8, else nullptr
  const float* bias;   // (rows,) or nullptr
  int64_t dtype;       // ss_dtype: SS_F32, SS_BF16, SS_I8
};

struct ss_linear_args {
  ss_packed_matrix matrix;
  int64_t batch, threads;
  const float* x;  // (batch, columns), rows x_row apart
  int64_t x_row;
  float* y;  // (batch, rows), contiguous
};
