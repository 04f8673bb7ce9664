"""Quantization-aware training: what a forward rounds to, what `finalize` leaves and what `fp8 quantize` writes are the
same bytes."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn

import fp8
import tiny_models
from fp8.calibrate.qat import trained_scales
from fp8.checkpoint import Options, Scales, frozen_model, load, quantize_folder, save, verify
from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.quantize import SCHEMES
from fp8.errors import ConvertError
from fp8.models import Decoder, DecoderConfig
from fp8.nn import fake_quantize
from fp8.nn.frozen_linear import FrozenLinear, served_input
from fp8.nn.kv_rounding import unround_kv

transformers = pytest.importorskip("transformers")
ROWS = torch.arange(48).view(2, 24) * 5 % 250


def llama(kind="llama", dtype=torch.float32):
    name, sizes = tiny_models.MODELS[kind]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**sizes)).to(dtype)


def decoder(layers=2):
    torch.manual_seed(0)
    return Decoder(DecoderConfig(260, 64, 128, layers, 4, 2))


def logits(model, rows=ROWS):
    out = model(rows)
    return getattr(out, "logits", out)


def steps(model, count=3, lr=1e-2):
    """An ordinary loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    losses = []
    for _ in range(count):
        y = logits(model.train())
        loss = nn.functional.cross_entropy(y[:, :-1].flatten(0, 1).float(), ROWS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# --------------------------------------------------------------------------- the codes


@pytest.mark.parametrize(
    ("scheme", "rounding"),
    [*itertools.product(SCHEMES, ("power_of_two", "none")), ("dynamic", "search"), ("weight-only", "search")],
)
def test_finalize_leaves_the_codes_that_the_export_writes(tmp_path, scheme, rounding):
    """After training, in every byte of codes, scales and logits; and `verify` says so of the saved model."""
    model = llama()
    fp8.prepare_qat(model, scheme, skip=["*.1.mlp.*"], kv="head", scale_rounding=rounding)
    losses = steps(model)
    assert losses[-1] < losses[0]
    scales = trained_scales(model)
    assert len(scales.keys) == 2 and all(len(heads) == 2 for heads in scales.keys.values())
    model.save_pretrained(tmp_path / "high")
    options = Options(scheme, ("*.1.mlp.*",), scales=rounding, dtype="float32")
    quantize_folder(tmp_path / "high", tmp_path / "fp8", options, lambda *_: scales)

    final, folder = fp8.finalize(model), Fp8Folder.open(tmp_path / "fp8")
    layers = {m.name: m for m in final.modules() if isinstance(m, FrozenLinear)}
    assert set(layers) == set(folder.layers) and len(layers) == 11
    for name, layer in layers.items():
        assert same(layer.codes, folder.weight(name).codes)
        assert same(layer.scale.contiguous(), folder.weight(name).scale.contiguous())
        if scheme == "static":
            assert torch.equal(layer.input_scale, folder.input_scale(name))
    assert verify(tmp_path / "fp8", tmp_path / "high", ROWS, transformers=False).passed
    for module in final.modules():  # `frozen_model` rounds no keys and values
        unround_kv(module)
    assert same(logits(final), logits(frozen_model(folder, torch.float32)))


@pytest.mark.parametrize("kind", ["bert", "qwen2"])
def test_encoders_and_layers_with_biases(tmp_path, kind):
    model = llama(kind).train()
    report = fp8.prepare_qat(model, "block")
    out = model(ROWS)[0]
    out.square().mean().backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
    model.save_pretrained(tmp_path / "high")
    folder = Fp8Folder.open(quantize_folder(tmp_path / "high", tmp_path / "fp8", Options("block")).folder)
    layers = {m.name: m for m in fp8.finalize(model).modules() if isinstance(m, FrozenLinear)}
    assert set(layers) == set(report.converted) == set(folder.layers) and len(layers) > 10
    assert all(same(layer.codes, folder.weight(name).codes) for name, layer in layers.items())
    assert any(layer.bias is not None for layer in layers.values())


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_forward_multiplies_what_the_checkpoint_multiplies(monkeypatch, scheme):
    """Both operands of a trained layer's product, in bytes; the product differs in the order of its sum only."""
    model = llama()
    fp8.prepare_qat(model, scheme)
    steps(model, 1)
    trained = model.eval()
    module = trained.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, module.in_features)
    fake, seen = module.fp8, []
    decoded = fake_quantize.decoded
    monkeypatch.setattr(fake_quantize, "decoded", lambda *a: seen.append(decoded(*a)) or decoded(*a), raising=True)
    y = module(x)
    served = fp8.finalize(copy.deepcopy(trained)).model.layers[0].self_attn.q_proj
    inputs, weight = seen[0]
    assert torch.equal(weight, served.quantized_weight().dequantize())
    if scheme == "weight-only":
        assert same(y, served(x)) and inputs.shape == (10, 128)
        return
    q = served_input(x.flatten(0, 1), served.recipe, served.input_scale)
    assert same(inputs, q.dequantize())
    exact = inputs.double() @ weight.double().t()
    assert torch.equal(served(x).flatten(0, 1), exact.float())
    assert (y.flatten(0, 1) - exact).norm() < 1e-6 * exact.norm()
    assert fake.input_scale is None or fake.inputs.given is None


