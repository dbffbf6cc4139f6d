"""`audit.jsonl`: each start, stop, load and removal, who did it, and its outcome."""

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from research.core.errors import UserError
from research.core.json_files import read_json_lines
from research.runs.utc_clock import utc_now
from research.studio.page_errors import PageError

NAME = "audit.jsonl"
LINE = {"time": str, "action": str, "what": str}


class AuditLog:
    """The file; threads may share one."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def noting(
        self, action: str, what: str, who: str, **more: Any
    ) -> Iterator[dict[str, Any]]:
        """Appends a line, does the block, and appends its outcome with the same id.

        The block is not done if the line cannot be written. It gets the facts of the
        second line, and may add some. The outcome is `done`, `refused: ...` or
        `failed: ...`; a line without one was cut off by the end of the server.

        Args:
          action: one word, such as `start`.
          what: the run or file.
          who: the client's address and role.
          more: facts for programs, such as the command.

        Raises:
          OSError: a line cannot be written; and what the block raises.
        """
        known = {"id": uuid.uuid4().hex[:12], "action": action, "what": what}
        self._append(known | {"who": who, **more})
        facts: dict[str, Any] = {}
        try:
            yield facts
        except (PageError, UserError) as error:
            self._append(known | {"outcome": f"refused: {error}"})
            raise
        except BaseException as error:
            self._append(known | {"outcome": f"failed: {error!r}"})
            raise
        self._append(known | {"outcome": "done", **facts})

    def _append(self, line: dict[str, Any]) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": utc_now(), **line}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """The actions, oldest first, each with its outcome; none without a file."""
        actions: dict[Any, dict[str, Any]] = {}
        for number, line in enumerate(read_json_lines(self.path, LINE)[0]):
            # Earlier versions wrote one line without an id.
            key = line.get("id", number)
            actions[key] = line | actions.get(key, {})
        return [*actions.values()]
