"""A spec beside an import that it should not have."""

from __future__ import annotations

import numpy

from lwm_core.registry.spec import PluginSpec

heavy = PluginSpec(
    name="acme-heavy",
    summary=f"loads numpy {numpy.__version__} to be listed",
    factory="acme_numpy.no_such_module:factory",
)
