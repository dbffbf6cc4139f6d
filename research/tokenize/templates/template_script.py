"""Renders chat templates, one JSON request a line, under limits of its own process.

`template_process` starts this file as a script. Its arguments are the numbers of
the two letters to put around generation blocks, and the folders of Jinja. It imports
nothing of ours, so it starts in a fraction of a second.
"""

import datetime
import json
import resource
import sys
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[3:]

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

SECONDS = 5  # of CPU time for a request
MEMORY = 1 << 30  # bytes of address space
LETTERS = 1 << 20  # of a rendered conversation, whose texts are marks of holes


class GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`, by which a template says what a model has to write."""

    tags = frozenset({"generation"})
    marks = ("", "")

    def parse(self, parser: Any) -> jinja2.nodes.CallBlock:
        """A block whose text stands between two marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked")
        block = jinja2.nodes.CallBlock(call, [], [], body)
        return block.set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return self.marks[0] + caller() + self.marks[1]


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja's sandbox with the tools that transformers gives to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationBlocks],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _fixed_day
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own filter would also escape the characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _fixed_day(form: str) -> str:
    """The same day always, so that ids do not depend on when a row is read."""
    return datetime.date(2026, 1, 1).strftime(form)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def render(environment: Any, source: str, values: dict[str, Any]) -> str:
    """The text of a template.

    Raises:
      Exception: a template can fail in any way that code can.
    """
    pieces: list[str] = []
    letters = 0
    for piece in environment.from_string(source).generate(**values):
        letters += len(piece)
        if letters > LETTERS:
            raise ValueError(f"it writes more than {LETTERS} letters")
        pieces.append(piece)
    return "".join(pieces)


def _lower(kind: int, limit: int) -> None:
    """Sets a limit of this process, which may have a lower one already."""
    _, hard = resource.getrlimit(kind)
    soft = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (soft, hard))


def _reply(environment: Any, line: str) -> dict[str, str]:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(spent.ru_utime + spent.ru_stime) + 1 + SECONDS)
    try:
        return {"text": render(environment, **json.loads(line))}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY} bytes of memory"}
    except RecursionError:
        return {"error": "it calls itself too often, or is nested too deep"}
    except jinja2.TemplateSyntaxError as error:
        return {"broken": str(error)[:300]}
    except Exception as error:
        return {"error": str(error)[:300] or type(error).__name__}


def main() -> None:
    """Answers requests until there are no more."""
    _lower(resource.RLIMIT_AS, MEMORY)
    _lower(resource.RLIMIT_CORE, 0)
    GenerationBlocks.marks = tuple(chr(int(number)) for number in sys.argv[1:3])
    environment = make_environment()
    for line in sys.stdin:
        print(json.dumps(_reply(environment, line)), flush=True)


if __name__ == "__main__":
    main()
