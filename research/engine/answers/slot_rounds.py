"""The answers in the slots of a decoder, from one round of tokens to the next."""

import time
from collections.abc import Callable

import jax
import numpy as np

from research.core.errors import LonelyError
from research.engine.adapter_names import AdapterNames
from research.engine.answers.answer_progress import AnswerProgress
from research.engine.answers.engine_counts import EngineCounts
from research.engine.followed_decoder import LeadingDecoder
from research.engine.prefix_cache import PrefixCache, chunk_keys
from research.engine.requests import Piece
from research.engine.slot_decoder import Round, SlotDecoder


class SlotRounds:
    """Fills slots with answers, writes their prompts, and takes their tokens.

    A round is computed while the tokens of the round before become text and leave: the
    devices wait for nobody. Only the thread that takes the rounds calls the methods.

    Attributes:
      tasks: what each slot does; None for a free one. Any thread may read it.
      prefixes: beginnings of prompts.
    """

    def __init__(
        self,
        decoder: SlotDecoder | LeadingDecoder,
        prefixes: PrefixCache,
        names: AdapterNames,
        counts: EngineCounts,
        prompts_first: bool = False,
    ):
        """No slot is in use. See `Engine` for `prompts_first`."""
        self.tasks: list[AnswerProgress | None] = [None] * decoder.slots
        self._decoder, self.prefixes = decoder, prefixes
        self._names, self._counts = names, counts
        self._prompts_first = prompts_first
        self._number = 0
        # A round that is being computed, and the answers that get its tokens.
        self._under_way: tuple[list[AnswerProgress], Round | None] = [], None

    def admit(self, slot: int, task: AnswerProgress) -> None:
        """Gives a free slot to an answer."""
        self.tasks[slot], task.slot = task, slot
        task.answer.admitted_at = time.monotonic()
        self._guarded(task, self._prepare)

    def write_prompts(self) -> int:
        """Writes a part of a long prompt or several short ones; none waits for ever.

        With `prompts_first` it writes all of them.

        Returns how many prompts were not written before.
        """
        self._number += 1
        tasks = [task for task in self.tasks if task and not task.decodes]
        room = self._decoder.chunk
        for task in sorted(tasks, key=lambda task: task.due):
            if self._prompts_first:
                self._guarded(task, self._write_all)
                continue
            if (room := room - self._decoder.size(task.unwritten)) < 0:
                break
            self._guarded(task, self._write_part)
        return len(tasks)

    def take_tokens(self) -> int:
        """Starts a round of all slots that answer, and delivers the round before.

        Returns how many answers had a part in either.
        """
        tasks, result = self._under_way
        self._under_way = [], None
        found = self._decoder.read(result) if tasks else None
        # The next token of a constrained answer depends on this one.
        first = [task for task in tasks if task.request.constraint]
        later = [task for task in tasks if not task.request.constraint]
        for task in first:
            self._take(task, found)
        done = {task for task in later if not found.active[task.slot]}
        for task in self._answering():
            if task.request.constraint:
                self._guarded(task, self._constrain)
        if going := [task for task in self._answering() if task not in done]:
            self._under_way = going, self._decoder.launch()
        for task in later:
            self._take(task, found)
        return len(tasks) + len(going)

    def end(
        self,
        task: AnswerProgress,
        piece: Piece,
        error: Exception | None = None,
        *,
        is_lost: bool = False,
    ) -> None:
        """Frees the slot of an answer, if it has one, and delivers its last piece.

        With `is_lost` the decoder has failed, and is not called.
        """
        if task.ended:
            return
        task.ended = True
        if task.slot >= 0:
            self.tasks[task.slot] = None
            if not is_lost:
                self._decoder.free(task.slot)
        self._names.release(task.adapter)
        self._counts.ended(task, piece.finish)
        task.answer.failure = error
        task.answer.deliver(piece)

    def _prepare(self, task: AnswerProgress) -> None:
        prompt, chunk = task.request.prompt, self._decoder.chunk
        self._decoder.admit(task.slot, task.settings())
        if task.read:
            count = task.read.k.shape[3]
            if count < len(prompt) - 1:
                count -= count % chunk
            read = jax.tree.map(lambda x: x[:, :, :, :count], task.read)
            self._decoder.write_prompt(task.slot, read)
            task.written, task.read = count, None
        elif self.prefixes.capacity:
            task.keys = chunk_keys(task.adapter.identity, prompt[:-1], chunk)
            # Scores of the prompt come from the same pass over it.
            blocks = self.prefixes.find(task.keys[: task.unscored // chunk])
            for index, block in enumerate(blocks):
                self._decoder.write_block(task.slot, index, block)
            task.written = task.cached = len(blocks) * chunk
        task.due = self._number + -(-task.unwritten // chunk)
        self._counts.prepared(task)
        if not task.unwritten:
            self._begin(task)

    def _write_all(self, task: AnswerProgress) -> None:
        while task.unwritten:
            self._write_part(task)

    def _write_part(self, task: AnswerProgress) -> None:
        part, following = task.next_part(self._decoder.chunk)
        if task.written + len(part) > task.unscored:
            top = task.request.top_logprobs or 0
            scores = self._decoder.score(task.slot, part, following, top)
            task.add_scores(scores, following)
        else:
            self._decoder.extend(task.slot, part)
        task.written += len(part)
        if not task.unwritten:
            self._begin(task)

    def _begin(self, task: AnswerProgress) -> None:
        """The prompt is written, and the answer begins."""
        slot = task.slot
        self.prefixes.add(task.keys, lambda i: self._decoder.read_block(slot, i))
        if task.request.sampling.max_new_tokens == 0:
            self.end(task, task.piece(finish="length"))
            return
        self._decoder.start(slot, task.request.prompt[-1])
        task.decodes = True

    def _answering(self) -> list[AnswerProgress]:
        return [task for task in self.tasks if task and task.decodes]

    def _constrain(self, task: AnswerProgress) -> None:
        allowed = task.request.constraint.allowed()
        self._decoder.constrain(task.slot, np.asarray(allowed))

    def _take(self, task: AnswerProgress, found: Round) -> None:
        """Delivers what an answer got, unless it has ended since the round began."""
        if not task.ended:
            self._guarded(task, lambda task: self._deliver(task, task.take(found)))

    def _deliver(self, task: AnswerProgress, piece: Piece) -> None:
        self._counts.delivered(len(piece.ids))
        if piece.finish:
            self.end(task, piece)
        else:
            task.answer.deliver(piece)

    def _guarded(
        self, task: AnswerProgress, action: Callable[[AnswerProgress], None]
    ) -> None:
        """Does something for one task; what it raises ends that task alone."""
        try:
            action(task)
        except LonelyError:  # Without the other processes none can be answered.
            raise
        except Exception as error:
            self.end(task, Piece(finish="error", error=str(error)), error)
