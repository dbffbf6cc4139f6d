"""Tokenizers made here give text back, are the same each time, and are found again."""

import collections
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from doors import run_door
from text_helpers import make_texts, text_and_data, text_config, with_bos, write_texts

from research.core.errors import UserError
from research.data.text import choose_tokenizer
from research.data.text.choose_tokenizer import open_tokenizer, training_texts
from research.data.text.document_readers import DocumentPiece
from research.data.text.row_layout import is_held_out
from research.data.text.text_sources import open_sources
from research.tokenize.__main__ import main
from research.tokenize.tokenizer import Before, from_file, from_folder
from research.tokenize.tokenizer_training import (
    END,
    byte_tokenizer,
    save_tokenizer,
    train_bpe,
)

TEXTS = make_texts(60)
HARD = ["", " ", "\n\n  x", "12345", "a\0b", "é日🙂\u200d", END, "<|endoftext|" + END]


def made():
    return {"byte": byte_tokenizer(), "bpe": train_bpe(iter(TEXTS), 300)}


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_every_text_comes_back_and_never_holds_the_end(kind):
    tokenizer = made()[kind]
    texts = HARD + TEXTS
    for text, ids in zip(texts, tokenizer.encode_texts(texts), strict=True):
        assert tokenizer.decode(ids) == text and tokenizer.eos not in ids
    assert tokenizer.find_added(END) == [(tokenizer.eos, 0, len(END))]
    assert tokenizer.bos is None and not tokenizer.add_bos


def test_a_byte_is_an_id():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 257 and tokenizer.largest_id == 256
    for text, ids in zip(HARD, tokenizer.encode_texts(HARD), strict=True):
        assert len(ids) == len(text.encode()) and all(i < 256 for i in ids)
    assert (
        len(
            {
                i
                for ids in tokenizer.encode_texts([chr(c) for c in range(128)])
                for i in ids
            }
        )
        == 128
    )


def test_a_bpe_has_the_size_asked_for_and_keeps_digits_apart():
    numbers = ["1234567 " * 100, *TEXTS]
    tokenizer = train_bpe(iter(numbers), 300)
    assert tokenizer.vocab_size == 300
    (ids,) = tokenizer.encode_texts(["1234567"])
    assert len(ids) == 7
    plain = sum(len(text.encode()) for text in TEXTS)
    assert sum(map(len, tokenizer.encode_texts(TEXTS))) < 0.6 * plain


def test_arrays_hold_the_same_ids():
    for tokenizer in made().values():
        arrays = tokenizer.encode_arrays(HARD, "<u2")
        assert [array.tolist() for array in arrays] == tokenizer.encode_texts(HARD)
        assert all(array.dtype == np.uint16 for array in arrays)


def test_the_fast_way_of_the_library_gives_the_same_ids(smollm2):
    for tokenizer in (*made().values(), smollm2.tokenizer):
        view = tokenizer._text_view
        texts = [tokenizer._leads[Before.TEXT][0] + text for text in HARD + TEXTS]
        slow = view.encode_batch(texts, add_special_tokens=False)
        fast = view.encode_batch_fast(texts, add_special_tokens=False)
        assert [e.ids for e in slow] == [e.ids for e in fast]


TRAINING = """
from research.tokenize.tokenizer_training import train_bpe
from text_helpers import make_texts
print(train_bpe(iter(make_texts(60)), 300).fingerprint)
"""


