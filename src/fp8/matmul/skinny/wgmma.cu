// Products of 17 to 64 rows in FP8: y [M, N] = x [M, K] w [N, K]^T, at the speed at which w can be read.
//
// With more tokens, x is what is in the way: each multiprocessor needs all of the columns of x that it multiplies. So K
// is cut among the CLUSTER blocks of a cluster. A block takes its slice of x once, keeps it, and sends its slice of every
// row of w past it; a warpgroup has 64 rows at a time, a tile. Then the blocks of the cluster hold a tile's sums of each
// slice, and each of them adds, in ascending order, those of its share of the tokens. What is added where depends on K
// alone.
//
// The tensor core's instruction, wgmma m64nNk32, multiplies codes by codes: w comes from registers, where it is never
// converted, and x from shared memory. Of 128 columns at a time the sums begin at zero and are then added to FP32 numbers
// ("promoted"), as the accumulator keeps 13 fraction bits.
//
// Column order within 64 columns is free, as long as both operands keep to it: lane (g, q) of a warp has 16 bytes of
// rows g and g + 8, from byte 16 q on, and words 2 j and 2 j + 1 are what instruction j asks of this lane as its columns
// 4 q .. and 16 + 4 q ... So w needs no exchange: a lane copies what itself will read to a ring in shared memory
// (cp.async), and waits for nobody. x is put in that order as it arrives: x[16 columns][token][16 bytes], where byte 4 q
// of 16-column piece i of a 64 is the word i of the 16 bytes from 16 q on. That is the tensor core's layout without a
// swizzle: eight tokens are 128 bytes, and 16 columns further lie TOKENS * 16 bytes further.
//
// What is compiled in:
//   TOKENS   8, 16, 32 or 64: M, filled with zeros    GROUPS   warpgroups of a block
//   STAGES   steps of 128 columns in flight           CLUSTER  slices of K, each `per` times 128 columns
//   BIAS     0 none, 1 BF16, 2 FP32                   OUT32    y is FP32, not BF16
//   RESIDUAL, ROW_X, ROW_W (a scale a row, or one)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS (128 * GROUPS)
#define LINE (128 * 16)  // bytes of a warpgroup's copy: 16 a lane
#define STAGE (4 * LINE)
#define PITCH (64 + 4)  // of a token's sums: lanes (g, q) of a store fall on 32 banks
#define SUMS (4 * TOKENS * PITCH)  // bytes of a warpgroup's sums
#define SHARE (TOKENS / CLUSTER)   // tokens that a block adds up
#define EACH ((SHARE * 16 + 127) / 128)  // fours of rows that a thread adds up

struct Operands {
  const u8 *x, *w;
  const float *scale_x, *scale_w;
  const void *bias, *residual;
  void* out;
  int rows, cols, depth;  // M, N, K
};

struct Beside {  // what a result is multiplied by, and what is added to it
  float scale[4], second, bias[4], residual[4];
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

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ Fragment read(u32 from) {
  Fragment f;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.word[0]), "=r"(f.word[1]), "=r"(f.word[2]), "=r"(f.word[3])
               : "r"(from)
               : "memory");
  return f;
}

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// What this thread wrote to shared memory may be read by the tensor core, after a barrier.
__device__ __forceinline__ void show() { asm volatile("fence.proxy.async;" ::: "memory"); }

// A barrier of the cluster in two halves; what was written before `arrive` can be read after `wait`.
__device__ __forceinline__ void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }

__device__ __forceinline__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Four numbers at an address of block `from` of the cluster.
__device__ __forceinline__ float4 four_of(u32 address, u32 from) {
  float4 x;
  asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %4, %5;\n\t"
               "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n\t}"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(address), "r"(from)
               : "memory");
  return x;
}

// Where 32 columns of x lie, for the tensor core: 16 columns further, and eight tokens further, in units of 16 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)(address >> 4 & 0x3FFF) | (u64)TOKENS << 16 | (u64)8 << 32;
}

