"""What a short quantization-aware training wins back: perplexity of a model, of its plain FP8 checkpoint, and of the
trained one, on a text that none of them was trained on.

    python -m fp8.bench.qat MODEL --train train.txt --test wiki.test.raw --steps 200 --lr 1e-5

Weights, activations and the KV cache are FP8 on both FP8 sides: the checkpoints multiply their codes, over the FP8
cache (one scale a token and head, for which the training rounds). All three see the same windows, so that the loss of
each against the model has a paired 95 % interval. `--lr` may be repeated: then the learning rates are compared, and the
choice among them is by held-out rows of the training text, never by the test text.

Writes bench/results/qat.json. On an H200, 200 steps x 16 rows x 512 tokens of a model of 135M parameters took two and a
half minutes beside six other jobs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..calibrate.short_qat import ShortQat, Trained, train_folder
from ..checkpoint.quantize import Options, quantize_folder
from ..evaluate.judge import judge
from ..evaluate.measurement import TextMeasurement
from ..evaluate.subject import ModelSpec
from .machine import save


def measure(model: Path, test: Path, how: list[ShortQat], options: Options, windows: dict[str, Any], work: Path) -> Any:
    """Train by each of `how`, take the best by its held-out rows, and judge it beside plain rounding."""
    plain = quantize_folder(model, work / "plain", options).folder
    trainings = [(one, *timed(model, work / f"qat-{i}", options, one)) for i, one in enumerate(how)]
    best = min(trainings, key=lambda row: row[1].perplexity["trained"])
    device = best[0].device
    specs = [ModelSpec(model, device=device)] + [
        ModelSpec(folder, kv_cache="fp8", device=device) for folder in (plain, best[1].folder / "fp8")
    ]
    judgement = judge(specs, [TextMeasurement(test, **windows)], out=work / "eval")
    told = [
        {"lr": one.lr, "steps": one.steps, "batch": one.batch, "length": one.length, "distill": one.distill,
         "seconds": seconds, "held_out": dict(done.perplexity), "chosen": done is best[1]}
        for one, done, seconds in trainings
    ]  # fmt: skip
    return {"model": model.name, "scheme": options.scheme, "trainings": told, "judged": figures(judgement)}


def timed(model: Path, out: Path, options: Options, how: ShortQat) -> tuple[Trained, float]:
    start = time.perf_counter()
    done = train_folder(model, out, options, how)
    print(json.dumps({"lr": how.lr, "seconds": time.perf_counter() - start, **done.perplexity}), flush=True)
    return done, time.perf_counter() - start


def figures(judgement: Any) -> list[dict[str, Any]]:
    """Each model's figures, without the records of every window."""
    names = ("model", "plain rounding", "rounded in training")
    return [
        {"which": name, "figures": [figure.to_dict() for figure in outcome.figures]}
        for name, outcome in zip(names, judgement.outcomes, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder of the Llama family")
    parser.add_argument("--train", required=True, help="the text to train on")
    parser.add_argument("--test", type=Path, required=True, help="the text to judge by")
    parser.add_argument("--scheme", default="dynamic")
    parser.add_argument("--scales", default="power_of_two", help="power_of_two, none, or search (on a GPU)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, nargs="*", default=[1e-5])
    parser.add_argument("--no-distill", action="store_true")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--limit", type=int, help="only the first windows of the test text")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="bench/results", help="folder for qat.json")
    parser.add_argument("--keep", type=Path, help="where models and checkpoints are to stay")
    given = parser.parse_args(arguments)
    how = [
        ShortQat((given.train,), given.steps, given.batch, given.length, lr, not given.no_distill, "token",
                 device=given.device)
        for lr in given.lr
    ]  # fmt: skip
    windows = {"window": given.window, "stride": given.window, "limit": given.limit}
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            given.model,
            given.test,
            how,
            Options(given.scheme, scales=given.scales),
            windows,
            given.keep or Path(folder),
        )
    print(json.dumps(result["judged"], indent=1))
    print(save(given.out, "qat", result))


if __name__ == "__main__":
    main()
