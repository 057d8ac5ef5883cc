// Attention of one new position a row to a cache of keys and values: turn q and k, append k and v, attend.
// A block takes a span of one row's and one head's cache; LANES threads share a key, eight numbers each; the spans' sums
// are put together by the block that ends last, in their order. What lies beyond a row's length is not read.
// Macros: D numbers of a head, TURN of them turned, GROUP queries a key, CT the cache's type (as IN).
#ifndef D
#define D 128
#endif
#ifndef TURN
#define TURN 0
#endif
#ifndef GROUP
#define GROUP 1
#endif
#ifndef CT
#define CT 1
#endif

constexpr int THREADS = 128, LANES = D / 8, PER = THREADS / LANES, UNROLL = 4, STEP = PER * UNROLL;
#define NONE __int_as_float(0xff800000)
typedef Stored<CT>::type cell;
template <int N> struct Count { static constexpr int value = N; };

// The cache is read once and its lines are not wanted again; what other blocks wrote is read past the first level's cache.
DEV uint4 load_once(const uint4* p) {
  uint4 r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(p));
  return r;
}
DEV float load_shared_by_all(const float* p) {
  float r;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(p));
  return r;
}

// Eight neighbouring numbers of the cache, kept as they come until they are used.
struct alignas(16) Eight { cell v[8]; };
DEV Eight load_eight(const cell* p) {
  Eight r;
#pragma unroll
  for (int i = 0; i < (int)sizeof(Eight) / 16; i++) reinterpret_cast<uint4*>(&r)[i] = load_once(reinterpret_cast<const uint4*>(p) + i);
  return r;
}
DEV Eight no_eight() {
  Eight r;
#pragma unroll
  for (int i = 0; i < (int)sizeof(Eight) / 16; i++) reinterpret_cast<uint4*>(&r)[i] = uint4{0, 0, 0, 0};
  return r;
}

// Eight numbers of a head, turned by the position's angles: pairs (i, i + TURN / 2).
DEV void turned(const act* x, const float* angles, int first, float* y) {
#pragma unroll
  for (int j = 0; j < 8; j++) {
    const int d = first + j;
    float value = to_real(x[d]);
    if (TURN && d < TURN) {
      constexpr int half = TURN / 2;
      const bool low = d < half;
      const int i = low ? d : d - half;
      const float other = to_real(x[low ? d + half : i]), c = angles[i], s = angles[half + i];
      value = low ? fmaf(value, c, -other * s) : fmaf(value, c, other * s);
    }
    y[j] = value;
  }
}

// A row's sums over its keys so far: exp2(score - top) and the values weighted by it.
struct Sums {
  float top, weight, value[8];
};

