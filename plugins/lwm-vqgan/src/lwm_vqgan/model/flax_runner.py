"""The VQGAN in Flax with NumPy at its borders. Shapes: B frames [B,H,W,3], codes [B,h,w]."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from lwm_vqgan.model.flax_vqgan import FlaxVqgan, flax_vqgan
from lwm_vqgan.weights.folder import VqganWeights


def _encode(model: FlaxVqgan, frames: jax.Array) -> jax.Array:
    return model.encode(frames.astype(jnp.float32) / 127.5 - 1.0)


def _decode(model: FlaxVqgan, codes: jax.Array) -> jax.Array:
    return jnp.round((model.decode(codes) + 1.0) * 127.5).astype(jnp.uint8)


class FlaxRunner:
    """Runs on JAX's first device; each direction is compiled once for a batch size."""

    def __init__(self, weights: VqganWeights) -> None:
        arrays = {name: weights.parameter(name) for name in weights.parameters}
        self._model = flax_vqgan(weights.config, arrays)
        self._encode, self._decode = nnx.jit(_encode), nnx.jit(_decode)

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """[B,H,W,3] → [B,h,w]."""
        return np.asarray(self._encode(self._model, jnp.asarray(frames)))

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """[B,h,w] → [B,H,W,3]."""
        return np.asarray(self._decode(self._model, jnp.asarray(codes)))
