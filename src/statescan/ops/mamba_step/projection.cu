// y = x W^T for up to NR rows: the large products of a decoding step of many rows, whose time is that of reading W once.
//
// A block owns 64 outputs of all rows over KP columns (grid.y parts of the columns, each with a y of its own, which whoever
// reads y adds up). One warp streams 64 columns of W and of x at a time into a ring of shared memory by tensor copies, four
// multiply them (wgmma: W's rows are the 64 of its tile, x's rows its columns). W waits for nobody: the launch begins while
// the one in front still runs, and fills the ring with W before x is there. Sums are float32 and have one order: a row
// doesn't depend on its company.
//
// Compiled for sm_90a. Grid (outputs / 64, parts). Macros: IN (1 bfloat16, 2 float16), NR (64 or 128), KP (a multiple of 64),
// STAGES of the ring.
#define STEPS (KP / 64)
#define W_BYTES (64 * 128)
#define STAGE (W_BYTES + NR * 128)
#define OUT_ROW 72  // of the result in shared memory: 64 outputs, shifted
struct alignas(64) Map { u64 opaque[16]; };

DEV void fetch(u32 to, const Map& map, int column, int row, u64* b) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(address(b)) : "memory");
}
DEV void fetch(u32 to, const Map& map, int column, int row, u64* b, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;"
               ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(address(b)), "l"(policy) : "memory");
}
// Rows of 128 bytes, swizzled over 128 bytes, eight rows after eight.
DEV u64 descriptor(u32 at) { return (u64)((at & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62; }

#if IN == 1
#define KIND "bf16.bf16"
#else
#define KIND "f16.f16"
#endif
#define R4(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
DEV void multiply(float (&acc)[NR / 2], u64 a, u64 b) {
#if NR == 128
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." KIND " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, 0;}"
      : R16(0), R16(16), R16(32), R16(48) : "l"(a), "l"(b));
#else
  asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." KIND " {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0;}"
      : R16(0), R16(16) : "l"(a), "l"(b));
#endif
}

extern "C" __global__ void __launch_bounds__(160, 1) project(
    const __grid_constant__ Map w_map, const __grid_constant__ Map x_map, const float* __restrict__ bias, act* __restrict__ y,
    int rows, int outputs) {
  extern __shared__ __align__(1024) char memory[];
  u64 *full = reinterpret_cast<u64*>(memory + STAGES * STAGE), *empty = full + STAGES;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, o0 = blockIdx.x * 64, k0 = blockIdx.y * KP;
  const u32 ring = address(memory);
  asm volatile("griddepcontrol.launch_dependents;");
  if (tid == 0) {
    for (int i = 0; i < STAGES; i++) {
      bar_init(full + i, 1);
      bar_init(empty + i, 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();

  if (warp == 4) {
    if (lane == 0) {
      u64 once;
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
      auto fetch_w = [&](int s) {
        bar_expect(full + s % STAGES, STAGE);
        fetch(ring + s % STAGES * STAGE, w_map, k0 + s * 64, o0, full + s % STAGES, once);
      };
      for (int s = 0; s < STAGES && s < STEPS; s++) fetch_w(s);
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (int s = 0; s < STEPS; s++) {
        if (s >= STAGES) {
          bar_wait(empty + s % STAGES, (s / STAGES - 1) & 1);
          fetch_w(s);
        }
        fetch(ring + s % STAGES * STAGE + W_BYTES, x_map, k0 + s * 64, 0, full + s % STAGES);
      }
    }
    return;
  }

  float acc[NR / 2];
#pragma unroll
  for (int i = 0; i < NR / 2; i++) acc[i] = 0.f;
#pragma unroll 1
  for (int s = 0; s < STEPS; s++) {
    const int slot = s % STAGES;
    bar_wait(full + slot, s / STAGES & 1);
    const u64 a = descriptor(ring + slot * STAGE), b = descriptor(ring + slot * STAGE + W_BYTES);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int k = 0; k < 4; k++) multiply(acc, a + 2 * k, b + 2 * k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (s > 0 && lane == 0) bar_arrive(empty + (s - 1) % STAGES);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < NR / 2; i++) asm volatile("" : "+f"(acc[i])::"memory");
  if (bias && blockIdx.y == 0) {
    const float low = bias[o0 + warp * 16 + lane / 4], high = bias[o0 + warp * 16 + 8 + lane / 4];
#pragma unroll
    for (int i = 0; i < NR / 2; i += 4) { acc[i] += low; acc[i + 1] += low; acc[i + 2] += high; acc[i + 3] += high; }
  }
  // The ring is through: every copy for this block has been waited for. Rows of the result go together there.
  asm volatile("bar.sync 1, 128;" ::: "memory");
#pragma unroll
  for (int j = 0; j < NR / 8; j += 2) {
    const int m = lane / 8, n = (j + m / 2) * 8 + lane % 8;
    u32 v[4];
#pragma unroll
    for (int q = 0; q < 4; q++) v[q] = (u32)to_act(acc[j * 4 + q * 2]) | (u32)to_act(acc[j * 4 + q * 2 + 1]) << 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(ring + (n * OUT_ROW + warp * 16 + m % 2 * 8) * 2), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]) : "memory");
  }
  asm volatile("bar.sync 1, 128;" ::: "memory");
  act* const out = y + (i64)blockIdx.y * rows * outputs + o0;
#pragma unroll
  for (int i = 0; i < NR * 8 / 128; i++) {
    const int n = (tid + i * 128) / 8, o = tid % 8 * 8;
    if (n < rows) *reinterpret_cast<uint4*>(out + (i64)n * outputs + o) = *reinterpret_cast<const uint4*>(memory + (n * OUT_ROW + o) * 2);
  }
}
