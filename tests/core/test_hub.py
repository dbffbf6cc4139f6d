"""A run keeps the commits of its hub addresses; the cache gives only whole models."""

import dataclasses
import fnmatch
import json
import shutil

import pytest
from hub_fakes import COMMIT, HubDataset, fake_hub
from text_helpers import text_and_data, text_config
from tiny_model import make_tiny_model

from research.config.run_config import Config, DataConfig, ModelConfig
from research.core import hub_access
from research.core.errors import UserError
from research.data.instructions.row_selection import load_rows
from research.data.text.choose_tokenizer import open_tokenizer
from research.data.text.source_fingerprint import source_key
from research.data.text.streaming import load_streamed
from research.data.text.text_sources import open_sources
from research.formats.base_model import open_base
from research.runs.lineage import hub_pins
from research.runs.lineage.start_pins import pin_start
from research.runs.run_directory import RunDir
from research.tokenize.tokenizer_training import byte_tokenizer, save_tokenizer

LATER = "f" * 40
IDENTITY = {"base model": "b", "tokenizer": "t", "data": "d"}
TEXT = Config(
    model=ModelConfig(init_from="", preset="tiny"),
    trainable="full",
    data=DataConfig(kind="text"),
    text=dataclasses.replace(
        Config().text,
        sources=("web=hub://o/web:en@train", "own=stdlib"),
        tokenizer="hub://o/tok@v1",
    ),
)
ROWS = Config(
    model=ModelConfig(init_from="hub://o/model"), data=DataConfig(path="hub://o/rows")
)


@pytest.fixture
def hub(monkeypatch):
    """The hub gives this commit of everything, and remembers who was asked for."""
    asked = []
    monkeypatch.setattr(hub_access, "cached_commit", lambda address: "")

    def ask(address, timeout):
        asked.append(str(address))
        return hub_access.HubReply(hub.commit, "" if hub.commit else "away")

    monkeypatch.setattr(hub_access, "ask_hub", ask)
    hub.commit, hub.asked = COMMIT, asked
    return hub


def addresses(config):
    return (
        config.model.init_from, config.data.path, config.text.tokenizer,
        *config.text.sources,
    )  # fmt: skip


@pytest.mark.parametrize("config", [TEXT, ROWS, Config()], ids=["text", "rows", ""])
def test_a_run_keeps_its_commits_whatever_happens_upstream(tmp_path, hub, config):
    folder = RunDir(tmp_path / "run")
    first = pin_start(folder, config)
    with folder.create(first, IDENTITY, []):
        pass
    folder._lock.release()
    pinned = [each for each in addresses(first) if COMMIT in each]
    assert len(pinned) == len(hub.asked) > 0
    hub.commit = LATER
    again = RunDir(folder.path)
    assert again.check_config(config) == {}
    assert pin_start(again, config) == first == again.config()
    assert len(hub.asked) == len(pinned), "nobody was asked again"
    hub.commit = ""
    assert pin_start(RunDir(folder.path), config) == first


def test_a_commit_or_branch_that_differs_is_another_config(tmp_path, hub):
    folder = RunDir(tmp_path / "run")
    with folder.create(pin_start(folder, ROWS), IDENTITY, []):
        pass
    folder._lock.release()
    for revision in (LATER, "v2"):
        other = dataclasses.replace(
            ROWS, data=DataConfig(path=f"hub://o/rows@{revision}")
        )
        with pytest.raises(UserError, match=rf"data\.path.*@{COMMIT}.*@{revision}"):
            RunDir(folder.path).check_config(other)
    same = dataclasses.replace(ROWS, data=DataConfig(path=f"hub://o/rows@{COMMIT}"))
    assert RunDir(folder.path).check_config(same) == {}


def test_a_run_of_an_older_version_gets_its_commits_at_its_next_start(tmp_path, hub):
    folder = RunDir(tmp_path / "run")
    with folder.create(TEXT, IDENTITY, []):  # As it was written, and no file of pins.
        pass
    folder._lock.release()
    for commit in (COMMIT, LATER):
        hub.commit = commit
        again = RunDir(folder.path)
        assert again.check_config(TEXT) == {}
        assert (
            f"web=hub://o/web@{COMMIT}:en@train" in pin_start(again, TEXT).text.sources
        )
        again.keep_pins()
    for held in (
        "[1]",
        '{"hub://o/web": 5}',
        '{"hub://o/web": null}',
        '{"hub://o/web": "hub://o/web@main"}',
        '{"hub://o/web": "elsewhere"}',
    ):
        (folder.path / "hub_revisions.json").write_text(held)
        with pytest.raises(UserError, match=r"hub_revisions\.json.*restore a copy"):
            RunDir(folder.path).check_config(TEXT)


@pytest.mark.parametrize("config", [TEXT, ROWS], ids=["text", "rows"])
def test_no_run_begins_at_an_address_without_a_commit(
    tmp_path, hub, monkeypatch, config
):
    hub.commit = ""
    folder = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"hub://o/\S+ is out of reach \(away\).*cache"):
        pin_start(folder, config)
    monkeypatch.setattr(hub_access, "cached_commit", lambda address: LATER)
    found = pin_start(folder, config)
    assert all(f"@{LATER}" in x for x in addresses(found) if "hub://" in x)


def test_a_cache_that_names_no_commit_gives_none(cache):
    address = hub_access.HubAddress("o/tiny", "model")
    cache([])
    assert hub_access.cached_commit(address) == COMMIT
    cache([], COMMIT[:-1])
    assert hub_access.cached_commit(address) == ""


