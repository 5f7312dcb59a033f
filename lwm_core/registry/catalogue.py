"""Names that are known to exist, and the distribution that brings each: so that a missing one says what to install."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

#: (kind, name) → distribution, for the plugins of this project that are not part of ``lwm-core``.
KNOWN: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("attention", "jax-ring"): "lwm-jax-ring",
        ("attention", "torch-ring"): "lwm-torch-ring",
        ("trainer", "jax"): "lwm-jax-ring",
        ("trainer", "torch"): "lwm-torch-ring",
        ("tokenizer", "hf"): "lwm-hf",
        ("context", "progressive"): "lwm-context",
        ("data", "mix"): "lwm-data",
        ("eval", "needle"): "lwm-evals",
        ("eval", "reconstruction"): "lwm-evals",
        ("eval", "video-continuation"): "lwm-evals",
        ("eval", "video-loss"): "lwm-evals",
        ("eval", "video-needle"): "lwm-evals",
        ("encoder", "vqgan"): "lwm-vqgan",
        ("media", "files"): "lwm-vqgan",
        ("weights", "tiny-base"): "lwm-tiny-base",
        ("hooks", "report"): "lwm-evals",
        ("hooks", "tensorboard"): "lwm-tensorboard",
    }
)


def known_names(kind: str) -> dict[str, str]:
    """Name → distribution of the known plugins of one kind."""
    return {name: dist for (of_kind, name), dist in KNOWN.items() if of_kind == kind}


def near_miss(word: str, words: Iterable[str]) -> str | None:
    """The word of ``words`` that ``word`` was most likely meant to be, if any comes near."""
    from difflib import get_close_matches

    found = get_close_matches(word, sorted(set(words)), n=1, cutoff=0.6)
    return found[0] if found else None
