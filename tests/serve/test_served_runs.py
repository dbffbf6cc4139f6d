"""Runs by name: listed, loaded, followed, exchanged while others are answered."""

import asyncio
import gc
import itertools
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import openai
import psutil
import pytest
from doors import run_door
from fake_upstream import list_server
from live_servers import QUEUE, LiveServer, open_tiny
from peft_exports import write_run
from small_run import one_device
from studio_place import StudioPlace

from research.core.errors import UserError
from research.parallel import runtime
from research.runs.answering.run_addresses import RunAddress
from research.runs.reopen import reopen
from research.serve import listening, model_reader, open_models
from research.serve.__main__ import main
from research.serve.api.api_errors import ApiError
from research.serve.open_models import Capacity
from research.tokenize.conversation import Turn

ASK = [{"role": "user", "content": "Are whales fish?"}]


@pytest.fixture(scope="module")
def served(place, runs, live):
    """The runs, where `live` has compiled what it can."""

    def open_runs():
        names = [str(runs / "tuned"), str(runs / "behind")]
        return open_tiny("", names, [runs.resolve()], adapters=0)

    server = LiveServer(open_runs).ready()
    assert not server.error, server.error
    yield server
    server.stop()


@pytest.fixture
def client(served):
    url = f"{served.url}/v1"
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as found:
        yield found
    served.idle()


def said(client, model, **options):
    answer = client.chat.completions.create(
        model=model, messages=ASK, max_tokens=16, logprobs=True, **options
    )
    return [token.logprob for token in answer.choices[0].logprobs.content]


def load(server, name, path, **more):
    body = {"lora_name": name, "lora_path": str(path), **more}
    return server.post("/v1/load_lora_adapter", body)


def test_runs_are_models_by_name_beside_their_base(client):
    cards = client.models.list().data
    assert [card.id for card in cards] == ["tuned", "behind", "base"]
    assert [card.parent for card in cards] == ["base", "base", None]
    assert cards[0].step > cards[1].step
    assert len({card.system_fingerprint for card in cards}) == 3
    answers = [said(client, card.id) for card in cards]
    assert answers[0] != answers[2] and answers[1] != answers[0]


