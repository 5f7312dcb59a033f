"""The model's shapes: LWM's published counts, canonical names, FLOPs worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lwm_core.errors import ShapeError, UsageError
from lwm_core.model import (
    PRESETS,
    ModelConfig,
    canonical_shapes,
    preset,
    training_flops_per_token,
)
from lwm_core.vocab import Vocabulary

TEXT = Vocabulary(32000)

TOY = ModelConfig(Vocabulary(11), hidden_size=6, intermediate_size=10, num_layers=2, num_heads=4, num_kv_heads=2,
                  head_dim=2)  # fmt: skip


def test_lwm_7b_counts() -> None:
    """Llama 2 7B's published 6,738,415,616; two more tables of 8448 × 4096 with vision."""
    assert preset("7b", TEXT).parameter_count == 6_738_415_616
    with_vision = preset("7b", Vocabulary(32000, vision_size=8448))
    assert with_vision.parameter_count == 6_738_415_616 + 2 * 8448 * 4096 == 6_807_621_632


@pytest.mark.parametrize(
    ("name", "text_size", "count"),
    [("13b", 32000, 13_015_864_320), ("llama3-8b", 128_256, 8_030_261_248), ("qwen2.5-7b", 152_064, 7_615_616_512)],
)
def test_published_counts(name: str, text_size: int, count: int) -> None:
    assert preset(name, Vocabulary(text_size)).parameter_count == count


def test_toy_shapes_by_hand() -> None:
    shapes = canonical_shapes(TOY)
    names = list(shapes)
    assert (names[0], names[-2:]) == ("model.embed_tokens.weight", ["model.norm.weight", "lm_head.weight"])
    assert len(shapes) == 3 + 2 * 9
    layer = {name.removeprefix("model.layers.1."): shape for name, shape in shapes.items() if ".1." in name}
    assert layer == {
        "input_layernorm.weight": (6,),
        "self_attn.q_proj.weight": (8, 6),
        "self_attn.k_proj.weight": (4, 6),
        "self_attn.v_proj.weight": (4, 6),
        "self_attn.o_proj.weight": (6, 8),
        "post_attention_layernorm.weight": (6,),
        "mlp.gate_proj.weight": (10, 6),
        "mlp.up_proj.weight": (10, 6),
        "mlp.down_proj.weight": (6, 10),
    }


def test_tied_tables_are_one() -> None:
    tied = ModelConfig.from_dict({**TOY.to_dict(), "tie_embeddings": True})
    assert "lm_head.weight" not in canonical_shapes(tied)
    assert TOY.parameter_count - tied.parameter_count == 11 * 6


@pytest.mark.parametrize("tied", [False, True])
def test_training_flops_by_hand(tied: bool) -> None:
    """A layer's matrices: q 48, k 24, v 24, o 48, three of 60; the head 66. Attention 6·L·H·D·S."""
    model = ModelConfig.from_dict({**TOY.to_dict(), "tie_embeddings": tied})
    assert training_flops_per_token(model, 100) == 6 * (2 * (48 + 24 + 24 + 48 + 180) + 66) + 6 * 2 * 4 * 2 * 100


def test_a_text_target_meets_the_text_rows_of_the_head_alone() -> None:
    with_vision = replace(TOY, vocabulary=Vocabulary(11, vision_size=60, vision_codes=50))
    assert training_flops_per_token(with_vision, 100) == training_flops_per_token(TOY, 100)


def test_attention_dominates_at_a_million_tokens() -> None:
    """94.5% of Llama 3 8B's 6N + attention at 2^20 tokens, 68% at 128K: the field's figures, N all parameters."""
    model = preset("llama3-8b", Vocabulary(128_256))
    for seq_len, share in ((2**20, 0.945), (2**17, 0.68)):
        attention = training_flops_per_token(model, seq_len) - training_flops_per_token(model, 0)
        assert attention / (attention + 6 * model.parameter_count) == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str) -> None:
    model = preset(name, Vocabulary(1000, vision_size=60, vision_codes=50))
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def test_preset_changes_keep_the_heads_dividing() -> None:
    assert preset("tiny", TEXT, hidden_size=512).head_dim == 128
    assert preset("tiny", TEXT, num_heads=8).head_dim == 32
    assert preset("tiny", TEXT, hidden_size=None).hidden_size == 256
    assert preset("tiny", TEXT, num_heads=8, head_dim=16).head_dim == 16
    odd = preset("tiny", TEXT, num_heads=1, head_dim=64)
    assert (odd.num_heads, odd.num_kv_heads) == (1, 1)


def test_wrong_models_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'8b' is unknown; expected one of debug, tiny"):
        preset("8b", TEXT)
    with pytest.raises(ShapeError, match="hidden_size = 250 is not a multiple"):
        preset("tiny", TEXT, hidden_size=250)
    with pytest.raises(ShapeError, match="num_kv_heads = 3"):
        preset("tiny", TEXT, num_kv_heads=3)
    with pytest.raises(ShapeError, match="odd"):
        preset("tiny", TEXT, head_dim=63)


def test_another_vocabulary_changes_the_tables_alone() -> None:
    other = replace(TOY, vocabulary=Vocabulary(13))
    changed = {n for n, shape in canonical_shapes(other).items() if shape != canonical_shapes(TOY)[n]}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
