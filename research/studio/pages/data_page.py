"""Data: choose a file, map its columns, and see rows as the model will read them."""

import asyncio
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from research.config.choices import EMBEDDED
from research.config.data_knobs import ColumnsConfig
from research.config.field_names import flag
from research.core.errors import UserError
from research.data.compressed_files import kind_of
from research.data.instructions.row_files import row_files
from research.data.row_readers import READERS, BadRowError, read_rows
from research.studio.checks.config_presets import first_preset
from research.studio.page_errors import PageError
from research.studio.pages.page_view import (
    Form,
    address,
    json_answer,
    render,
    see,
    studio_of,
)
from research.studio.roots import shown_paths
from research.studio.uploads import receive_upload

MAPPED = [field for field in dataclasses.fields(ColumnsConfig) if field.type is str]
LOOKED_AT = 50  # rows in which columns are searched
MOST_FILES = 500
# A .json file is read whole, and the server must stay small.
LARGEST_WHOLE = 64 << 20  # bytes
NO_COLUMN = "the usual names"


def data(request: Request) -> Response:
    """The page: files, the mapping of columns, and what a check has found."""
    studio, fields = studio_of(request), request.query_params
    chosen = fields.get("file", "")
    values = {"columns": [], "problem": "", "flags": [], "check": None, "command": None}
    if chosen:
        try:
            flags = _flags(request, fields)
            values["columns"] = _columns(request, chosen)
            values |= {
                "flags": flags,
                "check": studio.checks.read(flags, rows_only=True),
                "command": studio.checks.command(flags, rows_only=True),
            }
        except UserError as error:
            values["problem"] = str(error)
    return render(
        request,
        "data.html.jinja",
        title="Data",
        files=[*itertools.islice(data_files(request), MOST_FILES)],
        folders=list(studio.data.folders),
        embedded=EMBEDDED,
        chosen=chosen,
        mapped=[(f.name, f.metadata["facts"].help) for f in MAPPED],
        given={f.name: fields.get(f.name, "") for f in MAPPED},
        usual=NO_COLUMN,
        skips=fields.get("skip", "") == "yes",
        kinds=", ".join(READERS),
        said=fields.get("said", ""),
        **values,
    )


def data_files(request: Request) -> Iterator[tuple[str, int]]:
    """Name and bytes of the files of rows below the roots, without hidden ones."""
    roots = studio_of(request).data
    for top in roots.folders.values():
        for folder, inner, names in os.walk(top):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for path in (Path(folder, name) for name in sorted(names)):
                if path.name.startswith(".") or kind_of(path) not in READERS:
                    continue
                try:
                    name = roots.name(path)
                    yield name, roots.find(name).stat().st_size
                except (PageError, OSError):
                    continue  # A link that leads out, or a file that is gone.


def _path(request: Request, chosen: str) -> str:
    """The value of `config.data.path` for what was chosen. Raises PageError."""
    if chosen == EMBEDDED:
        return EMBEDDED
    return shown_paths([studio_of(request).data.find(chosen)])[0]


def _columns(request: Request, chosen: str) -> list[str]:
    """The columns of the first rows. Raises UserError: the file cannot be read."""
    if chosen == EMBEDDED:
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
    path = _path(request, fields.get("file", ""))
    named = [
        flag(f"data.columns.{f.name}", fields[f.name])
        for f in MAPPED
        if fields.get(f.name)
    ]
    skips = [flag("data.bad_lines", "skip")] if fields.get("skip") == "yes" else []
    return [f"--config={first_preset()}", flag("data.path", path), *named, *skips]


async def look(request: Request) -> Response:
    """Starts a check of the rows with the choices of the form."""
    form = await Form.read(request)
    names = ("file", "skip", *(field.name for field in MAPPED))
    fields = {name: form.get(name) for name in names if form.get(name)}
    flags = _flags(request, fields)
    checks = studio_of(request).checks
    await asyncio.to_thread(checks.start, flags, rows_only=True)
    return see("/data", **fields)


async def upload(request: Request) -> Response:
    """Writes a file into the first of the data folders."""
    studio, name = studio_of(request), request.path_params["name"]
    if kind_of(Path(name)) not in READERS:
        raise UserError(f"{name}: the name must end in {', '.join(READERS)}")
    folder = studio.data.first
    found = await receive_upload(request, folder, name)
    written = studio.data.name(folder / found.path.name)
    said = f"{found.size:,} bytes, sha256 {found.sha256}"
    studio.audit.add("upload", written, request.scope["who"], command=said)
    return json_answer({"file": written, "page": address("/data", file=written)})


ROUTES = (
    Route("/data", data),
    Route("/act/look", look, methods=["POST"]),
    Route("/act/upload/{name}", upload, methods=["PUT"]),
)
