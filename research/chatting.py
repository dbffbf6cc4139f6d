"""A finished or running run as something to talk to."""

import dataclasses
import sys
from collections.abc import Sequence

import jax

from research import jobs, mesh, runtime, step
from research.answers import make_samplers, stream_text
from research.base import Base, open_base
from research.checkpoint import Checkpointer
from research.config import Config, MeshConfig
from research.data.chat import ChatFormat
from research.data.records import Turn
from research.errors import UserError
from research.run_dir import RunDir
from research.sampling import Sampler, Sampling


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """Both models of a run, and how to talk to them."""

    base: Base
    chat: ChatFormat
    samplers: dict[str, Sampler]


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
    base = open_base(config.model.weights, config.data.hub_timeout)
    identity = folder.identity() | {
        "base model": base.fingerprint,
        "tokenizer": base.tokenizer.fingerprint,
    }
    folder.check_identity(identity)
    one_device = mesh.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    job = jobs.make_job(config, base, one_device)
    state = _restore(folder, config, identity, job, which)
    dtype = job.trainable.frozen_dtype
    frozen = jobs.load_base(job, base, dtype) if job.trainable.frozen_specs else {}
    samplers = make_samplers(job, base, state.params, frozen)
    chat = ChatFormat(base.tokenizer, config.data.template, config.data.system)
    return OpenRun(base, chat, samplers)


def _restore(
    folder: RunDir, config: Config, identity: dict[str, str], job: step.Job, which: str
) -> step.TrainState:
    with Checkpointer(
        folder.checkpoints, config.checkpoint, identity, read_only=True
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
        return checkpointer.restore(step.abstract_state(job), number).state


class Conversation:
    """Says and answers, remembering what was said."""

    def __init__(self, run: OpenRun, sampling: Sampling, names: Sequence[str]):
        self._run = run
        self._sampling = sampling
        self._names = names
        self._history: dict[str, list[Turn]] = {name: [] for name in names}

    def say(self, prompt: str, context: str = "") -> None:
        """Streams each model's answer to standard output."""
        for name in self._names:
            history = self._history[name]
            text = f"{prompt}\n\n{context}" if history and context else prompt
            history.append(Turn("user", text))
            if len(self._names) > 1:
                _write(f"--- {name}\n")
            first_context = context if len(history) == 1 else ""
            ids = self._run.chat.encode_prompt(history, first_context)
            stream = self._run.samplers[name].stream(
                ids, self._sampling, self._run.chat.stop_ids
            )
            answer = ""
            for piece in stream_text(stream, self._run.base.tokenizer):
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
            self._history = {name: [] for name in self._names}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
