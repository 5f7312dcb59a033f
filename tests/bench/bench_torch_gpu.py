"""What the parts of ``attention-gpu-torch`` share: what a part is, the clock, and the best whole call of torch.

Shapes: B batch, S sequence, H query heads, K key-value heads, D head dim; B is 1.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from lwm_core.errors import LwmError
from lwm_torch_ring.attention.kernels.contract import Kernel
from lwm_torch_ring.attention.options import AttentionOptions
from lwm_torch_ring.attention.strategies import choose_kernel, make_kernel

KINDS = ("forward", "forward+backward")
BACKWARD_FACTOR = 3.5
"""Forward+backward over forward: 2 matrix products forward, 5 backward (the scores are computed again)."""


class Figure(NamedTuple):
    """One line of the table: what, the measured value, what is aimed at (empty: nothing)."""

    what: str
    value: str
    aim: str = ""


@dataclass(frozen=True)
class Setting:
    """Where and how a part runs.

    Args:
        device: an NVIDIA GPU, or with ``small`` a CPU.
        small: a tiny case, once: shows that it runs.
        kernel: the plugin's option ``kernel``.
        rounds: how often each side is timed.
        console: for progress.
        dtype: of what is computed; the small case goes through both, a GPU through bfloat16.
    """

    device: torch.device
    small: bool
    kernel: str
    rounds: int
    console: Console
    dtype: torch.dtype = torch.bfloat16

    @property
    def dtype_name(self) -> str:
        """As options have it."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> float:
        """Relative L2 distance within which two sides compute the same thing."""
        return 1e-4 if self.dtype == torch.float32 else 2e-2

    def kernel_of(self, head_dim: int) -> tuple[Kernel, list[str]]:
        """The plugin's kernel and what is said of its choice."""
        options = AttentionOptions(kernel=self.kernel, chunk=32 if self.small else AttentionOptions().chunk)
        name, notes = choose_kernel(options, self.device, self.dtype, head_dim)
        return make_kernel(options, self.device, self.dtype, head_dim), [f"kernel {name}", *notes]


@dataclass(frozen=True)
class Part:
    """A measurement that stands for itself: ``--only NAME`` runs it alone, in less than nine minutes.

    Args:
        name: of ``--only``, and of its place in the result.
        what: in one line.
        measure: what is found, as JSON has it.
        figures: the lines of the table, of what was found.
        kept: told what was found once it is written, to remove what was put away to go on with.
    """

    name: str
    what: str
    measure: Callable[[Setting], dict[str, Any]]
    figures: Callable[[dict[str, Any]], list[Figure]]
    kept: Callable[[Setting, dict[str, Any]], None] = field(default=lambda setting, found: None)


@dataclass(frozen=True)
class Heads:
    """The shape of the model's attention."""

    query: int = 32
    key_value: int = 8
    dim: int = 128

    def flops(self, squares: int, kind: str) -> float:
        """Causal operations where the squares of the documents' lengths add up to ``squares``: half of 4·L²·H·D."""
        return 2.0 * squares * self.query * self.dim * (1.0 if kind == "forward" else BACKWARD_FACTOR)


SMALL_HEADS = Heads(4, 2, 16)


def random_inputs(setting: Setting, heads: Heads, seq_len: int) -> tuple[Tensor, ...]:
    """q, k, v and dout ``[1,S,·,D]``, standard normal, natural order; the same for the same arguments."""
    generator = torch.Generator(setting.device).manual_seed(0)
    counts = (heads.query, heads.key_value, heads.key_value, heads.query)
    return tuple(
        torch.randn(1, seq_len, count, heads.dim, generator=generator, device=setting.device, dtype=setting.dtype)
        for count in counts
    )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, until the device is done."""
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(sides: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round and side after one round unmeasured; who goes first changes."""
    names, times = list(sides), {name: list[float]() for name in sides}
    for number in range(rounds + 1):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            once = seconds(sides[name], device)
            if number:
                times[name].append(once)
    return times


