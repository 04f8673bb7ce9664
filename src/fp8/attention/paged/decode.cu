// Decode attention over pages of FP8 keys and values: one query row a sequence, a stream of codes past the tensor core.
//
// An item is PART positions of one sequence and key head; block b takes the items b, b + blocks, ... Within an item warp
// v takes the tiles v, v + WARPS, ... of 16 keys. A tile never straddles a page. Who computes an item is chance, what is
// computed is not: tiles, their order, and the order in which warps and then items are joined depend on positions alone.
// The last block to finish an item of a sequence and head (a ticket) joins them all, in ascending order.
//
// Both products use m16n8k16 with F16 operands and FP32 sums; codes are F16 numbers. Queries of the group are the 16
// rows (8 at most are real): scores [heads, keys] = q K^T, out [heads, D] = P V. Columns of D may come in any order, if
// both operands keep to it, and lane (g, q) reads what itself multiplies, 16 bytes at a time:
//
//    K     row g of each 8 keys, bytes 16 q of each 64: word j is for instruction j
//    V     rows 2q, 2q + 1, 2q + 8, 2q + 9, bytes 16 g: byte t of two rows, side by side, is column g of instruction t
//
// so that between memory and tensor core there is a ring in shared memory for each lane alone (cp.async), conversion,
// and no barrier. q is brought into F16's range by a power of two: what it loses lies 2^-38 below the row's largest.
// Weights are F16 up to 2^15, 2^-11 of themselves. A scale a token (a power of two, by law) multiplies scores, and the
// one of values joins its weight in the exponent: weights w = 2^(t + log2 s) and their maximum are kept beside those of
// the denominator, 2^t.
//
// What is compiled in: GROUP query heads a key head (8 at most), E4M3, DYNAMIC (a scale a token) or one a head, PAGE,
// PART, WARPS, STAGES. D is 128.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define D 128
#define TILE 16
#define THREADS (32 * WARPS)
#define STEPS (PART / TILE / WARPS)
#define LANE (8 * 16 + (DYNAMIC ? 4 * 8 : 0))  // bytes of a lane and step
#define HEADROOM 15.0f
#define NONE (-__int_as_float(0x7F800000))

struct Operands {
  const u16* q;                       // BF16 [S, KV * GROUP, D]
  const u8 *keys, *values;            // [pages, KV, PAGE, D]
  const float *key_scale, *value_scale;  // [pages, KV, PAGE], or [KV]
  const int *pages, *lengths;         // [S, width], [S]
  u16* out;                           // BF16 [S, KV * GROUP, D]
  float *products, *stats;            // [S, KV, parts, GROUP, D], [S, KV, parts, GROUP, 4]
  int* tickets;                       // [S, KV], zeros before and after
  int sequences, kv, width, parts;
  float scale;                        // of q k, times log2(e)
};

struct Fragment {
  u32 word[4];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy16(u32 to, const u8* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy8(u32 to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ Fragment read16(u32 from) {
  Fragment f;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(f.word[0]), "=r"(f.word[1]), "=r"(f.word[2]), "=r"(f.word[3])
               : "r"(from)
               : "memory");
  return f;
}

__device__ __forceinline__ void read8(u32 from, float& a, float& b) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(a), "=f"(b) : "r"(from) : "memory");
}

// Two codes to two F16 numbers.
__device__ __forceinline__ u32 widen(u32 pair) {
  u32 two;
#if E4M3
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"((u16)pair));
#else
  asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(two) : "h"((u16)pair));
#endif
  return two;
}

__device__ __forceinline__ u32 to_f16s(float low, float high) {
  u32 two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}

// d += a b with rows 8 to 15 of a zero.
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 which) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(which));
  return y;
}

__device__ __forceinline__ float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// The largest, or the sum, of the four lanes of a row.
__device__ __forceinline__ float largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

__device__ __forceinline__ float sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

__device__ __forceinline__ int parts_of(int length) { return (length + PART - 1) / PART; }

// An item and a step in it. `ends[s]` is the number of parts of the sequences up to s.
struct Place {
  int item, step, sequence, head, part, length, steps;

