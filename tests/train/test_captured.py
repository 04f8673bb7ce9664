"""A run whose steps are replayed from a CUDA graph is the run itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fp8.errors import ConfigError
from fp8.train import TrainConfig, train
from fp8.train.loop import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's compiler


def test_a_graph_needs_a_gpu_and_no_loss_scale() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        TrainConfig(graph=True, device="cpu")
    with pytest.raises(ConfigError, match="loss_scale='dynamic'"):
        TrainConfig(graph=True, loss_scale="dynamic")


def test_a_machine_without_a_gpu_says_so_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device='cpu' has none"):
        Trainer(TrainConfig(graph=True, out=str(tmp_path)))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recipe", ["none", "tensorwise", "delayed", "delayed_article", "blockwise"])
def test_losses_and_weights_are_those_of_a_run_without_a_graph(recipe: str, compiled: bool, tmp_path: Path) -> None:
    if compiled and recipe == "delayed_article":
        pytest.skip("nothing that the others do not show")
    runs = []
    for graph in (False, True):
        torch._dynamo.reset()
        config = TrainConfig(
            recipe=None if recipe == "none" else recipe, hidden_size=128, ffn_hidden_size=256, num_layers=2,
            num_attention_heads=2, num_kv_heads=1, sequence_length=64, batch_size=4, gradient_accumulation=2, steps=6,
            eval_interval=4, eval_batches=1, checkpoint_interval=5, device="cuda", compile=compiled, graph=graph,
            out=str(tmp_path / str(graph)),
        )  # fmt: skip
        runs.append(train(config))
    assert runs[0].losses == runs[1].losses
    for (name, a), b in zip(
        runs[0].trainer.model.state_dict().items(), runs[1].trainer.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
