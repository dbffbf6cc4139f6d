"""The process in which the chat templates of models run.

A template is code that came with a model. Jinja's sandbox keeps it from the machine,
but not from looping for ever or from filling the memory. So it runs in a process of
its own, which the system ends at a limit; ours continues, and says what happened.
"""

import atexit
import contextlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from research.core.errors import UserError

SCRIPT = Path(__file__).with_name("template_script.py")
# Private-use characters around the text of a {% generation %} block.
BEGIN_BLOCK, END_BLOCK = "\ue0f2", "\ue0f3"
END = b"\0"  # Not in JSON.
PATIENCE = 60.0  # seconds of waiting; the limit of CPU time usually ends it earlier.


def render_template(source: str, values: dict[str, Any]) -> str:
    """The text of a template.

    Args:
      source: of the template.
      values: its variables, as JSON has them.

    Raises:
      UserError: it fails, or exceeds the limits of `template_script`.
    """
    with _LOCK:
        reply = _running().reply({"source": source, "values": values})
    if "broken" in reply:
        raise UserError(f"the model's chat template is broken: {reply['broken']}")
    if "error" in reply:
        raise UserError(f"the model's chat template fails: {reply['error']}")
    return reply["text"]


class _TemplateProcess:
    def __init__(self) -> None:
        folders = {
            str(Path(folder).parent)
            for package in ("jinja2", "markupsafe")
            for folder in importlib.util.find_spec(package).submodule_search_locations
        }
        marks = (str(ord(mark)) for mark in (BEGIN_BLOCK, END_BLOCK))
        # Signals that are meant for the run must not end a template.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SCRIPT), *marks, *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def reply(self, request: dict[str, Any]) -> dict[str, str]:
        """Sends a request, and waits; an end of the process is an error, too."""
        line = b""
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line()
        except OSError:
            pass  # The process has ended.
        except BaseException:
            self.close()  # Its answer would meet the next request.
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        return {"error": self._explain_end()}

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> int:
        """Ends the process, if it has not ended; returns its exit code."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        return self._process.wait()

    def _read_line(self) -> bytes:
        """A line, or less if the process ends or is ended after `PATIENCE`."""
        last = time.monotonic() + PATIENCE
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not parts or not parts[-1].endswith((b"\n", END)):
                if selector.select(last - time.monotonic()):
                    parts.append(os.read(self._process.stdout.fileno(), 1 << 16) or END)
                else:
                    self._process.kill()
        return b"".join(parts)

    def _explain_end(self) -> str:
        code = self.close()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return "it runs for too long"
        return f"it ended the process that ran it, with code {code}"


_LOCK = threading.Lock()
# By the number of the process that started it: a fork must not use another's.
_PROCESSES: dict[int, _TemplateProcess] = {}


def _running() -> _TemplateProcess:
    mine = os.getpid()
    if mine in _PROCESSES and _PROCESSES[mine].ended:
        _PROCESSES.pop(mine).close()
    if mine not in _PROCESSES:
        _PROCESSES[mine] = _TemplateProcess()
    return _PROCESSES[mine]


@atexit.register
def _close() -> None:
    if os.getpid() in _PROCESSES:
        _PROCESSES[os.getpid()].close()
