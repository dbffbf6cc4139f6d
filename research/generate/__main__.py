"""Asks a model: `python -m research.generate --run=runs/finetune_dolly`."""

import dataclasses
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.config import command_line
from research.config.data_knobs import ColumnsConfig
from research.config.knobs import knob
from research.core.errors import UserError
from research.core.local_paths import local_path, require_file
from research.formats.peft.find_adapter import names_adapter
from research.runs.answering.weight_forms import weights_knob

if TYPE_CHECKING:
    from research.generate.asked_model import AskedModel
    from research.generate.prompt_file import PromptColumns

USAGE = """
python -m research.generate --run=RUN_DIR [--prompt="..."] [--context="..."] [--compare]
python -m research.generate --model=FOLDER|FILE.gguf|hub://OWNER/NAME|pkg://PACKAGE/FILE
python -m research.generate --run=PEFT_ADAPTER_FOLDER|hub://OWNER/NAME [--model=BASE]
python -m research.generate --run=RUN_DIR --prompts=FILE [--out=FILE.jsonl]

Streams the model's answer to --prompt, or to all of standard input with --prompt=-.
Without --prompt, a terminal is a chat: an empty line drops the conversation, and the
end of input leaves. In a pipe each line is a prompt by itself, unless --chat is given;
--json writes one JSON object for each. A model without a chat template, and a run that
was pre-trained on raw text, continue the prompt. No config is needed: the model opens
with its parameters alone, on the devices of this machine.

--prompts reads a prompt from each line of a text file, or from each row of a .jsonl,
.json, .csv or .parquet file. A row's prompt is in the column --prompt_column, else in
the one that the run was trained with, else in `prompt` or `messages`. Answers that the
rows have are not shown to the model. With --out many are answered at once, and each
answer is written in the order of the prompts; the same command continues after a kill.
"""
OF_MODEL = "not given: that of the model's generation_config.json"


@dataclasses.dataclass(frozen=True)
class GenerateFlags:
    run: str = knob(
        "",
        "run directory, its config.json or config file, or an adapter of PEFT, its "
        "folder or hub://owner/name",
        is_path=True,
        may_be_adapter=True,
    )
    model: str = knob(
        "",
        "model without a run, as config.model.init_from names it: a Hugging Face "
        "folder, an export, a .gguf file, hub://owner/name, pkg://package/file.gguf; "
        "with an adapter of PEFT its base, in place of the one that it names",
        is_path=True,
    )
    prompt: str | None = knob(
        None, "question or instruction; -: all of standard input; not given: see above"
    )
    prompts: str = knob("", "file of prompts; see above", is_path=True)
    prompt_column: str = knob("", "column of --prompts with a text or messages")
    context_column: str = knob("", "column of --prompts with material; may be missing")
    out: str = knob("", "file of their answers, a JSON object a line", is_path=True)
    slots: int = knob(8, "answers of --out that are made at once", low=1, high=256)
    context: str = knob("", "material that belongs to the prompt")
    system: str | None = knob(
        None, "system text; not given: that of training; --system= sends none"
    )
    chat: bool = knob(False, "the lines of a pipe are one conversation")
    json: bool = knob(
        False,
        "write a JSON object a line: line, prompt, answer (answers with --n, base and "
        "tuned with --compare) and finish, or error",
    )
    jsonl: bool = knob(False, "older name of --json")
    compare: bool = knob(False, "answer with the base model of the run, too")
    step: str = knob("latest", "checkpoint of the run: latest, best, or a step number")
    weights: str = weights_knob()
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
    top_k: int | None = knob(
        None, f"likeliest tokens to sample from, 0: all; {OF_MODEL}, else all", low=0
    )
    min_p: float | None = knob(
        None,
        "least probability of a sampled token, as a share of the likeliest one's; "
        f"{OF_MODEL}, else 0",
        low=0,
        high=1,
    )
    repetition_penalty: float | None = knob(
        None,
        f"above 1 makes tokens that are there already less likely; {OF_MODEL}, else 1",
        above=0,
    )
    stop: tuple[str, ...] = knob(
        (), "text that ends an answer and is not part of it; may be given repeatedly"
    )
    max_new_tokens: int | None = knob(
        None, f"longest answer, in tokens; {OF_MODEL}, else 256", above=0
    )
    n: int = knob(1, "answers to each prompt, with different seeds", low=1, high=100)
    seed: int = knob(0, "seed of the samples; counts up from answer to answer")


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
    columns = _columns(f)
    if f.prompts:
        from research.generate.prompt_file import check_prompts

        check_prompts(Path(f.prompts), columns)
    from research.generate.asked_model import Asking, SamplingFlags, open_asked
    from research.parallel import runtime

    runtime.start_alone()
    if f.prompt != "-" and os.path.isfile(f.prompt or ""):
        logging.warning(
            "--prompt is the name of a file, and the model gets the name alone: "
            "--prompts=%s answers its lines",
            f.prompt,
        )
    names = [field.name for field in dataclasses.fields(SamplingFlags)]
    flags = SamplingFlags(**{name: getattr(f, name) for name in names})
    asking = Asking(f.system, flags, f.stop, f.weights)
    model = open_asked(f.run, f.model, f.step, f.compare, asking)
    return UserError.exit_code if _ask(model, f, prompt, columns) else 0