  __device__ __forceinline__ void find(const Operands& o, const int* ends, int wanted) {
    item = wanted, step = 0;
    if (item >= ends[o.sequences - 1] * o.kv) return;
    int of_all = item / o.kv, low = 0, high = o.sequences - 1;
    head = item % o.kv;
    while (low < high) {
      int middle = (low + high) / 2;
      if (ends[middle] > of_all)
        high = middle;
      else
        low = middle + 1;
    }
    sequence = low, length = o.lengths[low];
    part = of_all - (low ? ends[low - 1] : 0);
    steps = (min(length - part * PART, PART) + TILE * WARPS - 1) / (TILE * WARPS);
  }

  __device__ __forceinline__ void next(const Operands& o, const int* ends) {
    if (++step == steps) find(o, ends, item + gridDim.x);
  }
};

struct Row {  // what a warp knows of an item's queries: lane (g, q) of head g
  u32 q[8][2];
  float factor;
};

struct State {
  float top, top_v, total, out[16][4];  // of 2^t, of 2^(t + log2 s), sum of 2^(t - top), sum of 2^(t + ... - top_v) v
};

__device__ __forceinline__ void fetch(const Operands& o, const Place& at, u32 ring, int warp, int lane) {
  int first = at.part * PART + (at.step * WARPS + warp) * TILE, g = lane / 4, q = lane % 4;
  if (first >= at.length) return;
  int page = o.pages[at.sequence * o.width + first / PAGE];
  u64 row = ((u64)page * o.kv + at.head) * PAGE + first % PAGE;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int key = 8 * (i / 2) + g;
    copy16(ring + i * 512, o.keys + (row + key) * D + 64 * (i % 2) + 16 * q, first + key < at.length);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int key = 8 * (i / 2) + 2 * q + i % 2;
    copy16(ring + (4 + i) * 512, o.values + (row + key) * D + 16 * g, first + key < at.length);
  }
#if DYNAMIC
  u32 scales = ring + 8 * 512 - 8 * lane;  // the lane's 8 bytes of each of four rows
#pragma unroll
  for (int i = 0; i < 2; i++) {
    copy8(scales + i * 256, o.key_scale + row + 8 * i + 2 * q);
    copy8(scales + (2 + i) * 256, o.value_scale + row + 8 * i + 2 * q);
  }
#endif
}

__device__ __forceinline__ Row queries(const Operands& o, const Place& at, int lane) {
  Row r;
  int g = lane / 4, q = lane % 4;
  const u16* from = o.q + ((u64)(at.sequence * o.kv + at.head) * GROUP + (g < GROUP ? g : 0)) * D + 16 * q;
  u32 words[8][2];
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint2 pair = *(const uint2*)(from + 64 * (i / 4) + 4 * (i % 4));
    words[i][0] = pair.x, words[i][1] = pair.y;
#pragma unroll
    for (int j = 0; j < 2; j++)
      most = fmaxf(most, fmaxf(fabsf(from_bf16(words[i][j] & 0xFFFF)), fabsf(from_bf16(words[i][j] >> 16))));
  }
  int exponent = max((int)(__float_as_uint(largest(most)) >> 23) - 127, -100);
  float up = __uint_as_float((u32)(127 + 14 - exponent) << 23), down = __uint_as_float((u32)(127 - 14 + exponent) << 23);
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      r.q[i][j] = g < GROUP ? to_f16s(from_bf16(words[i][j] & 0xFFFF) * up, from_bf16(words[i][j] >> 16) * up) : 0;
  r.factor = o.scale * down;
  if (!DYNAMIC) r.factor *= o.key_scale[at.head];
  return r;
}

__device__ __forceinline__ void clear(State& s) {
  s.top = s.top_v = NONE, s.total = 0.0f;
#pragma unroll
  for (int t = 0; t < 16; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) s.out[t][e] = 0.0f;
}

