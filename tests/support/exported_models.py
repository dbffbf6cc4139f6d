"""Models as an export gets them, and a real tokenizer for those of 64 tokens."""

import functools
import string

import numpy as np
import tokenizers
from helpers import random_adapters, random_params
from tokenizers import decoders, models, trainers

from research.config.knob_groups import LoRAConfig
from research.formats.export_format import ExportedAdapter, ExportedModel
from research.formats.proof.proof_tokens import ProofRows
from research.models.architecture import Architecture, Experts
from research.models.transformer import Model
from research.tokenize.gguf.gguf_tokenizer import KEY, SPACE, from_gguf_metadata
from research.tokenize.gguf.pre_tokenizers import CUTS
from research.tokenize.tokenizer import Tokenizer
from research.weights.adapters.lora import adapt, adapter_specs

VOCABULARY = 64
FACTS = {"step": "12", "base_hash": "d5d56f"}
TALE = "a tiny tale: the cat is in the hat, and the rat is at it. hello, user!\n\n" * 3


def with_adapters(model, base, config):
    """A model for an export: `base` with random adapters, as if trained for a while."""
    factors = random_adapters(adapter_specs(model.specs, config))
    weights = adapt(base, factors, config)
    adapters = {}
    for path, pair in factors.items():
        rank = pair["a"].shape[-1]
        scale = float(weights[path].scale.ravel()[0])
        adapters[path] = ExportedAdapter(pair, rank, scale * rank)
    tokenizer = tiny_tokenizer()
    return ExportedModel(model, weights, tokenizer, adapters, "lora", base, None, FACTS)


def sentence_pieces():
    """A SentencePiece model of bytes, letters and words of TALE, as Llama 2's is."""
    words = sorted({*TALE.replace(":", "").split()} - {"a"})
    letters = [*sorted({*"".join(words)}), SPACE, "\n"]
    pieces = [SPACE + "t", SPACE + "a", "th", "in", "at", "he", "ello"]
    joined = [SPACE + "ca", SPACE + "cat", SPACE + "th", SPACE + "the", "ti", "tin"]
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *pieces, *joined, *letters, "<|im_end|>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 260), 3]
    metadata = {
        "model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds,
        "scores": [0.0] * 259 + [-float(n) for n in range(len(tokens) - 259)],
        "eot_token_id": len(tokens) - 1,
    }  # fmt: skip
    return from_gguf_metadata({f"{KEY}{k}": v for k, v in metadata.items()})


def tiny_tokenizer(size=VOCABULARY):
    """Letters, digits and a few marks as byte-level BPE, with ChatML's tokens."""
    marks = " \n" + string.ascii_lowercase + string.digits + ",.!'"
    cut = CUTS["smollm"].cuts
    alphabet = sorted({c for x in marks for c, _ in cut.pre_tokenize_str(x)})
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = cut, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        special_tokens=[],
        show_progress=False,
    )
    text = "".join(c for c in TALE if c in marks)
    trainer.vocab_size = size - 3
    inner.train_from_iterator([text], trainer)
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(
        inner, bos=None, eos="<|im_end|>", end_ids=[inner.get_vocab_size() - 3]
    )


@functools.cache
def tiny_export(**changes):
    """A tiny Mixtral with adapters on all matrices, as if trained for a while."""
    fields = {
        "vocab": VOCABULARY, "embed": 64, "mlp": 32, "layers": 2, "heads": 4,
        "kv_heads": 2, "head_dim": 16, "tied_head": False, "family": "mixtral",
        "experts": Experts(4, 2), "max_position": 64,
    }  # fmt: skip
    shape = Architecture(**fields | changes)
    model = Model(shape)
    config = LoRAConfig(rank=2, targets=("attention", "mlp"))
    return with_adapters(model, random_params(model.specs), config)


def tiny_rows():
    """Documents behind each other, and padding."""
    tokens = np.random.default_rng(2).integers(0, VOCABULARY, (2, 24)).astype(np.int32)
    places = np.tile(np.arange(24, dtype=np.int32) % 16, (2, 1))
    segments = np.tile(1 + np.arange(24, dtype=np.int32) // 16, (2, 1))
    segments[1, -5:] = 0
    return ProofRows(tokens, places, segments, "random rows")
