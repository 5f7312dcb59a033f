"""Draw docs/assets/ring.svg: which hop of a ring of four computes which query-key pairs, layout by layout.

``python docs/figures/ring.py [OUT.svg]``; needs matplotlib, which lwm-evals brings. Everything comes from
``lwm_core``'s own layouts and masks.

Shapes: S tokens, n ranks; a matrix ``[S, S]`` has a query a row and a key a column, natural order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lwm_core.attention import AttentionMask, mask_bounds
from lwm_core.layout import SequenceLayout

WORLD, SEQ_LEN = 4, 32
OUT = Path(__file__).parents[1] / "assets" / "ring.svg"
COLOURS = ("#17738c", "#5aa3a0", "#e0b45c", "#b8493c")
HIDDEN = -1
PANELS = (
    ("contiguous, causal", SequenceLayout("contiguous", WORLD), AttentionMask("causal")),
    ("zigzag, causal", SequenceLayout("zigzag", WORLD), AttentionMask("causal")),
    ("striped, causal", SequenceLayout("striped", WORLD), AttentionMask("causal")),
    ("contiguous, window of 8", SequenceLayout("contiguous", WORLD), AttentionMask("causal", window=8)),
)


def hops(layout: SequenceLayout, mask: AttentionMask, seq_len: int) -> NDArray[np.int64]:
    """``[S, S]``: the hop at which the query's rank holds the key, :data:`HIDDEN` where the query does not see it."""
    rank = np.empty(seq_len, np.int64)
    for number in range(layout.world):
        rank[layout.rank_indices(seq_len, number)] = number
    low, high = mask_bounds(mask, seq_len)
    keys = np.arange(seq_len)
    seen = (keys >= low[:, None]) & (keys <= high[:, None])
    return np.where(seen, (rank[:, None] - rank[None, :]) % layout.world, HIDDEN)


def work(layout: SequenceLayout, mask: AttentionMask, seq_len: int) -> NDArray[np.int64]:
    """``[n, n]``: pairs that each rank computes (row) at each hop (column)."""
    matrix = hops(layout, mask, seq_len)
    return np.array(
        [
            [(matrix[layout.rank_indices(seq_len, rank)] == hop).sum() for hop in range(layout.world)]
            for rank in range(layout.world)
        ]
    )


def draw(out: Path) -> None:
    """Write the figure."""
    from matplotlib import rc_context
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "lwm", "svg.fonttype": "path", "font.size": 8.0, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(9.6, 4.1), layout="constrained")
        upper, lower = figure.subplots(2, len(PANELS), height_ratios=[3, 1])
        for above, below, (title, layout, mask) in zip(upper, lower, PANELS, strict=True):
            matrix = np.ma.masked_equal(hops(layout, mask, SEQ_LEN), HIDDEN)
            above.imshow(matrix, cmap=ListedColormap(COLOURS), vmin=0, vmax=WORLD - 1, interpolation="nearest")
            above.set(title=title, xticks=[], yticks=[], xlabel="key")
            left = np.zeros(WORLD)
            for hop, pairs in enumerate(work(layout, mask, SEQ_LEN).T):
                below.barh(np.arange(WORLD), pairs, left=left, color=COLOURS[hop], height=0.72)
                left += pairs
            below.set(yticks=range(WORLD), xlabel="pairs computed", xlim=(0, 240))
            below.invert_yaxis()
            for side in ("top", "right"):
                below.spines[side].set_visible(False)
        upper[0].set_ylabel("query")
        lower[0].set_ylabel("rank")
        handles = [lower[0].barh([0], [0], color=colour) for colour in COLOURS]
        names = ["hop 0: own keys", *(f"hop {hop}" for hop in range(1, WORLD))]
        figure.legend(handles, names, loc="outside lower center", ncols=WORLD, frameon=False)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
