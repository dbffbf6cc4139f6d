"""Pre-training: raw text by source, and samples that the model writes as it learns."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from research.config.data_knobs import BY_SIZE, DataConfig, TextConfig
from research.config.field_names import name_sources
from research.config.run_config import Config
from research.core.errors import UserError
from research.core.visible_text import counted
from research.data.batch_order import Batches
from research.data.text.choose_tokenizer import sample_texts
from research.data.text.row_layout import DocumentMarks
from research.data.text.text_dataset import TextData, with_share
from research.data.text.text_sources import check_text, open_sources
from research.data.text.tokenized_corpus import load_text
from research.data.token_batch import Batch
from research.engine.requests import Request, Sampling
from research.engine.text_generation import TextGenerator
from research.formats.base_model import Base
from research.tasks.epochs import count_epochs, resolved
from research.tasks.findings import (
    DROPPED,
    NOT_EVALUATED,
    TOLERATED_LOSS,
    Finding,
    examine_lost_text,
)
from research.tasks.model_answers import HeldOutPrompt, Sample
from research.tasks.row_preview import PreviewRow, RowPage, preview_rows
from research.tasks.task_protocol import EvaluationRows, TaskKind, WholeTexts
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.tokenize.conversation import Turn
from research.tokenize.lost_text import LostText, count_lost
from research.tokenize.tokenizer import Tokenizer

# Greedy samples of a small model repeat themselves; these vary, and stay likely.
TEMPERATURE, TOP_P = 0.8, 0.95
COMPARED_LETTERS = 1 << 17  # of each source, with what their ids stand for


class PlainFormat:
    """A prompt is the beginning of a document, which the model continues."""

    def __init__(self, tokenizer: Tokenizer):
        marks = DocumentMarks.of(tokenizer)
        self._tokenizer = tokenizer
        self._start = marks.start
        self.stop_ids = frozenset({marks.start, *tokenizer.end_ids})

    def encode_prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]:
        """Ids of the last turn, after the mark that every document begins with."""
        return self.encode_text(context + turns[-1].text)

    def encode_text(self, text: str, with_start: bool = True) -> list[int]:
        """Ids of a text; `with_start` puts the mark of a document before it."""
        [ids] = self._tokenizer.encode_texts([text])
        return [self._start, *ids] if with_start else ids


class TextTask:
    """The `Task` of `config.text`; `data` is its text, tokenised.

    `lost` is what the ids of a sample of each source do not stand for.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        longest: int,
        processes: tuple[int, int],
    ):
        """Tokenises the text, or opens what was tokenised before.

        Args:
          config: the run's.
          tokenizer: the base model's.
          longest: the model's context in tokens.
          processes: the index of this process, and how many there are.

        Raises:
          UserError: a source cannot be read, or there is too little text.
        """
        self._tokenizer = tokenizer
        self.data = load_text(config.text, config.data, tokenizer, *processes)
        self.data.require_rows(config.data.batch_size)
        self.rows = self.data.rows
        self._config = resolved(config, self.rows)
        self._plain = PlainFormat(tokenizer)
        self._prompts = {
            prompt: self._plain.encode_prompt([Turn("user", prompt)])
            for prompt in config.eval.text_prompts
        }
        self._check_prompts(longest)
        self.groups = self.data.groups
        self.origin = self.data.origin
        self.sha256 = self.data.sha256
        self.left_out = self.data.dropped.lines()
        self.lost = _count_lost(config.text, config.data, tokenizer)
        self.held_out_bytes = _bytes_of_whole_text(self.data, self.lost)

    def _check_prompts(self, longest: int) -> None:
        room = longest - self._config.eval.max_new_tokens
        for prompt, ids in self._prompts.items():
            if len(ids) > room:
                raise UserError(
                    f"config.eval.text_prompts has {prompt[:30]!r} of {len(ids)} "
                    f"tokens; with config.eval.max_new_tokens there is room for {room}"
                )

    def batches(self, mine: Sequence[int]) -> Batches:
        config = self._config
        return self.data.train_iterator(config.data.batch_size, config.seed, mine)

    def held_out(self, rows: int, mine: Sequence[int]) -> list[Batch]:
        return list(self.data.held_out_batches(rows, mine))

    def examine(self) -> list[Finding]:
        data = self.data
        findings = [Finding("data", f"{data.origin}, sha256 {data.sha256[:12]}")]
        findings += [
            Finding(
                f"source {name}",
                f"{counted(total.documents, 'document')}, "
                f"{counted(total.tokens, 'token')}, {counted(total.bytes, 'byte')} "
                f"({total.bytes / max(total.tokens, 1):.2f} a token)",
                numbers={
                    "documents": total.documents,
                    "tokens": total.tokens,
                    "bytes": total.bytes,
                },
            )
            for name, total in data.train.items()
        ]
        held = ", ".join(
            f"{name} {counted(n, 'byte')}"
            for name, n in data.held_out_bytes.items()
            if n
        )
        chosen = ""
        if self._config.text.held_out_share == BY_SIZE:
            share = f"{data.held_out_share:g} of the documents"
            chosen = f" ({share}, by size: config.text.held_out_share)"
        findings += [
            Finding(
                DROPPED,
                str(data.dropped) or "none",
                numbers=data.dropped.counts,
            ),
            Finding(
                "held out",
                f"{held or f'nothing: {NOT_EVALUATED}'}{chosen}",
                numbers=data.held_out_bytes,
            ),
            *self._examine_rows(self._first_batch),
            count_epochs(self._config, data.source_rows, data.shares),
        ]
        return findings

    @functools.cached_property
    def _first_batch(self) -> Batch:
        """As many rows as a step has. Streamed text is read and tokenised for it."""
        return self.data.sample_batch(self._config.data.batch_size)

    def _examine_rows(self, batch: Batch) -> list[Finding]:
        real = np.asarray(batch.segments) > 0
        share = float((batch.weights > 0)[real].mean())
        return [
            Finding(
                "trained tokens",
                f"{share:.1%} of the first {counted(batch.tokens.shape[0], 'row')}",
                ok=share > 0.5,
                remedy="pre-training counts nearly every token: this mask is broken",
                numbers={"share": share},
            ),
            examine_lost_text(self.lost, bits_per_byte=True),
        ]

    def preview(self, count: int) -> list[PreviewRow]:
        """The first rows in the order of the sources; at most a batch of them."""
        return preview_rows(
            jax.tree.map(lambda x: np.asarray(x)[:count], self._first_batch),
            self.groups,
            lambda ids: self._tokenizer.decode(ids, skip_control=False),
            lambda row, number: f"training row {row + 1}, document {number + 1}",
        )

    def sample(self, step: int, model: TextGenerator) -> list[Sample]:
        """Continues each of `config.eval.text_prompts`."""
        config = self._config.eval
        sampling = Sampling(
            temperature=TEMPERATURE,
            top_p=TOP_P,
            max_new_tokens=config.max_new_tokens,
            seed=self._config.seed,
        )
        answers = model.answers(
            [
                Request(tuple(ids), sampling, self._plain.stop_ids)
                for ids in self._prompts.values()
            ]
        )
        return [
            Sample(step, prompt, answer)
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]

    def asked(self) -> list[HeldOutPrompt]:
        """Nothing: raw text has no prompts with a reference answer."""
        return []

    def not_asked(self) -> list[str]:
        return []