def test_without_a_hub_the_embedded_rows_are_chosen_for_good(tmp_path, hub):
    hub.commit = ""
    folder = RunDir(tmp_path / "run")
    first = pin_start(folder, Config())
    assert first.data.path == hub_pins.EMBEDDED
    with folder.create(first, IDENTITY, []):
        pass
    folder._lock.release()
    hub.commit = COMMIT
    assert pin_start(RunDir(folder.path), Config()).data.path == hub_pins.EMBEDDED
    assert load_rows(first.data, 0).source.origin == "embedded sample"


def test_rows_and_text_are_read_at_the_commit(tmp_path, monkeypatch):
    rows = [{"text": f"{i}: words of a document" * 9} for i in range(60)]
    asked = fake_hub(monkeypatch, HubDataset([rows]))
    kind = {"kind": "text"}
    config = text_config(tmp_path, "s=hub://o/n@v1:en", cache=False, data=kind)
    config = hub_pins.pinned(config, hub_pins.resolve_addresses(config, {}))
    fake_hub(monkeypatch, None, LATER)
    sources = open_sources(*text_and_data(config))
    asked = fake_hub(monkeypatch, HubDataset([rows]), LATER)
    data = load_streamed(config.text, config.data, sources, byte_tokenizer())
    next(data.train_iterator(4, 0))
    assert {(a["revision"], a["subset"]) for a in asked} == {(COMMIT, "en")}
    pairs = [{"instruction": "a", "response": "b"}]
    asked = fake_hub(monkeypatch, pairs, LATER)
    found = load_rows(DataConfig(path=f"hub://o/rows@{COMMIT}:x@test"), 0)
    assert len(found.marks) == 1 and asked == [
        {"name": "o/rows", "subset": "x", "split": "test", "revision": COMMIT}
    ]


def test_a_source_has_one_key_however_its_commit_was_found(tmp_path, hub):
    keys = {
        load_key(tmp_path, where)
        for where in ("hub://o/n:en", f"hub://o/n@{COMMIT}:en", "hub://o/n@main:en")
    }
    assert len(keys) == 1 and load_key(tmp_path, "hub://o/n") not in keys


def load_key(tmp_path, where):
    (source,) = open_sources(*text_and_data(text_config(tmp_path, f"s={where}")))
    return source_key(source, tmp_path, {})


# -- models and tokenizers in the hub's cache ------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch, hub):
    """The hub's local cache; `cache(files)` puts them there as a model's snapshot."""
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    away = hub_access.HubReply("", "away")
    monkeypatch.setattr(hub_access, "ask_hub", lambda *_: away)
    model = tmp_path / "hub" / "models--o--tiny"

    def put(files, commit=COMMIT):
        folder = model / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, folder)
        (model / "refs").mkdir(exist_ok=True)
        (model / "refs" / "main").write_text(commit)

    return put


def test_a_model_is_found_in_the_cache_at_its_commit(cache, tmp_path):
    exported_model = make_tiny_model(tmp_path / "model")
    cache(exported_model.iterdir())
    cache([exported_model / "config.json"], LATER)  # As the planner fetches it.
    found = open_base(f"hub://o/tiny@{COMMIT}")
    assert found.fingerprint == open_base(str(exported_model)).fingerprint
    with pytest.raises(UserError, match=r"lacks weights.*away.*local folder"):
        open_base("hub://o/tiny")
    with pytest.raises(UserError, match=r"no model on the hub; write hub://owner/name"):
        open_base("hub://o/tiny:en")


def test_a_sharded_model_without_one_shard_is_not_whole(cache, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    (tmp_path / "config.json").write_text("{}")
    cache([index, tmp_path / "config.json"])
    with pytest.raises(UserError, match="lacks weights"):
        open_base("hub://o/tiny")


def test_a_tokenizer_is_found_in_the_cache_at_its_commit(cache, tmp_path):
    save_tokenizer(byte_tokenizer(), tmp_path / "tokenizer")
    cache((tmp_path / "tokenizer").iterdir())
    config = text_config(tmp_path, "s=stdlib", tokenizer=f"hub://o/tiny@{COMMIT}")
    assert open_tokenizer(*text_and_data(config)).eos == byte_tokenizer().eos
    config = text_config(tmp_path, "s=stdlib", tokenizer=f"hub://o/tiny@{LATER}")
    with pytest.raises(UserError, match=r"cannot be fetched.*revision"):
        open_tokenizer(*text_and_data(config))


def test_files_are_fetched_at_the_commit_and_no_weights_twice(cache, monkeypatch):
    cache([])
    calls = []

    def download(name, **given):
        calls.append({"name": name, **given})
        if given["local_files_only"]:
            raise FileNotFoundError("not in the cache")
        raise ConnectionError("dropped")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    reply = hub_access.HubReply(LATER, "")
    monkeypatch.setattr(hub_access, "ask_hub", lambda *_: reply)
    with pytest.raises(UserError, match=r"hub://o/tiny@v1 cannot be fetched \(dropped"):
        open_base("hub://o/tiny@v1")
    assert [call["local_files_only"] for call in calls] == [True, False]
    for call in calls:
        assert (call["name"], call["revision"]) == ("o/tiny", LATER)
        ignored = call["ignore_patterns"]
        assert any(fnmatch.fnmatch("consolidated.safetensors", p) for p in ignored)
