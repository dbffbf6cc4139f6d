"""The real client of OpenAI against a real server, over a real socket."""

import asyncio
import importlib.util
import itertools
import json
import math

import openai
import pytest

from research.evaluate.scored_continuations import score_continuations

USER = [{"role": "user", "content": "Are whales fish?"}]
DRAWN = {"temperature": 1.0, "max_tokens": 12}


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as found:
        yield found


def chat(client, **options):
    return client.chat.completions.create(
        **{"model": "base", "messages": USER, "max_tokens": 12} | options
    )


def complete(client, **options):
    given = {"model": "base", "prompt": "Whales", "max_tokens": 8} | options
    return client.completions.create(**given)


def text(answer):
    return answer.choices[0].message.content


def test_models_are_listed_and_found(client):
    [model] = client.models.list().data
    assert model.id == "base" and model.max_model_len == 128
    assert client.models.retrieve("base").id == "base"
    for name in ("../../etc/passwd", "base/..", "BASE", "a%2Fb", "x" * 5000):
        with pytest.raises(openai.NotFoundError, match="base") as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            chat(client, model=name)


def test_an_answer_has_every_field_that_clients_read(client, server):
    answer = chat(client)
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert choice.message.role == "assistant" and choice.finish_reason in (
        "stop",
        "length",
    )
    assert (
        answer.system_fingerprint == client.models.retrieve("base").system_fingerprint
    )
    used = answer.usage
    assert used.total_tokens == used.prompt_tokens + used.completion_tokens
    ids = server.post("/tokenize", {"messages": USER}).json()
    assert used.prompt_tokens == ids["count"] == len(ids["tokens"])
    assert answer._request_id


def test_a_stream_is_the_same_answer(client):
    whole = chat(client, logprobs=True)
    chunks = [
        *chat(
            client, stream=True, stream_options={"include_usage": True}, logprobs=True
        )
    ]
    first, *middle, last, counts = chunks
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    said = "".join(c.choices[0].delta.content or "" for c in middle)
    assert said == text(whole)
    tokens = [x.token for c in middle for x in c.choices[0].logprobs.content]
    assert tokens == [x.token for x in whole.choices[0].logprobs.content]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert counts.usage == whole.usage and not counts.choices
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1
    for chunk in chat(client, stream=True):
        assert "usage" not in chunk.model_dump(exclude_unset=True)


def test_many_clients_at_once_get_what_they_get_alone(client, server):
    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none"
        ) as many:
            asked = [
                many.chat.completions.create(
                    model="base", messages=USER, seed=seed, **DRAWN
                )
                for seed in range(7)
            ]
            streamed = await many.chat.completions.create(
                model="base", messages=USER, seed=3, stream=True, **DRAWN
            )
            found = [c.choices[0].delta.content or "" async for c in streamed]
            return "".join(found), [text(x) for x in await asyncio.gather(*asked)]

    streamed, together = asyncio.run(ask_all())
    alone = [text(chat(client, seed=seed, **DRAWN)) for seed in range(7)]
    assert together == alone and streamed == alone[3]
    assert len({*alone}) > 1


def test_n_answers_are_those_of_the_seeds_that_follow(client):
    many = chat(client, n=4, seed=5, **DRAWN)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    said = [choice.message.content for choice in many.choices]
    assert said == [text(chat(client, seed=5 + i, **DRAWN)) for i in range(4)]
    one = chat(client, seed=5, **DRAWN).usage
    assert many.usage.prompt_tokens == one.prompt_tokens
    streamed = [""] * 4
    for chunk in chat(client, n=4, seed=5, stream=True, **DRAWN):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == said
    assert len({text(chat(client, **DRAWN)) for _ in range(4)}) > 1  # No seed: any.


