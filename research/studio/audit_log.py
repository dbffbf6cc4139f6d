"""`audit.jsonl`: a line for each start, stop, load and removal, and who did it."""

import json
import threading
from pathlib import Path
from typing import Any

from research.core.json_files import read_json_lines
from research.runs.utc_clock import utc_now

NAME = "audit.jsonl"
LINE = {"time": str, "action": str, "what": str}


class AuditLog:
    """The file; threads may share one."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._lock = threading.Lock()

    def add(self, action: str, what: str, who: str, **more: Any) -> None:
        """Appends a line. Raises OSError: then the action must not be done.

        Args:
          action: one word, such as `start`.
          what: the run or file.
          who: the client's address and role.
          more: facts for programs, such as the command.
        """
        line = {"time": utc_now(), "action": action, "what": what, "who": who, **more}
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All lines, oldest first; none without a file."""
        return read_json_lines(self.path, LINE)[0]
