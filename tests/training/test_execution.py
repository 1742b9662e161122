"""How networks run: whole graphs that are compiled once, recomputed activations, channels last, unchanged names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from training import execution, flops
from training.randomness import Draws
from training.systems import clip, denoiser, prior, vae
from training.systems.system import TrainConfig

SMALL = TrainConfig(compile=True, ema_decay=0.9)
NAMES = ("clip", "vae", "prior", "denoiser")


@pytest.fixture(params=NAMES)
def trainable(request, columns) -> Any:
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    return {
        "clip": lambda: clip.fit(
            clip.ClipConfig(image_size=16, vision_layers=2, text_layers=2, context_length=12), columns
        ),
        "vae": lambda: vae.fit(vae.VaeConfig(mid_block_attention=True, **sizes), columns),
        "prior": lambda: prior.fit(prior.PriorConfig(num_attention_heads=2, num_layers=2), columns),
        "denoiser": lambda: denoiser.fit(denoiser.DenoiserConfig(num_attention_heads=2, **sizes), columns),
    }[request.param]()


def _loss(trainable, model, columns, first: int = 0, count: int = 6) -> torch.Tensor:
    batch = columns.batch(trainable.columns, range(count))
    batch["position"] = batch["position"] + first
    return trainable.loss(model, batch, Draws(0, batch["position"])).mean()


def _prepared(trainable, world_size: int = 1, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = SMALL.model_copy(update=changes)
    return execution.prepared(trainable.build(), config, world_size=world_size, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_every_trainable_compiles_without_a_break_and_only_once(trainable, columns) -> None:
    graphs = _assert_compiles_once(trainable, columns, _prepared(trainable))
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
@pytest.mark.parametrize("trainable", ["prior"], indirect=True)
def test_for_several_workers_blocks_are_compiled_with_recomputed_activations(trainable, columns) -> None:
    model = _prepared(trainable, 2, activation_checkpointing=True)
    assert _assert_compiles_once(trainable, columns, model) == 1, "blocks of one class share their graph"


def _assert_compiles_once(trainable, columns, compiled: nn.Module) -> int:
    torch._dynamo.reset()
    counters.clear()
    plain = _prepared(trainable, compile=False)
    assert list(compiled.state_dict()) == list(plain.state_dict()), "names know nothing of graphs"
    expected = _loss(trainable, plain, columns)
    _loss(trainable, compiled, columns).backward()
    expected.backward()
    graphs = counters["stats"]["unique_graphs"]
    for parameter, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (1, 2):
            _loss(trainable, compiled, columns, 6 * step).backward()
        with execution.eagerly(SMALL), torch.no_grad():
            _loss(trainable, compiled.eval(), columns, count=3)
        _loss(trainable, compiled.train(), columns, 18).backward()
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    return graphs


def test_recomputed_activations_change_no_gradient_and_hold_less(trainable, columns) -> None:
    grads, held = [], []
    for again in (False, True):
        model = _prepared(trainable, compile=False, activation_checkpointing=again)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x
        ):
            loss = _loss(trainable, model, columns)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        held.append(sum(kept))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    assert held[1] < held[0]


def test_convolutional_networks_are_channels_last_and_transformers_stay(trainable) -> None:
    kernels = [
        m.weight
        for m in _prepared(trainable, compile=False).modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
    assert bool(kernels) == isinstance(trainable, vae.Vae | denoiser.Denoiser)


def test_where_weights_are_sharded_they_stay_and_convolutions_still_run_channels_last(
    trainable, columns
) -> None:
    model, plain = (_prepared(trainable, 2, compile=False, fsdp=fsdp) for fsdp in (True, False))
    kinds: list[tuple[bool, bool]] = []

    def look(module: nn.Module, _: Any, out: torch.Tensor) -> None:
        kinds.append((module.weight.is_contiguous(), out.is_contiguous(memory_format=torch.channels_last)))

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(look)
    loss = _loss(trainable, model, columns)
    assert all(is_contiguous and is_channels_last for is_contiguous, is_channels_last in kinds)
    assert bool(kinds) == isinstance(trainable, vae.Vae | denoiser.Denoiser)
    torch.testing.assert_close(loss, _loss(trainable, plain, columns))


def test_blocks_are_the_members_of_the_outermost_lists() -> None:
    inner = nn.ModuleList([nn.Linear(1, 1)])
    model = nn.Sequential(
        nn.ModuleList([nn.Sequential(inner), None]), nn.ModuleDict({"a": nn.ModuleList([nn.Tanh()])})
    )
    assert execution.blocks(model) == [model[0][0], model[1]["a"][0]]
    assert execution.blocks(nn.Linear(1, 1)) == []


def test_operations_are_those_of_the_networks_own_forward_and_backward_pass(trainable, columns) -> None:
    model = trainable.build()
    recorded = flops.Recorded(model)
    with FlopCounterMode(display=False) as counter:
        _loss(trainable, recorded, columns).backward()
    counted = flops.forward_backward_flops(trainable.build, recorded)
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02), "the loss itself has next to none"


def test_operations_of_a_linear_layer_are_six_per_weight_and_sample_less_its_inputs_gradient() -> None:
    recorded = flops.Recorded(nn.Linear(3, 5))
    recorded(torch.zeros(7, 3))
    assert flops.forward_backward_flops(lambda: nn.Linear(3, 5), recorded) == 2 * 2 * 7 * 3 * 5


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert flops.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_device_of_the_whole_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert flops.peak_flops(torch.device("cuda")) == peak
