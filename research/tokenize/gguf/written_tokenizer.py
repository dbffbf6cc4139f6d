"""The `tokenizer.*` keys of a GGUF file, for a tokenizer of ours."""

import json
import logging
from typing import Any

import tokenizers

from research.core.errors import UserError
from research.tokenize.gguf.gguf_tokenizer import (
    BYTE,
    CONTROL,
    ENDS,
    KEY,
    NORMAL,
    SPACE,
    USER_DEFINED,
)
from research.tokenize.gguf.pre_tokenizers import NO_MERGES, name_of_cut
from research.tokenize.tokenizer import Tokenizer

UNKNOWN, UNUSED = 2, 5  # more types of tokens


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys with which llama.cpp tokenises as `tokenizer` does.

    Args:
      tokenizer: of the model.
      rows: of the model's embedding. llama.cpp wants one token for each of them.

    Raises:
      UserError: llama.cpp has no such tokenizer.
    """
    rules = json.loads(tokenizer.to_json())
    kind, model = rules["model"]["type"], rules["model"]
    if kind != "BPE":
        raise _refuse(f"it is a {kind} model")
    if model.get("byte_fallback"):
        metadata = _sentence_pieces(tokenizer, rules, rows)
    else:
        metadata = _byte_level(tokenizer, rules, rows)
    ends = _ends(tokenizer)
    # Without its own, llama.cpp would show token 11 to a template.
    metadata[f"{KEY}bos_token_id"] = ends[0] if tokenizer.bos is None else tokenizer.bos
    for name, i in zip(ENDS, ends, strict=False):
        metadata[f"{KEY}{name}_token_id"] = i
    unknown = model.get("unk_token") and model["vocab"].get(model["unk_token"])
    for name, i in (("padding", tokenizer.pad), ("unknown", unknown)):
        if isinstance(i, int) and i < rows:
            metadata[f"{KEY}{name}_token_id"] = i
    metadata[f"{KEY}add_bos_token"] = tokenizer.add_bos
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _refuse(reason: str) -> UserError:
    return UserError(
        f"llama.cpp cannot tokenise as this tokenizer does: {reason}; export the model "
        "with --format=hf instead"
    )


def _ends(tokenizer: Tokenizer) -> list[int]:
    """Ids of ENDS. Without one for a turn, llama.cpp would look for its name."""
    first = [] if tokenizer.eos is None else [tokenizer.eos]
    ends = list(dict.fromkeys([*first, *tokenizer.end_ids]))
    if not ends:
        raise _refuse("no token ends a text, and llama.cpp would take number 11")
    if len(ends) > len(ENDS):
        raise _refuse(f"{len(ends)} tokens end an answer, and a file names {len(ENDS)}")
    return ends if len(ends) > 1 else ends * 2


def _byte_level(
    tokenizer: Tokenizer, rules: dict[str, Any], rows: int
) -> dict[str, Any]:
    _check_normalizer(rules["normalizer"])
    name = name_of_cut(rules)
    if name is None:
        raise _refuse(
            "it cuts text in a way for which llama.cpp has no name (pre-tokenizer "
            f"{_shown(rules['pre_tokenizer'])})"
        )
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in rules["model"]["merges"]
    ]
    names, types = _tokens(tokenizer, rules, rows)
    return {
        f"{KEY}model": "gpt2",
        f"{KEY}pre": name,
        f"{KEY}tokens": names,
        f"{KEY}token_type": types,
        f"{KEY}merges": merges or [NO_MERGES],
    }


def _shown(description: Any) -> str:
    text = json.dumps(description, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_normalizer(normalizer: dict[str, Any] | None) -> None:
    if normalizer is None:
        return
    parts = normalizer.get("normalizers", [normalizer])
    if other := [part for part in parts if part["type"] != "NFC"]:
        raise _refuse(f"it changes text beforehand ({_shown(other[0])})")
    if parts:
        logging.warning(
            "export: the tokenizer composes accents (NFC), and llama.cpp does not: "
            "text with separate accents becomes other tokens there"
        )


def _tokens(
    tokenizer: Tokenizer, rules: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """The text and the type of each token, and fillers for numbers without one."""
    model = rules["model"]
    names = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for name, i in model["vocab"].items():
        if i < rows:
            names[i], types[i] = name, _type(name, model)
    for token in rules["added_tokens"]:
        i, name = token["id"], token["content"]
        if i >= rows:
            continue
        control = i in tokenizer.control_ids
        if model.get("byte_fallback") and not control:
            name = name.replace(SPACE, " ")  # It is looked for in the text itself.
        names[i], types[i] = name, CONTROL if control else USER_DEFINED
        if name == model.get("unk_token"):
            types[i] = UNKNOWN
    if len({*names}) < rows:
        (twice, *_) = (name for name in names if names.count(name) > 1)
        raise _refuse(f"two of its tokens are written {twice!r}")
    return names, types


def _type(name: str, model: dict[str, Any]) -> int:
    if name == model.get("unk_token"):
        return UNKNOWN
    is_byte = model.get("byte_fallback") and len(name) == 6 and name[:3] == "<0x"
    return BYTE if is_byte else NORMAL


def _sentence_pieces(
    tokenizer: Tokenizer, rules: dict[str, Any], rows: int
) -> dict[str, Any]:
    names, types = _tokens(tokenizer, rules, rows)
    scores = _scores(rules)
    return {
        f"{KEY}model": "llama",
        f"{KEY}pre": "default",
        f"{KEY}tokens": names,
        f"{KEY}token_type": types,
        f"{KEY}scores": [scores.get(name, 0.0) for name in names],
        f"{KEY}add_space_prefix": _adds_space(rules),
    }


def _scores(rules: dict[str, Any]) -> dict[str, float]:
    """By piece, a number that is higher the earlier merges make it.

    SentencePiece joins the two neighbours that make the best piece, BPE those of the
    first merge. Both are the same if every way to make a piece is a merge, and if all
    merges for one piece follow each other.
    """
    vocabulary = rules["model"]["vocab"]
    added = {token["content"] for token in rules["added_tokens"]}
    merges = {
        tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)
        for merge in rules["model"]["merges"]
    }
    order: dict[str, int] = {}
    last = ""
    for merge in rules["model"]["merges"]:
        piece = merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge)
        if piece in order and piece != last and piece not in added:
            raise _refuse(f"its merges for {piece!r} stand in several places")
        order.setdefault(piece, len(order))
        last = piece
    for piece in vocabulary.keys() - added:
        for cut in range(1, len(piece)):
            first, second = piece[:cut], piece[cut:]
            made = first in vocabulary and second in vocabulary
            if made and (first, second) not in merges and not _is_byte(piece):
                raise _refuse(f"no merge makes {piece!r} of {first!r} and {second!r}")
    return {piece: -float(rank + 1) for piece, rank in order.items()}


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x")


def _adds_space(rules: dict[str, Any]) -> bool:
    """Whether a text begins with a space of its own."""
    inner = tokenizers.Tokenizer.from_str(json.dumps(rules))
    text = "ab  c\n d"
    normal = inner.normalizer.normalize_str(text) if inner.normalizer else text
    cut = inner.pre_tokenizer.pre_tokenize_str(normal) if inner.pre_tokenizer else []
    found = [piece for piece, _ in cut] if cut else [normal]
    expected = text.replace(" ", SPACE)
    if found not in ([expected], [SPACE + expected]):
        raise _refuse(f"it reads {text!r} as {found}")
    return found != [expected]
