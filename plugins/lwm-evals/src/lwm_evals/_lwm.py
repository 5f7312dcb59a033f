"""What this distribution offers, in words; nothing heavy is imported here."""

from __future__ import annotations

from lwm_core.registry.spec import PluginSpec

needle = PluginSpec(
    name="needle",
    summary="Needle retrieval over depths and lengths, single and N/R multi, on held-out text, cities and numbers",
    factory="lwm_evals.needle:NeedleSuite",
    options="lwm_evals.options:NeedleOptions",
)

video_needle = PluginSpec(
    name="video-needle",
    summary="A picture hidden in a long video at known depths, asked about at its end; nothing to download",
    factory="lwm_evals.video_needle:VideoNeedleSuite",
    options="lwm_evals.options:VideoNeedleOptions",
    capabilities={"encoder": True},
)

video_loss = PluginSpec(
    name="video-loss",
    summary="Loss of a video's next frame by how many frames stand before it",
    factory="lwm_evals.video_loss:VideoLossSuite",
    options="lwm_evals.options:VideoLossOptions",
)

video_continuation = PluginSpec(
    name="video-continuation",
    summary="A clip that the model continues, beside what really follows: frames, codes and PSNR",
    factory="lwm_evals.video_continuation:VideoContinuationSuite",
    options="lwm_evals.options:VideoContinuationOptions",
    needs=("PIL",),
    capabilities={"encoder": True},
)

reconstruction = PluginSpec(
    name="reconstruction",
    summary="What the run's encoder keeps of pictures: PSNR, SSIM, use of the codebook, before and after",
    factory="lwm_evals.reconstruction:ReconstructionSuite",
    options="lwm_evals.options:ReconstructionOptions",
    needs=("PIL",),
    capabilities={"encoder": True},
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
