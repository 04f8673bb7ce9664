"""Training: settings, tokens, optimizer, loop, and checkpoints from which a run goes on bit for bit."""

from .checkpoint import checkpoints, latest
from .config import TrainConfig
from .divergence import DivergedError
from .loop import Result, Trainer, train
from .metrics import read_metrics
from .optimizer import adjust_hyperparameters, gradient_variance, learning_rate
from .text import moby_dick
from .tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, tokenizer_of

__all__ = [
    "ByteTokenizer",
    "DivergedError",
    "JsonTokenizer",
    "Result",
    "Tokenizer",
    "TrainConfig",
    "Trainer",
    "adjust_hyperparameters",
    "checkpoints",
    "gradient_variance",
    "latest",
    "learning_rate",
    "moby_dick",
    "read_metrics",
    "tokenizer_of",
    "train",
]
