"""Adapters to a base model that is open: those of a run, or of a folder of PEFT."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from research.config.data_knobs import DataConfig
from research.config.knob_groups import LoRAConfig, ModelConfig
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.hub_access import PREFIX
from research.formats.base_model import Base
from research.formats.load_parameters import load_frozen
from research.formats.peft.adapter_config import read_numbers
from research.formats.peft.adapter_folder import AdapterFolder
from research.formats.peft.find_adapter import find_adapter
from research.models.make_model import model_of_run
from research.models.transformer import Model
from research.parallel import mesh as meshes
from research.runs.answering.named_model import open_named, prompts_of
from research.runs.answering.run_addresses import RunAddress
from research.runs.lineage.start_pins import saved_step
from research.runs.reopen import (
    FoundRun,
    ReopenedRun,
    TrainedPrompts,
    find_run,
    shared_mesh,
)
from research.runs.run_directory import RunDir
from research.tasks.task_protocol import PromptFormat
from research.tokenize.tokenizer import Tokenizer, from_folder
from research.weights import trainable

USUAL_LENGTH = 1024  # Tokens of a row where nobody says how long training had them.


@dataclasses.dataclass(frozen=True)
class FoundFolder(TrainedPrompts):
    """An adapter folder of PEFT that fits an open base model; no factor has been read.

    It stands in the place of a run that has ended.

    Attributes:
      folder: of the adapter, which holds no file of a run.
      config: of a run that would continue the adapter.
      base: the model under it, whose tokenizer has the chat template of the folder.
      adapter: the open files.
      trainable: the split into the adapter's parameters and those of the base.
    """

    folder: RunDir
    config: Config
    base: Base
    adapter: AdapterFolder
    trainable: trainable.Trainable

    @functools.cached_property
    def specs(self) -> Mapping[str, Any]:
        """Descriptions of all parameters of the model."""
        return Model(self.base.architecture).specs

    @property
    def system(self) -> str:
        """No text: the chat template of an export writes that of training itself."""
        return ""

    @property
    def prompts(self) -> PromptFormat:
        """Prompts as the chat template of the folder has them, or of its base."""
        return self.prompts_with(None)

    def prompts_with(self, system: str | None) -> PromptFormat:
        """`prompts` with a system text; None leaves it to the template."""
        return prompts_of(self.base, system)

    @property
    def identity(self) -> str:
        """sha256 of what is read."""
        return self.adapter.fingerprint

    def read(self, mesh: Mesh) -> dict[str, Any]:
        """The adapters over the devices of `mesh`.

        Raises:
          UserError: a number is not finite, or a parameter that the folder holds whole
            is not that of the base.
        """
        if self.base.tensors is not None:
            self.adapter.require_base(self.base.tensors.on(mesh))
        return self.adapter.load(meshes.shardings(self.trainable.specs, mesh))

    def load(
        self,
        mesh: Mesh | None = None,
        *,
        devices: Sequence[Any] = (),
        step: str = "0",
        in_compute_dtype: bool = False,
        decodes: bool = True,
    ) -> ReopenedRun:
        """Reads the base and the adapters; see `FoundRun.load`. There is no step but 0.

        Raises:
          UserError: see `read`, or a parameter does not divide over `mesh`.
        """
        assert step == "0", step
        config, base, split = self.config, self.base, self.trainable
        wanted = {**self.specs, "trained": split.specs}
        devices = devices or jax.local_devices()
        mesh = mesh or shared_mesh(wanted, devices, decodes=decodes)
        model = model_of_run(config.model, config.data, base.architecture, mesh)
        params = self.read(mesh)
        frozen = load_frozen(base, model, mesh, split, config.seed)
        return ReopenedRun(
            folder=self.folder,
            step=0,
            config=config,
            base=base,
            model=model,
            mesh=mesh,
            trainable=split,
            params=params,
            frozen=frozen,
        )


def find_folder(folder: Path, base: Base, dtype: str = "") -> FoundFolder:
    """The adapter folder of PEFT at `folder`, which must fit `base`.

    Args:
      folder: with both files.
      base: the open base model.
      dtype: in which the base is held; "": that of `ModelConfig`.

    Raises:
      UserError: it is damaged, computes something that is not computed here, is an
        adapter to another base, or has other tokens.
    """
    specs = Model(base.architecture).specs
    adapter = AdapterFolder(str(folder), base.architecture, specs)
    model = ModelConfig(init_from=base.name)
    config = Config(
        model=dataclasses.replace(model, dtype=dtype) if dtype else model,
        lora=adapter.lora_config(LoRAConfig(init_from=str(folder))),
        data=DataConfig(seq_len=min(USUAL_LENGTH, base.architecture.max_position)),
    )
    split = trainable.make("lora", config.model, config.lora, specs)
    adapter.warn_of_other_base(base)
    base = dataclasses.replace(base, tokenizer=_tokenizer(folder, base))
    return FoundFolder(RunDir(folder), config, base, adapter, split)


def open_folder(name: str, model: str = "", *, is_exact: bool = False) -> FoundFolder:
    """The adapter of PEFT that a command was asked for, over its base.

    Args:
      name: its folder, or hub://owner/name.
      model: the base, as `config.model.init_from` names it; "": that which the adapter
        names.
      is_exact: whether the base is held as its files have it, and not in the dtype
        of `ModelConfig`.

    Raises:
      UserError: one of them is absent, or `find_folder` refuses it.
    """
    folder = find_adapter(name)
    base = open_named(model or base_of_folder(folder))
    return find_folder(folder, base, _dtype_of(base) if is_exact else "")


def _dtype_of(base: Base) -> str:
    """The narrowest dtype that holds all numbers in the files of `base`."""
    tensors = base.tensors
    kinds = {tensors.kind(name) for name in tensors.shapes()} if tensors else set()
    return "bfloat16" if kinds == {"bfloat16"} else "float32"


def _tokenizer(folder: Path, base: Base) -> Tokenizer:
    """That of `base`, with the chat template that the folder has."""
    if not (folder / "tokenizer.json").is_file():
        return base.tokenizer
    own, known = from_folder(folder), base.tokenizer.vocabulary
    if odd := [name for name, i in own.vocabulary.items() if known.get(name) != i]:
        raise UserError(
            f"{folder} has a tokenizer with {len(odd)} other tokens than {base.name} "
            f"(such as {odd[0]!r}): give the base model that it was trained on as "
            "--model="
        )
    if not own.chat_template:
        return base.tokenizer
    return base.tokenizer.with_chat_template(own.chat_template, own.end_ids)


def base_of_folder(folder: Path) -> str:
    """The base model that an adapter folder names, as `config.model.init_from` does.

    Raises:
      UserError: it names none, or one that is not on this machine.
    """
    numbers = read_numbers(folder)
    name, how = numbers.base_name, "give its base model as --model="
    if not name:
        raise UserError(f"{folder} names no base model: {how}")
    if "://" in name or Path(name).exists():
        return name
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        at = f"@{numbers.revision}" if numbers.revision else ""
        return f"{PREFIX}{name}{at}"
    raise UserError(f"{folder} was trained on {name}, which is not here: {how}")


def find_adapters(
    address: RunAddress, base: Base, form: str = "none"
) -> FoundRun | FoundFolder:
    """The adapters of an address, which must be those of `base`.

    `form` is that of the base in memory, as `config.model.frozen_form` names it.

    Raises:
      UserError: it has another base, no such checkpoint, more than adapters, or
        adapters that start from what the codes of another form have lost.
    """
    if address.is_folder:
        found = find_folder(address.folder, base)
        if whole := found.trainable.full:
            raise UserError(
                f"{address.folder} holds {min(whole)} whole, trained beside its "
                "factors, and adapters of one batch share all parameters: ask it with "
                "research.generate, or merge it with PEFT and serve that model"
            )
        return found
    folder = RunDir(address.folder)
    saved_step(folder, address.step)
    config, identity = folder.config(), folder.identity()
    if not config.is_adapter:
        raise UserError(
            f"{why_base(folder)}, and not an adapter to {base.name}: serve it by itself"
        )
    for part, here in (
        ("base model", base.fingerprint),
        ("tokenizer", base.tokenizer.fingerprint),
    ):
        if identity[part] != here:
            raise UserError(
                f"{folder} was trained on {config.model.init_from} ({part} sha256 "
                f"{identity[part][:12]}), and the base that is served is {base.name} "
                f"({here[:12]}): serve the run by itself"
            )
    found, own = find_run(address.folder, base), config.model.frozen_form
    if found.trainable.kind.reads_lost and not same_numbers(own, form):
        raise UserError(
            f"{folder} has adapters of kind {config.lora.kind!r}, which make up for "
            f"what {weights_text(own)} lack, and the base that is "
            f"served is {weights_text(form)}: serve the run by itself and without "
            "--model, or export it with --format=hf and serve that model"
        )
    return found


def same_numbers(own: str, other: str) -> bool:
    """Whether a base has the same numbers in two forms, see `ModelConfig.frozen_form`.

    Codes that are kept stand for the very numbers of their file.
    """
    forms = {own, other}
    return len(forms) == 1 or forms == {"none", "keep"}


def weights_text(form: str) -> str:
    """The frozen weights of a form, for people."""
    if form == "none":
        return "the base model's own weights"
    return f"{form} codes"


def why_base(folder: RunDir) -> str:
    """Why a run that is no adapter alone stands for a base model, as a clause."""
    config = folder.config()
    what = f"adapters of kind {config.lora.kind!r}, which share no base with others"
    if config.trainable == "full":
        what = "all its parameters"
    elif config.lora.full:
        what = "parameters whole (config.lora.full)"
    return f"{folder} trained {what}, so it is a base model itself"
