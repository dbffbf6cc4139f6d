"""The texts of lm-evaluation-harness, put to a model of a run as training put its own.

The harness knows texts only. A conversation that it has rendered is remembered by its
text, so that its ids are those of training: control tokens in it are control tokens,
and those that a user wrote are letters.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.engine.requests import Request, Sampling
from research.engine.text_generation import TextGenerator
from research.evaluate.scored_continuations import (
    ContinuationScore,
    score_continuations,
)
from research.tasks.pretraining import PlainFormat
from research.tasks.task_protocol import PromptFormat
from research.tokenize.conversation import Turn

USUAL_TOKENS = 256  # of an answer, as in the harness
# Arguments of a generation task that are fields of `Sampling`, too.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class HarnessTexts:
    """A model that scores and continues texts.

    Attributes:
      longest: the tokens that a context and its continuation may have together.
      start: the id before a text without a context.
    """

    def __init__(self, model: TextGenerator, prompts: PromptFormat):
        """With the format of the prompts that the run was trained with."""
        self._model, self._prompts = model, prompts
        self._conversations: dict[str, tuple[int, ...]] = {}
        self._cut = False
        tokenizer = model.tokenizer
        self.longest = model.decoders.longest
        is_plain = isinstance(prompts, PlainFormat)
        marks = prompts.encode_text("") if is_plain else [tokenizer.bos, tokenizer.eos]
        self.start = next(mark for mark in marks if mark is not None)
        self.in_conversations = False

    def encode(self, text: str, with_start: bool = True) -> list[int]:
        """Ids of a text that is no conversation."""
        return self._prompts.encode_text(text, with_start)

    def render(self, messages: Sequence[Mapping[str, str]], answers: bool) -> str:
        """The text of a conversation, whose ids are remembered.

        Args:
          messages: objects with `role` and `content`.
          answers: whether an answer begins after the last one. Otherwise the last one
            is the beginning of the answer.

        Raises:
          UserError: the run continues texts, or its template refuses the conversation.
        """
        if isinstance(self._prompts, PlainFormat):
            raise UserError(
                "this run continues texts and has no chat template: start without "
                "--apply_chat_template"
            )
        turns = [Turn(message["role"], message["content"]) for message in messages]
        begun = "" if answers else turns.pop().text
        ids = (*self._prompts.encode_prompt(turns), *self.encode(begun, False))
        text = self._model.tokenizer.decode(ids, skip_control=False)
        if self._conversations.setdefault(text, ids) != ids:
            raise UserError(
                f"two conversations read {text!r}, and one has letters where the other "
                "has control tokens: the harness cannot tell them apart"
            )
        return text

    def conversation(self, text: str) -> list[int] | None:
        """Ids of a context: those of the conversation, or None without conversations.

        Raises:
          UserError: the context is no conversation that was rendered here.
        """
        if not self.in_conversations or not text:
            return None
        if text not in self._conversations:
            raise UserError(
                "a context is no conversation of this start: --cache_requests keeps "
                "texts without their ids, so start without it"
            )
        return [*self._conversations[text]]

    def score(
        self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[ContinuationScore]:
        """Yields the score of each continuation; long contexts lose their beginning."""
        return score_continuations(self._model, (self._fitting(*x) for x in pairs))

    def _fitting(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """The end of a pair, with at least one id as the context."""
        room = max(self.longest - len(continuation), 1)
        kept = self._end_of(context, room)
        return kept, self._end_of(continuation, self.longest - len(kept))

    def _end_of(self, ids: Sequence[int], room: int) -> Sequence[int]:
        if len(ids) > room and not self._cut:
            self._cut = True
            logging.warning(
                "harness: a text of %d tokens is longer than the %d that there is room "
                "for, so its beginning is dropped, as in the harness's own models",
                len(ids),
                room,
            )
        return ids[-room:]

    def answers(self, asked: Sequence[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
        """Yields the continuation of each context, in order.

        Args:
          asked: contexts with the arguments of their tasks, such as `until` and
            `max_gen_toks`.

        Raises:
          UserError: an argument is unknown or out of its range.
        """
        requests = [self._request(context, options) for context, options in asked]
        for answer in self._model.in_order(requests):
            yield answer.text()

    def _request(self, context: str, options: Mapping[str, Any]) -> Request:
        left = dict(options)
        until = left.pop("until", None) or []
        stop = [until] if isinstance(until, str) else until
        lengths = [left.pop(name, None) for name in LENGTHS]
        most = next((int(x) for x in lengths if x is not None), USUAL_TOKENS)
        sample = left.pop("do_sample", None)
        if sample is False:
            left.pop("temperature", None)
        given = {k: left.pop(k) for k in SAMPLING if left.get(k) is not None}
        if left := {name: value for name, value in left.items() if value is not None}:
            raise UserError(
                f"a task sets {', '.join(left)}, and the engine has until, do_sample, "
                f"{LENGTHS[0]}, {', '.join(SAMPLING)}: change it with --gen_kwargs"
            )
        if not 0 < most < self.longest:
            raise UserError(
                f"a task sets {LENGTHS[0]} to {most}, and the model's context is "
                f"{self.longest}: set another one with --gen_kwargs"
            )
        ids = self.conversation(context)
        if ids is None:
            ids = self.encode(context) or [self.start]
        return Request(
            tuple(self._end_of(ids, self.longest - most)),
            Sampling(max_new_tokens=most, **given),
            self._prompts.stop_ids,
            tuple(text for text in stop if text),
        )
