"""What the registry reads: light, so that listing plugins costs nothing."""

from lwm_core.registry import PluginSpec

attention = PluginSpec(
    name="torch-ring",
    summary="Ring, all-gather, Ulysses and USP attention over the sp axis of a Torch device mesh",
    factory="lwm_torch_ring.attention.backend:factory",
    options="lwm_torch_ring.attention.options:AttentionOptions",
    needs=("torch",),
    framework="torch",
    devices=("cpu", "gpu"),
    capabilities={
        "masks": ("causal", "full", "block_causal", "window"),
        "segment_ids": True,
        "gqa": True,
        "dtypes": ("float32", "bfloat16"),
        "strategies": ("ring", "allgather", "ulysses", "usp"),
        "layouts": ("contiguous", "zigzag", "striped"),
        "kernels": ("cpu-flash", "flash-attn-3", "cudnn", "cuda-flash", "math"),
    },
    priority=10,
)

trainer = PluginSpec(
    name="torch",
    summary="Trains and generates with Torch, a process a device, on a dp, fsdp, tp, sp mesh",
    factory="lwm_torch_ring.train.trainer:build_trainer",
    options="lwm_torch_ring.train.options:TrainerOptions",
    needs=("torch",),
    framework="torch",
    devices=("cpu", "gpu"),
    priority=5,
)
