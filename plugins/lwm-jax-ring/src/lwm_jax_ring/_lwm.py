"""What the registry reads: light, so that listing plugins costs nothing."""

from lwm_core.registry import PluginSpec

attention = PluginSpec(
    name="jax-ring",
    summary="Ring, all-gather, Ulysses and USP attention over the sp axis of a JAX mesh",
    factory="lwm_jax_ring.attention.backend:factory",
    options="lwm_jax_ring.attention.options:AttentionOptions",
    needs=("jax",),
    framework="jax",
    devices=("cpu", "gpu", "tpu"),
    capabilities={
        "masks": ("causal", "full", "block_causal", "window"),
        "segment_ids": True,
        "gqa": True,
        "dtypes": ("float32", "bfloat16"),
        "strategies": ("ring", "allgather", "ulysses", "usp"),
        "layouts": ("contiguous", "zigzag", "striped"),
        "kernels": ("xla", "pallas-tpu", "cudnn"),
    },
    priority=10,
)

trainer = PluginSpec(
    name="jax",
    summary="Trains and generates with JAX on a dp, fsdp, tp, sp mesh",
    factory="lwm_jax_ring.train.trainer:build_trainer",
    options="lwm_jax_ring.train.options:TrainerOptions",
    needs=("jax", "flax", "optax", "orbax"),
    framework="jax",
    devices=("cpu", "gpu", "tpu"),
    priority=10,
)
