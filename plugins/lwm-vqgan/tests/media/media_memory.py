"""Encodes a video and writes down, at each of its minutes, how much memory the process has: run by its tests."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from lwm_core.shards import Settings
from lwm_vqgan.media import find_sources
from lwm_vqgan.progress import EncodeProgress
from lwm_vqgan.shards import EncodeJob, encode_sources


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Recorder(EncodeProgress):
    """Takes the memory whenever a minute of the video is through."""

    def __init__(self, frames_a_minute: int) -> None:
        super().__init__()
        self.minutes: list[int] = []
        self._frames = frames_a_minute

    def show(self) -> None:
        super().show()
        while self.done >= self._frames * (len(self.minutes) + 1):
            self.minutes.append(resident())


def main(path: str, out: str, rate: str) -> None:
    from lwm_mosaic.encoder import Mosaic, MosaicOptions

    encoder = Mosaic(MosaicOptions())
    settings = Settings("mosaic", encoder.checksum, {}, encoder.codes, encoder.frame_size, None, None, 16, 4096)
    Path(out).mkdir()
    progress = Recorder(60 * int(rate))
    job = EncodeJob(find_sources(Path(path)), Path(out), encoder, settings, commit_seconds=1.0)
    began = time.perf_counter()
    writer = encode_sources(job, progress, lambda: None)
    seconds = time.perf_counter() - began
    print(json.dumps({"minutes": progress.minutes, "frames": writer.frames, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
