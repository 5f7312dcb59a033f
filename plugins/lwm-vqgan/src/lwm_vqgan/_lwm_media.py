"""Files in and out, in words: what other verbs read and write them with, and the verbs; nothing heavy is imported."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

files = PluginSpec(
    name="files",
    summary="Pictures and video by PyAV and Pillow; writes png, mp4 and gif",
    factory="lwm_vqgan.media.plugin:files",
    needs=("av", "PIL"),
)

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
