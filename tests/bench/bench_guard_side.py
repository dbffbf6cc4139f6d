"""One side of `bench_guard.py`: a job that takes a step for each line of its input.

Runs in the folder of a commit and imports that commit's code, tests/bench included.
Prints one JSON number a line: 0 when it is warm, then the seconds of each step.
"""

import json
import os
import sys
import time
from collections.abc import Callable

WARM_UP = 3  # The first one compiles.
SLOTS, LENGTH, PROMPT = 8, 1024, 64
TOKENS_A_STEP = 20  # A single one takes too little time to be compared.
TRAINING = {
    # config, shape, rows and tokens of each, share of positions with a loss
    "lora": ("configs/finetune_dolly.py", "smollm2-135m", 4, 256, 0.45),
    "pretrain": ("configs/pretrain_tiny.py", "llama-6m", 8, 256, 1.0),
}


def make_training(job: str) -> Callable[[], float]:
    """The real step on random weights and rows; gives its seconds."""
    from random_step import RandomStep, read_config

    from research.parallel import runtime
    from research.plan import abstract_step

    path, preset, rows, length, trained = TRAINING[job]
    sizes = {"batch_size": rows, "microbatch_size": rows, "seq_len": length}
    config = read_config(path, {f"data.{name}": n for name, n in sizes.items()})
    runtime.start(config.runtime)
    shape = abstract_step.find_architecture(config, preset)
    return RandomStep(config, shape, trained, documents=2).run


def make_decoding() -> Callable[[], float]:
    """Slots that answer together; gives the seconds of some tokens of each."""
    import jax
    import jax.numpy as jnp

    from research.engine.requests import Sampling
    from research.engine.slot_decoder import SlotDecoder, SlotSettings
    from research.models.presets import PRESETS
    from research.models.transformer import Model, Options

    model = Model(PRESETS["llama-6m"], Options(dtype=jnp.bfloat16))
    keys = jax.random.split(jax.random.key(0), len(model.specs))
    params = {
        path: 0.02 * jax.random.normal(key, spec.shape, jnp.bfloat16)
        for key, (path, spec) in zip(keys, model.specs.items(), strict=True)
    }
    decoder = SlotDecoder(model, params, SLOTS, LENGTH)

    def fill() -> None:
        decoder.open(params)
        for slot in range(SLOTS):
            decoder.admit(slot, SlotSettings(Sampling(max_new_tokens=LENGTH)))
            decoder.score(slot, [1] * PROMPT, [1] * PROMPT)
            decoder.start(slot, 1)

    left = 0

    def step() -> float:
        nonlocal left
        if left < TOKENS_A_STEP:
            fill()
            left = LENGTH - PROMPT - 1
        left -= TOKENS_A_STEP
        begun = time.perf_counter()
        for _ in range(TOKENS_A_STEP):
            decoder.decode()
        return time.perf_counter() - begun

    return step


def main() -> None:
    job, folder = sys.argv[1], os.getcwd()
    # The script's own folder is that of the working tree, on both sides.
    sys.path[0] = os.path.join(folder, "tests", "bench")
    import research

    if not research.__file__.startswith(folder):
        raise SystemExit(f"{research.__file__} is not in {folder}")
    step = make_decoding() if job == "decode" else make_training(job)
    for _ in range(WARM_UP):
        step()
    print(json.dumps(0), flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


if __name__ == "__main__":
    main()
