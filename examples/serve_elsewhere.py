"""What "Production Deployment" of the article "FP8 Training and Inference: Next-Generation Numerical Formats" is today.

Changed, and why:
  - The article goes through ONNX to `trtexec --fp8 --calib`. `--calib` takes INT8's calibration cache, TensorRT-LLM has
    dropped its engines, and a language model needs a cache, batching and a scheduler that no single engine file holds.
    What is deployed is the checkpoint; vLLM, SGLang and this package read it as it is.
  - No scale is handed over beside the model: those of weights, activations, keys and values are in the file. What a
    server has to be told is that its cache is FP8, and, where each head has a scale, which attention can read them.

    python examples/serve_elsewhere.py FOLDER [GPUS [GPUS OF A MODEL]]      the commands for a checkpoint of yours

Prints, without FOLDER, the commands for three small checkpoints that it makes (a KV scale a head, one a tensor, none)
on one GPU and on four, with the reasons. Several GPUs: tensor parallelism where the model does not fit into one, else
replicas, which share nothing and lose nothing. docs/serving-at-scale.md explains each flag.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fp8.checkpoint.fp8_folder import Fp8Folder
from fp8.checkpoint.readers import NO, readers
from fp8.errors import ConfigError


def commands(folder: str | Path, gpus: int = 1, tensor_parallel: int = 1) -> dict[str, list[str]]:
    """Shell lines by server, comments among them: how to serve the checkpoint on `gpus` GPUs, in groups of
    `tensor_parallel`, each of which holds the model once. Raises `ConfigError`, `CheckpointError`."""
    opened = Fp8Folder.open(folder)
    check_split(opened, gpus, tensor_parallel)
    words, replicas = shlex.quote(str(folder)), gpus // tensor_parallel
    return {
        "vLLM": list(vllm(opened, words, tensor_parallel, replicas)),
        "SGLang": list(sglang(opened, words, tensor_parallel, replicas)),
        "fp8": list(ours(words, gpus, tensor_parallel)),
    }


def scales(folder: Fp8Folder) -> str | None:
    """What has a scale in the file's KV cache: "attn_head", "tensor", or None."""
    return folder.groups.kv if folder.kv else None


def refused(folder: Fp8Folder, server: str) -> list[str]:
    """Why a server cannot load it."""
    found = next(reader for reader in readers(folder) if reader.name == server)
    return [f"# {reason}" for reason in found.reasons] if found.verdict == NO else []


def vllm(folder: Fp8Folder, words: str, tensor_parallel: int, replicas: int) -> Iterator[str]:
    if why := refused(folder, "vLLM"):
        yield from why
        return
    flags = split("--tensor-parallel-size", "--data-parallel-size", tensor_parallel, replicas)
    kinds = {"attn_head": "--kv-cache-dtype fp8 --attention-backend FLASH_ATTN", "tensor": "--kv-cache-dtype fp8"}
    if (kind := scales(folder)) is None:
        yield "# no KV scales in the file: with `fp8` all would be 1.0; this measures one a token and head"
    yield f"vllm serve {words}{flags} {kinds.get(kind or '', '--kv-cache-dtype fp8_per_token_head')}"


def sglang(folder: Fp8Folder, words: str, tensor_parallel: int, replicas: int) -> Iterator[str]:
    kind = scales(folder)
    if kind == "attn_head":
        yield "# one KV scale a tensor is what it reads; no code of a weight changes"
        yield f"fp8 convert {words} {words}-sglang --for sglang"
        words += "-sglang"
    elif why := refused(folder, "SGLang"):
        yield from why
        return
    if kind is None:
        yield "# no KV scales in the file: its FP8 cache would take 1.0 for all, so the cache stays in BF16"
    cache = "" if kind is None else " --kv-cache-dtype fp8_e4m3"
    flags = split("--tp", "--dp", tensor_parallel, replicas)
    yield f"python -m sglang.launch_server --model-path {words}{flags}{cache}"


