// Products of few rows: y [M, N] = x [M, K] w [N, K]^T, at the speed at which w can be read.
//
// A unit is 16 R rows of w over all of K. A block goes through units; its warps share K: warp v takes the columns
// (v + WARPS s) CHUNK of step s, 64 bytes of each row, so that a step of the block reads neighbouring lines. The warps'
// sums meet in shared memory and are added in ascending order. Which column is added where depends on K alone: not on
// M, not on N, not on the number of multiprocessors.
//
// The tensor core's instruction, m16n8k16 with F16 operands: 16 rows of w, 8 tokens, 16 columns. Each E4M3 code is an
// F16 number, so conversion is exact; so are the products; the sums are FP32. Column order within a chunk is free, as
// long as both operands keep to it, and this one needs no exchange between lanes: lane (g, q) has 16 bytes of row g,
// from byte 16 q on; word j of them is what instruction j asks of this lane.
//
// A lane copies what itself will read, 16 bytes at a time, to a ring in shared memory (cp.async): a register file of
// STAGES steps. Nothing but the end of a unit needs a barrier. Weights do not depend on the kernel before this one: they
// are asked for before griddepcontrol.wait, what it made after.
//
// With PREPARED rows x is BF16, and each block makes codes of all of it itself while its first weights are on their way:
// optionally the RMS norm (the mean in FP64, roundings as fused/norm has them), then a scale a row, or a given one, and
// the codes, bytes as `quantize` makes them. At most four rows: the work is done by every block again.
//
// What is compiled in:
//   R        16 rows of w a warp, so many times      TOKENS   8, 16, 32 or 64: M, filled up with zeros
//   WARPS, STAGES                                    BF16     0: E4M3 codes; 1: BF16 numbers, no scales
//   ALONG    0: scales are constant along K; 1: 1x128 with 128x128
//   BIAS     0 none, 1 BF16, 2 FP32                  OUT32    y is FP32, not BF16
//   RESIDUAL, ROW_X, ROW_W (a scale a row, or one)
//   PREPARED 0, or 1, 2 or 4 rows of BF16; then NORM, W32 (its weight is FP32), POWER (scales are powers of two), and
//            VECTORS, 8 columns each, that a thread has of a row

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS (32 * WARPS)
#define TILES (TOKENS / 8)
#define ROWS (16 * R)
#define SLOTS (2 * R + (PREPARED ? 0 : TILES))
#define SIZE (BF16 ? 2 : 1)
#define CHUNK (64 / SIZE)
#define PITCH (ROWS + 4)  // of a token's sums: lanes (g, q) of a store fall on 32 banks

struct Operands {
  const u8 *x, *w;
  const float *scale_x, *scale_w;
  const void *bias, *residual;
  void* out;
  int rows, cols, depth;                                   // M, N, K
  int stride_xr, stride_xk, stride_wr, stride_wk;          // of the scales, in elements
  const void* norm;                                        // weight of the norm [K]
  float eps;
};

struct Prepared {  // what a block knows of its rows
  double squares[4][WARPS];
  int keys[4][WARPS];
  float scales[4];
};

struct Fragment {
  u32 word[4];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes to shared memory; zeros where `there` is false. The weight is read once: it leaves the L2 first.
__device__ __forceinline__ void copy_once(u32 to, const u8* from, bool there, u64 policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void copy(u32 to, const u8* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ Fragment read(u32 from) {
  Fragment f;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.word[0]), "=r"(f.word[1]), "=r"(f.word[2]), "=r"(f.word[3])
               : "r"(from)
               : "memory");
  return f;
}

// Two codes to two F16 numbers.
__device__ __forceinline__ u32 widen(u32 pair) {
  u32 two;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)pair));
  return two;
}

