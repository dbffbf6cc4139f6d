"""The tasks by name, and the base model that a run of a config starts from."""

from pathlib import Path

import jax

from research.config.run_config import Config
from research.data.text.choose_tokenizer import open_tokenizer
from research.data.text.text_sources import check_text
from research.formats.base_model import Base, open_base, random_base
from research.tasks.instruction_tuning import InstructionTask
from research.tasks.pretraining import PlainFormat, TextTask
from research.tasks.task_protocol import PromptFormat, Task
from research.tokenize import tokenizer as tokenizers
from research.tokenize.chat_template import ChatFormat, dolly_template


def open_start(config: Config, own_tokenizer: Path | None = None) -> Base:
    """Opens the base model that a run starts from.

    Args:
      config: of the run.
      own_tokenizer: folder in which an existing run keeps its tokenizer, for a model
        that starts at random; None for a new run.

    Raises:
      UserError: the base model or tokenizer does not exist or does not fit.
    """
    if config.data.kind == "text":
        check_text(config.text)  # A typo must not wait for a tokenizer.
    if config.model.init_from:
        return open_base(config.model.init_from, config.data.hub_timeout)
    if own_tokenizer:
        tokenizer = tokenizers.from_folder(own_tokenizer)
    else:
        tokenizer = open_tokenizer(config)
    return random_base(config.model.preset, tokenizer)


def load_task(config: Config, base: Base) -> Task:
    """Reads the data of `config`.

    Raises:
      UserError: the data cannot be read, or no row is left to train on.
    """
    longest = base.architecture.max_position
    if config.data.kind == "text":
        processes = (jax.process_index(), jax.process_count())
        return TextTask(config, base.tokenizer, longest, processes)
    return InstructionTask(config, base.tokenizer, longest)


def prompt_format(config: Config, base: Base) -> PromptFormat:
    """The prompt format of a model that `config` trains."""
    if config.data.kind == "text":
        return PlainFormat(base.tokenizer)
    return ChatFormat(base.tokenizer, config.data.template, config.data.system)


def exported_tokenizer(config: Config, base: Base) -> tokenizers.Tokenizer:
    """The tokenizer to export: its chat template is the one that training used."""
    if config.data.kind == "text" or config.data.template != "dolly":
        return base.tokenizer
    return base.tokenizer.with_chat_template(dolly_template(base.tokenizer))
