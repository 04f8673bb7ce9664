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
// What is compiled in:
//   R        16 rows of w a warp, so many times      TOKENS   8, 16, 32 or 64: M, filled up with zeros
//   WARPS, STAGES                                    BF16     0: E4M3 codes; 1: BF16 numbers, no scales
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
#define SLOTS (2 * R + TILES)
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

// acc += w x^T over one chunk.
__device__ __forceinline__ void accumulate(float (&acc)[R][TILES][4], u32 ring) {
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
    Fragment x = read(ring + (2 * R + t) * THREADS * 16);
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

// Add the warps' sums in order, then scales, bias, one rounding, the residual, another.
__device__ __forceinline__ void finish(const Operands& o, int unit, const float* sums) {
  for (int i = threadIdx.x; i < o.rows * ROWS; i += THREADS) {
    int token = i / ROWS, within = i % ROWS, row = unit * ROWS + within;
    if (row >= o.cols) continue;
    float y = sums[token * PITCH + within];
#pragma unroll
    for (int v = 1; v < WARPS; v++) y += sums[(v * TOKENS + token) * PITCH + within];
#if !BF16 && !ALONG
    if (ROW_X || ROW_W)
      y = y * o.scale_w[ROW_W ? row : 0] * o.scale_x[ROW_X ? token : 0];
    else
      y = y * (o.scale_x[0] * o.scale_w[0]);
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
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++, ahead.next(steps)) {
    if (s < total) fetch_tokens(o, ahead, ring + s * stage, warp, lane);
    commit();
  }
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
      fetch_tokens(o, ahead, ring + free * stage, warp, lane);
      ahead.next(steps);
    }
    commit();
#if ALONG
    clear(part);
    accumulate(part, ring + slot * stage);
#pragma unroll
    for (int r = 0; r < R; r++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[r][t][e] = __fmaf_rn(part[r][t][e], scale[t][e % 2], acc[r][t][e]);
#else
    accumulate(acc, ring + slot * stage);
#endif
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (here.step == steps - 1) {
      leave(acc, sums, warp, lane);
      __syncthreads();
      finish(o, here.unit, sums);
      __syncthreads();
      clear(acc);
    }
    here.next(steps);
  }
}
