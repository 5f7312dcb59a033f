"""The loss in slices of the sequence: no array of B·S·V logits is ever made.

Loss = Σ over modalities m of α_m · (Σ w·ce over targets of m ÷ Σ w over targets of m); the softmax runs over the slice
of the target's modality only, which equals LWM's two heads.

Shapes: B batch, S sequence, E hidden size, V ids of a modality; N slices of c tokens a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lwm_core.vocab import Vocabulary
from lwm_jax_ring.model.llama import Chunks


def modality_weights(
    targets: jax.Array, weights: jax.Array, vocabulary: Vocabulary, modalities: Sequence[str]
) -> jax.Array:
    """``[len(modalities)]``: Σ w over the targets of each modality."""
    sums = []
    for name in modalities:
        ids = vocabulary.slices[name]
        sums.append(jnp.where((targets >= ids.start) & (targets < ids.stop), weights, 0.0).sum())
    return jnp.stack(sums)


def modality_sums(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    vocabulary: Vocabulary,
    modalities: Sequence[str],
    chunks: Chunks,
    lay_out: Callable[[jax.Array], jax.Array] = lambda rows: rows,
) -> jax.Array:
    """``[len(modalities)]`` float32: Σ w·ce over the targets of each modality.

    Args:
        hidden: ``[B,S,E]``; head: ``[V,E]``; targets: ``[B,S]`` int32; weights: ``[B,S]`` float32.
        lay_out: states on which devices the rows of a modality's head lie.
    """
    # Cut and laid out here and not in every slice of tokens: that would send rows whose parts do not begin where the
    # whole head's do, and for each modality a gradient as large as all of the head.
    heads = [lay_out(head[vocabulary.slices[name]]) for name in modalities]

    @jax.checkpoint
    def part_sums(part_hidden: jax.Array, part_targets: jax.Array, part_weights: jax.Array) -> jax.Array:
        sums = []
        for name, rows in zip(modalities, heads, strict=True):
            ids = vocabulary.slices[name]
            rows = rows.astype(part_hidden.dtype)
            logits = jnp.einsum("...e,ve->...v", part_hidden, rows, preferred_element_type=jnp.float32)
            local = jnp.clip(part_targets - ids.start, 0, ids.stop - ids.start - 1)
            chosen = jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0]
            mine = (part_targets >= ids.start) & (part_targets < ids.stop)
            ce = jax.nn.logsumexp(logits, axis=-1) - chosen
            sums.append(jnp.where(mine, part_weights * ce, 0.0).sum())
        return jnp.stack(sums)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + part_sums(*part), None

    parts = (chunks.split(hidden), chunks.split(targets), chunks.split(weights))
    return lax.scan(add, jnp.zeros(len(modalities), jnp.float32), parts)[0]