// d = w x^T over 128 columns, from zero; the four words of `a` from 4 n on are instruction n's.
#if TOKENS == 8
#define INTO "{%0, %1, %2, %3}, "
#define STEP_0 "{%4, %5, %6, %7}, %20, never, 1, 1;\n\t"
#define STEP_1 "{%8, %9, %10, %11}, %21, always, 1, 1;\n\t"
#define STEP_2 "{%12, %13, %14, %15}, %22, always, 1, 1;\n\t"
#define STEP_3 "{%16, %17, %18, %19}, %23, always, 1, 1;\n\t"
#define PREDICATES "setp.eq.u64 never, %20, 0;\n\tsetp.ne.u64 always, %20, 0;\n\t"
#define WGMMA "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 " INTO
#elif TOKENS == 16
#define INTO "{%0, %1, %2, %3, %4, %5, %6, %7}, "
#define STEP_0 "{%8, %9, %10, %11}, %24, never, 1, 1;\n\t"
#define STEP_1 "{%12, %13, %14, %15}, %25, always, 1, 1;\n\t"
#define STEP_2 "{%16, %17, %18, %19}, %26, always, 1, 1;\n\t"
#define STEP_3 "{%20, %21, %22, %23}, %27, always, 1, 1;\n\t"
#define PREDICATES "setp.eq.u64 never, %24, 0;\n\tsetp.ne.u64 always, %24, 0;\n\t"
#define WGMMA "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 " INTO
#elif TOKENS == 32
#define INTO "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
#define STEP_0 "{%16, %17, %18, %19}, %32, never, 1, 1;\n\t"
#define STEP_1 "{%20, %21, %22, %23}, %33, always, 1, 1;\n\t"
#define STEP_2 "{%24, %25, %26, %27}, %34, always, 1, 1;\n\t"
#define STEP_3 "{%28, %29, %30, %31}, %35, always, 1, 1;\n\t"
#define PREDICATES "setp.eq.u64 never, %32, 0;\n\tsetp.ne.u64 always, %32, 0;\n\t"
#define WGMMA "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 " INTO
#elif TOKENS == 64
#define INTO                                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}, "
#define STEP_0 "{%32, %33, %34, %35}, %48, never, 1, 1;\n\t"
#define STEP_1 "{%36, %37, %38, %39}, %49, always, 1, 1;\n\t"
#define STEP_2 "{%40, %41, %42, %43}, %50, always, 1, 1;\n\t"
#define STEP_3 "{%44, %45, %46, %47}, %51, always, 1, 1;\n\t"
#define PREDICATES "setp.eq.u64 never, %48, 0;\n\tsetp.ne.u64 always, %48, 0;\n\t"
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 " INTO
#endif
#define FOUR(what, d, i) what(d[i]), what(d[i + 1]), what(d[i + 2]), what(d[i + 3])
#define EIGHT(what, d, i) FOUR(what, d, i), FOUR(what, d, i + 4)
#define MORE(what, d, i) EIGHT(what, d, i), EIGHT(what, d, i + 8)

__device__ __forceinline__ void multiply(float (&d)[TOKENS / 2], const u32 (&a)[16], u64 x) {
  asm volatile("{\n\t.reg .pred never, always;\n\t" PREDICATES "wgmma.fence.sync.aligned;\n\t" WGMMA STEP_0 WGMMA STEP_1
               WGMMA STEP_2 WGMMA STEP_3 "wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;\n\t}"
#if TOKENS == 8
               : FOUR("=f", d, 0)
#elif TOKENS == 16
               : EIGHT("=f", d, 0)
#elif TOKENS == 32
               : MORE("=f", d, 0)
#else
               : MORE("=f", d, 0), MORE("=f", d, 16)
#endif
               : MORE("r", a, 0), "l"(x), "l"(x + 2 * TOKENS), "l"(x + 4 * TOKENS), "l"(x + 6 * TOKENS)
               : "memory");
}

// Where a warpgroup reads: step `step` of its tile in round `round`, both counted on by `next`.
struct Place {
  int round, step;
  __device__ __forceinline__ void next(int steps) {
    if (++step == steps) step = 0, round++;
  }
};

