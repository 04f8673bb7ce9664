"""Generating: the cache changes no token that the model is sure of, seeds repeat, and it stops where it should."""

from __future__ import annotations

import pytest
import torch

from fp8.errors import ConfigError, TensorError
from fp8.models import Decoder, DecoderConfig, Sampling, generate, stream, text_pieces
from fp8.models.generate import next_logits, sample

PROMPT = [3, 14, 15, 9, 2, 6]


def tiny(sharp=8.0, max_positions=64, seed=0):
    """A small model whose head is sharpened, so that its choices are clear."""
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(61, 48, 80, 2, 4, 2, max_positions=max_positions)).eval()
    with torch.no_grad():
        model.head.weight *= sharp
    return model


def test_greedy_over_a_bf16_cache_equals_greedy_without_a_cache():
    model = tiny()
    plain = generate(model, PROMPT, 24, kv_cache_dtype=None)
    cached = generate(model, PROMPT, 24, kv_cache_dtype="bf16")
    tokens = PROMPT + plain.tokens
    gaps = []
    for stop in range(len(PROMPT), len(tokens)):
        top = next_logits(model, tokens[:stop], None).topk(2).values
        gaps.append(float(top[0] - top[1]))
    clear = next((i for i, gap in enumerate(gaps) if gap < 0.02), len(gaps))
    assert clear >= 8, "the model should be sure of its first tokens"
    assert cached.tokens[:clear] == plain.tokens[:clear]
    assert plain.cache is None and cached.cache is not None and cached.cache.length == len(PROMPT) + 23


def test_an_fp32_cache_gives_the_same_text():
    model = tiny()
    assert (
        generate(model, PROMPT, 24, kv_cache_dtype="fp32").tokens
        == generate(model, PROMPT, 24, kv_cache_dtype=None).tokens
    )


def test_an_fp8_cache_reports_its_bytes():
    cache = generate(tiny(), PROMPT, 10).cache
    assert cache is not None and cache.length == len(PROMPT) + 9
    assert cache.nbytes / cache.bytes_in_bf16 == (12 + 4) / 24


def test_a_seed_repeats_and_another_does_not():
    model = tiny(1.0)
    texts = [generate(model, PROMPT, 20, sampling=Sampling(1.0, seed=seed)).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_draws_the_probabilities():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0])
    draws = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    counts = torch.bincount(torch.tensor([sample(logits, Sampling(0.7), u) for u in draws[::10]]), minlength=4) / 2000
    torch.testing.assert_close(counts, (logits / 0.7).softmax(0), atol=1e-3, rtol=0)


def test_top_k_never_draws_another_token():
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0])
    for u in (0.0, 0.3, 0.999999, 1 - 2.0**-53):
        assert sample(logits, Sampling(2.0, top_k=2), torch.tensor(u, dtype=torch.float64)) in (0, 1)


def test_top_k_of_one_is_greedy():
    model = tiny()
    assert (
        generate(model, PROMPT, 8, sampling=Sampling(1.0, top_k=1, seed=5)).tokens == generate(model, PROMPT, 8).tokens
    )


def test_it_stops_at_the_end_of_text():
    model = tiny()
    tokens = generate(model, PROMPT, 8).tokens
    end = tokens[4]
    cut = generate(model, PROMPT, 8, end_of_text=end)
    assert cut.tokens == tokens[: tokens.index(end)] and cut.stopped == "end of text"
    assert list(stream(model, PROMPT, 8, end_of_text=[end]))[-1] == end


def test_it_stops_at_the_length_and_at_the_last_position():
    assert generate(tiny(), PROMPT, 3).stopped == "length"
    short = generate(tiny(max_positions=10), PROMPT, 50)
    assert short.stopped == "positions" and len(short.tokens) == 4


def test_a_stream_can_be_left():
    tokens = stream(tiny(), PROMPT, 20)
    first = [next(tokens), next(tokens)]
    tokens.close()
    assert torch.is_grad_enabled()
    assert first == generate(tiny(), PROMPT, 2).tokens


def test_characters_are_shown_whole():
    data = "naïve 🐋 whale".encode()
    pieces = list(text_pieces(data, lambda seen: bytes(seen).decode(errors="replace")))
    assert "".join(pieces) == "naïve 🐋 whale" and "🐋" in pieces
    cut = list(text_pieces(data[:8], lambda seen: bytes(seen).decode(errors="replace")))
    assert "".join(cut) == "naïve \ufffd"


def test_errors_say_what_is_possible():
    model = tiny()
    with pytest.raises(ConfigError, match="empty"):
        generate(model, [])
    with pytest.raises(ConfigError, match="token 99 is not in the vocabulary of 61"):
        generate(model, [99])
    with pytest.raises(ConfigError, match="64 tokens; the model holds 64"):
        generate(model, [1] * 64)
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(-1.0)
    with pytest.raises(ConfigError, match="top_k"):
        Sampling(top_k=-1)
    with pytest.raises(ConfigError, match="Did you mean 'fp8'"):
        generate(model, PROMPT, kv_cache_dtype="fp88")
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(model, PROMPT, 0)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(TensorError, match="NaN"):
        generate(model, PROMPT)
