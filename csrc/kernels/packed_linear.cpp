// y = x W^T + bias for a few rows of x and a packed W.
#include "packed_rows.h"
#include "parallel.h"

extern "C" int32_t SS_KERNEL(ss_packed_linear)(const ss_linear_args* a) {
  using namespace ss;
  const ss_packed_matrix& m = a->matrix;
  if (m.dtype != SS_F32 && m.dtype != SS_BF16 && m.dtype != SS_I8) return -1;
  // Below some 32 KB of weights waking a thread costs more than it brings; the results are the same.
  const int64_t threads = m.rows * m.columns * a->batch < 32768 ? 1 : a->threads;
  Phase phase;
  ss::parallel(threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      phase.run(m.rows, 4, threads, [&](int64_t first, int64_t last) {
        dot_rows(m, first, last, a->x, a->x_row, a->batch, a->y, m.rows);
      });
  });
  return 0;
}
