// Decode attention over pages of FP8 keys and values: one query row a sequence, a stream of codes past the tensor core.
//
// An item is one partition of one sequence and key head: PART positions, or FEW where the sequence has at most SHORT, so
// that a short one is still spread over the GPU. Block b has key head b % KV and a range of consecutive partitions, as long
// as any other block's: the blocks of all heads go through the same pages at the same time, and the queries change only
// with the sequence. Within an item warp v takes the tiles v, v + WARPS, ... of 16 keys. A tile never straddles a page. Who
// computes an item is chance, what is computed is not: partitions, tiles, and the order in which warps and then partitions
// are joined depend on the sequence's length and positions alone. What makes codes of the rows of out joins the partitions
// first (fused/rows). (A kernel whose last block joined them, by a ticket, took 20 ns for each of its fences: docs/log.md,
// 2026-11-24.)
//
// Both products use m16n8k16 with F16 operands and FP32 sums; codes are F16 numbers. Keys, and channels of values, are
// the 16 rows; the group's queries, 8 at most, are the columns:
//
//    scores [keys, heads] = K q^T          lane (g, q) has keys g and g + 8 of heads 2q and 2q + 1
//    out    [D, heads]   += V^T P^T        the weights change places by movmatrix, 8 x 8 at a time
//
// Columns of K may come in any order, if q keeps to it, and rows of V^T too. So a lane copies what itself multiplies, 16
// bytes at a time:
//
//    K     keys g and g + 8, bytes 16 q of each 64: word j is for instruction j
//    V     keys 2q, 2q + 1, 2q + 8, 2q + 9, bytes 16 g: bytes t of two keys side by side are channel 16 g + t, row g of
//          instruction t / 2 for even t, row g + 8 for odd t
//
// Between memory and tensor core there is a ring in shared memory for each lane alone (cp.async), conversion, and no
// barrier. With `soon`, where lengths and pages were there before the kernel before began (in a CUDA graph), the first tiles
// but for the newest key are asked for before it has ended.
//
// q is brought into F16's range by a power of two: what it loses lies 2^-38 below the row's largest. With t = log2(e)
// scale q k, a warp keeps for each head a reference and a power of two c, and has p = 2^(t - reference) for the
// denominator and w = p s c, s the value's scale, rounded to F16, for the numerator. Both are chosen by the first tile,
// so that its largest p is 1 and its largest w at least 2^12, and again only where a w would exceed 2^15 or a p 2^64:
// the maximum over a tile, three shuffles a head, is then rarely needed.
//
// With TURN the kernel before made the joined product of queries, keys and values: who needs a query turns it by its
// position's angles, and the warp whose tile holds the newest position first turns its key, makes the codes of both, and
// stores them. Bytes are those of `rope_write`.
//
// What is compiled in: GROUP query heads a key head (8 at most), E4M3, DYNAMIC (a scale a token) or one a head, PAGE,
// PART, FEW, SHORT, WARPS, STAGES, TURN. D is 128.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define D 128
#define TILE 16
#define THREADS (32 * WARPS)
#define STAGE (8 * 16 * 32 + (DYNAMIC ? 128 : 0))  // bytes of a warp and step
#define NONE (-__int_as_float(0x7F800000))

struct Operands {
  const u16* q;                          // BF16 [S, KV * GROUP, D], or with TURN [S, KV * GROUP + 2 KV, D]
  u8 *keys, *values;                     // [pages, KV, PAGE, D]
  float *key_scale, *value_scale;        // [pages, KV, PAGE], or [KV]
  const int *pages, *lengths;            // [S, width], [S]
  float *products, *stats;               // [S, KV, parts, GROUP, D], [S, KV, parts, GROUP, 2]
  const int* positions;                  // [S], and the angles of each, FP32 [positions, D / 2]
  const float *cos, *sin;
  const long long* slots;                // [S]: where the newest keys and values go
  u64* saturated;                        // elements that a static scale clipped
  int sequences, kv, width, parts;
  int soon;                              // whether lengths and pages were there before the kernel before began
  float scale;                           // of q k, times log2(e)
};

