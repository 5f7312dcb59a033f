"""Which pydantic models may stand at a key path: looked up from annotations, without importing pydantic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from lwm_core.config.document import KeyPath

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model by the names that files use: the alias where there is one."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that the annotations allow for the table at ``path``; empty where it is no model's table."""
    return [found for found in _annotations(model, path) if _is_model(found)]


def field_at(model: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """The field at ``path``, or ``None`` where there is none."""
    if not path or not isinstance(path[-1], str):
        return None
    for parent in models_at(model, path[:-1]):
        if path[-1] in fields_of(parent):
            return fields_of(parent)[path[-1]]
    return None


def nested_models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The models of the tables directly inside ``model`` by key; lists of tables are left out."""
    for key, info in fields_of(model).items():
        for found in _alternatives(info.annotation):
            if _is_model(found):
                yield key, found


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and hasattr(annotation, "model_fields")


def _annotations(model: type[BaseModel], path: KeyPath) -> list[Any]:
    found: list[Any] = [model]
    for part in path:
        found = [inner for one in found for inner in _inside(one, part)]
    return found


def _inside(annotation: Any, part: str | int) -> list[Any]:
    """What the annotation says of its key or item ``part``."""
    if _is_model(annotation):
        info = fields_of(annotation).get(str(part))
        return _alternatives(info.annotation) if info is not None else []
    arguments = [argument for argument in get_args(annotation) if argument is not Ellipsis]
    return _alternatives(arguments[-1]) if arguments else []


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union (``X | None`` → ``X``, ``None``), or the annotation alone; ``Annotated`` is undone."""
    if hasattr(annotation, "__metadata__"):
        return _alternatives(annotation.__origin__)
    if _is_union(annotation):
        return [inner for argument in get_args(annotation) for inner in _alternatives(argument)]
    return [annotation]


def _is_union(annotation: Any) -> bool:
    return type(annotation).__name__ in ("UnionType", "_UnionGenericAlias", "Union")
