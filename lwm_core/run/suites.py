"""A run's suites with what they are told beside the model, checked before the first step; the encoder is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from lwm_core.errors import UsageError
from lwm_core.pipeline import Pipeline
from lwm_core.protocols import (
    ChecksSetup,
    DataSource,
    EvalContext,
    EvalSetup,
    EvalSuite,
    HoldsOutClips,
    Processes,
    TrainsOnCodes,
    VisionEncoder,
)
from lwm_core.run.leading import Model
from lwm_core.shards import Settings


class Suites:
    """The evaluation suites of a run, by name.

    Suites run on rank 0 alone, and an encoder takes and gives NumPy: it is made there, by the first that needs it, and
    on no other rank.

    Args:
        pipeline: the run's parts.
        data: its data source.
        only: of its suites only this one.

    Raises:
        UsageError: it has no suite ``only``.
    """

    def __init__(self, pipeline: Pipeline, data: DataSource, only: str | None = None) -> None:
        self._pipeline = pipeline
        self._data = data
        self._plugged = pipeline.suites_plugged()
        self._suites = pipeline.make_suites()
        if only is not None:
            if only not in self._suites:
                raise UsageError(f"lwm eval: there is no suite {only!r}; expected one of {', '.join(self._suites)}")
            self._suites = {only: self._suites[only]}
        self._encoder: VisionEncoder | None = None

    def __len__(self) -> int:
        return len(self._suites)

    @property
    def by_name(self) -> Mapping[str, EvalSuite]:
        """The suites."""
        return self._suites

    def encoder(self) -> VisionEncoder | None:
        """The run's encoder, the same one each time; none where none is named.

        Raises:
            ConfigError: the model has no ids for its codes, or codes that are trained on are another encoder's.
        """
        if self._encoder is None:
            self._encoder = self._pipeline.make_encoder()
            if self._encoder is not None:
                self._pipeline.check_codes(self._encoder, self.trained_codes)
        return self._encoder

    @cached_property
    def trained_codes(self) -> Mapping[str, Settings]:
        """Data source → how the codes that it trains on were made, where the data plugin tells."""
        return dict(self._data.code_settings()) if isinstance(self._data, TrainsOnCodes) else {}

    def check(self, processes: Processes, *, training: bool) -> None:
        """Refuse, on rank 0, what could not be evaluated later on; nothing is asked of a model.

        Args:
            processes: of the run.
            training: whether a step is to follow: codes that are trained on are then held against the encoder even if
                no suite needs it.

        Raises:
            LwmError: as a suite or the encoder says, with the place in the configuration.
        """
        if processes.rank > 0:
            return
        if training and self.trained_codes:
            self.encoder()
        for name, suite in self._suites.items():
            setup = self._setup(name)
            if isinstance(suite, ChecksSetup):
                with self._pipeline.placed(self._plugged[name]):
                    suite.check(setup)

    def context(
        self, name: str, model: Model, stage: str, out: Path, progress: Callable[[int, int], None]
    ) -> EvalContext:
        """What the suite ``name`` sees of a stage's model; its files begin with ``out``."""
        setup = self._setup(name)
        told: dict[str, Any] = {one.name: getattr(setup, one.name) for one in fields(EvalSetup)}
        return EvalContext(
            **told, generator=model.generator(), scorer=model.scorer(), stage=stage, out=out, progress=progress
        )

    def _setup(self, name: str) -> EvalSetup:
        pipeline = self._pipeline
        return EvalSetup(
            tokenizer=pipeline.tokenizer,
            vocabulary=pipeline.model.vocabulary,
            stages=pipeline.stages,
            seed=pipeline.loaded.config.seed,
            encoder=self.encoder() if self._plugged[name].needs_encoder else None,
            trained_codes=self.trained_codes,
            held_out=self._data.held_out,
            held_out_clips=self._data.held_out_clips() if isinstance(self._data, HoldsOutClips) else {},
            base_dir=pipeline.base_dir,
            start_seq_len=pipeline.start.seq_len,
        )
