"""Pre-training: raw text by source, and what the model writes as it learns."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from research.config.run_config import Config
from research.core.atomic_files import write_whole
from research.core.errors import UserError
from research.data.batch_order import Batches
from research.data.text.row_layout import Layout
from research.data.text.tokenized_corpus import load_text
from research.data.token_batch import Batch
from research.engine.sampler import Sampling
from research.engine.text_generation import Model
from research.tokenize.conversation import Turn
from research.tokenize.tokenizer import Tokenizer
from research.train.doctor import Finding, epochs

SHOWN = 400  # characters of the first row
# Greedy samples of a small model repeat themselves; these vary, and stay likely.
TEMPERATURE, TOP_P = 0.8, 0.95


class PlainFormat:
    """A prompt is the beginning of a document, which the model goes on writing."""

    def __init__(self, tokenizer: Tokenizer):
        layout = Layout.of(tokenizer)
        self._tokenizer = tokenizer
        self._start = layout.start
        self.stop_ids = frozenset({layout.start, tokenizer.eos})

    def encode_prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]:
        """Ids of the last turn, after the mark that every document begins with."""
        [ids] = self._tokenizer.encode_texts([context + turns[-1].text])
        return [self._start, *ids]


class TextTask:
    """`config.text` as a `protocol.Task`."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        longest: int,
        processes: tuple[int, int],
    ):
        """Tokenises what is not yet.

        `longest` is the model's context; `processes` this one's index, and how many.

        Raises:
          UserError: a source cannot be read, or there is too little text.
        """
        self._config = config
        self._tokenizer = tokenizer
        self._data = load_text(config, tokenizer, *processes)
        self._plain = PlainFormat(tokenizer)
        self._prompts = {
            prompt: self._plain.encode_prompt([Turn("user", prompt)])
            for prompt in config.eval.text_prompts
        }
        self._check_prompts(longest)
        self.groups = self._data.groups
        self.origin = self._data.origin
        self.sha256 = self._data.sha256
        self.left_out = [f"{n} {why}" for why, n in self._data.left_out.items()]
        self.held_out_bytes = self._data.held_out_bytes

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
        return self._data.train_iterator(config.data.batch_size, config.seed, mine)

    def held_out(self, rows: int, mine: Sequence[int]) -> list[Batch]:
        return self._data.held_out_batches(rows, mine)

    def examine(self) -> list[Finding]:
        data = self._data
        findings = [Finding("data", f"{data.origin}, sha256 {data.sha256[:12]}")]
        findings += [
            Finding(
                f"source {name}",
                f"{total.documents:,} documents, {total.tokens:,} tokens, "
                f"{total.bytes:,} bytes ({total.bytes / max(total.tokens, 1):.2f} a "
                "token)",
            )
            for name, total in data.train.items()
        ]
        held = ", ".join(
            f"{name} {n:,} bytes" for name, n in data.held_out_bytes.items()
        )
        findings += [
            Finding("left out", ", ".join(self.left_out) or "none"),
            Finding("held out", held),
            *self._examine_rows(data.sample_batch(self._config.data.batch_size)),
        ]
        if data.rows:
            findings.append(epochs(self._config, data.rows))
        return findings

    def _examine_rows(self, batch: Batch) -> list[Finding]:
        real = np.asarray(batch.segments) > 0
        share = float((batch.weights > 0)[real].mean())
        # Text that is not encoded as it will be read back is not what was given.
        words = self._tokenizer.decode(np.asarray(batch.tokens)[0].tolist())
        again = self._tokenizer.decode(self._tokenizer.encode_texts([words])[0])
        return [
            Finding(
                "trained tokens",
                f"{share:.1%} of the first {batch.tokens.shape[0]} rows",
                ok=share > 0.5,
                remedy="pre-training counts nearly every token: this mask is broken",
            ),
            Finding(
                "tokenizer round trip",
                "the first row reads the same" if again == words else "text is lost",
                ok=again == words,
                remedy="the tokenizer does not give back its own text: choose another "
                "--config.text.tokenizer",
            ),
        ]

    def show_first_row(self, console: Console) -> None:
        tokens = self._data.sample_batch(1).tokens[0]
        words = self._tokenizer.decode(tokens.tolist(), skip_control=False)
        console.print(Text(f"first row, {SHOWN} characters of it:", "bold"))
        console.print(Text(words[:SHOWN], "dim"))

    def sample(self, step: int, model: Model, folder: Path) -> None:
        """Goes on writing each of `config.eval.text_prompts`; adds to samples.jsonl."""
        config = self._config.eval
        sampling = Sampling(
            TEMPERATURE, TOP_P, config.max_new_tokens, self._config.seed
        )
        lines = []
        for prompt, ids in self._prompts.items():
            text = model.answer(ids, sampling, self._plain.stop_ids)
            lines.append({"step": step, "prompt": prompt, "text": text})
        # Every process must compute; one of them writes.
        if jax.process_index() == 0:
            write_samples(folder, step, lines)

    def conclude(
        self,
        console: Console,
        base: Callable[[], Model | None],
        model: Model,
        folder: Path,
    ) -> list[str]:
        said: list[str] = []
        by_prompt: dict[str, list[dict[str, Any]]] = {}
        for line in read_samples(folder):
            by_prompt.setdefault(line["prompt"], []).append(line)
        for prompt, lines in by_prompt.items():
            said += ["", f"## What it writes after `{prompt!r}`", ""]
            shown = Text()
            for line in lines:
                shown.append(f"step {line['step']}\n", "bold")
                shown.append(prompt, "dim")
                shown.append(line["text"] + "\n\n")
                fenced = (prompt + line["text"]).replace("```", "'''")
                said += [f"Step {line['step']}:", "", "```", fenced, "```", ""]
            console.print(Panel(shown, title="samples", title_align="left"))
        return said


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """The lines of samples.jsonl, `step`, `prompt` and `text` in each."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_samples(folder: Path, step: int, lines: list[dict[str, Any]]) -> None:
    """Adds the samples of `step`; those of a step done again replace the old ones."""
    kept = [line for line in read_samples(folder) if line["step"] < step]
    text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in kept + lines)
    write_whole(folder / "samples.jsonl", text)
