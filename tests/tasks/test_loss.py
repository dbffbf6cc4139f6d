"""The chunked loss is the plain loss, at a fraction of its memory and work."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, in_soak

from research.tasks.token_loss_and_metrics import (
    chunked_token_values,
    cross_entropies,
    weighted_loss,
)
from research.weights.contraction import contract, materialize, transpose
from research.weights.representations.low_rank import LowRank

B, T, D, V = 8, 24, 40, 96
RNG = np.random.default_rng(0)
HIDDEN = jnp.float32(RNG.normal(size=(B, T, D)))
HEAD = jnp.float32(0.3 * RNG.normal(size=(D, V)))
TARGETS = jnp.int32(RNG.integers(0, V, (B, T)))
GROUPS = jnp.int32(RNG.integers(0, 3, (B, T)))

WEIGHTS = {
    "none": np.zeros((B, T)),
    "all": np.ones((B, T)),
    "some": RNG.integers(0, 2, (B, T)),
    "fractions": RNG.uniform(0, 1, (B, T)) * RNG.integers(0, 2, (B, T)),
    # Chunks are counted by the fullest shard: the others run past their ends.
    "one row": np.arange(B)[:, None] * np.ones(T) == 5,
    "one token": np.arange(B * T).reshape(B, T) == 77,
}


def logits_of(head, hidden):
    """As `Model.logits` has it."""
    return contract(hidden, head, dtype=jnp.float32)


def plain_loss(hidden, head, weights, z_loss=0.0):
    logits = hidden @ materialize(head)
    picked = jnp.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
    normalizer = jax.nn.logsumexp(logits, -1)
    return jnp.sum(weights * (normalizer - picked + z_loss * normalizer**2))


def both_losses(hidden, head, weights, chunk=16, shards=(1, 1), z_loss=0.0):
    return weighted_loss(
        logits_of,
        head,
        hidden,
        TARGETS,
        weights,
        GROUPS,
        n_groups=4,
        chunk=chunk,
        shards=shards,
        z_loss=z_loss,
    )


def chunked_loss(hidden, head, weights, chunk=16, shards=(1, 1), z_loss=0.0):
    return both_losses(hidden, head, weights, chunk, shards, z_loss)[0]


plain_gradients = jax.jit(jax.value_and_grad(plain_loss, (0, 1)))
chunked_gradients = jax.jit(
    jax.value_and_grad(chunked_loss, (0, 1)), static_argnames=("chunk", "shards")
)


@pytest.mark.parametrize(
    "chunk, shards",
    [
        in_soak(1, (1, 1)),
        (7, (1, 1)),
        in_soak(16, (2, 1)),
        in_soak(10, (8, 1)),
        (1000, (4, 1)),
        (10, (2, 4)),
        in_soak(3, (1, 8)),
    ],
    ids=str,
)
def test_loss_and_gradients_equal_the_plain_ones(chunk, shards):
    for name, values in WEIGHTS.items():
        weights = jnp.float32(values)
        found = chunked_gradients(HIDDEN, HEAD, weights, chunk=chunk, shards=shards)
        close(found, plain_gradients(HIDDEN, HEAD, weights))
        assert (float(found[0]) > 0) == (name != "none")


def is_hit(logits, targets):
    """As docs/extending.md has it."""
    return (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)


@pytest.mark.parametrize("shards", [(1, 1), (2, 2)])
def test_a_metric_of_logits_is_the_plain_one(shards):
    weights = jnp.float32(WEIGHTS["some"])
    likeliest = jnp.argmax(HIDDEN @ HEAD, axis=-1)
    # Some targets are hit, as those of a trained model are.
    targets = jnp.where(jnp.arange(T) % 3 == 0, likeliest, TARGETS)
    hits = chunked_token_values(
        is_hit, logits_of, HEAD, HIDDEN, targets, weights, chunk=7, shards=shards
    )
    expected = (likeliest == targets) & (weights > 0)
    assert (hits == expected).all() and 0 < hits.sum() < weights.sum()


@functools.partial(jax.jit, static_argnames="z_loss")
def losses_by_group(hidden, head, weights, z_loss):
    """The objective, and the cross entropy by group: chunked and plain."""
    total, by_group = both_losses(hidden, head, weights, 10, (4, 2), z_loss)
    plain = [plain_loss(hidden, head, weights * (g == GROUPS)) for g in range(4)]
    return total, by_group, jnp.stack(plain)


@pytest.mark.parametrize("z_loss", [in_soak(0.0), 0.1])
def test_groups_split_the_cross_entropy_and_leave_z_loss_out(z_loss):
    for name, values in WEIGHTS.items():
        weights = jnp.float32(values)
        total, by_group, expected = losses_by_group(HIDDEN, HEAD, weights, z_loss)
        close(by_group, expected)
        assert z_loss == 0.0 or (float(total) > float(by_group.sum())) == (
            name != "none"
        )


def test_z_loss_and_its_gradient_are_the_plain_ones():
    weights = jnp.float32(WEIGHTS["fractions"])
    found, expected = (
        jax.jit(
            jax.value_and_grad(
                lambda h, w, f=loss: f(h, w, weights, z_loss=0.1), (0, 1)
            )
        )(HIDDEN, HEAD)
        for loss in (chunked_loss, plain_loss)
    )
    close(found, expected)


def test_gradients_follow_what_the_loss_is_multiplied_by():
    weights = jnp.float32(WEIGHTS["some"])
    slope = jax.jit(jax.grad(lambda h: 3.0 * chunked_loss(h, HEAD, weights)))(HIDDEN)
    close(slope, 3.0 * plain_gradients(HIDDEN, HEAD, weights)[1][0])


def test_a_tied_head_gets_both_parts_of_its_gradient():
    """Where the table makes the hidden states too, both uses add up."""
    weights = jnp.float32(WEIGHTS["some"])
    ids = jnp.int32(RNG.integers(0, V, (B, T)))

    def tied(loss):
        gradient = jax.grad(lambda table: loss(table[ids], transpose(table), weights))
        return jax.jit(gradient)

    close(tied(chunked_loss)(HEAD.T), tied(plain_loss)(HEAD.T))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora_on_the_head_gets_the_gradient_of_its_factors(tied):
    weights = jnp.float32(WEIGHTS["some"])
    inputs, outputs = (V, D) if tied else (D, V)
    factors = {
        "a": jnp.float32(0.3 * RNG.normal(size=(inputs, 4))),
        "b": jnp.float32(0.3 * RNG.normal(size=(4, outputs))),
    }

    def with_factors(loss):
        def of(factors):
            base = HEAD.T if tied else HEAD
            head = LowRank(base, **factors, scale=jnp.float32(2.0))
            return loss(HIDDEN, transpose(head) if tied else head, weights)

        return jax.jit(jax.value_and_grad(of))

    close(with_factors(chunked_loss)(factors), with_factors(plain_loss)(factors))


def test_token_losses_are_plain_where_weighted_and_zero_elsewhere():
    weights = jnp.float32(WEIGHTS["fractions"])
    logits = np.array(HIDDEN @ HEAD)
    picked = np.take_along_axis(logits, np.array(TARGETS)[..., None], -1)[..., 0]
    plain = np.log(np.exp(logits).sum(-1)) - picked
    losses = functools.partial(
        chunked_token_values, cross_entropies, logits_of, chunk=10
    )
    for shards in ((1, 1), (4, 1), (2, 3)):
        found = jax.jit(functools.partial(losses, shards=shards))(
            HEAD, HIDDEN, TARGETS, weights
        )
        close(found, plain * (WEIGHTS["fractions"] != 0))


def test_bfloat16_is_summed_in_float32():
    """A sum of 192 losses of about 5 in bfloat16 would be off by several."""
    weights = jnp.float32(WEIGHTS["all"])
    hidden, head = HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    total, slopes = chunked_gradients(hidden, head, weights, chunk=10, shards=(1, 1))
    assert total.dtype == jnp.float32
    assert [slope.dtype for slope in slopes] == [jnp.bfloat16, jnp.bfloat16]
    exact = plain_loss(HIDDEN, HEAD, weights)
    assert abs(float(total - exact)) < 2e-3 * float(exact)


def shapes_in(function, *arguments):
    """Every array shape in the program as it goes to the compiler."""
    text = jax.jit(function).lower(*arguments).as_text()
    found = re.findall(r"tensor<((?:\d+x)+)[a-z]", text)
    return {tuple(map(int, dims.split("x")[:-1])) for dims in found}


def rows_of_logits(shapes):
    """Most positions that some array holds vocabulary scores of."""
    scores = [s for s in shapes if s[-1] == V and s != (D, V)]
    return max((int(np.prod(shape[:-1])) for shape in scores), default=0)


def test_logits_of_the_whole_batch_never_exist():
    weights = jnp.float32(WEIGHTS["all"])
    for shards in ((1, 1), (2, 2)):

        def slopes(hidden, head, weights, shards=shards):
            def loss(hidden, head):
                return chunked_loss(hidden, head, weights, 3, shards)

            return jax.grad(loss, (0, 1))(hidden, head)

        shapes = shapes_in(slopes, HIDDEN, HEAD, weights)
        assert rows_of_logits(shapes) == 3 * shards[0] * shards[1]
    whole = shapes_in(jax.grad(plain_loss, (0, 1)), HIDDEN, HEAD, weights)
    assert rows_of_logits(whole) == B * T, "this test can see logits"


def head_products(function, *arguments):
    """How many matrix products give an array of the head's size.

    In the traced program: what is formed only to be thrown away counts as well.
    """
    text = str(jax.make_jaxpr(function)(*arguments))
    return len(re.findall(rf":f32\[(?:{D},{V}|{V},{D})\] = dot_general", text))


def test_gradient_of_a_frozen_head_is_not_formed():
    weights = jnp.float32(WEIGHTS["some"])
    frozen = jax.grad(lambda hidden: chunked_loss(hidden, HEAD, weights))
    assert head_products(frozen, HIDDEN) == 0
    trained = jax.grad(lambda head: chunked_loss(HIDDEN, head, weights))
    assert head_products(trained, HEAD) == 1, "this test can see the product"

    def adapted(factors):
        return chunked_loss(HIDDEN, LowRank(HEAD, *factors, jnp.ones(())), weights)

    factors = (jnp.ones((D, 4)), jnp.ones((4, V)))
    assert head_products(jax.grad(adapted), factors) == 0


def test_each_chunk_drops_other_inputs_of_an_adapted_head():
    """Equal positions have equal losses unless they lose other inputs."""
    rng = np.random.default_rng(2)
    head = LowRank(
        HEAD,
        jnp.float32(rng.normal(size=(D, 4))),
        jnp.float32(rng.normal(size=(4, V))),
        scale=jnp.float32(1.0),
        key=jax.random.key(0),
        rate=jnp.float32(0.5),
    )
    hidden = jnp.broadcast_to(HIDDEN[:1, :1], HIDDEN.shape)
    same, ones = jnp.zeros_like(TARGETS), jnp.ones((B, T))

    @jax.jit
    def by_chunk(head):
        found = chunked_token_values(
            cross_entropies, logits_of, head, hidden, same, ones, chunk=16
        )
        return found.reshape(-1, 16)

    def losses(head):
        return np.asarray(by_chunk(head))

    dropped = losses(head)
    assert len(np.unique(dropped, axis=0)) == len(dropped) == B * T // 16
    plain = losses(dataclasses.replace(head, key=None, rate=None))
    assert len(np.unique(plain.round(4))) == 1
    # The gradient is that of the very same draws.
    loss = functools.partial(chunked_loss, head=head, weights=ones)
    value, _ = jax.jit(jax.value_and_grad(loss))(hidden)
    close(value, jax.jit(loss)(hidden))
