"""The proof of an export finds files that are wrong in one place, in every format.

One tiny model of experts with adapters is written in each format. Each test copies the
files, breaks them in one way, and opens them as the export does.
"""

import dataclasses
import json
import math
import shutil

import gguf
import numpy as np
import pytest
from exported_models import tiny_export, tiny_rows
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from research.core.errors import ParityError, UserError
from research.formats.export_format import ExportOptions, find_format
from research.formats.proof.logit_parity import prove
from research.models.families import stored_tensor
from research.models.families.stored_tensor import StoredTensor

NUMBERS = {
    "hf": ExportOptions("bfloat16"),
    "gguf": ExportOptions(quant="q4_0"),
    "peft": ExportOptions("bfloat16"),
    "gguf-adapter": ExportOptions(),
}
HEADS, WIDTH = 4, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The files of each format, as the export wrote them."""
    root, exported = tmp_path_factory.mktemp("whole"), tiny_export()
    for name, options in NUMBERS.items():
        (root / name).mkdir()
        find_format(name).write(exported, root / name, options)
    return root


def prove_folder(folder, name):
    exported, options = tiny_export(), NUMBERS[name]
    written = find_format(name).read_back(folder, exported)
    return prove(exported, written, tiny_rows(), options.numbers)


@pytest.mark.parametrize("name", NUMBERS)
def test_whole_files_pass(folders, name):
    found = prove_folder(folders / name, name)
    assert found.tokens == 43 and found.architecture == ()
    assert found.weights <= 1 and found.logits < found.logits_limit / 2
    merged = name in ("hf", "gguf")
    assert (found.kept is None) != merged and (found.update is None) == merged
    # Rounding is nearly unbiased, so what adapters add is there on the whole.
    assert not merged or abs(found.kept - 1) < 0.05
    assert found.changed > 0.003 and 0 <= found.kl <= found.largest_kl
    assert json.loads(json.dumps(found.facts()))["limits"]["weights"] == 1


# -- safetensors -----------------------------------------------------------------------


def tensors_of(file):
    """A function that changes the tensors of a file, by name."""

    def broken(change):
        def do(folder):
            with safe_open(folder / file, "numpy") as handle:
                metadata = handle.metadata()
            tensors = load_file(folder / file)
            change(tensors)
            whole = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
            save_file(whole, folder / file, metadata)

        return do

    return broken


def setting(file, **changes):
    def do(folder):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(found | changes))

    return do


hf, peft = tensors_of("model.safetensors"), tensors_of("adapter_model.safetensors")
QUERY = "model.layers.{}.self_attn.q_proj.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"


def update_of(path, layer):
    return np.array(tiny_export().weights[path].update())[layer]


def base_of(path, layer):
    return np.array(tiny_export().base_weights[path])[layer]


def scaled_query(scale):
    """Layer 1's, with its adapter at another scale."""
    path = "layers.attention.query.kernel"
    value = base_of(path, 1) + scale * update_of(path, 1)
    return value.reshape(64, 64).T


def set_query(scale):
    def change(tensors):
        name = QUERY.format(1)
        tensors[name] = scaled_query(scale).astype(tensors[name].dtype)

    return hf(change)


def swap(first, second):
    def change(tensors):
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def map_tensor(name, change):
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]))


