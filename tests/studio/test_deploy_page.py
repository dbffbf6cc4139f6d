"""Deploy: aliases, exports, servers, keys and adapters, and what each writes."""

import ast
import html
import json
import re
import shlex
import stat
import tempfile
from pathlib import Path

import pytest
from doors import run_door
from fake_upstream import FakeUpstream, head, list_server
from studio_place import make_run

from research.config.choices import FormatChoice
from research.core.errors import UserError
from research.runs.aliases import __main__ as aliases_door
from research.runs.aliases import run_alias
from research.serve.api.prometheus_text import ServerMetrics
from research.serve.http.access_keys import KeyFile
from research.studio.deploying import deploy_page, key_lines, snippets
from research.studio.deploying.served_figures import figures_of
from research.studio.serving.model_servers import ModelServer


def with_steps(folder, *steps):
    make_run(folder, "finished")
    identity = dict.fromkeys(("run", "data", "base model", "tokenizer"), "x")
    (folder / "identity.json").write_text(json.dumps(identity))
    for step in steps:
        saved = folder / "checkpoints" / str(step)
        saved.mkdir(parents=True)
        (saved / "sums.json").write_text(json.dumps({"sum": f"{folder.name}{step}"}))
    return folder


RUN = deploy_page._run


@pytest.fixture(autouse=True)
def commands_in_this_process(monkeypatch):
    """The commands of buttons run as they are, without a start of Python."""

    def run(command):
        ended = run_door(aliases_door.main, ".", *command[2:])
        if ended.returncode:
            raise UserError(ended.stderr)

    monkeypatch.setattr(deploy_page, "_run", run)


def audit(site):
    return [(x["action"], x["what"]) for x in site.state.audit.read()]


