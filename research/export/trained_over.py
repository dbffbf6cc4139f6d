"""The base under the adapters of an export, where a run was trained over codes."""

import dataclasses
import logging
from collections.abc import Sequence

from research.config.choices import DEQUANTISED, EXPORT_BASES, ORIGINAL
from research.core.errors import UserError, look_up
from research.formats.export_format import find_format
from research.formats.load_parameters import load_frozen
from research.runs.answering.found_adapters import same_numbers
from research.runs.answering.int8_base import mean_loss, texts_to_measure
from research.runs.reopen import ReopenedRun
from research.weights import trainable
from research.weights.adapters.adapter_registry import find_kind


def check(base: str, form: str, formats: Sequence[str]) -> None:
    """Refuses a base of the export of a run before anything is read.

    Args:
      base: one of `EXPORT_BASES`.
      form: `config.model.frozen_form` of the run.
      formats: names, see `find_format`.

    Raises:
      UserError: there is no such base, the run was not trained over codes, or a format
        has adapters alone, which other tools add to other weights than `base`.
    """
    look_up(dict.fromkeys(EXPORT_BASES), base, "--base")
    if form == "none" and base == ORIGINAL:
        raise UserError(
            "--base=original has no effect: this run was trained over the base "
            "model's own weights (config.model.quantize=none); remove it"
        )
    alone = [name for name in formats if not find_format(name).merges]
    if alone and base == DEQUANTISED and not same_numbers(form, "none"):
        raise UserError(
            f"--format={alone[0]} writes adapters alone, which other tools add to the "
            f"base model's own weights, and this run was trained over {form} codes: "
            "use --format=hf, which merges what was trained, or --base=original, which "
            "measures what the other weights cost"
        )


def require_own_codes(kind: str, base: str, formats: Sequence[str]) -> None:
    """Refuses other weights under adapters that began with what codes have lost.

    Args:
      kind: of the adapters.
      base, formats: as `check` has them.

    Raises:
      UserError: the adapters would lie over weights that have lost nothing.
    """
    alone = [f"--format={x}" for x in formats if not find_format(x).merges]
    asked = ["--base=original"] * (base == ORIGINAL) + alone
    if asked and find_kind(kind).reads_lost:
        raise UserError(
            f"adapters of kind {kind!r} began with what the codes of this run have "
            f"lost, and {asked[0]} puts them over weights that have lost nothing: use "
            "--format=hf or --format=gguf without --base, which merge what was trained"
        )


def over(base: str, opened: ReopenedRun) -> tuple[ReopenedRun, str]:
    """The run over the base that `base` names, and a sentence about it for people.

    For `original` the adapters lie over the base model's own weights, and the sentence
    has the loss before and after on the first rows of training. There is none for
    `dequantised`, which is what was trained. `check` has passed `base`.
    """
    if base == DEQUANTISED:
        return opened, ""
    form = opened.config.model.frozen_form
    texts = texts_to_measure(opened.folder.path, opened.base.tokenizer)
    before = mean_loss(opened.weights, opened.model, opened.mesh, texts)
    config = opened.config
    model = dataclasses.replace(config.model, quantize="none", quantize_paths=())
    plain = dataclasses.replace(config, model=model)
    specs = opened.model.specs
    split = trainable.make(plain.trainable, plain.model, plain.lora, specs)
    opened.frozen.clear()  # Room for the original weights.
    frozen = load_frozen(opened.base, opened.model, opened.mesh, split, config.seed)
    moved = dataclasses.replace(opened, trainable=split, frozen=frozen)
    after = mean_loss(moved.weights, moved.model, moved.mesh, texts)
    note = (
        f"those of the base model, and not the {form} codes over which the adapters "
        f"were trained: the loss on training rows is {after:.4f} instead of "
        f"{before:.4f} ({after / before - 1:+.2%})"
    )
    logging.warning("export: frozen weights are %s", note)
    return moved, note
