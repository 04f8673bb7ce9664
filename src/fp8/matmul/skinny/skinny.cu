// Products of few rows: y [M, N] = x [M, K] w [N, K]^T, at the speed at which w can be read.
//
// A unit is 16 R rows of w over all of K. A block goes through units; its warps share K: warp v takes the columns
// (v + WARPS s) CHUNK of step s, 64 bytes of each row, so that a step of the block reads neighbouring lines. The warps'
// sums meet in shared memory: warp v takes those of warp v + WARPS / 2, then they are added in ascending order. Which
// column is added where depends on K alone: not on M, not on N, not on the number of multiprocessors.
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
// x is small and comes from the L2, but once for each unit that would be half as much as w again, at 16 tokens, and the
// L2 has little more to give than memory: with KEEP a lane keeps its part of x from the first unit on.
//
// What is compiled in:
//   R        16 rows of w a warp, so many times      TOKENS   8 or 16: M, filled up with zeros
//   WARPS (an even number), STAGES, KEEP             BF16     0: E4M3 codes; 1: BF16 numbers, no scales
//   ALONG    0: scales are constant along K; 1: 1x128 with 128x128
//   BIAS     0 none, 1 BF16, 2 FP32                  OUT32    y is FP32, not BF16
//   RESIDUAL, ROW_X, ROW_W (a scale a row, or one)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS (32 * WARPS)
#define TILES (TOKENS / 8)
#define ROWS (16 * R)
#define HALF (WARPS / 2)
#define SIZE (BF16 ? 2 : 1)
#define CHUNK (64 / SIZE)
#define LINE (THREADS * 16)  // bytes of a slot: 16 a lane
#define EACH ((TOKENS * ROWS + THREADS - 1) / THREADS)  // results a thread
#define PITCH (ROWS + 4)  // of a token's sums: lanes (g, q) of a store fall on 32 banks

struct Operands {
  const u8 *x, *w;
  const float *scale_x, *scale_w;
  const void *bias, *residual;
  void* out;
  int rows, cols, depth;                                   // M, N, K
  int stride_xr, stride_xk, stride_wr, stride_wk;          // of the scales, in elements
};

struct Beside {  // what a result is multiplied by, and what is added to it
  float scale, second, bias, residual;
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
    copy_once(ring + i * LINE, there ? from + (u64)(8 * i) * o.depth * SIZE : o.w, there, policy);
  }
}

__device__ __forceinline__ void fetch_tokens(const Operands& o, const Place& at, u32 ring, int warp, int lane) {
  int column = (at.step * WARPS + warp) * CHUNK + lane % 4 * (16 / SIZE);
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    int token = 8 * t + lane / 4;
    bool there = column < o.depth && token < o.rows;
    copy(ring + t * LINE, there ? o.x + ((u64)token * o.depth + column) * SIZE : o.x, there);
  }
}