// What instruction j reads of a lane's 16 bytes: its columns 2q, 2q + 1, and 2q + 8, 2q + 9.
__device__ __forceinline__ void operands(const Fragment& f, int j, u32& low, u32& high) {
#if BF16
  low = f.word[2 * j], high = f.word[2 * j + 1];
#else
  low = widen(f.word[j] & 0xFFFF), high = widen(f.word[j] >> 16);
#endif
}

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Where a block reads: step `step` of unit `unit`, both counted on by `next`.
struct Place {
  int unit, step;
  __device__ __forceinline__ void next(int steps) {
    if (++step == steps) step = 0, unit += gridDim.x;
  }
};

__device__ __forceinline__ void fetch_weights(const Operands& o, const Place& at, u32 ring, int warp, int lane,
                                              u64 policy) {
  int row = at.unit * ROWS + lane / 4, column = (at.step * WARPS + warp) * CHUNK + lane % 4 * (16 / SIZE);
  bool inside = column < o.depth;
  const u8* from = o.w + ((u64)row * o.depth + column) * SIZE;
#pragma unroll
  for (int i = 0; i < 2 * R; i++) {
    bool there = inside && row + 8 * i < o.cols;
    copy_once(ring + i * THREADS * 16, there ? from + (u64)(8 * i) * o.depth * SIZE : o.w, there, policy);
  }
}

__device__ __forceinline__ void fetch_tokens(const Operands& o, const Place& at, u32 ring, int warp, int lane) {
  int column = (at.step * WARPS + warp) * CHUNK + lane % 4 * (16 / SIZE);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    int token = 8 * t + lane / 4;
    bool there = column < o.depth && token < o.rows;
    copy(ring + (2 * R + t) * THREADS * 16, there ? o.x + ((u64)token * o.depth + column) * SIZE : o.x, there);
  }
}

// acc += w x^T over one chunk; `codes` are the lane's of a prepared row, `there` whether it has any.
__device__ __forceinline__ void accumulate(float (&acc)[R][TILES][4], u32 ring, u32 codes, bool there) {
  Fragment w[2 * R];
#pragma unroll
  for (int i = 0; i < 2 * R; i++) w[i] = read(ring + i * THREADS * 16);
  u32 a[R][4 / SIZE][4];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int j = 0; j < 4 / SIZE; j++) {
      operands(w[2 * r], j, a[r][j][0], a[r][j][2]);
      operands(w[2 * r + 1], j, a[r][j][1], a[r][j][3]);
    }
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    Fragment x = {};
    if (!PREPARED)
      x = read(ring + (2 * R + t) * THREADS * 16);
    else if (there)
      x = read(codes);
#pragma unroll
    for (int j = 0; j < 4 / SIZE; j++) {
      u32 b[2];
      operands(x, j, b[0], b[1]);
#pragma unroll
      for (int r = 0; r < R; r++) multiply(acc[r][t], a[r][j], b);
    }
  }
}

// The scales of a chunk, 1x128 with 128x128: one for each of a lane's tokens, times the rows' one.
__device__ __forceinline__ void fetch_scales(const Operands& o, const Place& at, int warp, int lane,
                                             float (&scale)[TILES][2]) {
  int block = (at.step * WARPS + warp) * CHUNK / 128;
  bool inside = block * 128 < o.depth;
  float of_w = inside ? o.scale_w[(at.unit * ROWS / 128) * o.stride_wr + block * o.stride_wk] : 0.0f;
#pragma unroll
  for (int t = 0; t < TILES; t++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      int token = 8 * t + lane % 4 * 2 + e;
      scale[t][e] = inside && token < o.rows ? o.scale_x[token * o.stride_xr + block * o.stride_xk] * of_w : 0.0f;
    }
}

__device__ __forceinline__ void clear(float (&acc)[R][TILES][4]) {
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[r][t][e] = 0.0f;
}

// Leave a warp's sums as sums[warp][token][row].
__device__ __forceinline__ void leave(const float (&acc)[R][TILES][4], float* sums, int warp, int lane) {
  float* mine = sums + warp * TOKENS * PITCH;
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        mine[(8 * t + lane % 4 * 2 + e % 2) * PITCH + 16 * r + lane / 4 + e / 2 * 8] = acc[r][t][e];
}

