"""A chat template that is cut into its own words and holes for the texts of the turns.

Only the words are searched for control tokens, and no text of a row is among them, so
no row can forge structure; the loss mask follows from where a part stands. Text and
words between two control tokens are tokenised in one piece, as transformers does it.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

from research.core.errors import UserError
from research.tokenize.conversation import CALLS, Turn
from research.tokenize.templates.template_holes import CLOSE, HOLE, OPEN, THOUGHT
from research.tokenize.templates.template_process import BEGIN_BLOCK, END_BLOCK
from research.tokenize.templates.template_tools import check_tools, end_of_calls
from research.tokenize.tokenizer import Before, Tokenizer

BLOCK_EDGE = re.compile(f"([{BEGIN_BLOCK}{END_BLOCK}])")
Render = Callable[[Sequence[Turn], bool], str]


@dataclasses.dataclass(frozen=True)
class Part:
    """A control token, or what stands between two of them.

    Attributes:
      ids: of the control token, or of words alone; None if there are holes.
      pieces: words of the template, and holes.
      before: what stands in front of it.
      trained: whether its ids count in the loss.
    """

    ids: tuple[int, ...] | None
    pieces: tuple[str, ...]
    before: Before
    trained: bool

    def fill(self, texts: Mapping[str, str]) -> str:
        """Its text, given the texts by hole."""
        return "".join(texts.get(piece, piece) for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A conversation as parts.

    Attributes:
      parts: up to the last trained one.
      notes: what a user should know, in sentences.
    """

    parts: tuple[Part, ...]
    notes: tuple[str, ...]


def cut_prompt(
    render: Render, tokenizer: Tokenizer, turns: Sequence[Turn]
) -> tuple[Part, ...]:
    """The parts up to where the answer to the last of the hidden `turns` begins.

    Raises:
      UserError: the template cannot be used.
    """
    text, _ = _find_blocks(render(turns, True))
    _check_holes(text, turns)
    # Earlier answers are cut off where training cuts them off.
    asked = [_prompt_before(render, turns, index) for index in _answers(turns)]
    edges = [(len(prompt),) * 2 for prompt in asked if text.startswith(prompt)]
    return _parts(text, edges, tokenizer)


def cut_conversation(
    render: Render, tokenizer: Tokenizer, turns: Sequence[Turn]
) -> Cut:
    """The parts of a conversation of hidden turns.

    An answer starts where the generation prompt ends, because the model will have to
    write everything from there on, and ends with a control token. If the template has
    `{% generation %}` blocks, only what they hold is trained, and the end.

    Raises:
      UserError: the template drops a message, tools or their calls, asks for an answer
        in other words than it writes before one, or writes no control token after one.
    """

    def plain(turns: Sequence[Turn]) -> str:
        return _find_blocks(render(turns, False))[0]

    check_tools(plain, turns)
    text, blocks = _find_blocks(render(turns, False))
    _check_holes(text, turns)
    answers = _answers(turns)
    trained: list[tuple[int, int]] = []
    notes = []
    for index in answers:
        calls = CALLS in turns[index].read_fields()
        called = end_of_calls(plain, turns, index) if calls else 0
        prompt = _prompt_before(render, turns, index)
        if not turns[index].trained and text.startswith(prompt):
            trained.append((len(prompt),) * 2)  # Cut off as an earlier answer is.
        if not turns[index].trained:
            continue
        if not text.startswith(prompt):
            if index != answers[-1]:
                notes.append(
                    "answers before the last one are not trained where the chat "
                    "template writes them otherwise than it asks for an answer"
                )
                continue
            text = _open_thought(render, text, prompt, turns)
            blocks = []
            notes.append(
                "the chat template opens a thought for each answer; an answer without "
                "one is trained with an empty thought"
            )
        elif not _holes_of(turns[index].text) <= _holes_of(text):
            notes.append("the chat template drops the thoughts of answers")
        ends = [m.end() for m in HOLE.finditer(text) if _is_of(m[0], index)]
        span = (len(prompt), max([called, *ends]))
        ends_in_call = called > max([0, *ends])
        trained += _answer_spans(text, span, blocks, tokenizer, ends_in_call)
    last = max((end for start, end in trained if start < end), default=0)
    if not last:
        raise UserError(
            "the chat template marks no part of the answer with {% generation %}; use "
            "--config.data.template=dolly"
        )
    parts = _parts(text[:last], trained, tokenizer)
    return Cut(parts, tuple(notes))


