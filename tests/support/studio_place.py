"""A studio over small run directories, and clients in the same process."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from starlette.testclient import TestClient

from research.config.run_config import Config
from research.config.saved_config import to_json
from research.serve.http.access_keys import ApiKeys
from research.studio.app import make_app
from research.studio.checks.row_survey import BLOCK, summed_up, write_survey
from research.studio.roots import Roots
from research.studio.studio_state import StudioState
from research.tasks.row_preview import PreviewDocument, PreviewRow, PreviewSpan, RowPage

TOKEN = "a-token-of-the-tests"
URL = "http://127.0.0.1:8700"
START = {
    "began": "2026-11-27T10:00:00+00:00", "host": "elsewhere", "devices": "1 cpu",
    "first": 0, "step": 3, "steps": 5, "redone": 0,
    "seconds": {"start": 1.0, "step": 2.0}, "ended": None, "cause": None,
    "exit_code": None,
}  # fmt: skip
ENDS = {
    "stopped": {"cause": "stopped by a request", "exit_code": 7},
    "failed": {"cause": "DivergedError: the loss is not finite", "exit_code": 3},
    "finished": {"cause": "done", "exit_code": 0},
    "killed": {},
}


def train_line(step, loss=None, **more):
    """A line of kind `train`."""
    values = {"loss": 3.0 / step if loss is None else loss, "tokens": 100}
    values |= {"elapsed_s": 0.5 * step, "memory_gb": 0.5, "learning_rate": 1e-3}
    values |= {"grad_norm": 1.0, "tokens_per_s": 200.0, "step_s": 0.5, **more}
    time = f"2026-11-27T10:{step // 60 % 60:02}:{step % 60:02}+00:00"
    return {"step": step, "kind": "train", "time": time, **values}


def eval_line(step, loss, **groups):
    """A line of kind `eval`; `groups` are losses by category."""
    values = {f"loss/{name}": value for name, value in groups.items()}
    return {"step": step, "kind": "eval", "loss": loss, **values}


def make_run(folder, end="stopped", lines=None, **knobs):
    """Writes the files of a run directory that pages read; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    config = dataclasses.replace(Config(), run_dir=str(folder), **knobs)
    (folder / "config.json").write_text(to_json(config))
    (folder / "identity.json").write_text(json.dumps({"run": folder.name}))
    (folder / "lock").write_text("")
    record = {"starts": [START | ENDS[end]], "events": [], "saved": 3}
    record |= {"skipped_batches": [], "accepted": {}, "requests": []}
    (folder / "run.json").write_text(json.dumps(record))
    if lines is None:
        lines = [eval_line(0, 3.5, qa=3.4), *map(train_line, (1, 2, 3))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if end == "finished":
        (folder / "complete.json").write_text("{}")
    return folder


def make_survey(checks, flags, first=0):
    """Files as a check of 450 rows leaves them."""
    spans = [PreviewSpan((), "ask", False), PreviewSpan((), "<u>", True)]
    numbers = range(first, min(first + BLOCK, 450))
    documents = (PreviewDocument("", f"row-{n}", tuple(spans)) for n in numbers)
    rows = [PreviewRow((document,)) for document in documents]
    page = RowPage(first, rows, np.full(450, 40), [("b:2", "<b>:1")], 3)
    folder = checks._place(flags, True, first)
    folder.mkdir(parents=True)
    (folder / "process.json").write_text('{"pid": 99999999, "born": 1.0}')
    (folder / "doctor.json").write_text('{"findings": []}')
    write_survey(folder, summed_up(page, ["rows.jsonl:7: <i>empty</i>"], 63))


class StudioPlace:
    """Folders `runs` and `data`, the state of a studio, its app, and clients."""

    def __init__(self, folder, keys=f"admin {TOKEN}", host="127.0.0.1", names=()):
        self.runs, self.data = folder / "runs", folder / "data"
        roots = Roots([str(self.runs)], "--runs"), Roots([str(self.data)], "--data")
        self.state = StudioState(*roots)
        self.app = make_app(self.state, ApiKeys.from_text(keys, "keys"), host, names)

    def stranger(self, url=URL, **more):
        """A browser without a cookie."""
        return TestClient(self.app, base_url=url, follow_redirects=False, **more)

    def client(self, token=TOKEN, **headers):
        """A browser that has opened the printed address."""
        client = self.stranger(headers={"accept": "text/html", **headers})
        assert client.get(f"/?token={token}").status_code == 303
        return client
