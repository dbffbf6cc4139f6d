"""The base under the adapters of an export, where a run was trained over codes."""

import dataclasses
import logging

from research.config.choices import DEQUANTISED, EXPORT_BASES, ORIGINAL
from research.core.errors import UserError, look_up
from research.formats.load_parameters import load_frozen
from research.runs.answering.int8_base import mean_loss, texts_to_measure
from research.runs.reopen import ReopenedRun
from research.weights import trainable


def over(base: str, opened: ReopenedRun) -> tuple[ReopenedRun, str]:
    """The run over the base that `base` names, and a sentence about it for people.

    For `original` the adapters lie over the base model's own weights, and the sentence
    has the loss before and after on the first rows of training. There is none for
    `dequantised`, which is what was trained.

    Raises:
      UserError: there is no such base, or the run was not trained over codes.
    """
    look_up(dict.fromkeys(EXPORT_BASES), base, "--base")
    form = opened.config.model.quantize
    if form == "none":
        if base == ORIGINAL:
            raise UserError(
                "--base=original has no effect: this run was trained over the base "
                "model's own weights (config.model.quantize=none); remove it"
            )
        return opened, ""
    if base == DEQUANTISED:
        return opened, ""
    texts = texts_to_measure(opened.folder.path, opened.base.tokenizer)
    before = mean_loss(opened.weights, opened.model, opened.mesh, texts)
    config = opened.config
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, quantize="none")
    )
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
