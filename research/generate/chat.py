"""A finished or running run as something to talk to."""

import dataclasses
import sys
from typing import Any

import jax

from research.checkpoints.checkpointer import Checkpointer
from research.config.run_config import Config, MeshConfig
from research.core.errors import UserError
from research.engine.sampler import Sampler, Sampling
from research.engine.text_generation import Model, base_model, tuned_model
from research.formats.base_model import Base
from research.parallel import mesh, runtime
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History
from research.tasks.task_protocol import PromptFormat
from research.tasks.task_registry import open_start, prompt_format
from research.tokenize.conversation import Turn
from research.train.step import train_step
from research.train.step.definition_from_config import load_base, make_step_definition


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run's parameters on one device, and how to talk to it."""

    config: Config
    base: Base
    definition: train_step.StepDefinition
    params: dict[str, Any]
    frozen: dict[str, Any]

    @property
    def prompts(self) -> PromptFormat:
        return prompt_format(self.config, self.base)

    def models(self, compare: bool) -> dict[str, Model]:
        """`tuned`, and `base` before it if they are to be compared.

        Raises:
          UserError: there is no base model: the run began with random weights.
        """
        start = (self.definition, self.base, Sampler(self.definition.model))
        found = {"tuned": tuned_model(*start, self.params, self.frozen)}
        if not compare:
            return found
        base = base_model(*start, self.frozen)
        if base is None:
            raise UserError("--compare: this run began with random weights, no model")
        return {"base": base, **found}


def open_run(path: str, which: str) -> OpenRun:
    """Loads base and checkpoint of a run directory onto one device.

    Args:
      path: the run directory.
      which: `latest`, `best`, or a step number.

    Raises:
      UserError: there is no such run or checkpoint, or its base model has changed.
    """
    folder = RunDir(path)
    config = folder.config()
    runtime.start(dataclasses.replace(config.runtime, distributed=False))
    base = open_start(config, folder)
    identity = folder.identity() | {
        "base model": base.fingerprint,
        "tokenizer": base.tokenizer.fingerprint,
    }
    folder.check_identity(identity)
    one_device = mesh.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    definition = make_step_definition(config, base, one_device)
    state = _restore(folder, config, identity, definition, which)
    dtype = definition.trainable.frozen_dtype
    frozen = (
        load_base(definition, base, dtype) if definition.trainable.frozen_specs else {}
    )
    return OpenRun(config, base, definition, state.params, frozen)


def _restore(
    folder: RunDir,
    config: Config,
    identity: dict[str, str],
    definition: train_step.StepDefinition,
    which: str,
) -> train_step.TrainState:
    with Checkpointer(
        folder.checkpoints,
        config.checkpoint,
        identity,
        accept=set(History(folder.history, PhaseTimer()).accepted),
        read_only=True,
    ) as checkpointer:
        known = checkpointer.steps
        number = checkpointer.best_step if which == "best" else checkpointer.latest_step
        if which not in ("latest", "best"):
            number = int(which) if which.isdigit() else -1
        if number not in known:
            raise UserError(
                f"{folder.path} has no checkpoint {which!r}; it has steps "
                f"{', '.join(map(str, known)) or 'none yet'}"
            )
        return checkpointer.restore(train_step.abstract_state(definition), number).state


class Conversation:
    """Says and answers, remembering what was said."""

    def __init__(self, run: OpenRun, sampling: Sampling, *, compare: bool):
        self._prompts = run.prompts
        self._models = run.models(compare)
        self._sampling = sampling
        self._history: dict[str, list[Turn]] = {}
        self.forget()

    def forget(self) -> None:
        """Starts afresh."""
        self._history = {name: [] for name in self._models}

    def say(self, prompt: str, context: str = "") -> None:
        """Streams each model's answer to standard output."""
        for name, model in self._models.items():
            history = self._history[name]
            text = f"{prompt}\n\n{context}" if history and context else prompt
            history.append(Turn("user", text))
            if len(self._models) > 1:
                _write(f"--- {name}\n")
            first_context = context if len(history) == 1 else ""
            ids = self._prompts.encode_prompt(history, first_context)
            answer = ""
            for piece in model.stream(ids, self._sampling, self._prompts.stop_ids):
                answer += piece
                _write(piece)
            _write("\n")
            history.append(Turn("assistant", answer.strip()))

    def interact(self) -> None:
        """Reads prompts until end of input; an empty line starts afresh."""
        interactive = sys.stdin.isatty()
        while True:
            try:
                line = input("you> " if interactive else "").strip()
            except (EOFError, KeyboardInterrupt):
                _write("\n")
                return
            if line:
                try:
                    self.say(line)
                    continue
                except UserError as error:  # Longer than the model's context.
                    _write(f"{error}; starting afresh\n")
            self.forget()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
