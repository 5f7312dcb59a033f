"""The schedule ``progressive``: each stage is longer than, and starts from, the one before.

LWM grows 4K to 1M in five stages this way (arXiv 2402.08268, section 3.1), each with a larger RoPE theta: most of the
training then runs on rows that are short and cheap, and every stage has little left to learn.
"""

from __future__ import annotations

from lwm_context.options import NoScaling, ProgressiveOptions
from lwm_context.stages import stage_lengths, stage_tables
from lwm_core.config import StageTable
from lwm_core.errors import ConfigError
from lwm_core.protocols import Stage, StartModel
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import SCALINGS, base_bound_theta


def progressive(options: ProgressiveOptions, start: StartModel) -> tuple[Stage, ...]:
    """The factory of ``lwm.context.v1``.

    Args:
        options: what the configuration says.
        start: the model begun from; its length and RoPE stand in for what the options leave out. A model of unknown
            RoPE (one that has just been initialised) counts as plain RoPE of theta 10000.

    Raises:
        ConfigError: the options do not fit together or to the model; every mistake of the stages at once.
    """
    try:
        lengths = stage_lengths(options, start.seq_len)
        tables = stage_tables(options, lengths)
        ropes = [_rope(options, stage, length, start) for stage, length in enumerate(lengths)]
    except ConfigError as error:
        raise ConfigError([f"context 'progressive': {line}" for line in error.problems]) from error
    return tuple(_stage(table, rope) for table, rope in zip(tables, ropes, strict=True))


def _stage(table: StageTable, rope: RopeSpec) -> Stage:
    return Stage(
        name=table.name,
        seq_len=table.seq_len,
        rope=rope,
        tokens=table.tokens,
        batch_tokens=table.batch_tokens,
        lr=table.lr,
        min_lr=0.1 * table.lr if table.min_lr is None else table.min_lr,
        lr_schedule=table.lr_schedule,
        warmup_steps=table.warmup_steps,
        accumulate=table.accumulate,
        mesh=table.mesh,
        mix=table.mix,
    )


def _rope(options: ProgressiveOptions, stage: int, length: int, start: StartModel) -> RopeSpec:
    """The stage's RoPE from its theta, or rule for it, and its scaling."""
    begun = start.rope or RopeSpec()
    theta, scaling = options.at("theta", stage), options.at("scaling", stage)
    if theta is None:
        theta = "ntk" if scaling is None else "keep"
    if theta == "keep" and scaling is None:
        return begun
    if scaling is None and (begun.factors is not None or begun.attention_factor != 1.0):
        raise ConfigError(
            f"theta = {theta!r}: the start model's frequencies are scaled already, and a new theta alone would undo "
            "that; set theta = 'keep', or a scaling ({name = 'none'} for plain RoPE)"
        )
    if theta in ("ntk", "base-bound") and scaling is not None and not isinstance(scaling, NoScaling):
        raise ConfigError(
            f"theta = {theta!r} and scaling {scaling.name!r} both stretch the frequencies; use one of them"
        )
    if theta == "ntk":
        stretch = max(1.0, length / _original(options, start, "theta = 'ntk'"))
        return SCALINGS["ntk"](begun.theta, start.model.head_dim, factor=stretch)
    if theta == "base-bound":
        return RopeSpec(max(begun.theta, base_bound_theta(length)))
    return _scaled(options, stage, length, start, begun.theta if theta == "keep" else float(theta))


def _scaled(options: ProgressiveOptions, stage: int, length: int, start: StartModel, theta: float) -> RopeSpec:
    scaling = options.at("scaling", stage)
    if scaling is None or isinstance(scaling, NoScaling):
        return RopeSpec(theta)
    parameters = scaling.model_dump(exclude={"name"})
    reason = f"scaling {scaling.name!r}"
    needs_original = scaling.name in ("yarn", "llama3") or scaling.factor is None
    if needs_original and scaling.original is None:
        parameters["original"] = _original(options, start, reason)
    if scaling.factor is None:
        parameters["factor"] = max(1.0, length / parameters["original"])
    if scaling.name in ("linear", "ntk"):
        del parameters["original"]
    return SCALINGS[scaling.name](theta, start.model.head_dim, **parameters)


def _original(options: ProgressiveOptions, start: StartModel, reason: str) -> int:
    """The length that stretching is measured from."""
    length = start.seq_len if options.from_ is None else options.from_
    if length is None:
        raise ConfigError(
            f"from: {reason} measures from the length that the start model was trained at, which is not known; "
            "set from = N"
        )
    return length
