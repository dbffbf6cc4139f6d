"""Talks to a trained run: `python -m research.generate --run=runs/finetune_dolly`."""

from collections.abc import Sequence

from absl import flags

from research.config import command_line
from research.core.errors import UserError

USAGE = """
python -m research.generate --run=RUN_DIR [--prompt="..."] [--context="..."] [--compare]

Streams the tuned model's answer to --prompt. Without --prompt it starts a chat, in
which an empty line drops the conversation and the end of input leaves. A run that was
pre-trained on raw text continues the prompt instead. No config is needed: the run
opens with its parameters alone, on the devices of this machine.
"""

flags.DEFINE_string("run", "", "run directory that research.train made")
flags.DEFINE_string("prompt", None, "question or instruction; none starts a chat")
flags.DEFINE_string("context", "", "material that belongs to the prompt")
flags.DEFINE_bool("compare", False, "answer with the base model, too")
flags.DEFINE_string("step", "latest", "checkpoint: latest, best, or a step number")
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token, 1 samples")
flags.DEFINE_float("top_p", 0.95, "nucleus to sample from, with a temperature")
flags.DEFINE_integer("max_new_tokens", 256, "longest answer")
flags.DEFINE_integer("seed", 0, "of sampling")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    command_line.parse(argv, USAGE, has_config=False)
    f = flags.FLAGS
    if not f.run:
        raise UserError("--run=RUN_DIR is missing, e.g. runs/finetune_dolly")
    if f.temperature < 0 or not 0 < f.top_p <= 1 or f.max_new_tokens < 1:
        raise UserError(
            "--temperature must be at least 0, --top_p in 0 to 1, --max_new_tokens at "
            "least 1"
        )
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
