"""Adapter folders of PEFT with `modules_to_save` and `bias`, in both directions.

`golden/whole_modules.py` recorded adapters that PEFT made, how it trains them, and what
it computes from ours.
"""

import dataclasses
import json

import numpy as np
import pytest
from exported_models import tiny_rows, tiny_tokenizer, with_adapters
from helpers import in_soak
from peft_exports import (
    WHOLE,
    WHOLE_MODULES,
    model_of,
    whole_export_of,
    whole_of,
    write_adapter,
)
from seeded_factors import make_factors, read_export
from seeded_weights import make_weights
from small_run import one_device

from research.config.knob_groups import LoRAConfig, ModelConfig, OptimConfig
from research.core.errors import ParityError, UserError
from research.data.token_batch import Batch
from research.formats.base_model import Base
from research.formats.export_format import (
    ExportedAdapter,
    ExportedModel,
    ExportOptions,
    find_format,
)
from research.formats.peft.adapter_folder import AdapterFolder
from research.formats.proof.logit_parity import prove
from research.parallel import mesh as meshes
from research.runs.answering.found_adapters import find_adapters, find_folder
from research.runs.answering.run_addresses import run_addresses
from research.tasks.token_loss_and_metrics import CrossEntropy
from research.train.step import optimizers, train_step
from research.weights import trainable
from research.weights.adapters.adapter_kind import Settings
from research.weights.adapters.lora import KIND
from research.weights.contraction import materialize

START, NORM = "base_model.model.", "layers.attention_norm.scale"
OUTPUT = "layers.attention.output.kernel"


def made_by_peft(name):
    """The tensors and config of the recorded adapter that PEFT made."""
    recorded = json.loads((WHOLE_MODULES / name / "peft.json").read_text())
    shapes = recorded["shapes"]
    lora = {key: x for key, x in shapes.items() if "lora_" in key}
    whole = {key: x for key, x in shapes.items() if key not in lora}
    tensors = make_factors(lora, recorded["seed"])
    tensors |= make_weights(whole, recorded["seed"] + 1, recorded["norm_mean"])
    if recorded["config"]["ensure_weight_tying"]:
        (table,) = [key for key in whole if "embed" in key]
        tensors[f"{START}lm_head.weight"] = tensors[table]
    return tensors, recorded["config"]


def opened(it, folder):
    return AdapterFolder(folder, it.architecture, it.model.specs)


def loaded(it, adapter):
    """The split of a run that continues the adapter, and where it starts."""
    lora = adapter.lora_config(LoRAConfig())
    split = trainable.make("lora", ModelConfig(dtype="float32"), lora, it.model.specs)
    shardings = meshes.shardings(split.specs, one_device())
    return split, adapter.load(shardings)


@pytest.mark.parametrize("name", WHOLE)
def test_logits_are_those_of_peft(golden, tmp_path, name):
    """From our export in PEFT, and from PEFT's adapter here."""
    it, expected = golden(name), np.load(WHOLE_MODULES / name / "expected.npz")
    factors, scales, whole = whole_of(it)
    streams = dict.fromkeys(factors, 0)
    adapted = KIND.attach(it.params, factors, Settings(scales, streams, 0.0)) | whole
    ours, _ = it.logits({path: materialize(leaf) for path, leaf in adapted.items()})
    assert np.abs(ours - expected["ours"]).max() < 1e-3
    adapter = opened(it, write_adapter(tmp_path / "peft", *made_by_peft(name)))
    split, start = loaded(it, adapter)
    weights = split.forward(start, it.params, None)
    theirs, _ = it.logits({path: materialize(leaf) for path, leaf in weights.items()})
    assert np.abs(theirs - expected["peft"]).max() < 1e-3
    without, _ = it.logits(it.params | {p: materialize(weights[p]) for p in it.params
                                        if p not in split.full})  # fmt: skip
    assert np.abs(without - theirs).max() > 0.1


