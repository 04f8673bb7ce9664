// Values to codes in both orientations, from one read: the kernels for which Triton's transposition is too slow.
//
// A block of 4 * BM threads holds a rectangle of BM x 128 values. Thread (quad, group) has 4 rows, 4 * quad + j, and 8
// columns, 8 * group + i, as bfloat16 pairs x[j][i / 2]: what an unfused kernel would have stored. Row codes leave as 8
// bytes a row. Of the other orientation a thread holds, for each of its columns, one word: 4 codes of 4 neighbouring
// rows. Words change places through shared memory, turned[column][quad ^ group], so that a column's words are read back
// 16 bytes at a time (within an aligned group of four, in the order that the exclusive or gives), and leave as 16 bytes
// along the transposed row. Row codes and transposed codes pair other values, so no conversion serves both.
//
// What is compiled in:
//   PRODUCER   PLAIN x; NORM h * rstd * weight; ROPE the gradients of q, k and v turned back; ACT an activation;
//              ACT_BACKWARD its gradient and, again, its values
//   MODE       where the scale comes from: GIVEN and the amax is raised, KNOWN, MEASURED by a first pass (FIRST), ROW and
//              column keys of a first pass, GROUP of 128 found here (BM = 128); STORE writes the values themselves
//   STAGED     (ACT_BACKWARD) a program takes one rectangle after the other and fetches the next one's inputs into shared
//              memory while it works on this one: three outputs leave registers for too few threads to hide the latency
//   E4M3, H_E4M3, POWER, H_POWER, ROWS, COLS, FUNCTION, GATED, AGAIN, H32, W32, DIM, BM, BLOCKS
//
// Non-finite values are rare: a thread that has one takes a branch of its own. rows is a multiple of 16, columns of 8.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define PLAIN 0
#define NORM 1
#define ROPE 2
#define ACT 3
#define ACT_BACKWARD 4
#define GIVEN 0
#define KNOWN 1
#define MEASURED 2
#define ROW 3
#define GROUP 4
#define STORE 5
#define SILU 0
#define GELU 1
#define RELU 2
#define INFINITY_BITS 0x7F800000u
#define OUTPUTS (PRODUCER == ACT_BACKWARD ? (GATED ? 2 : 1) + AGAIN : 1)
#define THREADS (4 * BM)
#define WORDS (BM / 4)
#define INPUTS (GATED ? 3 : 2)  // of ACT_BACKWARD: dh, gate and up

struct Out {  // one matrix of codes: [rows, cols], or its transpose
  u8* codes;
  u8* codes_t;
  float* scale;
  float* scale_t;
  u32* keys;    // amaxes of rows and columns: FP32 bits + 0x00800000, as the Triton kernels keep them
  u32* keys_t;
  u32* amax;    // FP32 bits; may start at -1.0, as delayed scaling's do
  int stride_r, stride_c, stride_tr, stride_tc;
  int cols;
};

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ __forceinline__ float half_of(const u32 (&x)[4], int i) { return i & 1 ? high(x[i / 2]) : low(x[i / 2]); }

__device__ __forceinline__ u32 bf16s(float first, float second) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

