"""The trainer in one process: against the float64 reference, its optimizer by hand, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_cases import ALPHAS, ROPE, batch, make_trainer, model, rows_of, stage

from lwm_core.batch import PackedBatch, TokenSequence, pack_rows
from lwm_core.errors import CheckpointError, LwmError, ShapeError, UnsupportedError, UsageError
from lwm_core.model import canonical_shapes
from lwm_core.protocols import OptimizerSpec, SamplingSpec
from lwm_core.reference import llama_logits, modality_loss
from lwm_core.rope import RopeSpec
from lwm_core.rope_scalings import llama3, yarn
from lwm_core.testing import relative_l2
from lwm_torch_ring.generate.sample import sample
from lwm_torch_ring.model.rope import rope_angles, rope_tables
from lwm_torch_ring.model.sharding import named
from lwm_torch_ring.train.distributed import choose_device, join, launch_from
from lwm_torch_ring.train.optimizer import AdamW

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {}, "one key-value head a query head": {"num_kv_heads": 4}, "tied": {"tie_embeddings": True},
    "biases": {"qkv_bias": True},
}  # fmt: skip


def parameters(trainer: Any) -> dict[str, np.ndarray]:
    return dict(trainer.iter_parameters())


def with_noise(trainer: Any) -> None:
    """Biases and norms too differ from their first values."""
    random = np.random.default_rng(5)
    given = parameters(trainer)
    trainer.load_parameters({name: x + 0.1 * random.standard_normal(x.shape) for name, x in given.items()})


ROPES = {
    "plain": ROPE, "LWM at 1M": RopeSpec(5e7), "llama3": llama3(5e5, 16, factor=8.0, original=32),
    "yarn": yarn(1e4, 16, factor=4.0, original=16),
}  # fmt: skip
"""Of head dim 16."""


@pytest.mark.parametrize(
    ("shape", "rope"),
    [*((shape, "plain") for shape in SHAPES), *(("grouped heads", rope) for rope in ROPES if rope != "plain")],
)
def test_losses_and_scores_are_the_references(shape: str, rope: str) -> None:
    """The whole model in float64 NumPy, and the derivative of its loss in one direction."""
    config, rows, spec = model(**SHAPES[shape]), batch(), ROPES[rope]
    trainer = make_trainer(config=config, rope=spec)
    with_noise(trainer)
    given = parameters(trainer)

    def loss(of: dict[str, np.ndarray]) -> float:
        return modality_loss(llama_logits(of, config, spec, rows), config, rows, ALPHAS)[0]

    assert trainer.evaluate(rows_of(trainer))["loss"] == pytest.approx(loss(given), rel=1e-5)

    trainer._losses.run(trainer.current.batch(rows_of(trainer)), backward=True)
    random = np.random.default_rng(6)
    way = {name: random.standard_normal(x.shape) for name, x in given.items()}
    slope = sum(float((p.grad.double().numpy() * way[name]).sum()) for name, p in named(trainer.network))
    ahead, behind = ({name: x + s * 1e-5 * way[name] for name, x in given.items()} for s in (1, -1))
    assert slope == pytest.approx((loss(ahead) - loss(behind)) / 2e-5, rel=1e-3)

    ids = [3, 50, 99, 7, 101, 110, 4]
    one = PackedBatch(
        tokens=np.array([ids], np.int32), targets=np.zeros((1, 7), np.int32), segment_ids=np.ones((1, 7), np.int32),
        positions=np.arange(7, dtype=np.int32)[None], loss_weights=np.ones((1, 7), np.float32),
    )  # fmt: skip
    logits = llama_logits(given, config, spec, one)[0]
    expected = []
    for at, target in enumerate(ids[1:]):
        part = next(logits[at, s] for s in config.vocabulary.slices.values() if s.start <= target < s.stop)
        start = next(s.start for s in config.vocabulary.slices.values() if s.start <= target < s.stop)
        expected.append(part[target - start] - np.log(np.exp(part).sum()))
    np.testing.assert_allclose(trainer.scorer().log_likelihood(ids), expected, rtol=1e-4, atol=1e-5)


def test_packed_equals_apart() -> None:
    """Documents packed into two rows give the loss and gradients of the same documents padded, one a row."""
    random = np.random.default_rng(5)
    documents = [TokenSequence(random.integers(0, 120, n), np.full(n, 1 / n)) for n in (30, 34, 9, 1, 17, 21, 13, 3)]
    found = []
    for rows in ([documents[:2], documents[2:]], [[document] for document in documents]):
        trainer = make_trainer(rows=len(rows))
        loss = trainer._losses.run(trainer.current.batch(rows_of(trainer, pack_rows(rows, 72))), backward=True)
        found.append((loss["loss"], {name: p.grad.numpy() for name, p in named(trainer.network)}))
    (loss, gradients), (alone, expected) = found
    assert loss == pytest.approx(alone, rel=1e-6)
    for name, gradient in expected.items():
        assert relative_l2(gradients[name], gradient) < 1e-5, name


def test_generation_is_the_whole_forward_pass_again() -> None:
    """Prefill and decode against the likeliest next token of the reference, prompt by prompt."""
    trainer = make_trainer()
    with_noise(trainer)
    given, config = parameters(trainer), model()
    prompts = [[5, 9, 60, 3], [(7 * n) % 100 for n in range(70)]]
    told = trainer.generator().generate(prompts, SamplingSpec(4))
    for prompt, got in zip(prompts, told, strict=True):
        ids = list(prompt)
        for token in got:
            length = len(ids)
            one = PackedBatch(
                tokens=np.array([ids], np.int32), targets=np.zeros((1, length), np.int32),
                segment_ids=np.ones((1, length), np.int32), positions=np.arange(length, dtype=np.int32)[None],
                loss_weights=np.ones((1, length), np.float32),
            )  # fmt: skip
            logits = llama_logits(given, config, ROPE, one)[0, -1, config.vocabulary.slices["text"]]
            assert int(logits.argmax()) == token
            ids.append(token)


def test_stop_ids_end_a_row_and_modalities_are_drawn_from() -> None:
    generator = make_trainer().generator()
    prompt = [5, 9, 60, 3]
    [free] = generator.generate([prompt], SamplingSpec(6, temperature=1.0, seed=1))
    [stopped] = generator.generate([prompt], SamplingSpec(6, temperature=1.0, seed=1, stop_ids=(free[2],)))
    assert stopped == free[: free.index(free[2])]
    [vision] = generator.generate([prompt], SamplingSpec(6, modality="vision"))
    assert all(token in range(100, 120) for token in vision)
    with pytest.raises(ShapeError, match="modality 'sound' is not in this model's vocabulary"):
        generator.generate([prompt], SamplingSpec(6, modality="sound"))
    with pytest.raises(ShapeError, match=r"prompt 0 holds ids outside \[0, 120\)"):
        generator.generate([[120]], SamplingSpec(1))


def test_rope_at_a_million_is_exact() -> None:
    """Against float64; a float32 product of position and frequency would be off by 0.03."""
    rope = RopeSpec(5e7)
    positions = np.array([0, 1, 1023, 1024, 524_287, 999_999])
    cos, sin = rope_angles(rope_tables(rope, 64, 1_000_000, CPU), torch.from_numpy(positions)[None])
    angles = positions[:, None] * rope.inverse_frequencies(64)
    np.testing.assert_allclose(cos[0], np.cos(angles), atol=2e-7)
    np.testing.assert_allclose(sin[0], np.sin(angles), atol=2e-7)


def test_a_step_is_adamw_by_its_formula() -> None:
    """Clip by the global norm, Adam with bias correction, decay of matrices only, in float64."""
    spec, lr, random = OptimizerSpec(clip_norm=0.05), 1e-2, np.random.default_rng(2)
    shapes = {"a_proj.weight": (3, 4), "input_layernorm.weight": (5,), "a_proj.bias": (3,)}
    tensors = {name: torch.nn.Parameter(torch.randn(*shape)) for name, shape in shapes.items()}
    expected = {name: x.detach().double().numpy().copy() for name, x in tensors.items()}
    first = {name: np.zeros(shape) for name, shape in shapes.items()}
    second = {name: np.zeros(shape) for name, shape in shapes.items()}
    optimizer = AdamW(spec, tensors)
    for t in range(1, 5):
        gradients = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for name, gradient in gradients.items():
            tensors[name].grad = torch.from_numpy(gradient.copy())
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        assert optimizer.step(lr) == pytest.approx(norm, rel=1e-6)
        assert norm > spec.clip_norm, "the test must clip"
        for name, gradient in gradients.items():
            g = gradient * (spec.clip_norm / norm)
            first[name] = spec.beta1 * first[name] + (1 - spec.beta1) * g
            second[name] = spec.beta2 * second[name] + (1 - spec.beta2) * g * g
            way = first[name] / (1 - spec.beta1**t) / (np.sqrt(second[name] / (1 - spec.beta2**t)) + spec.eps)
            way = way + (spec.weight_decay * expected[name] if name == "a_proj.weight" else 0.0)
            expected[name] = expected[name] - lr * way
    for name, value in expected.items():
        np.testing.assert_allclose(tensors[name].detach(), value, rtol=1e-5, atol=1e-6, err_msg=name)
        assert tensors[name].grad is None


def test_training_lowers_the_loss() -> None:
    trainer = make_trainer(lr=3e-3)
    losses = [trainer.step(rows_of(trainer), step)["loss"] for step in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_bfloat16_errs_little_and_keeps_float32_parameters() -> None:
    plain, short = make_trainer(), make_trainer(compute_dtype="bfloat16")
    one, other = (trainer.step(rows_of(trainer), 0) for trainer in (plain, short))
    assert other["loss"] != one["loss"]
    assert other["loss"] == pytest.approx(one["loss"], rel=3e-3)
    assert {p.dtype for _, p in named(short.network)} == {torch.float32}
    # A change far below bfloat16's resolution is not lost in them.
    before = parameters(short)
    short.begin_stage(stage("1,1,1,1", lr=1e-7))
    short.step(rows_of(short), 0)
    changed = parameters(short)["model.norm.weight"] - before["model.norm.weight"]
    assert 0 < np.abs(changed).max() < 1e-6


def test_rematerialisation_runs_attention_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """``attention`` and ``offload`` keep what it gave; ``full`` runs it again."""
    from lwm_torch_ring.attention.spec import AttentionSpec

    runs: list[int] = []
    plain = AttentionSpec.plan
    monkeypatch.setattr(AttentionSpec, "plan", lambda self, segments: runs.append(1) or plain(self, segments))
    counts = {}
    for remat in ("none", "attention", "offload", "dots", "full"):
        trainer = make_trainer(remat=remat)
        runs.clear()
        trainer._losses.run(trainer.current.batch(rows_of(trainer)), backward=True)
        counts[remat] = len(runs)
    layers = model().num_layers
    assert counts == {"none": 2 * layers, "attention": 2 * layers, "offload": 2 * layers, "dots": 2 * layers,
                      "full": 3 * layers}  # fmt: skip


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path).wait()
    other = make_trainer(config=model(intermediate_size=128))
    with pytest.raises(CheckpointError, match=r"down_proj.weight has shape \(64, 96\), the model needs \(64, 128\)"):
        other.restore(tmp_path)
    with pytest.raises(CheckpointError, match=r"it was not written by trainer 'torch'"):
        other.restore(tmp_path / "nowhere")
    next((tmp_path / "state").glob("*.safetensors")).write_bytes(b"none of that")
    with pytest.raises(CheckpointError, match="cannot be read"):
        make_trainer().restore(tmp_path)


def test_parameters_go_in_and_out_by_name() -> None:
    trainer = make_trainer(config=model(tie_embeddings=True, qkv_bias=True))
    given = parameters(trainer)
    assert {name: x.shape for name, x in given.items()} == canonical_shapes(trainer.context.model)
    assert all(x.dtype == np.float32 for x in given.values())
    changed = {name: x + 1 for name, x in given.items()}
    trainer.load_parameters(changed)
    assert relative_l2(parameters(trainer)["model.norm.weight"], changed["model.norm.weight"]) == 0
    with pytest.raises(CheckpointError, match=r"parameter 'model\.norm\.weight' is missing"):
        trainer.load_parameters({name: x for name, x in given.items() if name != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has shape \(3,\); the model needs \(64,\)"):
        trainer.load_parameters({**given, "model.norm.weight": np.zeros(3)})


def test_what_does_not_fit_is_refused() -> None:
    trainer = make_trainer()
    rows = rows_of(trainer)
    with pytest.raises(ShapeError, match="rows of 36 tokens; stage 's' has seq_len 72"):
        trainer.step(rows.map(lambda array: array[:, :36]), 0)
    with pytest.raises(ShapeError, match=r"needs 2 devices, but 1 are here.*start them with torchrun"):
        trainer.begin_stage(stage("1,1,1,2"))
    with pytest.raises(ShapeError, match="4 rows do not divide into 3 micro-batches"):
        trainer.current.batch(rows, 3)


def test_nothing_before_a_stage() -> None:
    from lwm_torch_ring.train.options import TrainerOptions
    from lwm_torch_ring.train.trainer import TorchTrainer

    fresh = TorchTrainer(TrainerOptions(device="cpu"), make_trainer().context)
    for ask in (lambda: fresh.stage, lambda: list(fresh.iter_parameters()), lambda: fresh.layout):
        with pytest.raises(LwmError, match="begin_stage must come first"):
            ask()


def test_a_launchers_variables_are_whole_or_refused() -> None:
    good = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1",
            "LOCAL_WORLD_SIZE": "2"}  # fmt: skip
    launch = launch_from(good)
    assert launch is not None and (launch.rank, launch.world, launch.local_rank, launch.local_world) == (3, 8, 1, 2)
    assert launch_from({"LOCAL_RANK": "0"}) is None
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT not set"):
        launch_from({name: good[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")})
    with pytest.raises(UsageError, match="start with torchrun"):
        launch_from({**good, "RANK": "one"})
    with pytest.raises(UsageError, match="RANK 8 of WORLD_SIZE 8"):
        launch_from({**good, "RANK": "8"})


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="sees no GPU; install a CUDA build"):
            choose_device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(UnsupportedError, match="local rank 4 has no GPU of its own: there are 4"):
        choose_device("auto", 4)
    monkeypatch.setattr("sys.argv", ["/usr/bin/lwm", "run", "my recipe"])
    with pytest.raises(UsageError, match=r"4 GPUs, but one process .*torchrun --nproc-per-node 4 --no-python lwm run"):
        join("auto", 1.0)
    launched = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UnsupportedError, match="built without NCCL"):
        join("auto", 1.0)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [(0, 1.0, 0.0, 5), (2, 1.0, 0.0, 2), (0, 0.6, 0.0, 2), (3, 0.95, 0.0, 3), (1, 1.0, 0.0, 1), (0, 1.0, 0.3, 3),
     (0, 0.6, 0.3, 2), (0, 1.0, 1.0, 1)],
)  # fmt: skip
def test_draws_follow_the_distribution(top_k: int, top_p: float, min_p: float, kept: int) -> None:
    """Of evenly spread draws each id gets its share, and none beyond top-k, top-p and min-p."""
    weights = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    spec = SamplingSpec(1, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = sample(weights.log().expand(20_000, 5), uniform, spec)
    best = weights.sort(descending=True).indices[:kept]
    expected = torch.zeros(5).index_add(0, best, weights[best] / weights[best].sum())
    torch.testing.assert_close(drawn.bincount(minlength=5) / 20_000, expected, atol=1e-3, rtol=0)
    last = sample(weights.log()[None], torch.tensor([1.0]), spec)
    assert int(last) in best
