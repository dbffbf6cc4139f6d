"""A model that answers in the terminal: one that a run has tuned, or one of a file."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.core.visible_text import visible
from research.engine.requests import Piece, Request, Sampling
from research.engine.sampling_defaults import model_sampling
from research.engine.text_generation import (
    LastingGenerator,
    SlotDecoders,
    TextGenerator,
)
from research.formats.base_model import Base
from research.formats.peft.find_adapter import find_adapter, names_adapter
from research.runs.answering.found_adapters import base_of_folder, find_folder
from research.runs.answering.int8_base import in_form
from research.runs.answering.named_model import prompts_of
from research.runs.answering.open_for_answering import open_for_answering
from research.runs.answering.weight_forms import PLAIN
from research.runs.reopen import ReopenedRun, reopen
from research.tasks.pretraining import PlainFormat
from research.tasks.task_protocol import PromptFormat
from research.tokenize.conversation import Turn

USUAL = Sampling(temperature=0.0, top_p=0.95, max_new_tokens=256)


@dataclasses.dataclass(frozen=True)
class SamplingFlags:
    """The fields of `Sampling` that a user sets; None leaves one to the model."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a user asks, whichever the model.

    Attributes:
      system: the system text; None leaves it to the model, and "" sends none.
      sampling: how tokens are chosen.
      stop: texts that end an answer and are not part of it.
      weights: the form of the base under adapters, or of all of the model; `in_form`.
    """

    system: str | None = None
    sampling: SamplingFlags = SamplingFlags()
    stop: tuple[str, ...] = ()
    weights: str = PLAIN


USUALLY = Asking()


@dataclasses.dataclass(frozen=True)
class AskedModel:
    """One model, or a base model and the tuned one beside it.

    Attributes:
      prompts: how prompts become ids.
      generators: by the name of the model.
      sampling: how tokens are chosen.
      fits_answers: shortens the limit of an answer to what the context has room for.
      stop: texts that end an answer and are not part of it.
      name: of the run with its step, or of the model, for people.
    """

    prompts: PromptFormat
    generators: Mapping[str, TextGenerator]
    sampling: Sampling
    fits_answers: bool = True
    stop: tuple[str, ...] = ()
    name: str = ""

    def stream(
        self, name: str, turns: Sequence[Turn], context: str = "", seed: int = 0
    ) -> Iterator[Piece]:
        """Yields the answer of a model in pieces.

        Args:
          name: of the model.
          turns, context, seed: see `request`.

        Raises:
          UserError: see `request`.
        """
        request = self.request(turns, context, seed)
        room = request.sampling.max_new_tokens
        if room < self.sampling.max_new_tokens:
            logging.warning("the context has room for %d more tokens", room)
        return self.generators[name].stream(request)

    def request(
        self, turns: Sequence[Turn], context: str = "", seed: int = 0
    ) -> Request:
        """The request for the answer to a conversation.

        Args:
          turns: of the conversation; the last one is the prompt.
          context: material that belongs to the first turn.
          seed: is added to that of `sampling`.

        Raises:
          UserError: the conversation exceeds the context, the template refuses it, or a
            text is not UTF-8.
        """
        texts = (context, *(turn.text for turn in turns))
        if any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise UserError("the prompt has bytes that are not UTF-8; type it again")
        ids = self.prompts.encode_prompt(turns, context)
        longest = next(iter(self.generators.values())).decoders.longest
        if len(ids) >= longest:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and the model's context is "
                f"{longest}: shorten the prompt"
            )
        most = self.sampling.max_new_tokens
        if self.fits_answers:
            most = min(most, longest - len(ids))
        sampling = dataclasses.replace(
            self.sampling, max_new_tokens=most, seed=self.sampling.seed + seed
        )
        return Request(tuple(ids), sampling, self.prompts.stop_ids, self.stop)


def open_asked(
    run: str,
    model: str = "",
    step: str = "latest",
    compare: bool = False,
    asking: Asking = USUALLY,
) -> AskedModel:
    """The model that a command was asked for.

    Args:
      run: a run; or an adapter of PEFT, by its folder or hub:// address; "" for a model
        without a run.
      model: that model, or the base of the adapter.
      step: of the run.
      compare: whether the base model answers beside the tuned one.
      asking: how it is asked.

    Raises:
      UserError: see `open_run`, `open_adapter` and `open_model`.
    """
    if run and names_adapter(run):
        return open_adapter(run, model, compare, asking)
    if run:
        return open_run(run, step, compare, asking)
    return open_model(model, asking)


def open_run(
    run: str, step: str = "latest", compare: bool = False, asking: Asking = USUALLY
) -> AskedModel:
    """The model of a run, with the system text that it was trained with.

    Raises:
      UserError: there is no such run or checkpoint, or its prompts take no system text.
    """
    opened = reopen(run, step=step, in_compute_dtype=True)
    if asking.system is None and (trained_with := opened.system):
        logging.info("system text, as in training: %s", visible(trained_with))
    prompts = opened.prompts
    if asking.system is not None:
        prompts = opened.prompts_with(asking.system)
    generators = _generators(opened, compare, asking.weights)
    name = f"{opened.folder.path}@{opened.step}"
    return _asked(name, prompts, generators, opened.base, asking)


def _generators(
    run: ReopenedRun, compare: bool, weights: str
) -> Mapping[str, TextGenerator]:
    convert = functools.partial(
        in_form,
        weights,
        model=run.model,
        mesh=run.mesh,
        run=run.folder.path,
        tokenizer=run.base.tokenizer,
    )
    if run.frozen:
        frozen = convert(run.frozen)
        return dataclasses.replace(run, frozen=frozen).generators(compare=compare)
    generators = run.generators(compare=compare)
    for generator in generators.values():
        generator.params = convert(generator.params)
    return generators


def open_model(name: str, asking: Asking = USUALLY) -> AskedModel:
    """A model without a run, as `config.model.init_from` names it.

    Without a chat template, it completes the text of a prompt.

    Raises:
      UserError: there is no such model, or it takes no system text.
    """
    opened = open_for_answering(model=name, weights=asking.weights)
    prompts = prompts_of(opened.base, asking.system)
    if isinstance(prompts, PlainFormat):
        logging.warning("%s has no chat template: it completes the prompt", name)
    decoders = SlotDecoders(opened.model, opened.mesh)
    generator = TextGenerator(decoders, opened.params, opened.base.tokenizer)
    return _asked(name, prompts, {"model": generator}, opened.base, asking)


def open_adapter(
    adapter: str, model: str = "", compare: bool = False, asking: Asking = USUALLY
) -> AskedModel:
    """The base model `model`, or that which the adapter names, with a PEFT adapter.

    Raises:
      UserError: the adapter or the base model is absent, the adapter is one to another
        base or is not computed here, or its prompts take no system text.
    """
    place = find_adapter(adapter)
    name = model or base_of_folder(place)
    opened = open_for_answering(model=name, weights=asking.weights)
    found = find_folder(place, opened.base)
    prompts = found.prompts_with(asking.system)
    tuned = found.trainable.forward(found.read(opened.mesh), opened.params, None)
    decoders, tokenizer = SlotDecoders(opened.model, opened.mesh), found.base.tokenizer
    params = {"base": opened.params, "tuned": tuned} if compare else {"tuned": tuned}
    generators = {
        key: TextGenerator(decoders, own, tokenizer) for key, own in params.items()
    }
    return _asked(adapter, prompts, generators, found.base, asking)


def _asked(
    name: str,
    prompts: PromptFormat,
    generators: Mapping[str, TextGenerator],
    base: Base,
    asking: Asking,
) -> AskedModel:
    if asking.system and isinstance(prompts, PlainFormat):
        raise UserError(
            "--system is set, and this model completes a text: write it into the prompt"
        )
    sampling, unused = model_sampling(base.tokenizer.generation, USUAL)
    if unused:
        logging.warning(
            "generation_config.json of the model sets %s, which have no effect here",
            ", ".join(unused),
        )
    given: dict[str, Any] = dataclasses.asdict(asking.sampling)
    given = {name: value for name, value in given.items() if value is not None}
    return AskedModel(
        prompts,
        {
            name: LastingGenerator(each.decoders, each.params, each.tokenizer)
            for name, each in generators.items()
        },
        dataclasses.replace(sampling, **given),
        fits_answers=asking.sampling.max_new_tokens is None,
        stop=asking.stop,
        name=name if asking.weights == PLAIN else f"{name} {asking.weights}",
    )
