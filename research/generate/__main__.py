"""Talks to a trained run: `python -m research.generate --run=runs/finetune_dolly`."""

import dataclasses
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError

USAGE = """
python -m research.generate --run=RUN_DIR [--prompt="..."] [--context="..."] [--compare]

Streams the tuned model's answer to --prompt. Without --prompt it starts a chat, in
which an empty line drops the conversation and the end of input leaves. A run that was
pre-trained on raw text continues the prompt instead. No config is needed: the run
opens with its parameters alone, on the devices of this machine.
"""


@dataclasses.dataclass(frozen=True)
class GenerateFlags:
    run: str = knob("", "run directory, its config.json or config file", is_path=True)
    prompt: str | None = knob(None, "question or instruction; none: start a chat")
    context: str = knob("", "material that belongs to the prompt")
    compare: bool = knob(False, "answer with the base model, too")
    step: str = knob("latest", "checkpoint: latest, best, or a step number")
    temperature: float = knob(
        0.0, "0 takes the likeliest token; above 0 samples", low=0
    )
    top_p: float = knob(
        0.95, "nucleus to sample from, with a temperature", above=0, high=1
    )
    max_new_tokens: int = knob(256, "longest answer, in tokens", above=0)
    seed: int = knob(0, "seed of the samples")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, GenerateFlags)
    if not f.run:
        raise UserError("--run=RUN_DIR is missing, e.g. runs/finetune_dolly")
    if f.prompt is not None and not (f.prompt.strip() or f.context.strip()):
        raise UserError("--prompt is empty")
    from research.engine.sampler import Sampling
    from research.generate.chat import Conversation
    from research.parallel import runtime
    from research.runs.reopen import reopen

    sampling = Sampling(f.temperature, f.top_p, f.max_new_tokens, f.seed)
    runtime.start_alone()
    run = reopen(f.run, step=f.step, in_compute_dtype=True)
    conversation = Conversation(run, sampling, compare=f.compare)
    if f.prompt is not None:
        conversation.say(f.prompt, f.context.strip())
    else:
        conversation.interact()
    return 0


if __name__ == "__main__":
    command_line.run(main)
