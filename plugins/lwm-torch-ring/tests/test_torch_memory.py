"""How large anything is that a step makes: the loss and the feed-forward in slices.

Shapes: B batch, S sequence, E hidden size, F feed-forward size, V ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch_cases import make_trainer, rows_of
from torch_threads import Largest

from lwm_core.batch import TokenSequence, pack_rows
from lwm_core.model import preset
from lwm_core.vocab import Vocabulary

ROWS, SEQ_LEN, TEXT, VISION, HIDDEN, FEED_FORWARD, CHUNK = 2, 512, 1200, 400, 32, 1024, 64
TOKENS = ROWS * SEQ_LEN
LOGITS, ACTIVATIONS = TOKENS * TEXT, TOKENS * FEED_FORWARD
"""B·S·V of the larger modality alone, and B·S·F."""


def largest(backward: bool, **options: Any) -> int:
    """Elements of the largest tensor of a step's losses, and with ``backward`` of their gradients."""
    vocabulary = Vocabulary(TEXT, VISION, 0)
    config = preset("tiny", vocabulary, hidden_size=HIDDEN, intermediate_size=FEED_FORWARD, num_layers=2)
    random = np.random.default_rng(0)
    rows = [[TokenSequence(random.integers(0, vocabulary.size, SEQ_LEN), random.random(SEQ_LEN))] for _ in range(ROWS)]
    trainer = make_trainer(config=config, rows=ROWS, seq_len=SEQ_LEN, attention={"chunk": 64}, **options)
    batch = trainer.current.batch(rows_of(trainer, pack_rows(rows, SEQ_LEN)))
    with Largest() as mode:
        found = trainer._losses.run(batch, backward=backward)
    assert found["loss_text"] > 0 and found["loss_vision"] > 0
    return mode.elements


@pytest.mark.parametrize(("backward", "remat"), [(False, "none"), (True, "none"), (True, "attention")])
def test_no_tensor_holds_all_logits_nor_all_of_the_feed_forward(backward: bool, remat: str) -> None:
    """The largest tensor of a step is a slice's logits, or a table with its gradient, whatever the length."""
    most = max(CHUNK * TEXT, 2 * (TEXT + VISION) * HIDDEN)
    assert most < min(LOGITS, ACTIVATIONS) / 8
    assert TOKENS * HIDDEN <= largest(backward, remat=remat, loss_chunk=CHUNK, token_chunk=CHUNK) <= most


@pytest.mark.parametrize(("options", "least"), [({"loss_chunk": TOKENS}, LOGITS), ({"token_chunk": None}, ACTIVATIONS)])
def test_undivided_each_would_be_the_largest(options: dict[str, Any], least: int) -> None:
    """The measure sees what is to be avoided."""
    assert largest(False, **{"loss_chunk": CHUNK, "token_chunk": CHUNK, **options}) >= least