def test_training_gives_the_same_in_every_process():
    here = Path(__file__).parents[1] / "support"
    done = subprocess.run(
        [sys.executable, "-c", TRAINING],
        env={"PYTHONPATH": f"{here}:{here.parents[1]}", "PYTHONHASHSEED": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == made()["bpe"].fingerprint


@pytest.mark.parametrize("kind", ["byte", "bpe", "bos"])
def test_a_saved_tokenizer_is_read_by_us_and_by_transformers(tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = with_bos(byte_tokenizer()) if kind == "bos" else made()[kind]
    save_tokenizer(tokenizer, tmp_path / "tok")
    again = from_folder(tmp_path / "tok")
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.eos, again.bos) == (tokenizer.eos, tokenizer.bos)
    assert again.add_bos == tokenizer.add_bos
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert theirs.eos_token_id == tokenizer.eos
    for text in TEXTS[:10]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode_texts([text])[0]
        assert theirs.decode(ids) == text


def test_a_bos_that_only_a_gguf_file_knew_of_is_saved(tmp_path):
    tokenizer = with_bos(byte_tokenizer())
    tokenizer._template_view.post_processor = tokenizers.processors.ByteLevel()
    save_tokenizer(tokenizer, tmp_path)
    assert from_folder(tmp_path).add_bos


@pytest.fixture
def corpus(tmp_path):
    return write_texts(tmp_path / "c", TEXTS)


def open_one(tmp_path, corpus, asked, **changes):
    return open_tokenizer(
        *text_and_data(text_config(tmp_path, f"s={corpus}", tokenizer=asked, **changes))
    )


def test_a_bpe_is_trained_once_and_kept(tmp_path, corpus, monkeypatch):
    first = open_one(tmp_path, corpus, "bpe:300")
    assert first.vocab_size == 300
    monkeypatch.setattr(choose_tokenizer, "train_bpe", lambda *_: 1 / 0)
    assert open_one(tmp_path, corpus, "bpe:300").fingerprint == first.fingerprint
    for changes in ({"asked": "bpe:301"}, {"held_out_share": 0.2}):
        with pytest.raises(ZeroDivisionError):
            open_one(tmp_path, corpus, **{"asked": "bpe:300", **changes})
    (corpus / "00000.txt").write_text("other")
    with pytest.raises(ZeroDivisionError):
        open_one(tmp_path, corpus, "bpe:300")


def test_a_tokenizer_smaller_than_asked_for_says_so(tmp_path, caplog):
    corpus = write_texts(tmp_path / "c", ["ab ab ab"] * 3 + ["ab c"] * 30)
    for _ in ("trained", "found in the cache"):
        made = open_one(tmp_path, corpus, "bpe:5000")
        said = f"the tokenizer has {made.vocab_size} ids and not 5000"
        assert said in caplog.text
        caplog.clear()


def test_files_and_folders_are_opened(tmp_path, corpus):
    tokenizer = made()["bpe"]
    save_tokenizer(tokenizer, tmp_path / "tok")
    assert (
        open_one(tmp_path, corpus, str(tmp_path / "tok")).fingerprint
        == tokenizer.fingerprint
    )
    file = tmp_path / "tok" / "tokenizer.json"
    assert open_one(tmp_path, corpus, str(file)).eos == tokenizer.eos
    bare = tmp_path / "bare.json"
    file.rename(bare)
    assert from_file(bare).eos == tokenizer.eos
    rules = json.loads(bare.read_text())
    rules["added_tokens"] = []
    bare.write_text(json.dumps(rules))
    with pytest.raises(UserError, match=r"no token that ends a document.*eos_token"):
        open_one(tmp_path, corpus, str(bare))
    assert open_one(tmp_path, corpus, "byte").vocab_size == 257


@pytest.mark.parametrize(
    "asked, said",
    [
        ("bpe:256", "at least 257"),
        ("bpe:", "at least 257"),
        ("bpe:many", "at least 257"),
        ("bpe:-5", "at least 257"),
        ("byt", r"=byt \(did you mean 'byte'\?\) does not exist"),
        ("hub://no/where", r"cannot be fetched.*local folder"),
    ],
)
def test_tokenizers_that_cannot_be_are_said(tmp_path, corpus, asked, said):
    with pytest.raises(UserError, match=said):
        open_one(tmp_path, corpus, asked)


def test_too_small_a_vocabulary_is_said():
    with pytest.raises(UserError, match="256 bytes"):
        train_bpe(iter(TEXTS), 256)


def test_training_text_is_spread_and_without_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(choose_tokenizer, "TRAINING_BYTES", 2 << 20)
    for name in "ab":
        write_texts(tmp_path / name, [f"{name}{i} " * 15_000 for i in range(40)])
    (tmp_path / "b" / "large.txt").write_text("bL " * 1_000_000)
    config = text_config(tmp_path, f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}")
    sizes = collections.Counter()
    for text in training_texts(open_sources(*text_and_data(config)), 1e-9):
        sizes[text.split()[0]] += len(text)
    assert sizes["bL"] > 300_000
    for name, least in (("a", 16), ("b", 8)):
        own = [size for word, size in sizes.items() if word[0] == name]
        assert len(own) >= least and 0.9 < sum(own) / (1 << 20) <= 1


def test_training_text_is_all_where_that_is_little(tmp_path):
    write_texts(tmp_path / "small", TEXTS)
    (small,) = open_sources(
        *text_and_data(text_config(tmp_path, f"s={tmp_path / 'small'}"))
    )
    assert list(training_texts([small], 1e-9)) == TEXTS
    some = list(training_texts([small], 0.3))
    assert some == [
        t for t in TEXTS if not is_held_out(DocumentPiece(t, True, True, ""), 0.3)
    ]
    assert len(some) < len(TEXTS)


def test_the_door_trains_and_measures(tmp_path, corpus):
    def call(*flags):
        return run_door(main, tmp_path, "tokenize", *flags)

    out, bad = tmp_path / "out", tmp_path / "my text.txt"
    bad.write_bytes(b"caf\xe9" * 99)
    done = call(f"--source=s={corpus}", "--vocab=300", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "s: " in done.stdout and "bytes a token" in done.stdout
    assert from_folder(out).vocab_size == 300
    for flags, said in (
        ([], "--source=NAME=WHERE is missing"),
        ([f"--source=s={corpus}"], "--out=FOLDER is missing"),
        ([f"--source=s={corpus}", "--vocab=9", f"--out={tmp_path / 'new'}"], "257"),
        ([f"--source=s={corpus}", f"--out={out}"], "exists; name a folder"),
        ([f"--source={corpus}x", f"--out={out}2"], "of --source does not exist"),
        ([f"--source={bad}", f"--out={out}2"], "or choose --undecodable=skip"),
    ):
        failed = call(*flags)
        assert failed.returncode == 2 and said in failed.stderr
        assert failed.stderr.count("\n") == 1
        assert "config.text" not in failed.stderr
    # A place needs no name, and each flag that was named works.
    words = (f"--source={bad}", "--undecodable=replace", f"--out={out}3")
    done = call(*words, "--vocab=258", "--held_out_share=1e-9")
    assert done.returncode == 0 and "my_text: " in done.stdout, done.stderr
