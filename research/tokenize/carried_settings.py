"""Settings of a model folder that an export hands on to other tools."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research.core.json_files import read_json
from research.models.families.config_fields import ConfigFields

SPECIAL_KINDS = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
KEPT = (
    "padding_side",
    "truncation_side",
    "model_max_length",
    "extra_special_tokens",
)


def read_fields(file: Path) -> ConfigFields:
    """The JSON object in a file of a model folder; no fields if there is no file.

    Raises:
      UserError: the file holds something else.
    """
    found = file.is_file() and read_json(file, dict, "give the file of the model")
    return ConfigFields(found or {}, str(file))


def kept_settings(settings: ConfigFields) -> dict[str, Any]:
    """The fields of a `tokenizer_config.json` that training does not change.

    Raises:
      UserError: the list of additional special tokens is no list.
    """
    more = settings.get("additional_special_tokens", [])
    if not isinstance(more, list):
        raise settings.wrong("additional_special_tokens", more, "a list of tokens")
    named = {f"{kind}_token": settings.get(f"{kind}_token") for kind in SPECIAL_KINDS}
    kept = {name: settings.get(name) for name in KEPT}
    kept |= {name: _text(token) for name, token in named.items()}
    kept["additional_special_tokens"] = [t for t in map(_text, more) if t]
    return {name: value for name, value in kept.items() if value}


def special_texts(kept: Mapping[str, Any]) -> list[str]:
    """The texts of all special tokens in the fields that `kept_settings` returns."""
    named = [kept.get(f"{kind}_token") for kind in SPECIAL_KINDS]
    return [*filter(None, named), *kept.get("additional_special_tokens", [])]


def read_generation(folder: Path) -> tuple[dict[str, Any], list[int]]:
    """The `generation_config.json` of a model folder, and the ids that end an answer.

    As in transformers, `config.json` names the ids where that file does not.

    Raises:
      UserError: a field that names ids is malformed.
    """
    generation = read_fields(folder / "generation_config.json")
    for name in ("bos_token_id", "pad_token_id"):
        generation.integer(name, -1, low=-1)
    ends = _end_ids(generation) or _end_ids(read_fields(folder / "config.json"))
    return generation.present(), ends


def _end_ids(fields: ConfigFields) -> list[int]:
    value = fields.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise fields.wrong("eos_token_id", value, "an id, or a list of ids, from 0 up")
    return ids


def _text(token: Any) -> str | None:
    """The text of a token that is given as text, or as an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