template <bool IS_E4M3>
__device__ __forceinline__ u32 codes2(float first, float second) {
  u16 pair;
  if (IS_E4M3)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

template <bool IS_E4M3>
__device__ __forceinline__ u32 codes4(float a, float b, float c, float d) {
  return codes2<IS_E4M3>(a, b) | codes2<IS_E4M3>(c, d) << 16;
}

// The byte of a value that is not finite, put in place of what the conversion clipped.
template <bool IS_E4M3>
__device__ u32 marked(u32 word, int place, float x) {
  u32 bits = __float_as_uint(x), magnitude = bits & 0x7FFFFFFFu;
  if (magnitude < INFINITY_BITS) return word;
  u32 code = IS_E4M3 || magnitude > INFINITY_BITS ? 0x7Fu : 0x7Cu | bits >> 24 & 0x80u;
  return word & ~(0xFFu << 8 * place) | code << 8 * place;
}

// ---- scales

template <bool IS_E4M3, bool IS_POWER>
__device__ __forceinline__ float scale_of(u32 amax) {
  if (amax == 0) return 1.0f;
  if (IS_POWER) {
    int raised = (int)((amax + 0x1FFFFFu) & 0x7F800000u) - ((IS_E4M3 ? 8 : 15) << 23);
    return __int_as_float(max(raised, 1 << 23));
  }
  float exact = __fdiv_rn(__uint_as_float(amax), IS_E4M3 ? 448.0f : 57344.0f);
  return fminf(fmaxf(exact, 1.1754943508222875e-38f), 8.507059173023462e37f);
}

template <bool IS_POWER>
__device__ __forceinline__ float factor_of(float scale) {
  if (!IS_POWER) return scale;
  u32 bits = __float_as_uint(scale);
  return __uint_as_float(bits == 0x7F000000u ? 1u << 22 : 0x7F000000u - bits);
}

template <bool IS_POWER>
__device__ __forceinline__ float scaled(float x, float factor) {
  return IS_POWER ? __fmul_rn(x, factor) : __fdiv_rn(x, factor);
}

__device__ __forceinline__ u32 amax_of_key(u32 key) { return max(key, 0x00800000u) - 0x00800000u; }

// ---- one rectangle of one output

// The largest finite magnitudes of a thread's values, of each row (8 columns) and each column (4 rows), as FP32 bits;
// and whether any value is not finite. Magnitudes of bfloat16 order like 15-bit integers, so two are compared at once.
__device__ __forceinline__ bool extremes(const u32 (&x)[4][4], u32& top, u32 (&by_row)[4], u32 (&by_column)[8]) {
  u32 m[4][4], row2[4], column2[4], top2 = 0;
#pragma unroll
  for (int p = 0; p < 4; p++) {
#pragma unroll
    for (int j = 0; j < 4; j++) m[j][p] = x[j][p] & 0x7FFF7FFFu;
    column2[p] = __vmaxu2(__vmaxu2(m[0][p], m[1][p]), __vmaxu2(m[2][p], m[3][p]));
    top2 = __vmaxu2(top2, column2[p]);
  }
  bool odd = max(top2 & 0xFFFFu, top2 >> 16) >= INFINITY_BITS >> 16;
  if (odd) {
    top2 = 0;
#pragma unroll
    for (int p = 0; p < 4; p++) {
      column2[p] = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if ((m[j][p] & 0xFFFFu) >= INFINITY_BITS >> 16) m[j][p] &= 0xFFFF0000u;
        if (m[j][p] >= INFINITY_BITS) m[j][p] &= 0xFFFFu;
        column2[p] = __vmaxu2(column2[p], m[j][p]);
      }
      top2 = __vmaxu2(top2, column2[p]);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    row2[j] = __vmaxu2(__vmaxu2(m[j][0], m[j][1]), __vmaxu2(m[j][2], m[j][3]));
    by_row[j] = max(row2[j] << 16, row2[j] & 0xFFFF0000u);
  }
#pragma unroll
  for (int p = 0; p < 4; p++) {
    by_column[2 * p] = column2[p] << 16;
    by_column[2 * p + 1] = column2[p] & 0xFFFF0000u;
  }
  top = max(top2 << 16, top2 & 0xFFFF0000u);
  return odd;
}

// Row maxima over the 16 threads of a row; column maxima over the two quads of a warp.
__device__ __forceinline__ void join_lanes(u32 (&by_row)[4], u32 (&by_column)[8]) {
#pragma unroll
  for (int step = 1; step < 16; step *= 2)
#pragma unroll
    for (int j = 0; j < 4; j++) by_row[j] = max(by_row[j], __shfl_xor_sync(~0u, by_row[j], step));
#pragma unroll
  for (int i = 0; i < 8; i++) by_column[i] = max(by_column[i], __shfl_xor_sync(~0u, by_column[i], 16));
}

// Codes of x with a factor for each row and one for each column; the words of the other orientation go to `turned`.
template <bool IS_E4M3, bool IS_POWER, bool DOWN, bool ACROSS>
__device__ __forceinline__ void encode(
    const u32 (&x)[4][4], const float (&of_row)[4], const float (&of_column)[8], bool odd, bool inside, u8* codes,
    int cols, u32* turned, int quad, int group) {
  if (DOWN) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; i++) v[i] = scaled<IS_POWER>(half_of(x[j], i), of_row[j]);
      uint2 out = {codes4<IS_E4M3>(v[0], v[1], v[2], v[3]), codes4<IS_E4M3>(v[4], v[5], v[6], v[7])};
      if (odd)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          out.x = marked<IS_E4M3>(out.x, i, half_of(x[j], i));
          out.y = marked<IS_E4M3>(out.y, i, half_of(x[j], i + 4));
        }
      if (inside) *(uint2*)(codes + (u64)j * cols) = out;
    }
  }
  if (ACROSS) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; j++) v[j] = scaled<IS_POWER>(half_of(x[j], i), of_column[i]);
      u32 word = codes4<IS_E4M3>(v[0], v[1], v[2], v[3]);
      if (odd)
