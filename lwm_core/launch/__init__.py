"""Start files for runs on several hosts, as text: what a launcher that is there already (torchrun, Slurm, JobSet, Ray)
is given. Nothing is started here.
"""

from __future__ import annotations

from lwm_core.launch.fit import check_fit, first_misfit
from lwm_core.launch.plan import DEVICES, Device, Launch, plain

__all__ = ["DEVICES", "Device", "Launch", "check_fit", "first_misfit", "plain"]