def ratio(ours: list[float], other: list[float]) -> float:
    """How fast ours is against the other: the median of the rounds."""
    return statistics.median(b / a for a, b in zip(ours, other, strict=True))


def rate(flops: float, times: list[float]) -> str:
    """TFLOP/s of the median time."""
    return f"{flops / statistics.median(times) / 1e12:.3g} TFLOP/s"


def distance(got: Tensor, expected: Tensor) -> float:
    """Relative L2; in float32, a piece at a time."""
    above = below = 0.0
    pieces = (x.detach().flatten().split(2**26) for x in (got, expected))
    for a, b in zip(*pieces, strict=True):
        above += float((a.float() - b.float()).square().sum(dtype=torch.float64))
        below += float(b.float().square().sum(dtype=torch.float64))
    return float((above / below) ** 0.5)


def check(name: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...], setting: Setting) -> dict[str, float]:
    """The distances of results; raises LwmError where they are not the same computation."""
    found = {
        result: distance(a, b)
        for result, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=False)
    }  # fmt: skip
    for result, error in found.items():
        if not error < setting.tolerance:  # so that NaN fails too
            raise LwmError(
                f"attention-gpu-torch: {name}: {result} is {error:.1e} (relative L2) from torch's own; expected less "
                f"than {setting.tolerance:.0e}, so there is nothing to compare"
            )
    return found


@dataclass(frozen=True)
class Whole:
    """One call of ``scaled_dot_product_attention`` in one of the ways to make it.

    Args:
        backend: of torch.
        heads_first: whether tensors are ``[1,H,S,D]`` in memory, or views of ``[1,S,H,D]``.
        grouped: whether the operator is given K key-value heads, or H of which some are copies.
    """

    backend: SDPBackend
    heads_first: bool
    grouped: bool

    @property
    def name(self) -> str:
        """In words."""
        order = "heads first" if self.heads_first else "tokens first"
        return f"{self.backend.name.lower()}, {order}, {'grouped' if self.grouped else 'repeated'} heads"

    def arranged(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        """``[1,S,·,D]`` as this way wants it, ready for gradients."""
        if not self.grouped:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        turned = (x.transpose(1, 2) for x in (q, k, v, dout))
        q, k, v, dout = (x.contiguous() if self.heads_first else x for x in turned)
        return *(x.detach().requires_grad_() for x in (q, k, v)), dout

    def run(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, kind: str) -> tuple[Tensor, ...]:
        """out, and where the kind says so the gradients, heads first."""
        with sdpa_kernel(self.backend), torch.set_grad_enabled(kind != "forward"):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return (out,) if kind == "forward" else (out, *torch.autograd.grad(out, (q, k, v), dout))


def ways(device: torch.device) -> list[Whole]:
    """All ways to make the whole call; on a CPU, plain operations stand for cuDNN."""
    other = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    flags = ((False, True), (True, True), (False, False), (True, False))
    return [Whole(backend, *pair) for backend in (SDPBackend.FLASH_ATTENTION, other) for pair in flags]


def best_whole(arrays: tuple[Tensor, ...], kind: str, setting: Setting) -> tuple[Whole, dict[str, float | str]]:
    """The fastest way for these inputs ``[1,S,·,D]``, each tried twice after a warm-up, and what was found of all.

    Raises:
        LwmError: this torch refuses every one.
    """
    found: dict[str, float | str] = {}
    fastest: tuple[float, Whole] | None = None
    for way in ways(setting.device):
        given = way.arranged(*arrays)

        def run(way: Whole = way, given: tuple[Tensor, ...] = given) -> object:
            return way.run(*given, kind)

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend is refused is warned of line by line
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            found[way.name] = f"refused: {str(error).splitlines()[0]}"
            continue
        least = min(seconds(run, setting.device) for _ in range(2))
        found[way.name] = least
        if fastest is None or least < fastest[0]:
            fastest = least, way
    if fastest is None:
        raise LwmError(f"attention-gpu-torch: torch {torch.__version__} refuses every whole call: {found}")
    return fastest[1], found
