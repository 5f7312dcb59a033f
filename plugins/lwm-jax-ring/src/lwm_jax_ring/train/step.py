"""The pure functions that a trainer compiles: the loss of a step, and the step.

Shapes: A micro-batches, B rows of one, S sequence; M modalities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.attention import AttentionMask
from lwm_core.protocols import OptimizerSpec
from lwm_core.vocab import Vocabulary
from lwm_jax_ring.model.llama import Chunks, Compute, Llama
from lwm_jax_ring.model.loss import modality_sums, modality_weights
from lwm_jax_ring.model.rope import RopeTables
from lwm_jax_ring.train.optimizer import update

MASK = AttentionMask("causal")
"""What a token of a language model sees."""

Arrays = dict[str, jax.Array]
"""tokens, targets, segment_ids, positions, loss_weights; each ``[B,S]`` or ``[A,B,S]``."""


@dataclass(frozen=True)
class Program:
    """All that is static about a stage's step."""

    merge: Callable[[Any], Llama]
    attend: Callable[..., jax.Array]
    vocabulary: Vocabulary
    alphas: Mapping[str, float]
    optimizer: OptimizerSpec
    rope: RopeTables
    compute: Compute
    loss_chunks: Chunks
    lay_head: Callable[[jax.Array], jax.Array]

    def sums(self, parameters: Any, batch: Arrays, modalities: tuple[str, ...]) -> jax.Array:
        """``[M]``: Σ w·ce of each modality over one micro-batch ``[B,S]``."""
        model = self.merge(parameters)

        def attend(q, k, v, given):  # type: ignore[no-untyped-def]
            return self.attend(q, k, v, MASK, batch["segment_ids"]), None

        hidden, _ = model.hidden(batch["tokens"], batch["positions"], self.rope, attend, how=self.compute)
        return modality_sums(
            hidden, model.head, batch["targets"], batch["loss_weights"], self.vocabulary, modalities, self.loss_chunks,
            self.lay_head,
        )  # fmt: skip

    def means(self, sums: jax.Array, weights: jax.Array, modalities: tuple[str, ...]) -> tuple[jax.Array, Arrays]:
        """The loss, and each modality's mean cross-entropy; a modality without targets gives 0."""
        means = jnp.where(weights > 0, sums / jnp.where(weights > 0, weights, 1.0), 0.0)
        alphas = jnp.asarray([self.alphas.get(name, 1.0) for name in modalities], jnp.float32)
        return (alphas * means).sum(), {f"loss_{name}": means[i] for i, name in enumerate(modalities)}

    def weights(self, batch: Arrays, modalities: tuple[str, ...]) -> jax.Array:
        """``[M]``: Σ w of each modality over the whole step."""
        return modality_weights(batch["targets"], batch["loss_weights"], self.vocabulary, modalities)

    def gradients(self, parameters: Any, batch: Arrays, modalities: tuple[str, ...]) -> tuple[Any, jax.Array, Arrays]:
        """Gradients of the loss of a step ``[A,B,S]``, the loss, and the modalities' means.

        The denominators are the whole step's, so that A micro-batches equal one large batch.
        """
        weights = self.weights(batch, modalities)

        def micro_loss(parameters: Any, micro: Arrays) -> tuple[jax.Array, jax.Array]:
            sums = self.sums(parameters, micro, modalities)
            return self.means(sums, weights, modalities)[0], sums

        def accumulate(carry: Any, micro: Arrays) -> tuple[Any, None]:
            grads, sums = carry
            (_, micro_sums), micro_grads = jax.value_and_grad(micro_loss, has_aux=True)(parameters, micro)
            return (jax.tree.map(jnp.add, grads, micro_grads), sums + micro_sums), None

        if batch["tokens"].shape[0] == 1:
            only = jax.tree.map(lambda x: x[0], batch)
            (_, sums), grads = jax.value_and_grad(micro_loss, has_aux=True)(parameters, only)
        else:
            start = (jax.tree.map(jnp.zeros_like, parameters), jnp.zeros(len(modalities), jnp.float32))
            (grads, sums), _ = lax.scan(accumulate, start, batch)
        loss, metrics = self.means(sums, weights, modalities)
        return grads, loss, metrics

    def step(
        self, parameters: Any, state: Any, batch: Arrays, lr: jax.Array, modalities: tuple[str, ...]
    ) -> tuple[Any, Any, Arrays]:
        """One optimizer step on ``[A,B,S]``."""
        grads, loss, metrics = self.gradients(parameters, batch, modalities)
        parameters, state, norm = update(self.optimizer, parameters, state, grads, lr)
        return parameters, state, {"loss": loss, "grad_norm": norm, **metrics}

    def evaluate(self, parameters: Any, batch: Arrays, modalities: tuple[str, ...]) -> Arrays:
        """The same losses for ``[B,S]``."""
        loss, metrics = self.means(
            self.sums(parameters, batch, modalities), self.weights(batch, modalities), modalities
        )
        return {"loss": loss, **metrics}
