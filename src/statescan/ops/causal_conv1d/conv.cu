// Causal depthwise convolution over time, y[t] = act(bias + sum_k w[k] x[t - (TAPS-1) + k]), its gradients and its single
// step. A thread holds CH neighbouring channels and walks RUN positions with the last TAPS - 1 inputs in registers; the
// backward keeps the TAPS input gradients that are still open beside them. Sums over time of the weights' gradients leave a
// block as one row of partial sums and are added by a second kernel, always in one order.
// PART chooses what is compiled: 1 forward, 2 backward, 3 plain kernels for any number of taps, 4 sums and states, 5 the step.
// Macros: TAPS; CH; RUN; AHEAD positions fetched at once (EARLY: while the ones before are worked on); NX x NY threads along
// channels and time; MINB blocks a multiprocessor; SILU; VARLEN; HASI (initial state); HASF (gradient of the final state);
// WT and BT (types of weight and bias as IN; BT -1: none).
#ifndef PART
#define PART 1
#endif
#ifndef TAPS
#define TAPS 4
#endif
#ifndef CH
#define CH 8
#endif
#ifndef RUN
#define RUN 32
#endif
#ifndef AHEAD
#define AHEAD 4
#endif
#ifndef NX
#define NX 32
#endif
#ifndef NY
#define NY 4
#endif
#ifndef EARLY
#define EARLY 1
#endif
#ifndef SILU
#define SILU 1
#endif
#ifndef VARLEN
#define VARLEN 0
#endif
#ifndef HASI
#define HASI 0
#endif
#ifndef HASF
#define HASF 0
#endif
#ifndef WT
#define WT 0
#endif
#ifndef BT
#define BT 0
#endif
#ifndef MINB
#define MINB 1
#endif

// CH neighbouring channels of one position; 16-bit numbers stay in pairs until they are used.
#if (IN == 1 || IN == 2) && CH > 1
struct alignas(2 * CH) Row { u32 w[CH / 2]; };
DEV real get(const Row& r, int j) {
#if IN == 1
  return __uint_as_float(j & 1 ? r.w[j / 2] & 0xffff0000u : r.w[j / 2] << 16);
#else
  return to_real(act(j & 1 ? r.w[j / 2] >> 16 : r.w[j / 2]));
#endif
}
DEV Row pack(const real* v) {
  Row r;
#pragma unroll
  for (int j = 0; j < CH; j += 2) r.w[j / 2] = u32(to_act(v[j])) | u32(to_act(v[j + 1])) << 16;
  return r;
}
#else
struct alignas(CH * sizeof(act)) Row { act v[CH]; };
DEV real get(const Row& r, int j) { return to_real(r.v[j]); }
DEV Row pack(const real* v) {
  Row r;
#pragma unroll
  for (int j = 0; j < CH; j++) r.v[j] = to_act(v[j]);
  return r;
}
#endif
DEV Row fetch(const act* p) { return *reinterpret_cast<const Row*>(p); }
DEV void put(act* p, const Row& r) { *reinterpret_cast<Row*>(p) = r; }
// `step`: bytes from one position to the next, below 2^31 so that an address takes one instruction.
DEV const act* at_position(const act* p, int t, int step) { return reinterpret_cast<const act*>(reinterpret_cast<const char*>(p) + i64(t) * step); }
DEV act* at_position(act* p, int t, int step) { return reinterpret_cast<act*>(reinterpret_cast<char*>(p) + i64(t) * step); }
DEV Row nothing() {
  real zero[CH] = {};
  return pack(zero);
}

DEV real weight_at(const void* weight, i64 i) { return load_as<WT>(weight, i); }
DEV real bias_at(const void* bias, i64 c) {
#if BT >= 0
  return load_as<BT>(bias, c);
#else
  return real(0);
#endif
}
DEV real activate(real v) { return SILU ? silu(v) : v; }
// dy times the activation's derivative at `v`.
DEV real deactivate(real dy, real v) {
#if SILU
  const real s = quick_sigmoid(v);
  return dy * (s * fma_(v, real(1) - s, real(1)));
#else
  return dy;
#endif
}

