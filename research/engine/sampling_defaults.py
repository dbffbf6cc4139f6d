"""The way of choosing tokens that a model's `generation_config.json` gives."""

from collections.abc import Mapping
from typing import Any

from research.engine.requests import Sampling
from research.models.families.config_fields import ConfigFields

# Fields that would change an answer and that `Sampling` has not, with the values that
# change nothing. Those of the first group matter only where tokens are drawn.
OF_DRAWS = {
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
}
OTHERS = {
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "min_length": 0,
    "num_beams": 1,
    "suppress_tokens": [],
    "bad_words_ids": [],
}


def model_sampling(
    generation: Mapping[str, Any], otherwise: Sampling
) -> tuple[Sampling, list[str]]:
    """The sampling that a model comes with, as transformers reads it.

    Without `do_sample` the likeliest token is taken, whatever the other fields are.

    Args:
      generation: fields of `generation_config.json`; empty without such a file.
      otherwise: has the values of absent fields.

    Returns:
      The sampling, and `name=value` for each field that has no place in it.

    Raises:
      UserError: a field is malformed.
    """
    fields = ConfigFields(generation, "the generation_config.json of the model")
    draws = fields.flag("do_sample", False)
    unused = OTHERS | OF_DRAWS if draws else OTHERS
    values = {
        "temperature": fields.number("temperature", 1.0) if draws else 0.0,
        "top_p": fields.number("top_p", 1.0 if draws else otherwise.top_p, high=1),
        # transformers draws from the 50 likeliest tokens unless a model says otherwise.
        "top_k": fields.integer("top_k", 50 if draws else otherwise.top_k, low=0),
        "repetition_penalty": fields.number(
            "repetition_penalty", otherwise.repetition_penalty
        ),
        "max_new_tokens": fields.integer("max_new_tokens", otherwise.max_new_tokens),
    }
    if fields.get("min_p"):
        values["min_p"] = fields.number("min_p", high=1)
    return Sampling(**values, seed=otherwise.seed), [
        f"{name}={generation[name]}"
        for name, neutral in unused.items()
        if generation.get(name, neutral) not in (neutral, None)
    ]