#if PREPARED
__device__ __forceinline__ u16 to_codes(float first, float second) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ double sum_of_warp(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

// The dequantizing scale of an amax, given by its key (`quantize`: FP32 bits + 0x00800000; Inf and NaN are negative).
__device__ __forceinline__ float scale_of(int key) {
  int amax = max(key, 0x00800000) - 0x00800000;
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

__device__ __forceinline__ float weight_at(const Operands& o, int column) {
  return W32 ? ((const float*)o.norm)[column] : from_bf16(((const u16*)o.norm)[column]);
}

// Codes of all rows, codes[token][K + 16], and their scales.
__device__ __forceinline__ void prepare(const Operands& o, Prepared& p, u8* codes) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float x[PREPARED][VECTORS][8];
#pragma unroll
  for (int m = 0; m < PREPARED; m++)
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      int column = (v * THREADS + threadIdx.x) * 8;
      uint4 read = make_uint4(0, 0, 0, 0);
      if (m < o.rows && column < o.depth) read = __ldcg((const uint4*)(o.x + ((u64)m * o.depth + column) * 2));
      u32 words[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
      for (int i = 0; i < 8; i++) x[m][v][i] = from_bf16(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xFFFF);
    }
#if NORM
#pragma unroll
  for (int m = 0; m < PREPARED; m++) {
    double squares = 0.0;
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
#pragma unroll
      for (int i = 0; i < 8; i++) squares += (double)x[m][v][i] * (double)x[m][v][i];
    squares = sum_of_warp(squares);
    if (lane == 0) p.squares[m][warp] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < PREPARED; m++) {
    double squares = 0.0;
#pragma unroll
    for (int v = 0; v < WARPS; v++) squares += p.squares[m][v];
    float rstd = __fdiv_rn(1.0f, __fsqrt_rn((float)(squares / o.depth) + o.eps));
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      int column = (v * THREADS + threadIdx.x) * 8;
      if (column >= o.depth) continue;
#pragma unroll
      for (int i = 0; i < 8; i++)
        x[m][v][i] = from_bf16(to_bf16(__fmul_rn(__fmul_rn(x[m][v][i], rstd), weight_at(o, column + i))));
    }
  }
#endif
#if ROW_X
#pragma unroll
  for (int m = 0; m < PREPARED; m++) {
    int key = 0;
#pragma unroll
    for (int v = 0; v < VECTORS; v++)
#pragma unroll
      for (int i = 0; i < 8; i++) key = max(key, (int)((__float_as_uint(x[m][v][i]) & 0x7FFFFFFFu) + 0x00800000u));
    key = __reduce_max_sync(0xFFFFFFFFu, key);
    if (lane == 0) p.keys[m][warp] = key;
  }
  __syncthreads();
#endif
#pragma unroll
  for (int m = 0; m < PREPARED; m++) {
    float scale = 0.0f;
#if ROW_X
    int key = 0;
#pragma unroll
    for (int v = 0; v < WARPS; v++) key = max(key, p.keys[m][v]);
    scale = scale_of(key);
#else
    scale = o.scale_x[0];
#endif
    if (threadIdx.x == 0) p.scales[m] = scale;
#pragma unroll
    for (int v = 0; v < VECTORS; v++) {
      int column = (v * THREADS + threadIdx.x) * 8;
      if (column >= o.depth) continue;
      u32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float a = x[m][v][2 * i], b = x[m][v][2 * i + 1];  // times zero, plus the quotient: NaN if it is not finite
        pairs[i] = to_codes(__fmaf_rn(a, 0.0f, divided(a, scale)), __fmaf_rn(b, 0.0f, divided(b, scale)));
      }
      *(uint2*)(codes + m * (o.depth + 16) + column) = make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
    }
  }
  __syncthreads();
}
#endif