def test_adapters_come_and_go_while_others_are_answered(client, served, runs):
    before = said(client, "tuned")
    stream = client.chat.completions.create(
        model="tuned", messages=ASK, max_tokens=60, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    next(stream)
    # Its content is loaded already, so it needs no row of its own.
    assert load(served, "again", runs / "tuned").status_code == 200
    assert said(client, "again") == before
    assert load(served, "again", runs / "tuned").status_code == 400
    step = client.models.retrieve("behind").step
    found = load(served, "again", f"{runs / 'behind'}@{step}", load_inplace=True)
    assert found.status_code == 200
    assert said(client, "again") == said(client, "behind") != before
    gone = served.post("/v1/unload_lora_adapter", {"lora_name": "again"})
    assert gone.status_code == 200
    with pytest.raises(openai.NotFoundError, match="tuned, behind, base"):
        said(client, "again")
    assert len([*stream]) > 40
    assert said(client, "tuned") == before


def test_an_adapter_folder_of_peft_is_loaded_as_its_run_is(client, served, runs):
    before = said(client, "tuned")
    write_run(reopen(runs / "tuned", one_device()), runs / "peft")
    gone = served.post("/v1/unload_lora_adapter", {"lora_name": "behind"})
    found = load(served, "peft", runs / "peft")
    assert gone.status_code == found.status_code == 200, found.text
    assert said(client, "peft") == before
    served.deployment.follow()
    gone = served.post("/v1/unload_lora_adapter", {"lora_name": "peft"})
    back = load(served, "behind", runs / "behind")
    assert gone.status_code == back.status_code == 200, back.text
    shutil.rmtree(runs / "peft")


def test_what_cannot_be_loaded_is_explained_and_changes_nothing(served, runs):
    found = load(served, "refused", runs / "other")
    assert found.status_code == 400
    message = found.json()["error"]["message"]
    assert "other" in message and "000000000000" in message and "sha256" in message
    for path, status in (
        (runs / "absent", 404), (runs, 400), (runs / "tuned@99", 400),
        (runs / ".." / "x", 403), (runs / "tuned" / "config.json", 404),
    ):  # fmt: skip
        found = load(served, "refused", path)
        assert found.status_code == status, (path, found.text)
    assert "refused" not in served.get("/v1/models").text


def test_a_run_is_followed_to_its_newest_checkpoint(client, served, runs):
    found = [said(client, "behind")]
    before = client.models.retrieve("behind").step
    steps = [int(x.name) for x in runs.iterdir() if x.name.isdigit()]
    for step in sorted(steps):
        shutil.move(runs / str(step), runs / "behind" / "checkpoints" / str(step))
        served.deployment.follow()
        assert client.models.retrieve("behind").step == step > before
        found.append(said(client, "behind"))
    # Each has weights of its own, and only the last one is in a row already.
    assert steps and found[-1] == said(client, "tuned")
    assert all(old != new for old, new in itertools.pairwise(found))


def test_followers_do_not_keep_the_weights_that_were_exchanged(monkeypatch):
    class Weights:
        pass

    def opened():
        base = SimpleNamespace(identity="sha")
        return SimpleNamespace(served_base=base, params=Weights(), reread=reread)

    def reread(*_):
        return opened()

    def first(*_):
        found = opened()
        return found, SimpleNamespace(params=found.params)

    address = {"name": "a", "folder": "a", "step": "latest"}

    def follow(decoder, row, perform, check):
        old = weakref.ref(decoder.params)
        for kind in ("weights", "place"):
            perform({"kind": kind, "number": 1, "address": address})
        gc.collect()
        assert decoder.params and old() is None

    monkeypatch.setattr(open_models, "_open_decoder", first)
    monkeypatch.setattr(open_models, "follow", follow)
    open_models.follow_models((), "", None)


def test_a_process_finds_what_it_cannot_read_before_it_reads(tmp_path):
    reader = model_reader.ModelReader(None, None)
    address = RunAddress("a", tmp_path / "a", "latest")
    fields = {"name": "a", "folder": str(address.folder), "step": "latest"}
    task = {"kind": "weights", "address": fields, "number": 3}
    with pytest.raises(UserError, match=r"no checkpoint .*a/checkpoints/3"):
        reader.check(task)
    saved = tmp_path / "a" / "checkpoints" / "3"
    saved.mkdir(parents=True)
    reader.check(task)
    (saved / "hidden").symlink_to("absent")
    with pytest.raises(UserError, match="hidden may not be read"):
        reader.check(task)


def test_processes_with_other_folders_are_told_the_whole_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_reader, "newest_step", lambda address: (3, ""))
    task = model_reader.reading("adapter", RunAddress("a", Path("a"), "3"))
    assert task["address"]["folder"] == str(tmp_path / "a") and task["number"] == 3


def test_following_outlasts_a_look_that_fails(monkeypatch, caplog):
    monkeypatch.setattr(listening, "FOLLOW_EVERY", 0)
    ends = iter([MemoryError("RESOURCE_EXHAUSTED"), None, ApiError(503, "loading")])

    class State:
        deployment = SimpleNamespace(follow=None)

        async def in_admin_thread(self, _):
            error = next(ends, asyncio.CancelledError())
            if error:
                raise error

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(listening._follow(State()))
    assert "RESOURCE_EXHAUSTED" in caplog.text and "loading" not in caplog.text


@pytest.mark.soak
def test_a_fully_trained_run_is_followed(place, pretrained, tmp_path, caplog):
    assert pretrained.code == 0, pretrained.err
    run = shutil.copytree(place.run_dir("pretrained"), tmp_path / "run")
    newest = max(place.saved_steps("pretrained"))
    shutil.move(run / "checkpoints" / str(newest), tmp_path / "newest")
    capacity = Capacity(2, 64, 0, 0, QUEUE, 1 << 20)
    mesh = one_device()
    server = LiveServer(
        lambda: open_models.open_models([str(run)], "", capacity, mesh=mesh)
    )
    try:
        assert not server.ready().error, server.error
        ask = {"model": "run", "prompt": "import ", "max_tokens": 20, "logprobs": 0}

        def said():
            found = server.post("/v1/completions", ask).json()
            return found["choices"][0]["logprobs"], found["system_fingerprint"]

        old, traces = said(), server.deployment.engine._decoder.traces
        shutil.move(tmp_path / "newest", run / "checkpoints" / str(newest))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(open_models, "_free_bytes", lambda mesh: 1000)
            server.deployment.follow()
        assert "need" in caplog.text and "are free" in caplog.text and said() == old
        server.deployment.follow()
        new = said()
        assert new[0] != old[0] and new[1] != old[1]
        card = server.get("/v1/models/run").json()
        assert card["step"] == newest
        assert server.deployment.engine._decoder.traces == traces
    finally:
        server.stop()
    fresh = LiveServer(
        lambda: open_models.open_models([str(run)], "", capacity, mesh=mesh)
    )
    try:
        server = fresh.ready()
        assert said() == new
    finally:
        fresh.stop()


