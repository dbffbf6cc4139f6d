"""The other sides of `serving.py`: Hugging Face `generate` and llama.cpp.

Run by an interpreter that has torch and transformers, or xllamacpp, and never imported
by the rest of the project. Reads lines of JSON, `{"prompts": [[ids]...], "new": n}`,
answers all prompts at once, greedily, with exactly n tokens each, and prints
`{"seconds": s, "tokens": n}`. With `"stop": [ids]` an answer of `generate` ends at one
of these ids, or after n tokens. It is idle between lines, so that sides can take turns.

    python tests/bench/serving_rivals.py generate FOLDER --dtype=bfloat16
    python tests/bench/serving_rivals.py llama FILE.gguf --parallel=8 --context=512
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
Answer = Callable[..., int]


def hugging_face(options: argparse.Namespace) -> Answer:
    """`generate` of transformers, with prompts padded on the left as it documents."""
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype)
    ).eval()

    def answer(prompts: list[list[int]], new: int, stop: list[int]) -> int:
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(p)) + p for p in prompts]
        seen = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        with torch.inference_mode():
            made = model.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(seen),
                do_sample=False,
                min_new_tokens=0 if stop else new,
                max_new_tokens=new,
                eos_token_id=stop or None,
                pad_token_id=0,
            )
        answers = made[:, longest:].tolist()
        ends = ([i for i, token in enumerate(x, 1) if token in stop] for x in answers)
        return sum(min(found, default=len(answers[0])) for found in ends)

    return answer


def llama_cpp(options: argparse.Namespace) -> Answer:
    """The server of llama.cpp, called in its own process, without HTTP."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_parallel = options.parallel
    params.n_ctx = options.context * options.parallel
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads = options.threads
    params.verbosity = -1
    params.port = 0
    server = xllamacpp.Server(params)

    def one(prompt: list[int], new: int) -> int:
        body = {
            "prompt": prompt, "max_tokens": new, "ignore_eos": True,
            "temperature": 0.0, "cache_prompt": False,
        }  # fmt: skip
        return server.handle_completions(body)["usage"]["completion_tokens"]

    def answer(prompts: list[list[int]], new: int, stop: list[int]) -> int:
        if stop:
            raise ValueError("this side stops at no id")
        with ThreadPoolExecutor(len(prompts)) as pool:
            return sum(pool.map(lambda prompt: one(prompt, new), prompts))

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("generate", "llama"))
    parser.add_argument("model", help="a folder of Hugging Face's, or a .gguf file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    # Libraries write to stdout, too; only answers may go to the one who asks.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    sides = {"generate": hugging_face, "llama": llama_cpp}
    answer = sides[options.side](options)
    say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        begun = time.perf_counter()
        tokens = answer(asked["prompts"], asked["new"], asked.get("stop", []))
        say({"seconds": time.perf_counter() - begun, "tokens": tokens})


if __name__ == "__main__":
    main()
