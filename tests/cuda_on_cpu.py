"""CUDA C++ of this package on a CPU: g++ compiles the source itself, each thread of a block is a thread.

Which address a lane reads, which of its registers meets which of another lane's in the tensor core, who writes when:
that is most of what can be wrong in a kernel, and none of it needs a GPU. Replaced are the intrinsics and, by name, the
small functions around inline assembly; what they do is written down here from the PTX manual. What this cannot see:
races between blocks (they run one after the other), and the last bits of sums and exponentials. Asynchronous copies
arrive as late as the kernel allows: when their group is waited for.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from fp8 import nvrtc

COPY = "copy_later(to, from, 16, there);"
READ = "Fragment f; memcpy(f.word, memory + from, 16); return f;"
BODIES = {
    "shared_address": "return (u32)((u8*)p - memory);",
    "copy_once": COPY, "copy": COPY, "copy16_if": COPY,
    "copy16": "copy_later(to + PAST, from + BEYOND, 16, true);",
    "copy4": "copy_later(to, from, 4, true);",
    "commit": "committed++;",
    "read": READ, "read16": READ, "read4": "float x; memcpy(&x, memory + from, 4); return x;",
    "widen": "return widened(pair & 255) | widened(pair >> 8 & 255) << 16;",
    "to_f16s": "return f16(low) | f16(high) << 16;",
    "to_bf16": "u32 b = bits_of(x); return x != x ? 0x7FFF : (u16)((b + 0x7FFF + (b >> 16 & 1)) >> 16);",
    "to_codes": "return encoded(first) | encoded(second) << 8;",
    "power": "return exp2f(x);",
    "transposed": "int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4; u32 y[8];"
    " for (int i = 0; i < 8; i++) y[i] = from_lane(x, 4 * i + g / 2);"
    " return (y[2 * q] >> 16 * (g % 2) & 0xFFFF) | y[2 * q + 1] >> 16 * (g % 2) << 16;",
    "quotient": "return a / b;",
    "bytes_of": "u8 s[8]; memcpy(s, &a, 4); memcpy(s + 4, &b, 4); u32 y = 0;"
    " for (int i = 0; i < 4; i++) y |= (u32)s[which >> 4 * i & 7] << 8 * i; return y;",
}  # fmt: skip
MULTIPLY = {
    "matmul/skinny/skinny.cu": "tensor_core(d, a[0], a[1], a[2], a[3], b[0], b[1]);",
    "attention/paged/decode.cu": "tensor_core(d, a0, a1, a2, a3, b0, b1);",
}
PRELUDE = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
using std::max;
using std::min;
#define __device__
#define __forceinline__ inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __cluster_dims__(...)
typedef unsigned int bits32;
struct Index { bits32 x; };
struct uint2 { bits32 x, y; };
struct uint4 { bits32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
thread_local Index threadIdx, blockIdx;
Index gridDim;
alignas(16) unsigned char memory[1 << 18];
std::unique_ptr<std::barrier<>> whole, of_warp[32];
void __syncthreads() { whole->arrive_and_wait(); }
void meet_warp() { of_warp[threadIdx.x / 32]->arrive_and_wait(); }
void __syncwarp() { meet_warp(); }
template <class To, class From> To as(From x) { To y; memcpy(&y, &x, sizeof y); return y; }
bits32 bits_of(float x) { return as<bits32>(x); }
float __uint_as_float(bits32 x) { return as<float>(x); }
float __int_as_float(int x) { return as<float>(x); }
bits32 __float_as_uint(float x) { return as<bits32>(x); }
int __float_as_int(float x) { return as<int>(x); }
float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
float __fdiv_rn(float a, float b) { return a / b; }
float __fmul_rn(float a, float b) { return a * b; }
float __fsqrt_rn(float a) { return sqrtf(a); }
uint2 make_uint2(bits32 x, bits32 y) { return {x, y}; }
uint4 make_uint4(bits32 x, bits32 y, bits32 z, bits32 w) { return {x, y, z, w}; }
float2 make_float2(float x, float y) { return {x, y}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcg(T* p, T x) { *p = x; }
template <class T> T atomicAdd(T* p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }

struct Copy { int group; bits32 to; const void* from; int size; bool there; };
thread_local std::vector<Copy> pending;
thread_local int committed = 0;
void copy_later(bits32 to, const void* from, int size, bool there) {
  pending.push_back({committed, to, from, size, there});
}
void wait_for(int last) {  // all groups but so many
  std::erase_if(pending, [=](const Copy& c) {
    if (c.group >= committed - last) return false;
    if (c.there) memcpy(memory + c.to, c.from, c.size); else memset(memory + c.to, 0, c.size);
    return true;
  });
}

struct Warp { double value[32]; bits32 a[32][4], b[32][2]; } warps[32];
template <class T> T from_lane(T x, int lane) {
  Warp& w = warps[threadIdx.x / 32];
  memcpy(&w.value[threadIdx.x % 32], &x, sizeof x);
  meet_warp();
  memcpy(&x, &w.value[lane], sizeof x);
  meet_warp();
  return x;
}
template <class T> T __shfl_sync(bits32, T x, int lane) { return from_lane(x, lane); }
template <class T> T __shfl_xor_sync(bits32, T x, int step) { return from_lane(x, threadIdx.x % 32 ^ step); }
template <class T> T __shfl_up_sync(bits32, T x, int step) {
  int lane = threadIdx.x % 32;
  return from_lane(x, lane >= step ? lane - step : lane);
}
int __reduce_max_sync(bits32, int x) {
  for (int step = 1; step < 32; step *= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
  return x;
}
bool __any_sync(bits32, bool x) { return __reduce_max_sync(~0u, x); }

bits32 f16(float x) { return as<unsigned short>((_Float16)x); }
#if defined(E4M3) && !E4M3
const bits32 LAST = 0x7B;
const float LARGEST = 57344.0f;
float decoded(bits32 code) { return (float)as<_Float16>((unsigned short)(code << 8)); }
bits32 widened(bits32 code) { return code << 8; }
#else
const bits32 LAST = 0x7E;
const float LARGEST = 448.0f;
float decoded(bits32 code) {
  int exponent = code >> 3 & 15, fraction = code & 7;
  float x = exponent ? ldexpf(8 + fraction, exponent - 10) : ldexpf(fraction, -9);
  x = (code & 127) == 127 ? NAN : x;
  return code & 128 ? -x : x;
}
bits32 widened(bits32 code) { return f16(decoded(code)); }
#endif
bits32 encoded(float x) {
  if (x != x) return 0x7F;
  bits32 best = 0;
  float size = min(fabsf(x), LARGEST);
  for (bits32 c = 1; c <= LAST; c++) {
    float now = fabsf(decoded(c) - size), least = fabsf(decoded(best) - size);
    if (now < least || (now == least && c % 2 == 0)) best = c;
  }
  return best | (std::signbit(x) ? 128 : 0);
}
float half_of(bits32 pair, int i) {
  unsigned short half = pair >> 16 * i;
#if defined(BF16) && BF16
  return __uint_as_float((bits32)half << 16);
#else
  return (float)as<_Float16>(half);
#endif
}

// mma.m16n8k16: lane (g, q) has of a the rows g and g + 8, columns 2q, 2q + 1 and those + 8; of b the column g, these
// as rows; of d the rows g and g + 8, columns 2q, 2q + 1.
void tensor_core(float (&d)[4], bits32 a0, bits32 a1, bits32 a2, bits32 a3, bits32 b0, bits32 b1) {
  Warp& w = warps[threadIdx.x / 32];
  int lane = threadIdx.x % 32;
  bits32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(w.a[lane], a, sizeof a);
  memcpy(w.b[lane], b, sizeof b);
  meet_warp();
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; k++)
      sum += (double)half_of(w.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2) *
             half_of(w.b[column * 4 + k % 8 / 2][k / 8], k % 2);
    d[i] += (float)sum;
  }
  meet_warp();
}
"""
MAIN = r"""
extern "C" void run(const Operands* o, int blocks, int threads) {
  gridDim.x = blocks;
  for (int block = 0; block < blocks; block++) {
    memset(memory, 0xFF, sizeof memory);
    whole = std::make_unique<std::barrier<>>(threads);
    for (int v = 0; v < threads / 32; v++) of_warp[v] = std::make_unique<std::barrier<>>(32);
    std::vector<std::thread> all;
    for (int i = 0; i < threads; i++)
      all.emplace_back([=] { threadIdx.x = i, blockIdx.x = block, KERNEL(*o); });
    for (auto& one : all) one.join();
  }
}
"""


