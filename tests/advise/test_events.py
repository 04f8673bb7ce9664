"""What a trace becomes, and what kind of work each name is."""

from __future__ import annotations

import pytest

from fp8.advise.events import Event, events_of, kind_of, self_times

GPU = {
    "nvjet_sm90_qqtst_192x192_128x4_2x1_v_bz_coopB_TNN": "FP8 products",
    "nvjet_sm90_qrtst_128x160_128x5_2x1_v_bz_coopA_algo2_TNT": "FP8 products",
    "_matmul_kernel": "FP8 products",
    "nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_NNT": "BF16 products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "BF16 products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128": "attention",
    "void cudnn::fusion::compute_dot_do_o_specialized<true, 128>(void const*)": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
    "cast_tiles": "cast, quantize",
    "cast_rows": "cast, quantize",
    "partial_keys": "cast, quantize",
    "triton_poi_fused_mul_quantize_both_silu_split_view_5": "norm, activation, elementwise",
    "triton_red_fused__fused_rms_norm_add_quantize_both_view_7": "norm, activation, elementwise",
    "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>": "norm, activation, elementwise",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>": "copies",
    "ncclDevKernel_AllGather_RING_LL": "communication",
    "something_else": "other",
}


@pytest.mark.parametrize("name", GPU)
def test_the_kind_of_a_kernel(name: str) -> None:
    assert kind_of(Event(name, "kernel", 0, 1)) == GPU[name]


def test_memory_records_are_copies() -> None:
    assert kind_of(Event("Memcpy HtoD (Pageable -> Device)", "memory", 0, 1)) == "copies"
    assert kind_of(Event("Memset (Device)", "memory", 0, 1)) == "copies"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "BF16 products"),
        ("fp8::matmul", "FP8 products"),
        ("fp8::quantize_both", "cast, quantize"),
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::mul", "norm, activation, elementwise"),
        ("Optimizer.step#AdamW.step", "optimizer"),
    ],
)
def test_the_kind_of_a_cpu_operation(name: str, kind: str) -> None:
    assert kind_of(Event(name, "op", 0, 1)) == kind


def test_a_trace_is_read_by_its_categories() -> None:
    raw = [
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 20.5, "dur": 4, "args": {"stream": 7, "correlation": 3}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 10, "dur": 2, "tid": 9,
         "args": {"correlation": 3}},
        {"ph": "X", "cat": "python_function", "name": "f", "ts": 1, "dur": 50},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH", "ts": 30, "dur": 1, "args": {"stream": 7}},
    ]  # fmt: skip
    assert events_of({"traceEvents": raw}) == [
        Event("cudaLaunchKernel", "runtime", 10, 2, 9, 3),
        Event("k", "kernel", 20.5, 4, 7, 3),
        Event("Memcpy DtoH", "memory", 30, 1, 7, 0),
    ]
    assert events_of({}) == []


def test_own_time_is_without_what_is_called() -> None:
    outer, first, inner, second = (
        Event("outer", "op", 0, 100, 1), Event("first", "op", 10, 40, 1), Event("inner", "op", 20, 10, 1),
        Event("second", "op", 60, 20, 1),
    )  # fmt: skip
    elsewhere = Event("elsewhere", "op", 5, 80, 2)
    own = {e.name: time for e, time in self_times([inner, second, outer, elsewhere, first])}
    assert own == {"outer": 40, "first": 30, "inner": 10, "second": 20, "elsewhere": 80}
