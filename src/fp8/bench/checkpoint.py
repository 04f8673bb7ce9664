"""Quantizing a large checkpoint: peak memory, time, GB/s. Runs on any machine.

A Llama of the sizes of Llama-3-8B with random weights is written in shards of 5 GB (with fewer layers on request: the
largest tensor, which decides the memory, stays the same), then quantized in a child process, whose peak of resident
memory is what is reported. With `--calibrate` the KV scales are calibrated as well, layer by layer from disk.

    python -m fp8.bench.checkpoint --layers 32          16.1 GB on disk for the source, 9.1 GB for the result
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.byte_tokenizer import tokenizer_config, tokenizer_json
from ..checkpoint.partial import Place, promised
from ..checkpoint.source import INDEX
from ..checkpoint.tensorfile import write_json
from .machine import machine, save

SHARD = 5_000_000_000
SIZES = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_key_value_heads": 8}  # fmt: skip


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a Llama of these sizes."""
    width, ffn, kv = SIZES["hidden_size"], SIZES["intermediate_size"], 1024
    yield "model.embed_tokens.weight", (SIZES["vocab_size"], width)
    for i in range(layers):
        stem = f"model.layers.{i}."
        for name, rows, cols in (
            ("self_attn.q_proj", width, width), ("self_attn.k_proj", kv, width), ("self_attn.v_proj", kv, width),
            ("self_attn.o_proj", width, width), ("mlp.gate_proj", ffn, width), ("mlp.up_proj", ffn, width),
            ("mlp.down_proj", width, ffn),
        ):  # fmt: skip
            yield f"{stem}{name}.weight", (rows, cols)
        yield f"{stem}input_layernorm.weight", (width,)
        yield f"{stem}post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (SIZES["vocab_size"], width)


def make(folder: Path, layers: int) -> int:
    """Write the source; its bytes."""
    config = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers,
                      "max_position_embeddings": 2048, "torch_dtype": "bfloat16"}  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    shards: list[dict[str, Tensor]] = [{}]
    for name, shape in shapes(layers):
        spec = promised(torch.bfloat16, *shape)
        if sum(tensor.nbytes for tensor in shards[-1].values()) + spec.nbytes > SHARD:
            shards.append({})
        shards[-1][name] = spec
    noise = torch.randn((1 << 24) + 4099, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    names = {}
    for i, specs in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        names |= dict.fromkeys(specs, file)
        with open(folder / file, "wb") as stream:
            place = Place(stream, specs)
            for j, (name, spec) in enumerate(specs.items()):
                place.put(name, drawn(noise, j, spec) if spec.dim() > 1 else torch.ones(spec.shape).bfloat16())
    write_json(folder / INDEX, {"weight_map": names})
    return sum(tensor.nbytes for specs in shards for tensor in specs.values())


def drawn(noise: Tensor, shift: int, spec: Tensor) -> Tensor:
    """Numbers of the given shape out of a long row of them, which is repeated."""
    return noise.roll(shift).repeat(-(-spec.numel() // len(noise)))[: spec.numel()].view(spec.shape)


def quantize(source: Path, out: Path, scheme: str, calibrate: bool, device: str, answer: Any) -> None:
    """In a process of its own: seconds and peak resident memory."""
    from ..calibrate import Calibration
    from ..checkpoint import Options, quantize_folder

    torch.zeros(1, device=device)  # the device's own start is not counted
    start, before = time.perf_counter(), peak_resident()
    calibration = Calibration(samples=16, length=256, stream=True) if calibrate else None
    quantize_folder(source, out, Options(scheme), calibration, device=device)
    used = resource.getrusage(resource.RUSAGE_SELF)
    answer.put((time.perf_counter() - start, used.ru_utime + used.ru_stime, before, peak_resident()))


def peak_resident() -> int:
    """The most memory that was resident so far, mapped files included, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # since exec, where getrusage remembers the process before it
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(
    layers: int, schemes: list[str], calibrate: bool, folder: Path, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One line a scheme."""
    (folder / "source").mkdir()
    size, results = make(folder / "source", layers), []
    spawned = multiprocessing.get_context("spawn")
    for scheme in schemes:
        answer = spawned.Queue()
        how = (folder / "source", folder / scheme, scheme, calibrate, device, answer)
        child = spawned.Process(target=quantize, args=how)
        child.start()
        seconds, cpu, before, peak = answer.get()
        child.join()
        shutil.rmtree(folder / scheme)
        results.append({
            "layers": layers, "scheme": scheme, "calibrated": calibrate, "source_bytes": size, "seconds": seconds,
            "cpu_seconds": cpu, "gigabytes_per_second": size / seconds / 1e9, "peak_resident_bytes": peak,
            "resident_bytes_before": before, "threads": torch.get_num_threads(), "device": device,
        })  # fmt: skip
        print(json.dumps(results[-1]), flush=True)
    return results


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results", help="folder for checkpoint.json")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--schemes", nargs="*", default=["dynamic", "block"])
    parser.add_argument("--calibrate", action="store_true", help="KV scales too, layer by layer from disk")
    parser.add_argument("--device", default="cpu", help="where weights are rounded: cpu or cuda")
    parser.add_argument("--folder", help="where there is room; else the system's temporary folder")
    options = parser.parse_args(arguments)
    print(json.dumps(machine()), flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure(options.layers, options.schemes, options.calibrate, Path(folder), options.device)
    print(save(options.out, "checkpoint", results))


if __name__ == "__main__":
    main()
