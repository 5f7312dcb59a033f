"""Paths that a configuration names: from a folder, or inside the package of an installed distribution."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from lwm_core.errors import DataError

# Two characters at least, so that a Windows drive (``C:\corpus.txt``) is a path.
_PACKAGED = re.compile(r"(?P<dist>[A-Za-z0-9][A-Za-z0-9._-]+):(?P<path>[^\\/].*)")


def locate(name: str, base_dir: Path) -> Path:
    """The path meant by ``name``, from ``base_dir``, or by ``DIST:PATH`` inside a package; it need not be there.

    The package is found by the name of its distribution (``lwm-data`` → ``lwm_data``) and never imported.

    Raises:
        DataError: there is no such package.
    """
    packaged = _PACKAGED.fullmatch(name)
    if packaged is None:
        return base_dir / Path(name).expanduser()
    spec = find_spec(re.sub(r"[.-]", "_", packaged["dist"]))
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"{name}: {packaged['dist']} is not installed: pip install {packaged['dist']}")
    return Path(spec.submodule_search_locations[0]) / packaged["path"]
