"""The run loop: stages → feed → trainer.step → metrics → hooks, with checkpoints and resumption.

``run`` starts a run in a new folder, ``resume`` continues one, ``reopen`` loads what a run has trained. Where several
processes run together, each of them calls these; ``lead`` asks a model that is dealt to several.
"""

from __future__ import annotations

from lwm_core.run.folder import Run, RunFolder, open_run
from lwm_core.run.leading import Model, lead
from lwm_core.run.reopen import Reopened, reopen
from lwm_core.run.start import Outcome, resume, run
from lwm_core.run.stopping import StoppedError

__all__ = [
    "Model",
    "Outcome",
    "Reopened",
    "Run",
    "RunFolder",
    "StoppedError",
    "lead",
    "open_run",
    "reopen",
    "resume",
    "run",
]