def neighbours(rows):
    """Rotary pairs beside each other, where the file has them half a head apart."""
    heads = rows.reshape(-1, 2, WIDTH // 2, *rows.shape[1:])
    return heads.swapaxes(1, 2).reshape(rows.shape)


def nudge(value):
    """One number, by two units in its last place."""
    value.view(np.uint16)[3, 5] += 2
    return value


def swap_words(folder):
    text = json.loads((folder / "tokenizer.json").read_text())
    words = text["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(text))


HF = {
    "no adapter": (set_query(0.0), "attention.query.kernel of layer 1"),
    "adapter at 1.2 times its scale": (set_query(1.2), "query.kernel of layer 1"),
    "two layers": (hf(swap(QUERY.format(0), QUERY.format(1))), "query.kernel of layer"),
    "two experts": (hf(swap(EXPERT.format(0), EXPERT.format(1))), "mlp.gate"),
    "transposed": (
        hf(map_tensor(QUERY.format(1), np.transpose)),
        "query.kernel of layer 1",
    ),
    "permuted": (hf(map_tensor(QUERY.format(1), neighbours)), "query.kernel of layer"),
    "one number": (hf(map_tensor("lm_head.weight", nudge)), "number of head.kernel"),
    "not a number": (
        hf(map_tensor("model.norm.weight", lambda x: x * np.float32("nan"))),
        "final_norm.scale.* nan",
    ),
    "base of rotation": (
        setting("config.json", rope_theta=1e5, rope_parameters=None),
        "ropes is .*1000",
    ),
    "epsilon": (setting("config.json", rms_norm_eps=1e-4), "norm_eps is 0.0001"),
    "window": (setting("config.json", sliding_window=5), "windows is "),
    "fewer experts a token": (
        setting("config.json", num_experts_per_tok=1),
        "experts is .*chosen=1",
    ),
    "tied": (setting("config.json", tie_word_embeddings=True), "ties the head"),
    "tokenizer": (swap_words, "other ids of texts"),
    "end": (setting("generation_config.json", eos_token_id=3), "ids that end"),
    "no end": (setting("config.json", eos_token_id=None), r"config.json .* \[\] as"),
}


# -- GGUF ------------------------------------------------------------------------------


def in_gguf(file, change):
    """Changes tensors, as bytes or numbers `[rows, ...]`, and fields in their place."""

    def do(folder):
        reader = gguf.GGUFReader(folder / file, "r+")
        change({x.name: x for x in reader.tensors}, reader.fields)
        reader.data.flush()

    return do


def data(name, change):
    def edit(tensors, fields):
        tensors[name].data[...] = change(np.array(tensors[name].data))

    return edit


def exchange(first, second):
    def edit(tensors, fields):
        one, other = (np.array(tensors[x].data) for x in (first, second))
        tensors[first].data[...], tensors[second].data[...] = other, one

    return edit


def field(key, change):
    def edit(tensors, fields):
        found = fields[key]
        found.parts[found.data[0]][0] = change(found.parts[found.data[0]][0])

    return edit


def as_codes(value):
    kind = gguf.GGMLQuantizationType.Q4_0
    return lambda _: gguf.quantize(np.ascontiguousarray(value), kind)


def in_order(value):
    """A query as llama.cpp's Llama has it."""
    return np.ascontiguousarray(neighbours(value))


def louder(codes):
    """The scale of each block of 18 bytes, 1.2 times."""
    blocks = codes.reshape(-1, 18)
    scales = blocks[:, :2].copy().view(np.float16)
    blocks[:, :2] = (scales * np.float16(1.2)).view(np.uint8)
    return codes


def replace(old, new):
    """Other bytes of the same length, at one place of the file."""

    def do(file):
        def change(folder):
            content = (folder / file).read_bytes()
            assert old in content
            (folder / file).write_bytes(content.replace(old, new, 1))

        return change

    return do


Q, K = "blk.{}.attn_q.weight", "blk.{}.attn_k.weight"
GATES = "blk.1.ffn_gate_exps.weight"
EDITS = {
    "no adapter": (data(Q.format(1), lambda _: as_codes(
        in_order(scaled_query(0.0)))(_)), "query.kernel of layer 1"),
    "adapter at 1.2 times its scale": (data(Q.format(1), lambda _: as_codes(
        in_order(scaled_query(1.2)))(_)), "query.kernel of layer 1"),
    "two layers": (exchange(Q.format(0), Q.format(1)), "query.kernel of layer"),
    "two experts": (data(GATES, lambda x: x[[1, 0, 2, 3]]), "mlp.gate.* layer 1"),
    "scale": (data(K.format(0), louder), "key.kernel of layer 0"),
    "transposed": (data(Q.format(1), lambda _: as_codes(
        in_order(scaled_query(1.0).T))(_)), "query.kernel of layer 1"),
    "not permuted": (data(Q.format(1), lambda _: as_codes(
        scaled_query(1.0))(_)), "query.kernel of layer 1"),
    "norm": (data("output_norm.weight", lambda x: x * np.float32(1.02)), "final_norm"),
    "base of rotation": (field("llama.rope.freq_base", lambda x: x * 10), "ropes is"),
    "epsilon": (field(
        "llama.attention.layer_norm_rms_epsilon", lambda x: x * 10), "norm_eps is"),
    "context": (field("llama.context_length", lambda x: x * 2), "max_position is 128"),
    "end": (field("tokenizer.ggml.eos_token_id", lambda x: x - 5), "ids that end"),
}  # fmt: skip
GGUF = {
    name: (in_gguf("model.gguf", edit), said) for name, (edit, said) in EDITS.items()
} | {
    "base": (replace(b"d5d56f", b"d5d56e")("model.gguf"), "base_hash is 'd5d56e'"),
    "no head": (replace(b"output.weight", b"outpus.weight")("model.gguf"), "outpus"),
}


# -- adapters --------------------------------------------------------------------------

LORA = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
A, B = (LORA.format(1, end) for end in "AB")


def without(*names):
    return peft(lambda tensors: [tensors.pop(name) for name in names])


def as_transposed(tensors):
    tensors[A], tensors[B] = tensors[B].T, tensors[A].T


def lose(tensors):
    tensors[B] = tensors[B] * np.float32(0)


def numbers(key, change):
    def do(folder):
        file = folder / "adapter_config.json"
        found = json.loads(file.read_text())
        file.write_text(json.dumps(found | {key: change(found[key])}))

    return do


PEFT = {
    "lost": (without(A, B), "query.kernel of layer 1"),
    "zero": (peft(lose), "query.kernel of layer 1"),
    "at 1.2 times its scale": (
        peft(map_tensor(B, lambda x: x * np.float32(1.2))),
        "query.kernel of layer 1",
    ),
    "all at 1.2 times": (
        numbers("lora_alpha", lambda x: x * 1.2),
        "a number of layers",
    ),
    "two layers": (peft(swap(LORA.format(0, "B"), B)), "query.kernel of layer"),
    "transposed": (peft(as_transposed), "query.kernel of layer 1"),
    "permuted": (peft(map_tensor(B, neighbours)), "query.kernel of layer 1"),
}
BQ = "blk.1.attn_q.weight.lora_b"
EXPERTS = "blk.1.ffn_gate_exps.weight.lora_b"
ADAPTER_EDITS = {
    "lost": (data(BQ, lambda x: x * 0), "query.kernel of layer 1"),
    "at 1.2 times its scale": (data(BQ, lambda x: x * 1.2), "query.kernel of layer 1"),
    "all at 1.2 times": (field(
        "adapter.lora.alpha", lambda x: x * 1.2), "a number of layers"),
    "two layers": (exchange(
        "blk.0.attn_q.weight.lora_b", BQ), "query.kernel of layer"),
    "not permuted": (data(
        BQ, lambda x: x.reshape(4, 8, 2, 2).swapaxes(1, 2).reshape(x.shape)),
        "query.kernel of layer 1"),
    "two experts": (data(EXPERTS, lambda x: x[[1, 0, 2, 3]]), "mlp.gate.* layer 1"),
}  # fmt: skip
GGUF_ADAPTER = {
    name: (in_gguf("adapter.gguf", edit), said)
    for name, (edit, said) in ADAPTER_EDITS.items()
} | {
    "base": (replace(b"d5d56f", b"d5d56e")("adapter.gguf"), "base_hash is 'd5d56e'"),
    "architecture": (
        replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gpt2x")("adapter.gguf"),
        "architecture 'gpt2x', and the base model is 'llama'",
    ),
    "one name": (
        replace(BQ.encode(), BQ.encode()[:-1] + b"c")("adapter.gguf"),
        "query",
    ),
}
BREAKS = {"hf": HF, "gguf": GGUF, "peft": PEFT, "gguf-adapter": GGUF_ADAPTER}


@pytest.mark.parametrize(
    "name, how", [(name, how) for name, breaks in BREAKS.items() for how in breaks]
)
def test_broken_files_are_found(folders, tmp_path, name, how):
    folder = shutil.copytree(folders / name, tmp_path / "broken")
    change, said = BREAKS[name][how]
    change(folder)
    with pytest.raises(UserError, match=said):
        prove_folder(folder, name)


def test_numbers_that_are_less_exact_than_asked_are_found(folders):
    exported = tiny_export()
    written = find_format("hf").read_back(folders / "hf", exported)
    with pytest.raises(UserError, match="in bfloat16, and float32 was asked for"):
        prove(exported, written, tiny_rows(), "float32")


def test_an_adapter_that_the_files_have_no_place_for_is_found(folders):
    exported = tiny_export()
    written = find_format("peft").read_back(folders / "peft", exported)
    path = "layers.attention.query.kernel"
    held = {p: numbers for p, numbers in written.held.items() if p != path}
    with pytest.raises(UserError, match=f"lack {path}"):
        prove(
            exported, dataclasses.replace(written, held=held), tiny_rows(), "bfloat16"
        )


# -- writers whose readers are wrong in the same way -----------------------------------


def without_groups(self, spec):
    """Fused matrices one after the other, also where a format takes turns."""
    outputs = spec.shape[spec.stacked + spec.n_in :]
    return 1, math.prod(outputs)


WRONG_BOTH_WAYS = {
    "rotary": (stored_tensor, "_swap_rotary", lambda value, pairs: value),
    "turns": (StoredTensor, "_groups", without_groups),
}
NEOX = {
    "kv_heads": 4, "experts": None, "norm": "layer", "biases": ("qkv", "out", "mlp"),
    "activation": "gelu", "gated_mlp": False, "family": "gpt_neox",
}  # fmt: skip


@pytest.mark.parametrize(
    "format, name, changes",
    [("gguf", "rotary", {}), ("gguf-adapter", "rotary", {}), ("hf", "turns", NEOX)],
)
def test_an_order_that_writer_and_reader_share_is_found(
    tmp_path, monkeypatch, format, name, changes
):
    exported = tiny_export(**changes)
    monkeypatch.setattr(*WRONG_BOTH_WAYS[name])
    find_format(format).write(exported, tmp_path, ExportOptions())
    written = find_format(format).read_back(tmp_path, exported)
    with pytest.raises(ParityError, match=r"(query|key)\.\w+ in another order"):
        prove(exported, written, tiny_rows(), "float32")
