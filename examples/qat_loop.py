"""The quantization-aware training loop of the article "FP8 Training and Inference: Next-Generation Numerical Formats".

Changed, and why:
  - `prepare_qat` and `convert` are `fp8.prepare_qat` and `fp8.finalize`. As printed the QConfig asks for INT8
    (`quint8`, `qint8`), from observers, which round nothing; and `prepare_qat` refuses `nn.TransformerEncoderLayer`.
    What it meant, weights per channel and activations, in FP8, is the scheme "dynamic"; `head=True` because its QConfig
    is for all layers.
  - A smaller model (vocabulary 1,000 and width 256 for 50,257 and 768) and 30 batches for 100, so that it takes
    seconds.
  - After the loop it shows what the article only says: the codes, and that the converted model computes with them.
  - What it prints is what happens. The article's listing falls from 10.82 to 8.78 in twenty batches of random tokens
    with random labels, each seen once. There is nothing in them to learn: the best guess costs ln(1000) = 6.91 here.

Prints three losses, that bound, what became FP8, and the loss before and after the conversion. Some seconds on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn as nn

import fp8


class SimpleLM(nn.Module):
    def __init__(self, vocab_size: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_dim)
        self.transformer = nn.TransformerEncoderLayer(d_model=hidden_dim, nhead=8, batch_first=True)
        self.lm_head = nn.Linear(hidden_dim, vocab_size)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = self.transformer(x)
        return self.lm_head(x)


Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def qat_for_fp8(model: SimpleLM, train_loader: Batches, num_epochs: int = 3) -> SimpleLM:
    """
    Quantization-aware training for FP8.
    Simulates FP8 during training to adapt weight distributions.
    """
    # Step 1: Prepare model for QAT
    print(fp8.prepare_qat(model, "dynamic", head=True))

    # Step 2: Train with fake quantization
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    for epoch in range(num_epochs):
        for batch_idx, (input_ids, labels) in enumerate(train_loader):
            optimizer.zero_grad()

            # Forward pass: model internally simulates FP8 casting
            logits = model(input_ids)
            loss = criterion(logits.view(-1, logits.size(-1)), labels.view(-1))

            loss.backward()
            optimizer.step()

            if batch_idx % 10 == 0:
                print(f"Epoch {epoch}, Batch {batch_idx}, Loss: {loss.item():.4f}")

    # Step 3: Convert to actual quantized model
    input_ids, labels = next(iter(train_loader))
    with torch.no_grad():
        rounded = criterion(model.eval()(input_ids).flatten(0, 1), labels).item()
    model = fp8.finalize(model)
    with torch.no_grad():
        codes = criterion(model(input_ids).flatten(0, 1), labels).item()
    print(f"First batch, rounded weights and activations: {rounded:.6f}; FP8 codes times FP8 codes: {codes:.6f}")
    return model


# Example usage
def main() -> None:
    torch.manual_seed(42)
    vocab_size = 1000
    model = SimpleLM(vocab_size=vocab_size, hidden_dim=256)

    # Simulate training data
    train_loader = [
        (torch.randint(0, vocab_size, (2, 128)), torch.randint(0, vocab_size, (256,))) for _ in range(30)
    ]  # fmt: skip

    # Train with QAT
    quantized_model = qat_for_fp8(model, train_loader, num_epochs=1)
    print(f"Random labels: the loss to expect at best is ln({vocab_size}) = {math.log(vocab_size):.4f}")
    q = quantized_model.lm_head.quantized_weight()  # type: ignore[operator, union-attr]
    print(f"lm_head: {q.codes.dtype}, {q.codes.view(torch.uint8).unique().numel()} codes in use, "
          f"scales {q.scale.min().item():g} to {q.scale.max().item():g}")  # fmt: skip
    print("QAT complete. A Hugging Face model would now go into a file: save_pretrained, fp8 quantize.")


if __name__ == "__main__":
    main()
