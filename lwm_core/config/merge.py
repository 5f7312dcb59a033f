"""Deep merge of documents: tables merge, everything else replaces, and every value keeps its origin."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from lwm_core.config.document import Document, KeyPath, Origin, Origins, PluginTest, dotted, walk


def merge(base: Document, over: Document, plugin_table: PluginTest) -> Document:
    """``over`` laid on ``base``; neither is changed.

    Where both give a plugin's table and ``over`` names another plugin, the options that ``base`` gave are
    dropped, for they belong to the earlier plugin; a note says which.
    """
    merger = Merger(base, plugin_table)
    merger.table(merger.data, over.data, (), over.origins)
    return merger.document(over.name, over.notes)


class Merger:
    """A document that values are laid on, one after the other.

    Args:
        base: what to start from; it is copied.
        plugin_table: tells whether the table at a path is a plugin's ``{name, ...}``.
    """

    def __init__(self, base: Document, plugin_table: PluginTest) -> None:
        self.data: dict[str, Any] = deepcopy(base.data)
        self.origins: Origins = dict(base.origins)
        self.notes = list(base.notes)
        self._plugin_table = plugin_table

    def document(self, name: str, notes: tuple[str, ...] = ()) -> Document:
        """What has come of it."""
        return Document(name, self.data, self.origins, tuple(dict.fromkeys((*self.notes, *notes))))

    def table(self, node: dict[str, Any], over: dict[str, Any], path: KeyPath, origins: Origins) -> None:
        """Lay the table ``over`` on ``node``, the table at ``path``; ``origins`` knows every path of ``over``."""
        if path in origins:
            self.origins[path] = origins[path]
        if self._plugin_table(path):
            self._change_plugin(node, over, path, origins)
        for key, value in over.items():
            self.put(node, key, value, (*path, key), origins)

    def put(self, node: Any, key: str | int, value: Any, path: KeyPath, origins: Origins) -> None:
        """Set ``node[key]``, the value at ``path``, or merge into it where both are tables."""
        known = isinstance(key, int) or key in node
        if known and isinstance(node[key], dict) and isinstance(value, dict):
            self.table(node[key], value, path, origins)
            return
        self._forget(path)
        node[key] = deepcopy(value)
        self.origins.update((below, origins[below]) for below, _ in walk(value, path))

    def _forget(self, path: KeyPath) -> None:
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]

    def _change_plugin(self, node: dict[str, Any], over: dict[str, Any], path: KeyPath, origins: Origins) -> None:
        old, new = node.get("name"), over.get("name")
        if old is None or new is None or old == new:
            return
        by = origins[*path, "name"]
        dropped = self._drop(node, path, by)
        if dropped:
            names = ", ".join(dotted(gone[len(path) :]) for gone in dropped)
            where = f"{by}: {dotted(path)}"
            self.notes.append(f"{where}: {new!r} takes the place of {old!r}, whose options are dropped: {names}")

    def _drop(self, node: dict[str, Any], path: KeyPath, by: Origin) -> list[KeyPath]:
        """Remove the options that another source than ``by`` gave; all ``-s`` together are one source."""
        dropped: list[KeyPath] = []
        for key in list(node):
            below = (*path, key)
            if isinstance(node[key], dict) and node[key]:
                dropped += self._drop(node[key], below, by)
                if not node[key]:
                    self._forget(below)
                    del node[key]
            elif self.origins[below].source != by.source and below != (*path, "name"):
                dropped.append(below)
                self._forget(below)
                del node[key]
        return dropped
