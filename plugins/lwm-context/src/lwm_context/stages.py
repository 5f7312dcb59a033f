"""From options to the tables of stages: their lengths, their values, and what is wrong with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lwm_context.options import PER_STAGE_KEYS, STAGE_KEYS
from lwm_core.config import StageTable, problems_from
from lwm_core.errors import ConfigError

if TYPE_CHECKING:
    from lwm_context.options import ProgressiveOptions


def stage_lengths(options: ProgressiveOptions, start_seq_len: int | None) -> list[int]:
    """Tokens a row of each stage.

    Raises:
        ConfigError: the length begun from is not known or not below ``to``, or the lengths shrink.
    """
    if options.lengths is not None:
        for before, after in zip(options.lengths, options.lengths[1:], strict=False):
            if after < before:
                raise ConfigError(f"lengths: {after} comes after {before}; expected lengths that never shrink")
        return list(options.lengths)
    assert options.to is not None  # the options have one of the two
    length = start_seq_len if options.from_ is None else options.from_
    if length is None:
        raise ConfigError("from: the length that the start model was trained at is not known; set from = N")
    if options.to <= length:
        raise ConfigError(f"to = {options.to} is not longer than the {length} tokens begun from; nothing to extend")
    lengths = []
    while length < options.to:
        length = min(length * (options.factor or 2), options.to)
        lengths.append(length)
    return lengths


def stage_tables(options: ProgressiveOptions, lengths: list[int]) -> list[StageTable]:
    """The stages as the configuration's own table has them, so that a mistake reads the same either way.

    Theta is left at its default where it follows from a rule.

    Raises:
        ConfigError: a list has not one value a stage, or a stage's values do not fit; all mistakes at once.
    """
    counts = [
        f"{key} has {len(value)} values for {len(lengths)} stages ({', '.join(map(length_name, lengths))}); "
        "give one for all or one for each"
        for key in (*PER_STAGE_KEYS, "names")
        if isinstance(value := getattr(options, key), list) and len(value) != len(lengths)
    ]
    if counts:
        raise ConfigError(counts)
    tables, problems = [], []
    for stage, name in enumerate(_names(options, lengths)):
        values: dict[str, Any] = {key: options.at(key, stage) for key in STAGE_KEYS}
        if not isinstance(theta := options.at("theta", stage), str | None):
            values["theta"] = theta
        try:
            tables.append(StageTable(name=name, seq_len=lengths[stage], **values))
        except ValidationError as error:
            problems += [f"{line} (stage {stage + 1}, {name})" for line in problems_from(error, StageTable, {})]
    if problems:
        raise ConfigError(problems)
    return tables


def length_name(length: int) -> str:
    """``32768`` → ``32K``, ``1048576`` → ``1M``; other lengths as they are."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length > 0 and length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def _names(options: ProgressiveOptions, lengths: list[int]) -> list[str]:
    """The stages' names; a length that comes again gets a number, so that no two are called the same."""
    if options.names is not None:
        twice = sorted({name for name in options.names if options.names.count(name) > 1})
        if twice:
            raise ConfigError(f"names: {', '.join(twice)} is given to more than one stage; expected different names")
        return options.names
    names: list[str] = []
    for stage, length in enumerate(lengths):
        again = lengths[:stage].count(length)
        names.append(length_name(length) + (f"-{again + 1}" if again else ""))
    return names
