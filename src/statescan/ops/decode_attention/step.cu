// What stands around attention in a Transformer's step: norms of the residual stream, and products with one row's
// activations, whose time is that of reading the weights once.
// Macros: C columns of the stream, C1 and C2 columns of the two inputs that are summed (C2 0: one), WT the weights' type
// (as IN), LAYER (norm by mean and variance, else by root mean square), PAIR (a second norm and product of the same
// stream), ACT of the second (or only) product: 0 none, 1 GELU, 2 SiLU of a row times the row `rows` further.
#ifndef C
#define C 2048
#endif
#ifndef C1
#define C1 2048
#endif
#ifndef C2
#define C2 8192
#endif
#ifndef WT
#define WT 1
#endif
#ifndef LAYER
#define LAYER 1
#endif
#ifndef PAIR
#define PAIR 1
#endif
#ifndef ACT
#define ACT 1
#endif

constexpr int NT = 256, WARPS = NT / 32;
typedef Stored<WT>::type weight;
struct alignas(16) Quad { float v[4]; };
struct alignas(16) Eight { weight v[8]; };

// A weight is read once: its lines are not kept.
DEV Eight load_eight(const weight* p) {
  Eight r;
#pragma unroll
  for (int i = 0; i < (int)sizeof(Eight) / 16; i++) {
    uint4& to = reinterpret_cast<uint4*>(&r)[i];
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "l"(reinterpret_cast<const uint4*>(p) + i));
  }
  return r;
}

DEV float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o /= 2) x += __shfl_xor_sync(~0u, x, o);
  return x;
}
DEV float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) total += scratch[i];
  return total;
}

// An input of N numbers in shared memory: the first four of every eight, then the second four, so that neighbouring lanes
// read neighbouring banks.
template <int N> struct Input { Quad half[2][N / 8]; };
template <int N> DEV void put(Input<N>& to, int quad, const Quad& value) { to.half[quad % 2][quad / 2] = value; }

// This lane's part of a weight's row times an input.
template <int N> DEV float lane_dot(const weight* row, const Input<N>& x, int lane) {
  constexpr int UNITS = N / 8, ROUNDS = (UNITS + 31) / 32, GO = ROUNDS < 8 ? ROUNDS : 8;
  float sum = 0.f;
#pragma unroll 1
  for (int r = 0; r < ROUNDS; r += GO) {
    Eight w[GO];
#pragma unroll
    for (int j = 0; j < GO; j++) {
      const int u = (r + j) * 32 + lane;
      if (u < UNITS) w[j] = load_eight(row + u * 8);
    }
#pragma unroll
    for (int j = 0; j < GO; j++) {
      const int u = (r + j) * 32 + lane;
      if (u < UNITS) {
        const Quad a = x.half[0][u], b = x.half[1][u];
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(wide<WT>(w[j].v[i]), a.v[i], sum);
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(wide<WT>(w[j].v[4 + i]), b.v[i], sum);
      }
    }
  }
  return sum;
}

// The stream's numbers less their mean (LAYER), this thread's part, and by what they are to be multiplied.
constexpr int PARTS = (C / 4 + NT - 1) / NT;
DEV float centre(const float* stream, Quad* part, float epsilon, float* scratch) {
  float sum = 0.f, squares = 0.f, mean = 0.f;
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int quad = threadIdx.x + i * NT;
    if (quad < C / 4) part[i] = reinterpret_cast<const Quad*>(stream)[quad];
    else part[i] = Quad{0.f, 0.f, 0.f, 0.f};
    if (LAYER) sum += part[i].v[0] + part[i].v[1] + part[i].v[2] + part[i].v[3];
  }
  if (LAYER) mean = block_sum(sum, scratch) * (1.f / C);
#pragma unroll
  for (int i = 0; i < PARTS; i++)
    if (int(threadIdx.x) + i * NT < C / 4)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        part[i].v[j] -= mean;
        squares = fmaf(part[i].v[j], part[i].v[j], squares);
      }
  return rsqrtf(block_sum(squares, scratch) * (1.f / C) + epsilon);
}
DEV Quad normed(const Quad& part, float scale, const float* gain, const float* bias, int quad) {
  const Quad g = reinterpret_cast<const Quad*>(gain)[quad];
  Quad y, b = {0.f, 0.f, 0.f, 0.f};
  if (LAYER) b = reinterpret_cast<const Quad*>(bias)[quad];
#pragma unroll
  for (int j = 0; j < 4; j++) y.v[j] = fmaf(part.v[j] * scale, g.v[j], b.v[j]);
  return y;
}

DEV float gelu(float x) { return 0.5f * x * (1.f + erff(x * 0.70710678118654752f)); }

