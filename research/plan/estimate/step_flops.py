"""FLOPs of a planned step: what the model needs, and what is computed twice."""

import dataclasses
import math

from research.core.errors import look_up
from research.plan.abstract_step import AbstractStep
from research.train.metrics import throughput
from research.weights.quantized.int8_weights import Int8Matrix


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step, over all devices.

    Attributes:
      model: FLOPs that the step needs; MFU counts these (`throughput.FlopCount`).
      recomputed: forward products that the backward pass computes again.
      waited: FLOPs that devices could do while they wait for the devices with the
        last part of each row, whose queries see the most keys; 0 without a context
        axis.
      in_bytes: those of the above whose factors are both int8
        (`config.model.int8_products`).
    """

    model: float
    recomputed: float
    waited: float = 0.0
    in_bytes: float = 0.0

    @property
    def total(self) -> float:
        return self.model + self.recomputed + self.waited


def count_step_flops(step: AbstractStep) -> StepFlops:
    """Counts FLOPs as if each row were one document and every token were trained.

    This is the most that a row can cost: shorter documents attend to fewer keys, and
    instruction data needs the head only for the answers.
    """
    config, a = step.config, step.architecture
    counted = throughput.count_trained(
        step.state.params, step.definition.trainable, step.definition.model
    )
    count = throughput.count_flops(a, **counted)
    tokens = step.tokens
    length = config.data.seq_len
    pairs = tokens * (length + 1) / 2 * a.seen_share(length)
    again_per_token, again_per_pair = recomputed(step, count, counted["trained"])
    # A causal square is cut into n parts along the queries. The last part has 2n - 1
    # of the n * n small triangles, where the mean part has n.
    parts = step.definition.mesh.shape["context"]
    uneven = (2 * parts - 1) / parts - 1
    return StepFlops(
        model=count.step(tokens, tokens, pairs),
        recomputed=again_per_token * tokens + again_per_pair * pairs,
        waited=uneven * (count.per_pair + again_per_pair) * pairs,
        in_bytes=in_bytes(step) * tokens,
    )


def in_bytes(step: AbstractStep) -> float:
    """FLOPs of products of int8 for a token, those that remat repeats included.

    They are the forward products of the layers' frozen int8 matrices and the gradients
    of their inputs: `int8_weights.byte_product`. Factors beside them, attention and the
    head are multiplied in `config.model.dtype`.
    """
    if not step.definition.int8_products:
        return 0.0
    frozen = step.definition.trainable.used(step.frozen)
    weights = sum(
        math.prod(leaf.codes.shape)
        for path, leaf in frozen.items()
        if isinstance(leaf, Int8Matrix) and step.definition.model.specs[path].stacked
    )
    passes = 3 if step.config.model.remat == "full" else 2
    return 2.0 * passes * weights


def recomputed(
    step: AbstractStep, count: throughput.FlopCount, trained: int
) -> tuple[float, float]:
    """FLOPs that the backward pass repeats, per token and per (query, key) pair.

    Attention always computes its scores again, one of the two products of its forward
    pass. Remat `dots` keeps the products with weights but not those of attention;
    `full` keeps neither. The head is never rematerialised. With an `expert` axis,
    experts are always computed again.
    """
    forward_pair = count.per_pair / 3
    again = forward_pair / 2
    # The forward pass is a third of a full step. In a LoRA step it is half of the
    # frozen products and a third of the adapters' products.
    adapters = 6.0 * trained if step.frozen else 0.0
    frozen_share = 2 if step.frozen else 3
    body = (count.per_token - adapters) / frozen_share + adapters / 3
    a, experts = step.architecture, 0.0
    if a.experts and step.definition.mesh.shape["expert"] > 1:
        of_token = a.experts.chosen / a.experts.count
        experts = 2.0 * a.layers * a.experts_per_layer * of_token
    repeated = {
        "none": (experts, again),
        "dots": (experts, again + forward_pair),
        "full": (body, again + forward_pair),
    }
    return look_up(repeated, step.config.model.remat, "config.model.remat")
