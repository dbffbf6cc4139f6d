"""No command of a page gets a path that leads out of the roots."""

import dataclasses
import html

import pytest
from studio_place import make_run

from research.config.run_config import Config
from research.core.errors import UserError
from research.studio.jobs.job_queue import JobQueue
from research.studio.page_errors import PageError

PRESET = "--config=configs/finetune_dolly.py"
TEXTS = "--config=configs/pretrain_tiny.py"
SECRET = '{"the secret column": "1", "instruction": "a", "response": "b"}\n'
OUT = {
    "data.path": "/etc/passwd",
    "data.eval_path": "RUNS/../x.jsonl,/etc/passwd",
    "model.init_from": "/etc/x.gguf",
    "text.sources": "('x=/etc/passwd',)",
    "text.tokenizer": "/etc/tokenizer.json",
    "text.cache_dir": "/tmp/x",
    "runtime.compilation_cache": "/tmp/x",
}
TAKEN = {
    "run_dir=RUNS": "holds all runs",
    "run_dir=RUNS/.studio/queue-x": "begins with a dot",
    "run_dir=RUNS/tuned/sub": "lies in the run",
    "text.cache_dir=RUNS/tuned": "lies in the run",
    "text.cache_dir=DATA/cache": "outside of",
    "data.path=RUNS/.studio/audit.jsonl": "begins with a dot",
    "data.path=DATA/sub": "leads out",
    "data.path=DATA/*/*.jsonl": "leads out",
    "text.sources=('x=DATA/above',)": "leads out",
    "model.init_from=DATA/sub": "leads out",
    "model.init_from=pkg://os//etc/x.gguf": "an address",
    "model.init_from=pkg://os/../x.gguf": "an address",
}
WRONG = {f"{knob}={value}": "outside of" for knob, value in OUT.items()} | TAKEN


@pytest.fixture
def full(site, monkeypatch):
    """A run, and a data folder with links that lead out."""
    monkeypatch.setattr(JobQueue, "work", lambda self: None)
    secret = site.data.parent / "secret.jsonl"
    secret.write_text(SECRET)
    for name in ("sub", "hidden/inner"):
        (site.data / name).mkdir(parents=True)
    (site.data / "sub" / "a.jsonl").symlink_to(secret)
    # A link to a folder of the roots, and from there out of them.
    (site.data / "hidden" / "inner" / "a.jsonl").symlink_to(secret)
    (site.data / "above").mkdir()
    (site.data / "above" / "link").symlink_to(site.data / "hidden")
    run = make_run(site.runs / "tuned")
    (run / "checkpoints" / "20").mkdir(parents=True)
    return site


def written(site, text):
    return text.replace("RUNS", str(site.runs)).replace("DATA", str(site.data))


@pytest.mark.parametrize("change, said", WRONG.items())
def test_a_start_and_a_branch_lead_nowhere_out(full, change, said):
    knobs = f'"{written(full, f"--config.{change}")}"'
    if change.startswith("data.eval_path"):
        knobs += " --config.data.path=embedded"
    preset = TEXTS if change.startswith("text.") else PRESET
    client = full.client()
    answers = [client.post("/act/train", data={"flags": f"{preset} {knobs}"})]
    # The branch sets two of the knobs itself, and has no use for texts.
    if not change.startswith(("run_dir", "model.init_from", "text.")):
        fields = {"run": "runs/tuned", "step": "20", "target": "b", "changes": knobs}
        answers.append(client.post("/act/branch", data=fields))
    for answer in answers:
        assert answer.status_code in (400, 403)
        assert said in html.unescape(answer.text)
    assert not full.state.queue.read().waiting


def test_a_run_whose_data_lies_outside_is_not_resumed(full):
    rows = dataclasses.replace(Config().data, path="/etc/passwd")
    make_run(full.runs / "by_hand", data=rows)
    answer = full.client().post("/act/resume", data={"run": "runs/by_hand"})
    assert answer.status_code == 403
    assert "config.data.path: /etc/passwd lies outside of" in answer.text
    assert "--data of the studio may be repeated" in answer.text


@pytest.mark.parametrize(
    "flags, said",
    [
        (f"--axis=model.init_from=/etc,/root -- {PRESET}", "outside of"),
        (f"--axis=text.sources=x=DATA/rows.jsonl,x=/etc -- {PRESET}", "outside of"),
        (f"--axis=lora.rank=1,2 -- {PRESET} --config.text.sources=x=/etc", "outside"),
        (f"--axis=lora.rank=1,2 -- {PRESET} --config.text.cache_dir=/tmp/x", "outside"),
        ("--sweep=configs/sweeps/lora_rank.py -- --config.data.path=/etc", "outside"),
        (f"--axis=lora.rank=1,2 --folder=RUNS/tuned/x -- {PRESET}", "in the run"),
        (f"--axis=lora.rank=1,2 --folder=RUNS/.studio/x -- {PRESET}", "with a dot"),
        ("--axis=lora.rank=1,2 -- --config=RUNS/by_hand", "outside of"),
    ],
)
def test_a_sweep_leads_nowhere_out(full, flags, said):
    rows = dataclasses.replace(Config().data, path="/etc/passwd")
    make_run(full.runs / "by_hand", data=rows)
    form = {"flags": written(full, flags)}
    answer = full.client().post("/act/sweep", data=form)
    assert answer.status_code in (400, 403) and said in html.unescape(answer.text)
    assert not full.state.queue.read().waiting


def test_an_evaluation_reads_no_link_that_leads_out(full):
    flags = written(full, "--run=RUNS/tuned --data=DATA/sub")
    answer = full.client().post("/act/evaluate", data={"flags": flags})
    assert answer.status_code == 403 and "leads out" in answer.text


@pytest.mark.parametrize("chosen", ["data/sub", "data/above&read=text", "data"])
def test_the_data_page_shows_nothing_of_a_link_that_leads_out(full, chosen):
    answer = full.client().get(f"/data?file={chosen}")
    assert answer.status_code == 403 and "leads out" in answer.text
    assert "the secret column" not in answer.text


def test_what_lies_below_the_roots_or_is_no_path_is_taken(full):
    confined, own = full.state.confined, full.runs / "new"
    (full.data / "rows.jsonl").write_text(SECRET)
    for knob, value in (
        ("run_dir", "RUNS/new"), ("run_dir", "RUNS/tuned"), ("data.path", "embedded"),
        ("data.path", "hub://a/b,DATA/rows.jsonl,DATA/*.jsonl"), ("data.path", ""),
        ("model.init_from", Config().model.init_from), ("model.init_from", "hub://a/b"),
        ("model.init_from", "RUNS/tuned@20"), ("model.init_from", "DATA/base"),
        ("text.sources", ("a=stdlib", "b=DATA/rows.jsonl", "c=hub://a/b")),
        ("text.tokenizer", "bpe:4096"), ("text.tokenizer", "byte"),
        ("text.cache_dir", "RUNS/cache"), ("text.cache_dir", "RUNS/new/cache"),
        ("text.cache_dir", "auto"), ("runtime.compilation_cache", ""),
    ):  # fmt: skip
        site = full.runs / "tuned" if value == "RUNS/tuned" else own
        is_list = isinstance(value, tuple)
        value = (
            tuple(written(full, part) for part in value)
            if is_list
            else written(full, value)
        )
        confined.check_knob(knob, value, site)
    with pytest.raises(PageError, match="outside of"):
        confined.check_knob("data.path", "auto", own)  # A word of another knob.
    with pytest.raises(UserError, match="is no path"):
        confined.check_knob("data.path", str(full.data / "a\0b"), own)
