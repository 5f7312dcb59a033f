"""The data plugin ``mix``: opens sources, and feeds a data rank's batches through grain.

grain does workers and prefetching over random access alone, so that neither their number nor a restart changes the
stream (its packers work on iterators, where both would).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import grain
from absl import flags

from lwm_core.batch import PackedBatch
from lwm_core.errors import ConfigError, DataError, LwmError, ShapeError
from lwm_core.needles import sentence_ends
from lwm_core.protocols import DataContext, FeedRequest
from lwm_core.shards import Settings
from lwm_data.clips import check_held_out, check_one_encoder, clip_examples, held_out_clips, open_codes
from lwm_data.corpus import Corpus, Texts, encode_corpus, files_of, read_texts
from lwm_data.lines import LineCorpus, LineReader, line_files
from lwm_data.options import JsonlOptions, MixOptions, TextOptions, VisionOptions, check_mix
from lwm_data.rows import FIELDS, RankRows, Row, StageRows
from lwm_data.sources.base import Source
from lwm_data.sources.copy import PairsSource, RepeatSource
from lwm_data.sources.jsonl import JsonlSource
from lwm_data.sources.needle import NeedleSource
from lwm_data.sources.text import TextSource
from lwm_data.sources.vision import ClipCorpus, VisionSource


class MixFeed:
    """Batches of one data rank of one stage, by step."""

    def __init__(self, rows: RankRows, rows_per_batch: int, workers: int, prefetch: int) -> None:
        self._batches = grain.MapDataset.source(rows).batch(rows_per_batch)
        self._workers, self._prefetch = workers, prefetch
        self._ahead: Iterator[Row] | None = None
        self._next = -1

    def batch(self, step: int) -> PackedBatch:
        """Rows ``[rows/world, seq_len]`` of ``step``, from 0 on, in any order; steps in order are built ahead."""
        if step < 0:
            raise DataError(f"data mix: step {step} was asked for; steps count from 0")
        if step == self._next and (self._prefetch or self._workers):
            if self._ahead is None:
                self._ahead = self._start(step)
            arrays = self._take()
        else:
            self.close()
            arrays = self._batches[step]
        self._next = step + 1
        return PackedBatch(*(arrays[field] for field in FIELDS))

    def close(self) -> None:
        """End the workers; the feed can still be used, and starts them again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()  # type: ignore[attr-defined]

    def _start(self, step: int) -> Iterator[Row]:
        threads = grain.ReadOptions(num_threads=1 if self._prefetch else 0, prefetch_buffer_size=self._prefetch)
        ahead = self._batches[step:].to_iter_dataset(threads)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain reads absl flags here, and a program without absl parses none
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=max(1, self._prefetch)
            )
            ahead = ahead.mp_prefetch(processes)
        return iter(ahead)

    def _take(self) -> Row:
        assert self._ahead is not None
        try:
            return next(self._ahead)
        except LwmError:
            raise
        except Exception as error:
            if not self._workers:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"data mix: workers = {self._workers} cannot run here ({reason[:300]}); set workers = 0"
            ) from error