def test_bias_and_stop_texts_act(client):
    bang = {"logit_bias": {"0": 100}}  # The first byte of the alphabet.
    assert text(chat(client, **bang)) == "!" * 12
    stopped = chat(client, stop="!!!", **bang)
    assert text(stopped) == "" and stopped.choices[0].finish_reason == "stop"
    assert text(chat(client, stop=["x", "zz"], **bang)) == "!" * 12
    chunks = chat(client, stop="!!!", stream=True, **bang)
    assert not any(c.choices[0].delta.content for c in chunks)
    ended = chat(client, extra_body={"stop_token_ids": [0]}, **bang)
    assert (text(ended), ended.usage.completion_tokens) == ("", 1)


def test_extras_of_other_servers_act(client):
    bang = {"logit_bias": {"0": 100}}
    more = {"stop_token_ids": [0], "ignore_eos": True, "return_token_ids": True}
    answer = chat(client, extra_body=more, **bang)
    assert answer.choices[0].token_ids == [0] * 12
    assert len(answer.choices[0].prompt_token_ids) == answer.usage.prompt_tokens
    top = {"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert text(chat(client, extra_body=top, **DRAWN)) == text(chat(client))


def test_scores_are_logarithms_and_name_the_chosen_token(client):
    [choice] = chat(client, logprobs=True, top_logprobs=3).choices
    for token in choice.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        best = max(token.top_logprobs, key=lambda x: x.logprob)
        assert (best.token, best.logprob) == (token.token, token.logprob)
        if token.bytes:
            assert bytes(token.bytes).decode() == token.token


def test_scores_of_a_prompt_are_those_that_lm_eval_reads(client, server):
    """lm-eval sums `token_logprobs[context:-1]` and compares floats exactly."""
    tokenizer = server.deployment.models.find("base").tokenizer
    [ids] = tokenizer.encode_texts(["Whales swim."])
    answer = complete(
        client, prompt=[ids, ids[:5]], max_tokens=1, logprobs=1, echo=True,
        temperature=0, seed=1234,
    )  # fmt: skip
    scores = server.deployment.engine.score(ids)
    for choice, prompt in zip(answer.choices, (ids, ids[:5]), strict=True):
        found = choice.logprobs
        assert len(found.token_logprobs) == len(found.tokens) == len(prompt) + 1
        assert found.token_logprobs[0] is found.top_logprobs[0] is None
        expected = [score.logprob for score in scores][: len(prompt) - 1]
        assert found.token_logprobs[1:-1] == expected
        pairs = zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True)
        for token, (logprob, top) in zip(found.tokens[1:], pairs, strict=True):
            assert top[token] == logprob <= max(top.values())
        assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())
    assert answer.choices[0].text.startswith("Whales swim.")
    # The end token is a token, too.
    end = tokenizer.eos
    ended = complete(
        client, prompt=ids, max_tokens=1, logprobs=1, echo=True,
        logit_bias={str(end): 100},
    )  # fmt: skip
    assert len(ended.choices[0].logprobs.tokens) == len(ids) + 1
    assert ended.choices[0].text == "Whales swim."


def test_lm_eval_reads_the_same_scores_from_the_server_and_in_process(client, server):
    """Its request and its sum over the answer, against our own of the same engine."""
    deployment = server.deployment

    class InProcess:
        def in_order(self, requests, slots, prefix_bytes):
            return map(deployment.engine.submit, requests)

    def encode(text):
        return deployment.models.find("base").encode_text(text, True)

    context = encode("Which of these animals can fly? Answer with one of them:")
    pairs = [(context, encode(f" {x}")) for x in ("a whale", "a sparrow", "a pig")]
    pairs += [(encode("A"), encode("nd")), (encode("x" * 70), encode("y"))]
    ours = [*score_continuations(InProcess(), pairs)]
    for (before, after), score in zip(pairs, ours, strict=True):
        [choice] = complete(
            client, prompt=[*before, *after], max_tokens=1, logprobs=1, echo=True,
            temperature=0, seed=1234,
        ).choices  # fmt: skip
        kept = slice(len(before), -1)
        theirs = choice.logprobs.token_logprobs[kept]
        best = [max(top.values()) for top in choice.logprobs.top_logprobs[kept]]
        assert score.tokens == len(after)
        assert score.logprob == pytest.approx(sum(theirs), abs=1e-4)
        assert score.is_greedy == (theirs == best)


