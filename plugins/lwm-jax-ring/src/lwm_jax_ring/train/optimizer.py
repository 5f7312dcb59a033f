"""AdamW (arXiv 1711.05101) with global-norm clipping on a nested dict of float32 parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwm_core.protocols import OptimizerSpec

Tree = Any


def decayed(parameters: Tree) -> Tree:
    """Which parameters decay: matrices and tables; norms and biases do not."""
    names = ("kernel", "embed_tokens", "lm_head")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, parameters)


def moments(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Adam's direction, before decay and learning rate."""
    return optax.scale_by_adam(b1=spec.beta1, b2=spec.beta2, eps=spec.eps)


def fresh_state(spec: OptimizerSpec, parameters: Tree, mesh: Mesh) -> Tree:
    """Zero moments, each laid out on the mesh as its parameter is; the count of steps is on every device."""
    state = moments(spec).init(jax.tree.map(lambda p: jnp.zeros((), p.dtype), parameters))

    def zeros() -> Tree:
        return jax.tree.map(lambda p: _zeros(p.shape, p.dtype, p.sharding), parameters)

    count = _zeros((), state.count.dtype, NamedSharding(mesh, PartitionSpec()))
    return state._replace(count=count, mu=zeros(), nu=zeros())


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(jnp.zeros(shape, dtype), sharding)
    part = np.zeros(sharding.shard_shape(shape), dtype)
    return jax.make_array_from_callback(shape, sharding, lambda _: part)


def abstract_state(spec: OptimizerSpec, parameters: Tree, mesh: Mesh) -> Tree:
    """Shapes and shardings of :func:`fresh_state`, from those of the parameters."""
    state = jax.eval_shape(moments(spec).init, parameters)
    count = jax.ShapeDtypeStruct((), state.count.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    return state._replace(count=count, mu=parameters, nu=parameters)


def state_shardings(spec: OptimizerSpec, shardings: Tree, mesh: Mesh) -> Tree:
    """Where :func:`fresh_state` lies, from where the parameters lie."""
    state = moments(spec).init(jax.tree.map(lambda _: jnp.zeros(()), shardings))
    return state._replace(count=NamedSharding(mesh, PartitionSpec()), mu=shardings, nu=shardings)


def update(
    spec: OptimizerSpec, parameters: Tree, state: Tree, gradients: Tree, lr: jax.Array
) -> tuple[Tree, Tree, jax.Array]:
    """One step.

    Returns:
        new parameters, new state, and the global gradient norm before clipping.
    """
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, spec.clip_norm / jnp.maximum(norm, 1e-12))
    clipped = jax.tree.map(lambda g: g * scale, gradients)
    direction, state = moments(spec).update(clipped, state, parameters)
    parameters = jax.tree.map(
        lambda p, d, decays: p - lr * (d + spec.weight_decay * p if decays else d),
        parameters, direction, decayed(parameters),
    )  # fmt: skip
    return parameters, state, norm
