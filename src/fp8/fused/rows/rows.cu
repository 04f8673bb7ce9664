// A row of BF16 values to E4M3 codes and their scales, as fast as a single row can be: between two products of a decode
// step nothing else runs, so what counts is latency.
//
// A row is a block, or a cluster of CLUSTER blocks that tell each other their amax; a thread has VECTORS times eight
// columns of it in registers. The kernel lets the next one come at once, so that its weights are on their way, and waits
// for the one before; the norm's own weight is read before that. Numbers are those of `quantize`: see
// quantize/triton_cast.py for keys, scales and what becomes of Inf and NaN.
//
// What is compiled in:
//   PRODUCER 0 x itself; 1 its RMS norm: the mean of squares in FP64, roundings as fused/norm; 2 silu(gate) * up;
//            3 attention, from the partitions of a decode step (attention/paged/decode.cu, whose GROUP, PART, FEW and SHORT
//            it needs), joined eight at a time, in ascending order
//   MODE     0 a given scale; 1 one a row; 2 one for 128 columns; 3 no codes: the values, in BF16
//   POWER    scales are powers of two                W32      the norm's weight is FP32, not BF16
//   COLS     a multiple of 8 (PRODUCER 3: of 128)    WARPS, CLUSTER (with PRODUCER 1: 1)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS (32 * WARPS)
#define VECTORS ((COLS / 8 + THREADS * CLUSTER - 1) / (THREADS * CLUSTER))
#define EMPTY 0x00800000  // the key of zero
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif

struct Operands {
  const u8 *x, *weight;
  const float* given;
  u8* codes;  // or values
  float* scale;
  int stride_r, stride_c;  // of the scales
  float eps;
  const float2* stats;  // with PRODUCER 3: (reference, total) of each partition and head; x is FP32
  const int* lengths;
  int parts;
};

struct Values {
  float of[8];
};

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float rounded(float x) { return from_bf16(to_bf16(x)); }

__device__ __forceinline__ u16 to_codes(float first, float second) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ float power(float x) {  // 2^x
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quotient(float a, float b) {  // within two units in the last place
  float y;
  asm("div.full.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// Blocks of a cluster wait for each other; and what number `from` left at `place` of its shared memory.
#if CLUSTER > 1
__device__ __forceinline__ void meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ int told(const int* place, int from) {
  int x;
  asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\t"
               "ld.shared::cluster.s32 %0, [there];\n\t}"
               : "=r"(x)
               : "r"((u32)__cvta_generic_to_shared(place)), "r"(from)
               : "memory");
  return x;
}
#endif

// Eight columns from `column` on; zeros beyond the row.
__device__ __forceinline__ Values eight(const u8* from, int column) {
  uint4 read = make_uint4(0, 0, 0, 0);
  if (column < COLS) read = *(const uint4*)(from + 2 * column);
  u32 words[4] = {read.x, read.y, read.z, read.w};
  Values y;
#pragma unroll
  for (int i = 0; i < 8; i++) y.of[i] = from_bf16(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFF);
  return y;
}

__device__ __forceinline__ Values eight_wide(const u8* from, int column) {
  Values y = {};
  if (column >= COLS) return y;
  float4 low = *(const float4*)(from + 4 * column), high = *(const float4*)(from + 4 * column + 16);
  y.of[0] = low.x, y.of[1] = low.y, y.of[2] = low.z, y.of[3] = low.w;
  y.of[4] = high.x, y.of[5] = high.y, y.of[6] = high.z, y.of[7] = high.w;
  return y;
}

// 1 / sqrt(mean of squares + eps) of the block's row.
__device__ __forceinline__ float rstd_of(const Values (&x)[VECTORS], float eps) {
  __shared__ double parts[WARPS];
  double squares = 0.0;
#pragma unroll
  for (int v = 0; v < VECTORS; v++)
#pragma unroll
    for (int i = 0; i < 8; i++) squares = __fma_rn((double)x[v].of[i], (double)x[v].of[i], squares);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  double sum[8] = {};
#pragma unroll
  for (int v = 0; v < WARPS; v++) sum[v % 8] += parts[v];
#pragma unroll
  for (int step = 4; step > 0; step /= 2)
#pragma unroll
    for (int v = 0; v < step; v++) sum[v] += sum[v + step];
  return __fdiv_rn(1.0f, __fsqrt_rn((float)(sum[0] / COLS) + eps));
}

__device__ __forceinline__ int key_of(const Values& x) {
  int key = EMPTY;
#pragma unroll
  for (int i = 0; i < 8; i++) key = max(key, (int)((__float_as_uint(x.of[i]) & 0x7FFFFFFFu) + EMPTY));
  return key;
}

// The key of the whole row.
__device__ __forceinline__ int key_of_row(const Values (&x)[VECTORS]) {
  __shared__ int parts[WARPS], whole;
  int key = EMPTY;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) key = max(key, key_of(x[v]));
  key = __reduce_max_sync(0xFFFFFFFFu, key);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = key;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < WARPS; v++) key = max(key, parts[v]);
#if CLUSTER > 1
  if (threadIdx.x == 0) whole = key;
  meet();
#pragma unroll
  for (int i = 0; i < CLUSTER; i++) key = max(key, told(&whole, i));
#endif
  return key;
}

// The key of 128 columns, which are those of 16 lanes.
__device__ __forceinline__ int key_of_group(const Values& x) {
  int key = key_of(x);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) key = max(key, __shfl_xor_sync(0xFFFFFFFFu, key, step));
  return key;
}

