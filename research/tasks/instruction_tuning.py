"""Instruction tuning: rows of requests and answers, and three of them asked again."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from research.config.run_config import Config
from research.data.instructions.instruction_dataset import (
    BatchIterator,
    eval_batches,
    load_dataset,
)
from research.data.token_batch import Batch
from research.engine.sampler import Sampling
from research.engine.text_generation import Model
from research.report import run_report
from research.tokenize.chat_template import ChatFormat
from research.tokenize.conversation import Record
from research.tokenize.tokenizer import Tokenizer
from research.train.doctor import Finding, count_mask, epochs

SHOWN = 4  # left-out rows in the doctor's table


class InstructionTask:
    """`config.data` as a `protocol.Task`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, longest: int):
        """Reads, tokenises and packs; `longest` is the model's context.

        Raises:
          UserError: the data cannot be read, or nothing is left to train on.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._longest = longest
        self._chat = ChatFormat(tokenizer, config.data.template, config.data.system)
        self._data = load_dataset(config, self._chat)
        self.groups = self._data.categories
        rows = self._data.rows
        self.origin = f"{rows.origin}, {len(rows.records)} rows"
        self.sha256 = rows.sha256
        self.left_out = self._data.examples
        self.held_out_bytes: dict[str, int] = {}
        # Runs that train together and share their rows ask the base model once.
        self._base_said: dict[str, str] = {}

    def batches(self, mine: Sequence[int]) -> BatchIterator:
        config = self._config
        return BatchIterator(
            self._data.train, config.data.batch_size, config.seed, mine
        )

    def held_out(self, rows: int, mine: Sequence[int]) -> list[Batch]:
        return eval_batches(self._data.held_out, rows, mine)

    def examine(self) -> list[Finding]:
        data, train = self._data, self._data.train
        categories = ", ".join(
            f"{name or '(none)'} {n}" for name, n in data.rows.categories().items()
        )
        return [
            Finding("data", f"{data.rows.origin}, sha256 {data.rows.sha256[:12]}"),
            Finding("rows", f"{len(data.rows.records)}: {categories}"),
            Finding("left out", self._left_out()),
            Finding(
                "split",
                f"{len(train.documents)} documents train in {len(train.rows)} rows of "
                f"{train.seq_len} ({train.fill:.1%} full), "
                f"{len(data.held_out.documents)} held out",
            ),
            *self._examine_mask(),
            epochs(self._config, len(train.rows)),
        ]

    def _left_out(self) -> str:
        data = self._data
        counts = [f"{n} {why}" for why, n in sorted(data.dropped.items())]
        counts += [f"{data.truncated} contexts truncated"] * (data.truncated > 0)
        told = "".join(f"\n  {example}" for example in data.examples[:SHOWN])
        more = len(data.examples) - SHOWN
        told += f"\n  and {more} more, see left_out.txt in the run directory" * (
            more > 0
        )
        return (", ".join(counts) or "none") + told

    def _examine_mask(self) -> list[Finding]:
        train = self._data.train
        parts = [train.rows[i : i + 64] for i in range(0, len(train.rows), 64)]
        mask = count_mask(map(train.batch, parts), self._chat.stop_ids)
        share = mask.trained / max(mask.real, 1)
        return [
            Finding(
                "trained tokens",
                f"{mask.trained:,} of {mask.real:,} ({share:.1%})",
                ok=0.0 < share < 1.0,
                remedy="a share of 0 or 1 means the loss mask is broken: check "
                "config.data.template and the columns",
            ),
            Finding(
                "end token",
                f"trained in {mask.ends:,} of {mask.documents:,} documents",
                ok=mask.ends == mask.documents,
                remedy="an answer whose end is not trained never stops: check the "
                "tokenizer's eos token and config.data.template",
            ),
        ]

    def show_first_row(self, console: Console) -> None:
        """What is trained stands in green between brackets."""
        train, text = self._data.train, Text()
        for index in train.rows[0]:
            document = train.documents[index]
            edges = np.flatnonzero(np.diff(document.trained)) + 1
            for ids, mask in zip(
                np.split(document.ids, edges),
                np.split(document.trained, edges),
                strict=True,
            ):
                words = self._tokenizer.decode(ids.tolist(), skip_control=False)
                if mask[0]:
                    text.append("[[" + words + "]]", "bold green")
                else:
                    text.append(words, "dim")
            text.append("\n" + "-" * 8 + "\n", "dim")
        console.print(Text("first packed row, [[trained]] tokens marked:", "bold"))
        console.print(text)

    def sample(self, step: int, model: Model, folder: Path) -> None:
        """Nothing: answers are compared at the end."""

    def conclude(
        self,
        console: Console,
        base: Callable[[], Model | None],
        model: Model,
        folder: Path,
    ) -> list[str]:
        answers = self._answer(base(), model)
        run_report.show_answers(console, answers)
        return run_report.answers_as_markdown(answers)

    def _answer(self, base: Model, tuned: Model) -> list[run_report.Answer]:
        """Greedy answers of both models to held-out prompts."""
        sampling = Sampling(max_new_tokens=self._config.eval.max_new_tokens)
        records = self._data.held_out_records
        # A context that training cut to fit may be too long to be asked in full.
        room = self._longest - sampling.max_new_tokens
        prompts = {
            record.where: self._chat.encode_prompt(record.turns[:-1], record.context)
            for record in records
        }
        fitting = [r for r in records if len(prompts[r.where]) <= room]
        answers = []
        for record in pick_records(fitting, self._config.eval.prompts):
            *asked, reference = record.turns
            ask = prompts[record.where], sampling, self._chat.stop_ids
            if record.where not in self._base_said:
                self._base_said[record.where] = base.answer(*ask).strip()
            told = self._base_said[record.where], tuned.answer(*ask).strip()
            shown = asked[-1].text + (f"\n\n{record.context}" if record.context else "")
            category = record.category or "(none)"
            answers.append(run_report.Answer(category, shown, *told, reference.text))
        return answers


def pick_records(records: list[Record], count: int) -> list[Record]:
    """The first record of each category in turn, until there are `count`."""
    by_category: dict[str, list[Record]] = {}
    for record in records:
        by_category.setdefault(record.category, []).append(record)
    picked: list[Record] = []
    depth = 0
    while len(picked) < min(count, len(records)):
        for category in sorted(by_category):
            rows = by_category[category]
            if depth < len(rows) and len(picked) < count:
                picked.append(rows[depth])
        depth += 1
    return picked
