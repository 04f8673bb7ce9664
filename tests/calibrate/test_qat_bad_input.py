"""What cannot be prepared for quantization-aware training says why, and stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fp8
import tiny_models
from fp8.errors import CheckpointError, ConfigError, ConvertError, Fp8Error

transformers = pytest.importorskip("transformers")


def llama(kind="llama"):
    name, sizes = tiny_models.MODELS[kind]
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**sizes))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"scheme": "dynamik"}, ConfigError, "Did you mean 'dynamic'"),
        ({"kv": "heads"}, ConfigError, "Did you mean 'head'"),
        ({"scale_rounding": "exact"}, ConfigError, "scales cannot be"),
        ({"skip": "*.nothing"}, CheckpointError, "names no linear layer"),
        ({"skip": ["*"]}, CheckpointError, "no layer of this LlamaForCausalLM would become FP8"),
    ],
)
def test_a_misprint_is_named_and_nothing_changed(given, error, match):
    model = llama()
    with pytest.raises(error, match=match):
        fp8.prepare_qat(model, **given)
    assert not any(isinstance(m, fp8.Linear) for m in model.modules())


def test_what_cannot_be_prepared_says_why():
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(ConvertError, match="leave out kv"):
        fp8.prepare_qat(model, kv="head")
    with pytest.raises(ConvertError, match="prepare_qat\\(model\\) first"):
        fp8.finalize(model)
    fp8.prepare_qat(model)
    with pytest.raises(ConvertError, match="prepared already"):
        fp8.prepare_qat(model)
    with pytest.raises(ConvertError, match=r"takes? a?|torch.nn.Module"):
        fp8.prepare_qat("model")
    with pytest.raises(Fp8Error, match="float64"):
        model(torch.randn(2, 16, dtype=torch.float64))
    with pytest.raises(ConvertError, match="one tensor"):
        fp8.prepare_qat(llama("mixtral"))