def _find_blocks(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks of generation blocks, and where the blocks are."""
    text, edges = "", []
    for piece in BLOCK_EDGE.split(rendered):
        if BLOCK_EDGE.fullmatch(piece):
            edges.append(len(text))
        else:
            text += piece
    return text, list(zip(edges[::2], edges[1::2], strict=False))


def _answers(turns: Sequence[Turn]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn.role == "assistant"]


def _prompt_before(render: Render, turns: Sequence[Turn], index: int) -> str:
    return _find_blocks(render(turns[:index], True))[0]


def _is_of(hole: str, index: int) -> bool:
    return hole.startswith(f"{OPEN}{index}.")


def _holes_of(text: str) -> set[str]:
    return {*HOLE.findall(text)}


def _check_holes(text: str, turns: Sequence[Turn]) -> None:
    """Raises UserError if a turn's text is not written once; a thought may be lost."""
    found = HOLE.findall(text)
    for turn in turns:
        own = HOLE.findall(turn.text)
        if own and own[-1] not in found and CALLS in turn.read_fields():
            raise UserError(
                "the chat template drops the text of a message that calls a tool; drop "
                "that text, or take a base model whose template writes both"
            )
        if any(found.count(h) > 1 for h in own) or (own and own[-1] not in found):
            raise UserError(
                f"the chat template does not write the {turn.role} message of "
                f"{' '.join(t.role for t in turns[:8])} exactly once; use "
                "--config.data.template=dolly"
            )


def _open_thought(render: Render, text: str, prompt: str, turns: Sequence[Turn]) -> str:
    """The conversation as a prompt that opens a thought, and the answer behind it.

    The template drops the thought of an answer, or does not open one. An answer
    without a thought gets an empty one, as Qwen3's template writes it.

    Raises:
      UserError: the prompt differs in another way.
    """
    answer = turns[-1].text
    if not (holes := HOLE.findall(answer)):
        raise UserError(
            "the chat template opens a thought for each answer, and writes none before "
            "a call of a tool alone; write a thought as the content of the message"
        )
    last = holes[-1]
    plain = dataclasses.replace(turns[-1], text=last)
    written, _ = _find_blocks(render((*turns[:-1], plain), False))
    written = written.partition(last)[0]
    tag = re.fullmatch(r"\s*<(\w+)>\s*", prompt.removeprefix(written.rstrip()))
    if not tag or not THOUGHT.fullmatch(f"<{tag[1]}>"):
        asked, found = (words.rpartition(CLOSE)[2] for words in (prompt, written))
        raise UserError(
            f"the chat template asks for an answer with {asked[-60:]!r} and writes "
            f"{found[-60:]!r} before one, so what is trained is not what is asked; set "
            "config.data.template_args so that both agree, or use "
            "--config.data.template=dolly"
        )
    body = answer.partition(last)[0] + last
    opened = re.match(rf"\s*<{tag[1]}>\s*", body)
    body = body[opened.end() :] if opened else f"\n</{tag[1]}>\n\n{body}"
    return prompt + body + text.rpartition(last)[2]


def _answer_spans(
    text: str,
    said: tuple[int, int],
    blocks: Sequence[tuple[int, int]],
    tokenizer: Tokenizer,
    ends_in_call: bool,
) -> list[tuple[int, int]]:
    """Where the trained parts of an answer are.

    `said`: where it begins, and where its last text or call ends.

    Raises:
      UserError: no token of the template's own ends the answer.
    """
    start, last = said
    following = HOLE.search(text, last)
    words = text[last : following.start() if following else len(text)]
    added = tokenizer.find_added(words)
    control = [token for token in added if token[0] in tokenizer.control_ids]
    if not (control or added):
        raise UserError(
            "the chat template writes no control token after an answer, so a model "
            "could not learn to stop; use --config.data.template=dolly"
        )
    # Some templates close a call, and the list of calls, with tokens of their own.
    ends = [token for token in control if token[0] in tokenizer.end_ids]
    _, end_starts, end = ((ends_in_call and ends) or control or added)[0]
    end_starts, end = last + end_starts, last + end
    if not blocks:
        return [(start, end)]
    spans = []
    for begins, ends in blocks:
        # A block may leave out the end token, without which an answer never stops.
        if start < ends <= end_starts and not text[ends:end_starts].strip():
            ends = end
        if following is None:
            ends = min(ends, end)  # More would only take room.
        if max(begins, start) < ends and begins < end:
            spans.append((max(begins, start), ends))
    return spans


def _parts(
    text: str, trained: Sequence[tuple[int, int]], tokenizer: Tokenizer
) -> tuple[Part, ...]:
    """Cuts a rendered text at control tokens and where training starts and ends."""
    edges = {edge for span in trained for edge in span}
    parts: list[Part] = []
    pieces: list[str] = []
    before, began = Before.NOTHING, 0

    def is_trained(place: int) -> bool:
        return any(start <= place < end for start, end in trained)

    def finish() -> None:
        if pieces:
            part = Part(None, tuple(pieces), before, is_trained(began))
            if not any(HOLE.fullmatch(piece) for piece in pieces):
                (ids,) = tokenizer.encode_texts([part.fill({})], before)
                part = dataclasses.replace(part, ids=tuple(ids))
            parts.append(part)
            pieces.clear()

    for token, start, end in _tokens(text, sorted(edges), tokenizer):
        if token is not None or start in edges:
            finish()
            if parts and parts[-1].pieces:
                before = Before.TEXT
        if token is not None:
            parts.append(Part((token,), (), before, is_trained(start)))
            before = Before.CONTROL
        else:
            began = began if pieces else start
            pieces.append(text[start:end])
    finish()
    return tuple(parts)


def _tokens(
    text: str, edges: Sequence[int], tokenizer: Tokenizer
) -> list[tuple[int | None, int, int]]:
    """Control tokens, holes and words in order: id or None, start and end of each."""
    found: list[tuple[int | None, int, int]] = []
    place = 0
    for piece in HOLE.split(text):
        stop = place + len(piece)
        controls = []
        if not HOLE.fullmatch(piece):
            controls = [
                (i, place + start, place + end)
                for i, start, end in tokenizer.find_added(piece)
                if i in tokenizer.control_ids
            ]
        for i, start, end in (*controls, (None, stop, stop)):
            inner = [place, *(e for e in edges if place < e < start), start]
            found += [(None, a, b) for a, b in itertools.pairwise(inner) if a < b]
            if i is not None:
                found.append((i, start, end))
            place = end
    return found