// ------------------------------------------------------------------------------------------------------ packed sequences
// The last sequence that starts at or before t: never an empty one. In bounds whatever stands in cu.
DEV int sequence_of(const int* cu, int sequences, int t) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu[middle] <= t) low = middle; else high = middle;
  }
  return low;
}
struct Where { int sequence, start, end; };
// start <= t < end, within the row, also where the offsets are wrong: blocks run on until the check has stopped the program.
DEV Where where(const int* cu, int sequences, int b, int t, int length) {
#if VARLEN
  const int s = sequence_of(cu, sequences, t);
  return {s, max(0, min(cu[s], t)), min(max(cu[s + 1], t + 1), length)};
#else
  return {b, 0, length};
#endif
}
DEV void step_on(Where& at, const int* cu, int sequences, int t, int length) {
  while (at.sequence + 1 < sequences && cu[at.sequence + 1] <= t) at.sequence++;
  at.start = t;
  at.end = min(max(cu[at.sequence + 1], t + 1), length);
}
// Offsets that were never seen by the host (in a compiled or captured graph) must not give a silent wrong answer.
DEV void check_offsets(const int* cu, int sequences, int length) {
#if VARLEN
  if (blockIdx.x) return;
  bool good = cu[0] == 0 && cu[sequences] == length;
  for (int i = threadIdx.x; i < sequences; i += blockDim.x) good = good && cu[i] <= cu[i + 1];
  if (!good) {
    printf("statescan: causal_conv1d: cu_seqlens must go from 0 to the length of x, %d, and never fall, got other offsets\n", length);
    __trap();
  }
#endif
}

struct Place { int channel, begin, chunk, batch; };  // of a thread; chunk: of the block
DEV Place place(int length, int features) {
  const int across = (features + NX * CH - 1) / (NX * CH), chunks = (length + NY * RUN - 1) / (NY * RUN);
  const int rest = blockIdx.x / across, chunk = rest % chunks;
  return {(int(blockIdx.x % across) * NX + int(threadIdx.x % NX)) * CH, (chunk * NY + int(threadIdx.x / NX)) * RUN, chunk, rest / chunks};
}

#if PART <= 2
#define PAST (TAPS > 1 ? TAPS - 1 : 1)
// An input before the sequence's start: `ahead` = position - start < 0.
DEV Row before(const act* init, i64 ib, i64 il, int sequence, int ahead, int c) {
#if HASI
  return fetch(init + sequence * ib + (TAPS - 1 + ahead) * il + c);
#else
  return nothing();
#endif
}
DEV void load_weights(const void* weight, i64 wc, i64 wk, const void* bias, int c, real (&w)[TAPS][CH], real (&offset)[CH]) {
#pragma unroll
  for (int j = 0; j < CH; j++) {
#pragma unroll
    for (int k = 0; k < TAPS; k++) w[k][j] = weight_at(weight, (c + j) * wc + k * wk);
    offset[j] = bias_at(bias, c + j);
  }
}
DEV void open_window(Row (&past)[PAST], const act* x, i64 xl, const act* init, i64 ib, i64 il, const Where& at, int t, int c) {
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) {
    const int from = t - (TAPS - 1) + k;
    past[k] = from >= at.start ? fetch(x + from * xl) : before(init, ib, il, at.sequence, from - at.start, c);
  }
}
DEV void slide(Row (&past)[PAST], const Row& now) {
#pragma unroll
  for (int k = 0; k + 1 < TAPS - 1; k++) past[k] = past[k + 1];
  if (TAPS > 1) past[PAST - 1] = now;
}
DEV real filtered(const Row (&past)[PAST], const Row& now, const real (&w)[TAPS][CH], real sum, int j) {
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) sum = fma_(w[k][j], get(past[k], j), sum);
  return fma_(w[TAPS - 1][j], get(now, j), sum);
}

// Whether the tile of AHEAD positions needs none of the checks below is known when compiling.
struct Checked { static constexpr bool value = true; };
struct Whole { static constexpr bool value = false; };

