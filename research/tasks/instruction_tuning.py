"""Instruction tuning: only answers are trained; some are compared at the end."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

from research.config.data_knobs import BY_SIZE
from research.config.run_config import Config
from research.core.visible_text import counted
from research.data.batch_order import Batches
from research.data.instructions.instruction_dataset import (
    eval_batches,
    load_dataset,
    training_batches,
)
from research.data.instructions.unused_columns import describe_unused, needs_look
from research.data.token_batch import Batch
from research.engine.requests import Request, Sampling
from research.engine.text_generation import TextGenerator
from research.formats.base_model import Base
from research.tasks.epochs import count_epochs, resolved
from research.tasks.findings import (
    DROPPED,
    NOT_EVALUATED,
    SYSTEM,
    Finding,
    MaskCount,
    count_mask,
    examine_lost_text,
)
from research.tasks.instruction_rows import (
    browse_rows,
    chat_format,
    held_out_rows,
    rows_of_files,
    training_records,
)
from research.tasks.model_answers import HeldOutPrompt, Sample, lack_of_room
from research.tasks.row_preview import PreviewRow, preview_rows
from research.tasks.task_protocol import TaskKind
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.tokenize.chat_template import (
    with_template_args,
    written_template,
)
from research.tokenize.conversation import Record
from research.tokenize.default_system import with_default_system
from research.tokenize.lost_text import count_lost
from research.tokenize.tokenizer import Tokenizer

# Dolly's. Only the rows tell their number, and two small sums alone have this shape.
CATEGORIES = 8
# So much of a sampled text is compared with what its ids stand for.
COMPARED_LETTERS = 10_000
# If there are more rows, the documents are counted, not the batches they fill.
COUNTED_ROWS = 4096
SHOWN = 4  # dropped rows in the doctor's table
MUCH_LOST = 0.05  # share of the rows dropped or cut, from which a user should look
MOST_UNUSED = 12  # columns in the table


class InstructionTask:
    """The `Task` of `config.data`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, longest: int):
        """Reads, tokenises and packs; `longest` is the model's context.

        Raises:
          UserError: the data cannot be read, or nothing is left to train on.
        """
        self._tokenizer = tokenizer
        self._longest = longest
        self._chat = chat_format(config, tokenizer)
        self._data = load_dataset(config.data, config.seed, self._chat, config.text)
        self.rows = len(self._data.train.rows)
        self._config = resolved(config, self.rows)
        self.groups = self._data.categories
        counts = self._data.counts
        self.origin = f"{self._data.origin}, {counted(counts.total, 'row')}"
        self.sha256 = counts.sha256
        self.left_out = self._data.examples
        self.held_out_bytes: dict[str, int] = {}

    def batches(self, mine: Sequence[int]) -> Batches:
        config = self._config
        return training_batches(
            self._data.train, config.data.batch_size, config.seed, mine
        )

    def held_out(self, rows: int, mine: Sequence[int]) -> list[Batch]:
        return list(eval_batches(self._data.held_out, rows, mine))

    def examine(self) -> list[Finding]:
        data, train, counts = self._data, self._data.train, self._data.counts
        categories = ", ".join(
            f"{name or '(none)'} {n}" for name, n in counts.categories.items()
        )
        lost = sum(counts.dropped.values()) + counts.truncated
        return [
            Finding("data", f"{data.origin}, sha256 {counts.sha256[:12]}"),
            Finding(
                "rows",
                f"{counts.total}: {categories}",
                numbers={"rows": counts.total},
            ),
            Finding("columns", self._schemas(), numbers=counts.schemas),
            self._examine_unused(),
            Finding(
                DROPPED,
                self._dropped(),
                numbers={**counts.dropped, "truncated": counts.truncated},
                warns=lost > MUCH_LOST * counts.total,
            ),
            Finding(
                "split",
                f"{counted(len(train.documents), 'document')} for training in "
                f"{counted(len(train.rows), 'row')} of {train.seq_len} "
                f"({train.fill:.1%} full), {self._held()}; copies of other rows: "
                f"{counts.copies:,}",
                numbers={
                    "copies": counts.copies,
                    "train_documents": len(train.documents),
                    "train_rows": len(train.rows),
                    "fill": train.fill,
                    "held_out_documents": len(data.held_out.documents),
                },
            ),
            *self._examine_mask(),
            self._examine_tokenizer(),
            Finding(
                "chat template",
                "\n".join(self._chat.notes) or "writes each answer as it asks for it",
            ),
            *self._find_system(),
            count_epochs(self._config, {"rows": self.rows}, {"rows": 1.0}),
        ]

    def _find_system(self) -> list[Finding]:
        """The system text if the rows have one and the same, with which to ask later.

        Thousands of rows may have as many; a sample from all over them tells.
        """
        own = self._config.data.system
        fronts = [record.turns[0] for record in self._data.sample]
        texts = {turn.text if turn.role == "system" else own for turn in fronts}
        return [Finding(SYSTEM, text) for text in texts if text and len(texts) == 1]

    def _held(self) -> str:
        data, count = self._config.data, len(self._data.held_out.documents)
        chosen = data.held_out == BY_SIZE and not data.eval_path
        how = " (by the number of rows: config.data.held_out)" if chosen else ""
        if data.eval_path:
            how = f", those of {data.eval_path}"
        return f"{count} held out{how}" + ("" if count else f": {NOT_EVALUATED}")

    def _schemas(self) -> str:
        rows = self._data.counts
        lines = [
            ", ".join(f"{k} in {counted(n, 'row')}" for k, n in rows.schemas.items())
        ]
        lines += [f"  {note} ({counted(n, 'time')})" for note, n in rows.notes.items()]
        return "\n".join(lines)

    def _examine_unused(self) -> Finding:
        unused, ignored = self._data.counts.unused, self._config.data.columns.ignored
        lines = describe_unused(unused)
        if len(lines) > MOST_UNUSED:
            lines[MOST_UNUSED:] = [f"and {len(lines) - MOST_UNUSED} more"]
        if ignored:
            lines.append(f"ignored, as config.data.columns says: {', '.join(ignored)}")
        return Finding(
            "unused columns",
            "\n".join(lines) or "none is filled",
            warns=any(needs_look(*each) for each in unused.items()),
            numbers={name: each["rows"] for name, each in unused.items()},
        )

    def _dropped(self) -> str:
        counts, examples = self._data.counts, self._data.examples
        parts = [f"{n} {why}" for why, n in sorted(counts.dropped.items())]
        if counts.truncated:
            parts.append(f"{counted(counts.truncated, 'context')} truncated")
        lines = [", ".join(parts) or "none"]
        if counts.truncated or "too long" in counts.dropped:
            lines[0] += "; a larger config.data.seq_len keeps them whole"
        lines += [f"  {example}" for example in examples[:SHOWN]]
        more = len(examples) - SHOWN
        if more > 0:
            lines.append(f"  and {more} more, see left_out.txt in the run directory")
        return "\n".join(lines)

    def _examine_mask(self) -> list[Finding]:
        train = self._data.train
        if len(train.rows) <= COUNTED_ROWS:
            parts = [train.rows[i : i + 64] for i in range(0, len(train.rows), 64)]
            mask = count_mask(map(train.batch, parts), self._chat.stop_ids)
        else:
            mask = MaskCount(
                train.real_tokens,
                train.trained_tokens,
                len(train.documents),
                train.documents.count_ends(self._chat.stop_ids),
            )
        share = mask.trained / max(mask.real, 1)
        return [
            Finding(
                "trained tokens",
                f"{mask.trained:,} of {mask.real:,} ({share:.1%})",
                ok=0.0 < share < 1.0,
                remedy="a share of 0 or 1 means the loss mask is broken: check "
                "config.data.template and the columns",
                numbers={"trained": mask.trained, "real": mask.real},
            ),
            Finding(
                "end token",
                f"trained in {mask.ends:,} of {counted(mask.documents, 'document')}",
                ok=mask.ends == mask.documents,
                remedy="an answer whose end is not trained never stops: check the "
                "tokenizer's eos token and config.data.template",
                numbers={"trained": mask.ends, "documents": mask.documents},
            ),
        ]

    def _examine_tokenizer(self) -> Finding:
        texts = (
            text[:COMPARED_LETTERS]
            for record in self._data.sample
            for text in (record.context, *(turn.text for turn in record.turns))
        )
        lost = {"the rows": count_lost(self._tokenizer, texts)}
        return examine_lost_text(lost, bits_per_byte=False)

    def preview(self, count: int) -> list[PreviewRow]:
        found = self._previewed(self._data.train.rows[:count])
        of_schema = self._data.of_schema
        if len(of_schema) > 1:
            for schema, documents in of_schema.items():
                alone = self._previewed([[number] for number in documents])
                found += [dataclasses.replace(row, schema=schema) for row in alone]
        return found

    def _previewed(self, rows: list[list[int]]) -> list[PreviewRow]:
        train = self._data.train
        return preview_rows(
            train.batch(rows),
            self.groups,
            lambda ids: self._tokenizer.decode(ids, skip_control=False),
            lambda row, number: train.documents.where(rows[row][number]),
        )

    def sample(self, step: int, model: TextGenerator) -> list[Sample]:
        """Greedy answers to the held-out prompts that the report shows."""
        if step == self._config.steps:
            return []  # The report has the same answers in a moment.
        prompts = self.asked()[: self._config.eval.prompts]
        answers = model.answers([prompt.request for prompt in prompts])
        return [
            Sample(step, prompt.text, answer.strip())
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def asked(self) -> list[HeldOutPrompt]:
        """Held-out rows of each category in turn, those that the report shows first."""
        config, prompts = self._config.eval, self._prompts
        sampling = Sampling(max_new_tokens=config.max_new_tokens)
        lacks = self._lacks_room
        fitting = [r for r in self._data.held_out_records if not lacks[r.where]]
        return [
            HeldOutPrompt(
                record,
                _prompt_text(record),
                Request(tuple(prompts[record.where]), sampling, self._chat.stop_ids),
            )
            for record in pick_records(
                fitting, max(config.prompts, config.answers_rows)
            )
        ]

    def not_asked(self) -> list[str]:
        config = self._config.eval
        if not max(config.prompts, config.answers_rows):
            return []
        return [f"{where}: {why}" for where, why in self._lacks_room.items() if why]

    @functools.cached_property
    def _prompts(self) -> dict[str, list[int]]:
        """The ids of each held-out row's prompt, by `file:line`."""
        return {
            record.where: self._chat.encode_prompt(record.turns[:-1], record.context)
            for record in self._data.held_out_records
        }

    @property
    def _lacks_room(self) -> dict[str, str]:
        """Why a held-out row cannot be asked, by `file:line`; "" if it can.

        Training may have cut a context to fit; as a prompt it can still be too long.
        """
        answer = self._config.eval.max_new_tokens
        return {
            where: lack_of_room(len(ids), self._longest, answer)
            for where, ids in self._prompts.items()
        }


def _prompt_text(record: Record) -> str:
    """All turns before the answer, and the row's context below the first of the user.

    A turn names its role where there are several.
    """
    turns = record.turns[:-1]
    texts = [f"{x.role}: {x.said}" if len(turns) > 1 else x.said for x in turns]
    if record.context:
        texts[[turn.role for turn in turns].index("user")] += f"\n\n{record.context}"
    return "\n\n".join(texts)


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


def _exported_tokenizer(config: Config, base: Base, system: str) -> Tokenizer:
    template = written_template(config.data.template, base.tokenizer)
    template = with_template_args(template, config.data.template_args)
    chat = chat_format(config, base.tokenizer)
    # In a template, the text of a control token is that token.
    added = {token[0] for token in base.tokenizer.find_added(system)}
    if added & base.tokenizer.control_ids:
        logging.warning(
            "export: the system text of training holds a control token, so the chat "
            "template does not write it; send it with each conversation"
        )
    elif system:
        template = with_default_system(template, system, chat.takes_system)
    return base.tokenizer.with_chat_template(template, sorted(chat.stop_ids))


KIND = TaskKind(
    load=lambda config, base: InstructionTask(
        config, base.tokenizer, base.architecture.max_position
    ),
    rows_of_files=rows_of_files,
    held_out_rows=held_out_rows,
    training_records=training_records,
    browse=browse_rows,
    objective=CrossEntropy.of,
    expected_groups=lambda config: CATEGORIES,
    prompt_format=lambda config, base: chat_format(config, base.tokenizer),
    exported_tokenizer=_exported_tokenizer,
)
