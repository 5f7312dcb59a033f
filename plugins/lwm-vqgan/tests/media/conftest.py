"""Videos made with PyAV, and the ``lwm`` command with a stand-in encoder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lwm_core import registry
from lwm_core.shards import open_shards

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[3]
SITE_POINTS = "[lwm.encoder.v1]\nmosaic = lwm_mosaic._lwm:mosaic\nliar = lwm_mosaic._lwm:liar\n"


def colours(count: int, width: int = 64, height: int = 48, seed: int = 0) -> Iterator[NDArray[np.uint8]]:
    """Frames whose corner squares are known: a smooth picture that moves, another for each seed."""
    y, x = np.mgrid[0:height, 0:width]
    for number in range(count):
        phase = 2 * np.pi * (x / width + number / 40 + seed / 7)
        red, green = 127 + 100 * np.sin(phase), 127 + 100 * np.cos(2 * np.pi * y / height + number / 9)
        blue = np.full_like(red, (number * 37 + seed * 11) % 256)
        yield np.stack([red, green, blue], axis=-1).astype(np.uint8)


def write_video(
    path: Path, frames: Iterable[NDArray[np.uint8]], *, codec: str = "libx264", pixels: str = "yuv420p", rate: Any = 25,
    gop: int = 12, turn: Any = None, times: list[int] | None = None, format: str | None = None,
    container: dict[str, str] | None = None, **options: str,
) -> Path:  # fmt: skip
    """A video by PyAV directly, without the code under test."""
    import av

    with av.open(str(path), "w", format=format, container_options=container) as output:
        stream: Any = None
        for number, frame in enumerate(frames):
            if stream is None:
                stream = output.add_stream(codec, rate=rate, options=options)
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt, stream.gop_size = pixels, gop
                if turn is not None:
                    stream.set_display_rotation(*turn)
            one = av.VideoFrame.from_ndarray(frame, "rgb24")
            one.pts = number if times is None else times[number]
            one.time_base = 1 / Fraction(rate)
            output.mux(stream.encode(one))
        output.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def frames_of() -> Callable[..., list[NDArray[np.uint8]]]:
    """:func:`colours` as a list."""
    return lambda *args, **kwargs: list(colours(*args, **kwargs))


@pytest.fixture(scope="session")
def video() -> Callable[..., Path]:
    """:func:`write_video`."""
    return write_video


@pytest.fixture(scope="session")
def mosaic_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``sys.path`` with the distribution ``lwm-mosaic`` in it."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(HERE / "standin" / "lwm_mosaic", site / "lwm_mosaic", ignore=shutil.ignore_patterns("__pycache__"))
    info = site / "lwm_mosaic-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lwm-mosaic\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(SITE_POINTS)
    return site


class Command:
    """The ``lwm`` command in a folder, with the stand-in encoder beside what is installed."""

    def __init__(self, cwd: Path, site: Path) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("LWM_")}
        path = os.pathsep.join([str(site), str(REPOSITORY), str(REPOSITORY / "plugins" / "lwm-vqgan" / "src")])
        self.cwd = cwd
        self.env = {
            **kept, "PYTHONPATH": path, "LWM_PLUGINS": "lwm-mosaic,lwm-vqgan", "COLUMNS": "100",
            "OPENBLAS_NUM_THREADS": "1",
        }  # fmt: skip

    def arguments(self, *words: object) -> list[str]:
        """What a process is started with."""
        start = "import sys; from lwm_core.cli import main; sys.exit(main())"
        return [sys.executable, "-c", start, *map(str, words)]

    def __call__(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self.arguments(*words), cwd=self.cwd, env=self.env, capture_output=True, text=True, timeout=600, check=False
        )

    def committed(self, out: str) -> int:
        """Frames of a folder of codes that are safe from a kill."""
        folder = self.cwd / out
        return len(open_shards(folder, incomplete=True)) if (folder / "manifest.json").exists() else 0

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start, for tests that end it."""
        return subprocess.Popen(
            self.arguments(*words),
            cwd=self.cwd,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def lwm(tmp_path: Path, mosaic_site: Path) -> Command:
    """The command in processes of its own, in ``tmp_path``."""
    return Command(tmp_path, mosaic_site)


@pytest.fixture
def here(tmp_path: Path, mosaic_site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """The command in this very process, in ``tmp_path``."""
    from lwm_core.cli import main

    monkeypatch.syspath_prepend(str(mosaic_site))
    monkeypatch.setenv("LWM_PLUGINS", "lwm-mosaic,lwm-vqgan")
    monkeypatch.chdir(tmp_path)
    registry.refresh()
    yield lambda *words: main([str(word) for word in words])
    registry.refresh()


@pytest.fixture(scope="session")
def files_in() -> Callable[[Path], dict[str, bytes]]:
    """Name → bytes of what a folder of codes holds; its lock is no content."""
    return lambda folder: {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