#if PART == 1
extern "C" __global__ void __launch_bounds__(NX* NY, MINB)
conv_forward(const act* x, i64 xb, i64 xl, const void* weight, i64 wc, i64 wk, const void* bias, const act* init, i64 ib, i64 il,
             const int* cu, act* y, i64 yb, i64 yl, int length, int features, int sequences) {
  check_offsets(cu, sequences, length);
  const Place me = place(length, features);
  const int c = me.channel;
  if (c >= features || me.begin >= length) return;
  const int stop = min(me.begin + RUN, length);
  x += me.batch * xb + c;
  y += me.batch * yb + c;
  const int x_step = int(xl) * int(sizeof(act)), y_step = int(yl) * int(sizeof(act));
  Where at = where(cu, sequences, me.batch, me.begin, length);
  Row past[PAST], in[AHEAD];
  auto load = [&](auto checks, int t0) {
    const act* from = at_position(x, t0, x_step);
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (!checks.value || t0 + i < length) in[i] = fetch(at_position(from, i, x_step));
  };
  open_window(past, x, xl, init, ib, il, at, me.begin, c);
  load(Checked(), me.begin);
  real w[TAPS][CH], offset[CH];
  load_weights(weight, wc, wk, bias, c, w, offset);
  auto walk = [&](auto checks, int t0, const Row (&now)[AHEAD]) {
    act* to = at_position(y, t0, y_step);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int t = t0 + i;
      if (!checks.value || t < stop) {
#if VARLEN
        if (checks.value && t >= at.end) {
          step_on(at, cu, sequences, t, length);
          open_window(past, x, xl, init, ib, il, at, t, c);
        }
#endif
        real out[CH];
#pragma unroll
        for (int j = 0; j < CH; j++) out[j] = activate(filtered(past, now[i], w, offset[j], j));
        put(at_position(to, i, y_step), pack(out));
        slide(past, now[i]);
      }
    }
  };
  auto tile = [&](auto checks, int t0) {
    Row now[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) now[i] = in[i];
    if (EARLY) load(checks, t0 + AHEAD);
    walk(checks, t0, now);
    if (!EARLY) load(checks, t0 + AHEAD);
  };
  for (int t0 = me.begin; t0 < stop; t0 += AHEAD) {
    // loops of their own: joined by a branch, the two would copy every register from one's place to the other's
#pragma unroll 1
    for (; t0 + AHEAD <= min(min(stop, at.end), length - AHEAD); t0 += AHEAD) tile(Whole(), t0);
    if (t0 < stop) tile(Checked(), t0);
  }
}
#else
extern "C" __global__ void __launch_bounds__(NX* NY, MINB)
conv_backward(const act* x, i64 xb, i64 xl, const void* weight, i64 wc, i64 wk, const void* bias, const act* init, i64 ib, i64 il,
              const int* cu, const act* dy, i64 gb, i64 gl, const act* dfinal, act* dx, i64 db, i64 dl, real* partial, int length,
              int features, int sequences) {
  check_offsets(cu, sequences, length);
  const Place me = place(length, features);
  const int c = me.channel;
  real dw[TAPS + 1][CH] = {};  // the last row is the bias's
  if (c < features && me.begin < length) {
    const int own = min(me.begin + RUN, length), stop = own + TAPS - 1, inputs = min(stop, length);
    x += me.batch * xb + c;
    dy += me.batch * gb + c;
    dx += me.batch * db + c;
    const int x_step = int(xl) * int(sizeof(act)), dy_step = int(gl) * int(sizeof(act)), dx_step = int(dl) * int(sizeof(act));
    Where at = where(cu, sequences, me.batch, me.begin, length);
#if HASF
    Where out = at;  // of the position whose gradient is complete
#endif
    Row past[PAST], in[AHEAD], grad[AHEAD];
    auto load = [&](auto checks, int p0) {
      const act *from = at_position(x, p0, x_step), *from_grad = at_position(dy, p0, dy_step);
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (!checks.value || p0 + i < length) {
          in[i] = fetch(at_position(from, i, x_step));
          grad[i] = fetch(at_position(from_grad, i, dy_step));
        }
    };
    open_window(past, x, xl, init, ib, il, at, me.begin, c);
    load(Checked(), me.begin);
    real w[TAPS][CH], offset[CH];
    load_weights(weight, wc, wk, bias, c, w, offset);
    real open[TAPS][CH] = {};  // gradients of the last TAPS inputs as far as they are known, the newest first
    auto walk = [&](auto checks, int p0, const Row (&now)[AHEAD], const Row (&up)[AHEAD]) {
      constexpr bool check = checks.value;
      act* to = at_position(dx, p0 - (TAPS - 1), dx_step);
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        const int p = p0 + i, t = p - (TAPS - 1);
        if (!check || p < stop) {
#pragma unroll
          for (int k = TAPS - 1; k > 0; k--)
#pragma unroll
            for (int j = 0; j < CH; j++) open[k][j] = open[k - 1][j];
#pragma unroll
          for (int j = 0; j < CH; j++) open[0][j] = 0;
          if (!check || p < inputs) {
#if VARLEN
            if (check && p >= at.end) {
              step_on(at, cu, sequences, p, length);
              open_window(past, x, xl, init, ib, il, at, p, c);
            }
#endif
            real g[CH];
#pragma unroll
            for (int j = 0; j < CH; j++)
              g[j] = deactivate(get(up[i], j), SILU ? filtered(past, now[i], w, offset[j], j) : real(0));
            if (!check || p < own) {
#pragma unroll
              for (int j = 0; j < CH; j++) {
#pragma unroll
                for (int k = 0; k < TAPS - 1; k++) dw[k][j] = fma_(g[j], get(past[k], j), dw[k][j]);
                dw[TAPS - 1][j] = fma_(g[j], get(now[i], j), dw[TAPS - 1][j]);
                dw[TAPS][j] += g[j];
              }
            }
            // no output of a sequence looks back past its start
#pragma unroll
            for (int k = 0; k < TAPS; k++)
              if (!VARLEN || !check || k <= p - at.start)
#pragma unroll
                for (int j = 0; j < CH; j++) open[k][j] = fma_(w[TAPS - 1 - k][j], g[j], open[k][j]);
            slide(past, now[i]);
          }
          if (!check || t >= me.begin) {
#if HASF
            if (check) {
              if (t >= out.end) step_on(out, cu, sequences, t, length);
              const int slot = t - (out.end - (TAPS - 1));
              if (slot >= 0) {
                const Row more = fetch(dfinal + (i64(out.sequence) * (TAPS - 1) + slot) * features + c);
#pragma unroll
                for (int j = 0; j < CH; j++) open[TAPS - 1][j] += get(more, j);
              }
            }
#endif
            put(at_position(to, i, dx_step), pack(open[TAPS - 1]));
          }
        }
      }
    };
    auto tile = [&](auto checks, int p0) {
      Row now[AHEAD], up[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) now[i] = in[i], up[i] = grad[i];
      if (EARLY) load(checks, p0 + AHEAD);
      walk(checks, p0, now, up);
      if (!EARLY) load(checks, p0 + AHEAD);
    };
    for (int p0 = me.begin; p0 < stop; p0 += AHEAD) {
      tile(Checked(), p0);
      // inside of the run and of a sequence, and so is all that becomes complete
      if (p0 + AHEAD - max(me.begin, at.start) >= TAPS - 1)
#pragma unroll 1
        for (; p0 + 2 * AHEAD <= min(min(own, at.end), length - AHEAD); p0 += AHEAD) tile(Whole(), p0 + AHEAD);
    }
  }
  // the block's share: over the runs of time, in their order
  __shared__ real sums[NY][CH][NX];
  const int tx = threadIdx.x % NX, ty = threadIdx.x / NX;
  real* row = partial + i64(blockIdx.x / ((features + NX * CH - 1) / (NX * CH))) * (TAPS + 1) * features;