def test_prompts_come_back_in_order_and_in_any_form(client, server):
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    answer = complete(client, prompt=texts, n=2, echo=True)
    assert [x.index for x in answer.choices] == [*range(10)]
    for choice, prompt in zip(
        answer.choices, itertools.chain(*zip(texts, texts, strict=True)), strict=True
    ):
        assert choice.text.startswith(prompt)
    ids = [server.post("/tokenize", {"prompt": t}).json()["tokens"] for t in texts]
    assert complete(client, prompt=ids, n=2, echo=True).choices == answer.choices
    streamed = [""] * 10
    for chunk in complete(client, prompt=texts, n=2, echo=True, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in answer.choices]
    assert complete(client).usage.completion_tokens <= 8


def test_a_prompt_alone_can_be_scored(client):
    answer = complete(client, echo=True, max_tokens=0, logprobs=0)
    assert answer.choices[0].text == "Whales"
    assert answer.usage.completion_tokens == 0
    assert len(answer.choices[0].logprobs.token_logprobs) == 6


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", None),
        ({"max_tokens": 1000}, "messages", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages",
         "context_length_exceeded"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", None),
        ({"response_format": {"type": "xml"}}, "response_format", None),
        ({"extra_body": {"min_tokens": 99}}, "min_tokens", None),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field(client, options, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert (caught.value.param, caught.value.code) == (param, code)
    if code:
        assert "128" in caught.value.message


def test_unknown_fields_are_ignored_and_listed(client):
    response = client.chat.completions.with_raw_response.create(
        model="base",
        messages=USER,
        max_tokens=1,
        extra_body={"store": True, "x\r\n": 1},
    )
    assert response.headers["x-ignored-fields"] == "store, (1 more)"


@pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="llguidance is missing"
)
def test_an_answer_has_the_form_that_was_asked(client, server):
    schema = {
        "type": "object", "properties": {"fish": {"type": "boolean"}},
        "required": ["fish"], "additionalProperties": False,
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # A model of random weights would write blanks for ever.
    blanks = server.post("/tokenize", {"prompt": " \t\r\n"}).json()["tokens"]
    form = {"response_format": wanted, "logit_bias": {str(i): -100 for i in blanks}}
    found = json.loads(text(chat(client, max_tokens=60, **form)))
    assert found.keys() == {"fish"}
    with pytest.raises(openai.BadRequestError) as caught:
        bad = wanted | {"json_schema": {"name": "x", "schema": {"type": "no"}}}
        chat(client, response_format=bad)
    assert caught.value.param == "response_format"


def test_tokens_go_both_ways(server):
    words = "Whales \U0001f433 <|im_end|>"
    found = server.post("/tokenize", {"prompt": words, "add_special_tokens": False})
    ids = found.json()["tokens"]
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": words}
    info = server.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>" and "im_start" in info["chat_template"]
    # A harness asks so for the id of the token itself.
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    [end] = server.post("/tokenize", body).json()["tokens"]
    assert end == server.deployment.models.find("base").tokenizer.eos not in ids
    wrong = server.post("/detokenize", {"tokens": [10**6]})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "tokens[0]"


def test_metrics_count_what_was_answered(client, server):
    def value(name):
        lines = [x for x in server.get("/metrics").text.splitlines() if name in x]
        return sum(float(x.split()[-1]) for x in lines if not x.startswith("#"))

    before = value("generation_tokens_total"), value("request_success_total")
    answer = chat(client)
    assert (
        value("generation_tokens_total") - before[0] == answer.usage.completion_tokens
    )
    assert value("request_success_total") - before[1] == 1
    assert value("time_to_first_token_seconds_count") >= 1
    assert value("num_requests_running") == 0
    assert math.isfinite(value("kv_cache_usage_perc"))
