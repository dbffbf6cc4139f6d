"""EVA: LoRA that starts at the principal directions of each matrix's inputs."""

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from research.config.knob_groups import LoRAConfig
from research.weights import parameter_paths
from research.weights.adapters.adapter_kind import (
    Adapters,
    AdapterSpecs,
    Settings,
)
from research.weights.adapters.lora import LoRA
from research.weights.adapters.measured_inputs import InputDirections, require_inputs
from research.weights.parameter_spec import Spec
from research.weights.representations.leaf import Matrix

Array = jax.Array


class EVA(LoRA):
    """Paischer et al. 2024, arXiv:2410.07170, algorithm 1, as PEFT computes it.

    A has the directions in which the inputs vary most, each of length 1, and B is zero.
    The ranks of all matrices are handed out anew, by the share of its input's variance
    that a direction explains; `lora.eva_rho` bounds them. The factors have room for the
    largest rank, and zeros in both elsewhere, which get no gradient. The scale stays
    alpha / `lora.rank`, whatever rank a matrix gets.
    """

    name = "eva"
    reads_inputs = True
    of_trained_tokens = True

    def room(self, rank: int, config: LoRAConfig) -> int:
        return round(rank * config.eva_rho)

    def rank_fault(self, spec: Spec, rank: int) -> str:
        inputs = spec.as_matrix.shape[-2]
        if rank > inputs:
            return (
                f"lora.rank x lora.eva_rho is {rank}, and its inputs have only "
                f"{inputs} directions: lower one of the two, or set "
                "--config.lora.eva_rho=1"
            )
        return ""

    def settings(self, ranks: Mapping[str, int], config: LoRAConfig) -> Settings:
        own = parameter_paths.numbers_by_pattern(
            ranks, config.rank_pattern, config.rank
        )
        return super().settings({path: int(rank) for path, rank in own.items()}, config)

    def init(
        self,
        key: Array,
        specs: Mapping[str, Spec],
        config: LoRAConfig,
        base: Mapping[str, Matrix] = MappingProxyType({}),
        inputs: Mapping[str, InputDirections] = MappingProxyType({}),
    ) -> Adapters:
        """All adapters at their start.

        Raises:
          UserError: the inputs of a matrix have not been measured.
        """
        own = self.specs(specs, config)
        require_inputs(self.name, own, inputs)
        kept = _hand_out(own, self._budget(own, config), inputs)
        started = {}
        for path, factors in own.items():
            a, b = factors["a"], factors["b"]
            chosen = inputs[path].directions * kept[path][..., None, :]
            started[path] = {
                "a": chosen.reshape(a.shape),
                "b": jnp.zeros(b.shape, jnp.float32),
            }
        return started

    def _budget(self, own: AdapterSpecs, config: LoRAConfig) -> int:
        """The sum of the ranks that the config gives all matrices."""
        ranks = parameter_paths.numbers_by_pattern(
            own, config.rank_pattern, config.rank
        )
        return sum(int(ranks[path]) * own[path]["a"].copies for path in own)


def _hand_out(
    own: AdapterSpecs, budget: int, inputs: Mapping[str, InputDirections]
) -> dict[str, Array]:
    """1 for each direction that is kept, else 0, `[*stack, rank]` by path.

    They are the `budget` directions of all with the largest shares.
    """
    shares = {}
    for path, factors in own.items():
        layers = factors["a"].layers
        share = inputs[path].shares
        if layers:  # Those of the others come last.
            has = jnp.zeros(share.shape[0], bool).at[jnp.array(layers)].set(True)
            share = jnp.where(has[:, None], share, -1.0)
        shares[path] = share
    flat = jnp.concatenate([share.reshape(-1) for share in shares.values()])
    order = jnp.argsort(-flat, stable=True)
    kept = jnp.zeros(flat.size, jnp.float32).at[order[:budget]].set(1.0)
    found, first = {}, 0
    for path, share in shares.items():
        found[path] = kept[first : first + share.size].reshape(share.shape)
        first += share.size
    return found


KIND = EVA()
