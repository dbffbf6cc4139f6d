"""A tiny pre-training job through the real commands."""

import json
import random

from commands import chain

PRETRAIN_STEPS = 12


PRETRAIN = f"""
from research.config import defaults

def get_config():
    config = defaults()
    config.trainable = "full"
    config.export = True
    config.steps = {PRETRAIN_STEPS}
    config.model.init_from = ""
    config.model.preset = "tiny"
    config.model.dtype = "float32"
    config.data.kind = "text"
    config.data.seq_len = 64
    config.data.batch_size = 8
    config.text.sources = ("code=code", "words=words.jsonl")
    config.text.mixture = ("code=3", "words=1")
    config.text.tokenizer = "bpe:320"
    config.text.held_out_share = 0.1
    config.text.held_out_bytes = 4000
    config.text.cache_dir = "tokens"
    config.optim.learning_rate = 1e-2
    config.optim.z_loss = 1e-4
    config.optim.skip_spread = 8.0
    config.eval.every = 4
    config.eval.samples_every = 6
    config.eval.max_new_tokens = 8
    config.eval.text_prompts = ("def ", "import ")
    config.checkpoint.every = 3
    config.runtime.peak_tflops = 0.05
    return config
"""


NOUNS = (
    "array", "batch", "cache", "device", "error", "file", "gradient", "head", "index",
    "layer", "mask", "name", "options", "path", "query", "row", "step", "value",
)  # fmt: skip
VERBS = ("build", "check", "decode", "find", "join", "load", "move", "read", "split")
STEP_LINE = rf"step +{{}}/{PRETRAIN_STEPS} "


def make_corpus(place):
    """Two small sources: files of code, and rows of a text column.

    The text is the same in every version of the project: how much two processes round
    otherwise than one depends on it, and tests set limits to that.
    """
    if (place.folder / "pretrain.py").exists():
        return
    code = place.folder / "code"
    code.mkdir()
    for number in range(60):
        (code / f"module_{number}.py").write_text(source_file(number))
    rows = [
        {"text": f"The number {n} has the square {n * n}. " * 3} for n in range(200)
    ]
    with (place.folder / "words.jsonl").open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    (place.folder / "pretrain.py").write_text(PRETRAIN)


def source_file(number):
    """Made-up Python of about 3,000 characters, a function of `number` alone."""
    draw = random.Random(number)
    lines = [f"import {draw.choice(NOUNS)}", ""]
    for _ in range(20):
        one, two, three = (draw.choice(NOUNS) for _ in range(3))
        verb, n = draw.choice(VERBS), draw.randrange(100)
        lines += [
            f"def {verb}_{one}({two}, {three}={n}):",
            f'    """{verb.capitalize()} the {one} of a {two}, at most {n} times."""',
            f"    for {three} in range({n}):",
            f"        if {two} is None or {three} > {draw.randrange(9)}:",
            f"            return {draw.choice(VERBS)}_{one}({two}, {three})",
            "",
        ]
    return "\n".join(lines)


def pretrain(place, run, *flags, **options):
    return place.run(
        "train",
        "--config=pretrain.py",
        f"--config.run_dir=runs/{run}",
        *flags,
        **options,
    )


@chain
def pretrained(place, results):
    make_corpus(place)
    return pretrain(place, "pretrained")