def _count_lost(
    text: TextConfig, data: DataConfig, tokenizer: Tokenizer
) -> dict[str, LostText]:
    """Compares a sample from all over each source with what its ids stand for."""
    sources = open_sources(text, data)
    share = with_share(text, sources).held_out_share
    return {
        source.name: count_lost(
            tokenizer, sample_texts(source, COMPARED_LETTERS, share)
        )
        for source in sources
    }


def _bytes_of_whole_text(
    data: TextData, lost: Mapping[str, LostText]
) -> dict[str, int]:
    """Bytes of the evaluated text by source, where the ids stand for all of it."""
    sizes = data.held_out_bytes.items()
    return {name: n for name, n in sizes if lost[name].share <= TOLERATED_LOSS}


def _whole_texts(data: TextData, lost: Mapping[str, LostText]) -> WholeTexts:
    whole = _bytes_of_whole_text(data, lost)
    documents = [
        (name, size if name in whole else 0)
        for name, held in zip(data.groups, data.evaluated, strict=True)
        for size in held.sizes
    ]
    sources, sizes = zip(*documents, strict=True)
    return WholeTexts(sources, sizes, data.numbered_batches)


def _processes() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _load(config: Config, base: Base) -> TextTask:
    longest = base.architecture.max_position
    return TextTask(config, base.tokenizer, longest, _processes())


def _rows_of_files(config: Config, base: Base, files: str) -> EvaluationRows:
    """Every document of the files is evaluated, in order, as held-out ones are."""
    text = dataclasses.replace(
        config.text,
        sources=name_sources(files),
        mixture=(),
        held_out_share=1.0,
        held_out_bytes=sys.maxsize,
        cache=True,
    )
    data = load_text(text, config.data, base.tokenizer, *_processes(), "--data")
    sampled = dataclasses.replace(text, held_out_share=0.0)
    lost = _count_lost(sampled, config.data, base.tokenizer)
    return EvaluationRows(
        groups=data.groups,
        origin=data.origin,
        sha256=data.sha256,
        left_out=data.dropped.lines(),
        texts=_whole_texts(data, lost),
    )


def _held_out_rows(config: Config, base: Base) -> EvaluationRows | None:
    task = _load(config, base)
    data = task.data
    if not any(data.held_out_bytes.values()):
        return None
    return EvaluationRows(
        groups=task.groups,
        origin=f"held out of {task.origin}",
        sha256=task.sha256,
        left_out=task.left_out,
        texts=_whole_texts(data, task.lost),
    )


def _browse(config: Config, base: Base, first: int, count: int) -> RowPage | None:
    """Rows of text that is cached; those of a stream have no numbers."""
    data = load_text(config.text, config.data, base.tokenizer, *_processes())
    if data.counted is None:
        return None
    rows = preview_rows(
        data.counted.rows_from(first, count),
        data.groups,
        lambda ids: base.tokenizer.decode(ids, skip_control=False),
        lambda row, number: f"training row {first + row + 1}, document {number + 1}",
    )
    lengths = data.counted.row_lengths() + 1
    return RowPage(first, rows, lengths, data.counted.copies(), too_long=0)


KIND = TaskKind(
    load=_load,
    objective=CrossEntropy.of,
    rows_of_files=_rows_of_files,
    held_out_rows=_held_out_rows,
    browse=_browse,
    expected_groups=lambda config: len(config.text.sources),
    prompt_format=lambda config, base: PlainFormat(base.tokenizer),
    # The mark of a beginning, and at most one token a byte.
    longest_prompt=lambda config: max(
        (1 + len(text.encode()) for text in config.eval.text_prompts), default=1
    ),
    check=lambda config: check_text(config.text),
)
