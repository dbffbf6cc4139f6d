"""Trains a sweep: `python -m launch.sweep --sweep=configs/sweeps/NAME.py`."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import targets
from launch.jobs import launcher
from launch.jobs.launch_flags import (
    LaunchParser,
    add_path,
    add_text,
    add_texts,
    at_least,
    split_flags,
)
from launch.jobs.launch_job import LaunchPlan
from launch.sweep import run_packs, sweep_runs, sweep_spec
from launch.sweep.run_packs import RunPack
from launch.sweep.sweep_runs import SweepRun
from launch.targets import Target, local
from research.config import command_line
from research.core.errors import UserError, nearest
from research.core.local_paths import local_path
from research.core.visible_text import counted

USAGE = """
Trains every run of a sweep that is not done, and names the runs that failed; the same
command tries them again. Runs that differ only in their adapters, learning rate,
schedule or seed train as one program. Any number of these commands may share a folder.
`--config.KNOB=VALUE` after -- changes all runs. Without a file, --axis=lora.rank=4,16
--folder=runs/sweeps/ranks -- --config=FILE.py trains every combination of the values.
python -m launch.report shows the results.
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 if all runs are done or submitted."""
    own, overrides = split_flags(argv[1:])
    target, options = parse(own, overrides)
    if options.sweep:
        sweep = sweep_spec.load(options.sweep)
    else:
        sweep, overrides = sweep_spec.of_axes(options.axis, overrides)
    if options.metric:
        sweep = dataclasses.replace(sweep, metric=options.metric)
    if options.seeds:
        sweep = dataclasses.replace(sweep, seeds=read_seeds(options.seeds))
    name = options.sweep or " ".join(f"--axis={axis}" for axis in options.axis)
    folder = local_path(options.folder or f"runs/sweeps/{Path(options.sweep).stem}")
    found = sweep_runs.expand(sweep, folder, overrides)
    at_once = options.together or (8 if target is local else 1)
    wanted = [
        pack
        for pack in run_packs.make_packs(found, at_once, folder)
        if not pack.is_done
    ]
    sweep_runs.check_folder(folder, sweep, found)
    if options.dry_run:
        done = sum(run.is_done for run in found)
        commands = counted(len(wanted), "command")
        sys.stdout.write(f"# {counted(len(found), 'run')}, {done} done; {commands}\n")
    elif target is local:
        jobs = launcher.with_settings(local, [pack.job for pack in wanted], options)
        plans = [local.plan([job], options) for job in jobs]
        sweep_runs.write(folder, sweep, name, found)
        return train(wanted, plans, found, folder, options)
    code = launcher.start(target, [u.job for u in wanted], options) if wanted else 0
    # Even after a failure: the report must find the runs that were submitted.
    if wanted and not options.dry_run:
        sweep_runs.write(folder, sweep, name, found)
    return code


def parse(
    arguments: Sequence[str], overrides: Sequence[str] = ()
) -> tuple[Target, argparse.Namespace]:
    """Reads the target's name first, and then all flags with the target's own.

    None of them may be in `overrides`, which are for the trainer.
    """
    first = LaunchParser(prog="python -m launch.sweep", add_help=False)
    first.add_argument("--target", default="local")
    name = first.parse_known_args(arguments)[0].target
    known = targets.names()
    if name not in known:
        raise UserError(
            f"--target={name} is none of {', '.join(known)}{nearest(name, known)}"
        )
    target = targets.find(name)
    parser = LaunchParser("--sweep", prog="python -m launch.sweep", description=USAGE)
    add_path(parser, "--sweep", "sweep file; see configs/sweeps/")
    add_text(parser, "--target", f"{', '.join(known)}; default: local", "local")
    add_path(parser, "--folder", "folder of the runs; default: runs/sweeps/NAME")
    axis = "in place of a file: a knob and its values, the baseline first; repeatable"
    add_texts(parser, "--axis", "KNOB=A,B", axis)
    add_text(parser, "--metric", "that judges the runs; default: the file's, or loss")
    add_text(parser, "--seeds", "seeds in place of the sweep's, as 0,1,2")
    most = "most runs in one program; default: 8 on this machine, 1 elsewhere"
    parser.add_argument("--together", type=at_least(1), default=None, help=most)
    launcher.add_flags(parser, target)
    options = parser.parse_args(arguments, training=overrides)
    if bool(options.sweep) == bool(options.axis):
        parser.error(
            "give --sweep=FILE.py, or --axis=KNOB=A,B with --config=FILE.py after --"
        )
    if options.axis and not options.folder:
        parser.error("--axis needs --folder=DIR, which names the sweep")
    return target, options


def read_seeds(text: str) -> tuple[int, ...]:
    """Reads `0,1,2`."""
    try:
        return tuple(int(seed) for seed in text.split(","))
    except ValueError:
        raise UserError(f"--seeds is {text!r}; write it as 0,1,2") from None


def train(
    wanted: Sequence[RunPack],
    plans: Sequence[LaunchPlan],
    found: Sequence[SweepRun],
    folder: Path,
    options: argparse.Namespace,
) -> int:
    """Trains on this machine until every run is done or has failed."""
    # Imported here: a mistyped flag must not wait for JAX.
    from launch.report import best_run, sweep_page, sweep_results, sweep_values
    from launch.sweep.sweep_worker import SweepWorker

    logging.basicConfig(level=logging.INFO, format="sweep: %(message)s")
    with local.ProcessGroup() as group:
        # Where one run cannot be judged, no other is trained.
        def check() -> None:
            sweep_values.write(sweep_results.load(folder))

        worker = SweepWorker(wanted, found, folder, group, check)
        code = worker.work(plans, options.restarts)
    if group.last_signal is None:
        if best := best_run.find_best(sweep_results.load(folder)):
            logging.info("best: %s", best.words)
        for path in sweep_page.write(folder):
            logging.info("report: %s", path)
    else:
        logging.info("stopped; the same command resumes the run")
    return code


if __name__ == "__main__":
    command_line.run(main)