__device__ __forceinline__ int tile_of(int round) {
  return (round * (gridDim.x / CLUSTER) + blockIdx.x / CLUSTER) * GROUPS + threadIdx.x / 128;
}

__device__ __forceinline__ void fetch_weights(const Operands& o, const Place& at, u32 ring, int steps, u64 policy) {
  int lane = threadIdx.x % 32, tile = tile_of(at.round), row = tile * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
  int column = (blockIdx.x % CLUSTER * steps + at.step) * 128 + lane % 4 * 16;
  bool there = tile < o.cols / 64;
  const u8* from = o.w + (u64)row * o.depth + column;
#pragma unroll
  for (int c = 0; c < 2; c++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      copy_once(ring + (2 * c + i) * LINE, there ? from + 64 * c + (u64)(8 * i) * o.depth : o.w, there, policy);
}

// The block's slice of x, in the order in which the tensor core reads it: 64 bytes of a token at a time.
__device__ __forceinline__ void take_tokens(const Operands& o, u8* x, int steps) {
  int first = blockIdx.x % CLUSTER * steps * 128, chunks = 2 * steps;
#pragma unroll 4
  for (int i = threadIdx.x; i < TOKENS * chunks; i += THREADS) {
    int chunk = i / 8 % chunks, token = i / 8 / chunks * 8 + i % 8;
    uint4 in[4];
#pragma unroll
    for (int q = 0; q < 4; q++)
      in[q] = token < o.rows ? ((const uint4*)(o.x + (u64)token * o.depth + first + chunk * 64))[q] : uint4{};
    uint4* to = (uint4*)x + 4 * chunk * TOKENS + token;
    to[0] = make_uint4(in[0].x, in[1].x, in[2].x, in[3].x);
    to[TOKENS] = make_uint4(in[0].y, in[1].y, in[2].y, in[3].y);
    to[2 * TOKENS] = make_uint4(in[0].z, in[1].z, in[2].z, in[3].z);
    to[3 * TOKENS] = make_uint4(in[0].w, in[1].w, in[2].w, in[3].w);
  }
}

// acc += w x^T over 128 columns: the lane's bytes of w in the ring, and where x lies.
__device__ __forceinline__ void accumulate(float (&acc)[TOKENS / 2], u32 ring, u64 x) {
  u32 a[16];
  float part[TOKENS / 2];
#pragma unroll
  for (int c = 0; c < 2; c++) {
    Fragment upper = read(ring + 2 * c * LINE), lower = read(ring + (2 * c + 1) * LINE);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      a[8 * c + 4 * j] = upper.word[2 * j], a[8 * c + 4 * j + 2] = upper.word[2 * j + 1];
      a[8 * c + 4 * j + 1] = lower.word[2 * j], a[8 * c + 4 * j + 3] = lower.word[2 * j + 1];
    }
  }
  multiply(part, a, x);
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) acc[i] += part[i];
}

// Leave a warpgroup's sums as sums[token][row].
__device__ __forceinline__ void leave(const float (&acc)[TOKENS / 2], float* sums) {
  int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int t = 0; t < TOKENS / 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) sums[(8 * t + lane % 4 * 2 + e % 2) * PITCH + row + e / 2 * 8] = acc[4 * t + e];
}

// The token of the thread's `n`th four of rows in its block's share, and the first of its rows in the tile.
__device__ __forceinline__ int token_of(int n) {
  return blockIdx.x % CLUSTER * SHARE + (threadIdx.x % 128 + 128 * n) / 16;
}

__device__ __forceinline__ bool has(const Operands& o, int tile, int n) {
  return tile < o.cols / 64 && threadIdx.x % 128 + 128 * n < SHARE * 16 && token_of(n) < o.rows;
}