@pytest.mark.parametrize("scheme", ["dynamic", "block", "weight-only", "static"])
def test_where_sums_are_exact_the_forward_is_the_checkpoints_to_the_bit(scheme):
    """Operands of few bits: every sum is exact in FP32, in any order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128), nn.Identity())
    model[0].weight.data = torch.randint(-8, 9, (128, 256)) / 8
    model[0].bias.data = torch.randint(-8, 9, (128,)) / 8
    x = torch.randint(-8, 9, (3, 7, 256)) / 8
    fp8.prepare_qat(model, scheme)
    y = model(x)
    assert same(y, fp8.finalize(model)(x))


def test_the_decoder_of_this_library_exports_its_codes(tmp_path):
    """`checkpoint.save` of the prepared decoder and of the finalized one give the same file."""
    for scheme in ("dynamic", "block", "weight-only"):
        model = decoder()
        report = fp8.prepare_qat(model, scheme, kv="token")
        assert len(report.converted) == 8 and "head" in report.kept
        assert steps(model)[0] > 0
        save(copy.deepcopy(model), tmp_path / f"{scheme}-a")
        save(fp8.finalize(model), tmp_path / f"{scheme}-b")
        a, b = (tiny_models.bytes_of(tmp_path / f"{scheme}-{x}") for x in "ab")
        assert a["model.safetensors"] == b["model.safetensors"]
        loaded = load(tmp_path / f"{scheme}-b")
        kinds = {layer.weight_only for layer in loaded.modules() if isinstance(layer, FrozenLinear)}
        assert kinds == {scheme == "weight-only"}


# --------------------------------------------------------------------------- keys and values


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_keys_and_values_are_rounded_as_the_cache_stores_them(attention):
    """Seen by attention: codes times the head's scale, of the BF16 rounding; with gradients."""
    model = llama()
    model.set_attn_implementation(attention)
    fp8.prepare_qat(model, "weight-only", kv="head")
    held = []
    rounding = model.model.layers[0].self_attn.fp8_kv
    rounding.register_forward_hook(lambda _, given, out: held.append((given, out)))
    steps(model, 1)
    (k, v), (k8, v8) = held[0]
    for x, y, scale in ((k, k8, rounding.keys.found("k")), (v, v8, rounding.values.found("v"))):
        for head in range(2):
            q = fp8.quantize(x[:, head].to(torch.bfloat16), scale=scale[head].view(1, 1))
            assert torch.equal(q.dequantize(), y[:, head])
        amax = x.detach().to(torch.bfloat16).float().abs().amax((0, 2, 3))
        assert torch.equal(scale, torch.exp2(torch.ceil(torch.log2(amax / 448))))
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


def test_a_cache_during_generation_holds_rounded_keys():
    """Step by step over a cache gives what one forward over all gives: each key was rounded once, when it came."""
    model = llama().eval()
    fp8.prepare_qat(model, "weight-only", kv="token")
    with torch.no_grad():
        whole = logits(model, ROWS[:1])
        cache = transformers.DynamicCache(config=model.config)
        parts = [model(ROWS[:1, i : i + 1], past_key_values=cache).logits for i in range(ROWS.shape[1])]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    q = fp8.quantize(cache.layers[0].keys.to(torch.bfloat16), "e4m3", "row").dequantize()
    assert torch.equal(q, cache.layers[0].keys)


def test_our_cache_rounds_keys_no_second_time():
    """A decoder that was trained with `kv="token"` is served over the FP8 cache: it holds the keys of training."""
    model, held = decoder(1).eval(), []
    fp8.prepare_qat(model, "weight-only", kv="token")
    model.layers[0].attention.fp8_kv.register_forward_hook(lambda _, given, out: held.append(out))
    cache = model.new_cache(2, "fp8")
    with torch.no_grad():
        assert torch.allclose(model(ROWS), model(ROWS, cache), atol=1e-5)
    for stored, rounded in zip((cache.layers[0].keys, cache.layers[0].values), held[0], strict=True):
        assert torch.equal(stored.decode(ROWS.shape[1]), rounded)


# --------------------------------------------------------------------------- convert and undo


