"""``--explain``: every formula of a stage with its numbers filled in."""

from __future__ import annotations

from lwm_core.attention_cost import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from lwm_plan import memory as m
from lwm_plan import timing as t
from lwm_plan.plan import StagePlan, gib
from lwm_plan.stage_plan import Evaluated


def explain(one: StagePlan) -> list[str]:
    """Lines for a stage whose mesh divides; none for another."""
    found = one.chosen
    if found is None:
        return []
    return [*_memory(found), *_flops(found), *_time(found), *_reasons(one)]


def _memory(found: Evaluated) -> list[str]:
    placed, mem = found.placed, found.memory
    job, model, sizes, stage = placed.job, placed.job.model, placed.sizes, placed.stage
    tp, tokens = sizes["tp"], placed.tokens
    stream, query, key = m.units(placed)
    layer = sum(job.matrix_elements(tp).values())
    local, chunk = m.LOCAL_ARRAYS, min(tokens, job.token_chunk or tokens)
    lines = [
        f"T = rows · S / sp = {placed.rows} · {stage.seq_len} / {sizes['sp']} = {tokens} tokens a device",
        f"u = T·E/tp·{job.element_bytes} = {tokens}·{model.hidden_size}/{tp}·{job.element_bytes} = {gib(stream)} the "
        f"stream; {gib(query)} queries; {gib(key)} keys",
        f"parameters = 4·{model.parameter_count} / (tp {tp} · {'·'.join(job.shard_parameters)} {placed.sharing}), what "
        f"does not divide whole = {gib(mem.parameters)}",
        f"optimizer = 2 · parameters = {gib(mem.optimizer)}; gradients = {gib(mem.gradients)}",
        f"activations ({job.remat}) = L {model.num_layers} layers, {gib(mem.activations // model.num_layers)} each = "
        f"{gib(mem.activations)}" + (f", and {gib(mem.host)} in the host's memory" if mem.host else ""),
        f"gathered = a layer's share of tp, 4·{layer}, + parameters = {gib(mem.gathered)}",
        f"working = {local.stream} streams + {local.query} queries + {local.key} keys + {chunk} tokens · "
        f"({m.FEED_FORWARD_ARRAYS}·F/tp + E)·{job.element_bytes} + T·D·4 = {gib(mem.working)}",
        f"attention ({found.strategy} over {sizes['sp']}) = {gib(mem.attention)}",
        f"logits = {min(tokens, job.loss_chunk)} tokens · V {model.vocabulary.size} / tp {tp} · 4 = {gib(mem.logits)}",
        f"batch = 5·4·T·{stage.accumulate} = {gib(mem.batch)}; program = {gib(mem.program)}",
        f"total = {gib(mem.total)} of {gib(found.machine.device.memory)} ({found.machine.device.source})",
    ]
    return [f"memory: {line}" for line in lines]


def _flops(found: Evaluated) -> list[str]:
    placed, model, stage = found.placed, found.placed.job.model, found.placed.stage
    layer = model.num_layers * sum(placed.job.matrix_elements().values())
    matrices = layer + model.vocabulary.text_size * model.hidden_size
    return [
        f"flops: model = tokens · (6·N + 6·L·H·D·S), causal counted half = {stage.batch_tokens} · (6·{matrices} + "
        f"6·{model.num_layers}·{model.num_heads}·{model.head_dim}·{stage.seq_len}) = {found.timing.model_flops:.4g}",
        f"flops: executed matrices = tokens · tp·(L·(6·N_layer/tp + 2·{t.recomputed_elements(placed)} recomputed) + "
        f"8·V/tp·E) = "
        f"{t.executed_matrix_flops(placed):.4g}; attention's {FORWARD_PRODUCTS} products forward and "
        f"{BACKWARD_PRODUCTS} backward make that {found.timing.executed_flops:.4g}",
    ]


def _time(found: Evaluated) -> list[str]:
    placed, time, machine = found.placed, found.timing, found.machine
    device, stage = machine.device, placed.stage
    lines = [
        f"matrices = the longer of FLOP / {placed.devices} / ({device.matrix_share:g}·{device.peak_flops:.4g}) and "
        f"what HBM of {device.memory_bandwidth:.4g} B/s moves ({t.STREAM_PASSES} streams a layer, its parameters 4 "
        f"times) = {time.matrices:.4g} s",
        f"attention = L · {found.cost.compute:.4g} s a layer at {device.attention_share:g} of the peak = "
        f"{time.attention:.4g} s",
        f"update = {t.OPTIMIZER_PASSES} · parameters / HBM = {time.update:.4g} s",
        *(
            f"{one.what} over {one.axis}, {gib(one.bytes)} at {one.bytes / one.seconds:.4g} B/s = {one.seconds:.4g} s, "
            f"{one.exposed:.4g} s exposed"
            for one in time.transfers
        ),
        f"step = matrices + attention + update + exposed = {time.seconds:.4g} s",
        f"MFU = model FLOP / (step · {machine.devices} · {device.peak_flops:.4g}) = {found.mfu:.4f}",
        f"stage = {stage.steps} steps = {found.stage_seconds / 86400:.3g} days, "
        f"{found.stage_seconds * machine.devices / 3600:.4g} device-hours",
    ]
    return [f"time: {line}" for line in lines]


def _reasons(one: StagePlan) -> list[str]:
    """Why attention runs as it does, here and on the best mesh."""
    here = [f"attention: {reason}" for reason in one.chosen.reasons] if one.chosen is not None else []
    if one.best is None or one.best is one.chosen:
        return here
    return [*here, *(f"best, {one.best.mesh}: attention: {reason}" for reason in one.best.reasons)]