def test_a_promotion_that_hangs_is_stopped_with_a_sentence(site, monkeypatch):
    with_steps(site.runs / "a", 2)
    hangs = ["python", "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(deploy_page, "_run", lambda command: RUN(hangs))
    monkeypatch.setattr(deploy_page, "PROMOTING", 0.2)
    fields = {"do": "promote", "run": "runs/a", "step": "2", "alias": "prod"}
    answer = site.client().post("/act/promote", data=fields)
    assert answer.status_code == 400
    assert "not ended within 0.2 s and was stopped" in answer.text


def test_an_alias_is_moved_by_the_command_that_the_page_shows(site):
    with_steps(site.runs / "a", 2, 4)
    client = site.client()
    fields = {"do": "promote", "run": "runs/a", "step": "2", "alias": "prod"}
    page = client.get("/deploy", params=fields).text
    command = f"--alias={site.runs}/prod --run={site.runs}/a@2"
    assert command in page and "Move the alias" in page
    assert client.post("/act/promote", data=fields).status_code == 303
    assert run_alias.target(site.runs / "prod") == (site.runs / "a", 2)
    assert audit(site) == [("promote", "prod")]
    assert "runs/a@2" in client.get("/deploy").text
    (line,) = site.state.audit.read()
    assert line["command"].endswith(command)
    # The alias is no run, and the step it stands for holds its run here.
    assert len(site.state.listed()) == 1
    refused = client.post("/act/trash", data={"run": "runs/a"})
    assert refused.status_code == 400 and "prod" in refused.text
    refused = client.post("/act/promote", data={"do": "back", "alias": "runs/prod"})
    assert "stood for nothing else" in refused.text


@pytest.mark.parametrize(
    "change, said",
    [
        ({"alias": "../out"}, "no name for an alias"),
        ({"alias": "runs/.hidden"}, "no name for an alias"),
        ({"alias": "data/x"}, "no name for an alias"),
        ({"alias": "a"}, "is something else already"),
        ({"step": "3"}, "has 2, best"),
        ({"step": "--x"}, "has 2, best"),
        ({"run": "runs/absent"}, "is not there"),
        ({"run": "runs/../a"}, "is no path of this studio"),
        ({"run": ""}, "choose a run"),
    ],
)
def test_an_alias_that_cannot_be_is_refused_in_one_sentence(site, change, said):
    with_steps(site.runs / "a", 2)
    fields = {"do": "promote", "run": "runs/a", "step": "2", "alias": "prod", **change}
    answer = site.client().post("/act/promote", data=fields)
    assert answer.status_code in (400, 403, 404) and said in answer.text
    assert not (site.runs / "prod").exists()


def test_an_export_is_a_job_of_the_queue_in_each_format(site, monkeypatch):
    monkeypatch.setattr(site.state.queue, "work", lambda: None)
    with_steps(site.runs / "a", 2, 4)
    client = site.client()
    added = FormatChoice("no.module", "tablets", ("clay",), ("runes",))
    monkeypatch.setitem(deploy_page.exports.EXPORT_FORMATS, "stone", added)
    formats = deploy_page.exports.known_formats()
    names = [x.name for x in formats]
    assert names[:3] == ["hf-float32", "hf-bfloat16", "hf-float16"]
    assert {"gguf-q8_0", "gguf-bfloat16", "peft-bfloat16"} < {*names}
    assert names[-3:] == ["gguf-adapter-float32", "stone-clay", "stone-runes"]
    for number, each in enumerate(formats):
        fields = {"do": "export", "run": "runs/a", "step": "", "format": each.name}
        assert client.post("/act/export", data=fields).status_code == 303
        job = site.state.queue.read().waiting[number]
        out = site.runs / "a" / "exports" / f"4-{each.name}"
        words = [f"--run={site.runs}/a", "--step=4", f"--out={out}", *each.flags]
        assert job.command[1:3] == ("-m", "research.export")
        assert [*job.command[3:]] == words
    assert "waits" in client.get("/deploy").text
    bad = client.post("/act/export", data={"run": "runs/a", "format": "odd"})
    assert bad.status_code == 400 and "hf-float32, hf-bfloat16, hf-float16" in bad.text


def test_exports_on_disk_are_listed_with_their_step_and_comparison(site):
    run = with_steps(site.runs / "a", 4)
    for name, facts in (
        ("4-float32", {"step": 4, "dtype": "float32", "files": {"x": []}}),
        ("4-checked", {"step": 4, "dtype": "int8", "verified": "32 tokens are equal"}),
        ("damaged", {"step": "4"}),
    ):
        folder = run / "exports" / name
        folder.mkdir(parents=True)
        (folder / "exported_from.json").write_text(json.dumps(facts))
    unfinished = ("gguf.partial", ".4-gguf.partial", ".4-gguf.replaced")
    for name in unfinished:
        (run / "exports" / name).mkdir()
    page = site.client().get("/deploy").text
    assert not [name for name in unfinished if name in page]
    assert "not compared; 1 files with checksums" in page
    assert "32 tokens are equal" in page
    assert "cannot be used" in page


@pytest.fixture
def started(site, monkeypatch):
    """The commands of servers that would have been started."""
    found = []

    def start(name, flags, by):
        command = site.state.servers.command(name, flags)
        found.append(command)
        folder = site.runs / ".studio" / "servers"
        return ModelServer(name, folder / name, tuple(command), 8701)

    monkeypatch.setattr(site.state.servers, "start", start)
    return found


def test_a_server_of_an_alias_is_started_by_the_command_that_is_shown(site, started):
    with_steps(site.runs / "a", 2)
    (site.runs / "prod").mkdir()
    (site.runs / "prod" / "alias.json").write_text('{"promotions": []}')
    client = site.client()
    fields = {"do": "serve", "name": "api", "run": ["runs/prod", "runs/a"]}
    fields |= {"port": "9123", "slots": "4", "weights": ""}
    page = client.get("/deploy", params=fields).text
    answer = client.post("/act/serve", data=fields)
    assert answer.headers["location"].startswith("/deploy/api")
    (command,) = started
    assert f"--run={site.runs}/prod" in command and "--slots=4" in command
    assert "--port=9123" in command and f"--adapters_from={site.runs}" in command
    assert " ".join(command[1:]) in page
    assert audit(site) == [("serve", "api")]
    for change, said in (
        ({"name": "../x"}, "is no name for a server"), ({"run": []}, "at least one"),
        ({"run": "runs"}, "is not a run directory"), ({"port": "x"}, "is no port"),
    ):  # fmt: skip
        refused = client.post("/act/serve", data=fields | change)
        assert refused.status_code in (400, 404) and said in refused.text
    assert len(started) == 1


def test_a_key_is_shown_once_kept_as_a_digest_and_removed(site, tmp_path):
    folder = site.runs / ".studio" / "servers"
    list_server(folder, "api", port=9, key_file=str(folder / "api" / "keys"))
    file = folder / "api" / "keys"
    file.write_text("admin the-key-of-the-studio-itself\n")
    file.chmod(0o600)
    keys = KeyFile(file)
    client = site.client()
    made = {"server": "api", "action": "make", "name": "ann's laptop", "role": "user"}
    assert client.post("/act/key", data=made).status_code == 400
    page = client.post("/act/key", data=made | {"name": "ann@laptop"})
    assert page.status_code == 200 and page.headers["cache-control"] == "no-store"
    (key,) = {*re.findall(r"<pre tabindex=\"0\">([\w-]{43})</pre>", page.text)}
    assert f"Bearer {key}" in page.text, "the program that asks can be pasted"
    assert key not in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.role(f"Bearer {key}".encode()) == "user"
    own, ann = key_lines.read_keys(file)
    assert own.is_own and ann.said.startswith("ann@laptop, made 20")
    again = client.get("/deploy/api").text
    assert key not in again and "ann@laptop" in again
    assert "the-key-of-the-studio" not in again
    assert site.state.servers.find("api").key() == "the-key-of-the-studio-itself"
    remove = {"server": "api", "action": "remove"}
    assert client.post("/act/key", data=remove | {"key": own.id}).status_code == 400
    assert client.post("/act/key", data=remove | {"key": ann.id}).status_code == 303
    assert keys.role(f"Bearer {key}".encode()) is None
    assert keys.role(b"Bearer the-key-of-the-studio-itself") == "admin"
    assert client.post("/act/key", data=remove | {"key": ann.id}).status_code == 400
    assert (
        audit(site)[0] == ("make key", "api")
        and key not in site.state.audit.path.read_text()
    )


def test_figures_are_sums_over_all_labels():
    metrics = ServerMetrics()
    for model, seconds in (("a", 2.0), ('b"} 7', 4.0)):
        metrics.whole.add(seconds, model=model)
        metrics.first_token.add(seconds / 8, model=model)
        metrics.generated.add(10, model=model)
    metrics.waiting.set(3)
    metrics.refused.add(status="429")
    found = figures_of(metrics.text(), [{"is_processing": True}, {}])
    assert found == {
        "slots": 2, "busy": 1, "waiting": 3, "answers": 2, "seconds": 6.0,
        "firsts": 2, "first_seconds": 0.75, "tokens": 20, "refused": 1,
    }  # fmt: skip


MODELS = [
    {"id": "base", "root": "m", "parent": None, "step": None},
    {"id": "tuned", "root": "runs/a", "parent": "base", "step": 2},
]
OF_ALL = {"system_fingerprint": "fp_1", "max_model_len": 64}
ANSWERS = {
    "/health": {"status": "ok"},
    "/v1/models": {"data": [x | OF_ALL for x in MODELS]},
    "/slots": [{"is_processing": True}, {"is_processing": False}],
    "/metrics": "research:num_requests_waiting 5\n",
    "/tokenize": {"tokens": [1]},
    "/v1/load_lora_adapter": "Success",
}


@pytest.fixture
def ready(site):
    """A server that is ready, as far as it shows; its requests."""

    def answer(connection, fake):
        top, _ = fake.requests[-1]
        said = ANSWERS.get(top.split()[1])
        status = 200 if said is not None else 404
        said = {"error": {"message": "no such adapter"}} if said is None else said
        body = said if isinstance(said, str) else json.dumps(said)
        connection.sendall(head(status, "application/json") + body.encode())

    with tempfile.TemporaryDirectory() as folder:
        fake = FakeUpstream(Path(folder, "socket"), answer)
        list_server(site.runs / ".studio" / "servers", "api", uds=str(fake.path))
        yield fake
        fake.stop()


def test_the_page_of_a_server_shows_models_slots_and_programs(site, ready):
    client = site.client()
    page = html.unescape(client.get("/deploy/api").text)
    assert "1 of 2" in page and "fp_1" in page
    assert '"model": "tuned"' in page and "model='tuned'" in page
    found = client.get("/api/served/api").json()
    assert found["state"] == "ready"
    assert (found["figures"]["busy"], found["figures"]["waiting"]) == (1, 5)
    assert "api" in client.get("/deploy").text


def test_a_server_that_stops_while_it_is_looked_at_is_no_error(
    site, ready, monkeypatch
):
    monkeypatch.delitem(ANSWERS, "/slots")
    found = site.client().get("/api/served/api")
    assert found.status_code == 200 and found.json()["figures"] is None
    assert site.client().get("/deploy/api").status_code == 200


def test_adapters_are_loaded_from_runs_of_the_studio_alone(site, ready):
    with_steps(site.runs / "a", 2)
    client = site.client()
    load = {"server": "api", "action": "load", "name": "", "run": "runs/a", "step": "2"}
    assert client.post("/act/adapter", data=load).status_code == 303
    top, body = ready.requests[-1]
    sent = {"lora_name": "a", "lora_path": f"{site.runs}/a@2"}
    assert "/v1/load_lora_adapter" in top and json.loads(body) == sent
    page = html.unescape(client.get("/deploy/api").text)
    assert f'"lora_name": "a", "lora_path": "{site.runs}/a"' in page
    assert "/v1/unload_lora_adapter" in page and '{"lora_name": "tuned"}' in page
    chosen = {"run": "runs/a", "step": "2", "name": "x y"}
    page = html.unescape(client.get("/deploy/api", params=chosen).text)
    assert f'"lora_name": "x y", "lora_path": "{site.runs}/a@2"' in page
    assert 'value="x y"' in page and "no run" not in page
    away = client.get("/deploy/api", params={"run": "runs/none"})
    assert away.status_code == 200 and "runs/none" in away.text
    count = len(ready.requests)
    for run in ("runs/../a", "/etc", "runs"):
        answer = client.post("/act/adapter", data=load | {"run": run})
        assert answer.status_code in (403, 404)
    assert len(ready.requests) == count
    gone = client.post("/act/adapter", data=load | {"action": "unload", "name": "x"})
    assert gone.status_code == 404 and "no such adapter" in gone.text
    assert [x[0] for x in audit(site)] == ["load", "unload"]


def test_remove_has_its_command_on_both_pages(site):
    fields = {"command": ["python"], "port": 9, "pid": 2**31 - 1, "born": 1.0}
    folder = list_server(site.runs / ".studio" / "servers", "old", **fields)
    client = site.client()
    for page in ("/deploy/old", "/chat?server=old"):
        assert f"rm -r {folder}" in client.get(page).text
    gone = client.post("/act/server", data={"server": "old", "action": "remove"})
    assert gone.status_code == 303 and not folder.exists()


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("uds", ["", "/tmp/a b/socket"])
def test_programs_hold_odd_names_as_text(tmp_path, is_chat, uds):
    """No name of a model ends the string or the word that holds it."""
    name = 'it\'s "odd" $HOME `x` \\ é'
    server = ModelServer("api", tmp_path, port=0 if uds else 9, uds=uds, key_file="k")
    command = shlex.split(snippets.curl(server, name, is_chat, "KEY"))
    sent = json.loads(command[command.index("-d") + 1])
    assert sent["model"] == name and "Authorization: Bearer KEY" in command
    assert ("messages" in sent) == is_chat
    program = ast.parse(snippets.openai_client(server, name, is_chat, "KEY"))
    texts = [x.value for x in ast.walk(program) if isinstance(x, ast.Constant)]
    assert name in texts and "KEY" in texts and (not uds or uds in texts)
