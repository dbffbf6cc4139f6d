"""Forms that an answer must have: JSON, a JSON schema, a regular expression, a choice.

llguidance reads the grammars and gives the next tokens that they allow. It is not a
requirement: `pip install "research[grammars]"` adds it.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from research.core.errors import UserError
from research.tokenize.tokenizer import Tokenizer


class GrammarConstraint:
    """A `Constraint` of one request by a grammar."""

    def __init__(self, matcher: Any, vocabulary: int):
        """`matcher` is an `llguidance.LLMatcher` at its start."""
        self._matcher = matcher
        self._allowed = np.zeros(-(-vocabulary // 32), np.int32)

    def allowed(self) -> np.ndarray:
        """See `Constraint`."""
        allowed = self._allowed
        self._matcher.unsafe_compute_mask_ptr(allowed.ctypes.data, allowed.nbytes)
        self._check()
        return allowed

    def advance(self, token: int) -> bool:
        """See `Constraint`.

        Raises:
          UserError: the grammar is too complex, or does not allow the token.
        """
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"response_format: {_first_line(self._matcher)}")


class Grammars:
    """Makes constraints for the answers of one model."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, end_ids: Collection[int]):
        """Reads the vocabulary once.

        Args:
          tokenizer: of the model.
          vocabulary: ids of the model, with those that stand for no token.
          end_ids: are allowed where an answer may end.

        Raises:
          UserError: llguidance is not installed, or cannot read the tokenizer.
        """
        try:
            import llguidance
        except ImportError as error:
            raise UserError(
                "response_format: answers of a given form need llguidance, which is "
                'not installed: pip install "research[grammars]" or llguidance'
            ) from error
        self._library, self._vocabulary = llguidance, vocabulary
        try:
            self._tokens = llguidance.LLTokenizer(
                tokenizer.to_json(), vocabulary, sorted(end_ids) or None
            )
        except Exception as error:  # It raises whatever its parts raise.
            raise UserError(
                f"response_format: llguidance cannot read this tokenizer: {error}"
            ) from error

    def json_object(self) -> GrammarConstraint:
        """An answer that is one JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> GrammarConstraint:
        """An answer that is JSON of a schema.

        Raises:
          UserError: llguidance does not know the schema.
        """
        text = json.dumps(schema)
        return self._constraint(self._library.LLMatcher.grammar_from_json_schema(text))

    def regex(self, pattern: str) -> GrammarConstraint:
        """An answer that is matched entirely by a regular expression in Rust's syntax.

        Raises:
          UserError: the expression is malformed.
        """
        return self._constraint(self._library.LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> GrammarConstraint:
        """An answer that is one of `texts`.

        Raises:
          UserError: there is none, or one is empty.
        """
        if not texts or not all(texts):
            raise UserError("response_format: a choice needs texts that are not empty")
        return self.regex("|".join(map(re.escape, texts)))

    def _constraint(self, grammar: str) -> GrammarConstraint:
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"response_format: {_first_line(matcher)}")
        return GrammarConstraint(matcher, self._vocabulary)


def _first_line(matcher: Any) -> str:
    return matcher.get_error().strip().partition("\n")[0]
