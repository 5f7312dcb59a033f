"""Part of ``attention-gpu-torch``: a zigzag ring of 8 ranks played through on one device, against one whole call.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; B is 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    ratio,
    take_turns,
)
from bench_torch_played import PlayedRing

from lwm_core.attention import AttentionMask
from lwm_core.layout import SequenceLayout

RANKS = 8
LENGTHS = {"64K": 65_536, "128K": 131_072, "256K": 262_144}
SMALL_LENGTH = 512
AIMS = {"forward": 0.95, "forward+backward": 0.92}


def measure(seq_len: int, setting: Setting) -> dict[str, Any]:
    """Seconds of the ring and of the best whole call, in turns, for each kind."""
    heads, seq_len = (SMALL_HEADS, SMALL_LENGTH) if setting.small else (Heads(), seq_len)
    kernel, notes = setting.kernel_of(heads.dim)
    ring = PlayedRing(SequenceLayout("zigzag", RANKS), seq_len, AttentionMask("causal"), kernel)
    tiles = ring.prepare()
    arrays = random_inputs(setting, heads, seq_len)
    dealt = tuple(ring.deal(x) for x in arrays)
    rows = []
    for kind in KINDS:
        way, tried = best_whole(arrays, kind, setting)
        given, mine = way.arranged(*arrays), dealt if kind != "forward" else dealt[:3]
        expected = tuple(x.transpose(1, 2) for x in way.run(*given, kind))
        if not way.grouped:  # the gradients of copies belong together
            expected = tuple(
                x.unflatten(2, (heads.key_value, -1)).sum(3) if place >= 2 else x for place, x in enumerate(expected)
            )
        errors = check(f"S={seq_len}, {kind}", tuple(map(ring.natural, ring.run(*mine))), expected, setting)
        del expected
        sides = {"ring": partial(ring.run, *mine), "whole": partial(way.run, *given, kind)}
        times = take_turns(sides, setting.rounds, setting.device)
        rows.append({
            "kind": kind, "flops": heads.flops(seq_len**2, kind), "seconds": times, "best": way.name, "tried": tried,
            "errors": errors,
        })  # fmt: skip
        setting.console.print(f"[dim]S={seq_len}, {kind}: {ratio(times['ring'], times['whole']):.2f}[/dim]")
    case = {"S": seq_len, "H": heads.query, "K": heads.key_value, "D": heads.dim, "ranks": RANKS, "layout": "zigzag"}
    return {"case": case, "notes": notes, "tiles": tiles, "rows": rows}


def figures(found: dict[str, Any]) -> list[Figure]:
    """A line for each kind."""
    lines = []
    for row in found["rows"]:
        ring, whole = (row["seconds"][side] for side in ("ring", "whole"))
        told = f"{rate(row['flops'], ring)} of {rate(row['flops'], whole)} ({row['best']})"
        lines.append(
            Figure(f"{row['kind']}: ring / whole", f"**{ratio(ring, whole):.3f}**: {told}", f"{AIMS[row['kind']]}")
        )
    return lines


PARTS = tuple(
    Part(f"ring-{name}", f"a zigzag ring of {RANKS} over {name} tokens against one whole call",
         partial(measure, length), figures)
    for name, length in LENGTHS.items()
)  # fmt: skip