def ours(words: str, gpus: int, tensor_parallel: int) -> Iterator[str]:
    if tensor_parallel > 1:
        yield "# serves on one GPU"
        return
    if gpus == 1:
        yield f"fp8 serve {words}"
        return
    for i in range(gpus):
        yield f"CUDA_VISIBLE_DEVICES={i} fp8 serve {words} --port {8000 + i} &"


def split(tensor: str, data: str, tensor_parallel: int, replicas: int) -> str:
    """The flags of a layout; of one GPU, none."""
    flags = [(tensor, tensor_parallel), (data, replicas)]
    return "".join(f" {flag} {count}" for flag, count in flags if count > 1)


def check_split(folder: Fp8Folder, gpus: int, tensor_parallel: int) -> None:
    """A layer is cut along its heads or its inner channels, and a block of 128 may not be."""
    if gpus < 1 or tensor_parallel < 1 or gpus % tensor_parallel:
        raise ConfigError(f"{gpus} GPUs cannot be grouped by {tensor_parallel}: give a divisor, as 4 by 2.")
    config = folder.source.config
    unit = max((scheme.block[0] for scheme in folder.layers.values() if scheme.block), default=16)
    sizes = {"num_attention_heads": 1, "intermediate_size": unit if tensor_parallel > 1 else 1}
    for name, least in sizes.items():
        if config[name] % (least * tensor_parallel):
            raise ConfigError(
                f"{name}={config[name]} does not divide into {tensor_parallel} parts of multiples of {least}: use "
                "fewer GPUs a model, and more replicas."
            )


def show(folder: str | Path, gpus: int, tensor_parallel: int) -> None:
    for server, lines in commands(folder, gpus, tensor_parallel).items():
        print(f"  {server}")
        print("\n".join(f"    {line}" for line in lines).replace(f"{Path(folder).parent}/", ""))


def main(arguments: list[str] | None = None) -> None:
    if arguments:
        folder, *counts = arguments
        show(folder, *([int(count) for count in counts] + [1, 1])[:2])
        return
    with tempfile.TemporaryDirectory() as place:
        for name, folder in checkpoints(Path(place)).items():
            for gpus, tensor_parallel in ((1, 1), (4, 2)):
                print(f"{name}, {gpus} GPU{'s' * (gpus > 1)}, {tensor_parallel} a model")
                show(folder, gpus, tensor_parallel)


def checkpoints(place: Path) -> dict[str, Path]:
    """Three small FP8 checkpoints. KV scales come from `fp8 quantize --calibrate`; here they are written by hand."""
    import torch

    from fp8.checkpoint.convert import convert_folder
    from fp8.checkpoint.decisions import Scales
    from fp8.checkpoint.quantize import quantize_folder
    from fp8.checkpoint.tensorfile import write_json, write_tensors
    from fp8.models.huggingface import to_config, to_huggingface
    from fp8.models.llama import Decoder, DecoderConfig

    config = DecoderConfig(256, 128, 256, 2, 4, 2)
    source = place / "source"
    source.mkdir()
    state = to_huggingface({k: v.detach() for k, v in Decoder(config).state_dict().items()}, config)
    write_tensors(source / "model.safetensors", {name: tensor.bfloat16() for name, tensor in state.items()})
    write_json(source / "config.json", to_config(config, torch.bfloat16))
    keys = {f"model.layers.{i}.self_attn": [0.25, 0.5] for i in range(config.num_layers)}
    head = quantize_folder(source, place / "per-head", None, lambda model, layers: Scales({}, keys, keys)).folder
    tensor = convert_folder(head, place / "per-tensor", reader="sglang").folder
    none = quantize_folder(source, place / "no-kv-scales").folder
    return {"a KV scale a head": head, "one a tensor": tensor, "none": none}


if __name__ == "__main__":
    main(sys.argv[1:])