#pragma unroll
        for (int j = 0; j < 4; j++) word = marked<IS_E4M3>(word, j, half_of(x[j], i));
      turned[(8 * group + i) * WORDS + (quad & 16 | (quad ^ group) & 15)] = word;
    }
  }
}

// The words of a rectangle from shared memory to the transposed matrix [cols, rows]: 16 bytes a thread and turn.
__device__ __forceinline__ void send_turned(const u32* turned, u8* codes_t, int rows, int row, int left, int width,
                                            int column) {
  for (int at = threadIdx.x; at < 128 * WORDS / 4; at += THREADS) {
    int c = at / (WORDS / 4), chunk = at % (WORDS / 4), group = c / 8;
    uint4 w = *(const uint4*)(turned + c * WORDS + 4 * (chunk & 4 | (chunk ^ group / 4) & 3));
    if (group & 1) { u32 t = w.x; w.x = w.y; w.y = t; t = w.z; w.z = w.w; w.w = t; }
    if (group & 2) { u32 t = w.x; w.x = w.z; w.z = t; t = w.y; w.y = w.w; w.w = t; }
    int r = row + 16 * chunk;
    if (column + c < width && r < rows) *(uint4*)(codes_t + (u64)(left + column + c) * rows + r) = w;
  }
}

// ---- activations

__device__ __forceinline__ void activated(float x, float& f, float& slope) {
#if FUNCTION == SILU
  float s = __fdividef(1.0f, 1.0f + __expf(-x));
  f = x * s;
  slope = s * (1.0f + x * (1.0f - s));
#elif FUNCTION == GELU
  float s = 0.5f * (1.0f + erff(x * 0.7071067811865476f));
  f = x * s;
  slope = s + x * (__expf(-0.5f * x * x) * 0.3989422804014327f);
#else
  f = x <= 0.0f ? 0.0f : x;
  slope = x > 0.0f ? 1.0f : 0.0f;
#endif
}

__device__ __forceinline__ void load(u32 (&x)[4][4], const u16* from, u64 stride, bool inside) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint4 w = inside ? *(const uint4*)(from + j * stride) : make_uint4(0, 0, 0, 0);
    x[j][0] = w.x; x[j][1] = w.y; x[j][2] = w.z; x[j][3] = w.w;
  }
}

#if STAGED
// The inputs of a rectangle, [input, row of the thread][thread]: each thread reads back what it fetched itself.
extern __shared__ uint4 staged[];

__device__ __forceinline__ void fetch(int input, const u16* from, u64 stride, bool inside) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    u32 to = (u32)__cvta_generic_to_shared(staged + (4 * input + j) * THREADS + threadIdx.x);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 ::"r"(to), "l"(inside ? from + j * stride : from), "r"(inside ? 16 : 0));
  }
}

__device__ __forceinline__ void load_staged(u32 (&x)[4][4], int input) {
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint4 w = staged[(4 * input + j) * THREADS + threadIdx.x];
    x[j][0] = w.x; x[j][1] = w.y; x[j][2] = w.z; x[j][3] = w.w;
  }
}
#endif

// What the values are made of. `produce` leaves them in x: one output, or gate and up, and the last for `again`.
struct Source {
  const void* a;        // x, h, dq, or dh
  const void* b;        // rstd, dk, or the activation's x
  const void* c;        // weight, or dv
  const float* cos;
  const float* sin;
  u64 a_b, a_h, a_t, b_b, b_h, b_t, c_b, c_h, c_t;  // ROPE: strides of batch, head and token
  int tokens, queries, heads, width;
};