def why_not() -> str | None:
    """Why nothing can be compiled here; None when it can."""
    return None if shutil.which("g++") else "g++ is not installed"


def translated(source: str, kernel: str) -> str:
    """The source with plain C++ in the place of assembly."""
    text = (nvrtc.PACKAGE / source).read_text()
    for name, body in {**BODIES, "multiply": MULTIPLY.get(source, "")}.items():
        head = re.compile(r"(__device__ __forceinline__ [\w ]*\b" + name + r"\([^{]*\{).*?\n?\}\n", re.S)
        text = head.sub(lambda m, body=body: f"{m[1]} {body} }}\n", text, count=1)
    text = re.sub(r'asm volatile\("cp.async.wait_group %0;" ::"n"\((.*?)\) : "memory"\);', r"wait_for(\1);", text)
    text = re.sub(r"asm volatile\(.*?\);\n", ";\n", text, flags=re.S)
    assert "wait_for" in text or "cp.async" not in text
    text = text.replace("u64 policy;", "u64 policy = 0;").replace("extern __shared__ __align__(16) u8 memory[];", "")
    assert "asm" not in re.sub(r"//.*", "", text)
    return PRELUDE + text + MAIN.replace("KERNEL", kernel)


@functools.cache
def compiled(source: str, kernel: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    (folder / "kernel.cpp").write_text(translated(source, kernel))
    words = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-pthread", "-shared", "-fPIC", "kernel.cpp"]
    words += ["-o", "kernel.so", *(f"-D{name}={value}" for name, value in constants)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    library = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    return library


class FewMultiprocessors:
    multi_processor_count = 3


def on_cpu(patch: pytest.MonkeyPatch) -> None:
    """`nvrtc.launch` runs kernels here, on three multiprocessors."""

    def launch(source, name, constants, device, blocks, threads, operands, *, shared=0, early=False):  # type: ignore[no-untyped-def]
        assert shared <= 1 << 18
        compiled(source, name, constants).run(ctypes.byref(operands), blocks, threads)

    patch.setattr(nvrtc, "launch", launch)
    patch.setattr(torch.cuda, "get_device_properties", lambda device: FewMultiprocessors)
