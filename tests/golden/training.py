"""Twenty steps of PEFT with each kind of adapter: losses, tensors, merged weights.

One step with DoRA's dropout is recorded, with its gradients and what it dropped.

The model is one of `tiny.py`, and rows follow from a seed. All tensors are those of
PEFT's own files, at the start and at the end, so that a test can begin where PEFT did.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from peft import (
    EvaConfig,
    LoraConfig,
    VeraConfig,
    get_peft_model,
    initialize_lora_eva_weights,
)
from peft.optimizers import create_loraplus_optimizer
from reference import Arrays, require
from safetensors.numpy import load_file

FOLDER, MODEL = "training", "llama2"
STEPS, BATCHES, ROWS, LENGTH = 20, 2, 4, 24
RATE, RATIO = 5e-3, 16.0
# Few numbers need a higher one.
RATES = {"vera": 0.2, "vera_layers": 0.2, "dora_layers": 1e-2}
TOLERANCE = 1e-4
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
USUAL: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "down_proj"],
    "task_type": "CAUSAL_LM",
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "loraplus": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    "eva_labels": {
        "init_lora_weights": "eva",
        "eva_config": EvaConfig(rho=2.0),
        "target_modules": ["q_proj", "k_proj", "down_proj"],
    },
    "vera": {},
    "dora": {
        "use_dora": True,
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    },
    "vera_layers": {"layers_to_transform": [1]},
    "dora_layers": {"use_dora": True, "layers_to_transform": [1]},
    "dora_dropout": {"use_dora": True, "lora_dropout": 0.5},
}
# Those of which the start alone is recorded: they train as another one.
STARTS = ("eva_labels",)
# Those of which one step is recorded, and what it dropped.
ONE_STEP = ("dora_dropout",)
# Those whose merge adds one product to the original weight, and rounds once.
MERGED = ("lora", "rslora", "dora", "vera")


class GivenDropout(torch.nn.Module):
    """Drops what NumPy draws, which `kept` tells: no other tool draws as torch does."""

    def __init__(self, rate: float, seed: int):
        super().__init__()
        self.rate, self.rng = rate, np.random.default_rng(seed)
        self.kept = np.zeros(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = self.rng.random(x.shape) >= self.rate
        return x * torch.from_numpy(self.kept) / (1 - self.rate)


def rows() -> np.ndarray:
    """Token ids `[steps, rows, length + 1]`; targets are the next ones.

    Few batches come again and again, so that the losses fall.
    """
    family = _family()
    rng = np.random.default_rng([family.seed, STEPS])
    shape = BATCHES, ROWS, LENGTH + 1
    drawn = rng.integers(0, family.config.vocab_size, shape).astype(np.int32)
    return drawn[np.arange(STEPS) % BATCHES]


def labels() -> np.ndarray:
    """Those of Hugging Face for the inputs of `rows`: the id, or -100 in a prompt.

    Prompts have 5, 8, 11 and 14 tokens.
    """
    ids = rows()[:BATCHES, :, :-1]
    prompts = 5 + 3 * np.arange(ROWS)
    return np.where(np.arange(LENGTH) < prompts[:, None], -100, ids)


def _family() -> tiny.Family:
    (family,) = [x for x in tiny.families() if x.name == MODEL]
    return family


def _adapted(case: str, model: Any) -> Any:
    torch.manual_seed(7)
    if case.startswith("vera"):
        usual = {name: x for name, x in USUAL.items() if name != "lora_alpha"}
        model = get_peft_model(model, VeraConfig(**usual | CASES[case]))
    else:
        model = get_peft_model(model, LoraConfig(**USUAL | CASES[case]))
    if case.startswith("eva"):
        ids = torch.from_numpy(rows()[:BATCHES, :, :-1].astype(np.int64))
        inputs = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in ids]
        if case == "eva_labels":
            said = torch.from_numpy(labels().astype(np.int64))
            for batch, own in zip(inputs, said, strict=True):
                batch["labels"] = own
        initialize_lora_eva_weights(model, inputs, show_progress_bar=False)
    return model


def _saved(model: Any) -> tuple[dict[str, Any], Arrays]:
    """The config and the tensors of the adapter as PEFT writes them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (
            json.loads(Path(folder, CONFIG).read_text()),
            load_file(Path(folder, TENSORS)),
        )