TRAINED = {
    "qwen2": {
        "head.kernel", "layers.attention_norm.scale", "layers.attention.query.kernel",
        "layers.attention.query.bias", "layers.attention.value.bias",
    },
    "qwen2_window": {"embedding.table", "final_norm.scale",
                     "layers.attention_norm.scale", "layers.mlp_norm.scale"},
    "mixtral": {"layers.router.kernel", "final_norm.scale",
                "layers.attention_norm.scale", "layers.mlp_norm.scale"},
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_the_config_says_which_parameters_were_trained(golden, tmp_path, name):
    folder = write_adapter(tmp_path / "peft", *made_by_peft(name))
    adapter = opened(golden(name), folder)
    assert {*adapter.whole.trained} == TRAINED[name]
    assert loaded(golden(name), adapter)[0].full == TRAINED[name]


@pytest.mark.parametrize("name", WHOLE)
def test_an_export_is_read_back_exactly(golden, tmp_path, name):
    """It is the very one from which PEFT computed the recorded logits."""
    it = golden(name)
    factors, scales, whole = whole_of(it)
    tensors, config = whole_export_of(it, factors, scales, whole)
    known, recorded = read_export(WHOLE_MODULES / name)
    assert known == config and [*recorded] == [*tensors]
    for key, value in tensors.items():
        np.testing.assert_array_equal(value, recorded[key], err_msg=key)
    adapter = opened(it, write_adapter(tmp_path / "ours", tensors, config))
    assert adapter.ranks.keys() == factors.keys()
    # PEFT saves a module with all its parameters.
    assert adapter.whole.trained.keys() >= whole.keys()
    for path in adapter.whole.trained:
        expected = np.asarray(whole.get(path, it.params[path]))
        shift = 1e-6 if name == "gemma3" else 0.0  # A file adds one to some scales.
        for i in range(len(expected)) if it.model.specs[path].stacked else ():
            read = adapter.whole.layer(path, (i,))
            np.testing.assert_allclose(read, expected[i], atol=shift, rtol=0)
        start = loaded(it, adapter)[1][path]
        np.testing.assert_allclose(start, expected, atol=shift, rtol=0)


@pytest.mark.parametrize(
    "name", ["qwen2_window", *map(in_soak, ("qwen2", "gemma3", "gpt_neox", "gpt2"))]
)
def test_losses_follow_those_of_peft(golden, tmp_path, name):
    """Twenty updates of adapters and whole parameters from the same start."""
    it, steps = golden(name), 20
    folder = write_adapter(tmp_path / "peft", *made_by_peft(name))
    split, start = loaded(it, opened(it, folder))
    optim = OptimConfig(
        learning_rate=3e-3, schedule="constant", warmup=0.0, b1=0.9, b2=0.99, eps=1e-4,
        clip_norm=0.0, skip_spread=0.0,
    )  # fmt: skip
    mesh = one_device()
    definition = train_step.StepDefinition(
        it.model,
        split,
        optimizers.make_optimizer(optim, steps, split.specs),
        mesh,
        CrossEntropy(1, 0, meshes.shards(mesh), mesh=mesh),
    )
    state, losses = train_step.jit_init(definition)(start), []
    train, seed = train_step.jit_train_step(definition), sum(name.encode())
    for step in range(steps):
        rows = np.random.RandomState([seed, step]).randint(0, 64, (1, 2, 48))
        state, metrics = train(state, it.params, batch_of(rows.astype(np.int32)))
        losses.append(float(metrics["means"]["loss"]))
    expected = np.load(WHOLE_MODULES / name / "expected.npz")["losses"]
    np.testing.assert_allclose(losses, expected, atol=1e-4, rtol=0)
    assert expected[-1] < expected[0] - 0.1


def batch_of(rows):
    """Rows `[passes, rows, T]`, each a document whose next tokens are trained."""
    ones, places = np.ones_like(rows), np.arange(rows.shape[-1], dtype=np.int32)
    targets, weights = np.roll(rows, -1, -1), np.float32(ones)
    weights[..., -1] = 0.0
    return Batch(
        tokens=rows,
        targets=targets,
        weights=weights,
        segments=ones,
        positions=np.broadcast_to(places, rows.shape).copy(),
        groups=0 * rows,
    )


def without(*ends):
    return lambda t, c: ({k: x for k, x in t.items() if not k.endswith(ends)}, c)


def put(**fields):
    return lambda t, c: (t, c | fields)


def filled(end, value):
    return lambda t, c: (
        {k: x * 0 + value if k.endswith(end) else x for k, x in t.items()}, c
    )  # fmt: skip


REFUSED = {
    "a layer": (without("layers.1.input_layernorm.weight"),
                r"attention_norm\.scale was trained whole in layers 0, 2 alone of 3"),
    "a module": (put(modules_to_save=["embed_tokens", "norm", "score"]),
                 "holds nothing of score, which modules_to_save .* names"),
    "one end": (put(ensure_weight_tying=False), None),
    "the embeddings alone": (
        lambda t, c: without("lm_head.weight")(t, c | {"ensure_weight_tying": False}),
        r"ties its head .* trains model\.embed_tokens\.weight alone"),
    "both ends apart": (filled("lm_head.weight", 1), "alone, or both apart"),
    "not a number": (filled("model.norm.weight", np.nan), "is not finite"),
    "tokens": (put(trainable_token_indices=[1, 2]), "trainable_token_indices is"),
}  # fmt: skip


@pytest.mark.parametrize("change, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_continued_is_refused(golden, tmp_path, change, said):
    it = golden("qwen2_window")
    folder = write_adapter(tmp_path / "peft", *change(*made_by_peft(it.name)))
    if said is None:
        loaded(it, opened(it, folder))
        return
    with pytest.raises(UserError, match=said):
        loaded(it, opened(it, folder))


@pytest.mark.parametrize("numbers", ["float32", "bfloat16"])
def test_an_export_proves_its_whole_parameters(golden, tmp_path, numbers):
    """Tied embeddings and scales to which the files add one, beside adapters."""
    it, lora = golden("gemma3"), LoRAConfig(rank=2, targets=("mlp",))
    exported = with_adapters(it.model, it.params, lora)
    whole = {path: it.params[path] * 0.5 for path in ("embedding.table", NORM)}
    exported = dataclasses.replace(
        exported, weights=exported.weights | whole, full=frozenset(whole)
    )
    format = find_format("peft")
    format.write(exported, tmp_path, ExportOptions(numbers))
    written = format.read_back(tmp_path, exported)
    assert {p for p, x in written.held.items() if not x.is_update} == {*whole}
    prove(exported, written, tiny_rows(), numbers)
    other = exported.weights | {NORM: whole[NORM] * 1.02}
    with pytest.raises(ParityError, match=NORM):
        prove(
            dataclasses.replace(exported, weights=other), written, tiny_rows(), numbers
        )
    held = {path: x for path, x in written.held.items() if path != NORM}
    with pytest.raises(ParityError, match=f"lack {NORM}"):
        prove(exported, dataclasses.replace(written, held=held), tiny_rows(), numbers)


def test_a_folder_with_whole_parameters_enters_no_bank(golden, tmp_path):
    it = golden("qwen2_window")
    folder = write_adapter(tmp_path / "peft", *made_by_peft(it.name))
    base = Base("the base", it.architecture, None, None)
    (address,) = run_addresses([folder], with_folders=True)
    with pytest.raises(UserError, match=r"holds embedding\.table whole, trained"):
        find_adapters(address, base)
    assert len(find_folder(tmp_path / "peft", base).trainable.full) == 4


@pytest.mark.parametrize(
    "name, full, adapted, said",
    [
        ("mixtral", "layers.mlp.up.kernel", (OUTPUT,),
         "no module for layers.mlp.up.kernel"),
        ("mixtral", "layers.router.kernel", (OUTPUT,),
         "no module for layers.router.kernel"),
        ("gpt_oss", "layers.attention.sinks", (OUTPUT,),
         "no module for layers.attention.sin"),
        ("phi3", "layers.attention.query.kernel", ("layers.attention.key.kernel",),
         "model.layers.0.self_attn.qkv_proj holds layers.attention.query.kernel and"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused_before_anything_is_written(
    name, full, adapted, said
):
    model = model_of(name)
    factors = {"a": np.ones((1, 1)), "b": np.ones((1, 1))}
    exported = ExportedModel(
        model,
        {},
        tiny_tokenizer(),
        {path: ExportedAdapter(factors, 1, 1.0) for path in adapted},
        "lora",
        full=frozenset({full}),
    )
    with pytest.raises(UserError) as raised:
        find_format("peft").check(exported, ExportOptions())
    assert said in str(raised.value) and "--format=hf" in str(raised.value)


def test_adapters_without_a_module_are_refused_before_anything_is_written():
    model = model_of("gpt2")
    factors = {"a": np.ones((1, 1)), "b": np.ones((1, 1))}
    adapters = {"position_embedding.gone": ExportedAdapter(factors, 1, 1.0)}
    exported = ExportedModel(model, {}, tiny_tokenizer(), adapters, "lora")
    with pytest.raises(UserError, match="no modules for the adapters of position_emb"):
        find_format("peft").check(exported, ExportOptions())
