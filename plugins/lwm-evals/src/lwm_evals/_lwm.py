"""What this distribution offers, in words; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

needle = PluginSpec(
    name="needle",
    summary="Needle retrieval over depths and lengths, single and N/R multi, on held-out text, cities and numbers",
    factory="lwm_evals.needle:NeedleSuite",
    options="lwm_evals.options:NeedleOptions",
)

report = PluginSpec(
    name="report",
    summary="One self-contained report.html of a run: losses, needle heat maps, samples, throughput, configuration",
    factory="lwm_evals.hooks:ReportHooks",
    needs=("jinja2", "matplotlib"),
)

score = PluginSpec(
    name="score",
    summary="How well a run's model predicts a long text in one context, by position",
    factory="lwm_evals.score_verb:add_score",
)
