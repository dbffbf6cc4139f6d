"""Pre-training through the real commands, and what can be done with its result."""

import json
import math
import re
import shutil
import signal

import pytest
from commands import chain, snapshot
from kills import SAYS_PHASES, SLOW_DISK, torn, wait_for_a_save
from pretraining_runs import PRETRAIN_STEPS as STEPS
from pretraining_runs import pretrain
from refusals import Refusal

from research.core.errors import PREEMPTED
from research.data.grouped_values import by_group


@chain
def pretrained_in_parts(place, results):
    """The same, stopped in an evaluation, killed in a save, and finished."""
    results("pretrained")
    flags = ("--config=pretrain.py", "--config.run_dir=runs/parts")
    stopped = place.start("train", *flags, program=SAYS_PHASES)
    stopped.wait_for("phase evaluate 2")
    stopped.send(signal.SIGTERM)
    stopped = stopped.finish()
    killed = place.start("train", *flags, program=SLOW_DISK)
    wait_for_a_save(killed, place.run_dir("parts") / "checkpoints")
    killed.send(signal.SIGKILL)
    return stopped, killed.finish(), pretrain(place, "parts")


@chain
def streamed(place, results):
    """Without a cache, on two devices, by Muon."""
    results("pretrained")
    sizes = ("--config.mesh.fsdp=2",)
    return pretrain(
        place, "streamed", "--config.text.cache=False", "--config.export=False",
        "--config.optim.name=muon", *sizes, devices=2,
    )  # fmt: skip


@chain
def tuned_after(place, results):
    """Instruction tuning on the run's own model."""
    results("pretrained")
    return place.train(
        "tuned",
        "--config.model.init_from=runs/pretrained",
        "--config.data.template=dolly",
        "--config.eval.prompts=1",
        "--config.data.held_out=8",
    )


@chain
def continued(place, results):
    """Continued pre-training from open weights, with their own tokenizer."""
    results("pretrained")
    flags = (
        "--config.model.init_from=model",
        "--config.model.preset=",
        "--config.text.tokenizer=bpe:4096",
        "--config.optim.name=adafactor",
        "--config.optim.skip_spread=1e-3",
    )
    return pretrain(place, "continued", *flags)


WRITES = ("--run=runs/pretrained", "--max_new_tokens=8", "--prompt=def ")


@chain
def written(place, results):
    results("pretrained")
    return place.run("generate", *WRITES)


# -- a run ---------------------------------------------------------------------------


def test_pretraining_lowers_bits_per_byte_on_every_source(place, pretrained):
    assert pretrained.code == 0, pretrained.err
    held = place.lines("pretrained", "eval")
    assert [line["step"] for line in held] == [0, 4, 8, 12]
    for source in ("code", "words"):
        first, last = (held[i][f"bits_per_byte/{source}"] for i in (0, -1))
        assert last < 0.8 * first
    # A random model knows nothing: as many nats as the vocabulary has ids.
    assert held[0]["loss"] == pytest.approx(math.log(384), rel=0.1)


