"""The engine: every request gets its own answer, and every slot comes back."""

import dataclasses
import gc
import json
import threading

import jax
import numpy as np
import pytest
from helpers import TINY, random_adapters
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_answers import (
    CHUNK,
    DRAWN,
    GREEDY,
    LENGTH,
    LONG,
    MIDDLE,
    ROUNDS,
    SHORT,
    SLOTS,
)
from waiting import PATIENCE, wait_until

from research.config.run_config import LoRAConfig
from research.core.errors import LonelyError, UserError
from research.engine import text_generation
from research.engine.constraints import Grammars
from research.engine.continuous_batching import Engine
from research.engine.followed_decoder import LeadingDecoder, follow
from research.engine.prefix_cache import PrefixCache
from research.engine.requests import (
    ContextOverflowError,
    EngineFullError,
    EngineStoppedError,
    OtherProcessError,
    Request,
    Sampling,
    UnknownAdapterError,
)
from research.engine.slot_decoder import SlotDecoder
from research.engine.slot_programs import CacheBlock
from research.parallel import agreement
from research.tokenize.tokenizer_training import byte_tokenizer
from research.weights.adapters import lora, serving_bank

TOKENIZER = byte_tokenizer()
MIB = 2**20


@pytest.fixture
def engine(decoder):
    engine = Engine(decoder, TOKENIZER, prefix_bytes=MIB, adapter_rows=3)
    yield engine
    while engine.step():
        pass
    assert engine.stats().running == engine.stats().waiting == 0
    assert not decoder.decode().active.any()


@pytest.fixture
def base_params(decoder):
    """The decoder has them again after a test that closes it or gives it others."""
    params = decoder.params
    yield params
    decoder.open(params)


def request(prompt, sampling=GREEDY, **fields):
    return Request(prompt, sampling, top_logprobs=3, **fields)


def read(answer):
    """Ids and scores of an answer, and how it ended."""
    pieces = [*answer]
    ids = [i for piece in pieces for i in piece.ids]
    return ids, [x for piece in pieces for x in piece.logprobs], pieces[-1].finish


# -- the same answer, whatever else happens --------------------------------------------


def test_greedy_answers_are_those_of_the_full_forward_pass(engine, full_scores):
    answers = [engine.submit(request(p)) for p in (SHORT, MIDDLE, LONG, MIDDLE[:9])]
    for answer in answers:
        ids, scores, finish = read(answer)
        prompt = answer.request.prompt
        expected = full_scores([*prompt, *ids])[len(prompt) - 1 : -1]
        assert ids == expected.argmax(-1).tolist() and finish == "length"
        for row, score in zip(expected, scores, strict=True):
            np.testing.assert_allclose(score.logprob, row[score.id], atol=1e-4)
            assert score.top[0] == (score.id, score.logprob) and len(score.top) == 3


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_an_answer_does_not_depend_on_load_eviction_or_cache(decoder, sampling):
    wanted = request(LONG, sampling)
    without = Engine(decoder, TOKENIZER)
    alone = read(without.submit(wanted))
    many = [request(p, DRAWN) for p in (MIDDLE, LONG[:40], SHORT, MIDDLE[3:])]
    for engine in (without, Engine(decoder, TOKENIZER, prefix_bytes=MIB)):
        for before in range(4):
            others = [engine.submit(x) for x in many[:before]]
            answer = engine.submit(wanted)
            others += [engine.submit(x) for x in many[before:]]
            others[1].cancel()
            assert read(answer) == alone
            assert all(x.cancelled or read(x)[2] for x in others)


def test_a_prefix_in_the_cache_changes_no_bit(engine):
    answers = []
    for prompt in (LONG, LONG, (*LONG[:50], *MIDDLE), LONG):
        answer = engine.submit(request(prompt, DRAWN))
        cached = next(iter(pieces := [*answer])).cached_tokens
        answers.append((cached, [(p.text, p.ids, p.logprobs) for p in pieces]))
    assert [cached for cached, _ in answers] == [0, 88, 48, 88]
    assert answers[0][1] == answers[1][1] == answers[3][1]
    assert engine.stats().prefix_hits == 88 + 48 + 88