class MixSource:
    """Sources by name. Texts, captions and lines are read and encoded once, when a feed first needs them."""

    def __init__(self, options: MixOptions, context: DataContext) -> None:
        self._options, self._context = options, context
        self._files = {name: files_of(o, context.base_dir, name) for name, o in self._text_options.items()}
        self._check_held_out()
        visions = {name: o for name, o in options.sources.items() if isinstance(o, VisionOptions)}
        self._shards = {name: open_codes(o, context.vocabulary, context.base_dir, name) for name, o in visions.items()}
        check_held_out(self._shards, visions)
        self._kept = {name: held_out_clips(o, self._shards[name], name) for name, o in visions.items()}
        self._line_files = {name: line_files(o, context.base_dir, name) for name, o in self._line_options.items()}
        check_one_encoder(self._shards, {name: o.codes_per_frame for name, o in self._line_options.items()})
        self._clips: dict[str, ClipCorpus] = {}
        self._lines: dict[str, LineCorpus] = {}
        self._texts: dict[str, Texts] = {}
        self._corpora: dict[str, Corpus] = {}

    def open(self, request: FeedRequest) -> MixFeed:
        """See :class:`lwm_core.protocols.DataSource`; raises ConfigError for a mix that names an unknown source."""
        _check_request(request)
        weights = self._weights(request)
        sources = {name: self._source(name, request.seq_len) for name, weight in weights.items() if weight}
        rows = StageRows(
            sources,
            weights,
            (self._context.seed % 2**64, request.stage_index),
            request.seq_len,
            self._options.window_rows,
        )
        own = RankRows(rows, request.rows, request.rank, request.world)
        if self._options.workers:
            _check_pickle(own, self._options.workers)
        return MixFeed(own, request.rows // request.world, self._options.workers, self._options.prefetch)

    def held_out(self) -> Sequence[str]:
        """The held-out documents of all text sources; a file that several sources read counts once."""
        texts = {tuple(self._files[name]): self._read(name) for name in self._text_options}
        return [document for text in texts.values() for document in text.held_out]

    def code_settings(self) -> Mapping[str, Settings]:
        """See :class:`lwm_core.protocols.TrainsOnCodes`; a line of a jsonl source does not tell who made its codes."""
        return {name: one.manifest.settings for name, one in self._shards.items()}

    def held_out_clips(self) -> Mapping[Path, Sequence[str]]:
        """See :class:`lwm_core.protocols.HoldsOutClips`; the clips in lines of jsonl sources have no folder."""
        return {one.folder.resolve(): sorted(self._kept[name]) for name, one in self._shards.items()}

    @property
    def _text_options(self) -> dict[str, TextOptions]:
        return {name: o for name, o in self._options.sources.items() if isinstance(o, TextOptions)}

    @property
    def _line_options(self) -> dict[str, JsonlOptions]:
        return {name: o for name, o in self._options.sources.items() if isinstance(o, JsonlOptions)}

    def _check_held_out(self) -> None:
        """Refuse two sources that read a file but differ in what they hold out: one would train on the other's."""
        owners: dict[Path, str] = {}
        for name, files in self._files.items():
            for file in files:
                other = owners.setdefault(file.resolve(), name)
                mine, its = self._options.sources[name], self._options.sources[other]
                assert isinstance(mine, TextOptions) and isinstance(its, TextOptions)
                same = (mine.held_out, mine.split) == (its.held_out, its.split)
                if not same or set(self._files[name]) != set(self._files[other]):
                    raise ConfigError(
                        f"data.sources: {other!r} and {name!r} both read {file}, but hold out different parts of it; "
                        "give both the same files, held_out and split"
                    )

    def _weights(self, request: FeedRequest) -> Mapping[str, float]:
        names = self._options.sources
        if request.mix is None:
            return self._options.weights or dict.fromkeys(names, 1.0)
        try:
            check_mix(dict(request.mix), names, f"the mix of stage {request.stage_index}")
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return request.mix

    def _source(self, name: str, seq_len: int) -> Source:
        options, tokenizer = self._options.sources[name], self._context.tokenizer
        if options.kind == "text":
            return TextSource(options, self._corpus(name), seq_len)
        if options.kind == "needle":
            return NeedleSource(name, options, self._corpus(options.haystack), tokenizer, self._ends, seq_len)
        if options.kind == "vision":
            return VisionSource(self._clip_corpus(name, options), seq_len)
        if options.kind == "jsonl":
            return JsonlSource(self._line_corpus(name, options), seq_len)
        if options.task == "pairs":
            return PairsSource(name, options, tokenizer, seq_len)
        text = None if options.text is None else self._corpus(options.text)
        return RepeatSource(name, options, tokenizer, text, seq_len)

    def _read(self, name: str) -> Texts:
        if name not in self._texts:
            self._texts[name] = read_texts(self._text_options[name], self._files[name], name)
        return self._texts[name]

    def _corpus(self, name: str) -> Corpus:
        if name not in self._corpora:
            self._corpora[name] = encode_corpus(self._read(name).train, self._context.tokenizer, name)
        return self._corpora[name]

    def _clip_corpus(self, name: str, options: VisionOptions) -> ClipCorpus:
        if name not in self._clips:
            context, shards = self._context, self._shards[name]
            examples = clip_examples(options, shards, self._kept[name], context.base_dir, name)
            self._clips[name] = ClipCorpus(name, options, shards, examples, context.tokenizer, context.vocabulary)
        return self._clips[name]

    def _line_corpus(self, name: str, options: JsonlOptions) -> LineCorpus:
        if name not in self._lines:
            context = self._context
            reader = LineReader(options, context.tokenizer, context.vocabulary, context.seed)
            self._lines[name] = LineCorpus(name, options, self._line_files[name], reader)
        return self._lines[name]

    @cached_property
    def _ends(self) -> frozenset[int]:
        return sentence_ends(self._context.tokenizer.decode, self._context.tokenizer.size)


def open_mix(options: MixOptions, context: DataContext) -> MixSource:
    """The factory of the data plugin ``mix``.

    Raises:
        DataError: a file is missing, a folder of codes is damaged, or nothing of one is left to train on.
        ConfigError: two sources read one file or folder and hold out different parts of it, or hold codes of different
            encoders.
        ShapeError: the model has no ids for a source's codes.
    """
    return MixSource(options, context)


def _check_request(request: FeedRequest) -> None:
    who = f"feed of stage {request.stage_index}"
    if request.seq_len < 2:
        raise ShapeError(f"{who}: seq_len is {request.seq_len}; expected at least 2 tokens")
    if request.world < 1 or not 0 <= request.rank < request.world:
        raise ShapeError(f"{who}: rank {request.rank} of {request.world} was asked for; expected 0 <= rank < world")
    if request.rows < 1 or request.rows % request.world:
        raise ShapeError(
            f"{who}: {request.rows} rows do not divide by {request.world} data ranks; change batch_tokens or the mesh"
        )


def _check_pickle(rows: RankRows, workers: int) -> None:
    try:
        pickle.dumps(rows)
    except Exception as error:
        raise DataError(
            f"data mix: workers = {workers} need the tokenizer in other processes, but it cannot be sent there "
            f"({' '.join(str(error).split())}); set workers = 0"
        ) from error
