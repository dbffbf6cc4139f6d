"""The next tokens that a form allows, and where an answer of that form ends."""

import json
import random
import sys

import numpy as np
import pytest

from research.core.errors import UserError
from research.engine.constraints import Grammars
from research.tokenize.tokenizer_training import byte_tokenizer

TOKENIZER = byte_tokenizer()
VOCABULARY = 264  # More ids than tokens, as most models have.


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER, VOCABULARY, [TOKENIZER.eos])


def allowed_ids(constraint):
    bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits[:VOCABULARY]).tolist())


def accepts(constraint, text):
    """Whether each id of a text is allowed, and the answer may end after it."""
    (ids,) = TOKENIZER.encode_texts([text])
    for number, token in enumerate(ids, start=1):
        if token not in allowed_ids(constraint):
            return False
        if constraint.advance(token):
            return number == len(ids)
    return TOKENIZER.eos in allowed_ids(constraint)


def drawn(constraint, seed, most=4000):
    """A text of random allowed ids; white space and digits would never end."""
    rng, ids = random.Random(seed), []
    while len(ids) < most:
        # Closing marks, and the end, as soon as they are allowed.
        allowed = allowed_ids(constraint)
        wanted = {*TOKENIZER.encode_texts(['"}]'])[0], TOKENIZER.eos}
        token = rng.choice(sorted(allowed & wanted or allowed))
        if token == TOKENIZER.eos:
            break
        ids.append(token)
        if constraint.advance(token):
            break
    return TOKENIZER.decode(ids)


def test_random_tokens_that_are_allowed_make_json_of_the_schema(grammars):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "mood": {"enum": ["good", "bad"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
        },
        "required": ["name", "mood", "tags"],
        "additionalProperties": False,
    }
    for seed in range(3):
        found = json.loads(drawn(grammars.json_schema(schema), seed))
        assert [*found] == ["name", "mood", "tags"] and isinstance(found["name"], str)
        assert found["mood"] in ("good", "bad")
        assert len(found["tags"]) >= 2
        assert all(isinstance(tag, bool) for tag in found["tags"])
        assert isinstance(json.loads(drawn(grammars.json_object(), seed)), dict)


@pytest.mark.parametrize(
    "texts",
    [["yes", "no"], ["a/b", "x y", '"q"'], ["two\nlines", "👍", "a|b", "(", r"\d"]],
)
def test_a_choice_is_one_of_its_texts(grammars, texts):
    for text in texts:
        assert accepts(grammars.choice(texts), text)
    for other in ("maybe", texts[0][:-1], texts[0] + "x", "1"):
        assert not accepts(grammars.choice(texts), other)


def test_a_choice_may_begin_with_another(grammars):
    assert accepts(grammars.choice(["yes", "yes!"]), "yes")
    assert accepts(grammars.choice(["yes", "yes!"]), "yes!")


def test_a_regex_matches_the_whole_answer(grammars):
    assert accepts(grammars.regex(r"\d{3}-[a-c]+"), "123-abca")
    assert not accepts(grammars.regex(r"\d{3}-[a-c]+"), "123-d")


def test_the_end_is_allowed_only_where_the_form_is_complete(grammars):
    constraint = grammars.regex("ab+")
    assert TOKENIZER.eos not in allowed_ids(constraint)
    for token in TOKENIZER.encode_texts(["ab"])[0]:
        assert not constraint.advance(token)
    assert TOKENIZER.eos in allowed_ids(constraint)


def test_each_request_has_its_own_place_in_the_form(grammars):
    one, other = (grammars.choice(["ab"]) for _ in range(2))
    a, b = TOKENIZER.encode_texts(["ab"])[0]
    one.advance(a)
    assert allowed_ids(one) == {b} and allowed_ids(other) == {a}


@pytest.mark.parametrize(
    "make",
    [
        lambda g: g.regex("a["),
        lambda g: g.json_schema({"type": "objekt"}),
        lambda g: g.choice([]),
        lambda g: g.choice(["a", ""]),
        lambda g: g.choice(["a"]).advance(TOKENIZER.encode_texts(["b"])[0][0]),
    ],
)
def test_a_form_that_cannot_be_is_one_sentence(grammars, make):
    with pytest.raises(UserError, match=r"^response_format: .+") as error:
        make(grammars)
    assert "\n" not in str(error.value)


def test_without_the_library_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install .*llguidance"):
        Grammars(TOKENIZER, VOCABULARY, [TOKENIZER.eos])