struct Fragment {
  u32 word[4];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes, so much further than `to` and `from`.
template <int PAST, int BEYOND>
__device__ __forceinline__ void copy16(u32 to, const u8* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0 + %1], [%2 + %3], 16;" ::"r"(to), "n"(PAST), "l"(from), "n"(BEYOND)
               : "memory");
}

__device__ __forceinline__ void copy16_if(u32 to, const u8* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy4(u32 to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
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

__device__ __forceinline__ float read4(u32 from) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from) : "memory");
  return x;
}

__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 which) {
  u32 y;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(which));
  return y;
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

// d += a b.
__device__ __forceinline__ void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit numbers, of which lane (g, q) has row g, columns 2q and 2q + 1: rows become columns.
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ float power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }

__device__ __forceinline__ u16 to_bf16(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ u16 to_codes(float first, float second) {
  u16 pair;
#if E4M3
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
#else
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
#endif
  return pair;
}

__device__ __forceinline__ float rounded(float x) { return from_bf16(to_bf16(x)); }

// Over the eight lanes of a column: the largest, the sum.
__device__ __forceinline__ float largest(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
  return x;
}

__device__ __forceinline__ float sum(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
  return x;
}

__device__ __forceinline__ int part_of(int length) { return length <= SHORT ? FEW : PART; }

__device__ __forceinline__ int parts_of(int length) { return (length + part_of(length) - 1) / part_of(length); }

// An item and a step in it: positions first to last - 1 of a sequence. `left` items are this block's, this one included.
struct Place {
  int sequence, part, left, length, first, last, step;

  __device__ __forceinline__ void open(const int* lengths) {
    length = lengths[sequence];
    int size = part_of(length);
    first = part * size, last = min(length, first + size), step = 0;
  }

  __device__ __forceinline__ void next_item(const int* lengths) {
    if (--left == 0) return;
    if (last < length)
      part++;
    else
      for (part = 0, sequence++; lengths[sequence] == 0;) sequence++;
    open(lengths);
  }

  // Whether that was the last step.
  __device__ __forceinline__ bool done() { return first + ++step * TILE * WARPS >= last; }

  __device__ __forceinline__ int tile(int warp) const { return first + (step * WARPS + warp) * TILE; }
};

// The place that is fetched, and the numbers of pages, lane i's of page i: this item's and, asked for early, the next's.
struct Ahead {
  Place at, after;
  int page, coming;

  __device__ __forceinline__ int pages_of(const Operands& o, const Place& p, int lane) {
    int number = p.first / PAGE + lane;
    return p.left > 0 && number * PAGE < p.last ? o.pages[(u64)p.sequence * o.width + number] : 0;
  }

  __device__ __forceinline__ void begin(const Operands& o, const Place& p, const int* lengths, int lane) {
    at = after = p;
    page = pages_of(o, at, lane);
    follow(o, lengths, lane);
  }

  __device__ __forceinline__ void follow(const Operands& o, const int* lengths, int lane) {
    if (after.left > 0) after.next_item(lengths);
    coming = pages_of(o, after, lane);
  }

  __device__ __forceinline__ void next(const Operands& o, const int* lengths, int lane) {
    if (!at.done()) return;
    at = after, page = coming;
    follow(o, lengths, lane);
  }
};

struct State {  // lane (g, q): of heads 2q and 2q + 1
  float reference[2], unit[2], total[2], out[8][4];
};

#if TURN
__device__ __forceinline__ void turn(float& first, float& second, float cos, float sin) {
  float turned = rounded(first * cos - second * sin);
  second = rounded(second * cos + first * sin), first = turned;
}

// Codes of a lane's four numbers of a head, x[0] and x[1] at 2 * lane, the others D / 2 further: `row` of the pages.
__device__ __forceinline__ void store(const Operands& o, const float (&x)[4], u8* codes, float* scales, u64 row, int head,
                                      int lane) {
  float scale, v[4];
#if DYNAMIC
  int key = 0x00800000;  // of the amax: FP32 bits + 0x00800000; Inf and NaN are negative
#pragma unroll
  for (int i = 0; i < 4; i++) key = max(key, (int)((__float_as_uint(x[i]) & 0x7FFFFFFFu) + 0x00800000u));
  int amax = __reduce_max_sync(0xFFFFFFFFu, key) - 0x00800000;
  int bits = amax ? max(((amax + 0x1FFFFF) & 0x7F800000) - ((E4M3 ? 8 : 15) << 23), 1 << 23) : 0x3F800000;
  scale = __int_as_float(bits);
  if (lane == 0) scales[row] = scale;
  float factor = __int_as_float(bits == 0x7F000000 ? 1 << 22 : 0x7F000000 - bits);
#else
  scale = scales[head];
#endif
#pragma unroll
  for (int i = 0; i < 4; i++) {
    bool finite = (__float_as_uint(x[i]) & 0x7FFFFFFFu) < 0x7F800000u;
#if DYNAMIC
    v[i] = x[i] * factor;
#else
    v[i] = __fdiv_rn(x[i], scale);
    if (finite && fabsf(v[i]) > (E4M3 ? 448.0f : 57344.0f)) atomicAdd(o.saturated, 1ull);
#endif
    if (E4M3) v[i] = __fmaf_rn(x[i], 0.0f, v[i]);
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 pair = to_codes(v[2 * i], v[2 * i + 1]);
    if (!E4M3)
#pragma unroll
      for (int j = 0; j < 2; j++)
        if (fabsf(x[2 * i + j]) == -NONE) pair = (pair & ~(0x7Fu << 8 * j)) | 0x7Cu << 8 * j;
    *(u16*)(codes + row * D + 64 * i + 2 * lane) = pair;
  }
}

// The newest key and value of a sequence and head, to their slot.
__device__ __forceinline__ void store_newest(const Operands& o, const Place& at, int head, int lane) {
  long long slot = o.slots[at.sequence];
  if (slot < 0) return;
  u64 row = ((u64)(slot / PAGE) * o.kv + head) * PAGE + slot % PAGE;
  const u16* from = o.q + ((u64)at.sequence * (GROUP + 2) * o.kv + GROUP * o.kv + head) * D + 2 * lane;
  float x[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 pair = *(const u32*)(from + i * o.kv * D + 64 * j);
      x[i][2 * j] = from_bf16(pair & 0xFFFF), x[i][2 * j + 1] = from_bf16(pair >> 16);
    }
  u64 angle = (u64)o.positions[at.sequence] * (D / 2) + 2 * lane;
#pragma unroll
  for (int i = 0; i < 2; i++) turn(x[0][i], x[0][2 + i], o.cos[angle + i], o.sin[angle + i]);
  store(o, x[0], o.keys, o.key_scale, row, head, lane);
  store(o, x[1], o.values, o.value_scale, row, head, lane);
  __syncwarp();
}
#endif

__device__ __forceinline__ void fetch(const Operands& o, const Ahead& ahead, int head, u32 ring, int warp, int lane) {
  const Place& at = ahead.at;
  int first = at.tile(warp), g = lane / 4, q = lane % 4;
  if (first >= at.last) return;
#if TURN
  if (first + TILE >= at.length) store_newest(o, at, head, lane);
#endif
  int page = __shfl_sync(0xFFFFFFFFu, ahead.page, first / PAGE - at.first / PAGE);
  u64 row = ((u64)page * o.kv + head) * PAGE + first % PAGE;
  const u8 *k = o.keys + (row + g) * D + 16 * q, *v = o.values + (row + 2 * q) * D + 16 * g;
  u32 to = ring + lane * 16;
  if (first + TILE <= at.last) {
    copy16<0, 0>(to, k), copy16<512, 64>(to, k);
    copy16<1024, 8 * D>(to, k), copy16<1536, 8 * D + 64>(to, k);
    copy16<2048, 0>(to, v), copy16<2560, D>(to, v);
    copy16<3072, 8 * D>(to, v), copy16<3584, 9 * D>(to, v);
  } else
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int of_k = 8 * (i / 2), of_v = of_k + i % 2;
      copy16_if(to + i * 512, k + of_k * D + 64 * (i % 2), first + of_k + g < at.last);
      copy16_if(to + (4 + i) * 512, v + of_v * D, first + of_v + 2 * q < at.last);
    }
#if DYNAMIC
  copy4(ring + 8 * 512 + lane * 4, (lane < 16 ? o.key_scale : o.value_scale) + row + lane % 16);
#endif
}

