"""What the verbs share that take or make pictures and video: the files' plugin and the run's encoder.

Shapes: T frames of n codes, or of S × S pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lwm_core.protocols import Media, MediaClip, VisionEncoder
    from lwm_core.run import Reopened

BATCH = 16
"""Frames that are encoded or decoded together."""


def make_media(args: argparse.Namespace) -> Media:
    """What reads and writes files, by the run's lists of plugins; nothing of the model is loaded yet.

    Raises:
        UsageError: it is no run, or one without an encoder.
        PluginError: nothing is installed that does.
    """
    from lwm_core.errors import UsageError
    from lwm_core.pipeline import make, plug
    from lwm_core.registry import Registry
    from lwm_core.run import open_run

    config = open_run(args.folder, args.overrides)[1].config
    if config.encoder is None:
        raise UsageError(f"{args.folder}: its configuration names no [encoder]; name one: -s encoder.name=vqgan")
    registry = Registry.from_environment(config.plugins.allow, config.plugins.deny)
    return cast("Media", make(plug("media", "auto", registry=registry), registry=registry))


def make_encoder(opened: Reopened) -> VisionEncoder:
    """The run's encoder, which :func:`make_media` has seen to be named."""
    encoder = opened.pipeline.make_encoder()
    assert encoder is not None
    return encoder


def encoded(clip: MediaClip, encoder: VisionEncoder) -> NDArray[np.int32]:
    """Codes ``[T,n]`` of a clip; a batch of frames is in memory at a time.

    Raises:
        DataError: the file is damaged.
    """
    import numpy as np

    frames, parts = clip.squares(encoder.frame_size), []
    while batch := list(islice(frames, BATCH)):
        parts.append(encoder.encode(np.stack(batch)))
    return np.concatenate(parts)


def decoded(codes: NDArray[np.int32], encoder: VisionEncoder) -> Iterator[NDArray[np.uint8]]:
    """Frames ``[S,S,3]`` of codes ``[T,n]``, one after the other."""
    for start in range(0, len(codes), BATCH):
        yield from encoder.decode(codes[start : start + BATCH])
