"""Running a model's blocks by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny_models
from fp8.calibrate.blocks import Call, calls_of, entering, same
from fp8.calibrate.running import fill, hollow
from fp8.checkpoint.source import Source
from fp8.errors import CheckpointError

ROWS = torch.arange(90).view(3, 30) % 250


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen2", "bert"])
def test_block_after_block_is_the_model(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    source = Source.open(tiny_models.build(tmp_path / kind, kind))
    whole = (
        getattr(transformers, tiny_models.MODELS[kind][0]).from_pretrained(source.folder, dtype=torch.float32).eval()
    )
    model, blocks = hollow(source, "cpu", head=False)
    batches = [ROWS[:2], ROWS[2:]]
    calls = calls_of(model, blocks, source, batches, "cpu")
    inner = getattr(whole, "base_model", whole)
    for rows in batches:
        hidden = entering(model, blocks[0][1], rows)
        wanted = inner(input_ids=rows, output_hidden_states=True).hidden_states
        assert torch.equal(hidden, wanted[0])
        for i, (_, block, tensors) in enumerate(blocks):
            fill(model, source, tensors, "cpu")
            hidden = calls[i](block, hidden)
            if i + 1 < len(blocks):  # behind the last one the model norms
                assert torch.equal(hidden, wanted[i + 1])


class Reads(nn.Module):
    """A model whose layer is given the tokens beside hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, input_ids):
        return self.layers[0](input_ids.float(), input_ids)


def test_a_block_that_is_given_the_text_itself_is_refused(monkeypatch):
    monkeypatch.setattr("fp8.calibrate.blocks.fill", lambda *given: None)
    model = Reads()
    blocks = [("layers.0", model.layers[0], [])]
    model.layers[0].forward = lambda hidden, tokens: hidden
    with pytest.raises(CheckpointError, match="more of the text than hidden states"):
        calls_of(model, blocks, None, [ROWS[:1], ROWS[1:2]], "cpu")


def test_what_is_equal_is_equal_at_any_depth():
    one = {"a": (torch.ones(2), [None, 3]), "b": "x"}
    assert same(one, {"a": (torch.ones(2), [None, 3]), "b": "x"})
    for other in ({"a": (torch.zeros(2), [None, 3]), "b": "x"}, {"a": (torch.ones(2), [None]), "b": "x"}, {"b": "x"}):
        assert not same(one, other)


def test_a_block_may_give_a_tuple():
    assert Call({1: ((), {})})(lambda hidden: (hidden, None), torch.ones(1, 2)).shape == (1, 2)
