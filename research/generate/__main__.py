"""Asks a model: `python -m research.generate --run=runs/finetune_dolly`."""

import dataclasses
import io
import sys
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError

USAGE = """
python -m research.generate --run=RUN_DIR [--prompt="..."] [--context="..."] [--compare]
python -m research.generate --model=FOLDER|FILE.gguf|hub://OWNER/NAME|pkg://PACKAGE/FILE

Streams the model's answer to --prompt, or to all of standard input with --prompt=-.
Without --prompt, a terminal is a chat: an empty line drops the conversation, and the
end of input leaves. In a pipe each line is a prompt by itself, unless --chat is given;
--jsonl writes one JSON object for each. A model without a chat template, and a run that
was pre-trained on raw text, continue the prompt. No config is needed: the model opens
with its parameters alone, on the devices of this machine.
"""
OF_MODEL = "not given: that of the model's generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerateFlags:
    run: str = knob("", "run directory, its config.json or config file", is_path=True)
    model: str = knob(
        "",
        "model without a run, as config.model.init_from names it: a Hugging Face "
        "folder, an export, a .gguf file, hub://owner/name, pkg://package/file.gguf",
        is_path=True,
    )
    prompt: str | None = knob(
        None, "question or instruction; -: all of standard input; not given: see above"
    )
    context: str = knob("", "material that belongs to the prompt")
    system: str | None = knob(
        None, "system text; not given: that of training; --system= sends none"
    )
    chat: bool = knob(False, "the lines of a pipe are one conversation")
    jsonl: bool = knob(
        False, "write a line with line, prompt and answer (or base and tuned, or error)"
    )
    compare: bool = knob(False, "answer with the base model of the run, too")
    step: str = knob("latest", "checkpoint of the run: latest, best, or a step number")
    temperature: float | None = knob(
        None,
        f"0 takes the likeliest token; above 0 samples; {OF_MODEL}, else 0",
        low=0,
    )
    top_p: float | None = knob(
        None,
        f"nucleus to sample from, with a temperature; {OF_MODEL}, else 0.95",
        above=0,
        high=1,
    )
    max_new_tokens: int | None = knob(
        None, f"longest answer, in tokens; {OF_MODEL}, else 256", above=0
    )
    seed: int = knob(0, "seed of the samples; counts up from prompt to prompt")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, GenerateFlags)
    _check(f)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A prompt that is not UTF-8 is refused by itself.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    prompt = sys.stdin.read().removesuffix("\n") if f.prompt == "-" else f.prompt
    if prompt is not None and not (prompt.strip() or f.context.strip()):
        raise UserError("--prompt is empty")
    from research.generate.asked_model import SamplingFlags, open_model, open_run
    from research.generate.chat import Conversation
    from research.generate.separate_prompts import answer_each, piped_prompts
    from research.parallel import runtime

    runtime.start_alone()
    flags = SamplingFlags(f.temperature, f.top_p, f.max_new_tokens, f.seed)
    if f.model:
        model = open_model(f.model, f.system, flags)
    else:
        model = open_run(f.run, f.step, f.compare, f.system, flags)
    context = f.context.strip()
    if f.jsonl or (prompt is None and not f.chat and not sys.stdin.isatty()):
        prompts = piped_prompts() if prompt is None else [(1, prompt)]
        failed = answer_each(model, prompts, context, as_json=f.jsonl)
        return UserError.exit_code if failed else 0
    conversation = Conversation(model, context)
    if prompt is None:
        failed = conversation.interact()
        return UserError.exit_code if failed and not sys.stdin.isatty() else 0
    conversation.say(prompt)
    return 0


def _check(f: GenerateFlags) -> None:
    """Raises UserError for flags that do not go together."""
    if not f.run and not f.model:
        raise UserError(
            "--run=RUN_DIR is missing, e.g. runs/finetune_dolly; or give --model="
        )
    of_run = {"run": f.run, "compare": f.compare, "step": f.step != "latest"}
    given = [f"--{name}" for name, is_set in of_run.items() if is_set]
    if f.model and given:
        raise UserError(
            f"--model is a model without a run, and {', '.join(given)} needs one: drop "
            "either"
        )
    if f.chat and (f.jsonl or f.prompt is not None):
        raise UserError("--chat is a conversation: it takes no --prompt and no --jsonl")


if __name__ == "__main__":
    command_line.run(main)