// Whether all keys of a warp's tile were there before this step: the kernel before, which stores the newest, is not waited
// for.
__device__ __forceinline__ bool old(const Place& at, int warp) { return at.tile(warp) + TILE < at.length; }

struct Queries {  // lane (g, q): of head g what K's bytes of this lane meet; the factors of the scores of heads 2q, 2q + 1
  u32 word[8][2];
  float factor[2];
};

__device__ __forceinline__ Queries queries(const Operands& o, int sequence, int head, int lane) {
  Queries r;
  int g = lane / 4, q = lane % 4;
  u64 row = (u64)sequence * (GROUP + 2 * TURN) * o.kv + head * GROUP + (g < GROUP ? g : 0);
  const u16* from = o.q + row * D + 16 * q;
  float x[8][4], most = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint2 pair = *(const uint2*)(from + 64 * (i / 4) + 4 * (i % 4));
    x[i][0] = from_bf16(pair.x & 0xFFFF), x[i][1] = from_bf16(pair.x >> 16);
    x[i][2] = from_bf16(pair.y & 0xFFFF), x[i][3] = from_bf16(pair.y >> 16);
  }
#if TURN
  u64 angle = (u64)o.positions[sequence] * (D / 2) + 16 * q;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float4 c = *(const float4*)(o.cos + angle + 4 * i), s = *(const float4*)(o.sin + angle + 4 * i);
    turn(x[i][0], x[4 + i][0], c.x, s.x), turn(x[i][1], x[4 + i][1], c.y, s.y);
    turn(x[i][2], x[4 + i][2], c.z, s.z), turn(x[i][3], x[4 + i][3], c.w, s.w);
  }