// A tile of 16 keys, `first` to `first` + 15.
__device__ __forceinline__ void meet(State& s, const Row& r, u32 ring, int first, int length, int lane) {
  float score[2][4] = {}, of_key[2][2], of_value[2][2], t[2][2], u[2][2];
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      Fragment k = read16(ring + (2 * n + c) * 512);
#pragma unroll
      for (int j = 0; j < 4; j++)
        multiply(score[n], r.q[4 * c + j][0], r.q[4 * c + j][1], widen(k.word[j] & 0xFFFF), widen(k.word[j] >> 16));
    }
#if DYNAMIC
  u32 scales = ring + 8 * 512 - 8 * lane;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    read8(scales + n * 256, of_key[n][0], of_key[n][1]);
    read8(scales + (2 + n) * 256, of_value[n][0], of_value[n][1]);
  }
#endif
  float most = NONE, most_v = NONE;
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      bool seen = first + 8 * n + lane % 4 * 2 + e < length;
      float x = score[n][e] * r.factor;
      if (DYNAMIC) x *= of_key[n][e];
      t[n][e] = seen ? x : NONE;
      u[n][e] = DYNAMIC ? t[n][e] + (float)((int)(__float_as_uint(of_value[n][e]) >> 23) - 127) : t[n][e];
      most = fmaxf(most, t[n][e]), most_v = fmaxf(most_v, u[n][e]);
    }
  float top = fmaxf(s.top, largest(most)), top_v = DYNAMIC ? fmaxf(s.top_v, largest(most_v)) : top;
  float fade = power(s.top - top), fade_v = DYNAMIC ? power(s.top_v - top_v) : fade, total = 0.0f;
  u32 weights[2];
#pragma unroll
  for (int n = 0; n < 2; n++) {
    total += power(t[n][0] - top) + power(t[n][1] - top);
    weights[n] = to_f16s(power(u[n][0] - top_v + HEADROOM), power(u[n][1] - top_v + HEADROOM));
  }
  s.total = s.total * fade + total;
  if (__any_sync(0xFFFFFFFFu, fade_v != 1.0f))
#pragma unroll
    for (int i = 0; i < 16; i++) s.out[i][0] *= fade_v, s.out[i][1] *= fade_v;
  s.top = top, s.top_v = top_v;
  Fragment v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = read16(ring + (4 + i) * 512);
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 low = bytes_of(v[0].word[j], v[1].word[j], h ? 0x7362 : 0x5140);
      u32 high = bytes_of(v[2].word[j], v[3].word[j], h ? 0x7362 : 0x5140);
      multiply(s.out[4 * j + 2 * h], weights[0], weights[1], widen(low & 0xFFFF), widen(high & 0xFFFF));
      multiply(s.out[4 * j + 2 * h + 1], weights[0], weights[1], widen(low >> 16), widen(high >> 16));
    }
}

struct Meeting {  // of the warps of a block
  float out[WARPS][GROUP][D], top[WARPS][8], top_v[WARPS][8], total[WARPS][8];
  int last;
};

__device__ __forceinline__ void leave(const State& s, Meeting& m, int warp, int lane) {
  int g = lane / 4, q = lane % 4;
  float total = sum(s.total);
  if (q == 0) m.top[warp][g] = s.top, m.top_v[warp][g] = s.top_v, m.total[warp][g] = total;
  if (g < GROUP)
#pragma unroll
    for (int i = 0; i < 16; i++)
#pragma unroll
      for (int e = 0; e < 2; e++) m.out[warp][g][16 * (2 * q + e) + i] = s.out[i][e];
}

__device__ __forceinline__ u16 finished(const Operands& o, int head, float out, float total, float top_v, float top) {
  float y = out / total * power(top_v - top - HEADROOM);
  return to_bf16(DYNAMIC ? y : y * o.value_scale[head]);
}

