"""A model by its name, and how it is prompted where no run says so."""

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.formats.base_model import Base, open_base
from research.runs.lineage.base_of_run import open_step
from research.runs.run_directory import RunDir
from research.tasks.pretraining import PlainFormat
from research.tasks.task_protocol import PromptFormat
from research.tokenize.chat_template import ChatFormat
from research.tokenize.default_system import DEFAULT_SYSTEM


def prompts_of(base: Base, system: str | None = None) -> PromptFormat:
    """The format of a model's own prompts; without a chat template it continues text.

    Args:
      base: the model.
      system: a system text; "" sends none, and None leaves it to the template.

    Raises:
      UserError: its template cannot be used.
    """
    template = base.tokenizer.chat_template
    if not template:
        return PlainFormat(base.tokenizer)
    sends_none = system == "" and DEFAULT_SYSTEM in template
    args = (f"{DEFAULT_SYSTEM}=",) if sends_none else ()
    return ChatFormat(base.tokenizer, "chat", system or "", args)


def open_named(name: str) -> Base:
    """A base model by the name that `config.model.init_from` has for it.

    Raises:
      UserError: there is no such model, or it is the folder of a run without a step.
    """
    place, step = split_step(name)
    if step:
        return open_step(place, step)
    if "://" not in name and RunDir(name).checkpoints.is_dir():
        raise UserError(
            f"--model={name} is the folder of a run: use --run={name}, or name a step "
            f"of it as the base of other runs, --model={name}@latest"
        )
    return open_base(name)
