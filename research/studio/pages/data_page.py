"""Data: choose a file, map its columns, and see rows as the model will read them."""

import asyncio
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.config.choices import EMBEDDED
from research.config.data_knobs import ColumnsConfig
from research.config.field_names import flag, name_sources
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.hub_access import is_hub
from research.core.local_paths import local_path
from research.data.compressed_files import kind_of
from research.data.instructions.row_files import row_files
from research.data.row_readers import READERS, BadRowError, read_rows
from research.studio.checks.check_process import Check
from research.studio.checks.config_presets import FOLDER, first_preset
from research.studio.checks.row_survey import BLOCK
from research.studio.jobs.job_commands import as_text, config_of
from research.studio.jobs.pasted_words import given_knobs, read_start, without
from research.studio.page_errors import PageError
from research.studio.pages.page_view import (
    Form,
    address,
    json_answer,
    noted,
    number_of,
    render,
    see,
    studio_of,
)
from research.studio.pages.train_page import check_flags, complete, split
from research.studio.roots import shown_paths
from research.studio.studio_state import StudioState
from research.studio.uploads import receive_upload

MAPPED = [field for field in dataclasses.fields(ColumnsConfig) if field.type is str]
LOOKED_AT = 50  # rows in which columns are searched
MOST_FILES = 500
# A .json file is read whole, and the server must stay small.
LARGEST_WHOLE = 64 << 20  # bytes
NO_COLUMN = "the usual names"
# Files of raw text, which a model continues; all other files hold rows.
TEXTS = (".txt", ".md")
TEXT_PRESET = "pretrain_tiny.py"
KINDS = (*READERS, *TEXTS)
PAGE = 10  # rows
LARGEST_ROW = 10**12


def data(request: Request) -> Response:
    """The page: files, the mapping of columns, and what a check has found."""
    fields = request.query_params
    chosen = _chosen(fields)
    values = {"columns": [], "problem": "", "flags": [], "check": None, "command": None}
    values |= {"is_text": _is_text(chosen, fields), "rows": None, "tallest": 1}
    if chosen:
        try:
            values |= _opened(request, chosen, fields)
        except UserError as error:
            values["problem"] = str(error)
    roots = studio_of(request).data
    return render(
        request,
        "data.html.jinja",
        title="Data",
        files=[*itertools.islice(data_files(request), MOST_FILES)],
        folders=list(roots.folders),
        embedded=EMBEDDED,
        chosen=chosen,
        hub=chosen if is_hub(chosen) else "",
        mapped=[(f.name, f.metadata["facts"].help) for f in MAPPED],
        given={f.name: fields.get(f.name, "") for f in MAPPED},
        usual=NO_COLUMN,
        skips=fields.get("skip", "") == "yes",
        kinds=", ".join(KINDS),
        said=fields.get("said", ""),
        here=f"/data?{request.url.query}",
        **values,
    )


def _chosen(fields: Mapping[str, str]) -> str:
    """A file or folder as the roots name it, or the address of a data set."""
    hub = fields.get("hub", "").strip()
    if hub and not is_hub(hub):
        return f"hub://{hub}"
    return hub or fields.get("file", "")


def _is_text(chosen: str, fields: Mapping[str, str]) -> bool:
    """Whether it is raw text for pre-training, and not rows with answers."""
    return fields.get("read", "") == "text" or kind_of(Path(chosen)) in TEXTS


