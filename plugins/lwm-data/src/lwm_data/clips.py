"""Pictures and videos of a folder of codes, each with its caption: the examples that a vision source is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lwm_core.errors import ConfigError, DataError, ShapeError
from lwm_core.packaged import locate
from lwm_core.shards import Shards, open_shards
from lwm_core.vocab import Vocabulary
from lwm_data.captions import read_captions
from lwm_data.options import VisionOptions, unknown


@dataclass(frozen=True)
class ClipExample:
    """A clip with one caption.

    Args:
        video: its number in its folder.
        name: its name there.
        frames: T, at least 1.
        text, question: its caption's; empty where there is none.
    """

    video: int
    name: str
    frames: int
    text: str = ""
    question: str = ""


def open_codes(options: VisionOptions, vocabulary: Vocabulary, base: Path, name: str) -> Shards:
    """The folder of codes of a vision source, held against the model's vocabulary.

    Raises:
        DataError: it is no such folder, not complete, damaged or empty.
        ShapeError: the model has no ids for its codes.
    """
    who = f"vision source {name!r}"
    folder = locate(options.path, base)
    check_vocabulary(vocabulary, who)
    try:
        shards = open_shards(folder, verify=options.verify)
    except DataError as error:
        raise DataError(f"{who}: {error}") from None
    settings = shards.manifest.settings
    if settings.codes > vocabulary.vision_codes:
        raise ShapeError(
            f"{who}: {folder} holds codes of {settings.encoder!r}, which has {settings.codes}, but the model has ids "
            f"for {vocabulary.vision_codes}; encode it again with an encoder of at most that many"
        )
    if not len(shards):
        raise DataError(f"{who}: {folder} holds no frame; encode at least one picture or video into it")
    return shards


def check_vocabulary(vocabulary: Vocabulary, who: str) -> None:
    """Raise ShapeError unless the vocabulary has vision ids."""
    if not vocabulary.vision_size:
        raise ShapeError(
            f"{who}: the model has no ids for codes; set model.vision_size to what the codes and two delimiters need "
            "(LWM: 8448)"
        )


def check_one_encoder(shards: Mapping[str, Shards], line_widths: Mapping[str, int]) -> None:
    """Refuse codes of different encoders in one mix, which the model cannot tell apart.

    Args:
        shards: by vision source.
        line_widths: codes a frame, by jsonl source.

    Raises:
        ConfigError: two sources differ in the encoder's checksum, or in codes a frame.
    """
    widths = {**{name: one.manifest.tokens_per_frame for name, one in shards.items()}, **line_widths}
    made = {name: one.manifest.settings for name, one in shards.items()}
    first = next(iter(widths), None)
    for name in widths:
        if widths[name] != widths[first]:
            raise ConfigError(
                f"data.sources: {first!r} has {widths[first]} codes a frame and {name!r} {widths[name]}; use codes of "
                "one encoder (a jsonl source says codes_per_frame)"
            )
        if name in made and made[name].checksum != made[first].checksum:
            one, other = (f"{made[n].encoder} {made[n].checksum[:12]}" for n in (first, name))
            raise ConfigError(
                f"data.sources: the codes of {first!r} and {name!r} are of different weights ({one}, {other}); encode "
                "both with the same encoder"
            )


def held_out_clips(options: VisionOptions, shards: Shards, name: str) -> frozenset[str]:
    """Names of the clips of a source's folder that are never trained on.

    They follow from the names of the folder's clips alone: neither their order, the captions nor the seed matters.

    Raises:
        DataError: none is left to train on.
    """
    if not options.held_out:
        return frozenset()
    clips = [video.name for video in shards.videos if video.frames]
    count = max(1, round(len(clips) * options.held_out))
    if count >= len(clips):
        raise DataError(
            f"vision source {name!r}: held_out = {options.held_out} of {len(clips)} clip(s) in {shards.folder} leaves "
            "none to train on; lower it, or encode more"
        )
    return frozenset(sorted(clips, key=lambda clip: hashlib.sha256(clip.encode()).digest())[:count])


def check_held_out(shards: Mapping[str, Shards], options: Mapping[str, VisionOptions]) -> None:
    """Refuse sources that read one folder but differ in what they hold out: one would train on the other's.

    Args:
        shards: by vision source.
        options: of each.

    Raises:
        ConfigError: two of them do.
    """
    owners: dict[Path, str] = {}
    for name, one in shards.items():
        other = owners.setdefault(one.folder.resolve(), name)
        for what in ("held_out", "held_out_frames"):
            its, mine = getattr(options[other], what), getattr(options[name], what)
            if its != mine:
                raise ConfigError(
                    f"data.sources: {other!r} and {name!r} both read {one.folder}, but {what} is {its} and {mine}; "
                    f"give both the same {what}"
                )


def clip_examples(
    options: VisionOptions, shards: Shards, held_out: frozenset[str], base: Path, name: str
) -> list[ClipExample]:
    """The examples of a source: a clip for each line of its captions, or each clip alone; none of ``held_out``.

    Raises:
        DataError: a clip has no frames or no caption, or a caption no clip (unless they are left out), or none is left.
    """
    who = f"vision source {name!r}"
    kept = {video.name: max(0, video.frames - options.held_out_frames) for video in shards.videos}
    empty = [clip for clip, frames in kept.items() if not frames and clip not in held_out]
    if empty and "no-frames" not in options.leave_out:
        raise DataError(f"{who}: {_without_frames(options, shards, empty)}, or set leave_out = ['no-frames']")
    numbers = {video.name: number for number, video in enumerate(shards.videos) if kept[video.name]}
    if options.captions is None:
        examples = [ClipExample(number, clip, kept[clip]) for clip, number in numbers.items() if clip not in held_out]
    else:
        file = locate(options.captions, base)
        examples = _captioned(options, kept, shards.folder, numbers, held_out, file, who)
    if not numbers:  # a folder without any frame was refused when it was opened
        raise DataError(
            f"{who}: held_out_frames = {options.held_out_frames} leaves no frame of any clip in {shards.folder}; "
            "lower it"
        )
    if not examples:
        but = f" but the {len(held_out)} that held_out keeps from training" if held_out else ""
        raise DataError(f"{who}: no example is left; its captions are of none of the clips in {shards.folder}{but}")
    return examples


def _without_frames(options: VisionOptions, shards: Shards, empty: Sequence[str]) -> str:
    """What is wrong with the clips ``empty``, and what to do."""
    few = [clip for clip in empty if shards.video(clip).frames]
    if few:
        counted = _counted(few, "is no longer than that", "are no longer than that")
        return f"held_out_frames = {options.held_out_frames}, but {counted}; lower it"
    broken = shards.video(empty[0]).broken
    return f"{_counted(empty, 'has no frames', 'have no frames')}{broken and f' ({broken})'}; encode again without"


def _captioned(
    options: VisionOptions, kept: Mapping[str, int], folder: Path, numbers: dict[str, int], held_out: frozenset[str],
    file: Path, who: str,
) -> list[ClipExample]:  # fmt: skip
    captions = [caption for caption in read_captions(file, who) if kept.get(caption.name) != 0]
    strange = [caption for caption in captions if caption.name not in numbers]
    if strange and "no-clip" not in options.leave_out:
        raise DataError(
            f"{who}: {file}:{strange[0].line}: {unknown('clip', strange[0].name, list(numbers)[:1000])} in "
            f"{folder}; {len(strange)} line(s) are so: mend them, or set leave_out = ['no-clip']"
        )
    named = {caption.name for caption in captions}
    missing = [clip for clip in numbers if clip not in named and clip not in held_out]
    if missing and "no-caption" not in options.leave_out:
        raise DataError(
            f"{who}: {_counted(missing, 'has no caption', 'have no caption')} in {file}; add them, or set leave_out = "
            "['no-caption']"
        )
    return [
        ClipExample(number, caption.name, kept[caption.name], caption.text, caption.question)
        for caption in captions
        if (number := numbers.get(caption.name)) is not None and caption.name not in held_out
    ]


def _counted(names: Sequence[str], one: str, more: str) -> str:
    """``clip 'a' has ...`` or ``3 clips, 'a' the first, have ...``."""
    return f"clip {names[0]!r} {one}" if len(names) == 1 else f"{len(names)} clips, {names[0]!r} the first, {more}"
