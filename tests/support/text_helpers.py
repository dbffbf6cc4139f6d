"""Small corpora and configs for the tests of pre-training text."""

import numpy as np
import tokenizers
from tokenizers import processors

from research.config.run_config import Config, DataConfig, TextConfig
from research.data.text.text_sources import open_sources
from research.data.text.token_cache import open_cache
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import byte_tokenizer

WORDS = ["alpha", "béta", "λ", "日本", "x = 1", "return", "\t", "42", "🙂", "the"]


HELD_OUT_SHARE = 0.2  # of what `build` tokenises


def make_texts(count, seed=0, longest=60):
    """Different documents of words, line ends and characters of 1 to 4 bytes."""
    rng = np.random.default_rng(seed)
    texts = []
    for i in range(count):
        words = rng.choice(WORDS, rng.integers(1, longest))
        ends = rng.choice([" ", "\n"], len(words), p=[0.7, 0.3])
        text = "".join(w + e for w, e in zip(words, ends, strict=True))
        texts.append(f"{i}: {text}")
    return texts


def write_texts(folder, texts):
    """One plain-text file a document, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:05d}.txt").write_bytes(text.encode())
    return folder


def text_config(tmp_path, *sources, data=None, **text):
    """A config whose cache lies beside the sources, in the temporary folder."""
    settings = {"sources": tuple(sources), "tokenizer": "byte", "held_out_share": 0.1}
    settings |= {"cache_dir": str(tmp_path / "cache")} | text
    return Config(
        data=DataConfig(**{"seq_len": 32, "hub_timeout": 0.5} | (data or {})),
        text=TextConfig(**settings),
    )


def text_and_data(config):
    """The two groups that functions on pre-training text take."""
    return config.text, config.data


def with_bos(tokenizer, unused=0):
    """The tokenizer with a bos in front of documents, and so many unused ids."""
    inner = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    inner.add_tokens([f"unused{i}" for i in range(unused)])
    inner.add_special_tokens(["<s>"])
    bos = inner.token_to_id("<s>")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    return Tokenizer(inner, bos="<s>", eos=tokenizer.eos_token, add_bos=True)


FIELDS = ("tokens", "targets", "weights", "segments", "positions", "groups")


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def same(left, right):
    return all((getattr(left, f) == getattr(right, f)).all() for f in FIELDS)


def build(tmp_path, where, tokenizer=None, process=(0, 1), **text):
    config = text_config(tmp_path, f"s={where}", held_out_share=HELD_OUT_SHARE, **text)
    (source,) = open_sources(*text_and_data(config))
    return open_cache(source, tokenizer or byte_tokenizer(), config.text, *process)
