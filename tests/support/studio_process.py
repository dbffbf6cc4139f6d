"""`python -m research.studio` as a process, in a folder of its own."""

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from commands import ENVIRONMENT
from waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]


class StudioProcess:
    """The command in a folder, and all that it has started."""

    def __init__(self, folder, cache):
        from studio_place import TOKEN  # Late: most tests need no studio.

        self.folder, self.port, self.process = folder.resolve(), 0, None
        self._cache, self._log = cache, self.folder / "studio.log"
        token = cache / "research" / "studio_token"
        token.parent.mkdir(parents=True, exist_ok=True)
        token.write_text(TOKEN)

    def start(self):
        """Starts it at the port that it had, and waits for its address."""
        kept = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("PYTHON")}
        env = kept | {
            "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(self._cache),
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_NUM_CPU_DEVICES": "1", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "research.studio", f"--port={self.port}"]
        with self._log.open("w") as log:
            self.process = psutil.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log
            )
        # As other commands in the background; all that it starts inherits it.
        self.process.nice(10)
        said = self._log.read_text
        wait_until(
            lambda: "studio: http" in said() or self.process.poll() is not None, said
        )
        line = self._log.read_text().partition("studio: ")[2].split()[0]
        self.url = line.partition("/?")[0]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def cpu(self):
        """CPU seconds so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    def megabytes(self):
        """Resident memory."""
        return self.process.memory_info().rss / 1e6

    def kill(self):
        """SIGKILL: it can tidy nothing up."""
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL

    def all(self):
        """The processes in its folder."""
        return [
            process
            for process in psutil.process_iter(["cwd", "cmdline"])
            if process.info["cwd"] == str(self.folder)
        ]

    def end_all(self):
        """Ends the studio and every process in its folder."""
        with contextlib.suppress(psutil.Error, subprocess.TimeoutExpired):
            self.process.terminate()
            self.process.wait(60)
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                process.kill()
                process.wait(PATIENCE)

    def logs(self):
        """The end of each log, for people."""
        files = (*self.folder.rglob("*.log"), *self.folder.rglob("servers/*/log"))
        return "\n".join(f"{file}\n{file.read_text()[-3000:]}" for file in files)
