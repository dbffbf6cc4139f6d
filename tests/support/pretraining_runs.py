"""A tiny pre-training job through the real commands."""

import json
import shutil

from commands import ROOT, chain

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


STEP_LINE = rf"step +{{}}/{PRETRAIN_STEPS} "


def make_corpus(place):
    """Two small sources: this repository's own code, and rows of a text column."""
    if (place.folder / "pretrain.py").exists():
        return
    code = place.folder / "code"
    code.mkdir()
    for file in sorted((ROOT / "research").rglob("*.py")):
        if file.stat().st_size:
            name = "-".join(file.relative_to(ROOT).parts)
            shutil.copy(file, code / name)
    rows = [
        {"text": f"The number {n} has the square {n * n}. " * 3} for n in range(200)
    ]
    with (place.folder / "words.jsonl").open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    (place.folder / "pretrain.py").write_text(PRETRAIN)


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
