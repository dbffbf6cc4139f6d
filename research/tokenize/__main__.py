"""Trains a tokenizer: `python -m research.tokenize --source=docs=folder --out=tok`."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from research.config import command_line
from research.core.errors import UserError

USAGE = """
python -m research.tokenize --source=NAME=WHERE [--source=...] --vocab=4096 --out=FOLDER

Trains a byte-level BPE on the sources, and says how many bytes a token stands for on
each. The folder can be given as --config.text.tokenizer=FOLDER, and to transformers.
WHERE is stdlib, a file, a folder or hub://owner/name[:subset][@split].
"""

flags.DEFINE_multi_string("source", [], "text to train on, name=where; repeatable")
flags.DEFINE_integer("vocab", 4096, "ids, at least 257")
flags.DEFINE_string("out", "", "new folder to write tokenizer.json to")
flags.DEFINE_float(
    "held_out_share", 0.01, "documents left out, as config.text.held_out_share has it"
)
flags.DEFINE_string("column", "text", "column with the text, in files of rows")
flags.DEFINE_string(
    "undecodable", "stop", "documents not in UTF-8: stop, skip, replace"
)


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    command_line.parse(argv, USAGE, has_config=False)
    f = flags.FLAGS
    if not f.source:
        raise UserError("--source=NAME=WHERE is missing, e.g. --source=code=stdlib")
    if not f.out:
        raise UserError("--out=FOLDER is missing, e.g. --out=runs/tokenizer")
    if Path(f.out).exists():
        raise UserError(f"--out={f.out} exists; name a folder that does not")
    from research.config.knob_groups import TextConfig
    from research.config.run_config import Config
    from research.data.text.choose_tokenizer import make_tokenizer

    text = TextConfig(
        sources=tuple(f.source),
        column=f.column,
        undecodable=f.undecodable,
        held_out_share=f.held_out_share,
    )
    for name, size, tokens in make_tokenizer(Config(text=text), f.vocab, f.out):
        print(f"{name}: {size / tokens:.3f} bytes a token, over {size} bytes")
    print(f"tokenizer written to {f.out}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
