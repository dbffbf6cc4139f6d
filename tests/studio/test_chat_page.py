"""Conversations, rows, votes, and the chat page over a server that is none."""

import json
import threading

import pytest
from fake_upstream import FakeUpstream, list_server, said_by_models
from scipy import stats
from studio_place import TOKEN, StudioPlace, make_run

from research.config.data_knobs import ColumnsConfig
from research.core.errors import UserError
from research.data.instructions.row_columns import to_record
from research.studio.chats import blind_votes
from research.studio.chats.blind_votes import BlindVotes, wilson, win_rates
from research.studio.chats.conversation_files import Conversations, messages_of
from research.studio.chats.training_rows import append_row, row_of
from research.studio.page_errors import PageError

EVIL = '<script>alert(1)</script>"\u202e\n'


def turn(text="Why?", parent="", chosen="", **more):
    values = {"context": "", "system": "", **more}
    return {"kind": "turn", "text": text, "parent": parent, "chosen": chosen, **values}


def column(model, text="Because.", **stamp):
    tokens = [{"text": text, "logprob": -1.5}]
    values = {"model": model, "text": text, "ids": [7], "tokens": tokens}
    return values | {"stamp": {"fingerprint": f"fp_{model}", **stamp}}


def answers(of, *columns, **more):
    values = {"kind": "answers", "turn": of, "server": "hand", "settings": {}}
    return values | {"columns": [*columns], **more}


@pytest.fixture
def kept(tmp_path):
    return Conversations(tmp_path / "chats")


def two_turns(kept, **first):
    """A conversation of two turns; returns its id and the last answers."""
    chat, one = kept.add("", turn("One?", **first))
    _, said = kept.add(chat, answers(one["id"], column("base"), column("tuned", "B.")))
    _, two = kept.add(chat, turn("Two?", said["id"], "tuned"))
    _, last = kept.add(chat, answers(two["id"], column("base", "C.")))
    return chat, last["id"]


def test_a_way_follows_the_answers_that_were_taken(kept):
    chat, last = two_turns(kept, context="A passage.", system="Be kind.")
    found = kept.read(chat)
    way = found.way_to(last, "base")
    assert [(one["text"], each["text"]) for one, each in way] == [
        ("One?", "B."), ("Two?", "C."),
    ]  # fmt: skip
    messages, context = messages_of(way, turn("Three?"))
    assert [message["content"] for message in messages] == [
        "Be kind.", "One?", "B.", "Two?", "C.", "Three?",
    ]  # fmt: skip
    assert context == "A passage." and kept.title(chat) == "One?"
    for bad in ((last, "tuned"), ("absent", "base"), (found.lines[0]["id"], "base")):
        with pytest.raises(UserError):
            found.way_to(*bad)