#endif
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int e = 0; e < 4; e++) most = fmaxf(most, fabsf(x[i][e]));
  most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
  most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
  int exponent = max((int)(__float_as_uint(most) >> 23) - 127, -100);
  float up = __uint_as_float((u32)(127 + 14 - exponent) << 23), down = __uint_as_float((u32)(127 - 14 + exponent) << 23);
#pragma unroll
  for (int i = 0; i < 8; i++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      r.word[i][j] = g < GROUP ? to_f16s(x[i][2 * j] * up, x[i][2 * j + 1] * up) : 0;
  float factor = o.scale * down;
  if (!DYNAMIC) factor *= o.key_scale[head];
#pragma unroll
  for (int e = 0; e < 2; e++) r.factor[e] = __shfl_sync(0xFFFFFFFFu, factor, 4 * (2 * q + e));
  return r;
}

__device__ __forceinline__ void clear(State& s) {
#pragma unroll
  for (int e = 0; e < 2; e++) s.reference[e] = NONE, s.unit[e] = 1.0f, s.total[e] = 0.0f;
#pragma unroll
  for (int t = 0; t < 8; t++)
#pragma unroll
    for (int e = 0; e < 4; e++) s.out[t][e] = 0.0f;
}

// New references and units, from a tile's scores t and the scales of its values: t[i] is of key g + 8 (i / 2), head
// 2q + i % 2.
__device__ __forceinline__ void refer(State& s, const float (&t)[4], const float (&scale)[2]) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float now = fmaxf(s.reference[e], largest(fmaxf(t[e], t[2 + e]))), fade = power(s.reference[e] - now);
    float most = largest(fmaxf(power(t[e] - now) * scale[0], power(t[2 + e] - now) * scale[1]));
    bool begun = s.reference[e] != NONE;
    if (begun) most = fmaxf(most, fade * 4096.0f / s.unit[e]);
    float unit = __uint_as_float((u32)min(max(127 + 12 + 127 - (int)(__float_as_uint(most) >> 23), 1), 254) << 23);
    float again = begun ? fade * (unit / s.unit[e]) : 0.0f;
    s.reference[e] = now, s.unit[e] = unit, s.total[e] *= fade;
