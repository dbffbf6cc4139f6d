"""What lies in the environment never gets out: no log, file or error has it."""

import pytest
from commands import chain

SECRETS = {
    name: f"canary-{index}-of-the-environment"
    for index, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "WANDB_API_KEY",
            "AWS_SECRET_ACCESS_KEY",
            "GOOGLE_API_KEY",
            "OPENAI_API_KEY",
        )
    )
}


@chain
def with_secrets(place, results):
    """A run that ends, and two that fail: at a bad row, and at the hub."""

    def train(run, *flags):
        where = ("--config=config.py", f"--config.run_dir=runs/{run}")
        return place.run("train", *where, *flags, more=SECRETS)

    (place.folder / "bad-row.jsonl").write_text('{"instruction": "a", "response": 3}')
    return {
        "whole": train("secrets", "--config.steps=2", "--config.eval.prompts=1"),
        "bad row": train("secrets-row", "--config.data.path=bad-row.jsonl"),
        "hub": train("secrets-hub", "--config.model.init_from=hub://nobody/nothing"),
    }


def leaks(data):
    return [name for name, secret in SECRETS.items() if secret.encode() in data]


def test_the_search_of_this_file_finds():
    assert leaks(b"x" + SECRETS["HF_TOKEN"].encode() + b"\0") == ["HF_TOKEN"]


@pytest.mark.parametrize("name, code", [("whole", 0), ("bad row", 2), ("hub", 2)])
def test_nothing_is_printed(with_secrets, name, code):
    finished = with_secrets[name]
    assert finished.code == code, finished.err
    assert leaks((finished.out + finished.err).encode()) == []


def test_nothing_is_written(place, with_secrets):
    files = [x for x in place.run_dir("secrets").rglob("*") if x.is_file()]
    kinds = {"run.json", "config.json", "metrics.jsonl", "report.md", "sums.json"}
    assert kinds < {x.name for x in files}
    assert {str(x): found for x in files if (found := leaks(x.read_bytes()))} == {}