// first = W1 norm1(stream) + b1, second = act(W2 norm2(stream) + b2); without PAIR the second alone, of norm1.
extern "C" __global__ void __launch_bounds__(256)
normed_products(const float* stream, float epsilon, const float* gain1, const float* bias1, const float* gain2,
                const float* bias2, const weight* w1, const float* b1, float* first, int rows1, const weight* w2,
                const float* b2, float* second, int rows2) {
  __shared__ Input<C> x1;
  __shared__ Input<PAIR ? C : 8> x2;
  __shared__ float scratch[WARPS];
  const int lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32, warps = gridDim.x * WARPS;
  const int count = (PAIR ? rows1 : 0) + rows2;
  // The weights don't wait for the norm.
  if (warp < count) {
    const weight* row = PAIR && warp < rows1 ? w1 + i64(warp) * C : w2 + i64(warp - (PAIR ? rows1 : 0)) * C;
    for (int b = lane * 128; b < C * (int)sizeof(weight); b += 32 * 128)
      asm volatile("prefetch.global.L2 [%0];" :: "l"(reinterpret_cast<const char*>(row) + b));
  }
  Quad part[PARTS];
  const float scale = centre(stream, part, epsilon, scratch);
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int quad = threadIdx.x + i * NT;
    if (quad < C / 4) {
      put(x1, quad, normed(part[i], scale, gain1, bias1, quad));
      if constexpr (PAIR) put(x2, quad, normed(part[i], scale, gain2, bias2, quad));
    }
  }
  __syncthreads();
  for (int r = warp; r < count; r += warps) {
    if (PAIR && r < rows1) {
      const float y = warp_sum(lane_dot(w1 + i64(r) * C, x1, lane));
      if (lane == 0) first[r] = y + (b1 ? b1[r] : 0.f);
      continue;
    }
    const int at = r - (PAIR ? rows1 : 0);
    float y, gate = 0.f;
    if constexpr (PAIR) y = warp_sum(lane_dot(w2 + i64(at) * C, x2, lane));
    else y = warp_sum(lane_dot(w2 + i64(at) * C, x1, lane));
    if (b2) y += b2[at];
    if (ACT == 1) y = gelu(y);
    if constexpr (ACT == 2) {
      gate = y;
      y = warp_sum(lane_dot(w2 + i64(at + rows2) * C, x1, lane));
      if (b2) y += b2[at + rows2];
      y *= gate * sigmoid(gate);
    }
    if (lane == 0) second[at] = y;
  }
}

// stream += W1 x1 + b1 + W2 x2 + b2
extern "C" __global__ void __launch_bounds__(256)
summed_products(float* stream, const float* x1, const weight* w1, const float* b1, const float* x2, const weight* w2,
                const float* b2, int rows) {
  extern __shared__ char space[];
  Input<C1>& in1 = *reinterpret_cast<Input<C1>*>(space);
  Input<C2 ? C2 : 8>& in2 = *reinterpret_cast<Input<C2 ? C2 : 8>*>(space + sizeof(Input<C1>));
  const int lane = threadIdx.x % 32, warp = blockIdx.x * WARPS + threadIdx.x / 32, warps = gridDim.x * WARPS;
  if (warp < rows)
    for (int b = lane * 128; b < C1 * (int)sizeof(weight); b += 32 * 128)
      asm volatile("prefetch.global.L2 [%0];" :: "l"(reinterpret_cast<const char*>(w1 + i64(warp) * C1) + b));
  for (int quad = threadIdx.x; quad < C1 / 4; quad += NT) put(in1, quad, reinterpret_cast<const Quad*>(x1)[quad]);
  if constexpr (C2 > 0)
    for (int quad = threadIdx.x; quad < C2 / 4; quad += NT) put(in2, quad, reinterpret_cast<const Quad*>(x2)[quad]);
  __syncthreads();
  for (int r = warp; r < rows; r += warps) {
    float y = lane_dot(w1 + i64(r) * C1, in1, lane);
    if constexpr (C2 > 0) y += lane_dot(w2 + i64(r) * C2, in2, lane);
    y = warp_sum(y);
    if (lane == 0) {
      if (b1) y += b1[r];
      if (C2 > 0 && b2) y += b2[r];
      stream[r] += y;
    }
  }
}

// stream = x + stream (FIRST: x), first = norm1(stream), and with PAIR second = norm2(stream); a block a row.
#ifndef FIRST
#define FIRST 0
#endif
extern "C" __global__ void __launch_bounds__(256)
norms(const act* x, float* stream, float epsilon, const float* gain1, const float* bias1, const float* gain2,
      const float* bias2, act* first, act* second) {
  __shared__ float scratch[WARPS];
  const i64 row = blockIdx.x;
  stream += row * C;
  for (int i = threadIdx.x; i < C / 4; i += NT) {
    Quad value = FIRST ? Quad{0.f, 0.f, 0.f, 0.f} : reinterpret_cast<const Quad*>(stream)[i];
#pragma unroll
    for (int j = 0; j < 4; j++) value.v[j] += to_real(x[row * C + i * 4 + j]);
    reinterpret_cast<Quad*>(stream)[i] = value;  // each thread reads again what it wrote itself
  }
  Quad part[PARTS];
  const float scale = centre(stream, part, epsilon, scratch);
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int quad = threadIdx.x + i * NT;
    if (quad >= C / 4) continue;
    const Quad a = normed(part[i], scale, gain1, bias1, quad);
#pragma unroll
    for (int j = 0; j < 4; j++) first[row * C + quad * 4 + j] = to_act(a.v[j]);
    if constexpr (PAIR) {
      const Quad b = normed(part[i], scale, gain2, bias2, quad);
#pragma unroll
      for (int j = 0; j < 4; j++) second[row * C + quad * 4 + j] = to_act(b.v[j]);
    }
  }
}
