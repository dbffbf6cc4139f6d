"""Which task a config asks for, and what a run of it starts from."""

import jax

from research.config.run_config import Config
from research.data.text.choose_tokenizer import open_tokenizer
from research.data.text.text_sources import check_text
from research.formats.base_model import Base, open_base, random_base
from research.runs.run_directory import RunDir
from research.tasks.instruction_tuning import InstructionTask
from research.tasks.pretraining import PlainFormat, TextTask
from research.tasks.task_protocol import PromptFormat, Task
from research.tokenize import tokenizer as tokenizers
from research.tokenize.chat_template import ChatFormat


def open_start(config: Config, folder: RunDir) -> Base:
    """The model a run starts from; a run that exists keeps its own tokenizer.

    Raises:
      UserError: it is not there, or does not fit.
    """
    if config.data.kind == "text":
        check_text(config.text)  # A typo must not wait for a tokenizer.
    if config.model.init_from:
        return open_base(config.model.init_from, config.data.hub_timeout)
    if folder.exists:
        tokenizer = tokenizers.from_folder(folder.tokenizer)
    else:
        tokenizer = open_tokenizer(config)
    return random_base(config.model.preset, tokenizer)


def load_task(config: Config, base: Base) -> Task:
    """Reads the data of `config`.

    Raises:
      UserError: it cannot be read, or nothing is left to train on.
    """
    longest = base.architecture.max_position
    if config.data.kind == "text":
        processes = (jax.process_index(), jax.process_count())
        return TextTask(config, base.tokenizer, longest, processes)
    return InstructionTask(config, base.tokenizer, longest)


def prompt_format(config: Config, base: Base) -> PromptFormat:
    """How prompts are put to a model trained by `config`."""
    if config.data.kind == "text":
        return PlainFormat(base.tokenizer)
    return ChatFormat(base.tokenizer, config.data.template, config.data.system)
