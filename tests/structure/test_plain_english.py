"""The prose of the repository is plain English: a list of phrasings it does not use.

Prose is docstrings, comments and messages (string literals that hold a space) of the
Python files, and the Markdown files without their code.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

PHRASES = re.compile(
    r"\b(goes on|go on with|gone on|went on|at a wish|(?:is|are) asked for|tells of"
    r"|told of|left out|mend|mends|mended|be it|need not)\b",
    re.IGNORECASE,
)
# A capital letter marks the beginning of a sentence. Headings are no sentences.
OPENING = re.compile(r"(?<![\w\"'-])(?<!# )((?:Of|What)\s[^.?!]*)([.?!]?)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`")


def _blank(match: re.Match) -> str:
    """Remove the text of a match and keep its lines, so that line numbers stay."""
    return "_" + "\n" * match[0].count("\n")


def awkward(prose: str) -> Iterator[tuple[int, str]]:
    """Yield the line (from 0) and the words of each phrasing that is not plain."""
    prose = INLINE_CODE.sub(_blank, prose)
    # A phrase may be broken over two lines.
    for match in PHRASES.finditer(re.sub(r"\s", " ", prose)):
        yield prose.count("\n", 0, match.start()), match[0]
    for match in OPENING.finditer(prose):
        if match[2] != "?":
            yield prose.count("\n", 0, match.start(1)), " ".join(match[1].split()[:4])


def _messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every string that people may read.

    The parts of an f-string are read as one text, with `_` for each value.
    """
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(node.values)
            texts = [
                v.value if isinstance(v, ast.Constant) else "_" for v in node.values
            ]
            yield node.lineno, "".join(texts)
        elif node not in parts and isinstance(getattr(node, "value", None), str):
            yield node.lineno, node.value


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of every block of comments."""
    start, lines, last = 0, [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row = token.start[0]
        if lines and row != last + 1:
            yield start, "\n".join(lines)
            lines = []
        if not lines:
            start = row
        lines.append(token.string.lstrip("#: "))
        last = row
    if lines:
        yield start, "\n".join(lines)


def _prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of every piece of prose in one file."""
    source = path.read_text()
    if path.suffix == ".md":
        yield 1, CODE_BLOCK.sub(_blank, source)
        return
    yield from _comments(source)
    for line, text in _messages(ast.parse(source)):
        if " " in text.strip():
            yield line, text


def _files() -> list[Path]:
    folders = ["research", "launch", "configs", "tests"]
    python = [p for f in folders for p in (ROOT / f).rglob("*.py")]
    python.remove(Path(__file__))  # It quotes the phrases.
    return sorted([*python, ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_docstrings_comments_messages_and_docs_are_plain_english():
    problems = {
        f"{path.relative_to(ROOT)}:{line + offset}: {words!r}"
        for path in _files()
        for line, text in _prose(path)
        for offset, words in awkward(text)
    }
    assert not problems, "\n" + "\n".join(sorted(problems))


def test_the_reader_of_prose_sees_broken_lines_and_passes_questions_and_code():
    assert [*awkward("A run. What it\ndoes is lost.")] == [(0, "What it does is")]
    assert [*awkward("The run\ngoes\non.")] == [(1, "goes on")]
    assert not [*awkward("What is lost? `need not` is code, left_out is a name.")]
    source = 'x = 1  # Of two\n# kinds\nraise E(f"{x} goes"\n " on")\n'
    found = [*_comments(source), *_messages(ast.parse(source))]
    assert [line + at for line, text in found for at, _ in awkward(text)] == [1, 3]
