"""What a plugin of each kind gives. The core and the plugins meet in these types and in NumPy arrays, nowhere else.

A plugin's factory is called with its validated options first (its own pydantic model) and a context record second. The
records are frozen; they carry what the plugin may need and nothing else, never the whole configuration.
"""

from __future__ import annotations

from lwm_core.protocols.ahead import Collective, CompiledStep, CompilesAhead
from lwm_core.protocols.attention import (
    Array,
    AttentionAxes,
    AttentionBackend,
    AttentionChoice,
    AttentionFactory,
    AttentionHarness,
)
from lwm_core.protocols.data import DataContext, DataSource, Feed, FeedRequest, HoldsOutClips, TrainsOnCodes
from lwm_core.protocols.encoder import EncoderContext, VisionEncoder
from lwm_core.protocols.evaluation import ChecksSetup, EvalContext, EvalSetup, EvalSuite
from lwm_core.protocols.generation import Generator, SamplingSpec, Scorer, Session
from lwm_core.protocols.media import Media, MediaClip
from lwm_core.protocols.processes import ALONE, Processes, SoleProcess
from lwm_core.protocols.schedule import ContextSchedule, Stage, StartModel
from lwm_core.protocols.tokenizer import Tokenizer, TokenizerContext
from lwm_core.protocols.trainer import Metrics, OptimizerSpec, SaveHandle, Trainer, TrainerContext, TrainerFactory
from lwm_core.protocols.weights import WeightsBundle

__all__ = [
    "AttentionAxes",
    "AttentionBackend",
    "AttentionHarness",
    "AttentionChoice",
    "AttentionFactory",
    "Array",
    "Tokenizer",
    "WeightsBundle",
    "TokenizerContext",
    "VisionEncoder",
    "EncoderContext",
    "Media",
    "MediaClip",
    "Stage",
    "ContextSchedule",
    "StartModel",
    "DataContext",
    "FeedRequest",
    "Feed",
    "DataSource",
    "TrainsOnCodes",
    "HoldsOutClips",
    "OptimizerSpec",
    "TrainerContext",
    "Processes",
    "SoleProcess",
    "ALONE",
    "SaveHandle",
    "Trainer",
    "TrainerFactory",
    "CompilesAhead",
    "CompiledStep",
    "Collective",
    "Metrics",
    "SamplingSpec",
    "Generator",
    "Scorer",
    "Session",
    "EvalSetup",
    "EvalContext",
    "EvalSuite",
    "ChecksSetup",
]
