"""What a ``vision`` source holds out: which clips, that no row has them, and what is refused.

Codes are of 9 entries, two a frame: ids 259 to 267; those of each clip tell which it is.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from lwm_core.batch import PackedBatch
from lwm_core.errors import ConfigError, DataError
from lwm_core.protocols import FeedRequest, HoldsOutClips

VISION = (12, 9)

CLIPS = {f"clip-{i}": [[i % 9, i // 9]] for i in range(40)}


def source_of(**options: Any) -> dict[str, Any]:
    captions = {} if options.get("order") == "vision" else {"captions": "c.tsv"}
    return {"clips": {"kind": "vision", "path": "codes", **captions, **options}}


def documents(batch: PackedBatch) -> list[list[int]]:
    """The ids of every segment."""
    return [
        row[own == number].tolist()
        for row, own in zip(batch.tokens, batch.segment_ids, strict=True)
        for number in range(1, own.max() + 1)
    ]


def trained_on(source: Any, **request: Any) -> set[str]:
    """Names of ``CLIPS`` whose codes some row of a few windows holds."""
    feed = source.open(FeedRequest(**{"stage_index": 0, "seq_len": 400, "rows": 16, **request}))
    found = [ids for step in range(3) for ids in documents(feed.batch(step))]
    codes = {tuple(i - 259 for i in ids if 259 <= i < 268) for ids in found}
    return {f"clip-{9 * high + low}" for low, high in codes}


def codes_of(source: Any) -> set[tuple[int, ...]]:
    """The frames of two codes that some row of a few windows holds."""
    feed = source.open(FeedRequest(0, 200, 16))
    found = [[i - 259 for i in ids if 259 <= i < 268] for step in range(3) for ids in documents(feed.batch(step))]
    return {tuple(codes[t : t + 2]) for codes in found for t in range(0, len(codes), 2)}


def test_clips_that_are_held_out_are_never_trained_on(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    """A fifth of 40: those of the lowest SHA-256 of their names, whatever the order of the folder and the seed."""
    write_codes("codes", CLIPS)
    write_codes("turned", dict(reversed(CLIPS.items())))
    expected = set(sorted(CLIPS, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:8])
    for folder, seed in (("codes", 0), ("turned", 5)):
        made = open_source(source_of(order="vision", path=folder, held_out=0.2), seed, vision=VISION)
        assert isinstance(made, HoldsOutClips)
        assert made.held_out_clips() == {tmp_path.resolve() / folder: sorted(expected)}
        assert trained_on(made) == CLIPS.keys() - expected
    whole = open_source(source_of(order="vision"), vision=VISION)
    assert trained_on(whole) == CLIPS.keys() and whole.held_out_clips() == {tmp_path.resolve() / "codes": []}


def test_all_that_is_said_of_a_held_out_clip_goes_with_it(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    """Its captions are not learnt either, and need not be there."""
    write_codes("codes", CLIPS)
    [held] = open_source(source_of(order="vision", held_out=0.01), vision=VISION).held_out_clips().values()
    assert len(held) == 1, "at least one"
    lines = [f"{name}\t{word} {name}" for name in CLIPS for word in ("this is", "so is") if name != held[0]]
    (tmp_path / "c.tsv").write_text("\n".join([*lines, f"{held[0]}\tnever", f"{held[0]}\tneither"]))
    source = open_source(source_of(order="vision-text", held_out=0.01), vision=VISION)
    assert trained_on(source, seq_len=900) == CLIPS.keys() - set(held)
    said = bytes(i for i in source.open(FeedRequest(0, 900, 16)).batch(0).tokens.ravel() if i < 256)
    assert b"so is clip-" in said and b"never" not in said and b"neither" not in said
    (tmp_path / "c.tsv").write_text("\n".join(lines))
    source = open_source(source_of(held_out=0.01), vision=VISION)
    assert trained_on(source, seq_len=900) == CLIPS.keys() - set(held)
    (tmp_path / "c.tsv").write_text(f"{held[0]}\tnever\n")
    words = "no example is left; its captions are of none of the clips in .*codes but the 1 that held_out keeps from"
    source = open_source(source_of(held_out=0.01, leave_out=["no-caption"]), vision=VISION)
    with pytest.raises(DataError, match=words):
        source.open(FeedRequest(0, 200, 1))


def test_a_hold_out_that_leaves_nothing_is_refused_at_once(write_codes: Any, open_source: Any) -> None:
    write_codes("one", {"it": [[1, 2]], "broken": "is no picture"})
    write_codes("two", {"it": [[1, 2]], "more": [[3, 4], [5, 6]]})
    for path, fraction, count in (("one", 0.1, 1), ("two", 0.9, 2)):
        words = rf"'clips': held_out = {fraction} of {count} clip\(s\) in .*{path} leaves none to train on; lower it"
        with pytest.raises(DataError, match=words):
            open_source(source_of(order="vision", path=path, held_out=fraction), vision=VISION)


def test_sources_of_one_folder_hold_out_the_same(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("codes", CLIPS)
    (tmp_path / "link").symlink_to("codes")
    a = {"kind": "vision", "order": "vision", "path": "codes", "held_out": 0.2}
    b = {**a, "path": "link"}
    assert len(open_source({"a": a, "b": b}, vision=VISION).held_out_clips()) == 1
    with pytest.raises(ConfigError, match=r"'a' and 'b' both read .*link, but held_out is 0\.2 and 0\.0; give both"):
        open_source({"a": a, "b": {**b, "held_out": 0.0}}, vision=VISION)
    with pytest.raises(ConfigError, match="but held_out_frames is 0 and 1; give both the same held_out_frames"):
        open_source({"a": a, "b": {**b, "held_out_frames": 1}}, vision=VISION)


@pytest.mark.parametrize("options", [{}, {"max_frames": 2}, {"max_frames": 2, "sampling": "consecutive"}])
def test_the_end_of_a_clip_can_be_held_out(write_codes: Any, open_source: Any, options: dict[str, Any]) -> None:
    """Every frame but the last two is trained on, by every way of sampling but the even one, which takes the ends."""
    write_codes("codes", {"it": [[t, t] for t in range(8)]})
    whole, but_two = (source_of(order="vision", held_out_frames=n, **options) for n in (0, 2))
    seen = [{code for code, _ in codes_of(open_source(made, vision=VISION))} for made in (whole, but_two)]
    even = options == {"max_frames": 2}
    assert seen == ([{0, 7}, {0, 5}] if even else [set(range(8)), set(range(6))])


def test_a_clip_too_short_for_its_end_to_be_held_out(write_codes: Any, open_source: Any, tmp_path: Path) -> None:
    write_codes("codes", {"it": [[t, t] for t in range(8)], "short": [[8, 8], [8, 7]]})
    source = source_of(order="vision", held_out_frames=2)
    words = "held_out_frames = 2, but clip 'short' is no longer than that; lower it, or set leave_out"
    with pytest.raises(DataError, match=words):
        open_source(source, vision=VISION).open(FeedRequest(0, 200, 1))
    (tmp_path / "c.tsv").write_text("it\ta\nshort\tb\n")
    for order in ("vision", "text-vision"):
        made = open_source(source_of(order=order, held_out_frames=2, leave_out=["no-frames"]), vision=VISION)
        assert {code for code, _ in codes_of(made)} == set(range(6))


def test_the_end_of_no_clip_is_left(write_codes: Any, open_source: Any) -> None:
    write_codes("codes", {"it": [[t, t] for t in range(8)], "short": [[8, 8], [8, 7]]})
    source = source_of(order="vision", held_out_frames=8, leave_out=["no-frames"])
    with pytest.raises(DataError, match=r"held_out_frames = 8 leaves no frame of any clip in .*codes; lower it"):
        open_source(source, vision=VISION).open(FeedRequest(0, 200, 1))


def test_a_clip_that_is_held_out_may_be_too_short(write_codes: Any, open_source: Any) -> None:
    """Whichever of the two is held out, the other is trained on, if it is long enough."""
    clips = {"a": [[t, t] for t in range(8)], "b": [[t, t] for t in range(8)]}
    [held] = sorted(clips, key=lambda clip: hashlib.sha256(clip.encode()).digest())[:1]
    write_codes("codes", {**clips, held: [[8, 8]]})
    source = open_source(source_of(order="vision", held_out=0.1, held_out_frames=2), vision=VISION)
    assert {code for code, _ in codes_of(source)} == set(range(6))