def _optimizer(case: str, model: Any) -> torch.optim.Optimizer:
    numbers = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    if case == "loraplus":
        return create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, **numbers
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=RATES.get(case, RATE), **numbers)


def compute(case: str) -> tuple[dict[str, Any], Arrays]:
    """The config of the adapter, and the arrays of `CASE.npz`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _compute(case)


def _compute(case: str) -> tuple[dict[str, Any], Arrays]:
    model = _adapted(case, tiny.build(_family()))
    dropouts = _with_given_dropout(model) if case in ONE_STEP else {}
    config, start = _saved(model)
    arrays = {"rows": rows()[:BATCHES]}
    arrays |= {f"start {name}": value for name, value in start.items()}
    if case in STARTS:
        arrays["labels"] = labels()
    elif case in ONE_STEP:
        arrays |= _gradients(model)
        arrays |= {f"kept {name}": np.int8(x.kept) for name, x in dropouts.items()}
    else:
        arrays["losses"] = np.float32(_losses(case, model))
        _, final = _saved(model)
        arrays |= {f"final {name}": value for name, value in final.items()}
    # A folder of this machine, and sets, which PEFT writes in any order.
    config["base_model_name_or_path"] = MODEL
    for field, value in config.items():
        config[field] = sorted(value) if isinstance(value, list) else value
    if case in MERGED:
        arrays |= _merged(model)
    return config, arrays


def _with_given_dropout(model: Any) -> dict[str, GivenDropout]:
    """Those that now stand in each module, by its name; no factor is zero."""
    found = {}
    for name, module in model.named_modules():
        if dropout := getattr(module, "lora_dropout", None):
            found[name] = dropout["default"] = GivenDropout(0.5, len(found))
            up = module.lora_B["default"].weight
            up.data = torch.randn(up.shape, generator=torch.manual_seed(9)) / 4
    model.train()  # In evaluation nothing is dropped.
    return found


def _loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten()
    )


def _gradients(model: Any) -> Arrays:
    """The loss of the first rows, and its gradients by the names of PEFT's files."""
    loss = _loss(model, torch.from_numpy(rows()[0].astype(np.int64)))
    loss.backward()
    trained = {n: x for n, x in model.named_parameters() if x.requires_grad}
    names = {name: name.replace(".default", "") for name in trained}
    names = {x: name.replace("vector.weight", "vector") for x, name in names.items()}
    gradients = {f"gradient {names[n]}": x.grad.numpy() for n, x in trained.items()}
    return {"losses": np.float32([loss.item()]), **gradients}


def _losses(case: str, model: Any) -> list[float]:
    """Those of the steps, which train `model`."""
    optimizer, losses = _optimizer(case, model), []
    for batch in torch.from_numpy(rows().astype(np.int64)):
        loss = _loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    require(losses[-BATCHES] < losses[0] - 0.2, f"{case}: the losses are {losses}")
    return losses


def _merged(model: Any) -> Arrays:
    """The bits of the adapted weights, merged into a base of bfloat16."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "vera_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    adapted = sorted(n for n, x in model.named_modules() if hasattr(x, "base_layer"))
    merged = dict(model.merge_and_unload().named_parameters())
    found = {}
    for name in adapted:
        weight = merged[f"{name.removeprefix('base_model.model.')}.weight"]
        found[f"merged {name}"] = weight.detach().view(torch.int16).numpy()
    return found


def write(root: Path) -> None:
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    configs = {}
    for case in CASES:
        configs[case], arrays = compute(case)
        np.savez_compressed(folder / f"{case}.npz", **arrays)
    text = json.dumps(configs, indent=1, sort_keys=True)
    (folder / "configs.json").write_text(text + "\n")


def read(case: str, root: Path) -> tuple[Arrays, Arrays, list[str]]:
    """Arrays computed again, those recorded, and what is wrong with the config."""
    config, arrays = compute(case)
    stored = json.loads((root / FOLDER / "configs.json").read_text())[case]
    version = {"peft_version": config["peft_version"]}
    faults = [] if stored | version == config else [f"{CONFIG} differs"]
    with np.load(root / FOLDER / f"{case}.npz", allow_pickle=False) as recorded:
        return arrays, dict(recorded), faults