__device__ __forceinline__ void produce(u32 (&x)[OUTPUTS][4][4], const Source& s, int row, int column, bool inside) {
#if PRODUCER == PLAIN
  load(x[0], (const u16*)s.a + (u64)row * s.width + column, s.width, inside);
#elif PRODUCER == NORM
  float w[8];
  if (W32) {
    const float4* from = (const float4*)((const float*)s.c + column);
    float4 first = inside ? from[0] : make_float4(0, 0, 0, 0), second = inside ? from[1] : make_float4(0, 0, 0, 0);
    w[0] = first.x, w[1] = first.y, w[2] = first.z, w[3] = first.w;
    w[4] = second.x, w[5] = second.y, w[6] = second.z, w[7] = second.w;
  } else {
    uint4 pairs = inside ? *(const uint4*)((const u16*)s.c + column) : make_uint4(0, 0, 0, 0);
    u32 weight[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = half_of(weight, i);
  }
#if !H32
  u32 h[4][4];
  load(h, (const u16*)s.a + (u64)row * s.width + column, s.width, inside);
#endif
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float rstd = inside ? ((const float*)s.b)[row + j] : 0.0f, v[8];
#if H32
    const float4* from = (const float4*)((const float*)s.a + (u64)(row + j) * s.width + column);
    float4 first = inside ? from[0] : make_float4(0, 0, 0, 0), second = inside ? from[1] : make_float4(0, 0, 0, 0);
    float h[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fmul_rn(__fmul_rn(h[i], rstd), w[i]);
#else
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fmul_rn(__fmul_rn(half_of(h[j], i), rstd), w[i]);
#endif
#pragma unroll
    for (int p = 0; p < 4; p++) x[0][j][p] = bf16s(v[2 * p], v[2 * p + 1]);
  }
#elif PRODUCER == ROPE
  int head = column / DIM, channel = column % DIM, kv = (s.heads - s.queries) / 2;
  const u16* from = (const u16*)s.a + head * s.a_h;
  u64 batch = s.a_b, token = s.a_t;
  if (head >= s.queries + kv) {
    from = (const u16*)s.c + (head - s.queries - kv) * s.c_h, batch = s.c_b, token = s.c_t;
  } else if (head >= s.queries) {
    from = (const u16*)s.b + (head - s.queries) * s.b_h, batch = s.b_b, token = s.b_t;
  }
  bool turned = s.cos && head < s.queries + kv;
  float sign = channel < DIM / 2 ? 1.0f : -1.0f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int sequence = (row + j) / s.tokens, place = row + j - sequence * s.tokens;
    uint4 w = inside ? *(const uint4*)(from + sequence * batch + place * token + channel) : make_uint4(0, 0, 0, 0);
    x[0][j][0] = w.x; x[0][j][1] = w.y; x[0][j][2] = w.z; x[0][j][3] = w.w;
    u32 other[4];
#pragma unroll
    for (int p = 0; p < 4; p++) other[p] = __shfl_xor_sync(~0u, x[0][j][p], DIM / 16);
    if (turned && inside) {
      u64 at = (u64)place * (DIM / 2) + channel % (DIM / 2);
#pragma unroll
      for (int part = 0; part < 2; part++) {
        float4 cos = *(const float4*)(s.cos + at + 4 * part), sin = *(const float4*)(s.sin + at + 4 * part);
        float c4[4] = {cos.x, cos.y, cos.z, cos.w}, s4[4] = {sin.x, sin.y, sin.z, sin.w}, v[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          v[i] = __fadd_rn(__fmul_rn(half_of(x[0][j], 4 * part + i), c4[i]),
                           __fmul_rn(sign * half_of(other, 4 * part + i), s4[i]));
        x[0][j][2 * part] = bf16s(v[0], v[1]);
        x[0][j][2 * part + 1] = bf16s(v[2], v[3]);
      }
    }
  }
#else
  int gate_cols = GATED ? 2 * s.width : s.width;
  const u16* from = (const u16*)(PRODUCER == ACT ? s.a : s.b) + (u64)row * gate_cols + column;
  u32 gate[4][4], up[4][4];
#if STAGED
  u32 dh[4][4];
  load_staged(dh, 0);
  load_staged(gate, 1);
  if (GATED) load_staged(up, 2);
#else
  load(gate, from, gate_cols, inside);
  if (GATED) load(up, from + s.width, gate_cols, inside);
#if PRODUCER == ACT_BACKWARD
  u32 dh[4][4];
  load(dh, (const u16*)s.a + (u64)row * s.width + column, s.width, inside);
#endif
#endif
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int p = 0; p < 4; p++) {
      float h[2], d_gate[2], d_up[2];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        float f, slope;
        activated(half_of(gate[j], 2 * p + k), f, slope);
        float u = GATED ? half_of(up[j], 2 * p + k) : 1.0f;
        h[k] = GATED ? f * u : f;
#if PRODUCER == ACT_BACKWARD
        float d = half_of(dh[j], 2 * p + k);
        d_gate[k] = (GATED ? d * u : d) * slope;
        d_up[k] = d * f;
#endif
      }
#if PRODUCER == ACT
      x[0][j][p] = bf16s(h[0], h[1]);
#else
      x[0][j][p] = bf16s(d_gate[0], d_gate[1]);
      if (GATED) x[GATED][j][p] = bf16s(d_up[0], d_up[1]);
      if (AGAIN) x[OUTPUTS - 1][j][p] = bf16s(h[0], h[1]);
#endif
    }
