"""Train: a config, its knobs as a form, a check by the doctor, and the start."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.checkpoints.stored_steps import step_folders
from research.config.choices import EMBEDDED
from research.config.command_line import NoFlags, parse_with_config
from research.config.cross_knob_rules import idle
from research.config.field_names import flag
from research.config.help_text import type_name
from research.config.knobs import facts_of, fields, flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.studio.checks.check_process import Check
from research.studio.checks.config_presets import first_preset, presets
from research.studio.checks.start_plans import DEVICES, OWN, PricedDevices
from research.studio.jobs import job_commands as commands
from research.studio.jobs.pasted_words import (
    CHECKS,
    HERE,
    PLAN,
    PastedStart,
    given_knobs,
    read_start,
    without,
)
from research.studio.listing.run_index import is_run
from research.studio.page_errors import PageError
from research.studio.pages.page_view import Form, noted, render, see, studio_of
from research.studio.pages.run_actions import enqueue
from research.studio.roots import shown_paths
from research.studio.studio_state import StudioState

# Shown first where they act in the job; all others are in the list below them.
MOST_USED = (
    "run_dir", "model.init_from", "trainable", "data.path", "steps", "epochs",
    "optim.learning_rate", "data.seq_len", "data.batch_size", "data.microbatch_size",
    "lora.rank", "lora.alpha", "text.sources", "text.cut", "model.preset",
)  # fmt: skip
FIELD = "knob."  # before the name of a knob in the form
CONFIG = "config"
MOST_BASES = 50


def train(request: Request) -> Response:
    """The form of the flags in the address, their command, and their check."""
    studio = studio_of(request)
    values: dict[str, Any] = {"problem": "", "check": Check(), "command": None}
    values["check_command"] = None
    preset, given, flags = first_preset(), {}, []
    try:
        flags = complete(read_flags(request.query_params.get("flags", "")), studio)
        preset, given = split(flags)
        check_flags(flags, studio)
        values["check"] = studio.checks.read(flags, rows_only=False)
        values["command"] = commands.launching(flags)
        values["check_command"] = studio.checks.command(flags, rows_only=False)
    except (UserError, PageError) as error:
        values["problem"] = str(error)
    preset = preset if is_config(preset, studio) else first_preset()
    first = complete([flag("data.path", EMBEDDED)], studio)
    return render(
        request,
        "train.html.jinja",
        title="Train",
        field=FIELD,
        groups=_groups(preset, given, _idle(preset, flags)),
        presets=presets(),
        preset=preset,
        bases=_bases(studio),
        flags=flags,
        first=first,
        first_command=commands.launching(first),
        plan_fields={
            name: value
            for name, value in request.query_params.items()
            if name == "devices" or name.startswith(OWN)
        },
        said=request.query_params.get("said", ""),
        **values,
    )


def read_flags(text: str) -> list[str]:
    """The trainer's flags. Raises UserError: a word is no knob of a training."""
    start = read_start(text)
    if words := start.dropped([]):
        raise UserError(without(words))
    return start.flags


