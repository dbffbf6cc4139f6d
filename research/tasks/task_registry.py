"""The tasks by name, and the base model that a run of a config starts from."""

import importlib
from pathlib import Path

from jax.sharding import Mesh

from research.config.choices import TASK_MODULES
from research.config.run_config import Config
from research.core.errors import UserError, look_up
from research.data.metric_sums import Objective
from research.data.text.choose_tokenizer import open_tokenizer
from research.formats.base_model import Base, open_base, random_base
from research.tasks.task_protocol import (
    EvaluationRows,
    PromptFormat,
    Task,
    TaskKind,
)
from research.tokenize import tokenizer as tokenizers


def find_kind(config: Config) -> TaskKind:
    """The kind of task that `config.data.kind` names.

    Raises:
      UserError: no kind has this name.
    """
    module = look_up(TASK_MODULES, config.data.kind, "config.data.kind")
    kind: TaskKind = importlib.import_module(module).KIND
    return kind


def open_start(config: Config, own_tokenizer: Path | None = None) -> Base:
    """Opens the base model that a run starts from.

    Args:
      config: of the run.
      own_tokenizer: folder in which an existing run keeps its tokenizer, for a model
        that starts at random; None for a new run.

    Raises:
      UserError: the base model or tokenizer does not exist or does not fit.
    """
    find_kind(config).check(config)
    if config.model.init_from:
        return open_base(config.model.init_from, config.data.hub_timeout)
    if own_tokenizer:
        tokenizer = tokenizers.from_folder(own_tokenizer)
    else:
        tokenizer = open_tokenizer(config.text, config.data)
    return random_base(config.model.preset, tokenizer)


def load_task(config: Config, base: Base) -> Task:
    """Reads the data of `config`.

    Raises:
      UserError: the data cannot be read, or no row is left to train on.
    """
    return find_kind(config).load(config, base)


def rows_of_files(config: Config, base: Base, files: str) -> EvaluationRows:
    """Reads `files` as the held-out rows of a run of `config` are read.

    Args:
      config: of the run.
      base: its base model.
      files: as `config.data.path` names instruction rows, or `config.text.sources`
        text, where names may be missing.

    Raises:
      UserError: the files cannot be read, no row is usable, or the task has no rows of
        this kind.
    """
    read = find_kind(config).rows_of_files
    if read is None:
        raise UserError(
            f"runs of config.data.kind={config.data.kind!r} cannot be evaluated on "
            "files: its task gives no `rows_of_files`"
        )
    return read(config, base, files)


def held_out_rows(config: Config, base: Base) -> EvaluationRows:
    """The rows that a run of `config` holds out, or those of `config.data.eval_path`.

    Raises:
      UserError: the data cannot be read, or no row is held out.
    """
    rows = find_kind(config).held_out_rows(config, base)
    if rows is None:
        raise UserError(
            "this run holds out no rows: name rows to evaluate with --data=FILE"
        )
    return rows


def make_objective(config: Config, mesh: Mesh, groups: int | None = None) -> Objective:
    """The loss that the step of `config` differentiates, and the sums it reports.

    `groups` are those of the loaded task; None takes the number that is expected
    before the data is read.
    """
    kind = find_kind(config)
    if groups is None:
        groups = kind.expected_groups(config)
    return kind.objective(config, mesh, groups)


def prompt_format(config: Config, base: Base) -> PromptFormat:
    """The prompt format of a model that `config` trains."""
    return find_kind(config).prompt_format(config, base)


def exported_tokenizer(
    config: Config, base: Base, system: str = ""
) -> tokenizers.Tokenizer:
    """The tokenizer to export: its chat template is the one that training used.

    `system`: the text that it writes into conversations without one of their own.
    """
    return find_kind(config).exported_tokenizer(config, base, system)
