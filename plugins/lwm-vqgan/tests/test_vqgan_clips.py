"""The clip that ships, and its codes: what the shipped VQGAN makes of it.

Shapes: T frames [T,S,S,3] uint8, codes [T,n].
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lwm_vqgan
from lwm_core.packaged import locate
from lwm_core.protocols import EncoderContext
from lwm_core.shards import open_shards
from lwm_vqgan.encoder import vqgan
from lwm_vqgan.media import Sampling, open_clip, preprocess
from lwm_vqgan.options import VqganOptions

CLIPS = Path(lwm_vqgan.__file__).parent / "clips"


def test_configurations_reach_the_clip_by_the_distributions_name() -> None:
    assert locate("lwm-vqgan:clips/bigbuckbunny.mp4", Path("/nowhere")) == CLIPS / "bigbuckbunny.mp4"


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_codes_are_those_of_the_clip(framework: str) -> None:
    encoder = vqgan(VqganOptions(), EncoderContext(framework))
    shards = open_shards(CLIPS / "codes", verify=True)
    assert shards.manifest.settings.checksum == encoder.checksum
    [video] = shards.videos
    assert (video.name, video.frames, video.fps) == ("bigbuckbunny.mp4", 132, 25.0)
    frames = np.stack([preprocess(one.pixels, 64) for one in open_clip(CLIPS / video.name, Sampling()).frames()])
    made, kept = encoder.encode(frames[::6]), shards.codes(0)[::6]
    assert (made == kept).mean() > 0.999  # another machine may round two equally near vectors the other way