extern "C" __global__ void __launch_bounds__(128)
attend(const act* q, i64 qb, const act* k, i64 kb, const act* v, i64 vb, cell* keys, i64 keys_b, i64 keys_h, cell* values,
       i64 values_b, i64 values_h, const int* lengths, const float* rotary, float scale, float* partial, int* ended, act* out,
       i64 ob, int capacity) {
  const int span = blockIdx.x, head = blockIdx.y, row = blockIdx.z, spans = gridDim.x, heads = gridDim.y;
  const int thread = threadIdx.x, lane = thread % LANES, group = thread / LANES, first = lane * 8;
  const int length = lengths[row];
  if (length < 0 || length >= capacity) {  // no room: the row says so
    if (span == 0)
      for (int i = thread; i < GROUP * D; i += THREADS) out[row * ob + head * GROUP * D + i] = to_act(__int_as_float(0x7fffffff));
    return;
  }
  const int per = ((length + spans) / spans + STEP - 1) / STEP * STEP;  // ceil((length + 1) / spans), in whole steps
  const int last = length / per;                                         // the span that the new position is in
  if (span > last) return;
  const int begin = span * per, end = min(begin + per, length);
  keys += row * keys_b + head * keys_h + first;
  values += row * values_b + head * values_h + first;
  const float* angles = rotary + i64(length) * TURN;

  float query[GROUP][8];
  Sums sums[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    turned(q + row * qb + (head * GROUP + g) * D, angles, first, query[g]);
    sums[g].top = NONE;
    sums[g].weight = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      query[g][j] *= scale;
      sums[g].value[j] = 0.f;
    }
  }
  // Takes N keys at once, of which those with a mark exist.
  auto take = [&](const Eight* key, const Eight* value, const bool* there, auto count) {
    constexpr int N = decltype(count)::value;
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
      float score[N], top = sums[g].top;
#pragma unroll
      for (int n = 0; n < N; n++) {
        float s = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) s = fmaf(query[g][j], wide<CT>(key[n].v[j]), s);
#pragma unroll
        for (int o = LANES / 2; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
        score[n] = s;
        if (there[n]) top = fmaxf(top, s);
      }
      const float keep = sums[g].top == top ? 1.f : ex2(sums[g].top - top);
      sums[g].top = top;
      sums[g].weight *= keep;
#pragma unroll
      for (int j = 0; j < 8; j++) sums[g].value[j] *= keep;
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float w = there[n] ? ex2(score[n] - top) : 0.f;
        sums[g].weight += w;
#pragma unroll
        for (int j = 0; j < 8; j++) sums[g].value[j] = fmaf(w, wide<CT>(value[n].v[j]), sums[g].value[j]);
      }
    }
  };
  for (int base = begin; base < end; base += STEP) {
    Eight key[UNROLL], value[UNROLL];
    bool there[UNROLL];
#pragma unroll
    for (int n = 0; n < UNROLL; n++) {
      const int at = base + n * PER + group;
      there[n] = at < end;
      key[n] = there[n] ? load_eight(keys + i64(at) * D) : no_eight();
      value[n] = there[n] ? load_eight(values + i64(at) * D) : no_eight();
    }
    take(key, value, there, Count<UNROLL>());
  }
  if (span == last && thread < 32) {
    // The new position itself, as later steps will read it from the cache.
    float turn[8];
    turned(k + row * kb + head * D, angles, first, turn);
    Eight key[1], value[1];
#pragma unroll
    for (int j = 0; j < 8; j++) {
      key[0].v[j] = narrow<CT>(turn[j]);
      value[0].v[j] = narrow<CT>(to_real(v[row * vb + head * D + first + j]));
    }
    const bool there[1] = {group == 0};
    if (group == 0) {
#pragma unroll
      for (int i = 0; i < (int)sizeof(Eight) / 16; i++) {
        reinterpret_cast<uint4*>(keys + i64(length) * D)[i] = reinterpret_cast<const uint4*>(key)[i];
        reinterpret_cast<uint4*>(values + i64(length) * D)[i] = reinterpret_cast<const uint4*>(value)[i];
      }
    }
    take(key, value, there, Count<1>());
  }

  __shared__ float tops[GROUP][PER], weights[GROUP][PER], sum[PER][D];
  __shared__ bool closing;
  const i64 place = i64(row) * heads + head;
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
    if (lane == 0) tops[g][group] = sums[g].top, weights[g][group] = sums[g].weight;
#pragma unroll
    for (int j = 0; j < 8; j++) sum[group][first + j] = sums[g].value[j];
    __syncthreads();
    float top = NONE, weight = 0.f;
#pragma unroll
    for (int i = 0; i < PER; i++) top = fmaxf(top, tops[g][i]);
#pragma unroll
    for (int i = 0; i < PER; i++) weight += tops[g][i] == NONE ? 0.f : weights[g][i] * ex2(tops[g][i] - top);
    if (thread < D) {
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < PER; i++) total += tops[g][i] == NONE ? 0.f : sum[i][thread] * ex2(tops[g][i] - top);
      if (last == 0) {
        out[row * ob + (head * GROUP + g) * D + thread] = to_act(total / weight);
      } else {
        float* mine = partial + ((place * spans + span) * GROUP + g) * (D + 2);
        mine[thread] = total;
        if (thread == 0) mine[D] = top, mine[D + 1] = weight;
      }
    }
    __syncthreads();
  }
  if (last == 0) return;
  __threadfence();
  __syncthreads();
  if (thread == 0) closing = atomicAdd(ended + place, 1) == last;
  __syncthreads();
  if (!closing) return;
  __threadfence();
  if (thread == 0) ended[place] = 0;
  // Every span's share first, all at once: one after the other they would take longer than the spans themselves.
  __shared__ float shares[THREADS], masses[THREADS];
#pragma unroll 1
  for (int g = 0; g < GROUP; g++) {
    const float* all = partial + (place * spans * GROUP + g) * (D + 2);
    const i64 stride = GROUP * (D + 2);
    const float mine = thread <= last ? load_shared_by_all(all + thread * stride + D) : NONE;
    const float mass = thread <= last ? load_shared_by_all(all + thread * stride + D + 1) : 0.f;
    shares[thread] = mine;
    __syncthreads();
    float top = NONE, weight = 0.f, total = 0.f;
    for (int i = 0; i <= last; i++) top = fmaxf(top, shares[i]);
    __syncthreads();
    shares[thread] = thread <= last ? ex2(mine - top) : 0.f;
    masses[thread] = mass;
    __syncthreads();
    for (int i = 0; i <= last; i++) weight = fmaf(shares[i], masses[i], weight);
    if (thread < D) {
#pragma unroll 16
      for (int i = 0; i <= last; i++) total = fmaf(shares[i], load_shared_by_all(all + i * stride + thread), total);
      out[row * ob + (head * GROUP + g) * D + thread] = to_act(total / weight);
    }
    __syncthreads();
  }
}