# -- where an answer ends --------------------------------------------------------------


def test_pieces_have_each_id_once_and_the_text_of_all(engine):
    pieces = [*engine.submit(request(MIDDLE, DRAWN))]
    ids = [i for piece in pieces for i in piece.ids]
    assert len(ids) == 12 and [p.finish for p in pieces][-1] == "length"
    assert "".join(p.text for p in pieces) == TOKENIZER.decode(ids)
    assert [x.id for p in pieces for x in p.logprobs] == ids
    assert {len(p.ids) for p in pieces} <= {1, ROUNDS}


def test_a_stop_id_ends_the_answer_and_is_not_in_its_text(engine):
    whole, _, _ = read(engine.submit(request(MIDDLE, DRAWN)))
    at = next(i for i in range(4, 12) if whole[i] not in whole[:i])
    stop = frozenset({whole[at]})
    answer = engine.submit(request(MIDDLE, DRAWN, stop_ids=stop))
    pieces = [*answer]
    assert [i for p in pieces for i in p.ids] == whole[: at + 1]
    assert pieces[-1].finish == "stop"
    assert "".join(p.text for p in pieces) == TOKENIZER.decode(whole[:at])
    ignored = request(MIDDLE, DRAWN, stop_ids=stop, ignore_eos=True)
    assert read(engine.submit(ignored))[::2] == (whole, "length")


def test_a_stop_text_ends_the_answer_across_tokens_and_is_not_returned(engine):
    whole = engine.submit(request(MIDDLE, DRAWN)).text()
    stop = whole[5:8]  # A letter is a token here.
    answer = engine.submit(request(MIDDLE, DRAWN, stop=("no such text", stop)))
    pieces = [*answer]
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish == "stop"
    assert engine.stats().running == 0


def test_an_answer_without_new_tokens_still_scores_its_prompt(engine, full_scores):
    for prompt in (SHORT, MIDDLE, LONG):
        scores = engine.score(prompt, top=2)
        assert [x.id for x in scores] == [*prompt[1:]]
        expected = full_scores(prompt)
        for row, score in zip(expected, scores, strict=False):
            np.testing.assert_allclose(score.logprob, row[score.id], atol=1e-4)
            assert [i for i, _ in score.top] == np.argsort(-row)[:2].tolist()
    pieces = [*engine.submit(request(MIDDLE, Sampling(max_new_tokens=0)))]
    assert [(p.ids, p.finish) for p in pieces] == [((), "length")]


def test_scores_of_the_prompt_come_with_the_first_piece(engine):
    """As lm-evaluation-harness asks: one token must follow, even an end."""
    plain = engine.submit(request(MIDDLE, Sampling(max_new_tokens=1)))
    (piece,) = plain
    echoed = request(MIDDLE, Sampling(max_new_tokens=1), echo=True)
    echoed = dataclasses.replace(echoed, stop_ids=frozenset(piece.ids))
    (scored,) = engine.submit(echoed)
    assert scored.ids == piece.ids and scored.logprobs == piece.logprobs
    assert scored.prompt_logprobs == engine.score(MIDDLE, top=3)


@pytest.mark.parametrize("first", [1, 7, 8, 9, 60, 89, 90])
def test_scores_of_the_end_of_a_prompt_are_those_of_all_of_it(engine, first):
    """Earlier ids are written without scores, or come from the cache."""
    every = engine.score(LONG, top=3)
    wanted = request(LONG, Sampling(max_new_tokens=0), echo=True, echo_from=first)
    for cached in (0, (first - 1) // CHUNK * CHUNK):
        engine.prefixes = engine.prefixes if cached else PrefixCache(MIB)
        (piece,) = engine.submit(wanted)
        assert piece.cached_tokens == cached
        assert [x.id for x in piece.prompt_logprobs] == [*LONG[first:]]
        for found, expected in zip(
            piece.prompt_logprobs, every[first - 1 :], strict=True
        ):
            np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-5)
            assert found.top[0][0] == expected.top[0][0]


