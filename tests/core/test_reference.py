"""The oracle itself: attention against loops, gradients against finite differences, a Llama worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lwm_core.attention import AttentionMask
from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.model import ModelConfig, canonical_shapes
from lwm_core.reference import attention_backward, attention_forward, llama_logits, modality_loss
from lwm_core.rope import RopeSpec
from lwm_core.testing.attention_cases import MASKS, sees
from lwm_core.testing.tolerance import relative_l2
from lwm_core.vocab import Vocabulary

IDS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2]])
MASK_CASES = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def qkv(seed: int = 0, kv_heads: int = 2):
    random = np.random.default_rng(seed)
    return (random.standard_normal((2, 9, n, 3)) for n in (4, kv_heads, kv_heads, 4))


@MASK_CASES
def test_forward_against_loops(mask: AttentionMask) -> None:
    q, k, v, _ = qkv()
    out, lse = attention_forward(q, k, v, mask, IDS)
    seen = sees(mask, IDS)
    for b, s, h in np.ndindex(2, 9, 4):
        group = h // 2
        logits = {t: math.fsum(q[b, s, h] * k[b, t, group]) / math.sqrt(3) for t in range(9) if seen[b, s, t]}
        total = math.fsum(math.exp(x) for x in logits.values())
        expected = sum((math.exp(x) / total * v[b, t, group] for t, x in logits.items()), np.zeros(3))
        assert np.allclose(out[b, s, h], expected, rtol=0, atol=1e-14)
        assert lse[b, s, h] == (pytest.approx(math.log(total), abs=1e-14) if logits else -math.inf)


@MASK_CASES
@pytest.mark.parametrize("scale", [None, 0.7])
def test_backward_against_finite_differences(mask: AttentionMask, scale: float | None) -> None:
    q, k, v, dout = qkv(1)

    def value(*inputs: np.ndarray) -> float:
        return float((attention_forward(*inputs, mask, IDS, scale)[0] * dout).sum())

    step = 1e-5
    for place, gradient in enumerate(attention_backward(q, k, v, mask, dout, IDS, scale)):
        numeric = np.zeros_like(gradient)
        for index in np.ndindex(*gradient.shape):
            sides = []
            for sign in (1, -1):
                inputs = [q.copy(), k.copy(), v.copy()]
                inputs[place][index] += sign * step
                sides.append(value(*inputs))
            numeric[index] = (sides[0] - sides[1]) / (2 * step)
        assert relative_l2(gradient, numeric) < 1e-8, ["dq", "dk", "dv"][place]


def test_padding_is_zero_and_minus_infinity() -> None:
    q, k, v, dout = qkv()
    out, lse = attention_forward(q, k, v, AttentionMask("full"), IDS)
    assert np.all(out[0, 7:] == 0) and np.all(np.isneginf(lse[0, 7:]))
    for gradient in attention_backward(q, k, v, AttentionMask("full"), dout, IDS):
        assert np.all(gradient[0, 7:] == 0) and np.all(np.isfinite(gradient))


def test_huge_logits_stay_finite() -> None:
    q, k, v, dout = qkv()
    out, lse = attention_forward(1e4 * q, 1e4 * k, v, AttentionMask())
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(lse))
    assert all(np.all(np.isfinite(g)) for g in attention_backward(1e4 * q, 1e4 * k, v, AttentionMask(), dout))


# -- a Llama, in scalars -----------------------------------------------------------------------------------------------

TINY = ModelConfig(Vocabulary(7), hidden_size=4, intermediate_size=5, num_layers=2, num_heads=2, num_kv_heads=1,
                   head_dim=4, rms_norm_eps=1e-3)  # fmt: skip


def weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.normal(0.0, 0.5, shape) for name, shape in canonical_shapes(config).items()}


def norm(x: list[float], w: np.ndarray, eps: float) -> list[float]:
    root = math.sqrt(sum(a * a for a in x) / len(x) + eps)
    return [a / root * float(b) for a, b in zip(x, w, strict=True)]


def times(w: np.ndarray, x: list[float]) -> list[float]:
    return [sum(float(w[i, j]) * x[j] for j in range(len(x))) for i in range(len(w))]


def rotated(x: list[float], position: int, theta: float) -> list[float]:
    """Each pair (i, i + D/2) as a complex number, turned."""
    half = len(x) // 2
    result = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned = complex(x[i], x[i + half]) * complex(math.cos(angle), math.sin(angle))
        result[i], result[i + half] = turned.real, turned.imag
    return result


def document_logits(p: dict[str, np.ndarray], c: ModelConfig, theta: float, ids: list[int]) -> list[list[float]]:
    """One document alone, token by token, with plain lists."""
    xs = [[float(a) for a in p["model.embed_tokens.weight"][token]] for token in ids]
    d = c.head_dim
    for layer in range(c.num_layers):
        w = {name.removeprefix(f"model.layers.{layer}."): a for name, a in p.items() if f".{layer}." in name}

        def project(name: str, x: list[float], w: dict[str, np.ndarray] = w) -> list[list[float]]:
            y = times(w[f"self_attn.{name}_proj.weight"], x)
            bias = w.get(f"self_attn.{name}_proj.bias", np.zeros(len(y)))
            y = [a + float(b) for a, b in zip(y, bias, strict=True)]
            return [y[i : i + d] for i in range(0, len(y), d)]

        hs = [norm(x, w["input_layernorm.weight"], c.rms_norm_eps) for x in xs]
        qs = [[rotated(head, t, theta) for head in project("q", h)] for t, h in enumerate(hs)]
        ks = [[rotated(head, t, theta) for head in project("k", h)] for t, h in enumerate(hs)]
        vs = [project("v", h) for h in hs]
        for t, x in enumerate(xs):
            heads: list[float] = []
            for h in range(c.num_heads):
                g = h // (c.num_heads // c.num_kv_heads)
                e = [math.exp(sum(a * b for a, b in zip(qs[t][h], ks[s][g], strict=True)) / math.sqrt(d))
                     for s in range(t + 1)]  # fmt: skip
                heads += [sum(e[s] * vs[s][g][i] for s in range(t + 1)) / sum(e) for i in range(d)]
            x = [a + b for a, b in zip(x, times(w["self_attn.o_proj.weight"], heads), strict=True)]
            h2 = norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps)
            gate, up = times(w["mlp.gate_proj.weight"], h2), times(w["mlp.up_proj.weight"], h2)
            inner = [a / (1 + math.exp(-a)) * b for a, b in zip(gate, up, strict=True)]
            xs[t] = [a + b for a, b in zip(x, times(w["mlp.down_proj.weight"], inner), strict=True)]
    head = p["model.embed_tokens.weight" if c.tie_embeddings else "lm_head.weight"]
    return [times(head, norm(x, p["model.norm.weight"], c.rms_norm_eps)) for x in xs]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"num_kv_heads": 2}])
def test_llama_against_plain_loops(changes: dict[str, object]) -> None:
    config = ModelConfig.from_dict({**TINY.to_dict(), **changes})
    p = weights(config)
    documents = [[1, 2, 3], [6, 0, 5, 4], [2]]
    sequences = [TokenSequence(np.array(ids), np.ones(len(ids))) for ids in documents]  # type: ignore[arg-type]
    batch = pack_rows([sequences[:2], sequences[2:]], 8)
    logits = llama_logits(p, config, RopeSpec(50.0), batch)
    assert logits.shape == (2, 8, 7)
    expected = [document_logits(p, config, 50.0, ids) for ids in documents]
    assert np.allclose(logits[0, :7], [*expected[0], *expected[1]], rtol=1e-12, atol=1e-13)
    assert np.allclose(logits[1, :1], expected[2], rtol=1e-12, atol=1e-13)


# -- the loss ----------------------------------------------------------------------------------------------------------

MIXED = ModelConfig.from_dict({**TINY.to_dict(), "vocabulary": {"text_size": 3, "vision_size": 4, "vision_codes": 2}})


def batch_of(targets: list[int], loss_weights: list[float]) -> PackedBatch:
    n = len(targets)
    zeros = np.zeros((1, n), np.int32)
    return PackedBatch(zeros, np.array([targets]), np.ones_like(zeros), zeros, np.array([loss_weights]))  # type: ignore[arg-type]


def test_modality_loss_by_hand() -> None:
    """Softmax over the target's own slice, weighted mean a modality, α over modalities."""
    logits = np.log(np.array([[[1.0, 2, 1, 90, 90, 90, 90], [1, 1, 2, 90, 90, 90, 90], [90, 90, 90, 1, 1, 5, 1],
                               [7, 7, 7, 7, 7, 7, 7]]]))  # fmt: skip
    batch = batch_of([1, 0, 5, 2], [1.0, 3.0, 2.0, 0.0])
    loss, means = modality_loss(logits, MIXED, batch, {"text": 0.5, "vision": 0.25})
    text = (1.0 * math.log(4 / 2) + 3.0 * math.log(4 / 1)) / 4.0
    vision = math.log(8 / 5)
    assert means == pytest.approx({"text": text, "vision": vision}, rel=1e-14)
    assert loss == pytest.approx(0.5 * text + 0.25 * vision, rel=1e-14)


def test_an_absent_modality_gives_zero() -> None:
    loss, means = modality_loss(np.zeros((1, 1, 7)), MIXED, batch_of([0], [1.0]), {"text": 0.5, "vision": 0.5})
    assert means["vision"] == 0.0
    assert loss == pytest.approx(0.5 * math.log(3), rel=1e-14)


def test_huge_logits_give_a_finite_loss() -> None:
    logits = np.zeros((1, 1, 7))
    logits[0, 0, 1] = 1e4
    assert modality_loss(logits, MIXED, batch_of([0], [1.0]), {"text": 1.0})[0] == pytest.approx(1e4)
