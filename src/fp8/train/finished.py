"""The model of a training run, as its newest checkpoint holds it: for exporting, not for training on."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..models.llama import Decoder
from .checkpoint import STATE, latest, read
from .config import TrainConfig
from .loop import remake_codes
from .model import build, to_fp8


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run, or of one checkpoint of it."""
    return (folder / "checkpoints").is_dir() or (folder / STATE).is_file()


def trained_decoder(folder: Path) -> tuple[Decoder, TrainConfig]:
    """The decoder with its master weights, scales and codes, in evaluation mode, and the settings of its run.

    Raises `CheckpointError` where the checkpoint is damaged, or of a model that is no decoder.
    """
    saved = read(latest(folder) if (folder / "checkpoints").is_dir() else folder)
    config = TrainConfig.from_dict(saved.state["config"])
    if "embedding.weight" not in saved.model:
        raise CheckpointError(f"{saved.folder} holds a model that `fp8 train` did not build: export it in Python.")
    model = build(config, saved.model["embedding.weight"].shape[0])
    assert isinstance(model, Decoder)
    to_fp8(model, config)
    try:
        model.load_state_dict(saved.model)
    except RuntimeError as error:
        raise CheckpointError(f"{saved.folder} does not fit the model of its settings: {error}.") from None
    if config.fp8_recipe:
        remake_codes(model)
    return model.eval(), config
