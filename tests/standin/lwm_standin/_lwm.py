"""The specs; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

trainer = PluginSpec(
    name="standin",
    summary="A log-bilinear bigram model under SGD with momentum",
    factory="lwm_standin.trainer:StandinTrainer",
    options="lwm_standin.options:TrainerOptions",
)

attention = PluginSpec(
    name="standin",
    summary="Layouts without any attention",
    factory="lwm_standin.attention:factory",
    options="lwm_standin.options:AttentionOptions",
    capabilities={"masks": ("causal",), "gqa": True},
)

foreign = PluginSpec(
    name="foreign",
    summary="The same under another framework's flag",
    factory="lwm_standin.attention:factory",
    framework="torch",
    capabilities={"masks": ("causal",), "gqa": True},
)

framed = PluginSpec(
    name="framed",
    summary="The trainer under a framework's flag",
    factory="lwm_standin.trainer:StandinTrainer",
    options="lwm_standin.options:TrainerOptions",
    framework="jax",
)

encoder = PluginSpec(
    name="patches",
    summary="A code a frame: its mean brightness",
    factory="lwm_standin.patches:Patches",
    options="lwm_standin.options:PatchesOptions",
)

torch_encoder = PluginSpec(
    name="torch-patches",
    summary="The same under another framework's flag",
    factory="lwm_standin.patches:Patches",
    options="lwm_standin.options:PatchesOptions",
    framework="torch",
    priority=5,
)

evals = PluginSpec(
    name="tally",
    summary="Scores a fixed text, sample by sample, and continues what was interrupted",
    factory="lwm_standin.tally:Tally",
    options="lwm_standin.options:TallyOptions",
)

glance = PluginSpec(
    name="glance",
    summary="What a white frame becomes, by the run's encoder",
    factory="lwm_standin.glance:Glance",
    options="lwm_standin.options:GlanceOptions",
    capabilities={"encoder": True},
)

coded = PluginSpec(
    name="coded",
    summary="The core's texts, and it says that codes are trained on too",
    factory="lwm_standin.glance:Coded",
    options="lwm_standin.options:CodedOptions",
)

hooks = PluginSpec(
    name="scribe",
    summary="Writes down which hooks it heard",
    factory="lwm_standin.scribe:Scribe",
)

schedule = PluginSpec(
    name="doubling",
    summary="Stages of twice the length each",
    factory="lwm_standin.doubling:schedule",
    options="lwm_standin.options:DoublingOptions",
)

weights = PluginSpec(
    name="standin-base",
    summary="The model in the folder that STANDIN_BASE names",
    factory="lwm_standin.doubling:bundle",
)

verb = PluginSpec(
    name="greet",
    summary="A verb of a plugin's own",
    factory="lwm_standin.greet:add_parser",
)