// The dequantizing scale that a key stands for.
__device__ __forceinline__ float scale_of(int key) {
  int amax = key - EMPTY;
  if (amax == 0) return 1.0f;
  if (POWER) return __int_as_float(max(((amax + 0x1FFFFF) & 0x7F800000) - (8 << 23), 1 << 23));
  return fminf(fmaxf(__fdiv_rn(__int_as_float(amax), 448.0f), 1.1754943508222875e-38f), 8.507059173023462e37f);
}

// x / scale; of a power of two the reciprocal is exact.
__device__ __forceinline__ float divided(float x, float scale) {
  if (!POWER) return __fdiv_rn(x, scale);
  int bits = __float_as_int(scale);
  return __fmul_rn(x, __int_as_float(bits == 0x7F000000 ? 1 << 22 : 0x7F000000 - bits));
}

__device__ __forceinline__ void store_codes(u8* to, const Values& x, float scale) {
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float a = x.of[2 * i], b = x.of[2 * i + 1];  // times zero, plus the quotient: NaN if it is not finite
    pairs[i] = to_codes(__fmaf_rn(a, 0.0f, divided(a, scale)), __fmaf_rn(b, 0.0f, divided(b, scale)));
  }
  *(uint2*)to = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

__device__ __forceinline__ void store_values(u8* to, const Values& x) {
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) pairs[i] = to_bf16(x.of[2 * i]) | (u32)to_bf16(x.of[2 * i + 1]) << 16;
  *(uint4*)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

#if PRODUCER == 3
// Eight channels of a query head of sequence `row`.
__device__ __forceinline__ Values joined(const Operands& o, int row, int column, int parts) {
  int head = column / 128;
  u64 first = ((u64)(row * (COLS / 128 / GROUP) + head / GROUP) * o.parts) * GROUP + head % GROUP;
  float top = __int_as_float(0xFF800000), total = 0.0f;
  Values y = {};
  for (int start = 0; column < COLS && start < parts; start += 8) {
    float2 stats[8];
    float4 low[8], high[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      u64 at = first + (u64)(start + i) * GROUP;
      const float* from = (const float*)o.x + at * 128 + column % 128;
      bool there = start + i < parts;
      stats[i] = there ? o.stats[at] : make_float2(__int_as_float(0xFF800000), 0.0f);
      low[i] = there ? *(const float4*)from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      high[i] = there ? *(const float4*)(from + 4) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    float most = top;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, stats[i].x);
    float fade = power(top - most);
    total *= fade, top = most;
#pragma unroll
    for (int e = 0; e < 8; e++) y.of[e] *= fade;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float share = power(stats[i].x - most);
      total += stats[i].y * share;
      y.of[0] += low[i].x * share, y.of[1] += low[i].y * share, y.of[2] += low[i].z * share;
      y.of[3] += low[i].w * share, y.of[4] += high[i].x * share, y.of[5] += high[i].y * share;
      y.of[6] += high[i].z * share, y.of[7] += high[i].w * share;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; e++) y.of[e] = parts ? rounded(__fdiv_rn(y.of[e], total)) : 0.0f;
  return y;
}
#endif

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS) rows(Operands o) {
  int row = blockIdx.x / CLUSTER, part = blockIdx.x % CLUSTER;
  int first = (part * VECTORS * THREADS + threadIdx.x) * 8;
  const u8* from = o.x + (u64)row * COLS * (PRODUCER == 2 ? 4 : 2);
  Values x[VECTORS], beside[VECTORS];
  asm volatile("griddepcontrol.launch_dependents;");
#if PRODUCER == 1
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    int column = first + v * THREADS * 8;
    beside[v] = W32 ? eight_wide(o.weight, column) : eight(o.weight, column);
  }
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
#if PRODUCER == 3
  int length = o.lengths[row], size = length <= SHORT ? FEW : PART, parts = (length + size - 1) / size;
#endif
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    int column = first + v * THREADS * 8;
#if PRODUCER == 3
    x[v] = joined(o, row, column, parts);
#else
    x[v] = eight(from, column);
    if (PRODUCER == 2) beside[v] = eight(from + 2 * COLS, column);
#endif
  }
  float rstd = 0.0f;
#if PRODUCER == 1
  rstd = rstd_of(x, o.eps);
#endif
#pragma unroll
  for (int v = 0; v < VECTORS; v++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float y = x[v].of[i];
      if (PRODUCER == 1) x[v].of[i] = rounded(__fmul_rn(__fmul_rn(y, rstd), beside[v].of[i]));
      if (PRODUCER == 2) {
        float sigmoid = quotient(1.0f, 1.0f + power(__fmul_rn(-y, 1.4426950408889634f)));
        x[v].of[i] = rounded(__fmul_rn(__fmul_rn(y, sigmoid), beside[v].of[i]));
      }
    }
  float scale = MODE == 0 ? o.given[0] : 0.0f;
#if MODE == 1
  scale = scale_of(key_of_row(x));
#endif
  if (MODE < 2 && part == 0 && threadIdx.x == 0) o.scale[row] = scale;
#pragma unroll
  for (int v = 0; v < VECTORS; v++) {
    int column = first + v * THREADS * 8;
#if MODE == 2
    scale = scale_of(key_of_group(x[v]));
    if (column < COLS && column % 128 == 0) o.scale[row * o.stride_r + column / 128 * o.stride_c] = scale;
#endif
    u64 at = (u64)row * COLS + column;
    if (column >= COLS) continue;
    if (MODE == 3)
      store_values(o.codes + 2 * at, x[v]);
    else
      store_codes(o.codes + at, x[v], scale);
  }
#if CLUSTER > 1 && MODE == 1
  meet();  // nobody leaves while another reads
#endif
}
