"""A tokenizer for the texts of rows, in which no control token can be written."""

import json
import uuid
from typing import Any

import tokenizers

# Stands for a control token in the view for text. No text can hold it: it differs in
# every process.
MARK = uuid.uuid4().hex


def make_text_view(serialized: str, controls: frozenset[int]) -> tokenizers.Tokenizer:
    """A copy that reads control tokens as the characters of their names."""
    rules = json.loads(serialized)
    for token in rules["added_tokens"]:
        token["special"] = token["id"] in controls
    view = _reader(rules)
    names = {t["content"]: t["id"] for t in rules["added_tokens"]}
    found = {
        name
        for name, i in names.items()
        if i in controls and i in view.encode(name, add_special_tokens=False).ids
    }
    if found:
        # A vocabulary of pieces finds them, too, unless they have other names there.
        model = rules["model"]
        found.discard(model.get("unk_token"))
        rules["added_tokens"] = [
            token for token in rules["added_tokens"] if token["content"] not in found
        ]
        if isinstance(model["vocab"], dict):
            vocab = {n + MARK * (n in found): i for n, i in model["vocab"].items()}
        else:
            vocab = [[n + MARK * (n in found), score] for n, score in model["vocab"]]
        changed = {"vocab": vocab}
        if "merges" in model:
            changed["merges"] = [
                merge for merge in model["merges"] if not _made_by(merge) & found
            ]
        view = _reader(rules | {"model": model | changed})
    view.add_tokens([tokenizers.AddedToken(MARK, normalized=False)])
    return view


def _made_by(merge: list[str] | str) -> set[str]:
    """The two pieces of a merge, and what it makes of them."""
    first, second = merge if isinstance(merge, list) else merge.split(" ", 1)
    return {first, second, first + second}


def _reader(rules: dict[str, Any]) -> tokenizers.Tokenizer:
    view = tokenizers.Tokenizer.from_str(json.dumps(rules))
    view.encode_special_tokens = True
    return view
