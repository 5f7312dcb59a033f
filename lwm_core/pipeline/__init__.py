"""Configuration + registry → everything a run is made of, checked before the first step.

``check_options`` finds the plugins and validates their tables; ``build`` goes on to tokenizer, model and stages;
:class:`Pipeline` makes the trainer, the data source and the suites when they are asked for. ``plug`` and ``make`` are
for one plugin alone, outside of a run.
"""

from __future__ import annotations

from lwm_core.pipeline.build import Pipeline, build
from lwm_core.pipeline.select import Plugged, Selection, check_options
from lwm_core.pipeline.single import make, plug

__all__ = ["Pipeline", "Plugged", "Selection", "build", "check_options", "make", "plug"]