#pragma unroll
    for (int i = 0; i < 8; i++) s.out[i][e] *= again, s.out[i][2 + e] *= again;
  }
}

// A tile of 16 keys, `first` to `first` + 15.
__device__ __forceinline__ void meet(State& s, const Queries& r, u32 ring, int first, int last, int lane) {
  float score[2][4] = {}, t[4], p[4], w[4], of_value[2] = {1.0f, 1.0f};
#pragma unroll
  for (int c = 0; c < 2; c++) {
    Fragment low = read16(ring + c * 512 + lane * 16), high = read16(ring + (2 + c) * 512 + lane * 16);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 a[4];
      a[0] = widen(low.word[j] & 0xFFFF), a[2] = widen(low.word[j] >> 16);
      a[1] = widen(high.word[j] & 0xFFFF), a[3] = widen(high.word[j] >> 16);
      multiply(score[c], a[0], a[1], a[2], a[3], r.word[4 * c + j][0], r.word[4 * c + j][1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) t[i] = (score[0][i] + score[1][i]) * r.factor[i % 2];
#if DYNAMIC
  u32 scales = ring + 8 * 512 + lane / 4 * 4;
#pragma unroll
  for (int n = 0; n < 2; n++) {
    float of_key = read4(scales + 32 * n);
    of_value[n] = first + 8 * n + lane / 4 < last ? read4(scales + 64 + 32 * n) : 0.0f;
    t[2 * n] *= of_key, t[2 * n + 1] *= of_key;
  }
#endif
  if (first + TILE > last)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (first + 8 * (i / 2) + lane / 4 >= last) t[i] = NONE;
  bool fits = true;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    p[i] = power(t[i] - s.reference[i % 2]), w[i] = p[i] * (of_value[i / 2] * s.unit[i % 2]);
    fits = fits && w[i] <= 32768.0f && p[i] <= 18446744073709551616.0f;
  }
  if (__any_sync(0xFFFFFFFFu, !fits)) {
    refer(s, t, of_value);
#pragma unroll
    for (int i = 0; i < 4; i++)
      p[i] = power(t[i] - s.reference[i % 2]), w[i] = p[i] * (of_value[i / 2] * s.unit[i % 2]);
  }
#pragma unroll
  for (int e = 0; e < 2; e++) s.total[e] += p[e] + p[2 + e];
  u32 low = transposed(to_f16s(w[0], w[1])), high = transposed(to_f16s(w[2], w[3]));
  Fragment v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = read16(ring + (4 + i) * 512 + lane * 16);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    u32 which = j % 2 ? 0x7362 : 0x5140;
    u32 a = bytes_of(v[0].word[j / 2], v[1].word[j / 2], which), b = bytes_of(v[2].word[j / 2], v[3].word[j / 2], which);
    multiply(s.out[j], widen(a & 0xFFFF), widen(a >> 16), widen(b & 0xFFFF), widen(b >> 16), low, high);
  }
}

struct Meeting {  // of the warps of a block
  float out[WARPS][GROUP][D], reference[WARPS][8], total[WARPS][8];
};

__device__ __forceinline__ void leave(const State& s, Meeting& m, int warp, int lane) {
  int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float total = sum(s.total[e]), by = 1.0f / s.unit[e];
    if (g == 0) m.reference[warp][2 * q + e] = s.reference[e], m.total[warp][2 * q + e] = total;
    if (2 * q + e < GROUP)
#pragma unroll
      for (int i = 0; i < 8; i++) {
        m.out[warp][2 * q + e][16 * g + 2 * i] = s.out[i][e] * by;
        m.out[warp][2 * q + e][16 * g + 2 * i + 1] = s.out[i][2 + e] * by;
      }
  }
}

