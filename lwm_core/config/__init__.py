"""Configuration: reading TOML with its origins, merging, overriding, and validating by the envelope's models.

Names are loaded on first use: only :func:`load_config` and the models need pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwm_core.config.document import Document as Document
    from lwm_core.config.document import KeyPath as KeyPath
    from lwm_core.config.document import Origin as Origin
    from lwm_core.config.document import Origins as Origins
    from lwm_core.config.document import dotted as dotted
    from lwm_core.config.dump import dump_toml as dump_toml
    from lwm_core.config.envelope import PluginTable as PluginTable
    from lwm_core.config.envelope import RunConfig as RunConfig
    from lwm_core.config.envelope import StageTable as StageTable
    from lwm_core.config.load import LoadedConfig as LoadedConfig
    from lwm_core.config.load import load_config as load_config
    from lwm_core.config.problems import problems_from as problems_from
    from lwm_core.config.read import read_source as read_source
    from lwm_core.config.read import recipe_names as recipe_names

_HOMES = {
    "Document": "document",
    "KeyPath": "document",
    "LoadedConfig": "load",
    "Origin": "document",
    "Origins": "document",
    "PluginTable": "envelope",
    "RunConfig": "envelope",
    "StageTable": "envelope",
    "dotted": "document",
    "dump_toml": "dump",
    "load_config": "load",
    "problems_from": "problems",
    "read_source": "read",
    "recipe_names": "read",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
