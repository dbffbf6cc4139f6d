"""The shape of a decoder and the switches that change what its one Block computes."""

import dataclasses

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than trained on.

    `linear`: Chen et al. 2023, arXiv:2306.15595. `llama3`: the Llama 3.1 release
    (wavelengths above `original_max_position / low_freq_factor` are divided by
    `factor`, those below `original_max_position / high_freq_factor` are kept, the
    ones between are interpolated).
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a decoder. Field names follow the legend in `attention.py`:
    D embed, F mlp, L layers, N heads, K kv_heads, H head_dim, V vocab.

    Every field with a default is a switch; all switches at their defaults make a
    Llama.

    Attributes:
      family: a name in `families.family_registry.FAMILIES`. It says how the model's
        files are written, and changes nothing in what is computed.

    Raises:
      UserError: the heads do not divide among the key/value heads.
    """

    vocab: int
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_head: bool
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    max_position: int = 2048
    family: str = "llama"

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} heads cannot share {self.kv_heads} key/value heads: "
                "heads must be a multiple of kv_heads"
            )

    @property
    def matrices_per_layer(self) -> int:
        """Scalars in a layer's matrices: 2D(N+K)H of attention and 3DF of the MLP."""
        attention = 2 * self.embed * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.embed * self.mlp

    def describe(self) -> str:
        """All fields as one line, from which fingerprints of runs are made.

        A field younger than the first saved runs appears only where it differs from
        its default, so that those runs can still be resumed.
        """
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name in FIRST_FIELDS or getattr(self, field.name) != field.default
        ]
        return f"Architecture({', '.join(shown)})"


FIRST_FIELDS = (
    "vocab", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "tied_head",
    "rope_theta", "rope_scaling", "norm_eps", "max_position",
)  # fmt: skip