def test_every_step_has_its_loss_per_source(place, pretrained):
    lines = place.lines("pretrained", "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    seen = {name for line in lines for name in by_group(line, "loss")}
    assert seen == {"code", "words"}
    for line in lines:
        assert line["tokens"] == 8 * 64
        # Each of the 8 rows has one source, so the loss is made of eighths.
        code, words = (line.get(f"loss/{name}", 0.0) for name in ("code", "words"))
        mixed = [(n * code + (8 - n) * words) / 8 for n in range(9)]
        assert min(abs(line["loss"] - value) for value in mixed) < 1e-4
        assert line["skipped"] == 0


def test_bits_per_byte_are_the_loss_in_another_unit(place, pretrained):
    line = place.lines("pretrained", "eval")[-1]
    tokens = by_group(line, "tokens")
    nats = {name: line[f"loss/{name}"] * n for name, n in tokens.items()}
    sizes = {
        name: nats[name] / math.log(2) / bits
        for name, bits in by_group(line, "bits_per_byte").items()
    }
    for size in sizes.values():
        assert abs(size - round(size)) < 0.05, "whole bytes"
        assert 0 < size <= 20_000
    total = sum(nats.values()) / math.log(2) / sum(sizes.values())
    assert line["bits_per_byte"] == pytest.approx(total)


def test_samples_are_kept_as_it_learns(place, pretrained):
    run = place.run_dir("pretrained")
    lines = [json.loads(x) for x in (run / "samples.jsonl").read_text().splitlines()]
    found = [(line["step"], line["prompt"]) for line in lines]
    assert found == [(s, p) for s in (6, 12) for p in ("def ", "import ")]
    report = (run / "report.md").read_text()
    assert "Step 6:" in report and "bits/byte start" in report
    assert (run / "loss.png").stat().st_size > 10_000


def test_the_first_rows_of_text_are_kept_with_their_marks(place, pretrained):
    """A row of `seq_len` predictions; all of its tokens but the first are trained."""
    run = place.run_dir("pretrained")
    sources = {x["group"] for row in rows_of(run) for x in row["documents"]}
    evaluated = by_group(place.lines("pretrained", "eval")[0], "tokens")
    assert sources <= evaluated.keys() != set()
    length = json.loads((run / "config.json").read_text())["data"]["seq_len"]
    for row in rows_of(run):
        spans = [span for document in row["documents"] for span in document["spans"]]
        counts = [len(x["ids"]) for x in spans if x["trained"]]
        starts = [x["ids"] for x in spans if not x["trained"]]
        assert sum(counts) == length and {len(ids) for ids in starts} == {1}
    numbers = {x["name"]: x["numbers"] for x in doctor_of(run)["findings"]}
    assert numbers["trained tokens"]["share"] == 1.0


def rows_of(run):
    return json.loads((run / "preview.json").read_text())["rows"]


def doctor_of(run):
    return json.loads((run / "doctor.json").read_text())


def numbers(place, run):
    trained = {
        x["step"]: (x["loss"], x["grad_norm"]) for x in place.lines(run, "train")
    }
    held = {x["step"]: x["loss"] for x in place.lines(run, "eval")}
    return trained, held


@pytest.mark.soak
def test_a_broken_pretraining_equals_the_unbroken_one(
    place, pretrained, pretrained_in_parts
):
    stopped, killed, last = pretrained_in_parts
    assert stopped.code == PREEMPTED, stopped.err
    assert "stopped after step 4, which is saved" in stopped.err
    assert killed.code == -signal.SIGKILL and "step 4 restored" in killed.err
    assert last.code == 0, last.err
    assert torn(place.run_dir("parts") / "checkpoints") == []
    assert numbers(place, "parts") == numbers(place, "pretrained")
    exported = [
        (place.run_dir(run) / "model" / "model.safetensors").read_bytes()
        for run in ("parts", "pretrained")
    ]
    assert exported[0] == exported[1]


@pytest.mark.soak
def test_a_stream_without_a_cache_trains_on_any_mesh(place, streamed):
    assert streamed.code == 0, streamed.err
    held = place.lines("streamed", "eval")
    assert held[-1]["bits_per_byte"] < 0.8 * held[0]["bits_per_byte"]


@pytest.mark.soak
def test_skipped_steps_are_counted_and_told(place, continued):
    """A spread of almost nothing skips about half of the steps, once 32 are known."""
    assert continued.code == 0, continued.err
    assert place.lines("continued", "train")[-1]["skipped"] == 0
    assert "skipped" in continued.err


# -- what comes after ----------------------------------------------------------------


@pytest.mark.soak
def test_instruction_tuning_starts_from_the_pretrained_model(place, tuned_after):
    assert tuned_after.code == 0, tuned_after.err
    held = place.lines("tuned", "eval")
    assert held[-1]["loss"] < held[0]["loss"]
    assert "bits_per_byte" not in held[-1]
    assert re.search(r"base model\W+runs/pretrained", tuned_after.out)


@pytest.mark.soak
def test_continued_pretraining_keeps_the_models_own_tokenizer(place, continued):
    assert continued.code == 0, continued.err
    assert re.search(r"tokenizer\W+259 ids", continued.out)
    saved = json.loads(
        (place.run_dir("continued") / "tokenizer" / "tokenizer.json").read_text()
    )
    assert "<|im_end|>" in {token["content"] for token in saved["added_tokens"]}
    held = place.lines("continued", "eval")
    assert held[-1]["bits_per_byte"] < held[0]["bits_per_byte"]


def test_a_pretrained_run_continues_a_prompt(written):
    """Eight tokens after twelve steps may well be blanks: anything written counts."""
    assert written.code == 0 and written.out.removesuffix("\n"), written.err


# -- what is refused -----------------------------------------------------------------


def sources(*texts):
    return f"--config.text.sources={texts!r}"


def mixture(*texts):
    return f"--config.text.mixture={texts!r}"


TEXT_REFUSALS = {
    "mixture of an unknown source": Refusal(
        (mixture("code=1", "wrods=1"),), ("wrods", "words")
    ),
    "negative weight": Refusal((mixture("code=1", "words=-1"),), ("words", "-1")),
    "weights of zero": Refusal((mixture("code=0", "words=0"),), ("zeros",)),
    "weight that is no number": Refusal((mixture("code=much"),), ("much",)),
    "source that is not there": Refusal((sources("x=absent"), mixture()), ("absent",)),
    "corpus smaller than a batch": Refusal(
        (
            *(sources("x=small.txt"), mixture(), "--config.text.tokenizer=byte"),
            *("--config.text.held_out_share=0", "--config.text.held_out_bytes=200000"),
            "--config.eval.every=10",
        ),
        ("training tokens", "513"),
        files=(("small.txt", "some words that are not held out"),),
    ),
    "folder without readable text": Refusal(
        (sources("x=binary"), mixture(), "--config.text.tokenizer=byte"),
        ("binary", "no readable text", "1 binary file"),
        files=(("binary/data.bin", "\0\1\2"),),
    ),
    "bytes that are not UTF-8": Refusal(
        (sources("x=latin"), mixture(), "--config.text.tokenizer=byte"),
        ("broken.txt:1", "byte 3", "undecodable"),
        files=(("latin/broken.txt", "abc\udcff def"), ("latin/good.txt", "good")),
    ),
    "tokenizer that is not there": Refusal(
        ("--config.text.tokenizer=absent.json",), ("absent.json",)
    ),
    "prompt longer than the context": Refusal(
        ("--config.eval.max_new_tokens=2046",), ("text_prompts", "def ")
    ),
    "no text column": Refusal(
        (sources("x=words.jsonl"), mixture(), "--config.text.column=txet"),
        ("words.jsonl:1", "txet", "text"),
    ),
    "unknown preset": Refusal(("--config.model.preset=tyni",), ("tyni", "tiny")),
    "vocabulary too small": Refusal(("--config.text.tokenizer=bpe:7",), ("7", "257")),
    "hub out of reach": Refusal(
        (sources("x=hub://owner/name"), mixture()), ("hub", "owner/name")
    ),
    "lora on random weights": Refusal(("--config.trainable=lora",), ("full",)),
    "neither weights nor shape": Refusal(("--config.model.preset=",), ("init_from",)),
}


@chain
def refused_text(place, results):
    """How each ended, whether it made a run directory, and files of its cache."""
    results("pretrained")
    commands = {}
    for name, case in TEXT_REFUSALS.items():
        for file, text in case.files:
            (place.folder / file).parent.mkdir(exist_ok=True)
            encoded = text.encode("utf-8", "surrogateescape")
            (place.folder / file).write_bytes(encoded)
        cache = f"--config.text.cache_dir={cache_of(place, name)}"
        flags = "--config=pretrain.py", f"--config.run_dir={run_of(place, name)}"
        commands[name] = place, "train", (*flags, cache, *case.flags), 1
    ended = place.run_short(commands)
    return {
        name: (
            finished,
            run_of(place, name).exists(),
            [f for f in cache_of(place, name).rglob("*") if f.is_file()],
        )
        for name, finished in ended.items()
    }


def run_of(place, name):
    return place.run_dir(name.replace(" ", "-"))


def cache_of(place, name):
    return place.folder / f"cache-{name.replace(' ', '-')}"


def made_whole(file):
    """Whether it lies in a finished cache."""
    return (file.parent / "manifest.json").exists()


@pytest.mark.parametrize("name", TEXT_REFUSALS)
def test_bad_text_is_refused_with_one_message(name, refused_text):
    finished, made, left = refused_text[name]
    assert finished.code == 2, finished.err
    assert "Traceback" not in finished.err
    assert len(re.findall("^error: ", finished.err, re.M)) == 1, finished.err
    message = finished.err.partition("error: ")[2]
    for part in TEXT_REFUSALS[name].names:
        assert part in message
    assert not made
    # Whole files may stay: a tokenizer, other sources' text, hashes.
    whole = {"tokenizer.json", "tokenizer_config.json", "manifest.json", "hashes.json"}
    whole |= {"used", "0"}  # When it was used, and the unit that was given up.
    halves = [f for f in left if f.name not in whole and not made_whole(f)]
    assert not halves
    assert finished.seconds < 60


def copy_pretrained(place, name):
    """The run again, as if its end had not been reached."""
    run = place.run_dir(name)
    shutil.copytree(place.run_dir("pretrained"), run)
    (run / "complete.json").unlink()
    return run


@chain
def other_inputs(place, results):
    """The finished run with something else than it was made from, by what that is.

    Each has how it ended; `text` also whether its run directory was as before.
    """
    results("pretrained")
    file = copy_pretrained(place, "swapped") / "tokenizer" / "tokenizer.json"
    rules = json.loads(file.read_text())
    rules["model"]["merges"].pop()
    file.write_text(json.dumps(rules))
    run = copy_pretrained(place, "altered")
    before = snapshot(run, "run.json")
    words = place.folder / "words.jsonl"
    kept = words.read_bytes()
    moved = place.beside("elsewhere")
    shutil.copytree(place.folder / "code", moved.folder / "code")
    (moved.folder / "words.jsonl").write_bytes(kept.replace(b"square", b"SQUARE"))
    shutil.copy(place.folder / "pretrain.py", moved.folder)
    shutil.move(run, moved.run_dir("altered"))

    def train(place, run, *flags):
        where = f"--config.run_dir=runs/{run}"
        return place, "train", ("--config=pretrain.py", where, *flags), 1

    ended = place.run_short(
        {
            "config": train(place, "pretrained", "--config.text.tokenizer=byte"),
            "tokenizer": train(place, "swapped"),
            "text": train(moved, "altered"),
            "base": (place, "generate", (*WRITES, "--compare"), 1),
        }
    )
    after = snapshot(moved.run_dir("altered"), "run.json")
    return ended, list(before.values()) == list(after.values())


@pytest.mark.parametrize(
    "what, said",
    [
        ("config", "text.tokenizer"),
        ("tokenizer", "\n  tokenizer: "),
        ("text", "\n  data: "),
        ("base", "random weights"),
    ],
)
def test_other_inputs_are_refused_by_name(other_inputs, what, said):
    """Another tokenizer by the config and by a file, other text, and no base model."""
    finished = other_inputs[0][what]
    assert finished.code == 2, finished.err
    assert said in finished.err.partition("error: ")[2]


def test_a_refused_start_changes_nothing(other_inputs):
    assert other_inputs[1]
