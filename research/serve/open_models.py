"""Opens the models of a server, and changes their adapters while it runs."""

import dataclasses
import hashlib
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from research.core.errors import UserError
from research.core.local_paths import split_step
from research.engine.continuous_batching import Engine
from research.engine.followed_decoder import LeadingDecoder, follow
from research.engine.requests import Sampling
from research.engine.sampling_defaults import model_sampling
from research.engine.slot_decoder import SlotDecoder
from research.models.transformer import Model
from research.parallel import runtime
from research.parallel.memory_limits import memory_limit
from research.runs.answering.open_for_answering import (
    Answering,
    ServedModel,
    open_for_answering,
)
from research.runs.answering.run_addresses import RunAddress, run_addresses
from research.runs.answering.weight_forms import PLAIN
from research.serve import model_reader
from research.serve.api.api_errors import ApiError, bad_request, unknown_model
from research.serve.model_reader import ModelReader, Task, reading
from research.serve.served_models import Deployment, ModelNames, NamedModel

USUAL_CONTEXT = 4096  # tokens of a slot, where the model has room for more
USUAL_SLOTS = {"cpu": 8}
ACCELERATOR_SLOTS = 32
# A part of the memory that is free is kept for the work between two tokens.
KEPT_FREE = 0.1
# A newer checkpoint is put into this row while the older one still answers.
SPARE_ROWS = 1
ADAPTER_NAME = re.compile(r"[A-Za-z0-9_.@/-]{1,128}")


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The sizes of a server; 0 stands for what suits the machine.

    Attributes:
      slots: answers that are made at a time.
      context: tokens of a prompt and its answer together.
      adapters: how many can be loaded at a time; 0: as many as there are runs.
      rank: the largest rank of an adapter that is loaded later; 0: that of the runs.
      queue: requests that may wait.
      prefix_bytes: of beginnings of prompts that are kept.
      weights: the form of the base, see `in_form`.
    """

    slots: int
    context: int
    adapters: int
    rank: int
    queue: int
    prefix_bytes: int
    weights: str = PLAIN


class ServedRuns:
    """The runs behind the names of a server."""

    def __init__(
        self,
        reader: ModelReader,
        engine: Engine,
        roots: Sequence[Path],
        everywhere: Callable[[Task], ServedModel] | None = None,
    ):
        """Loads the adapters that the base model was opened for.

        Args:
          reader: has the base model and the runs.
          engine: answers with it.
          roots: folders below which runs may be loaded later.
          everywhere: does a task of `ModelReader` in all processes, between two rounds;
            None where there is only this one.

        Raises:
          UserError: an adapter cannot be loaded.
        """
        self._reader, self._engine, self._roots = reader, engine, roots
        self._everywhere = everywhere
        opened = reader.opened
        tokenizer = opened.base.tokenizer
        self._defaults, unused = model_sampling(tokenizer.generation, Sampling())
        if unused:
            logging.warning(
                "generation_config.json of the model sets %s, which have no effect",
                ", ".join(unused),
            )
        self._lock = threading.Lock()
        self._warned: dict[str, tuple[int, str]] = {}
        adapters = [self._load(address) for address in opened.runs]
        self.models = ModelNames([*adapters, self._named(opened.served_base)])
        if problem := self._why_it_stays(opened.served_base):
            self._warn_once(opened.served_base, problem)

    def load(self, name: str, path: str, inplace: bool) -> None:
        """Loads the adapter of a run, under a name of its own.

        Raises:
          ApiError, UserError: it cannot be, and nothing has changed.
        """
        known = {model.name: model for model in self.models.all()}
        if not ADAPTER_NAME.fullmatch(name):
            raise bad_request(
                "lora_name must be 1 to 128 of letters, digits and _.@/-", "lora_name"
            )
        if name in known and (not inplace or not known[name].adapter):
            raise bad_request(
                f"{name!r} is served already: choose another lora_name, or replace an "
                "adapter with load_inplace=true",
                "lora_name",
            )
        address = dataclasses.replace(self._address(path), name=name)
        with self._lock:
            self.models.put(self._load(address, keeps_spare=True))
        logging.info("adapter %s is loaded from %s", name, address.folder)

    def unload(self, name: str) -> None:
        """Forgets an adapter. Raises ApiError: there is none of this name."""
        adapters = [model.name for model in self.models.all() if model.adapter]
        if name not in adapters:
            error = unknown_model(name, adapters)
            raise ApiError(404, error.message, "lora_name", error.code)
        with self._lock:
            self.models.remove(name)
            self._engine.unload_adapter(name)
        logging.info("adapter %s is removed", name)

    def follow(self) -> None:
        """Reads the adapters again whose runs have newer checkpoints."""
        for model in self.models.all():
            try:
                if not model.served.has_changed():
                    continue
                if problem := self._why_it_stays(model.served):
                    raise UserError(problem)
                with self._lock:
                    change = self._load if model.adapter else self._exchange
                    new = change(model.served.address.now())
                    self.models.put(new)
            except (UserError, OSError) as error:
                self._warn_once(model.served, str(error))
            else:
                logging.info("%s is at step %d now", model.name, new.served.step)

    def _warn_once(self, served: ServedModel, problem: str) -> None:
        if self._warned.get(served.name) != (served.step, problem):
            self._warned[served.name] = served.step, problem
            logging.warning(
                "%s stays at step %d: %s", served.name, served.step, problem
            )

    def _load(self, address: RunAddress, keeps_spare: bool = False) -> NamedModel:
        served = self._read(model_reader.ADAPTER, address)
        loaded = self._engine.names.identities() | {served.name: served.identity}
        most = self._engine.adapter_rows - 1 - SPARE_ROWS
        if keeps_spare and len({*loaded.values()}) > most:
            raise UserError(
                f"there is room for {max(0, most)} adapters, and it is in use: unload "
                "one, or start the server with a larger --adapters"
            )
        row = self._reader.row(served.identity)
        self._engine.load_adapter(served.name, row, served.identity)
        return self._named(served)

    def _exchange(self, address: RunAddress) -> NamedModel:
        """Answers with the newest weights of a base that trained all its parameters."""
        self._read(model_reader.WEIGHTS, address)
        place = self._everywhere or self._here
        task = {"kind": model_reader.PLACE}
        return self._named(self._engine.exchange_weights(lambda: place(task)))

    def _read(self, kind: str, address: RunAddress) -> ServedModel:
        task = reading(kind, address)
        if self._everywhere is None:  # Others are answered meanwhile.
            return self._here(task)
        return self._engine.between_rounds(lambda: self._everywhere(task))

    def _here(self, task: Task) -> ServedModel:
        return self._reader.perform(task)[1]

    def _why_it_stays(self, served: ServedModel) -> str:
        """Why a run cannot be at a newer step now; "" if it can."""
        opened = self._reader.opened
        address = served.address
        if not address or (address.step.isdecimal() and not address.alias):
            return ""
        if served.parent:
            if self._engine.names.has_room:
                return ""
            return (
                "no row is free for its newer adapter until answers with older ones "
                "end; if it stays so, start the server with a larger --adapters"
            )
        if self._engine.adapter_rows:
            return "adapters to it fit no other; without --adapters it is followed"
        specs, width = opened.model.specs.values(), opened.model.options.dtype.itemsize
        needed = sum(math.prod(x.shape) for x in specs) * width / jax.process_count()
        if needed <= (free := _free_bytes(opened.mesh) * (1 - KEPT_FREE)):
            return ""
        return (
            f"weights of a newer one need {needed / 2**30:.1f} GiB beside these, and "
            f"{free / 2**30:.1f} GiB are free; start the server again to serve it"
        )

    def _named(self, served: ServedModel) -> NamedModel:
        opened = self._reader.opened
        parts = (
            opened.base.fingerprint,
            served.identity,
            str(opened.model.options.dtype),
            opened.weights,
            jax.__version__,
        )
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return NamedModel(
            served, opened.base.tokenizer, self._defaults, f"fp_{digest[:12]}"
        )

    def _address(self, path: str) -> RunAddress:
        """The run at a path of a request. Raises ApiError: it may not be opened."""
        place, step = split_step(path)
        folder = self._require_inside(Path(place), place)
        # `run_addresses` runs a config file, and a client may not have that done.
        if not os.path.isdir(folder):
            raise ApiError(404, f"{place[:200]} is no run directory", "lora_path")
        try:
            addresses = run_addresses(
                [f"{folder}@{step}" if step else str(folder)],
                "lora_path",
                with_folders=True,
            )
        except UserError as error:
            raise ApiError(404, str(error), "lora_path") from error
        if len(addresses) != 1:
            raise bad_request(
                f"{place[:200]} holds {len(addresses)} runs: name one", "lora_path"
            )
        found = self._require_inside(addresses[0].folder, place)
        return dataclasses.replace(addresses[0], folder=found)

    def _require_inside(self, folder: Path, written: str) -> Path:
        """The folder without links. Raises ApiError: runs may not be opened there."""
        try:
            resolved = folder.resolve()
        except (OSError, RuntimeError, ValueError):
            resolved = None  # No name that a file can have.
        if resolved and any(resolved.is_relative_to(x) for x in self._roots):
            return resolved
        allowed = ", ".join(map(str, self._roots)) or "no folder"
        raise ApiError(
            403,
            f"runs are loaded from below {allowed} (--adapters_from), and not from "
            f"{written[:200]}",
            "lora_path",
        )


def open_models(
    runs: Sequence[str],
    model: str,
    capacity: Capacity,
    roots: Sequence[Path] = (),
    mesh: Mesh | None = None,
) -> Deployment:
    """Loads the models and compiles all programs that answer.

    The first of several processes calls this, and the others `follow_models`.

    Args:
      runs, model: those of `open_for_answering`.
      capacity: see the class.
      roots: folders below which runs may be loaded later.
      mesh: devices; by default those of all processes that fit.

    Raises:
      UserError: a model cannot be opened, or there is no room for the slots.
    """
    opened, own = _open_decoder(runs, model, capacity, mesh)
    reader = ModelReader(opened, own)
    leading = LeadingDecoder(own, perform=reader.perform, check=reader.check)
    alone = jax.process_count() == 1
    decoder = own if alone else leading
    decoder.warm_up()
    rows = max(capacity.adapters, len(opened.runs))
    engine = Engine(
        decoder,
        opened.base.tokenizer,
        most_waiting=capacity.queue,
        prefix_bytes=capacity.prefix_bytes,
        adapter_rows=rows and 1 + rows + SPARE_ROWS,  # The base has one of them.
        when_idle=(lambda: None) if alone else leading.flush,
    )
    served = ServedRuns(reader, engine, roots, None if alone else leading.everywhere)
    logging.info(
        "ready %.1f s after the start, with %d slots of %d tokens: %s",
        runtime.process_age(),
        own.slots,
        own.length,
        ", ".join(model.name for model in served.models.all()),
    )
    return Deployment(
        engine, served.models, own.length, own.slots, own.vocabulary, rows,
        served.load, served.unload, served.follow,
        (lambda: None) if alone else leading.end,
    )  # fmt: skip


def follow_models(runs: Sequence[str], model: str, capacity: Capacity) -> None:
    """Does in this process what the first one does, until that ends.

    Raises:
      UserError: see `open_models`.
      LonelyError: another process is gone.
    """
    # The reader alone holds the weights, since it exchanges them.
    reader = ModelReader(*_open_decoder(runs, model, capacity))
    follow(reader.decoder, reader.row, perform=reader.perform, check=reader.check)


def _open_decoder(
    runs: Sequence[str], model: str, capacity: Capacity, mesh: Mesh | None = None
) -> tuple[Answering, SlotDecoder]:
    """The models, and a decoder that is not warm yet; see `open_models`."""
    opened = open_for_answering(
        runs,
        model=model,
        mesh=mesh,
        adapters=capacity.adapters,
        spare=SPARE_ROWS,
        rank=capacity.rank,
        weights=capacity.weights,
        devices=jax.devices() if jax.process_count() > 1 else jax.local_devices(),
    )
    longest = opened.model.architecture.max_position
    if capacity.context > longest:
        raise UserError(
            f"--context={capacity.context}: the model's context is {longest}"
        )
    context = capacity.context or min(longest, USUAL_CONTEXT)
    platform = opened.mesh.devices.flat[0].platform
    slots = capacity.slots or USUAL_SLOTS.get(platform, ACCELERATOR_SLOTS)
    mesh = opened.mesh
    _require_room(opened.model, mesh, slots, context)
    return opened, SlotDecoder(opened.model, opened.params, slots, context, mesh=mesh)


def _require_room(model: Model, mesh: Mesh, slots: int, context: int) -> None:
    """Raises UserError if keys and values of all slots do not fit into memory.

    Each process holds its part of them, and looks at its own devices.
    """
    a = model.architecture
    each = np.dtype(model.options.dtype).itemsize
    slot = 2 * a.layers * context * a.kv_heads * a.head_dim * each
    slot = -(-slot // jax.process_count())
    free = _free_bytes(mesh) * (1 - KEPT_FREE)
    fits = int(free // slot)
    if slots > fits:
        remedy = f"--slots={fits}" if fits else "a smaller --context"
        raise UserError(
            f"--slots={slots} with --context={context} need {slots * slot / 2**30:.1f} "
            f"GiB, and {free / 2**30:.1f} GiB are free: use {remedy}"
        )


def _free_bytes(mesh: Mesh) -> float:
    """Free memory of this process's devices of `mesh` together; of a CPU its RAM.

    A container may have less memory than its machine, and this process uses part of it.
    """
    total = 0.0
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            own = psutil.Process().memory_info().rss
            return min(psutil.virtual_memory().available, memory_limit() - own)
        total += stats["bytes_limit"] - stats["bytes_in_use"]
    return total