def split(flags: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The value of `--config`, and the text of each knob that is given."""
    given = [*given_knobs(flags)]
    preset = next((x.value or "" for x in given if x.name == CONFIG), "")
    start = f"{CONFIG}."
    return preset, {
        x.name.removeprefix(start): x.value or ""
        for x in given
        if x.name.startswith(start)
    }


def complete(flags: Sequence[str], studio: StudioState) -> list[str]:
    """With a config file, and with a new folder below the first root."""
    preset, given = split(flags)
    whole = [*flags]
    if not preset:
        preset = first_preset()
        whole.insert(0, f"--config={preset}")
    if "run_dir" not in given and preset in presets():
        whole.append(flag("run_dir", new_folder(preset, studio)))
    return whole


def new_folder(preset: str, studio: StudioState) -> str:
    """A run directory that is not there yet, named as the config file."""
    name = plain = Path(preset).stem
    number = 1
    waiting = {job.target for job in studio.queue.read().waiting}
    while (path := studio.runs.first / name).exists() or path in waiting:
        number += 1
        name = f"{plain}-{number}"
    return shown_paths([path])[0]


def is_config(preset: str, studio: StudioState) -> bool:
    """Whether it is a config file of this code, or a run below the roots.

    Any other file is refused: a config file is a program.
    """
    if preset in presets():
        return True
    try:
        studio.runs.require_inside(Path(preset).expanduser().absolute())
        return is_run(Path(preset))
    except (PageError, OSError, ValueError):
        return False


def check_flags(flags: Sequence[str], studio: StudioState) -> None:
    """Refuses flags that the trainer would refuse, and files outside of the roots.

    Raises:
      UserError: see `config_of`; or the config file is not one of this code.
      PageError: a path would lie outside of the roots.
    """
    preset, _ = split(flags)
    if not is_config(preset, studio):
        raise UserError(
            f"--config={preset}: the studio takes a file of {', '.join(presets())} or "
            "a run below --runs; start any other config file in a shell"
        )
    commands.config_of(flags, studio.confined)


def _idle(preset: str, flags: Sequence[str]) -> dict[str, str]:
    """The knobs that have no effect in the job, each with what it would need.

    Flags that contradict each other are left to the message that says so.
    """
    for words in (flags, [f"--{CONFIG}={preset}"]):
        with contextlib.suppress(UserError):
            config, _ = parse_with_config(["research.train", *words], "", NoFlags)
            return {path: str(needed) for path, needed in idle(config).items()}
    return {}


def _groups(
    preset: str, given: Mapping[str, str], without_effect: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """The knobs for the form by group, those that are used most first."""
    old = preset_texts(preset)
    found: dict[str, list[dict[str, Any]]] = {"": []}
    shown = {}
    for path, field, _ in fields(Config()):
        facts, value = facts_of(field), given.get(path, old[path])
        choices = [*facts.choices]
        if type_name(field.type) == "bool":
            choices = ["True", "False"]
        shown[path] = {
            "path": path,
            "help": facts.help,
            "limits": "" if choices else _limits(field),
            "choices": [*dict.fromkeys((*choices, value))] if choices else [],
            "preset": old[path],
            "value": value,
            "is_changed": value != old[path],
            "needs": without_effect.get(path, ""),
        }
    acting = [path for path in MOST_USED if path not in without_effect]
    found[""] = [shown.pop(path) for path in acting]
    for path, knob in shown.items():
        found.setdefault(path.rpartition(".")[0] or "run", []).append(knob)
    return found


def _limits(field: Any) -> str:
    facts = facts_of(field)
    return ", ".join(filter(None, (type_name(field.type), facts.range())))


def preset_texts(preset: str) -> dict[str, str]:
    """All knobs of a config as flags write them. Raises UserError."""
    argv = ["research.train", f"--{CONFIG}={preset}"]
    config, _ = parse_with_config(argv, "", NoFlags)
    return {k: flag(k, v).partition("=")[2] for k, v in flat(config).items()}


def _bases(studio: StudioState) -> list[str]:
    """Base models that are here: the one that comes with the code, and runs."""
    bases = [str(Config().model.init_from)]
    for run in studio.listed()[:MOST_BASES]:
        folder = studio.runs.find(run.name)
        steps = step_folders(folder / "checkpoints")
        bases += [f"{shown_paths([folder])[0]}@{path.name}" for path in steps[-1:]]
    return bases


async def change(request: Request) -> Response:
    """Makes flags of the form, or of a pasted command, and shows them."""
    form, studio = await Form.read(request), studio_of(request)
    if pasted := form.get("pasted").strip():
        return _fill(studio, read_start(pasted))
    shown, chosen = form.get("shown"), form.get("preset")
    if not (is_config(shown, studio) and is_config(chosen, studio)):
        raise UserError(f"--config={chosen!r} is no config file of this code")
    old = preset_texts(shown)
    given = {path: form.get(FIELD + path) for path in old if form.has(FIELD + path)}
    if chosen != shown and given.get("run_dir") == new_folder(shown, studio):
        del given["run_dir"]
    flags = [flag(path, text) for path, text in given.items() if text != old[path]]
    return see("/train", flags=commands.as_text([f"--{CONFIG}={chosen}", *flags]))


def _fill(studio: StudioState, start: PastedStart) -> Response:
    """Shows the flags of a pasted command, and those of its plan or launch."""
    fields, made = {}, commands.launching(start.flags)
    with contextlib.suppress(UserError):  # The page says why.
        flags = complete(start.flags, studio)
        if start.target not in ("", HERE):
            own = commands.as_text([x for x in start.own if x != "--dry-run"])
            made = studio.plans.dry_run(start.target, own, flags)
            fields[OWN + start.target] = own
        elif start.door == PLAN:
            chips = [
                x.partition("=")[2] for x in start.own if x.startswith("--device=")
            ]
            fields["devices"] = "\n".join(",".join(chips).split(",")) or DEVICES
            devices = PricedDevices.from_text(fields["devices"])
            made = studio.plans.plan_command(flags, devices)
        elif start.door == CHECKS:
            made = studio.checks.command(flags, rows_only=False)
    said = without(start.dropped(made))
    return see("/train", flags=commands.as_text(start.flags), said=said, **fields)


async def _sent(request: Request) -> list[str]:
    """The flags of a button. Raises what `check_flags` raises."""
    studio = studio_of(request)
    flags = complete(read_flags((await Form.read(request)).get("flags")), studio)
    await asyncio.to_thread(check_flags, flags, studio)
    return flags


async def check(request: Request) -> Response:
    """Lets the doctor look at a start."""
    studio, flags = studio_of(request), await _sent(request)
    if studio.queue.read().running:
        raise UserError(
            "a job runs on this machine, and a check would take memory from it: "
            "check once it has ended, or start; the trainer checks before it begins"
        )
    command = commands.as_text(studio.checks.command(flags, rows_only=False))
    with noted(request, "check", "", command=command):
        await asyncio.to_thread(studio.checks.start, flags, rows_only=False)
    return see("/train", flags=commands.as_text(flags))


async def start(request: Request) -> Response:
    """Queues the training, unless its check has found something that forbids it."""
    flags = await _sent(request)
    if refusal := studio_of(request).checks.read(flags, rows_only=False).refusal:
        raise UserError(refusal)
    return await enqueue(request, flags)


ROUTES = (
    Route("/train", train),
    Route("/flags/train", change),
    Route("/act/check", check, methods=["POST"]),
    Route("/act/train", start, methods=["POST"]),
)
