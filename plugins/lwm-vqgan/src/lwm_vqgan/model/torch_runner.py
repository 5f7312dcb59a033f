"""The VQGAN in Torch with NumPy at its borders. Shapes: B frames [B,H,W,3], codes [B,h,w]."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lwm_vqgan.model.torch_vqgan import TorchVqgan
from lwm_vqgan.weights.folder import VqganWeights


def torch_vqgan(weights: VqganWeights) -> TorchVqgan:
    """The model with ``weights``, in float32 on the CPU."""
    with torch.device("meta"):
        model = TorchVqgan(weights.config)
    # A copy each: what a file is mapped to cannot be written, and Torch would warn.
    tensors = {name: torch.from_numpy(weights.parameter(name).copy()) for name in weights.parameters}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class TorchRunner:
    """Runs on the first GPU where there is one, else on the CPU."""

    def __init__(self, weights: VqganWeights) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = torch_vqgan(weights).to(self._device)

    @torch.inference_mode()
    def encode(self, frames: NDArray[np.uint8]) -> NDArray[np.int32]:
        """[B,H,W,3] → [B,h,w]."""
        pixels = torch.from_numpy(np.ascontiguousarray(frames)).to(self._device).permute(0, 3, 1, 2)
        codes = self._model.encode(pixels.to(torch.float32).div(127.5).sub(1.0).contiguous())
        return codes.to(torch.int32).cpu().numpy()

    @torch.inference_mode()
    def decode(self, codes: NDArray[np.int32]) -> NDArray[np.uint8]:
        """[B,h,w] → [B,H,W,3]."""
        pixels = self._model.decode(torch.from_numpy(np.ascontiguousarray(codes)).to(self._device))
        frames = pixels.add(1.0).mul(127.5).round().to(torch.uint8)
        return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()
