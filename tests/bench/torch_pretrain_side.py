"""Torch's side of `pretrain_against_torch.py`; run by it in torch's environment."""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM


def mask_of(segments: torch.Tensor) -> torch.Tensor:
    """`[B, 1, T, T]`, true where a query may look: its own document, not ahead."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


def loss_sum(model: Any, batch: dict[str, torch.Tensor], dtype: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(
            input_ids=batch["tokens"],
            attention_mask=mask_of(batch["segments"]),
            position_ids=batch["positions"],
            use_cache=False,
        ).logits
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch["targets"].flatten(), reduction="none"
    )
    return (losses * batch["weights"].flatten()).sum()


def batches(path: Path) -> list[dict[str, torch.Tensor]]:
    arrays = np.load(path)
    count = len(arrays["tokens"])
    kinds = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    integers = {"tokens", "targets", "positions", "segments"}
    return [
        {n: x[i].long() if n in integers else x[i] for n, x in kinds.items()}
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    arguments = parser.parse_args()
    settings = json.loads((arguments.folder / "settings.json").read_text())
    optim, warmup = settings["optim"], settings["warmup_steps"]
    model = LlamaForCausalLM.from_pretrained(
        arguments.folder / "model", attn_implementation="sdpa"
    ).float()
    model.train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": optim["weight_decay"]},
            {"params": norms, "weight_decay": 0.0},
        ],
        betas=(optim["b1"], optim["b2"]),
        eps=optim["eps"],
    )
    steps = []
    train = batches(arguments.folder / "train.npz")
    for number, batch in enumerate(train, 1):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = settings["rates"][number - 1]
        loss = loss_sum(model, batch, arguments.dtype) / batch["weights"].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number > warmup:
            seconds = time.perf_counter() - begun
            steps.append((int((batch["segments"] > 0).sum()), seconds))
    model.eval()
    with torch.no_grad():
        nats = sum(
            float(loss_sum(model, batch, arguments.dtype))
            for batch in batches(arguments.folder / "held_out.npz")
        )
    print(
        json.dumps(
            {
                "steps": steps,
                "bits_per_byte": nats / np.log(2) / settings["bytes"],
                "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                * 1024
                / 1e9,
            }
        )
    )


if __name__ == "__main__":
    main()
