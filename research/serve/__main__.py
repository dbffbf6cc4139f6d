"""Serves runs: `python -m research.serve --run=runs/finetune_dolly`."""

import asyncio
import dataclasses
import functools
import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError
from research.runs.answering.weight_forms import weights_knob
from research.serve.http.sockets import (
    LOOPBACK,
    open_port,
    open_unix_socket,
    tunnel_to,
    url_of,
)

if TYPE_CHECKING:
    from research.serve.http.access_keys import ApiKeys, KeyFile
    from research.serve.open_models import Capacity
    from research.serve.served_models import Deployment

USAGE = """
python -m research.serve --run=RUN_DIR [--run=...] [--port=8000]
python -m research.serve --model=FOLDER|FILE.gguf|hub://OWNER/NAME|pkg://PACKAGE/FILE

Serves the models of runs with the API of OpenAI: /v1/chat/completions, /v1/completions
and more, see docs/serving.md. The name of a model is that of its run, and `base` is the
base model that all of the runs share. --run=FOLDER serves every run in a folder, such
as that of a sweep; --run=RUN@STEP one checkpoint. A run that trains is followed.
SIGTERM ends the server when the answers are made that it has begun. With --distributed
it spans the devices of several processes, as training does: see docs/serving.md.
"""


@dataclasses.dataclass(frozen=True)
class ServeFlags:
    """The flags of `python -m research.serve`."""

    run: tuple[str, ...] = knob(
        (),
        "run directory, RUN@STEP, a folder of runs, or an adapter of PEFT, its folder "
        "or hub://owner/name; may be repeated",
        is_path=True,
    )
    model: str = knob(
        "",
        "base model without a run, as config.model.init_from names it: a Hugging Face "
        "folder, an export, a .gguf file, hub://, pkg://; not given: that of the runs",
        is_path=True,
    )
    host: str = knob("127.0.0.1", "address; another one needs --api_key_file")
    port: int = knob(8000, "port; 0 takes any free one", low=0, high=65535)
    uds: str = knob("", "path of a Unix socket, in place of a port", is_path=True)
    api_key_file: str = knob(
        "",
        "file of keys, one a line; `admin KEY` may also load and unload adapters",
        is_path=True,
    )
    slots: int = knob(
        0, "answers made at a time; 0: 8 on a CPU, 32 on accelerators", low=0
    )
    context: int = knob(
        0, "tokens of a prompt and its answer; 0: the model's, up to 4096", low=0
    )
    adapters: int = knob(
        0,
        "adapters loaded at a time; 0: those of --run; each place that is not used "
        "slows all answers down a little",
        low=0,
    )
    rank: int = knob(
        0,
        "largest rank of adapters that are loaded later; 0: that of --run, or 16",
        low=0,
    )
    weights: str = weights_knob()
    adapters_from: str = knob(
        "",
        "folder below which /v1/load_lora_adapter may open runs; not given: the folder "
        "of the first --run",
        is_path=True,
    )
    queue: int = knob(256, "answers that may wait; more get status 429", above=0)
    prefix_mib: int = knob(
        512, "MiB for beginnings of prompts that return; 0: none are kept", low=0
    )
    grace: float = knob(30.0, "seconds for answers after SIGTERM", low=0)
    distributed: bool = knob(
        False,
        "join the other processes that the JAX_* variables or the cluster name; the "
        "first one listens",
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, ServeFlags)
    if not f.run and not f.model:
        raise UserError(
            "--run=RUN_DIR is missing, e.g. runs/finetune_dolly; or --model="
        )
    if not f.uds and f.host not in LOOPBACK and not f.api_key_file:
        raise UserError(
            f"--host={f.host} lets other machines in, and then --api_key_file is "
            "needed; or serve on 127.0.0.1 and reach it by ssh -L"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not f.distributed:
        return _serve_alone(f, _open_alone)
    from research.parallel import joined_processes
    from research.serve import several_processes

    if joined_processes.join(f):
        from research.serve.open_models import follow_models

        several_processes.serve_together(
            functools.partial(_listen, f),
            functools.partial(_lead, f),
            lambda: follow_models(f.run, f.model, _capacity(f)),
        )
    return _serve_alone(f, _open)


def _serve_alone(
    f: ServeFlags, open_models: Callable[[ServeFlags], "Deployment"]
) -> int:
    if not _serve(f, _listen(f), functools.partial(open_models, f)):
        # Its thread still loads or computes: an orderly end would abort under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _listen(f: ServeFlags) -> tuple["ApiKeys | KeyFile", socket.socket]:
    from research.serve.http.access_keys import ApiKeys, KeyFile

    keys = KeyFile(Path(f.api_key_file)) if f.api_key_file else ApiKeys()
    listener = open_unix_socket(Path(f.uds)) if f.uds else open_port(f.host, f.port)
    return keys, listener


def _serve(
    f: ServeFlags,
    opened: tuple["ApiKeys | KeyFile", socket.socket],
    open_models: Callable[[], "Deployment"],
) -> bool:
    """Serves until a signal; `open_models` runs while the server listens already.

    Returns whether the engine has ended in order.
    """
    from research.serve.api.server_state import ServerState
    from research.serve.engine_thread import EngineThread
    from research.serve.listening import make_app, serve

    keys, listener = opened
    _announce(f, listener)
    thread = EngineThread(open_models)
    hosts = () if f.uds else (f.host,)
    app = make_app(ServerState(thread), keys, hosts)
    try:
        asyncio.run(serve(app, thread, listener, f.grace))
    finally:
        if f.uds:
            Path(f.uds).unlink(missing_ok=True)
    return thread.has_ended


def _lead(f: ServeFlags, opened: tuple["ApiKeys | KeyFile", socket.socket]) -> None:
    if not _serve(f, opened, functools.partial(_open, f)):
        raise UserError(
            "stopped while the engine was busy: the other processes end with an error"
        )


def _open_alone(f: ServeFlags) -> "Deployment":
    """The models. JAX is imported here: the server listens before that."""
    from research.parallel import runtime

    runtime.start_alone()
    return _open(f)


def _open(f: ServeFlags) -> "Deployment":
    from research.serve.open_models import open_models

    root = f.adapters_from or (str(Path(f.run[0]).parent) if f.run else "")
    roots = (Path(root).resolve(),) if root else ()
    return open_models(f.run, f.model, _capacity(f), roots)


def _capacity(f: ServeFlags) -> "Capacity":
    from research.serve.open_models import Capacity

    return Capacity(
        f.slots, f.context, f.adapters, f.rank, f.queue, f.prefix_mib << 20, f.weights
    )


def _announce(f: ServeFlags, listener: socket.socket) -> None:
    if f.uds:
        logging.info("listening on %s", f.uds)
        return
    logging.info("listening on %s/v1", url_of(f.host, listener))
    if f.host in LOOPBACK:
        logging.info("from another machine: %s", tunnel_to(listener))


if __name__ == "__main__":
    command_line.run(main)