def _opened(request: Request, chosen: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The values of a choice that the page shows. Raises UserError: none can be."""
    studio, flags = studio_of(request), _flags(request, fields)
    at = _number(fields.get("at", ""))
    first = at // BLOCK * BLOCK
    check = studio.checks.read(flags, rows_only=True, first=first)
    survey = check.survey
    return {
        "columns": [] if _is_text(chosen, fields) else _columns(request, chosen),
        "flags": flags,
        "check": check,
        "command": studio.checks.command(flags, rows_only=True, first=first),
        "tallest": max([1, *(n for *_, n in survey.lengths)]) if survey else 1,
        "rows": _page_of(
            check, at, {k: v for k, v in fields.items() if k not in ("at", "said")}
        ),
    }


def _page_of(check: Check, at: int, fields: dict[str, str]) -> dict[str, Any]:
    """The rows from number `at` on, and the pages before and after them."""
    survey = check.survey
    total = survey.total if survey else 0
    begin = at - survey.first if survey else 0
    return {
        "at": at,
        "shown": survey.rows[begin : begin + PAGE] if survey else [],
        "before": address("/data", **fields, at=max(at - PAGE, 0)) if at else "",
        "after": address("/data", **fields, at=at + PAGE) if at + PAGE < total else "",
    }


def _number(text: str) -> int:
    """The number of a page's first row, which a person may have typed."""
    return number_of(text, LARGEST_ROW) // PAGE * PAGE


def data_files(request: Request) -> Iterator[tuple[str, int]]:
    """Name and bytes of the files of rows below the roots, without hidden ones."""
    roots = studio_of(request).data
    for top in roots.folders.values():
        for folder, inner, names in os.walk(top):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for path in (Path(folder, name) for name in sorted(names)):
                if path.name.startswith(".") or kind_of(path) not in KINDS:
                    continue
                try:
                    name = roots.name(path)
                    yield name, roots.find(name).stat().st_size
                except (PageError, OSError):
                    continue  # A link that leads out, or a file that is gone.


def _path(request: Request, chosen: str) -> str:
    """The value of `config.data.path` for what was chosen.

    Raises:
      UserError, PageError: see `Confinement.check_read`; no file of it leads out.
    """
    if chosen == EMBEDDED or is_hub(chosen):
        return chosen
    studio = studio_of(request)
    path = studio.data.find(chosen)
    return shown_paths([studio.confined.check_read("the data", str(path))])[0]


def _columns(request: Request, chosen: str) -> list[str]:
    """The columns of the first rows. Raises UserError: the file cannot be read.

    Nobody knows those on the hub before a check has read them.
    """
    if chosen == EMBEDDED or is_hub(chosen):
        return []
    names: dict[str, None] = {}
    for file in row_files(str(studio_of(request).data.find(chosen)))[:1]:
        if kind_of(file) == ".json" and file.stat().st_size > LARGEST_WHOLE:
            raise UserError(
                f"{file.name} is a large .json file, which is read whole: write one "
                "object in each line and name it .jsonl"
            )
        for _, row in itertools.islice(read_rows(file), LOOKED_AT):
            if not isinstance(row, BadRowError):
                names |= dict.fromkeys(row)
    return list(names)


def _flags(request: Request, fields: Mapping[str, str]) -> list[str]:
    """The trainer's flags for the choices of the form. Raises PageError."""
    chosen = _chosen(fields)
    path = _path(request, chosen)
    if _is_text(chosen, fields):
        if chosen == EMBEDDED:
            raise UserError("the embedded sample has rows, and no raw text")
        sources = flag("text.sources", name_sources(path))
        return [f"--config={shown_paths([FOLDER / TEXT_PRESET])[0]}", sources]
    named = [
        flag(f"data.columns.{f.name}", fields[f.name])
        for f in MAPPED
        if fields.get(f.name)
    ]
    skips = [flag("data.bad_lines", "skip")] if fields.get("skip") == "yes" else []
    return [f"--config={first_preset()}", flag("data.path", path), *named, *skips]


async def paste(request: Request) -> Response:
    """Fills the form from the data of a pasted training."""
    start = read_start((await Form.read(request)).get("pasted"))
    studio = studio_of(request)
    first = [x.partition("=")[2] for x in start.own if x.startswith("--first=")]
    flags = complete(start.flags, studio)
    check_flags(flags, studio)
    config, _ = config_of(flags, studio.confined)
    place, fields = config.data.path, {"read": "", "at": "".join(first[-1:])}
    if config.data.kind == "text":
        fields["read"] = "text"
        place = config.text.sources[0].partition("=")[2]
    elif config.data.bad_lines == "skip":
        fields["skip"] = "yes"
    given = {f: getattr(config.data.columns, f.name) for f in MAPPED}
    fields |= {f.name: column for f, column in given.items() if column != f.default}
    if is_hub(place):
        fields["hub"] = place
    else:
        fields["file"] = place if place == EMBEDDED else _named(studio, place)
    made = _flags(request, fields)
    first_row = _number(fields["at"]) // BLOCK * BLOCK
    shown = studio.checks.command(made, rows_only=True, first=first_row)
    lost = _lost(start.flags, config, complete(made, studio), studio)
    return see("/data", **fields, said=without([*start.dropped(shown), *lost]))


def _named(studio: StudioState, place: str) -> str:
    """Raises UserError: it is no file or folder of this page."""
    try:
        return studio.data.name(local_path(place))
    except PageError as error:
        raise UserError(
            f"{place}: this page shows files below {', '.join(studio.data.folders)} "
            "and data sets of the hub; paste this command on the Train page"
        ) from error


def _lost(
    written: Sequence[str], config: Config, made: Sequence[str], studio: StudioState
) -> list[str]:
    """The flags of a pasted command that differ in the command of the form.

    The form shows the first source of raw text, under the name of its file.
    """
    own, _ = config_of(made, studio.confined)
    old, new = flat(config), flat(own)
    names = [[x.partition("=")[0] for x in c.text.sources] for c in (config, own)]
    is_held = {"data.path": True, "text.sources": names[0] == names[1]}
    preset, _ = split(made)
    found = []
    for each in given_knobs(written):
        path = each.name.removeprefix("config.")
        if each.name == "config":
            is_same = local_path(each.value or "") == local_path(preset)
        else:
            is_same = is_held.get(path, old.get(path) == new.get(path))
        found += [] if is_same else [" ".join(each.words)]
    return found


async def look(request: Request) -> Response:
    """Starts a check of the rows with the choices of the form."""
    form = await Form.read(request)
    names = ("file", "hub", "read", "at", "skip", *(field.name for field in MAPPED))
    fields = {name: form.get(name) for name in names if form.get(name)}
    flags = _flags(request, fields)
    first = _number(fields.get("at", "")) // BLOCK * BLOCK
    checks, how = studio_of(request).checks, {"rows_only": True, "first": first}
    command = as_text(checks.command(flags, **how))
    with noted(request, "check rows", _chosen(fields), command=command):
        await asyncio.to_thread(checks.start, flags, **how)
    return see("/data", **fields)


async def upload(request: Request) -> Response:
    """Writes a file into the first of the data folders."""
    studio, name = studio_of(request), request.path_params["name"]
    if kind_of(Path(name)) not in KINDS:
        raise UserError(f"{name}: the name must end in {', '.join(KINDS)}")
    folder = studio.data.first
    with noted(request, "upload", name) as facts:
        found = await receive_upload(request, folder, name)
        facts |= {"file": found.path.name, "bytes": found.size, "sha256": found.sha256}
    written = studio.data.name(folder / found.path.name)
    return json_answer({"file": written, "page": address("/data", file=written)})


ROUTES = (
    Route("/data", data),
    Route("/flags/data", paste),
    Route("/act/look", look, methods=["POST"]),
    Route("/act/upload/{name}", upload, methods=["PUT"]),
)
