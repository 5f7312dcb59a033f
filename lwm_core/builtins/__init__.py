"""The plugins that the core ships itself, so that core and one trainer are enough to train. Nothing heavy here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

bytes_tokenizer = PluginSpec(
    name="bytes",
    summary="UTF-8 bytes as ids, with bos, eos and pad after them; nothing to train or to ship",
    factory="lwm_core.builtins.byte_tokens:build",
)

text_file = PluginSpec(
    name="text-file",
    summary="one plain text file, cut at random into rows of the stage's length",
    factory="lwm_core.builtins.text_rows:build",
    options="lwm_core.builtins.text_rows:TextFileOptions",
)
