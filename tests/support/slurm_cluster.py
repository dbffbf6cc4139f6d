"""A Slurm cluster of two nodes on this machine, from Debian's packages, on loopback.

Debian builds Slurm without `--enable-multiple-slurmd`, and then no two nodes may have
one host name (https://slurm.schedmd.com/programmer_guide.html). Nodes named by loopback
addresses have two, and JAX, which looks for its first process at the first node's name,
finds it.
"""

import contextlib
import getpass
import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path

import psutil
from free_ports import free_port
from waiting import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = "slurm-wlm and munge (of Debian)"
PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
NODES = ("127.0.0.1", "127.0.0.2")

# cred_expire: a job that is queued again waits until its old credential is worth
# nothing, two minutes by default (AuthInfo in https://slurm.schedmd.com/slurm.conf.html).
CONF = """
ClusterName=little
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdSpoolDir={folder}/spool.%n
StateSaveLocation={folder}/state
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName={nodes[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={nodes[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""


def missing():
    """The daemons that this machine lacks."""
    return [name for name in DAEMONS if shutil.which(name, path=PATH) is None]


class Cluster:
    """Runs while it is entered; leaves no process behind.

    Attributes:
      env: what Slurm's commands need to find it.
    """

    def __init__(self, folder):
        self.folder = folder
        self.env = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons = []

    def __enter__(self):
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = [free_port() for _ in range(1 + len(NODES))]
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                user=getpass.getuser(), folder=self.folder, ports=ports, nodes=NODES
            )
        )
        try:
            self._start_daemons(key)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_daemons(self, key):
        where = [f"--{x}-file={self.folder}/munged.{x}" for x in ("pid", "seed")]
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", *where,
            f"--socket={self.folder}/munge.socket",
        )  # fmt: skip
        self.wait_until(lambda: (self.folder / "munge.socket").exists())
        self._start("slurmctld", "-D")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        self.wait_until(lambda: self.sinfo() == ["idle"] * len(NODES))

    def _start(self, name, *arguments):
        with (self.folder / f"{name}{arguments[-1][-1]}.out").open("wb") as out:
            daemon = subprocess.Popen(
                [name, *arguments], env=os.environ | self.env, stdout=out, stderr=out,
                stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.folder,
            )  # fmt: skip
        self._daemons.append(daemon)

    def __exit__(self, *_):
        """End every process that has this cluster in its environment."""
        while mine := self._mine():  # One may start another while they are listed.
            for process in mine:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(mine, timeout=10)
        for daemon in self._daemons:
            daemon.wait()

    def _mine(self):
        return [each for each in psutil.process_iter() if self._is_mine(each)]

    def _is_mine(self, process):
        # slurmstepd writes its title over the first names: psutil then sees none.
        try:
            known = Path(f"/proc/{process.pid}/environ").read_bytes()
        except OSError:  # It has ended, or is another user's.
            return False
        return f"SLURM_CONF={self.env['SLURM_CONF']}\0".encode() in known

    def processes(self):
        """Command lines of all that belongs to it."""
        return [each.cmdline() for each in self._mine()]

    def call(self, *command):
        """Return the output of a command, which must succeed."""
        done = subprocess.run(
            command, env=os.environ | self.env, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sinfo(self):
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=os.environ | self.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.split()

    def job(self, number):
        """Its fields, as `scontrol show job` has them; of an array, `12_3`."""
        shown = self.call("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait_until_over(self, number):
        """Returns its last fields."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait_until(lambda: self.job(number)["JobState"] in over)
        return self.job(number)

    def wait_until(self, condition):
        wait_until(condition, self._said)

    def _said(self):
        texts = {file.name: file.read_text() for file in self.folder.glob("*.out")}
        return "\n".join(f"{name}: {text[-2000:]}" for name, text in texts.items())
