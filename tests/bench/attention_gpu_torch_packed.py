"""Part of ``attention-gpu-torch``: packed documents, against one whole call of the same operations.

Lengths are log-normal, 4096 tokens in the mean (sigma 1), one row of 131072 tokens. What is compared is the rate:
causal operations of all documents, ``2·H·D·ΣLᵢ²`` forward, over the seconds; against those of the best whole causal
call over *one* sequence of ``L = √ΣLᵢ²`` tokens (to the nearest 128), with as many operations and no documents.

Shapes: B batch, S sequence, L tokens of a document, H query heads, K key-value heads, D head dim; B is 1.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from bench_torch_gpu import (
    KINDS,
    SMALL_HEADS,
    Figure,
    Heads,
    Part,
    Setting,
    best_whole,
    check,
    random_inputs,
    rate,
    take_turns,
)
from bench_torch_played import PlayedRing
from torch import Tensor

from lwm_core.attention import AttentionMask
from lwm_core.layout import SequenceLayout

SEQ_LEN, MEAN, SIGMA, ROUNDED = 131_072, 4096, 1.0, 128
SMALL = (512, 64, 16)  # tokens, mean, rounding
LAYOUTS = {
    "ring of 8, zigzag": SequenceLayout("zigzag", 8),
    "ring of 8, contiguous": SequenceLayout("contiguous", 8),
    "one rank": SequenceLayout("contiguous", 1),
}
AIMED = "ring of 8, zigzag"
AIM = 0.80


def document_lengths(seq_len: int, mean: int, seed: int = 0) -> list[int]:
    """Log-normal lengths that fill ``seq_len`` tokens; the last is cut off."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while (left := seq_len - sum(lengths)) > 0:
        drawn = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        lengths.append(min(left, max(1, round(drawn))))
    return lengths


def one_by_one(lengths: list[int], arrays: tuple[Tensor, ...], kind: str, setting: Setting) -> Callable[[], Any]:
    """A call of torch's own for each document; gives out and the gradients ``[1,S,·,D]``."""
    way, _ = best_whole(tuple(x[:, : max(lengths)] for x in arrays), kind, setting)
    parts = zip(*(x.split(lengths, 1) for x in arrays), strict=True)
    given = [way.arranged(*part) for part in parts]
    groups = 1 if way.grouped else arrays[0].shape[2] // arrays[1].shape[2]

    def run() -> tuple[Tensor, ...]:
        found = zip(*(way.run(*part, kind) for part in given), strict=True)
        whole = [torch.cat(parts, 2).transpose(1, 2) for parts in found]
        return tuple(x.unflatten(2, (-1, groups)).sum(3) if place >= 2 else x for place, x in enumerate(whole))

    return run


def measure(setting: Setting) -> dict[str, Any]:
    """Seconds of each side and of the best whole call, in turns, for each kind."""
    seq_len, mean, rounded = SMALL if setting.small else (SEQ_LEN, MEAN, ROUNDED)
    heads = SMALL_HEADS if setting.small else Heads()
    lengths = document_lengths(seq_len, mean)
    squares = sum(length**2 for length in lengths)
    same = max(rounded, round(squares**0.5 / rounded) * rounded)
    kernel, notes = setting.kernel_of(heads.dim)
    ids = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]
    rings, planned = {}, {}
    for name, layout in LAYOUTS.items():
        began = time.perf_counter()
        rings[name] = PlayedRing(layout, seq_len, AttentionMask("causal"), kernel, ids)
        tiles = rings[name].prepare()
        planned[name] = {"tiles": tiles, "host_seconds": time.perf_counter() - began}
    arrays, other = random_inputs(setting, heads, seq_len), random_inputs(setting, heads, same)
    rows = []
    for kind in KINDS:
        way, tried = best_whole(other, kind, setting)
        sides: dict[str, Callable[[], Any]] = {"whole": partial(way.run, *way.arranged(*other), kind)}
        sides["a call a document"] = one_by_one(lengths, arrays, kind, setting)
        expected, errors = sides["a call a document"](), {}
        for name, ring in rings.items():
            mine = tuple(ring.deal(x) for x in (arrays if kind != "forward" else arrays[:3]))
            sides[name] = partial(ring.run, *mine)
            got = tuple(map(ring.natural, ring.run(*mine)))
            errors[name] = check(f"packed, {name}, {kind}", got, expected, setting)
        del expected, got
        times = take_turns(sides, setting.rounds, setting.device)
        rows.append({
            "kind": kind, "flops": heads.flops(squares, kind), "whole_flops": heads.flops(same**2, kind),
            "seconds": times, "best": way.name, "tried": tried, "errors": errors,
        })  # fmt: skip
        setting.console.print(f"[dim]packed, {kind}: {share(rows[-1], AIMED):.2f}[/dim]")
    case = {"S": seq_len, "H": heads.query, "K": heads.key_value, "D": heads.dim, "documents": lengths, "whole_S": same}
    return {"case": case, "notes": notes, "planned": planned, "rows": rows}


def share(row: dict[str, Any], side: str) -> float:
    """The rate of a side over the whole call's, the median of the rounds."""
    pairs = zip(row["seconds"][side], row["seconds"]["whole"], strict=True)
    return row["flops"] / row["whole_flops"] * statistics.median(whole / ours for ours, whole in pairs)


def figures(found: dict[str, Any]) -> list[Figure]:
    """A line for each kind and side."""
    lines = []
    for row in found["rows"]:
        whole = rate(row["whole_flops"], row["seconds"]["whole"])
        for side, times in row["seconds"].items():
            if side != "whole":
                told = f"{rate(row['flops'], times)} of {whole} ({row['best']}, S={found['case']['whole_S']})"
                figure = f"{share(row, side):.3f}"
                bold = f"**{figure}**" if side == AIMED else figure
                lines.append(Figure(f"{row['kind']}: {side}", f"{bold}: {told}", f"{AIM}" if side == AIMED else ""))
    return lines


PARTS = (Part("packed", "packed documents against one whole call of the same operations", measure, figures),)
