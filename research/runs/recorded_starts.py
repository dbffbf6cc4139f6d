"""This process starts runs: it locks them, and records each start and its end."""

import logging
import signal

import jax

from research.core.errors import INTERRUPTED, PREEMPTED
from research.parallel import agreement
from research.runs.control.os_signals import Preempted
from research.runs.phase_timer import PhaseTimer
from research.runs.run_directory import RunDir
from research.runs.run_history import History


class RecordedStarts:
    """The runs that this process starts: one, or several that train together."""

    def __init__(self, phases: PhaseTimer):
        self._phases = phases
        self._folders: list[RunDir] = []
        self._histories: list[History] = []

    def open(self, folder: RunDir) -> History:
        """Locks the run and reads its history, which nobody else can change then.

        If the run exists, its history records this start at once, so it also records
        what ends the start before the first step.

        Raises:
          UserError: another process works on the run, or `run.json` is no history.
        """
        self._folders.append(folder)
        exists = folder.exists
        locks = exists and jax.process_index() == 0
        agreement.together(folder.lock if locks else lambda: None)
        history = History(folder.history, self._phases)
        self._histories.append(history)
        if exists:
            history.begin()
        return history

    def ended_by(self, error: BaseException) -> int:
        """Records the end of all starts that have not ended; returns the exit code."""
        if isinstance(error, Preempted):
            code = self._interrupted(error)
            cause = f"{error} outside of training steps"
        else:
            known = 2 if isinstance(error, PermissionError) else 1
            code = getattr(error, "exit_code", known)
            cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        for history in self._histories:
            history.end(cause, code)
        return code

    def _interrupted(self, error: Preempted) -> int:
        if any(folder.exists for folder in self._folders):
            logging.info("stopped by %s; the same command resumes the run", error)
            return PREEMPTED
        logging.info("stopped by %s before there was anything to save", error)
        return INTERRUPTED if error.signal == signal.SIGINT else PREEMPTED