def test_names_tied_weights_and_undo():
    model = llama("tied")
    before, kinds = {n: t.clone() for n, t in model.state_dict().items()}, [type(m) for m in model.modules()]
    y = logits(model)
    fp8.prepare_qat(model, kv="head")
    assert list(model.state_dict()) == list(before) and dict(model.named_parameters()).keys() <= before.keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not torch.equal(logits(model), y)
    with fp8.autocast(enabled=False):
        assert not torch.equal(logits(model), y)  # keys and values are still rounded
    fp8.revert(model)
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(logits(model), y) and not hasattr(model, "fp8_report")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_finalize_is_undone_with_the_trained_weights():
    model = llama()
    fp8.prepare_qat(model, "static", kv="head")
    steps(model)
    trained = {n: t.clone() for n, t in model.state_dict().items()}
    fp8.finalize(model)
    assert not set(trained) <= set(model.state_dict())
    fp8.revert(model)
    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_copy_is_on_its_own():
    model = llama()
    fp8.prepare_qat(model, "static", kv="head")
    steps(model, 1)
    other = copy.deepcopy(model)
    steps(other, 2)
    parts = [m.self_attn.fp8_kv.keys.seen for m in (model.model.layers[0], other.model.layers[0])]
    assert not torch.equal(*parts)
    group = other.model.layers[0].self_attn.q_proj.fp8.with_it
    assert len(group) == 3 and group[1] is other.model.layers[0].self_attn.k_proj


def test_calibrated_scales_stay_as_they_were_given():
    model = llama()
    heads = {f"model.layers.{i}.self_attn": [0.25, 0.5] for i in range(2)}
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    given = Scales(dict.fromkeys(names, 0.125), heads, heads)
    fp8.prepare_qat(model, "static", kv="head", scales=given)
    steps(model, 1)
    assert trained_scales(model) == given
    heads.pop("model.layers.1.self_attn")
    model = llama()
    with pytest.raises(ConvertError, match=r"none for the KV cache of model\.layers\.1\.self"):
        fp8.prepare_qat(model, kv="head", scales=Scales({}, heads, heads))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear and not model.model.layers[0]._forward_pre_hooks


def test_evaluation_measures_nothing():
    model = llama().eval()
    fp8.prepare_qat(model, "static", kv="head")
    logits(model)
    with pytest.raises(ConvertError, match="nothing passed in training mode yet"):
        fp8.finalize(model)
    assert type(model.model.layers[0].mlp.up_proj) is fp8.Linear  # nothing was changed


# --------------------------------------------------------------------------- loops of all kinds


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_in_one_graph():
    """`fullgraph=True` fails at a break; two steps give eager's losses, and the scales that were measured."""
    torch._dynamo.reset()
    eager = decoder(1)
    fp8.prepare_qat(eager, "static", kv="head")
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    expected = steps(eager, 2)
    optimizer = torch.optim.SGD(other.parameters(), 1e-2)
    for loss in expected:
        y = compiled(ROWS)
        found = nn.functional.cross_entropy(y[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten())
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        assert float(found.detach()) == pytest.approx(loss, abs=1e-5)
    assert torch.allclose(other.layers[0].attention.fp8_kv.keys.seen, eager.layers[0].attention.fp8_kv.keys.seen)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = llama()
        fp8.prepare_qat(model, "static", kv="head")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        steps(model, 1, lr=0.0)
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_under_autocast_the_master_is_quantized():
    """Activations and products are BF16, gradients FP32, and codes those of the FP32 weight."""
    layer = nn.Sequential(nn.Linear(64, 32))
    fp8.prepare_qat(layer)
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    weight = layer[0].weight
    assert weight.grad.dtype == torch.float32
    q = fp8.quantize(weight, "e4m3", "row")
    inputs = fp8.quantize(x.detach().to(torch.bfloat16), "e4m3", "row").dequantize(torch.bfloat16)
    bias = layer[0].bias.detach().to(torch.bfloat16)
    assert torch.equal(y, nn.functional.linear(inputs, q.dequantize(torch.bfloat16), bias))


@pytest.mark.filterwarnings("default")
def test_in_transformers_trainer(tmp_path):
    """A `Trainer` trains and saves a prepared model as any other; the saved one gives the codes."""
    pytest.importorskip("accelerate")
    model = llama("tied")
    fp8.prepare_qat(model, kv="head")
    data = [{"input_ids": row, "labels": row} for row in ROWS.repeat(4, 1)]
    args = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[],
        use_cpu=True, gradient_checkpointing=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data)
    trainer.train()
    assert len([1 for row in trainer.state.log_history if "loss" in row]) == 3
    trainer.save_model(str(tmp_path / "high"))
    scales = trained_scales(model)
    quantize_folder(tmp_path / "high", tmp_path / "fp8", Options(), lambda *_: scales)
    folder = Fp8Folder.open(tmp_path / "fp8")
    final = fp8.finalize(trainer.model)
    for layer in (m for m in final.modules() if isinstance(m, FrozenLinear)):
        assert same(layer.codes.cpu(), folder.weight(layer.name).codes)


IMPORT = """
import sys
sys.modules["triton"] = None
import fp8
fp8.prepare_qat, fp8.finalize
print(sorted(name for name in ("torch._dynamo", "transformers") if name in sys.modules))
"""


def test_reaching_for_it_imports_neither_compiler_nor_transformers():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
