"""What a job needs to run where this machine's files are not."""

import argparse
import dataclasses
import hashlib
import os
import posixpath
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.jobs.launch_job import LaunchJob
from research.config.run_config import Config
from research.core.errors import UserError
from research.runs import provenance

ROOT = provenance.ROOT
LOCAL_FILES = ("config",)  # flags of trainers that name a file beside the code
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def portable(job: LaunchJob, target: str) -> LaunchJob:
    """The job with its files named from the root of the code, where it will start.

    Raises:
      UserError: a file lies outside, or it is a job of several runs.
    """
    if job.module != "research.train":
        raise UserError(
            f"{target} starts one run a job, and {job.name} are several: give "
            "--together=1"
        )
    flags, rest = [], iter(job.flags)
    for flag in rest:
        name, mark, value = flag.partition("=")
        if name.lstrip("-") not in LOCAL_FILES:
            flags.append(flag)
            continue
        value = value if mark else next(rest, "")
        flags.append(f"{name}={_from_root(name, value, target)}")
    return dataclasses.replace(job, flags=tuple(flags))


def _from_root(flag: str, value: str, target: str) -> str:
    # A config file may be followed by :ARGUMENT, see ml_collections.
    file, mark, argument = value.partition(":")
    path = Path(file).resolve()
    if not path.is_relative_to(ROOT.resolve()):
        raise UserError(
            f"{flag} is {file}; {target} sees only the files of {ROOT}: put it there"
        )
    return path.relative_to(ROOT.resolve()).as_posix() + mark + argument


def names(jobs: Sequence[LaunchJob]) -> list[str]:
    """What clouds call the jobs: RFC 1035 labels, each the same in every launch.

    Raises:
      UserError: two jobs would have one.
    """
    labels: dict[str, LaunchJob] = {}
    for job in jobs:
        label = job.label()
        if label != job.label(len(job.name) + len("run-")):
            told = hashlib.sha256(job.name.encode()).hexdigest()[:6]
            label = f"{job.label(33)}-{told}"
        other = labels.setdefault(label, job)
        if other is not job:
            raise UserError(
                f"{other.name!r} and {job.name!r} are both {label} to a cloud: rename "
                "one"
            )
    return list(labels)


def local_files(job: LaunchJob) -> list[str]:
    """The files of a portable job, from the root of the code."""
    pairs = (flag.partition("=") for flag in job.flags)
    found = [v.partition(":")[0] for n, _, v in pairs if n.lstrip("-") in LOCAL_FILES]
    rows = job.config.data.path
    return [*found, rows] if rows and not Path(rows).is_absolute() else found


def inputs(config: Config) -> dict[str, str]:
    """The knobs that may name a file or folder to read; see `research/config.py`."""
    found = {"model.init_from": config.model.init_from}
    if config.data.kind == "instructions":
        return {**found, "data.path": config.data.path}
    found["text.tokenizer"] = config.text.tokenizer
    for source in config.text.sources:
        name, _, where = source.partition("=")
        found[f"text.sources ({name})"] = where
    return found


def _sent(file: str) -> bool:
    """Whether it is part of the code: in git's index, or there is no git to ask."""
    if provenance.code_version(ROOT) == "unknown":
        return True
    command = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", "--", file]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def stored(job: LaunchJob, folder: str) -> LaunchJob:
    """The job with its run directory in `folder` there, which outlives its machines.

    Raises:
      UserError: the run directory leads out of it, or what the run reads is here.
    """
    for knob, place in inputs(job.config).items():
        at_home = os.path.exists(place) and not Path(place).is_relative_to(folder)
        if at_home and (os.path.isabs(place) or not _sent(place)):
            raise UserError(
                f"--config.{knob} is {place}, on this machine; where the run is going "
                f"there are the code and {folder}: copy it there, or commit it"
            )
    wanted = posixpath.normpath(posixpath.join(folder, job.config.run_dir))
    if not wanted.startswith(folder.rstrip("/") + "/"):
        raise UserError(
            f"--config.run_dir is {job.config.run_dir!r}; it must lie in {folder}, or "
            "be relative"
        )
    flags = (*job.flags, f"--config.run_dir={wanted}")
    return dataclasses.replace(job, flags=flags)


def committed(jobs: Sequence[LaunchJob], target: str) -> str:
    """The commit that is sent.

    Raises:
      UserError: it is not all of the code, or there is none.
    """
    version = provenance.code_version(ROOT)
    if version == "unknown":
        raise UserError(f"{target} sends a commit, and {ROOT} is no git repository")
    if version.endswith("-dirty"):
        raise UserError(
            f"{target} sends the last commit, and {ROOT} has changes that are not in "
            "it: commit or stash them"
        )
    for file in dict.fromkeys(file for job in jobs for file in local_files(job)):
        if not _sent(file):
            raise UserError(f"{target} sends the last commit; {file} is not in it")
    return version


def add_secret_flag(parser: argparse.ArgumentParser, meaning: str) -> None:
    """`--secret=NAME`, any number of times."""
    parser.add_argument(
        "--secret", action="append", default=[], metavar="NAME", help=meaning
    )


def check_secrets(names: Sequence[str], allowed: re.Pattern[str] = VARIABLE) -> None:
    """Raises:
    UserError: one is no name; what it is instead, is not told: it may be a value.
    """
    if not all(allowed.fullmatch(name) for name in names):
        raise UserError(f"--secret takes a name ({allowed.pattern}), never a value")


def check_counts(options: argparse.Namespace, smallest: dict[str, int]) -> None:
    """Raises:
    UserError: one of the options is smaller.
    """
    for name, least in smallest.items():
        value = getattr(options, name)
        if value < least:
            shown = name.replace("_", "-")
            raise UserError(f"--{shown} is {value}; it must be at least {least}")
