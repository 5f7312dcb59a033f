"""The encoder ``vqgan``: frames to codes and back, in batches of bounded size.

Shapes: T frames [T,H,W,3] uint8, codes [T, h·w] int32 in rows from the top left; a batch has B frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lwm_core.errors import PluginError, ShapeError
from lwm_core.protocols.encoder import EncoderContext
from lwm_vqgan.options import FRAMEWORKS, VqganOptions, installed
from lwm_vqgan.weights.folder import VqganWeights
from lwm_vqgan.weights.load import read_weights


class Runner(Protocol):
    """A VQGAN in one framework; it is always given B frames."""

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """[B,H,W,3] → [B,h,w]."""
        ...

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """[B,h,w] → [B,H,W,3]."""
        ...


class VqganEncoder:
    """A VQGAN as the core knows encoders (:class:`lwm_core.protocols.VisionEncoder`).

    Args:
        weights: configuration and parameters.
        framework: ``"jax"`` or ``"torch"``; both give the same codes but where two vectors are equally near.
        batch: frames at once. A last batch that is short is filled up with black frames, so that every frame goes
            through the same program whatever stands beside it.
    """

    def __init__(self, weights: VqganWeights, framework: str, batch: int) -> None:
        self.config, self.framework, self.batch = weights.config, framework, batch
        self.codes: int = weights.config.codes
        self.frame_size: int = weights.config.frame_size
        self.codes_per_frame: int = weights.config.codes_per_frame
        self._weights = weights
        self._runner = _runner(weights, framework)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the configuration and of the parameters in float32: the same in either framework."""
        digest = hashlib.sha256(json.dumps(self.config.model_dump(mode="json"), sort_keys=True).encode())
        for name in sorted(self._weights.parameters):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self._weights.parameter(name)).data)
        return digest.hexdigest()

    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """``[T,H,W,3]`` uint8 → ``[T, h·w]`` int32 in ``[0, codes)``.

        Raises:
            ShapeError: the frames are of another size or type.
        """
        side = self.frame_size
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (side, side, 3):
            raise ShapeError(
                f"vqgan: frames are {frames.dtype} {list(frames.shape)}; expected uint8 [T, {side}, {side}, 3]"
            )
        made = np.empty((len(frames), self.codes_per_frame), np.int32)
        self._in_batches(frames, made, lambda part: self._runner.encode(part).reshape(len(part), -1))
        return made

    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """``[T, h·w]`` int32 → ``[T,H,W,3]`` uint8.

        Raises:
            ShapeError: the codes are not whole frames of this codebook.
        """
        if not np.issubdtype(codes.dtype, np.integer) or codes.ndim != 2 or codes.shape[1] != self.codes_per_frame:
            raise ShapeError(
                f"vqgan: codes are {codes.dtype} {list(codes.shape)}; expected int32 [T, {self.codes_per_frame}]"
            )
        if codes.size and (codes.min() < 0 or codes.max() >= self.codes):
            raise ShapeError(f"vqgan: codes run from {codes.min()} to {codes.max()}; expected 0 to {self.codes - 1}")
        side, grid = self.frame_size, self.config.grid
        made = np.empty((len(codes), side, side, 3), np.uint8)
        whole = codes.astype(np.int32, copy=False).reshape(-1, grid, grid)
        self._in_batches(whole, made, self._runner.decode)
        return made

    def _in_batches(self, given: NDArray[Any], made: NDArray[Any], run: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
        for start in range(0, len(given), self.batch):
            part = given[start : start + self.batch]
            count = len(part)
            if count < self.batch:
                part = np.concatenate([part, np.zeros((self.batch - count, *part.shape[1:]), part.dtype)])
            made[start : start + count] = run(part)[:count]


def vqgan(options: VqganOptions, context: EncoderContext = EncoderContext()) -> VqganEncoder:  # noqa: B008 (frozen)
    """The factory of ``lwm.encoder.v1``.

    Raises:
        PluginError: the framework is not installed.
        CheckpointError: the weights are missing, damaged or not a VQGAN's.
    """
    framework = _framework(options, context)
    return VqganEncoder(read_weights(options.weights, context.base_dir), framework, options.batch)


def _framework(options: VqganOptions, context: EncoderContext) -> str:
    named = context.framework if options.framework == "auto" else options.framework
    found = named or next((framework for framework in FRAMEWORKS if installed(framework)), None)
    if found is None or not installed(found):
        missing = found or " or ".join(FRAMEWORKS)
        raise PluginError(f"vqgan: {missing} is not installed: pip install 'lwm-vqgan[{found or FRAMEWORKS[0]}]'")
    return found


def _runner(weights: VqganWeights, framework: str) -> Runner:
    if framework == "jax":
        from lwm_vqgan.model.flax_runner import FlaxRunner

        return FlaxRunner(weights)
    from lwm_vqgan.model.torch_runner import TorchRunner

    return TorchRunner(weights)
