"""FLOPs of a planned step: what it needs, and what the program computes again."""

import dataclasses

from research.plan.abstract_step import AbstractStep
from research.train.metrics import throughput
from research.weights import parameter_paths


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Of one step, over all devices.

    Attributes:
      model: what the step needs; MFU counts these (`metrics.FlopCount`).
      recomputed: forward products that the backward pass makes again.
      waited: that devices could do while they wait for those with the last part of
        each row, whose queries see the most keys; 0 without a context axis.
    """

    model: float
    recomputed: float
    waited: float = 0.0

    @property
    def total(self) -> float:
        return self.model + self.recomputed + self.waited


def count_step_flops(step: AbstractStep) -> StepFlops:
    """Of rows that each are one document, every token of which is trained.

    The most a row can cost: shorter documents attend to less, and in instruction data
    the head is computed for the answers alone.
    """
    config, a = step.config, step.architecture
    trained = parameter_paths.count(step.state.params)
    count = throughput.count_flops(a, trained, full=not step.frozen)
    tokens = step.tokens
    pairs = tokens * (config.data.seq_len + 1) / 2
    again_per_token, again_per_pair = recomputed(step, count, trained)
    # Of n parts of a causal square the last has 2n - 1 of the n * n small squares.
    parts = step.definition.mesh.shape["context"]
    uneven = (2 * parts - 1) / parts - 1
    return StepFlops(
        model=count.step(tokens, tokens, pairs),
        recomputed=again_per_token * tokens + again_per_pair * pairs,
        waited=uneven * (count.per_pair + again_per_pair) * pairs,
    )


def recomputed(
    step: AbstractStep, count: throughput.FlopCount, trained: int
) -> tuple[float, float]:
    """FLOPs again, per token and per pair of query and key.

    Attention makes its scores again on the way back whatever the policy, one of the
    two products of its forward pass; `dots` keeps the products of weights but not
    attention's, `full` keeps neither (the head is outside of what is rematerialised).
    """
    forward_pair = count.per_pair / 3
    again = forward_pair / 2
    remat = step.config.model.remat
    if remat == "none":
        return 0.0, again
    if remat == "dots":
        return 0.0, again + forward_pair
    # A third of a full step is its forward pass; of a LoRA step half of the frozen
    # products, and a third of the adapters'.
    adapters = 6.0 * trained if step.frozen else 0.0
    frozen_share = 2 if step.frozen else 3
    body = (count.per_token - adapters) / frozen_share + adapters / 3
    return body, again + forward_pair