// Add the warps' sums in order, then scales, bias, one rounding, the residual, another.
__device__ __forceinline__ void finish(const Operands& o, int unit, const float* sums, const float* scale_x) {
  for (int i = threadIdx.x; i < o.rows * ROWS; i += THREADS) {
    int token = i / ROWS, within = i % ROWS, row = unit * ROWS + within;
    if (row >= o.cols) continue;
    float y = sums[token * PITCH + within];
#pragma unroll
    for (int v = 1; v < WARPS; v++) y += sums[(v * TOKENS + token) * PITCH + within];
#if !BF16 && !ALONG
    if (ROW_X || ROW_W || PREPARED)  // a given scale stands for one a row
      y = y * o.scale_w[ROW_W ? row : 0] * scale_x[ROW_X ? token : 0];
    else
      y = y * (scale_x[0] * o.scale_w[0]);
#endif
    if (BIAS == 1) y += from_bf16(((const u16*)o.bias)[row]);
    if (BIAS == 2) y += ((const float*)o.bias)[row];
    u64 at = (u64)token * o.cols + row;
#if OUT32
    ((float*)o.out)[at] = RESIDUAL ? ((const float*)o.residual)[at] + y : y;
#else
    u16 bits = to_bf16(y);
    ((u16*)o.out)[at] = RESIDUAL ? to_bf16(from_bf16(((const u16*)o.residual)[at]) + from_bf16(bits)) : bits;
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) skinny(Operands o) {
  extern __shared__ __align__(16) u8 memory[];
  float* sums = (float*)memory;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = (o.depth + WARPS * CHUNK - 1) / (WARPS * CHUNK);
  int units = (o.cols + ROWS - 1) / ROWS, mine = (units - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  u32 ring = shared_address(memory + 4 * WARPS * TOKENS * PITCH) + threadIdx.x * 16;
  const u32 stage = SLOTS * THREADS * 16;
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("griddepcontrol.launch_dependents;");
  int total = mine * steps;
  Place ahead = {(int)blockIdx.x, 0}, here = ahead;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++, ahead.next(steps))
    if (s < total) fetch_weights(o, ahead, ring + s * stage, warp, lane, policy);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  ahead = here;
  const float* scale_x = o.scale_x;
  u32 codes = 0;
  bool mine_there = lane / 4 < o.rows;
#if PREPARED
  Prepared& rows = *(Prepared*)(memory + 4 * WARPS * TOKENS * PITCH + STAGES * stage);
  u8* made = (u8*)(&rows + 1);
  codes = shared_address(made) + lane / 4 * (o.depth + 16) + lane % 4 * 16;
  scale_x = rows.scales;
#endif
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++, ahead.next(steps)) {
    if (!PREPARED && s < total) fetch_tokens(o, ahead, ring + s * stage, warp, lane);
    commit();
  }
#if PREPARED
  prepare(o, rows, made);
#endif
  float acc[R][TILES][4];
  clear(acc);
  int slot = 0, free = STAGES - 1;
  for (int i = 0; i < total; i++) {
#if ALONG
    float scale[TILES][2], part[R][TILES][4];
    fetch_scales(o, here, warp, lane, scale);
#endif
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    if (i + STAGES - 1 < total) {
      fetch_weights(o, ahead, ring + free * stage, warp, lane, policy);
      if (!PREPARED) fetch_tokens(o, ahead, ring + free * stage, warp, lane);
      ahead.next(steps);
    }
    commit();
    int column = (here.step * WARPS + warp) * CHUNK;
    bool there = mine_there && column + lane % 4 * 16 < o.depth;
#if ALONG
    clear(part);
    accumulate(part, ring + slot * stage, codes + column, there);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[r][t][e] = __fmaf_rn(part[r][t][e], scale[t][e % 2], acc[r][t][e]);
#else
    accumulate(acc, ring + slot * stage, codes + column, there);
#endif
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (here.step == steps - 1) {
      leave(acc, sums, warp, lane);
      __syncthreads();
      finish(o, here.unit, sums, scale_x);
      __syncthreads();
      clear(acc);
    }
    here.next(steps);
  }
}
