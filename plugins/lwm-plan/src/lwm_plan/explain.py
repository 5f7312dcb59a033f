"""``--explain``: every formula of a stage with its numbers filled in."""

from __future__ import annotations

from lwm_core.attention_cost import BACKWARD_PRODUCTS, FORWARD_PRODUCTS
from lwm_plan import memory as m
from lwm_plan import timing as t
from lwm_plan import transfers as tr
from lwm_plan.job import part
from lwm_plan.plan import StagePlan
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
    tp, tokens, layers, size = sizes["tp"], placed.tokens, model.num_layers, job.element_bytes
    stream, query, key = m.units(placed)
    layer = sum(job.matrix_elements(tp).values())
    local, chunk = m.LOCAL_ARRAYS, min(tokens, job.token_chunk or tokens)
    here, host = ({name: _gib(held) for name, held in one.items()} for one in m.kept(placed))
    ring = m.attention_arrays(placed, found.cost)
    elements = f"({m.FEED_FORWARD_ARRAYS}·{part(model.intermediate_size, tp)} + {model.hidden_size})"
    lines = [
        f"T = rows · S / sp = {placed.rows}·{stage.seq_len}/{sizes['sp']} = {tokens} tokens a device",
        f"stream = T·E/tp·{size} = {tokens}·{model.hidden_size}/{tp}·{size} = {_gib(stream)}",
        f"queries = T·H/tp·D·{size} = {tokens}·{placed.shape.heads}·{model.head_dim}·{size} = {_gib(query)}",
        f"keys = T·K/tp·D·{size} = {tokens}·{placed.shape.kv_heads}·{model.head_dim}·{size} = {_gib(key)}",
        f"parameters = 4·N / (tp · {'·'.join(job.shard_parameters) or '1'}), what does not divide whole = "
        f"4·{model.parameter_count}/({tp}·{placed.sharing}) = {_gib(mem.parameters)}",
        f"optimizer = {m.MOMENTS} · parameters = {m.MOMENTS}·{_gib(mem.parameters)} = {_gib(mem.optimizer)}",
        f"gradients = parameters, twice with micro-batches = {2 if stage.accumulate > 1 else 1}·{_gib(mem.parameters)} "
        f"= {_gib(mem.gradients)}",
        f"activations ({job.remat}) = L · ({_sum(here)}) = {layers}·({_sum(here, names=False)}) = "
        f"{_gib(mem.activations)}",
        *([f"in the host's memory = L · ({_sum(host)}) = {layers}·({_sum(host, names=False)}) = {_gib(mem.host)}"]
          if host else []),
        f"gathered = a layer's share of tp + parameters = 4·{layer} + {_gib(mem.parameters)} = {_gib(mem.gathered)}",
        f"working = {_arrays(local, found)} + tokens at a time · ({m.FEED_FORWARD_ARRAYS}·F/tp + E)·{size} + T·D·4 = "
        f"{_arrays(local, found, names=False)} + {chunk}·{elements}·{size} + {tokens}·{model.head_dim}·4 = "
        f"{_gib(mem.working)}",
        f"attention ({found.strategy} over {sizes['sp']}) = "
        + (f"all keys and values · (1 + 4/{size}) = {_gib(found.cost.held)}·(1 + 4/{size})" if ring is None
           else f"{_arrays(ring, found)} = {_arrays(ring, found, names=False)}") + f" = {_gib(mem.attention)}",
        f"logits = tokens · V/tp · 4 = {min(tokens, job.loss_chunk)}·{part(model.vocabulary.size, tp)}·4 = "
        f"{_gib(mem.logits)}",
        f"batch = {m.BATCH_ARRAYS}·4·T·micro-batches = {m.BATCH_ARRAYS}·4·{tokens}·{stage.accumulate} = "
        f"{_gib(mem.batch)}",
        f"program = {_gib(mem.program)}",
        f"total = {' + '.join(mem.parts)} = {' + '.join(_gib(one) for one in mem.parts.values())} = {_gib(mem.total)} "
        f"of {_gib(found.machine.device.memory)} ({found.machine.device.source})",
    ]  # fmt: skip
    return [f"memory: {line}" for line in lines]


def _gib(size: float) -> str:
    """Four digits, where a table has two: what is multiplied with it stays right."""
    return f"{size / 2**30:.4g} GiB"


def _sum(sizes: dict[str, str], *, names: bool = True) -> str:
    return " + ".join(sizes if names else sizes.values())


def _arrays(arrays: m.Arrays, found: Evaluated, *, names: bool = True) -> str:
    """A sum of arrays, by what they hold or by their sizes."""
    counts = (arrays.stream, arrays.query, arrays.key)
    what = ("streams", "queries", "keys") if names else tuple(_gib(size) for size in m.units(found.placed))
    kept = [f"{count}{' ' if names else '·'}{one}" for count, one in zip(counts, what, strict=True) if count]
    return " + ".join(kept) or "0"


