"""What this distribution offers; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry import PluginSpec

hf = PluginSpec(
    name="hf",
    summary="Hugging Face tokenizers: a tokenizer.json, or a byte-level BPE trained on the corpus",
    factory="lwm_hf.tokenizer:hf_tokenizer",
    options="lwm_hf.options:HfTokenizerOptions",
    needs=("tokenizers",),
)

import_model = PluginSpec(
    name="import",
    summary="A model folder from a Hugging Face Llama, or from LWM's own release",
    factory="lwm_hf.interchange.commands:add_import",
)

export_model = PluginSpec(
    name="export",
    summary="A run's model as a folder that transformers reads",
    factory="lwm_hf.interchange.commands:add_export",
)
