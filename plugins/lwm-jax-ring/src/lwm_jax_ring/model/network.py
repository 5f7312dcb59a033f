"""The model without its arrays: its graph, the shapes of its parameters, and where each of them lies on a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from flax import nnx, traverse_util
from jax.sharding import Mesh

from lwm_core.model import ModelConfig
from lwm_jax_ring.model.llama import Block, Llama
from lwm_jax_ring.model.sharding import parameter_sharding

Tree = Any
"""A nested dict of arrays, or of what describes them."""


@dataclass(frozen=True)
class Network:
    """A model of ``config`` whose parameters, where they are drawn, come from ``seed``; nothing is allocated here."""

    config: ModelConfig
    seed: int

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        parts: tuple[Any, Any] = nnx.split(nnx.eval_shape(self._made))
        return parts

    def _made(self) -> Llama:
        return Llama(self.config, nnx.Rngs(params=self.seed))

    @property
    def shapes(self) -> Tree:
        """Shape and dtype of every parameter."""
        return nnx.to_pure_dict(self._parts[1])

    def initial(self) -> Tree:
        """Fresh parameters; meant to be called inside jit."""
        return nnx.to_pure_dict(nnx.state(self._made()))

    def merge(self, parameters: Tree) -> Llama:
        """The network over ``parameters``; cheap, and meant to be called inside jit."""
        return _merged(self._parts, parameters)

    @cached_property
    def _block_parts(self) -> tuple[Any, Any]:
        parts: tuple[Any, Any] = nnx.split(nnx.eval_shape(lambda: Block(self.config, nnx.Rngs(params=self.seed))))
        return parts

    def block(self, parameters: Tree) -> Block:
        """One layer over its ``parameters``, without the axis of layers; cheap, and meant to be called inside jit."""
        return _merged(self._block_parts, parameters)

    def shardings(self, mesh: Mesh, over: Sequence[str]) -> Tree:
        """Where every parameter lies; ``over`` are the axes that share them out beside ``tp``."""
        flat = traverse_util.flatten_dict(self.shapes)
        return traverse_util.unflatten_dict(
            {path: parameter_sharding(path, leaf.shape, mesh, tuple(over)) for path, leaf in flat.items()}
        )


def _merged(parts: tuple[Any, Any], parameters: Tree) -> Any:
    graph, abstract = parts
    state = jax.tree.map(lambda x: x, abstract)
    nnx.replace_by_pure_dict(state, parameters)
    return nnx.merge(graph, state)