def test_lines_of_two_tabs_and_a_torn_one_lose_nothing(kept, tmp_path):
    chat, _ = kept.add("", turn())
    path = tmp_path / "chats" / f"{chat}.jsonl"
    with path.open("ab") as file:
        file.write(b'{"kind": "turn", "te')
    writers = [
        threading.Thread(target=kept.add, args=(chat, turn(f"{i}?"))) for i in range(20)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = kept.read(chat)
    assert {line["text"] for line in found.lines} == {
        "Why?", *(f"{i}?" for i in range(20)),
    }  # fmt: skip
    assert found.bad == (2,)
    kept.remove(chat)
    assert kept.all() == [] and (tmp_path / "chats" / ".trash" / path.name).is_file()


@pytest.mark.parametrize(
    "line",
    [
        {}, {"kind": "other"}, {"kind": ["turn"]}, {"kind": "turn"}, turn(text=1),
        answers("x", {"model": "a"}), answers("x", column("a") | {"ids": ["1"]}),
        {"kind": "scores", "answers": "x", "model": "m", "own": [None], "base": []},
    ],
)  # fmt: skip
def test_what_is_no_line_is_refused(kept, line):
    with pytest.raises(PageError, match="no line of a conversation"):
        kept.add("", line)
    assert kept.all() == []


@pytest.mark.parametrize("name", ["", "..", "a" * 12 + "/", "0" * 12, "/etc/passwd"])
def test_only_conversations_are_read(kept, name):
    with pytest.raises(PageError) as caught:
        kept.read(name)
    assert caught.value.status == 404


def test_a_conversation_becomes_the_row_that_training_reads(kept):
    chat, _ = kept.add("", turn("One?", context="A passage.", system="Be kind."))
    one = kept.read(chat).lines[0]["id"]
    _, said = kept.add(chat, answers(one, column("base", 'Line\n"two".')))
    row = json.loads(row_of(kept.read(chat).way_to(said["id"], "base")))
    assert row == {
        "instruction": "One?", "context": "A passage.", "response": 'Line\n"two".',
        "system": "Be kind.", "category": "chat",
    }  # fmt: skip
    record = to_record(row, ColumnsConfig(), "a:1")
    assert [x.role for x in record.turns] == ["system", "user", "assistant"]
    assert record.context == "A passage."
    chat, last = two_turns(kept, context="A passage.", system="Be kind.")
    row = json.loads(row_of(kept.read(chat).way_to(last, "base")))
    turns = to_record(row, ColumnsConfig(), "a:1").turns
    assert [(x.role, x.text) for x in turns] == [
        ("system", "Be kind."), ("user", "One?\n\nA passage."), ("assistant", "B."),
        ("user", "Two?"), ("assistant", "C."),
    ]  # fmt: skip
    with pytest.raises(UserError, match="one is empty"):
        row_of([])


def test_rows_are_added_below_the_data_alone(site):
    roots, data = site.state.data, site.data
    (data / "old.jsonl").write_text('{"torn": 1}')
    (data / "out.jsonl").symlink_to("/tmp/elsewhere.jsonl")
    (data / "inner").mkdir()
    for name in ("old.jsonl", "data/old.jsonl", "data/inner/new.jsonl"):
        append_row(roots, name, '{"a": 1}\n')
    written = (data / "old.jsonl").read_text()
    assert written == '{"torn": 1}\n{"a": 1}\n{"a": 1}\n'
    assert (data / "inner" / "new.jsonl").is_file()
    bad = ("x.csv", "", "../x.jsonl", "data/../../x.jsonl", "/etc/x.jsonl", "a\0.jsonl")
    bad += ("a\n.jsonl", ".x.jsonl", "data/.hidden/x.jsonl", "a\u202e.jsonl")
    (data / ".hidden").mkdir()
    for name in (*bad, "runs/x.jsonl", "data/absent/x.jsonl", "out.jsonl"):
        with pytest.raises((UserError, PageError)):
            append_row(roots, name, "{}\n")


def test_win_rates_have_wilsons_interval_and_a_prompt_counts_once(tmp_path):
    for wins, count in ((0, 4), (3, 10), (10, 10)):
        known = stats.binomtest(wins, count).proportion_ci(method="wilson")
        assert wilson(wins / count, count) == pytest.approx((known.low, known.high))
    votes = BlindVotes(tmp_path)
    for i in range(12):
        line = answers("t", column("base"), column("tuned")) | {"id": f"a{i}"}
        votes.add("chat", line, f"prompt {i}", "tuned" if i < 9 else "", "me")
    for i in range(50):  # One prompt, again and again.
        line = answers("t", column("base"), column("tuned")) | {"id": f"b{i}"}
        votes.add("chat", line, "prompt 0", "base", "me")
    with (tmp_path / blind_votes.NAME).open("a") as file:
        file.write("{torn")
    read, bad = votes.read()
    assert (len(read), len(bad)) == (62, 1)
    tuned, base = win_rates(read)
    assert (tuned.name, tuned.prompts, tuned.votes, tuned.ties) == ("tuned", 12, 62, 3)
    assert tuned.rate == pytest.approx((1 / 51 + 8 + 1.5) / 12)
    assert tuned.rate + base.rate == pytest.approx(1)
    assert (tuned.low, tuned.high) == pytest.approx(wilson(tuned.rate, 12))
    assert tuned.chance == 0.5 and tuned.verdict == "preferred"
    assert win_rates(read[:1])[0].verdict == "cannot be told yet"


@pytest.fixture
def hand(site, socket_folder):
    """A server `hand` with the models `base` and `tuned`."""
    fake = FakeUpstream(socket_folder / "hand", said_by_models)
    list_server(site.runs / ".studio" / "servers", "hand", uds=str(fake.path))
    yield fake
    fake.stop()


def test_the_form_asks_all_models_and_the_page_shows_what_is_kept(site, hand):
    client = site.client()
    page = client.get("/chat").text
    assert "ready" in page and 'name="model" value="tuned"' in page
    form = {"server": "hand", "model": ["base", "tuned"], "text": EVIL, "seed": "7"}
    form |= {"context": "A passage.", "system": "", "temperature": "0.5", "stop": "x"}
    there = client.post("/act/chat/ask", data=form).headers["location"]
    asked = [json.loads(body) for top, body in hand.requests if "/chat/" in top]
    assert {x["model"] for x in asked} == {"base", "tuned"}
    for one in asked:
        assert one["messages"] == [{"role": "user", "content": EVIL}]
        assert (one["context"], one["seed"], one["stop"]) == ("A passage.", 7, "x")
    page = client.get(there).text
    assert "tuned says &lt;b&gt;" in page and "fp_tuned · step 30" in page
    assert "template chat f24189f0" in page  # The beginning of its sha256.
    assert EVIL not in page and "<script>alert" not in page
    chat = there.partition("chat=")[2]
    found = client.get(f"/api/chats/{chat}").json()
    one, said = found["lines"]
    form |= {"chat": chat, "parent": said["id"], "chosen": "tuned", "text": "And?"}
    assert client.post("/act/chat/ask", data=form).status_code == 303
    last = json.loads(hand.requests[-1][1])["messages"]
    assert [x["content"] for x in last] == [EVIL, "tuned says <b>", "And?"]
    fields = {"chat": chat, "answers": said["id"], "model": "tuned"}
    row = client.get("/chat/rows", params=fields)
    assert json.loads(row.text)["response"] == "tuned says <b>"
    added = client.post("/act/chat/rows", data=fields | {"file": "mine.jsonl"})
    assert added.status_code == 303
    assert (site.data / "mine.jsonl").read_text() == row.text
    bad = {"temperature": "warm"}, {"model": "absent"}, {"text": " "}
    for change in bad:
        assert client.post("/act/chat/ask", data=form | change).status_code == 400
    vote = {"chat": chat, "answers": said["id"], "winner": "tuned"}
    assert client.post("/act/vote", data=vote | {"winner": "x"}).status_code == 400
    assert client.post("/act/vote", data=vote).json()[0]["name"] == "tuned"
    assert client.post("/act/vote", data=vote).status_code == 409
    assert "cannot be told yet" in client.get("/chat").text
    with (site.runs / ".studio" / "chats" / f"{chat}.jsonl").open("a") as file:
        file.write('{"kind": "tu\n')
    # Scripts replace what is in #chat, so a warning there would not be seen.
    page = client.get(f"/chat?chat={chat}").text
    assert "damaged: 1 line of this" in page.partition('id="chat"')[0]
    assert client.post("/act/chat/remove", data={"chat": chat}).status_code == 303
    assert client.get(f"/chat?chat={chat}").status_code == 404


def test_a_key_that_looks_reads_chats_and_asks_nothing(tmp_path):
    site = StudioPlace(tmp_path, f"{'looks-only-' * 2}\nadmin {TOKEN}")
    client = site.client("looks-only-" * 2)
    assert client.get("/chat").status_code == 200
    for path in ("/act/chat/ask", "/act/chat/serve", "/api/chats", "/act/vote"):
        assert client.post(path, data={}).status_code == 403
    assert client.post("/api/servers/a/v1/completions").status_code == 403


def test_the_command_of_a_server_is_shown_before_it_starts(site, monkeypatch):
    monkeypatch.chdir(site.runs.parent)
    for name, base in (("a", "1" * 64), ("b", "2" * 64)):
        run = make_run(site.runs / name, "finished")
        (run / "identity.json").write_text(json.dumps({"base model": base}))
        (run / "checkpoints" / "30").mkdir(parents=True)
    (site.runs / "prod").mkdir()
    (site.runs / "prod" / "alias.json").write_text("{}")
    client = site.client()
    page = client.get("/chat").text
    assert "<option>runs/prod</option>" in page
    assert '<optgroup label="base 11111111">' in page and "runs/b@30" in page
    page = client.get("/chat", params={"run": ["runs/a", "runs/a@30", "", ""]}).text
    assert "-m research.serve --run=runs/a --run=runs/a@30 --port=87" in page
    page = client.get("/chat", params={"run": ["", ""]}).text
    assert "-m research.serve --model=pkg://" in page
    for bad in (["runs/absent"], ["runs/../../etc"], [f"runs/a@{i}" for i in range(5)]):
        page = client.get("/chat", params={"run": bad}).text
        assert 'role="alert"' in page and "--port=" not in page
