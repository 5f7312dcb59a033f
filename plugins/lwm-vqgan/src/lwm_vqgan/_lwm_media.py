"""The verbs of this distribution, in words; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

encode = PluginSpec(
    name="encode",
    summary="Pictures and video to shards of codes, resumable",
    factory="lwm_vqgan.encode_verb:add_encode",
    needs=("av", "PIL"),
)

decode = PluginSpec(
    name="decode",
    summary="Codes back to mp4, gif or png",
    factory="lwm_vqgan.decode_verb:add_decode",
    needs=("av", "PIL"),
)