// Join the warps: products, and (reference, total), of a partition.
__device__ __forceinline__ void unite(const Operands& o, const Place& at, int head, const Meeting& m) {
  u64 first = ((u64)(at.sequence * o.kv + head) * o.parts + at.part) * GROUP;
  for (int i = threadIdx.x; i < GROUP * D; i += THREADS) {
    int h = i / D, d = i % D;
    float top = m.reference[0][h], total = 0.0f, out = 0.0f;
#pragma unroll
    for (int v = 1; v < WARPS; v++) top = fmaxf(top, m.reference[v][h]);
#pragma unroll
    for (int v = 0; v < WARPS; v++) {
      float share = power(m.reference[v][h] - top);
      total += m.total[v][h] * share, out += m.out[v][h][d] * share;
    }
    if (!DYNAMIC) out *= o.value_scale[head];
    o.products[first * D + i] = out;
    if (d < 2) o.stats[(first + h) * 2 + d] = d ? total : top;
  }
}

// ends[s] = partitions of the sequences up to s, and the lengths, by the first warp.
__device__ __forceinline__ void count(const Operands& o, int* ends, int* lengths, int lane) {
  int before = 0;
  for (int start = 0; start < o.sequences; start += 32) {
    int s = start + lane, length = s < o.sequences ? o.lengths[s] : 0, n = parts_of(length);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(0xFFFFFFFFu, n, step);
      if (lane >= step) n += other;
    }
    if (s < o.sequences) ends[s] = before + n, lengths[s] = length;
    before += __shfl_sync(0xFFFFFFFFu, n, 31);
  }
}

// The first item of a block that has some.
__device__ __forceinline__ Place begin(const Operands& o, const int* ends, const int* lengths, int lane_of, int lanes) {
  int total = ends[o.sequences - 1], from = (int)((long long)total * lane_of / lanes), low = 0, high = o.sequences - 1;
  Place p;
  p.left = (int)((long long)total * (lane_of + 1) / lanes) - from;
  if (p.left == 0) return p;
  while (low < high) {
    int middle = (low + high) / 2;
    if (ends[middle] > from)
      high = middle;
    else
      low = middle + 1;
  }
  p.sequence = low, p.part = from - (low ? ends[low - 1] : 0);
  p.open(lengths);
  return p;
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(Operands o) {
  extern __shared__ __align__(16) u8 memory[];
  Meeting& m = *(Meeting*)memory;
  u8* rings = memory + (sizeof(Meeting) + 15) / 16 * 16;
  int* lengths = (int*)(rings + STAGES * STAGE * WARPS);
  int *ends = lengths + o.sequences, warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.x % o.kv;
  u32 ring = shared_address(rings) + warp * STAGES * STAGE;
  asm volatile("griddepcontrol.launch_dependents;");
  if (!o.soon) asm volatile("griddepcontrol.wait;" ::: "memory");
  if (warp == 0) count(o, ends, lengths, lane);
  __syncthreads();
  Place here = begin(o, ends, lengths, blockIdx.x / o.kv, gridDim.x / o.kv);
  if (here.left == 0) {
    // Whoever ends says that those before it have ended.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    return;
  }
  Ahead ahead;
  if (o.soon) {
    ahead.begin(o, here, lengths, lane);
#pragma unroll
    for (int s = 0; s < STAGES - 1 && ahead.at.left; s++, ahead.next(o, lengths, lane))
      if (old(ahead.at, warp)) fetch(o, ahead, head, ring + s * STAGE, warp, lane);
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
  ahead.begin(o, here, lengths, lane);
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (ahead.at.left) {
      if (!o.soon || !old(ahead.at, warp)) fetch(o, ahead, head, ring + s * STAGE, warp, lane);
      ahead.next(o, lengths, lane);
    }
    commit();
  }
  State state;
  Queries row;
  int slot = 0, free = STAGES - 1, asked = -1;
  while (here.left) {
    if (here.step == 0) clear(state);
    if (here.sequence != asked) row = queries(o, asked = here.sequence, head, lane);
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncwarp();
    if (ahead.at.left) {
      fetch(o, ahead, head, ring + free * STAGE, warp, lane);
      ahead.next(o, lengths, lane);
    }
    commit();
    int first = here.tile(warp);
    if (first < here.last) meet(state, row, ring + slot * STAGE, first, here.last, lane);
    free = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    if (here.done()) {
      leave(state, m, warp, lane);
      __syncthreads();
      unite(o, here, head, m);
      __syncthreads();
      here.next_item(lengths);
    }
  }
}
