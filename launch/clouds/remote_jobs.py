"""Prepares jobs for machines that do not have the files of this one."""

import argparse
import dataclasses
import hashlib
import os
import posixpath
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.jobs.launch_flags import add_texts
from launch.jobs.launch_job import LaunchJob
from research.config.choices import EMBEDDED
from research.config.config_file import folder_of_run
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.hub_access import is_hub
from research.core.local_paths import expanded, listed_paths, split_step
from research.runs import provenance

ROOT = provenance.ROOT
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def portable(job: LaunchJob, target: str) -> LaunchJob:
    """The job with file paths relative to the root of the code, where it will start.

    Raises:
      UserError: a file is outside of the code, or the job trains several runs.
    """
    if job.module != "research.train":
        raise UserError(
            f"a job of {target} trains one run, and {job.name} are several: set "
            "--together=1"
        )
    flags, rest = [], iter(job.flags)
    for flag in rest:
        name, mark, value = flag.partition("=")
        if name in ("--config", "-config"):
            value = value if mark else next(rest, "")
            if folder_of_run(value):
                raise UserError(
                    f"--config is {value}, a run on this machine; {target} needs the "
                    "config file that it was made with"
                )
            flag = f"--config={_from_root(value, target)}"
        flags.append(flag)
    return dataclasses.replace(job, flags=tuple(flags))


def _from_root(config: str, target: str) -> str:
    # ml_collections allows :ARGUMENT after the config file.
    file, mark, argument = expanded(config).partition(":")
    path = Path(file).resolve()
    if not path.is_relative_to(ROOT.resolve()):
        raise UserError(
            f"--config is {file}; {target} sees only the files in {ROOT}: put it there"
        )
    return path.relative_to(ROOT.resolve()).as_posix() + mark + argument


def names(jobs: Sequence[LaunchJob]) -> list[str]:
    """Names of the jobs in a cloud: RFC 1035 labels, the same in every launch.

    Raises:
      UserError: two jobs would have the same name.
    """
    labels: dict[str, LaunchJob] = {}
    for job in jobs:
        label = job.label()
        if label != job.label(len(job.name) + len("run-")):
            digest = hashlib.sha256(job.name.encode()).hexdigest()[:6]
            label = f"{job.label(33)}-{digest}"
        other = labels.setdefault(label, job)
        if other is not job:
            raise UserError(
                f"{other.name!r} and {job.name!r} would both be named {label}: rename "
                "one"
            )
    return list(labels)


def _rows(config: Config) -> Iterator[tuple[str, str]]:
    for name in ("path", "eval_path"):
        for place in listed_paths(getattr(config.data, name)):
            yield f"data.{name}", place


def inputs(config: Config) -> Iterator[tuple[str, str]]:
    """The knobs that may name a file or folder to read, with each name."""
    yield "model.init_from", split_step(config.model.init_from)[0]
    if config.data.kind != "text":
        yield from _rows(config)
    if config.data.kind == "instructions":
        return
    yield "text.tokenizer", config.text.tokenizer
    for source in config.text.sources:
        name, _, where = source.partition("=")
        yield f"text.sources ({name})", where


def _sent(file: str) -> bool:
    """Whether a file is sent with the code: git tracks it, or there is no git."""
    if provenance.code_version(ROOT) == "unknown":
        return True
    command = ["git", "-C", str(ROOT), "ls-files", "--error-unmatch", "--", file]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def stored(job: LaunchJob, folder: str) -> LaunchJob:
    """The job with its run directory in `folder`, which outlives the machines.

    Raises:
      UserError: the run directory is outside of `folder`, or the run reads a file that
        exists only on this machine.
    """
    for knob, place in inputs(job.config):
        at_home = os.path.exists(place) and not Path(place).is_relative_to(folder)
        if at_home and (os.path.isabs(place) or not _sent(place)):
            raise UserError(
                f"--config.{knob} is {place}, on this machine; the run will see only "
                f"the code and {folder}: copy it there, or commit it"
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
    """The hash of the commit to send.

    Raises:
      UserError: there is no commit, or it lacks changes or files of the jobs.
    """
    version = provenance.code_version(ROOT)
    if version == "unknown":
        raise UserError(f"{target} sends a commit, and {ROOT} is no git repository")
    if version.endswith("-dirty"):
        raise UserError(
            f"{target} sends the last commit, and {ROOT} has uncommitted changes: "
            "commit or stash them"
        )
    configs = [x for job in jobs for x in job.flags if x.startswith("--config=")]
    read = [expanded(x.partition("=")[2]).partition(":")[0] for x in configs]
    rows = [place for job in jobs for _, place in _rows(job.config)]
    read += [path for path in rows if path != EMBEDDED and not is_hub(path)]
    for file in dict.fromkeys(read):
        if file and not Path(file).is_absolute() and not _sent(file):
            raise UserError(f"{target} sends the last commit; {file} is not in it")
    return version


def add_secret_flag(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds `--secret=NAME`, which may be repeated."""
    add_texts(parser, "--secret", "NAME", meaning)


def check_secrets(names: Sequence[str], allowed: re.Pattern[str] = VARIABLE) -> None:
    """Checks names of secrets.

    Raises:
      UserError: one is not a name. The message does not repeat it: it may be a value.
    """
    if not all(allowed.fullmatch(name) for name in names):
        raise UserError(f"--secret takes a name ({allowed.pattern}), never a value")