#pragma unroll
  for (int k = 0; k <= TAPS; k++) {
    if (k == TAPS && BT < 0) break;
    if (k) __syncthreads();
#pragma unroll
    for (int j = 0; j < CH; j++) sums[ty][j][tx] = dw[k][j];
    __syncthreads();
    for (int q = threadIdx.x; q < NX * CH; q += NX * NY) {
      const int channel = (blockIdx.x % ((features + NX * CH - 1) / (NX * CH))) * NX * CH + q;
      real sum = 0;
#pragma unroll
      for (int r = 0; r < NY; r++) sum += sums[r][q % CH][q / CH];
      if (channel < features) row[i64(k) * features + channel] = sum;
    }
  }
}
#endif
#endif

// --------------------------------------------------------------------------------------------------- any number of taps
DEV real input_at(const act* x, i64 xl, const act* init, i64 ib, i64 il, const Where& at, int width, int t, i64 c) {
  if (t >= at.start) return to_real(x[t * xl + c]);
#if HASI
  return to_real(init[at.sequence * ib + (width - 1 + t - at.start) * il + c]);
#else
  return real(0);
#endif
}
DEV real filtered_at(const act* x, i64 xl, const void* weight, i64 wc, i64 wk, const void* bias, const act* init, i64 ib, i64 il,
                     const Where& at, int width, int t, i64 c) {
  real sum = bias_at(bias, c);
  for (int k = 0; k < width; k++)
    sum = fma_(weight_at(weight, c * wc + k * wk), input_at(x, xl, init, ib, il, at, width, t - (width - 1) + k, c), sum);
  return sum;
}
DEV bool my_position(int length, int features, int batch, int& b, int& t, int& c) {
  const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x, row = i / features;
  c = int(i % features);
  t = int(row % length);
  b = int(row / length);
  return row / length < batch;
}

