"""Trains a tokenizer: `python -m research.tokenize --source=docs=folder --out=tok`."""

import dataclasses
import re
from collections.abc import Sequence

from research.config import command_line
from research.config.choices import UNDECODABLE
from research.config.field_names import name_sources
from research.config.knobs import knob
from research.core.errors import UserError
from research.core.local_paths import local_path

USAGE = """
python -m research.tokenize --source=NAME=WHERE [--source=...] --vocab=4096 --out=FOLDER

Trains a byte-level BPE on the sources, and shows the bytes per token on each.
--config.text.tokenizer=FOLDER and transformers can open the folder.
WHERE is stdlib, a file, a folder or hub://owner/name[@revision][:subset[@split]].
"""


KNOB = re.compile(r"(?:--)?config\.text\.(sources|column|undecodable|held_out_share)\b")


@dataclasses.dataclass(frozen=True)
class TokenizeFlags:
    """The flags of `python -m research.tokenize`."""

    source: tuple[str, ...] = knob(
        (), "text to train on, where or name=where; repeatable", is_path=True
    )
    vocab: int = knob(4096, "number of ids", low=257)
    out: str = knob("", "new folder to write tokenizer.json to", is_path=True)
    held_out_share: float = knob(
        -1.0,
        "share of the documents that is not trained on, as config.text.held_out_share",
        low=-1,
        high=0.5,
    )
    column: str = knob("text", "column with the text, in files of rows")
    undecodable: str = knob(
        "stop",
        "documents that are not UTF-8: stop, skip them, or replace the bytes",
        choices=UNDECODABLE,
    )


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    f = command_line.parse(argv, USAGE, TokenizeFlags)
    if not f.source:
        raise UserError("--source=NAME=WHERE is missing, e.g. --source=code=stdlib")
    if not f.out:
        raise UserError("--out=FOLDER is missing, e.g. --out=runs/tokenizer")
    if local_path(f.out).exists():
        raise UserError(f"--out={f.out} exists; name a folder that does not")
    from research.config.data_knobs import DataConfig, TextConfig
    from research.data.text.choose_tokenizer import make_tokenizer

    named = [source for written in f.source for source in name_sources(written)]
    text = TextConfig(
        sources=tuple(named),
        column=f.column,
        undecodable=f.undecodable,
        held_out_share=f.held_out_share,
    )
    try:
        for name, size, tokens in make_tokenizer(text, DataConfig(), f.vocab, f.out):
            print(f"{name}: {size / tokens:.3f} bytes a token, over {size} bytes")
    except UserError as error:
        # It names the knobs of a training, which are flags here.
        said = KNOB.sub(lambda knob: f"--{knob[1].removesuffix('s')}", str(error))
        raise type(error)(said) from error
    print(f"tokenizer written to {f.out}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