def _columns(f: GenerateFlags) -> "PromptColumns":
    """Those of --prompts: as the run was trained, where no flag names another."""
    from research.generate.prompt_file import PromptColumns
    from research.runs.run_directory import RunDir

    columns = ColumnsConfig()
    if f.prompts and f.run and not names_adapter(f.run):
        config = RunDir(f.run).config()
        columns = config.data.columns
        if config.data.kind == "text":
            columns = dataclasses.replace(columns, instruction=config.text.column)
    return PromptColumns.of(columns, f.prompt_column, f.context_column)


def _ask(
    model: "AskedModel", f: GenerateFlags, prompt: str | None, columns: "PromptColumns"
) -> int:
    """Answers what the flags say; returns how many prompts failed."""
    from research.generate import separate_prompts
    from research.generate.answer_file import answer_file
    from research.generate.chat import Conversation
    from research.generate.prompt_file import read_prompts

    context, as_json = f.context.strip(), f.json or f.jsonl
    is_terminal = sys.stdin.isatty()
    if f.out:
        paths = Path(f.prompts), Path(f.out)
        return answer_file(
            model, *paths, context, columns=columns, count=f.n, slots=f.slots
        )
    if f.prompts:
        prompts = read_prompts(Path(f.prompts), columns)
    elif prompt is not None:
        prompts = [separate_prompts.single_prompt(prompt)]
    else:
        prompts = separate_prompts.piped_prompts()
    by_itself = prompt is None and not f.chat and not is_terminal
    if f.prompts or as_json or f.n > 1 or by_itself:
        return separate_prompts.answer_each(
            model, prompts, context, as_json=as_json, count=f.n
        )
    conversation = Conversation(model, context)
    if prompt is None:
        failed = conversation.interact()
        return 0 if is_terminal else failed
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
    if f.run and names_adapter(f.run):
        if of_run["step"]:
            raise UserError(
                f"--run={f.run} is an adapter of PEFT, which has no steps: drop --step"
            )
    elif f.model and given:
        raise UserError(
            f"--model is a model without a run, and {', '.join(given)} needs one: drop "
            "either"
        )
    of_prompts = {
        "prompt": f.prompt is not None,
        "prompts": f.prompts,
        "json": f.json,
        "jsonl": f.jsonl,
        "n": f.n > 1,
    }
    given = [f"--{name}" for name, is_set in of_prompts.items() if is_set]
    if f.chat and given:
        raise UserError(f"--chat is a conversation: it takes no {', '.join(given)}")
    if f.prompts and f.prompt is not None:
        raise UserError("--prompt and --prompts are both set: drop either")
    if f.prompts:
        require_file(f"--prompts={f.prompts}", local_path(f.prompts, "--prompts"))
    of_file = {
        "out": f.out,
        "prompt_column": f.prompt_column,
        "context_column": f.context_column,
    }
    given = [f"--{name}" for name, is_set in of_file.items() if is_set]
    if given and not f.prompts:
        raise UserError(f"{', '.join(given)} needs a file of prompts: give --prompts=")
    if "" in f.stop:
        raise UserError("--stop is empty; it would end every answer at once")


if __name__ == "__main__":
    command_line.run(main)
