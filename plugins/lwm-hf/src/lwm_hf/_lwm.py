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
