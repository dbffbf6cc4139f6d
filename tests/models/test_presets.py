"""The shapes of released models have as many parameters as the models."""

import pytest

from research.models.presets import PRESETS
from research.models.transformer import Model
from research.weights import parameter_paths

# From the safetensors index or the model card of each model on the hub.
RELEASED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama2-7b": 6_738_415_616,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen3-0.6b": 596_049_920,
    "gemma3-270m": 268_098_176,
    "pythia-160m": 162_322_944,
    "gpt2": 124_439_808,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "olmoe-1b-7b": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_released_model_is_counted_to_the_last_parameter(name):
    own = {"tiny", "llama-6m", "llama-125m", "llama-1b", "mixtral-6m", "mixtral-125m"}
    assert (name in RELEASED) != (name in own)
    if name in RELEASED:
        specs = Model(PRESETS[name]).specs
        assert parameter_paths.count(specs) == RELEASED[name]
