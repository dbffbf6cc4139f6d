"""The groups of knobs about rows and raw text; see `knob_groups.py`."""

import dataclasses

from research.config.choices import ROW_SOURCES, TASK_MODULES, UNDECODABLE
from research.config.knobs import free_knob, knob

NEWEST_EDITION = 4  # of the rules by which rows are read and split
# The value of `DataConfig.held_out` and `TextConfig.held_out_share` that the data
# decides. The most rows that it then is, and the edition since which it may be fewer.
BY_SIZE, MOST_HELD_OUT, BY_SIZE_SINCE = -1.0, 48, 3


@dataclasses.dataclass(frozen=True)
class ColumnsConfig:
    """The names of the columns in files of rows."""

    instruction: str = knob("instruction", "column with the request")
    context: str = knob("context", "column with material for it; may be missing")
    response: str = knob("response", "column with the answer")
    category: str = knob(
        "category", "column whose values get a loss of their own; may be missing"
    )
    messages: str = knob("messages", "column of chat rows [{role, content}, ...]")
    system: str = knob("system", "column with the system text; may be missing")
    ignored: tuple[str, ...] = knob(
        (), "columns that are not read, as ('source', 'input'), whatever their name"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The task, its rows and their batches."""

    kind: str = knob(
        "instructions",
        "task: instructions tunes on rows of config.data, text pre-trains on "
        "config.text",
        choices=TASK_MODULES,
    )
    source: str = knob(
        "dolly",
        "rows where data.path is empty; dolly: the hub's, or else the embedded sample",
        choices=ROW_SOURCES,
    )
    path: str = knob(
        "",
        "your own rows: .jsonl .json .csv .parquet, also .gz; a folder, a pattern such "
        "as 'rows/*.csv', or several with commas; or "
        "hub://owner/name[@revision][:subset[@split]]; embedded: the embedded sample",
        is_path=True,
    )
    eval_path: str = knob(
        "",
        "your own held-out rows, as in data.path; empty: data.held_out of its rows",
        is_path=True,
    )
    edition: int = knob(
        0,
        "rules of reading and splitting rows; 1: the seed splits; 2: equal rows stand "
        "on one side, which no seed moves; 3: unused material stops the run, "
        "and few rows hold out a tenth; 4: tools and their calls are read; 0: the "
        "newest, of an old run its own",
        low=0,
        high=NEWEST_EDITION,
    )
    columns: ColumnsConfig = ColumnsConfig()
    template: str = knob(
        "chat",
        "chat: the model's own template; dolly: ### headers",
        choices=("chat", "dolly"),
    )
    template_args: tuple[str, ...] = knob(
        (), "variables of the chat template, as ('enable_thinking=False', ...)"
    )
    system: str = knob("", "system prompt; empty: what the template writes without one")
    seq_len: int = knob(512, "tokens in a packed row", above=0)
    batch_size: int = knob(
        8, "packed rows in an optimizer step, over all devices", above=0
    )
    microbatch_size: int = knob(
        0, "packed rows in a forward pass; 0: the whole batch", low=0
    )
    overlength: str = knob(
        "truncate",
        "rows longer than seq_len: truncate their context, or drop them",
        choices=("truncate", "drop"),
    )
    bad_lines: str = knob(
        "stop",
        "lines that cannot be read: stop, or skip and count them",
        choices=("stop", "skip"),
    )
    held_out: float = knob(
        BY_SIZE,
        "rows kept for evaluation, stratified by category: a number, a share below 1, "
        f"or 0 to evaluate nothing; -1: {MOST_HELD_OUT}, of fewer than "
        f"{10 * MOST_HELD_OUT} rows a tenth",
        low=BY_SIZE,
    )
    max_rows: int = knob(
        0, "use so many rows, from each category its share; 0: all", low=0
    )
    hub_timeout: float = free_knob(5.0, "seconds to wait for the hub", above=0)

    @property
    def rows_per_pass(self) -> int:
        """Packed rows per forward pass, over all devices."""
        return self.microbatch_size or self.batch_size

    @property
    def passes_per_step(self) -> int:
        """Forward passes whose gradients one optimizer step sums."""
        return self.batch_size // self.rows_per_pass


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The raw text of pre-training."""

    sources: tuple[str, ...] = knob(
        (),
        "texts by name, as ('name=where', ...): a file or folder, stdlib (the running "
        "Python's own), or hub://owner/name[@revision][:subset[@split]]",
        is_path=True,
    )
    mixture: tuple[str, ...] = knob((), "shares as ('name=weight', ...); none: by size")
    column: str = knob("text", "column with the text, in files of rows")
    tokenizer: str = knob(
        "bpe:4096",
        "byte; bpe:SIZE, trained on the sources; a tokenizer.json, a Hugging Face "
        "folder or hub://owner/name[@revision]. A model from model.init_from keeps its "
        "own",
        is_path=True,
    )
    undecodable: str = knob(
        "stop",
        "documents that are not UTF-8: stop, skip and count them, or replace the bytes",
        choices=UNDECODABLE,
    )
    isolate: bool = knob(True, "attention stays within a document")
    cut: str = knob(
        "anywhere",
        "where a training row of data.seq_len tokens ends; paragraph: behind the last "
        "empty line in its second half, or else its last line end, if it has any; the "
        "rest is padding. Held-out text is measured as ever",
        choices=("anywhere", "paragraph"),
    )
    overlap: int = knob(
        0, "tokens at the end of a training row that begin the next one, too", low=0
    )
    hard_cut: str = knob(
        "",
        "letters that end a document wherever they stand, and belong to none; \\n "
        "stands for a line end, so \\n\\n\\n is two empty lines; empty: none",
    )
    held_out_share: float = knob(
        BY_SIZE, "share of texts to evaluate; 0: none; -1: by size", low=-1, high=0.5
    )
    held_out_bytes: int = knob(
        200_000, "bytes of each source's kept documents that are evaluated", above=0
    )
    cache: bool = knob(
        True,
        "tokenise once and read in random order; false: stream in the order of the "
        "sources, large ones in shares side by side",
    )
    cache_dir: str = free_knob(
        "auto",
        "folder of tokenised text and rows; auto: the user's cache",
        is_path=True,
    )