def _flops(found: Evaluated) -> list[str]:
    placed, model, stage = found.placed, found.placed.job.model, found.placed.stage
    job, tp, layers = placed.job, placed.sizes["tp"], model.num_layers
    matrices = layers * sum(job.matrix_elements().values()) + model.vocabulary.text_size * model.hidden_size
    layer, head = sum(job.matrix_elements(tp).values()), part(model.vocabulary.size, tp) * model.hidden_size
    executed = t.executed_matrix_flops(placed)
    products = FORWARD_PRODUCTS * (2 if job.remat == "full" else 1) + BACKWARD_PRODUCTS
    attention, heads = found.timing.executed_flops - executed, model.num_heads * model.head_dim
    pairs = placed.shape.pairs * stage.rows
    busiest = attention / (products * 2 * layers * heads * pairs)
    lines = [
        f"model = tokens · (6·N + 6·L·H·D·S), causal counted half = {stage.batch_tokens}·(6·{matrices} + "
        f"6·{layers}·{model.num_heads}·{model.head_dim}·{stage.seq_len}) = {found.timing.model_flops:.4g}",
        f"matrices = tokens · tp · (L·(6·N_layer/tp + 2·recomputed) + 8·V/tp·E) = {stage.batch_tokens}·{tp}·("
        f"{layers}·(6·{layer} + 2·{t.recomputed_elements(placed)}) + 8·{head}) = {executed:.4g}",
        f"attention = products · 2 · L·H·D · pairs that are seen · the busiest rank's over the mean = "
        f"{products}·2·{layers}·{heads}·{pairs:.6g}·{busiest:.5g} = {attention:.4g}",
        f"executed = matrices + attention = {executed:.4g} + {attention:.4g} = {found.timing.executed_flops:.4g}",
    ]
    return [f"flops: {line}" for line in lines]


def _time(found: Evaluated) -> list[str]:
    placed, time, machine = found.placed, found.timing, found.machine
    device, stage = machine.device, placed.stage
    executed, moved = t.executed_matrix_flops(placed), t.matrix_traffic(placed)
    attention = time.executed_flops - executed
    arithmetic = executed / placed.devices / (device.matrix_share * device.peak_flops)
    traffic = moved / device.memory_bandwidth
    parameters, exposed = found.memory.parameters, sum(one.exposed for one in time.transfers)
    peak = f"{device.peak_flops:.4g}"
    lines = [
        f"products of matrices = FLOP / devices / ({device.matrix_share:.4g} of the peak) = {executed:.4g}/"
        f"{placed.devices}/({device.matrix_share:.4g}·{peak}) = {arithmetic:.4g} s",
        f"their memory traffic ({t.STREAM_PASSES} streams a layer, its parameters 4 times) = bytes / memory's rate = "
        f"{moved:.4g}/{device.memory_bandwidth:.4g} = {traffic:.4g} s",
        f"matrices = the longer of both = max({arithmetic:.4g}, {traffic:.4g}) = {time.matrices:.4g} s",
        f"attention = FLOP / devices / ({device.attention_share:.4g} of the peak) = "
        f"{attention:.4g}/{placed.devices}/({device.attention_share:.4g}·{peak}) = {time.attention:.4g} s",
        f"update = {t.OPTIMIZER_PASSES} · parameters / memory's rate = {t.OPTIMIZER_PASSES}·{parameters}/"
        f"{device.memory_bandwidth:.4g} = {time.update:.4g} s",
        *(
            f"{one.what} over {one.axis} = {_sent(one, found)} = {_gib(one.bytes)}, at {one.bytes / one.seconds:.4g} "
            f"B/s {one.seconds:.4g} s, {one.exposed:.4g} s exposed"
            for one in time.transfers
        ),
        f"step = matrices + attention + update + exposed = {time.matrices:.4g} + {time.attention:.4g} + "
        f"{time.update:.4g} + {exposed:.4g} = {time.seconds:.4g} s",
        f"MFU = model FLOP / (step · devices · peak) = {time.model_flops:.4g}/({time.seconds:.4g}·{machine.devices}·"
        f"{peak}) = {found.mfu:.4g}",
        f"stage = steps · step / a day = {stage.steps}·{time.seconds:.4g}/86400 = "
        f"{found.stage_seconds / 86400:.4g} days",
        f"device-hours = days · 24 · devices = {found.stage_seconds / 86400:.4g}·24·{machine.devices} = "
        f"{found.stage_seconds * machine.devices / 3600:.4g}",
    ]
    return [f"time: {line}" for line in lines]


def _sent(one: tr.Transfer, found: Evaluated) -> str:
    """The bytes of a transfer, as a formula and with its numbers."""
    placed, kind = found.placed, found.machine.device.name
    layers, micro = placed.job.model.num_layers, placed.stage.accumulate
    if one.what == "stream":
        over, size = tr.stream(placed, kind), placed.job.element_bytes
        return (
            f"micro-batches · (L · {tr.stream_parts(placed, kind)} parts of T·E/tp·{size} + the loss') = "
            f"{micro}·({layers}·{_gib(over.layer)} + {_gib(over.loss)})"
        )
    if one.what == "parameters":
        own = tr.shared(placed, kind)
        return (
            "micro-batches · (L · (gathered + slices · scattered) + slices of the loss · head) = "
            f"{micro}·({layers}·({_gib(own.gathered)} + {own.slices}·{_gib(own.scattered)}) + "
            f"{own.loss_slices}·{_gib(own.head)})"
        )
    if one.what == "attention":
        more, again = ("", "") if placed.job.remat != "full" else (", and a quarter of it (forward) once more", "·1.25")
        return f"L · micro-batches · what a layer sends{more} = {layers}·{micro}·{_gib(found.cost.sent)}{again}"
    copies = placed.devices // placed.sizes["tp"] // placed.sharing
    return f"2 · parameters · (copies - 1)/copies = 2·{_gib(found.memory.parameters)}·{copies - 1}/{copies}"


def _reasons(one: StagePlan) -> list[str]:
    """Why attention runs as it does, here and on the best mesh."""
    here = [f"attention: {reason}" for reason in one.chosen.reasons] if one.chosen is not None else []
    if one.best is None or one.best is one.chosen:
        return here
    return [*here, *(f"best, {one.best.mesh}: attention: {reason}" for reason in one.best.reasons)]