#if PART == 3
extern "C" __global__ void plain_forward(const act* x, i64 xb, i64 xl, const void* weight, i64 wc, i64 wk, const void* bias,
                                         const act* init, i64 ib, i64 il, const int* cu, act* y, i64 yb, i64 yl, int length,
                                         int features, int sequences, int width, int batch) {
  check_offsets(cu, sequences, length);
  int b, t, c;
  if (!my_position(length, features, batch, b, t, c)) return;
  const Where at = where(cu, sequences, b, t, length);
  y[b * yb + t * yl + c] = to_act(activate(filtered_at(x + b * xb, xl, weight, wc, wk, bias, init, ib, il, at, width, t, c)));
}
// The gradient before the activation, (batch, length, features).
extern "C" __global__ void plain_gradient(const act* x, i64 xb, i64 xl, const void* weight, i64 wc, i64 wk, const void* bias,
                                          const act* init, i64 ib, i64 il, const int* cu, const act* dy, i64 gb, i64 gl, real* g,
                                          int length, int features, int sequences, int width, int batch) {
  check_offsets(cu, sequences, length);
  int b, t, c;
  if (!my_position(length, features, batch, b, t, c)) return;
  const Where at = where(cu, sequences, b, t, length);
  const real v = SILU ? filtered_at(x + b * xb, xl, weight, wc, wk, bias, init, ib, il, at, width, t, c) : real(0);
  g[(i64(b) * length + t) * features + c] = deactivate(to_real(dy[b * gb + t * gl + c]), v);
}
extern "C" __global__ void plain_backward(const void* weight, i64 wc, i64 wk, const real* g, const int* cu, const act* dfinal, act* dx,
                                          i64 db, i64 dl, int length, int features, int sequences, int width, int batch) {
  int b, t, c;
  if (!my_position(length, features, batch, b, t, c)) return;
  const Where at = where(cu, sequences, b, t, length);
  real sum = 0;
  for (int q = 0; q < width && t + q < at.end; q++)
    sum = fma_(weight_at(weight, c * wc + (width - 1 - q) * wk), g[(i64(b) * length + t + q) * features + c], sum);
#if HASF
  const int slot = t - (at.end - (width - 1));
  if (slot >= 0) sum += to_real(dfinal[(i64(at.sequence) * (width - 1) + slot) * features + c]);
#endif
  dx[b * db + t * dl + c] = to_act(sum);
}
// Partial sums over RUN positions each; a block has channels of one tap, and the tap after the last is the bias.
extern "C" __global__ void plain_weights(const act* x, i64 xb, i64 xl, const act* init, i64 ib, i64 il, const int* cu, const real* g,
                                         real* partial, int length, int features, int sequences, int width) {
  const int across = (features + blockDim.x - 1) / blockDim.x, rest = blockIdx.x / across;
  const int c = int(blockIdx.x % across) * blockDim.x + threadIdx.x, k = rest % (width + 1), slice = rest / (width + 1);
  const int chunks = (length + RUN - 1) / RUN, chunk = slice % chunks, b = slice / chunks;
  if (c >= features) return;
  const int stop = min((chunk + 1) * RUN, length);
  Where at = where(cu, sequences, b, chunk * RUN, length);
  real sum = 0;
  for (int t = chunk * RUN; t < stop; t++) {
    if (VARLEN && t >= at.end) step_on(at, cu, sequences, t, length);
    const real v = k == width ? real(1) : input_at(x + b * xb, xl, init, ib, il, at, width, t - (width - 1) + k, c);
    sum = fma_(g[(i64(b) * length + t) * features + c], v, sum);
  }
  partial[(i64(slice) * (width + 1) + k) * features + c] = sum;
}
#endif

