"""Text from a job: the base model's and the tuned model's, side by side."""

from collections.abc import Iterator
from typing import Any

import jax

from research import jobs
from research.base import Base
from research.config import Config
from research.data.chat import ChatFormat
from research.data.loader import Dataset
from research.data.records import Record
from research.data.tokenizer import Tokenizer
from research.report import Answer
from research.sampling import Sampler, Sampling
from research.step import Job

Params = dict[str, Any]


def make_samplers(
    job: Job, base: Base, params: Params, frozen: Params
) -> dict[str, Sampler]:
    """`tuned`, and `base`: what is frozen, or read again where nothing is."""
    dtype = job.model.options.dtype
    tuned = job.trainable.forward(params, frozen, None)
    if not frozen:
        tuned = jax.tree.map(lambda x: x.astype(dtype), tuned)
    original = frozen or jobs.load_base(job, base, dtype)
    return {"base": Sampler(job.model, original), "tuned": Sampler(job.model, tuned)}


def stream_text(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pieces of text as ids come; waits until a character is whole."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if text.endswith("\ufffd"):
            continue
        yield text[len(shown) :]
        shown = text
    rest = tokenizer.decode(seen)
    if len(rest) > len(shown):
        yield rest[len(shown) :]


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


def answer_prompts(
    config: Config,
    job: Job,
    base: Base,
    chat: ChatFormat,
    dataset: Dataset,
    params: Params,
    frozen: Params,
) -> list[Answer]:
    """Greedy answers of both models to held-out prompts."""
    samplers = make_samplers(job, base, params, frozen)
    sampling = Sampling(max_new_tokens=config.eval.max_new_tokens)
    answers = []
    # A context that training cut to fit may be too long to be asked about in full.
    room = job.model.architecture.max_position - sampling.max_new_tokens
    prompts = {
        record.where: chat.encode_prompt(record.turns[:-1], record.context)
        for record in dataset.held_out_records
    }
    fitting = [r for r in dataset.held_out_records if len(prompts[r.where]) <= room]
    for record in pick_records(fitting, config.eval.prompts):
        *asked, reference = record.turns
        prompt = prompts[record.where]
        texts = {
            name: base.tokenizer.decode(
                list(sampler.stream(prompt, sampling, chat.stop_ids))
            ).strip()
            for name, sampler in samplers.items()
        }
        shown = asked[-1].text + (f"\n\n{record.context}" if record.context else "")
        answers.append(
            Answer(
                record.category or "(none)",
                shown,
                texts["base"],
                texts["tuned"],
                reference.text,
            )
        )
    return answers
