"""The GPU kernels' operators in plain torch on a CPU: what they are documented to give, their traps included.

An operator of aten is taken with exactly what its own schema takes: arguments are bound by it, the operator itself runs
on meta tensors of the same shapes and strides, and what is computed here must have the shapes and dtypes that it gives.
FlashAttention-3's functions have the arguments of the published package.

Shapes: B rows, c queries and t keys, Q queries and T keys of all sequences, H query heads, K key-value
heads, D head dim.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lwm_torch_ring.attention.kernels import aten

FLASH, CUDNN, VARLEN = "_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention", "_flash_attention"


def _scores(q: Tensor, k: Tensor, scale: float, causal: str) -> Tensor:
    """``[H,c,t]`` of ``q [H,c,D]`` and ``k [K,t,D]``; causal: none, top-left, bottom-right."""
    k = k.repeat_interleave(len(q) // len(k), 0).to(q)
    scores = q @ k.transpose(1, 2) * scale
    if causal:
        count, keys = scores.shape[1:]
        seen = torch.ones(count, keys, dtype=torch.bool).tril_(keys - count if causal == "bottom-right" else 0)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.float64) for x in tensors]


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: str) -> tuple[Tensor, Tensor]:
    """out ``[H,c,D]`` in q's dtype and natural-log lse ``[H,c]`` float32; +inf, as FlashAttention-2 has it, and out 0
    where a query sees nothing."""
    wide, k, v = _wide(q, k, v)
    scores = _scores(wide, k, scale, causal)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse.isneginf(), torch.inf)
    out = (scores - lse[..., None]).exp() @ v.repeat_interleave(len(q) // len(v), 0)
    return out.to(q.dtype), lse.float()


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, causal: str
) -> list[Tensor]:
    """dq, dk and dv in the dtype of q, by out and lse of all keys (arXiv 2307.08691, section 3.1.2)."""
    dtype, group = q.dtype, len(q) // len(k)
    dout, q, k, v, out, lse = _wide(dout, q, k, v, out, lse)
    weights = (_scores(q, k, scale, causal) - lse[..., None]).exp()
    delta = (out * dout).sum(-1, keepdim=True)
    dscores = weights * (dout @ v.repeat_interleave(group, 0).transpose(1, 2) - delta) * scale
    dk, dv = dscores.transpose(1, 2) @ q, weights.transpose(1, 2) @ dout
    found = dscores @ k.repeat_interleave(group, 0), *(x.unflatten(0, (-1, group)).sum(1) for x in (dk, dv))
    return [x.to(dtype) for x in found]


def _check(q: Tensor, k: Tensor, v: Tensor, *others: Tensor, exact: bool, largest: int) -> None:
    dtypes = {x.dtype for x in (q, k, v, *others)}
    assert dtypes == {torch.bfloat16} or exact, f"a GPU kernel computes in bfloat16, got {dtypes}"
    assert len(dtypes) == 1, f"the kernels take one dtype, got {dtypes}"
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= largest
    assert all(x.stride(-1) == 1 for x in (q, k, v)), "the last dimension must be contiguous"


def _by_rows(run: Any, *tensors: Tensor) -> list[Tensor]:
    """``run`` for each row, its results stacked."""
    return [torch.stack(parts) for parts in zip(*(run(*row) for row in zip(*tensors, strict=True)), strict=True)]


def _by_spans(run: Any, q_edges: Tensor, k_edges: Tensor, longest: tuple[int, int], queries: list[Tensor],
              keys: list[Tensor]) -> list[tuple[Any, ...]]:  # fmt: skip
    """``run(queries, keys)`` for each sequence, heads first; ``[Q,H,...]`` and ``[T,K,...]`` in."""
    for edges, held, most in zip((q_edges, k_edges), (queries, keys), longest, strict=True):
        assert edges.dtype == torch.int32 and edges.is_contiguous() and int(edges[0]) == 0
        assert int(edges[-1]) == len(held[0]) and int(edges.diff().max()) <= most, "sequences end elsewhere"
    assert len(q_edges) == len(k_edges)
    bounds = zip(pairwise(q_edges.tolist()), pairwise(k_edges.tolist()), strict=True)
    return [
        run([x[a:b].transpose(0, 1) for x in queries], [x[c:d].transpose(0, 1) for x in keys])
        for (a, b), (c, d) in bounds
    ]


def _joined(parts: list[tuple[Any, ...]]) -> list[Tensor]:
    """``[H,c,...]`` of each sequence → ``[Q,H,...]``."""
    return [torch.cat([x.transpose(0, 1) for x in place]) for place in zip(*parts, strict=True)]


class Interpreter:
    """Stands for ``aten._op``.

    Args:
        exact: takes float32 too, so that logic can be told from rounding.
        lse_dims: of cuDNN's lse; 3 plays the versions of torch without its last dimension.

    Attributes:
        calls: how often each operator was called.
    """

    def __init__(self, exact: bool = False, lse_dims: int = 4) -> None:
        self.exact, self.lse_dims, self.calls = exact, lse_dims, Counter[str]()
        self._real, self._plans = aten._op, dict[Any, Any]()

    def __call__(self, name: str) -> Any:
        own = getattr(self, name.removeprefix("_scaled_dot_product"), None)
        return self._real(name) if own is None else lambda *args, **named: self._run(name, own, args, named)

    def cache_clear(self) -> None:
        """As the function it stands for."""

    def _run(self, name: str, own: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        operator = getattr(torch.ops.aten, name).default
        known = [argument.name for argument in operator._schema.arguments]
        assert set(named) <= set(known) and len(args) <= len(known), f"{name} takes {known}"
        positional = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
        given = dict(zip(positional, args, strict=False))
        assert len(args) <= len(positional) and not set(given) & set(named), f"{name} takes {known}"
        given |= named
        found = own(**given)
        told = {key: self._meta(value) for key, value in given.items()}
        if name == f"{CUDNN}_backward" and self.lse_dims == 3:
            told["logsumexp"] = told["logsumexp"][..., None]
        expected = operator(*(told[key] for key in positional if key in told), **{k: told[k] for k in named})
        for place, (mine, theirs) in enumerate(zip(found, expected, strict=False)):
            if place == 1 and name == CUDNN and self.lse_dims == 3:
                theirs = theirs.squeeze(3)
            assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, (name, place, mine.shape, theirs.shape)
        self.calls[name] += 1
        return found

    @staticmethod
    def _meta(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    # -- FlashAttention-2 --------------------------------------------------------------------------------------------

    def _flash_attention(self, query: Any, key: Any, value: Any, dropout_p: float, is_causal: bool,
                         return_debug_mask: bool, scale: float | None = None) -> Any:  # fmt: skip
        _check(query, key, value, exact=self.exact, largest=256)
        assert dropout_p == 0.0 and not return_debug_mask
        causal = "bottom-right" if is_causal else ""
        return _by_rows(lambda q, k, v: forward(q, k, v, scale, causal), query, key, value)

    def _flash_attention_backward(self, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any,
                                  cum_seq_q: Any, cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float,
                                  is_causal: bool, philox_seed: Any = None, philox_offset: Any = None,
                                  rng_state: Any = None, unused: Any = None,
                                  scale: float | None = None) -> Any:  # fmt: skip
        _check(query, key, value, out, grad_out, exact=self.exact, largest=256)
        assert dropout_p == 0.0 and logsumexp.dtype == torch.float32 and logsumexp.is_contiguous()
        causal = "bottom-right" if is_causal else ""
        if cum_seq_q is None:
            assert (max_q, max_k) == (query.shape[2], key.shape[2])
            return _by_rows(lambda *row: backward(*row, scale, causal), grad_out, query, key, value, out, logsumexp)
        queries = [grad_out, query, out, logsumexp.transpose(0, 1)]
        return _joined(_by_spans(
            lambda q, k: backward(q[0], q[1], *k, q[2], q[3], scale, causal),
            cum_seq_q, cum_seq_k, (max_q, max_k), queries, [key, value],
        ))  # fmt: skip

    def _flash_attention_forward(self, query: Any, key: Any, value: Any, cum_seq_q: Any, cum_seq_k: Any, max_q: int,
                                 max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool,
                                 scale: float | None = None) -> Any:  # fmt: skip
        _check(query, key, value, exact=self.exact, largest=256)
        causal = "bottom-right" if is_causal else ""
        out, lse = _joined(_by_spans(
            lambda q, k: forward(q[0], *k, scale, causal), cum_seq_q, cum_seq_k, (max_q, max_k), [query], [key, value]
        ))  # fmt: skip
        kv_heads = key.shape[1]
        if max_q == 1 and query.shape[1] > kv_heads:  # groups are played as queries, and lse left in their order
            return out, lse.unflatten(1, (kv_heads, -1)).transpose(0, 1).reshape(query.shape[1], -1)
        return out, lse.transpose(0, 1).contiguous()

    # -- cuDNN -------------------------------------------------------------------------------------------------------

    def _plan(self, way: str, keyed: tuple[Tensor, ...], causal: bool, read: tuple[Tensor, ...]) -> None:
        """torch keeps a plan by these, with the strides of all that it first met."""

        def strides(x: Tensor) -> tuple[int, ...]:
            return tuple(step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1)

        met = tuple(map(strides, read))
        key = way, causal, *((x.shape, x.stride()) for x in keyed)
        assert self._plans.setdefault(key, met) == met, "cuDNN's plan would read out or dout by other strides"

    def _cudnn_attention(self, query: Any, key: Any, value: Any, attn_bias: Any, compute_log_sumexp: bool,
                         dropout_p: float, is_causal: bool, return_debug_mask: bool,
                         scale: float | None = None) -> Any:  # fmt: skip
        _check(query, key, value, exact=True, largest=128)
        assert attn_bias is None and compute_log_sumexp and dropout_p == 0.0 and key.shape[2] > 1
        causal = "top-left" if is_causal else ""
        out, lse = _by_rows(lambda q, k, v: forward(q, k, v, scale, causal), query, key, value)
        return out, lse[..., None] if self.lse_dims == 4 else lse

    def _cudnn_attention_backward(self, grad_out: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any,
                                  philox_seed: Any, philox_offset: Any, attn_bias: Any, cum_seq_q: Any, cum_seq_k: Any,
                                  max_q: int, max_k: int, dropout_p: float, is_causal: bool,
                                  scale: float | None = None) -> Any:  # fmt: skip
        _check(query, key, value, out, grad_out, exact=self.exact, largest=128)
        assert cum_seq_q is cum_seq_k is attn_bias is None and dropout_p == 0.0 and logsumexp.is_contiguous()
        assert (max_q, max_k) == (query.shape[2], key.shape[2]) and logsumexp.ndim == self.lse_dims
        self._plan("backward", (query, key, value), is_causal, (out, grad_out, logsumexp))
        lse, causal = logsumexp.reshape(query.shape[:3]), "top-left" if is_causal else ""
        return _by_rows(lambda *row: backward(*row, scale, causal), grad_out, query, key, value, out, lse)


def flash3(older: bool = False, exact: bool = False) -> ModuleType:
    """``flash_attn_interface``: with today's arguments, or those of its first betas, which had fewer defaults."""
    module = ModuleType("flash_attn_interface")

    def run_forward(q: Any, k: Any, v: Any, edges: tuple[Any, Any], most: tuple[Any, Any], scale: float,
                    causal: bool) -> Any:  # fmt: skip
        _check(q, k, v, exact=exact, largest=256)
        side = "bottom-right" if causal else ""
        if edges[0] is None:
            out, lse = _by_rows(lambda *row: forward(*row, scale, side), *(x.transpose(1, 2) for x in (q, k, v)))
            return out.transpose(1, 2), lse, torch.empty(0), torch.empty(0)
        out, lse = _joined(_by_spans(lambda q, k: forward(q[0], *k, scale, side), *edges, most, [q], [k, v]))
        return out, lse.transpose(0, 1).contiguous(), torch.empty(0), torch.empty(0)

    def run_backward(given: tuple[Any, ...], into: tuple[Any, ...], edges: tuple[Any, Any], most: tuple[Any, Any],
                     scale: float, causal: bool) -> Any:  # fmt: skip
        dout, q, k, v, out, lse = given
        _check(q, k, v, dout, out, exact=exact, largest=256)
        assert lse.is_contiguous() and all(x.is_contiguous() for x in into)
        side = "bottom-right" if causal else ""
        if edges[0] is None:
            heads_first = *(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse
            found = [x.transpose(1, 2) for x in _by_rows(lambda *row: backward(*row, scale, side), *heads_first)]
        else:
            found = _joined(_by_spans(
                lambda a, b: backward(a[0], a[1], *b, a[2], a[3], scale, side), *edges, most,
                [dout, q, out, lse.transpose(0, 1)], [k, v],
            ))  # fmt: skip
        for place, gradient in zip(into, found, strict=True):
            place.copy_(gradient)
        return torch.empty(0)

    def today_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None,
        sm_margin=0,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        edges, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_forward(q, k, v, edges, most, softmax_scale, causal)

    def today_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        edges, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), edges, most, softmax_scale, is_causal)

    def older_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        edges, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_forward(q, k, v, edges, most, softmax_scale, causal)

    def older_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, deterministic=False, sm_margin=0,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        edges, most = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return run_backward((dout, q, k, v, out, softmax_lse), (dq, dk, dv), edges, most, softmax_scale, causal)

    module._flash_attn_forward = older_forward if older else today_forward  # type: ignore[attr-defined]
    module._flash_attn_backward = older_backward if older else today_backward  # type: ignore[attr-defined]
    return module