#endif
}

// ---- the kernel

__device__ __forceinline__ u32 block_max(u32 value, u32* shared) {
  value = __reduce_max_sync(~0u, value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  u32 all = threadIdx.x < THREADS / 32 ? shared[threadIdx.x] : 0;
  return threadIdx.x < 32 ? __reduce_max_sync(~0u, all) : 0;
}

__device__ __forceinline__ void raise(u32* at, u32 value) {
  if ((int)value > *(volatile int*)at) atomicMax((int*)at, (int)value);
}

template <bool IS_E4M3, bool IS_POWER, bool DOWN, bool ACROSS, int HOW>
__device__ __forceinline__ u32 quantize(const u32 (&x)[4][4], const Out& out, int row, int column, int left, bool inside,
                                        u32* turned, u32* columns) {
  int quad = threadIdx.x / 16, group = threadIdx.x % 16;
  if (HOW == STORE) {
    u16* values = (u16*)out.codes + (u64)row * out.cols + left + column;
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (inside) *(uint4*)(values + (u64)j * out.cols) = make_uint4(x[j][0], x[j][1], x[j][2], x[j][3]);
    return 0;
  }
  u32 by_row[4], by_column[8];
  u32 top;
  bool odd = extremes(x, top, by_row, by_column);
  float of_row[4], of_column[8];
  if (HOW == GIVEN || HOW == KNOWN || HOW == MEASURED) {
    float scale = HOW == MEASURED ? scale_of<IS_E4M3, IS_POWER>(*out.amax) : *out.scale;
    if (HOW == MEASURED && blockIdx.x == 0 && threadIdx.x == 0) *out.scale = scale;
#pragma unroll
    for (int j = 0; j < 4; j++) of_row[j] = factor_of<IS_POWER>(scale);
#pragma unroll
    for (int i = 0; i < 8; i++) of_column[i] = of_row[0];
  } else if (HOW == ROW) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (!DOWN) continue;
      float scale = scale_of<IS_E4M3, IS_POWER>(inside ? amax_of_key(out.keys[row + j]) : 0);
      if (inside && left + column == 0) out.scale[row + j] = scale;
      of_row[j] = factor_of<IS_POWER>(scale);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!ACROSS) continue;
      float scale = scale_of<IS_E4M3, IS_POWER>(inside ? amax_of_key(out.keys_t[left + column + i]) : 0);
      if (inside && row < 4) out.scale_t[left + column + i] = scale;
      of_column[i] = factor_of<IS_POWER>(scale);
    }
  } else {
    join_lanes(by_row, by_column);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (!DOWN) continue;
      float scale = scale_of<IS_E4M3, IS_POWER>(by_row[j]);
      if (inside && group == 0)
        out.scale[(u64)(row + j) * out.stride_r + (u64)((left + column) / 128) * out.stride_c] = scale;
      of_row[j] = factor_of<IS_POWER>(scale);
    }
    if (ACROSS) {
      if (threadIdx.x < 128) columns[threadIdx.x] = 0;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (threadIdx.x % 32 < 16) atomicMax(columns + 8 * group + i, by_column[i]);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float scale = scale_of<IS_E4M3, IS_POWER>(columns[8 * group + i]);
        if (inside && quad == 0)
          out.scale_t[(u64)(left + column + i) * out.stride_tr + (u64)(row / 128) * out.stride_tc] = scale;
        of_column[i] = factor_of<IS_POWER>(scale);
      }
      __syncthreads();  // the next output clears `columns`
    }
  }
  u8* codes = out.codes + (u64)row * out.cols + left + column;
  encode<IS_E4M3, IS_POWER, DOWN, ACROSS>(x, of_row, of_column, odd, inside, codes, out.cols, turned, quad, group);
  return top;
}

