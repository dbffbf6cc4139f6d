"""Shared by the pages of one server. All of it can be read again from files."""

import collections
import threading
import time
from pathlib import Path
from typing import Any

from research.studio.audit_log import AuditLog
from research.studio.checks.check_process import Checks
from research.studio.checks.page_process import PageProcesses
from research.studio.checks.start_plans import StartPlans
from research.studio.confinement import Confinement
from research.studio.evaluations.evaluation_files import (
    EvaluationIndex,
    ListedEvaluation,
)
from research.studio.jobs.job_queue import JobQueue, queue_folder
from research.studio.listing.run_index import ListedRun, RunIndex
from research.studio.listing.run_state import HeldLocks, RunState, read_state
from research.studio.live.metric_columns import MetricColumns
from research.studio.live.run_feed import RunFeed, figures
from research.studio.roots import Roots
from research.studio.serving.model_servers import ModelServers

OPEN_COLUMNS = 16  # runs whose columns stay in memory, some 8 MB for 100,000 steps


class StudioState:
    """Roots, runs, jobs, checks, servers, and the streams that are open."""

    def __init__(self, runs: Roots, data: Roots):
        self.runs, self.data = runs, data
        self.confined = Confinement(runs, data)
        own = runs.first / ".studio"
        self.audit = AuditLog(own)
        self.queue = JobQueue(queue_folder(runs.first))
        self.checks = Checks(own / "checks")
        self.servers = ModelServers(own / "servers")
        self.plans = StartPlans(own)
        self.reports = PageProcesses(own / "reports")
        self.feed = RunFeed(self.live_state)
        self.began = time.monotonic()
        self.logs = own / "logs"
        self._index = RunIndex(runs)
        self._evaluations = EvaluationIndex()
        self._columns: collections.OrderedDict[Path, MetricColumns]
        self._columns = collections.OrderedDict()
        self._lock = threading.Lock()

    def listed(self) -> list[ListedRun]:
        """All runs, the one that changed last first."""
        with self._lock:
            return self._index.runs()

    def evaluations(self, run: str, most: int) -> tuple[list[ListedEvaluation], int]:
        """The newest evaluations of a run, or of all if it is empty; and how many.

        At most so many are read.
        """
        runs = [each for each in self.listed() if run in ("", each.name)]
        with self._lock:
            return self._evaluations.newest(runs, most)

    def columns(self, folder: Path) -> MetricColumns:
        """The columns of a run, up to date."""
        with self._lock:
            columns = self._columns.pop(folder, None) or MetricColumns(folder)
            self._columns[folder] = columns
            while len(self._columns) > OPEN_COLUMNS:
                self._columns.popitem(last=False)
        columns.refresh()
        return columns

    def state_of(self, folder: Path) -> RunState:
        """The state of a run now."""
        return read_state(folder, is_training=HeldLocks().holds(folder))

    def live_state(self, folder: Path, columns: MetricColumns) -> dict[str, Any]:
        """The figures of a run that its page keeps up to date."""
        state = self.state_of(folder)
        return {
            "state": state.state,
            "cause": state.cause,
            "steps": state.steps,
            "job": self.queue.read().state_of(folder),
            **figures(columns, state.steps, state.first),
        }