// Join the warps; then, if this was the last item of its sequence and head, the items.
__device__ __forceinline__ void join(const Operands& o, const Place& at, Meeting& m) {
  int count = parts_of(at.length), pair = at.sequence * o.kv + at.head;
  for (int i = threadIdx.x; i < GROUP * D; i += THREADS) {
    int h = i / D, d = i % D;
    float top = m.top[0][h], top_v = m.top_v[0][h], total = 0.0f, out = 0.0f;
#pragma unroll
    for (int v = 1; v < WARPS; v++) top = fmaxf(top, m.top[v][h]), top_v = fmaxf(top_v, m.top_v[v][h]);
#pragma unroll
    for (int v = 0; v < WARPS; v++) {
      total += m.total[v][h] * power(m.top[v][h] - top);
      out += m.out[v][h][d] * power(m.top_v[v][h] - top_v);
    }
    if (count == 1) {
      o.out[((u64)pair * GROUP + h) * D + d] = finished(o, at.head, out, total, top_v, top);
      continue;
    }
    u64 place = ((u64)pair * o.parts + at.part) * GROUP + h;
    __stcg(o.products + place * D + d, out);
    if (d == 0) __stcg((float4*)o.stats + place, make_float4(top, top_v, total, 0.0f));
  }
  if (count == 1) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) m.last = atomicAdd(o.tickets + pair, 1) == count - 1;
  __syncthreads();
  if (!m.last) return;
  __threadfence();
  for (int i = threadIdx.x; i < GROUP * D; i += THREADS) {
    int h = i / D, d = i % D;
    float top = NONE, top_v = NONE, total = 0.0f, out = 0.0f;
#pragma unroll 4
    for (int p = 0; p < count; p++) {
      u64 place = ((u64)pair * o.parts + p) * GROUP + h;
      float4 s = __ldcg((const float4*)o.stats + place);
      float x = __ldcg(o.products + place * D + d), now = fmaxf(top, s.x), now_v = fmaxf(top_v, s.y);
      total = total * power(top - now) + s.z * power(s.x - now);
      out = out * power(top_v - now_v) + x * power(s.y - now_v);
      top = now, top_v = now_v;
    }
    o.out[((u64)pair * GROUP + h) * D + d] = finished(o, at.head, out, total, top_v, top);
  }
  if (threadIdx.x == 0) o.tickets[pair] = 0;
}

// ends[s] = parts of the sequences up to s, by the first warp.
__device__ __forceinline__ void count(const Operands& o, int* ends, int lane) {
  int before = 0;
  for (int start = 0; start < o.sequences; start += 32) {
    int s = start + lane, n = s < o.sequences ? parts_of(o.lengths[s]) : 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(0xFFFFFFFFu, n, step);
      if (lane >= step) n += other;
    }
    if (s < o.sequences) ends[s] = before + n;
    before += __shfl_sync(0xFFFFFFFFu, n, 31);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(Operands o) {
  extern __shared__ __align__(16) u8 memory[];
  Meeting& m = *(Meeting*)memory;
  u8* rings = memory + (sizeof(Meeting) + 15) / 16 * 16;
  int* ends = (int*)(rings + STAGES * LANE * THREADS);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 ring = shared_address(rings) + warp * (STAGES * LANE * 32) + lane * 16;
  const u32 stage = LANE * 32;
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (warp == 0) count(o, ends, lane);
  for (int s = blockIdx.x; s < o.sequences; s += gridDim.x)
    if (o.lengths[s] == 0)
      for (int i = threadIdx.x; i < o.kv * GROUP * D; i += THREADS) o.out[(u64)s * o.kv * GROUP * D + i] = 0;
  __syncthreads();
  int items = ends[o.sequences - 1] * o.kv;
  Place ahead, here;
  ahead.find(o, ends, blockIdx.x);
  here = ahead;
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (ahead.item < items) {
      fetch(o, ahead, ring + s * stage, warp, lane);
      ahead.next(o, ends);
    }
    commit();
  }
  State state;
  Row row;
  int slot = 0, free = STAGES - 1;
  while (here.item < items) {
    if (here.step == 0) {
      clear(state);
      row = queries(o, here, lane);
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    if (ahead.item < items) {
      fetch(o, ahead, ring + free * stage, warp, lane);
      ahead.next(o, ends);
    }
    commit();
    int first = here.part * PART + (here.step * WARPS + warp) * TILE;
    if (first < here.length) meet(state, row, ring + slot * stage, first, here.length, lane);
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (here.step == here.steps - 1) {
      leave(state, m, warp, lane);
      __syncthreads();
      join(o, here, m);
      __syncthreads();
    }
    here.next(o, ends);
  }
}