def test_a_form_allows_its_tokens_alone(engine):
    grammars = Grammars(TOKENIZER, TOKENIZER.largest_id + 1, [TOKENIZER.eos])

    def number():
        whole = grammars.regex("[1-3]{4}-7")
        allowed = whole.allowed
        whole.allowed = lambda: allowed()[: TINY.vocab // 32]
        return whole

    plain = read(engine.submit(request(MIDDLE, DRAWN)))
    others = engine.submit(request(MIDDLE, DRAWN))
    sampling = dataclasses.replace(DRAWN, min_new_tokens=0)
    for _ in range(2):
        answer = engine.submit(request(LONG, sampling, constraint=number()))
        pieces = [*answer]
        text = "".join(p.text for p in pieces)
        assert len(text) == 6 and set(text[:4]) <= set("123") and text[4:] == "-7"
        assert pieces[-1].finish == "stop"
    assert read(others) == plain


# -- many at once ----------------------------------------------------------------------


def test_a_long_prompt_does_not_stop_the_answers_of_others(engine):
    fast = engine.submit(request(SHORT, Sampling(max_new_tokens=40)))
    slow = engine.submit(request(LONG))
    given = []
    fast._deliver = given.append
    engine.step()
    for expected in range(1, 9):
        engine.step()
        assert len(given) == expected  # A piece in each round, with ROUNDS tokens.
        assert slow.first_token_at == 0
    late = engine.submit(request(MIDDLE[:9]))
    engine.step()
    engine.step()
    assert late.first_token_at > 0  # It had less to write.
    for answer in (slow, late):
        assert read(answer)[2] == "length"


@pytest.mark.parametrize("length, begun", [(1, 4), (3, 4), (5, 2), (6, 1), (9, 1)])
def test_a_round_writes_one_chunk_of_prompts(engine, length, begun):
    answers = [engine.submit(request(LONG[i : i + length])) for i in range(SLOTS)]
    engine.step()
    engine.step()  # Delivers what the first one has begun.
    assert sum(a.first_token_at > 0 for a in answers) == begun
    for answer in answers:
        answer.cancel()


def test_prompts_first_are_whole_before_the_next_tokens(decoder, engine):
    first = Engine(decoder, TOKENIZER, prompts_first=True)
    prompts = [LONG, SHORT, MIDDLE][:SLOTS]
    answers = [first.submit(request(p)) for p in prompts]
    first.step()
    found = [x for x in first.slot_stats() if x]
    written = [x.written_tokens for x in first.slot_stats() if x]
    assert written == [len(p) for p in prompts], "nobody waits for the next round"
    found = [read(x) for x in answers]
    assert found == [read(engine.submit(request(p))) for p in prompts]


def test_what_waits_longest_gets_the_next_slot(engine):
    answers = [engine.submit(request(SHORT)) for _ in range(2 * SLOTS)]
    engine.step()
    assert [bool(a.admitted_at) for a in answers] == [True] * SLOTS + [False] * SLOTS
    assert engine.stats().running == engine.stats().waiting == SLOTS


def test_a_request_that_cannot_be_answered_is_refused_at_once(decoder):
    engine = Engine(decoder, TOKENIZER, most_waiting=1)
    with pytest.raises(ContextOverflowError, match=r"90 prompt .* 61 new .* 150"):
        engine.submit(request(LONG, Sampling(max_new_tokens=61)))
    with pytest.raises(UnknownAdapterError, match="'mine'; loaded: none"):
        engine.submit(request(SHORT, adapter="mine"))
    with pytest.raises(UserError, match=r"^prompt: id 96"):
        engine.submit(request((96,)))
    # Before the first round each free slot has room for one more.
    waiting = [engine.submit(request(SHORT)) for _ in range(SLOTS + 1)]
    for _ in range(2):
        with pytest.raises(EngineFullError, match="1 requests wait") as error:
            engine.submit(request(SHORT))
        assert error.value.retry_after >= 1
        engine.step()  # All slots are in use, and still one request waits.
    assert {read(each)[2] for each in waiting} == {"length"}
    assert engine.stats().finished == {"length": SLOTS + 1}


class Broken:
    """A form that fails after some tokens."""

    def __init__(self, after):
        self.after = after

    def allowed(self):
        if not self.after:
            raise UserError("it broke")
        return np.full(-(-TINY.vocab // 32), -1, np.int32)

    def advance(self, token):
        self.after -= 1
        return False


def test_an_error_ends_one_answer_and_no_other(engine):
    plain = read(engine.submit(request(MIDDLE)))
    other = engine.submit(request(MIDDLE))
    broken = engine.submit(request(SHORT, constraint=Broken(2)))
    with pytest.raises(UserError, match="it broke"):
        broken.text()

    def gone(piece):
        raise ConnectionError

    away = engine.submit(request(SHORT), gone)
    assert read(other) == plain
    assert away.cancelled


@given(st.data())
@settings(deadline=None, max_examples=8)
def test_no_slot_is_ever_lost(decoder, data):
    """Random submits, cancels, failures and rounds; each answer ends exactly once."""
    engine = Engine(decoder, TOKENIZER, most_waiting=4, prefix_bytes=MIB // 8)
    ends, answers = {}, []
    for number in range(data.draw(st.integers(5, 25))):
        action = data.draw(st.sampled_from(["submit", "submit", "cancel", "step"]))
        if action == "submit":
            prompt = data.draw(st.sampled_from([SHORT, MIDDLE, LONG]))
            constraint = data.draw(st.sampled_from([None, None, Broken(0), Broken(2)]))
            new = data.draw(st.sampled_from([0, 1, 5]))
            fails = data.draw(st.integers(0, 5)) == 0

            def deliver(piece, number=number, fails=fails):
                if piece.finish:
                    ends[number] = [*ends.get(number, []), piece.finish]
                if fails:
                    raise ConnectionError

            asked = request(prompt, Sampling(max_new_tokens=new), constraint=constraint)
            try:
                answers.append(engine.submit(asked, deliver))
            except EngineFullError:
                continue
        elif action == "cancel" and answers:
            data.draw(st.sampled_from(answers)).cancel()
        else:
            engine.step()
    while engine.step():
        pass
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.cache_tokens) == (0, 0, 0)
    assert not decoder.decode().active.any()
    assert len(ends) == len(answers) and all(len(x) == 1 for x in ends.values())
    assert sum(stats.finished.values()) == len(answers)
    assert engine.prefixes.nbytes <= MIB // 8


# -- a round is computed while the one before is delivered -----------------------------


@pytest.fixture
def events(decoder, monkeypatch):
    """The calls `launch` and `read` of the decoder, and what a test adds."""
    found = []
    for name in ("launch", "read"):
        call = getattr(decoder, name)
        monkeypatch.setattr(
            decoder,
            name,
            lambda *given, name=name, call=call: found.append(name) or call(*given),
        )
    return found


def test_the_devices_compute_while_tokens_are_delivered(engine, events):
    sampling = dataclasses.replace(GREEDY, max_new_tokens=3 * ROUNDS)
    engine.submit(request(SHORT, sampling), lambda piece: events.append("piece"))
    while engine.step():
        pass
    # The devices say that the answer has its length, so no round is in vain.
    assert events == ["launch", *["read", "launch", "piece"] * 2, "read", "piece"]


def test_a_constrained_answer_reads_its_token_before_the_next(engine, events):
    asked = request(SHORT, constraint=Broken(3))
    engine.submit(asked, lambda piece: events.append(piece.finish or "piece"))
    while engine.step():
        pass
    assert events == [
        "launch",
        *["read", "piece", "launch"] * 2,
        *["read", "piece", "error"],
    ]


def test_tokens_of_a_round_reach_nobody_who_came_after_it_began(engine):
    alone = [read(engine.submit(request(p, DRAWN))) for p in (MIDDLE, LONG)]
    left = [engine.submit(request(SHORT, DRAWN)) for _ in range(SLOTS)]
    for _ in range(2):
        engine.step()
    before = engine.stats().new_tokens
    for answer in left:
        answer.cancel()  # Each has a round under way.
    answers = [engine.submit(request(p, DRAWN)) for p in (MIDDLE, LONG)]
    engine.step()
    assert engine.stats().new_tokens == before and engine.stats().running == 2
    assert [read(answer) for answer in answers] == alone


# -- adapters --------------------------------------------------------------------------


def test_adapters_come_and_go_while_others_answer(engine, decoder, model, params):
    """A request ends with what it began with, and no cached prompt is another's."""
    config = LoRAConfig(rank=2, alpha=8.0)
    specs = lora.adapter_specs(model.specs, config)
    adapted = [
        lora.adapt(params, random_adapters(specs, seed=seed), config)
        for seed in range(3)
    ]
    rows = [serving_bank.bank_row(decoder.params, each) for each in adapted]
    plain = Engine(decoder, TOKENIZER, adapter_rows=3)  # Without a prefix cache.
    base = read(plain.submit(request(LONG)))
    alone = []
    for number, row in enumerate(rows):
        plain.load_adapter("one", row, f"sha of {number}")
        alone.append(read(plain.submit(request(LONG, adapter="one"))))
    assert read(engine.submit(request(LONG))) == base
    for number, row in enumerate(rows):
        engine.load_adapter("one", row, f"sha of {number}")
        # The prompt is in the cache by now, of the base and of adapters before.
        assert read(engine.submit(request(LONG, adapter="one"))) == alone[number]
    assert len({tuple(ids) for ids, _, _ in (base, *alone)}) == 4
    assert engine.names.identities() == {"one": "sha of 2"}
    engine.load_adapter("two", rows[0], "sha of 0")
    others = [engine.submit(request(LONG, adapter=x)) for x in ("two", "one", "")]
    engine.step()
    with pytest.raises(UserError, match="all 2 rows for adapters are in use"):
        engine.load_adapter("three", rows[1], "sha of 1")
    engine.unload_adapter("two")
    with pytest.raises(UserError, match="all 2 rows"):
        engine.load_adapter("two", rows[1], "sha of 1")  # A request still has the row.
    with pytest.raises(UnknownAdapterError, match="'two'; loaded: one"):
        engine.submit(request(LONG, adapter="two"))
    engine.load_adapter("again", rows[2], "sha of 2")  # The row of "one".
    assert [read(x) for x in others] == [alone[0], alone[2], base]
    engine.load_adapter("two", rows[1], "sha of 1")
    names = ("two", "again", "", "one")
    answers = [engine.submit(request(LONG, adapter=x)) for x in names]
    assert [read(x) for x in answers] == [alone[1], alone[2], base, alone[2]]


def test_a_model_that_is_asked_now_and_then_holds_no_memory(
    decoder, base_params, model, monkeypatch
):
    """As reports of a run ask it: the slots are gone when the answers are there."""
    made = []

    def make(*arguments, mesh, chunk):
        made.append(arguments)
        return decoder

    monkeypatch.setattr(text_generation, "SlotDecoder", make)
    decoders = text_generation.SlotDecoders(model, decoder._mesh)
    generator = text_generation.TextGenerator(decoders, base_params, TOKENIZER)
    expected = Engine(decoder, TOKENIZER).submit(request(MIDDLE, DRAWN)).text()
    decoder.close()
    before = sum(x.nbytes for x in jax.live_arrays())
    for _ in range(2):
        said = generator.answers([request(MIDDLE, DRAWN)] * 5)
        assert said == [expected] * 5
        assert "".join(x.text for x in generator.stream(request(MIDDLE, DRAWN))) in said
        with pytest.raises(ContextOverflowError):
            generator.answers([request(LONG, Sampling(max_new_tokens=200))])
        gc.collect()
        assert sum(x.nbytes for x in jax.live_arrays()) <= before
        assert decoder.params is None
    # One for each size: 8 slots for five answers, one for a stream, and up to the
    # context of the model.
    longest = model.architecture.max_position
    sizes = {(8, min(256, longest)), (1, min(256, longest)), (1, min(512, longest))}
    assert {arguments[2:] for arguments in made} == sizes and len(made) == len(sizes)
    assert generator.answers([]) == []


def test_a_conversation_is_read_once(decoder, base_params, monkeypatch):
    """Two models share their decoders, as where a run is compared with its base."""
    params, known = base_params, [decoder]
    decoder.close()

    def make(model, params, slots, length, mesh, chunk):
        closed = [x for x in known if x.params is None]
        if not closed:
            known.append(
                SlotDecoder(
                    model, None, SLOTS, LENGTH, mesh=mesh, chunk=CHUNK, rounds=ROUNDS
                )
            )
        return (closed or known)[-1]

    turns = [LONG[:n] for n in (20, 50, 90)]
    other = {path: 2 * x if path == "head.kernel" else x for path, x in params.items()}
    monkeypatch.setattr(text_generation, "SlotDecoder", make)
    monkeypatch.setattr(text_generation, "SHORTEST", 64)
    decoders = text_generation.SlotDecoders(decoder._model, decoder._mesh)
    both = [
        text_generation.LastingGenerator(decoders, p, TOKENIZER)
        for p in (params, other)
    ]
    found = {}
    for turn, cached in zip(turns, (0, 16, 48), strict=True):
        for number, generator in enumerate(both):
            pieces = [*generator.stream(request(turn, DRAWN))]
            found[turn, number] = "".join(x.text for x in pieces)
            assert pieces[0].cached_tokens == cached
    for number, own in enumerate((params, other)):
        plain = text_generation.TextGenerator(decoders, own, TOKENIZER)
        for turn in turns:
            said = plain.stream(request(turn, DRAWN))
            assert "".join(x.text for x in said) == found[turn, number]
    assert found[turns[0], 0] != found[turns[0], 1] and len(known) == 1
    # A decoder that fails, or cannot be opened, fails one request.
    for name in ("open", "launch", "read"):
        with monkeypatch.context() as patch:
            patch.setattr(decoder, name, lambda *_: 1 / 0)
            with pytest.raises((ZeroDivisionError, UserError)):
                [*both[0].stream(request(turns[0], DRAWN))]
        pieces = [*both[0].stream(request(turns[0], DRAWN))]
        assert "".join(x.text for x in pieces) == found[turns[0], 0]


@pytest.mark.parametrize("tokens", [2 * CHUNK + 1, CHUNK - 1])
def test_the_engine_reads_the_rest_of_a_prompt_of_which_it_has_the_beginning(
    decoder, monkeypatch, tokens
):
    engine = Engine(decoder, TOKENIZER)
    whole = read(engine.submit(request(LONG)))
    blocks = jax.device_get([decoder.read_block(0, i) for i in range(3)])
    beginning = jax.tree.map(
        lambda *parts: np.concatenate(parts, 3)[:, :, :, :tokens], *blocks
    )
    extended, extend = [], decoder.extend
    monkeypatch.setattr(
        decoder, "extend", lambda slot, ids: extended.extend(ids) or extend(slot, ids)
    )
    assert read(engine.submit(request(LONG), read=beginning)) == whole
    assert (*extended,) == tuple(LONG[tokens // CHUNK * CHUNK : -1])


def test_weights_are_exchanged_between_two_answers(decoder, base_params):
    """Those that run end with the old ones, and those that wait begin with the new."""
    params = base_params
    doubled = jax.device_put(2 * params["head.kernel"], params["head.kernel"].sharding)
    other = params | {"head.kernel": doubled}
    wanted = request(LONG, DRAWN)
    old = read(Engine(decoder, TOKENIZER).submit(wanted))
    layers, _, heads, _, width = decoder.read_block(0, 0).k.shape
    zeros = np.zeros((layers, 1, heads, len(LONG) - 1, width), np.float32)
    of_old = CacheBlock(zeros, zeros)  # Whoever uses it gives another answer.
    decoder.open(other)
    new = read(Engine(decoder, TOKENIZER).submit(wanted))
    assert old != new
    decoder.open(params)
    engine = Engine(decoder, TOKENIZER, prefix_bytes=MIB)
    stop, found = threading.Event(), []
    running = [engine.submit(wanted) for _ in range(SLOTS)]
    while not engine.stats().new_tokens:
        engine.step()
    waiting = [engine.submit(wanted, read=of_old) for _ in range(SLOTS)]

    def place():
        assert engine.stats().running == 0 and engine.stats().prefix_bytes == 0
        decoder.params = other
        return "placed"

    def ask():
        found.append(engine.exchange_weights(place))

    asking = threading.Thread(target=ask)
    # Until there is a thread that takes the rounds, whoever asks would take them.
    engine._driven = True
    asking.start()
    wait_until(lambda: engine._commands)
    runner = threading.Thread(target=engine.run_forever, args=[stop])
    runner.start()
    asking.join(PATIENCE)
    answers = [read(x) for x in (*running, *waiting)]
    assert answers == [old] * SLOTS + [new] * SLOTS and found == ["placed"]
    stop.set()
    runner.join(PATIENCE)


# -- several processes -----------------------------------------------------------------


def test_other_processes_follow_every_call(decoder, model, params, monkeypatch):
    """Here one after the other, on one decoder; see `test_engine_processes.py`."""
    told, rounds, decode = [], [], decoder.decode
    monkeypatch.setattr(
        decoder, "decode", lambda: rounds.append(decode()) or rounds[-1]
    )

    def tell(value):
        told.append(json.dumps(value))
        return value

    config = LoRAConfig(rank=2, alpha=8.0)
    factors = random_adapters(lora.adapter_specs(model.specs, config), seed=9)
    row = serving_bank.bank_row(decoder.params, lora.adapt(params, factors, config))
    done = []

    def perform(task):
        done.append(task)
        if not task:
            raise UserError("no such run")
        return "same", task["read"]

    leading = LeadingDecoder(decoder, tell, perform)
    # Room for one prompt: the blocks of the others leave.
    engine = Engine(leading, TOKENIZER, prefix_bytes=MIB // 8, adapter_rows=3)
    plain = Engine(decoder, TOKENIZER)
    prompts = (LONG, MIDDLE, LONG)
    expected = [read(plain.submit(request(p, DRAWN))) for p in prompts]
    rounds.clear()
    engine.load_adapter("mine", row, "sha")
    assert [read(engine.submit(request(p, DRAWN))) for p in prompts] == expected
    assert engine.stats().prefix_hits == 88
    assert leading.everywhere({"read": 7}) == 7
    with pytest.raises(UserError, match="no such run"):
        leading.everywhere({})
    answers = [
        engine.submit(request(MIDDLE, adapter="mine", echo=True)),
        engine.submit(request(SHORT, constraint=Broken(3), stop_ids=frozenset([4]))),
    ]
    read(answers[0])
    leading.end()
    heard = [json.loads(each) for each in told]
    # Blocks are told with the next round, and a prompt is told twice with a penalty.
    assert [calls[-1][0] for calls in heard].count("read_block") == 1
    calls = [call for calls in heard for call in calls if call[0] == "admit"]
    admitted = [values | sampling for _, _, values, sampling, _ in calls]
    assert {
        (x["repetition_penalty"] == 1, x["prompt_ids"] == []) for x in admitted
    } == {(True, True), (False, False)}
    of_leader = rounds.copy()
    rounds.clear()
    decoder.open(decoder.params)
    heard = iter(heard)
    follow(decoder, {"sha": row}.__getitem__, lambda _: next(heard), perform)
    assert done == [{"read": 7}, {}] * 2
    with pytest.raises(LonelyError, match="have ended"):
        leading.flush()
    assert len(rounds) == len(of_leader) and next(heard, None) is None
    jax.tree.map(np.testing.assert_array_equal, rounds, of_leader)
    decoder.open(decoder.params)


def test_no_call_is_made_by_the_first_process_alone(decoder):
    """A call that the leading decoder merely passes on would part the processes."""
    calls = {name for name, x in vars(SlotDecoder).items() if callable(x)}
    passed_on = {name for name in calls - {*vars(LeadingDecoder)} if name[0] != "_"}
    # The first two frame all calls; the others do nothing on the devices of others.
    assert passed_on == {"open", "close", "size", "read"}
    told = []
    engine = Engine(LeadingDecoder(decoder, told.append), TOKENIZER)
    block = jax.device_get(decoder.read_block(0, 0))
    given = engine.submit(request(LONG[: CHUNK + 1]), read=block)
    with pytest.raises(ValueError, match="the other processes have no keys and values"):
        read(given)
    assert read(engine.submit(request(MIDDLE)))[2] == "length"
    made = {call[0] for calls in told for call in calls}
    assert made == {"admit", "free", "extend", "start", "decode"}


def test_a_task_begins_when_all_processes_can_do_it(decoder, monkeypatch):
    """Reading waits for others, who never come if one of them could not begin."""
    done, other = [], []

    def together(work, facts=lambda _: {}):
        result = work()
        if other:
            raise other.pop()
        return result

    def check(task):
        if task == "absent":
            raise UserError("no such run")

    monkeypatch.setattr(agreement, "together", together)
    perform = lambda task: done.append(task) or ("same", task)  # noqa: E731
    leading = LeadingDecoder(decoder, lambda told: told, perform, check)
    assert leading.everywhere("there") == "there" and done == ["there"]
    with pytest.raises(UserError, match="no such run") as own:
        leading.everywhere("absent")
    assert not isinstance(own.value, OtherProcessError)
    other.append(UserError("process 1: no such run"))
    with pytest.raises(OtherProcessError, match="process 1"):
        leading.everywhere("there")
    other.append(LonelyError("it is gone"))
    with pytest.raises(LonelyError):
        leading.everywhere("there")
    assert done == ["there"] and leading.everywhere("again") == "again"


# -- threads ---------------------------------------------------------------------------


def test_any_thread_may_ask_while_one_takes_the_rounds(engine):
    expected = {p: read(engine.submit(request(p, DRAWN))) for p in (SHORT, MIDDLE)}
    stop, found = threading.Event(), []
    runner = threading.Thread(target=engine.run_forever, args=[stop])
    runner.start()

    def ask(prompt):
        found.append((prompt, read(engine.submit(request(prompt, DRAWN)))))

    threads = [threading.Thread(target=ask, args=[p]) for p in (SHORT, MIDDLE) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    waiting = [engine.submit(request(LONG)) for _ in range(2 * SLOTS)]
    stop.set()
    runner.join(PATIENCE)
    assert len(found) == 8 and all(said == expected[p] for p, said in found)
    assert all(read(a)[2] in ("cancelled", "length") for a in waiting)
    assert engine.stats().running == 0


@pytest.mark.parametrize("call", ["launch", "read"])
def test_a_device_that_fails_ends_all_answers_and_the_engine(
    decoder, monkeypatch, call
):
    engine = Engine(decoder, TOKENIZER)
    answers = [engine.submit(request(MIDDLE)) for _ in range(SLOTS + 1)]

    def lost(*_):
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(decoder, call, lost)
        with pytest.raises(RuntimeError, match="lost"):
            answers[0].text()
        for answer in answers[1:]:
            with pytest.raises(RuntimeError, match="lost"):
                answer.text()
    with pytest.raises(EngineStoppedError, match="lost"):
        engine.submit(request(MIDDLE))
    decoder.open(decoder.params)
    with pytest.raises(EngineStoppedError, match="lost"):
        engine.between_rounds(lambda: "done")


def test_an_engine_that_has_ended_does_nothing_any_longer(decoder):
    engine, stop, made = Engine(decoder, TOKENIZER), threading.Event(), []
    stop.set()
    engine.run_forever(stop)
    for when_empty in (False, True):
        with pytest.raises(EngineStoppedError, match="has stopped"):
            engine.between_rounds(lambda: made.append(1), when_empty=when_empty)
    with pytest.raises(EngineStoppedError, match="has stopped"):
        engine.submit(request(SHORT))
    assert made == [] and not engine.step()


@pytest.mark.parametrize("call", ["read_block", "score", "a command"])
def test_a_process_that_is_gone_ends_the_engine_and_not_one_answer(
    decoder, monkeypatch, call
):
    engine = Engine(decoder, TOKENIZER, prefix_bytes=MIB)

    def gone(*_):
        raise LonelyError("another process is gone")

    with monkeypatch.context() as patch:
        if call != "a command":
            patch.setattr(decoder, call, gone)
        longest = Sampling(max_new_tokens=LENGTH - len(SHORT))
        other = engine.submit(request(SHORT, longest))
        asked = engine.submit(request(LONG, echo=call == "score"))
        with pytest.raises(LonelyError):
            engine.between_rounds(gone) if call == "a command" else read(asked)
    with pytest.raises(LonelyError):
        other.text()
    with pytest.raises(EngineStoppedError, match="is gone"):
        engine.submit(request(SHORT))
    decoder.open(decoder.params)