// Raise the amax, or the keys of rows and columns, to those of x.
__device__ __forceinline__ u32 measure(const u32 (&x)[4][4], const Out& out, int row, int column, int left, bool inside,
                                       int width, u32* columns) {
  u32 by_row[4], by_column[8];
  u32 top;
  extremes(x, top, by_row, by_column);
  if (MODE != ROW) return top;
  int quad = threadIdx.x / 16, group = threadIdx.x % 16;
  join_lanes(by_row, by_column);
  if (threadIdx.x < 128) columns[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 4; j++)
    if (group == 0 && inside) raise(out.keys + row + j, by_row[j] + 0x00800000u);
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (threadIdx.x % 32 < 16) atomicMax(columns + 8 * group + i, by_column[i]);
  __syncthreads();
  int first = column - 8 * group;
  if (threadIdx.x < 128 && first + threadIdx.x < width)
    raise(out.keys_t + left + first + threadIdx.x, columns[threadIdx.x] + 0x00800000u);
  __syncthreads();
  return top;
}

#define BUFFERS (COLS || AGAIN ? (BM == 64 ? OUTPUTS : 1) : 0)  // one after the other where they would not fit

#if STAGED
__device__ __forceinline__ void fetch_all(const Source& s, int row, int column, bool inside) {
  int gate_cols = GATED ? 2 * s.width : s.width;
  u64 at = inside ? (u64)row * gate_cols + column : 0;
  fetch(0, (const u16*)s.a + (inside ? (u64)row * s.width + column : 0), s.width, inside);
  fetch(1, (const u16*)s.b + at, gate_cols, inside);
  if (GATED) fetch(2, (const u16*)s.b + at + s.width, gate_cols, inside);
  asm volatile("cp.async.commit_group;");
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    both(Source source, Out out, Out again, int rows, int across) {
  __shared__ __align__(16) u32 turned[BUFFERS ? BUFFERS : 1][BUFFERS ? 128 * WORDS : 4];
  __shared__ u32 columns[128], tops[32];
  int quad = threadIdx.x / 16, group = threadIdx.x % 16, width = source.width;
  u32 top = 0;
#if STAGED
  int rectangles = (rows + BM - 1) / BM * across;
  int ahead_row = blockIdx.x / across * BM + 4 * quad, ahead_column = blockIdx.x % across * 128 + 8 * group;
  fetch_all(source, ahead_row, ahead_column, ahead_row < rows && ahead_column < width);
  for (int rectangle = blockIdx.x; rectangle < rectangles; rectangle += gridDim.x) {
#else
  {
    int rectangle = blockIdx.x;
#endif
    int first_row = rectangle / across * BM, first_column = rectangle % across * 128;
    int row = first_row + 4 * quad, column = first_column + 8 * group;
    bool inside = row < rows && column < width;
    u32 x[OUTPUTS][4][4];
#if STAGED
    asm volatile("cp.async.wait_all;" ::: "memory");
    produce(x, source, row, column, inside);
    int next = rectangle + gridDim.x;
    ahead_row = next / across * BM + 4 * quad, ahead_column = next % across * 128 + 8 * group;
    if (next < rectangles) fetch_all(source, ahead_row, ahead_column, ahead_row < rows && ahead_column < width);
    if (BUFFERS > 1) __syncthreads();  // the words of the rectangle before have left
#else
    produce(x, source, row, column, inside);
#endif
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) {
      u32* words = turned[BUFFERS > 1 ? o : 0];
      if (FIRST) {
        if (o < OUTPUTS - AGAIN) top = max(top, measure(x[o], out, row, column, o * width, inside, width, columns));
      } else if (o < OUTPUTS - AGAIN) {
        top = max(top, quantize<E4M3, POWER, ROWS, COLS, MODE>(x[o], out, row, column, o * width, inside, words,
                                                               columns));
      } else {
        quantize<H_E4M3, H_POWER, false, true, MODE == GIVEN || MODE == MEASURED ? KNOWN : MODE>(
            x[o], again, row, column, 0, inside, words, columns);
      }
      if (!FIRST && BUFFERS == 1) {
        bool last = AGAIN && o == OUTPUTS - 1;
        __syncthreads();
        send_turned(words, last ? again.codes_t : out.codes_t, rows, first_row, last ? 0 : o * width, width,
                    first_column);
        __syncthreads();
      }
    }
    if (!FIRST && BUFFERS > 1) {
      __syncthreads();
#pragma unroll
      for (int o = 0; o < OUTPUTS; o++) {
        bool last = AGAIN && o == OUTPUTS - 1;
        send_turned(turned[o], last ? again.codes_t : out.codes_t, rows, first_row, last ? 0 : o * width, width,
                    first_column);
      }
    }
  }
#if (FIRST && MODE == MEASURED) || (!FIRST && MODE == GIVEN)
  u32 all = block_max(top, tops);
  if (threadIdx.x == 0) raise(out.amax, all);
#endif
}