// acc += w x^T over one chunk, from the lane's places in both rings.
__device__ __forceinline__ void accumulate(float (&acc)[R][TILES][4], u32 weights, u32 tokens) {
  Fragment w[2 * R], x[TILES];
#pragma unroll
  for (int t = 0; t < TILES; t++) x[t] = read(tokens + t * LINE);
#pragma unroll
  for (int i = 0; i < 2 * R; i++) w[i] = read(weights + i * LINE);
#pragma unroll
  for (int j = 0; j < 4 / SIZE; j++) {
    u32 b[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++) operands(x[t], j, b[t][0], b[t][1]);
#pragma unroll
    for (int r = 0; r < R; r++) {
      u32 a[4];
      operands(w[2 * r], j, a[0], a[2]);
      operands(w[2 * r + 1], j, a[1], a[3]);
#pragma unroll
      for (int t = 0; t < TILES; t++) multiply(acc[r][t], a, b[t]);
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

// Leave the sums of two warps as sums[warp][token][row]: the upper half's first, then the lower half adds its own.
__device__ __forceinline__ void leave(const float (&acc)[R][TILES][4], float* sums, int warp, int lane) {
  float* ours = sums + warp % HALF * TOKENS * PITCH;
  bool upper = warp >= HALF;
#pragma unroll
  for (int turn = 0; turn < 2; turn++) {
    if (upper == (turn == 0)) {
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float& sum = ours[(8 * t + lane % 4 * 2 + e % 2) * PITCH + 16 * r + lane / 4 + e / 2 * 8];
            sum = turn == 0 ? acc[r][t][e] : acc[r][t][e] + sum;
          }
    }
    __syncthreads();
  }
}

// Ask for all that `finish` needs beside the sums, so that it is there when they are.
__device__ __forceinline__ void look_up(const Operands& o, int unit, Beside (&beside)[EACH]) {
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    int i = threadIdx.x + n * THREADS, token = i / ROWS, row = unit * ROWS + i % ROWS;
    if (i >= o.rows * ROWS || row >= o.cols) continue;
    u64 at = (u64)token * o.cols + row;
#if !BF16 && !ALONG
    beside[n].scale = o.scale_w[ROW_W ? row : 0], beside[n].second = o.scale_x[ROW_X ? token : 0];
#endif
    if (BIAS == 1) beside[n].bias = from_bf16(((const u16*)o.bias)[row]);
    if (BIAS == 2) beside[n].bias = ((const float*)o.bias)[row];
    if (RESIDUAL)
      beside[n].residual = OUT32 ? ((const float*)o.residual)[at] : from_bf16(((const u16*)o.residual)[at]);
  }
}

// Add the warps' sums in order, then scales, bias, one rounding, the residual, another.
__device__ __forceinline__ void finish(const Operands& o, int unit, const float* sums, const Beside (&beside)[EACH]) {
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    int i = threadIdx.x + n * THREADS, token = i / ROWS, within = i % ROWS, row = unit * ROWS + within;
    if (i >= o.rows * ROWS || row >= o.cols) continue;
    float y = sums[token * PITCH + within];
#pragma unroll
    for (int v = 1; v < HALF; v++) y += sums[(v * TOKENS + token) * PITCH + within];
#if !BF16 && !ALONG
    y = ROW_X || ROW_W ? y * beside[n].scale * beside[n].second : y * (beside[n].second * beside[n].scale);
#endif
    if (BIAS) y += beside[n].bias;
    u64 at = (u64)token * o.cols + row;
#if OUT32
    ((float*)o.out)[at] = RESIDUAL ? beside[n].residual + y : y;
#else
    u16 bits = to_bf16(y);
    ((u16*)o.out)[at] = RESIDUAL ? to_bf16(beside[n].residual + from_bf16(bits)) : bits;
#endif
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) skinny(Operands o) {
  extern __shared__ __align__(16) u8 memory[];
  float* sums = (float*)memory;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = (o.depth + WARPS * CHUNK - 1) / (WARPS * CHUNK);
  int units = (o.cols + ROWS - 1) / ROWS, mine = (units - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
  const u32 stage = 2 * R * LINE, tile = TILES * LINE;
  u32 weights = shared_address(memory + 4 * HALF * TOKENS * PITCH) + threadIdx.x * 16;
  u32 tokens = weights + STAGES * stage;
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("griddepcontrol.launch_dependents;");
  int total = mine * steps, first = blockIdx.x;
  Place ahead = {first, 0}, here = ahead;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++, ahead.next(steps))
    if (s < total) fetch_weights(o, ahead, weights + s * stage, warp, lane, policy);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  ahead = here;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++, ahead.next(steps)) {
    if (s < total && (!KEEP || ahead.unit == first))
      fetch_tokens(o, ahead, tokens + (KEEP ? ahead.step : s) * tile, warp, lane);
    commit();
  }
  float acc[R][TILES][4];
  Beside beside[EACH];
  clear(acc);
  int slot = 0, free = STAGES - 1;
  for (int i = 0; i < total; i++) {
#if ALONG
    float scale[TILES][2], part[R][TILES][4];
    fetch_scales(o, here, warp, lane, scale);
#endif
    bool last = here.step == steps - 1;
    if (last) look_up(o, here.unit, beside);
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    if (i + STAGES - 1 < total) {
      fetch_weights(o, ahead, weights + free * stage, warp, lane, policy);
      if (!KEEP || ahead.unit == first)
        fetch_tokens(o, ahead, tokens + (KEEP ? ahead.step : free) * tile, warp, lane);
      ahead.next(steps);
    }
    commit();
    u32 of_x = tokens + (KEEP ? here.step : slot) * tile;
#if ALONG
    clear(part);
    accumulate(part, weights + slot * stage, of_x);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[r][t][e] = __fmaf_rn(part[r][t][e], scale[t][e % 2], acc[r][t][e]);
#else
    accumulate(acc, weights + slot * stage, of_x);
#endif
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (last) {
      if (here.unit != first) __syncthreads();  // the sums of the unit before have been read
      leave(acc, sums, warp, lane);
      finish(o, here.unit, sums, beside);
      clear(acc);
    }
    here.next(steps);
  }
}
