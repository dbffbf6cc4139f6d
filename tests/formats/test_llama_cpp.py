"""llama.cpp computes what we compute, from the files that we write for it.

It lies in an environment of its own (`make llama-check` makes it): its wheel is large,
and a mistake in a file can abort the whole process.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from exported_models import sentence_pieces, with_adapters
from helpers import TINY, random_params
from switch_models import NAMES, SWITCHES

from research.config.knob_groups import LoRAConfig
from research.formats.export_format import ExportedModel, ExportOptions
from research.formats.gguf import gguf_adapter, gguf_model
from research.formats.huggingface.huggingface_weights import read_hf_config
from research.models.families.family_registry import family_of
from research.models.transformer import Model
from research.runs.lineage.exported_model import exported_model
from research.runs.reopen import reopen

PYTHON = Path(os.environ.get("LLAMA_PYTHON", ".venv-llama/bin/python"))
SIDE = Path(__file__).parents[1] / "support" / "llama_cpp_side.py"
NEW = 6
# llama.cpp knows these alone of a family: scales, periods of layers, widths of heads.
CHANGES = {
    "gemma2": {"attention_scale": 8**-0.5},
    "gemma3": {
        "attention_scale": 8**-0.5, "layers": 7, "window_layers": (0, 1, 2, 3, 4, 6),
    },
    "gpt_neox_serial": {
        "activation": "gelu", "rope_fraction": 0.25, "biases": ("qkv", "out", "mlp"),
    },
    "olmoe": {"kv_heads": 4},
    "phi3": {"head_dim": 4, "rope_fraction": 1.0},
    "smollm3": {"unrotated_layers": (3,)},
}  # fmt: skip
WRITTEN = [
    name
    for name in NAMES
    if family_of(read_hf_config(SWITCHES / name)).gguf_architecture
]
TEXTS = ["a tiny tale", "<|im_start|>user\nhello, it's 12345!<|im_end|>\n", "x  y\n\nz"]

ROWS = [
    "Tides are the slow rise and fall of the sea, caused mainly by the pull of the "
    "Moon. Most coasts see two high tides a day, about 12 hours and 25 minutes apart.",
    "### Instruction:\nName three fruits that grow on trees, and say where each of "
    "them comes from.\n\n### Response:\nApples, cherries and oranges grow on trees.",
]
REAL_TEXTS = [
    "Hello, world!", "The year 1789 had 365 days.", "room 12b,  34 + 0.5e-10 = x2",
    "  two leading spaces\tand a tab", "line one\nline two\n\n\nafter  a gap   \n",
    "don't we'll they're I'D", "Crème brûlée, Ελλάδα, Привет", "🙂👍🏽 flags",
    "你好,世界。333", "<|im_start|>user\nHi<|im_end|>\n",
    "def f(x: int) -> str:\n    return f'{x:>8}'\n",
]  # fmt: skip

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(
        not PYTHON.is_file(),
        reason=f"no llama.cpp: {PYTHON} is missing, which make llama-check installs",
    ),
]


@dataclasses.dataclass
class Case:
    """One model with an adapter, what llama.cpp gets of it, and what it answers."""

    exported: ExportedModel
    rows: list[list[int]]
    folder: Path
    new: int = NEW
    every: int = 1
    top: int = 64
    texts: list[str] = dataclasses.field(default_factory=lambda: TEXTS)
    answer: dict | None = None

    def job(self):
        adapter = self.folder / gguf_adapter.FILE
        return {
            "model": str(self.folder / gguf_model.FILE),
            "adapter": str(adapter) if adapter.is_file() else "",
            "texts": self.texts,
            "rows": self.rows,
            "every": self.every,
            "top": self.top,
            "new": self.new,
        }


def ask_llama_cpp(jobs, folder):
    """An answer for each job; None from the one on that the library aborted at."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [PYTHON, SIDE, file], capture_output=True, text=True, timeout=1200
    )
    (folder / "llama.log").write_text(done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def make_case(name, recorded, folder):
    folder.mkdir()
    model = Model(dataclasses.replace(recorded.architecture, **CHANGES.get(name, {})))
    params = recorded.params
    if model.specs != recorded.model.specs:
        params = random_params(model.specs)
        # Gemma's norms multiply by one more.
        shift = model.architecture.norm_shift
        params = {p: x - shift * p.endswith("scale") for p, x in params.items()}
    targets = tuple(
        path
        for path, spec in model.specs.items()
        if spec.n_in and "embedding" not in path
    )
    config = LoRAConfig(targets=targets, rank=2, alpha=5.0, alpha_pattern=("mlp=3",))
    adapted = with_adapters(model, params, config)
    plain = ExportedModel(model, params, adapted.tokenizer)
    gguf_model.FORMAT.write(plain, folder, ExportOptions())
    gguf_adapter.FORMAT.write(adapted, folder, ExportOptions())
    a = model.architecture
    # It has no windows for some: a file allows contexts that end where theirs do.
    short = a.window and not family_of(a).gguf_period
    new = 2 if short else NEW
    length = a.window - new - 1 if short else 20
    rows = np.random.RandomState(7).randint(0, 61, (2, length)).tolist()
    return Case(adapted, rows, folder, new)


def make_pieces_case(folder):
    """A Llama whose tokenizer is SentencePiece's. Parts of letters are no rows."""
    folder.mkdir()
    pieces = sentence_pieces()
    model = Model(dataclasses.replace(TINY, vocab=pieces.largest_id + 5))
    exported = ExportedModel(model, random_params(model.specs), pieces)
    gguf_model.FORMAT.write(exported, folder, ExportOptions())
    return Case(exported, [], folder)


@pytest.fixture(scope="module")
def cases(golden, tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    made = {name: make_case(name, golden(name), root / name) for name in WRITTEN}
    made["pieces"] = make_pieces_case(root / "pieces")
    answers, log = ask_llama_cpp([case.job() for case in made.values()], root)
    for case, answer in zip(made.values(), answers, strict=False):
        case.answer = answer
    return made, log[-2000:]


@pytest.fixture(params=WRITTEN)
def case(request, cases):
    made, log = cases
    found = made[request.param]
    assert found.answer is not None, f"llama.cpp stopped: {log}"
    return found


def expected(model, weights, rows, new):
    """Log-probabilities `[row, T, V]` of the next token, and `new` greedy tokens.

    llama.cpp chooses LongRoPE's table by the length of the context, which is 512.
    """
    a = model.architecture
    scaling = dataclasses.replace(a.rope_scaling, short=a.rope_scaling.long)
    model = Model(dataclasses.replace(a, rope_scaling=scaling))

    @jax.jit
    def log_probabilities(weights, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden = model.hidden(weights, tokens, positions, jnp.ones_like(tokens))
        return jax.nn.log_softmax(model.logits(weights, hidden))

    given = len(rows[0])
    tokens = np.zeros((len(rows), given + new), np.int32)
    tokens[:, :given] = rows
    for place in range(given, given + new):
        found = np.asarray(log_probabilities(weights, tokens))
        tokens[:, place] = found[:, place - 1].argmax(-1)
    return found[:, :given], tokens[:, given:].tolist()


def check(case, which, weights, most=1e-3, apart=2e-2):
    """llama.cpp's `which` answers are those of our model with `weights`.

    `most` and `apart` bound the mean divergence in nats, and the difference of the
    ten largest log-probabilities. Returns whether the greedy tokens are the same.
    """
    found = case.answer[which]
    log_p, greedy = expected(case.exported.model, weights, case.rows, case.new)
    worst, divergence = 0.0, []
    for row, ours in zip(found["rows"], log_p, strict=True):
        for listed, own in zip(row, ours[case.every - 1 :: case.every], strict=True):
            ids, theirs = zip(*listed, strict=True)
            own, theirs = own[list(ids)].astype(float), np.array(theirs)
            worst = max(worst, np.abs(theirs - own)[:10].max())
            divergence.append(divergence_of(own, theirs))
    mean = np.mean(divergence)
    print(f"log-probabilities differ by {worst:.1e}, KL {mean:.1e}")
    assert worst < apart and mean < most, f"differ by {worst:.1e}, KL {mean:.1e}"
    # It stops behind a token that ends an answer.
    pairs = zip(found["greedy"], greedy, strict=True)
    return all(theirs and ours[: len(theirs)] == theirs for theirs, ours in pairs)


def divergence_of(own, theirs):
    """The listed tokens count one by one, and all others as one."""
    p, q = np.exp(own), np.exp(theirs)
    rest_p, rest_q = max(1 - p.sum(), 1e-9), max(1 - q.sum(), 1e-9)
    return np.sum(p * (own - theirs)) + rest_p * np.log(rest_p / rest_q)


def test_texts_become_the_same_tokens(case):
    assert case.answer["tokens"] == written_ids(case)


def test_sentence_pieces_become_the_same_tokens(cases):
    made, log = cases
    case = made["pieces"]
    assert case.answer is not None, f"llama.cpp stopped: {log}"
    assert case.answer["tokens"] == written_ids(case)


def written_ids(case):
    """With control tokens, as a template writes them."""
    inner = tokenizers.Tokenizer.from_str(case.exported.tokenizer.to_json())
    return [inner.encode(text, add_special_tokens=False).ids for text in case.texts]


def test_a_model_file_computes_the_same(case):
    assert check(case, "base", case.exported.base_weights)


def test_an_adapter_file_computes_the_same(case):
    assert check(case, "adapted", case.exported.weights)


@pytest.fixture(scope="module")
def run():
    """The run of `make finetune`: a real model and a trained adapter."""
    folder = Path(os.environ.get("LLAMA_RUN", "runs/finetune_dolly"))
    if not (folder / "checkpoints").is_dir():
        pytest.skip(f"{folder} is missing: make finetune trains it")
    exported = exported_model(reopen(str(folder)))
    exact = Model(exported.model.architecture)
    return dataclasses.replace(exported, model=exact)


def real_case(exported, folder, options, adapter=False):
    folder.mkdir()
    plain = exported
    if adapter:
        plain = dataclasses.replace(exported, weights=exported.base_weights)
        gguf_adapter.FORMAT.write(exported, folder, options)
    gguf_model.FORMAT.write(plain, folder, options)
    rows = exported.tokenizer.encode_texts(ROWS)
    rows = [row[: min(map(len, rows))] for row in rows]
    case = Case(exported, rows, folder, new=24, every=4, top=1000, texts=REAL_TEXTS)
    answers, log = ask_llama_cpp([case.job()], folder)
    assert answers, f"llama.cpp stopped: {log[-2000:]}"
    case.answer = answers[0]
    return case


def test_a_real_model_and_its_adapter_compute_the_same(run, tmp_path):
    case = real_case(run, tmp_path / "f32", ExportOptions(), adapter=True)
    assert case.answer["tokens"] == written_ids(case)
    assert check(case, "base", run.base_weights)
    assert check(case, "adapted", run.weights)


@pytest.mark.parametrize("quant, most", [("q8_0", 1e-2), ("q4_0", 5e-2)])
def test_codes_of_a_real_model_compute_the_same(run, tmp_path, quant, most):
    """llama.cpp rounds activations, too; the adapter is merged before both."""
    case = real_case(run, tmp_path / quant, ExportOptions(quant=quant))
    read = gguf_model.FORMAT.read_back(case.folder, run).read
    layers = range(run.model.architecture.layers)
    weights = {
        path: np.stack([read(path, (n,)) for n in layers])
        if spec.stacked
        else read(path, ())
        for path, spec in run.model.specs.items()
    }
    check(case, "base", weights, most, apart=1.0)
