"""The decoder: its shape, its initialization, and that a cache changes nothing but rounding."""

from __future__ import annotations

import math

import pytest
import torch

import fp8.nn
from fp8.errors import ConfigError, ShapeError, TensorError
from fp8.models import Decoder, DecoderConfig

TINY = DecoderConfig(61, 48, 80, 2, 4, 2, max_positions=64)


def tiny(config=TINY, seed=0):
    torch.manual_seed(seed)
    return Decoder(config).eval()


def tokens(b=2, t=11, seed=1):
    return torch.randint(0, 61, (b, t), generator=torch.Generator().manual_seed(seed))


def test_a_config_goes_through_plain_data():
    assert DecoderConfig.from_dict(TINY.to_dict()) == TINY


def test_the_same_seed_gives_the_same_bits():
    a, b, c = tiny(), tiny(), tiny(seed=1)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.head.weight, c.head.weight)


def test_the_first_loss_is_near_chance():
    logits = tiny()(tokens(4, 32))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens(4, 32, seed=2).flatten())
    assert abs(loss.item() - math.log(61)) < 0.3


def test_no_position_sees_its_future():
    model, x = tiny(), tokens()
    y = model(x)
    x[:, 6:] = 5
    assert torch.equal(model(x)[:, :6], y[:, :6])
    assert not torch.equal(model(x)[:, 6:], y[:, 6:])


def test_tied_embeddings_are_one_parameter():
    model = tiny(DecoderConfig(61, 48, 80, 2, 4, 2, tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == len(list(tiny().parameters())) - 1


@pytest.mark.parametrize("pieces", [[11], [1] * 11, [4, 1, 6]])
def test_decoding_over_an_fp32_cache_equals_the_whole_forward(pieces):
    model, x = tiny(), tokens()
    cache = model.new_cache(2, "fp32", capacity=1)
    parts = [model(part, cache) for part in x.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bits"), [("bf16", 8), ("fp8", 4), ("e5m2", 3)])
def test_decoding_over_a_narrow_cache_is_within_its_rounding(dtype, bits):
    """One layer, so that every stored key and value is off by its own rounding only: a share of at most 2^-bits.

    The bound is measured on the same data: twice the most that the logits move in 40 trials in which every key and
    value is off by the whole share, up or down at random.
    """
    model = tiny(DecoderConfig(61, 48, 80, 1, 4, 2))
    x = tokens(1)
    want = model(x)
    cache = model.new_cache(1, dtype)
    error = (model(x, cache) - want).abs().max()
    assert 0 < error < sensitivity(model, x, want, 2.0**-bits)


def sensitivity(model, x, want, relative):
    """Twice the largest change of the logits when keys and values are moved at random by their relative error."""
    worst = torch.zeros(())
    for seed in range(40):
        cache = model.new_cache(1, "fp32")
        layer = cache.layers[0]
        append, generator = layer.append, torch.Generator().manual_seed(seed)

        def moved(k, v, append=append, generator=generator):
            signs = (torch.randint(0, 2, z.shape, generator=generator) * 2.0 - 1 for z in (k, v))
            append(*(z * (1 + relative * sign) for z, sign in zip((k, v), signs, strict=True)))

        layer.append = moved
        worst = torch.maximum(worst, (model(x, cache) - want).abs().max())
    return 2 * worst


def test_last_gives_the_last_position_only():
    model, x = tiny(), tokens()
    torch.testing.assert_close(model(x, last=True), model(x)[:, -1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "delayed", "blockwise"])
def test_a_converted_decoder_runs_its_layers_in_fp8(recipe):
    model = tiny()
    report = fp8.nn.convert(model, recipe)
    assert len(report.converted) == 8 and {"embedding", "head"} <= set(report.kept)
    with fp8.nn.count_products() as products:
        model.train()(tokens()).square().mean().backward()
    for product in ("forward", "grad_x", "grad_w"):
        assert products.layers(product) == set(report.converted)


def test_autocast_gives_bf16_logits_and_reaches_the_cache():
    model, x = tiny(), tokens(1)
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(1, "fp32")
        assert model(x, cache).dtype == torch.bfloat16
    held = cache.layers[0].keys.decode(11)
    assert torch.equal(held, held.bfloat16().float())


def test_errors_name_what_was_given():
    with pytest.raises(ConfigError, match="hidden_size=50"):
        DecoderConfig(61, 50, 80, 2, 4, 2)
    with pytest.raises(ConfigError, match="num_kv_heads=3"):
        DecoderConfig(61, 48, 80, 2, 4, 3)
    with pytest.raises(ConfigError, match="num_layers"):
        DecoderConfig(61, 48, 80, 0, 4, 2)
    with pytest.raises(ConfigError, match="Did you mean 'num_layers'"):
        DecoderConfig.from_dict(TINY.to_dict() | {"num_layer": 2})
    with pytest.raises(ConfigError, match="lacks vocab_size"):
        DecoderConfig.from_dict({k: v for k, v in TINY.to_dict().items() if k != "vocab_size"})
    model = tiny()
    with pytest.raises(ShapeError, match="batch dimension"):
        model(tokens()[0])
    with pytest.raises(TensorError, match="float32"):
        model(tokens().float())
    with pytest.raises(ShapeError, match="1 layers, the model 2"):
        model(tokens(), tiny(DecoderConfig(61, 48, 80, 1, 4, 2)).new_cache(2))
