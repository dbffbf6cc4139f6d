"""The shape of a decoder and the switches that change what its one Block computes."""

import dataclasses
from typing import Any

from research.core.errors import UserError


def _shown(instance: Any, always: tuple[str, ...]) -> str:
    """Fields as one line: those in `always`, and those that differ from their default.

    Fingerprints of runs are made from it. A field younger than the first saved runs
    must not appear at its default, so that those runs can still be resumed.
    """
    shown = [
        f"{field.name}={getattr(instance, field.name)!r}"
        for field in dataclasses.fields(instance)
        if field.name in always or getattr(instance, field.name) != field.default
    ]
    return f"{type(instance).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True, repr=False)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than trained on.

    `linear`: Chen et al. 2023, arXiv:2306.15595. `llama3`: the Llama 3.1 release
    (wavelengths above `original_max_position / low_freq_factor` are divided by
    `factor`, those below `original_max_position / high_freq_factor` are kept, the
    ones between are interpolated). `yarn`: Peng et al. 2023, arXiv:2309.00071. It keeps
    pairs that turn more than `beta_fast` times over the original context, and divides
    those that turn less than `beta_slow` times. `longrope`: Ding et al. 2024,
    arXiv:2402.13753. It divides each pair by its own entry of `short`, or of `long` in
    rows longer than the original context.

    Attributes:
      attention_factor: multiplies cosines and sines (`yarn`, `longrope`).
      truncate: `yarn` rounds the two pairs between which it interpolates outwards.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return _shown(self, FIRST_SCALING_FIELDS)


FIRST_SCALING_FIELDS = (
    "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_position",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding: its base, its scaling, and the share of a head it turns."""

    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling()
    fraction: float = 1.0


@dataclasses.dataclass(frozen=True, repr=False)
class Experts:
    """The mixture of experts that takes the place of each layer's MLP.

    Attributes:
      count: E, experts of a layer, each an MLP of width F.
      chosen: C, experts that compute a token.
      renormalized: the shares of a token's chosen experts sum to 1; or else they are
        their probabilities among all experts.
      balance_weight: of the loss that keeps the load of all experts alike, see
        `parts.experts.ExpertLoad`.
    """

    count: int
    chosen: int
    renormalized: bool = True
    balance_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.count:
            raise UserError(
                f"{self.chosen} of {self.count} experts cannot be chosen for a token: "
                "it must be 1 or more, and not more than there are"
            )

    def __repr__(self) -> str:
        return _shown(self, ("count", "chosen"))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a decoder. Field names follow the legend in `attention.py`:
    D embed, F mlp, L layers, N heads, K kv_heads, H head_dim, V vocab.

    Every field with a default is a switch; all switches at their defaults make a
    Llama.

    Attributes:
      family: a name in `families.family_registry.FAMILIES`. It says how the model's
        files are written, and changes nothing in what is computed.
      rope_theta, rope_scaling, rope_fraction: the rotary embedding of all layers but
        those that `window_rope` or `unrotated_layers` exempt.
      window_rope: the rotary embedding of layers with a window; None: as all others.
      unrotated_layers: numbers of layers without a rotary embedding.
      positions: `rope`, or `learned`: a table that is added to the embeddings.
      window: tokens that a query of a layer with a window sees, itself included.
      window_layers: numbers of the layers with a window; all others see all tokens.
      norm: `rms`, or `layer` with a bias.
      norm_shift: is added to the scale of every norm: Gemma's files hold scale - 1.
      norm_at: before each branch (`pre`), behind it (`post`), or `both`.
      parallel_residual: attention and MLP both read the input of the block.
      qk_norm: of queries and keys: `none`, each `head`, or all heads at once (`flat`).
      biases: which matrices have one: `qkv`, `out` (both of attention) and `mlp`, or
        `router` and `experts` in its place.
      activation: `silu`, `gelu`, or its approximation `gelu_tanh`; or `clamped_swiglu`,
        which has the gate in it.
      gated_mlp: the activation of one matrix multiplies the output of another.
      attention_scale: of scores; None: 1 / sqrt(H).
      attention_softcap, logit_softcap: c in c * tanh(x / c), of scores and of logits;
        0: none.
      embedding_scale, residual_scale: multiply the embeddings, and the output of each
        branch.
      logit_divisor: divides the logits.
      attention_sinks: each head has a score that its softmax counts beside those of
        the keys.
      experts: in the place of each MLP; None: none. F is then the width of one.

    Raises:
      UserError: the switches contradict each other.
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
    rope_fraction: float = 1.0
    window_rope: Rope | None = None
    unrotated_layers: tuple[int, ...] = ()
    positions: str = "rope"
    window: int = 0
    window_layers: tuple[int, ...] = ()
    norm: str = "rms"
    norm_shift: float = 0.0
    norm_at: str = "pre"
    parallel_residual: bool = False
    qk_norm: str = "none"
    biases: tuple[str, ...] = ()
    activation: str = "silu"
    gated_mlp: bool = True
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    attention_sinks: bool = False
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} heads cannot share {self.kv_heads} key/value heads: "
                "heads must be a multiple of kv_heads"
            )
        if len({rope.fraction for rope in self.ropes if rope}) > 1:
            raise UserError(
                "the rotary embeddings of all layers must turn equal shares"
            )

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The rotary embedding of each layer; None for a layer without one."""
        if self.positions != "rope":
            return (None,) * self.layers
        every = Rope(self.rope_theta, self.rope_scaling, self.rope_fraction)
        windowed = self.window_rope or every
        ropes = [windowed if window else every for window in self.windows]
        return tuple(
            None if layer in self.unrotated_layers else rope
            for layer, rope in enumerate(ropes)
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """The window of each layer in tokens; 0 for a layer that sees all tokens."""
        return tuple(
            self.window if layer in self.window_layers else 0
            for layer in range(self.layers)
        )

    @property
    def matrices_per_layer(self) -> int:
        """Scalars in a layer's matrices: 2D(N+K)H of attention and 3DF of the MLP.

        An MLP without a gate has 2DF. E experts have E times as many, and DE more.
        """
        return self._matrices(self.experts.count if self.experts else 1)

    @property
    def used_per_layer(self) -> int:
        """As `matrices_per_layer`, without experts that are not a token's own."""
        return self._matrices(self.experts.chosen if self.experts else 1)

    @property
    def experts_per_layer(self) -> int:
        """Scalars in the matrices of all experts of a layer; 0 without experts."""
        others = self._matrices(0)
        return self.matrices_per_layer - others if self.experts else 0

    def _matrices(self, mlps: int) -> int:
        attention = 2 * self.embed * (self.heads + self.kv_heads) * self.head_dim
        router = self.embed * self.experts.count if self.experts else 0
        mlp = (3 if self.gated_mlp else 2) * self.embed * self.mlp
        return attention + router + mlps * mlp

    def seen_share(self, length: int) -> float:
        """Mean share over layers of the (query, key) pairs of a causal row that count.

        1 without windows, and for rows that are not longer than the window.
        """
        outside = max(0, length - self.window)
        missed = outside * (outside + 1) / (length * (length + 1))
        windowed = sum(window > 0 for window in self.windows)
        return 1 - missed * windowed / self.layers

    def describe(self) -> str:
        """All fields as one line, from which fingerprints of runs are made."""
        return _shown(self, FIRST_FIELDS)


FIRST_FIELDS = (
    "vocab", "embed", "mlp", "layers", "heads", "kv_heads", "head_dim", "tied_head",
    "rope_theta", "rope_scaling", "norm_eps", "max_position",
)  # fmt: skip
