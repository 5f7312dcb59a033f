"""The parameters as they serve: in the dtype that the model computes in, each layer's by itself.

Training scans over stacked float32 layers. One token at a time, that would cut out and cast every matrix again for each
token; so this copy is made once, and lives as long as what it serves.

Shapes: E hidden size, V ids of a modality.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lwm_core.vocab import Vocabulary


class Weights(NamedTuple):
    """A pytree of arrays."""

    embed_tokens: jax.Array  # [all ids, E]
    layers: tuple[Any, ...]  # nested dicts
    norm: Any  # nested dict
    heads: dict[str, jax.Array]  # [V, E] of each modality


def serving_weights(parameters: Any, shardings: Any, vocabulary: Vocabulary, dtype: Any) -> Weights:
    """The parameters of a trainer, laid out as they are."""

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if x.ndim > 1 else x  # a norm's weights are float32 in any model

    def made(tree: Any) -> Weights:
        count = jax.tree.leaves(tree["layers"])[0].shape[0]
        layers = tuple(jax.tree.map(lambda x, i=i: cast(x[i]), tree["layers"]) for i in range(count))
        head = tree.get("lm_head", tree["embed_tokens"])
        heads = {name: cast(head[ids]) for name, ids in vocabulary.slices.items()}
        return Weights(cast(tree["embed_tokens"]), layers, tree["norm"], heads)

    def of_layer(sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

    shapes = jax.eval_shape(made, parameters)
    table = shardings["embed_tokens"]
    where = Weights(
        table,
        tuple(jax.tree.map(of_layer, shardings["layers"]) for _ in shapes.layers),
        shardings["norm"],
        {name: _fitted(shardings.get("lm_head", table), head.shape) for name, head in shapes.heads.items()},
    )
    served: Weights = jax.jit(made, out_shardings=where)(parameters)
    return served


def _fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """``sharding`` where its axes divide the rows of a slice too, else with the rows whole."""
    rows, columns = (*sharding.spec, None, None)[:2]
    names = (rows,) if isinstance(rows, str) else rows or ()
    ranks = 1
    for name in names:
        ranks *= sharding.mesh.shape[name]
    return NamedSharding(sharding.mesh, P(rows if shape[0] % ranks == 0 else None, columns))