// Ask for all that `finish` needs beside the sums, while blocks wait for each other.
__device__ __forceinline__ void look_up(const Operands& o, int tile, Beside (&beside)[EACH]) {
  int row = tile * 64 + threadIdx.x % 16 * 4;
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    if (!has(o, tile, n)) continue;
    u64 at = (u64)token_of(n) * o.cols + row;
    beside[n].second = o.scale_x[ROW_X ? token_of(n) : 0];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      beside[n].scale[i] = o.scale_w[ROW_W ? row + i : 0];
      if (BIAS == 1) beside[n].bias[i] = from_bf16(((const u16*)o.bias)[row + i]);
      if (BIAS == 2) beside[n].bias[i] = ((const float*)o.bias)[row + i];
      if (RESIDUAL)
        beside[n].residual[i] =
            OUT32 ? ((const float*)o.residual)[at + i] : from_bf16(((const u16*)o.residual)[at + i]);
    }
  }
}

// Add the slices in order, then scales, bias, one rounding, the residual, another.
__device__ __forceinline__ void finish(const Operands& o, int tile, u32 sums, const Beside (&beside)[EACH]) {
  int within = threadIdx.x % 16 * 4;
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    if (!has(o, tile, n)) continue;
    u32 place = sums + 4 * (token_of(n) * PITCH + within);
    float4 sum = four_of(place, 0);
#pragma unroll
    for (int s = 1; s < CLUSTER; s++) {
      float4 next = four_of(place, s);
      sum.x += next.x, sum.y += next.y, sum.z += next.z, sum.w += next.w;
    }
    float y[4] = {sum.x, sum.y, sum.z, sum.w};
    u64 at = (u64)token_of(n) * o.cols + tile * 64 + within;
    u32 bits[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const Beside& b = beside[n];
      y[i] = ROW_X || ROW_W ? y[i] * b.scale[i] * b.second : y[i] * (b.second * b.scale[i]);
      if (BIAS) y[i] += b.bias[i];
      if (OUT32 && RESIDUAL) y[i] = b.residual[i] + y[i];
      bits[i] = to_bf16(y[i]);
      if (RESIDUAL && !OUT32) bits[i] = to_bf16(b.residual[i] + from_bf16(bits[i]));
    }
    if (OUT32)
      *(float4*)((float*)o.out + at) = make_float4(y[0], y[1], y[2], y[3]);
    else
      *(uint2*)((u16*)o.out + at) = make_uint2(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16);
  }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) skinny(Operands o) {
  extern __shared__ __align__(16) u8 memory[];
  int steps = o.depth / (128 * CLUSTER), group = threadIdx.x / 128;
  int at_once = gridDim.x / CLUSTER * GROUPS, rounds = (o.cols / 64 + at_once - 1) / at_once, total = rounds * steps;
  float* sums = (float*)(memory + steps * 128 * TOKENS + group * SUMS);
  u32 ring = shared_address(memory + steps * 128 * TOKENS + GROUPS * SUMS + group * STAGES * STAGE);
  ring += threadIdx.x % 128 * 16;
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("griddepcontrol.launch_dependents;");
  Place ahead = {0, 0}, here = ahead;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++, ahead.next(steps)) {
    if (s < total) fetch_weights(o, ahead, ring + s * STAGE, steps, policy);
    commit();
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  take_tokens(o, memory, steps);
  show();
  __syncthreads();
  u64 x = descriptor(shared_address(memory));
  float acc[TOKENS / 2] = {};
  Beside beside[EACH];
  int slot = 0, free = STAGES - 1;
  for (int i = 0; i < total; i++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    if (i + STAGES - 1 < total) {
      fetch_weights(o, ahead, ring + free * STAGE, steps, policy);
      ahead.next(steps);
    }
    commit();
    accumulate(acc, ring + slot * STAGE, x + here.step * 8 * TOKENS);
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (here.step == steps - 1) {
      int tile = tile_of(here.round);
      if (here.round > 0) wait();  // all have read the sums of the round before
      leave(acc, sums);
      arrive();
      look_up(o, tile, beside);
      wait();
      finish(o, tile, shared_address(sums), beside);
      arrive();
#pragma unroll
      for (int n = 0; n < TOKENS / 2; n++) acc[n] = 0.0f;
    }
    here.next(steps);
  }
  wait();  // nobody leaves while another reads
}