// ------------------------------------------------------------------------------------------------------ sums and states
#if PART == 4
extern "C" __global__ void __launch_bounds__(1024) conv_sums(const real* partial, int rows, int features, int width, void* dweight, void* dbias) {
  real total;
  if (!column_sum(partial, rows, i64(width + 1) * features, total)) return;
  const i64 column = i64(blockIdx.x) * 32 + threadIdx.x % 32;
  const int k = int(column / features), c = int(column % features);
  if (k < width) store_as<WT>(dweight, i64(c) * width + k, total);
#if BT >= 0
  else store_as<BT>(dbias, c, total);
#endif
}

DEV bool my_slot(int features, int width, int sequences, int& s, int& i, int& c) {
  const i64 id = i64(blockIdx.x) * blockDim.x + threadIdx.x, row = id / features;
  c = int(id % features);
  i = int(row % (width - 1));
  s = int(row / (width - 1));
  return row / (width - 1) < sequences;
}
DEV Where whole(const int* cu, int s, int length) {
#if VARLEN
  return {s, cu[s], cu[s + 1]};
#else
  return {s, 0, length};
#endif
}
extern "C" __global__ void conv_final(const act* x, i64 xb, i64 xl, const act* init, i64 ib, i64 il, const int* cu, act* out, int length,
                                      int features, int sequences, int width) {
  int s, i, c;
  if (!my_slot(features, width, sequences, s, i, c)) return;
  const Where at = whole(cu, s, length);
  out[(i64(s) * (width - 1) + i) * features + c] =
      to_act(input_at(x + (VARLEN ? 0 : s * xb), xl, init, ib, il, at, width, at.end - (width - 1) + i, c));
}
extern "C" __global__ void conv_initial(const act* x, i64 xb, i64 xl, const void* weight, i64 wc, i64 wk, const void* bias,
                                        const act* init, i64 ib, i64 il, const int* cu, const act* dy, i64 gb, i64 gl, const act* dfinal,
                                        act* dinit, int length, int features, int sequences, int width) {
  int s, i, c;
  if (!my_slot(features, width, sequences, s, i, c)) return;
  const Where at = whole(cu, s, length);
  const int count = at.end - at.start;
  const i64 b = VARLEN ? 0 : s;
  real sum = 0;
  for (int q = 0; q <= i && q < count; q++) {
    const int t = at.start + q;
    const real v = SILU ? filtered_at(x + b * xb, xl, weight, wc, wk, bias, init, ib, il, at, width, t, c) : real(0);
    sum = fma_(weight_at(weight, c * wc + (i - q) * wk), deactivate(to_real(dy[b * gb + t * gl + c]), v), sum);
  }
#if HASF
  if (i >= count) sum += to_real(dfinal[(i64(s) * (width - 1) + i - count) * features + c]);
#endif
  dinit[(i64(s) * (width - 1) + i) * features + c] = to_act(sum);
}
#endif

#if PART == 5
// One position: y, and the window moved on by one; `next` may be `state`.
extern "C" __global__ void conv_update(const act* x, i64 xb, const act* state, i64 sb, i64 sl, const void* weight, i64 wc, i64 wk,
                                       const void* bias, act* next, i64 nb, i64 nl, act* y, int batch, int features, int width_) {
  const int width = TAPS > 0 ? TAPS : width_;
  const i64 id = i64(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 b = id / features, c = id % features;
  if (b >= batch) return;
  const act now = x[b * xb + c];
  real sum = bias_at(bias, c);
#if TAPS > 0
  act past[TAPS > 1 ? TAPS - 1 : 1];
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) past[k] = state[b * sb + k * sl + c];
#pragma unroll
  for (int k = 0; k < TAPS - 1; k++) {
    sum = fma_(weight_at(weight, c * wc + k * wk), to_real(past[k]), sum);
    if (k) next[b * nb + (k - 1) * nl + c] = past[k];
  }
#else
  for (int k = 0; k < width - 1; k++) {
    const act v = state[b * sb + k * sl + c];
    sum = fma_(weight_at(weight, c * wc + k * wk), to_real(v), sum);
    if (k) next[b * nb + (k - 1) * nl + c] = v;
  }
#endif
  if (width > 1) next[b * nb + (width - 2) * nl + c] = now;
  sum = fma_(weight_at(weight, c * wc + (width - 1) * wk), to_real(now), sum);
  y[b * features + c] = to_act(activate(sum));
}
#endif