def test_free_memory_is_that_of_the_container_and_of_the_devices_in_use(monkeypatch):
    own = psutil.Process().memory_info().rss
    monkeypatch.setattr(open_models, "memory_limit", lambda: own * 1.5)
    assert open_models._free_bytes(one_device()) < own
    stats = {"bytes_limit": 9, "bytes_in_use": 4}
    device = SimpleNamespace(memory_stats=lambda: stats)
    assert open_models._free_bytes(SimpleNamespace(local_devices=[device])) == 5


def test_slots_without_room_say_how_many_fit(place, monkeypatch):
    monkeypatch.setattr(open_models, "_free_bytes", lambda mesh: 10 << 20)
    capacity = open_models.Capacity(1000, 512, 0, 4, 9, 0)
    with pytest.raises(UserError, match=r"--slots=1000.*use --slots=(\d+)$") as caught:
        open_models.open_models((), str(place.folder / "model"), capacity)
    assert 1 <= int(str(caught.value).rpartition("=")[2]) < 1000
    with pytest.raises(UserError, match="context is 512"):
        capacity = open_models.Capacity(1, 513, 0, 4, 9, 0)
        open_models.open_models((), str(place.folder / "model"), capacity)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ((), "--run=RUN_DIR is missing"),
        (("--run=absent", "--port=0"), "absent is no run directory"),
        (("--run=a", "--host=0.0.0.0"), "--api_key_file is needed"),
        (("--run=a", "--api_key_file=absent"), "--api_key_file=absent cannot be read"),
        (("--run=a", "--port=65536"), "--port is 65536"),
        (("--run=a", "--slots=-1"), "--slots is -1"),
    ],
)
def test_a_command_that_cannot_serve_says_why(tmp_path, monkeypatch, flags, found):
    monkeypatch.setattr(runtime, "start_alone", lambda: None)
    ended = run_door(main, tmp_path, "serve", *flags)
    assert ended.returncode == 2
    assert found in ended.stderr and "Traceback" not in ended.stderr


def test_the_chat_of_the_studio_shows_exactly_these_models(served, client, tmp_path):
    """Answers, stamps, prompts with a context, and scores under the base."""
    studio = StudioPlace(tmp_path)
    list_server(studio.runs / ".studio" / "servers", "hand", port=served.port)
    tab = studio.client()
    page = tab.get("/chat").text
    assert all(f'value="{name}" checked' in page for name in ("base", "tuned"))
    names, options = ["base", "tuned", "behind"], {"temperature": 0.9, "seed": 5}
    form = {"server": "hand", "model": names, "text": "Are whales fish?"}
    form |= {**options, "max_tokens": 8, "context": "Whales breathe air."}
    there = tab.post("/act/chat/ask", data=form).headers["location"]
    lines = tab.get(f"/api/chats/{there.partition('chat=')[2]}").json()["lines"]
    cards = {card.id: card for card in client.models.list().data}
    extra = {"extra_body": {"context": "Whales breathe air.", "return_token_ids": True}}
    for column in lines[-1]["columns"]:
        card = cards[column["model"]]
        answer = client.chat.completions.create(
            model=card.id, messages=ASK, max_tokens=8, **options, **extra
        )
        assert column["ids"] == answer.choices[0].token_ids
        assert column["text"] == answer.choices[0].message.content
        stamp = column["stamp"]
        assert (stamp["step"], stamp["fingerprint"], stamp["base_model"]) == (
            card.step, card.system_fingerprint, "base",
        )  # fmt: skip
        path = "/api/servers/hand/tokenize"
        asked = {"model": card.id, "messages": ASK, "context": "Whales breathe air."}
        ids = tab.post(path, json=asked).json()["tokens"]
        model = served.deployment.models.find(card.id)
        turns = [Turn("user", "Are whales fish?")]
        assert ids == model.served.prompts.encode_prompt(turns, "Whales breathe air.")
        assert ids != model.served.prompts.encode_prompt(turns)
        assert column["prompt_tokens"] == len(ids)
        scored = {"model": card.id, "prompt": [*ids, *column["ids"]], "echo": True}
        scored |= {"logprobs": 0, "max_tokens": 0}
        path = "/api/servers/hand/v1/completions"
        found = tab.post(path, json=scored).json()["choices"][0]["logprobs"]
        said = [token["logprob"] for token in column["tokens"]]
        assert found["token_logprobs"][len(ids) :] == pytest.approx(said, abs=1e-3)
