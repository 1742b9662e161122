"""The training loop: one clock, one state, the same under `python`, `torchrun` and Ray Train.

Step k consumes the global batch of stream positions [k*B, (k+1)*B); rank r of W takes the r-th slice of it. What a
position holds and every random number it meets depend on (seed, position) alone, so W is no part of the result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from data import storage
from training import checkpoint, distributed, execution, flops, optim, samples, spikes, validation
from training.checkpoint import TrainState
from training.ema import Ema
from training.notices import Notices
from training.randomness import Draws
from training.systems.system import Batch, Trainable, TrainConfig
from training.window import Reports, Window, timed

log = logging.getLogger("darkroom.train")

Row: TypeAlias = dict[str, Any]
"""A row of the curve; with `window.TIMES` where it is reported."""

Batches = Callable[[int], Iterator[Batch]]
"""first step -> this rank's batches from that step on, on the training device."""


def train(
    trainable: Trainable,
    batches: Batches,
    config: TrainConfig,
    folder: Path | str,
    *,
    identity: str,
    report: Callable[[Row], None] = lambda _: None,
    keep: Callable[[], None] = lambda: None,
    key_of: spikes.KeyOf = str,
    held_out: validation.HeldOut | None = None,
    preempted: Callable[[], bool] = lambda: False,
    begin: Callable[[nn.Module], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainState:
    """Trains to `config.max_steps`, resuming from the newest valid checkpoint under `folder`; returns the last state.

    Collective: every rank calls it. `identity` names (model, data, config); a checkpoint of another one is refused.
    `report` is given every row of the curve with its times, once more the row that a rollback goes on from (those after it
    are void), and `keep` called before a checkpoint holds them. `key_of` names
    samples in messages, `held_out` is what the averaged weights are asked about every `config.validate_every` steps; pictures of it go to `_meta/samples` beside `folder`.
    `preempted` tells that this place will be taken away soon: asked as `notices` says, and answered with a checkpoint.
    `begin` may change the fresh weights that a training without a checkpoint starts from, on every rank alike.
    `stopped`, asked with it, tells that somebody wants it to end: a checkpoint is saved, and the state is short of the end.
    Raises FloatingPointError, naming steps and samples, when gradients are not finite and `config` knows no way on.
    """
    state, reports = build_state(trainable, config, begin), Reports(report)
    if checkpoint.restore(folder, state, identity):
        log.info("resuming at step %d", state.clock)
    with checkpoint.Saver(folder, identity, max_steps=config.max_steps, before=keep) as saver:
        while state.clock < config.max_steps:
            try:
                notices = Notices(state.clock, preempted, stopped)
                _run(trainable, state, batches, config, saver, reports, key_of, held_out, notices)
                break
            except spikes.Diverged as error:
                if config.on_spike != "rollback":
                    raise
                _roll_back(state, error, saver, reports)
    return state


def _run(
    trainable: Trainable,
    state: TrainState,
    batches: Batches,
    config: TrainConfig,
    saver: checkpoint.Saver,
    report: Callable[[Row], None],
    key_of: spikes.KeyOf,
    held_out: validation.HeldOut | None,
    notices: Notices,
) -> None:
    """Steps from the state's clock to the end of the batches or of training."""
    window = Window(trainable, config, state, key_of)
    for batch in timed(batches(state.clock), window):
        network = flops.Recorded(state.model) if window.flops_per_step is None else state.model
        window.add(*step(trainable, state, batch, config, window.norm_limit, network), batch["position"])
        state.clock += 1
        if isinstance(network, flops.Recorded):
            window.count_flops(network, state.clock)
        is_leaving = is_stopping = False
        is_look = window.is_due(state.clock)
        if is_look:
            since, row = window.rows_end, window.close(state)
            if held_out is not None and validation.is_due(since, state.clock, config):
                loss = validation.validation_loss(trainable, state, config, held_out)
                beside = str(saver.folder).rsplit("/", 1)[0]
                pictures = storage.join(beside, "_meta", "samples")
                samples.write_samples(trainable, state, config, held_out, pictures)
                row |= window.validated(loss)
            report(row)
        if is_look or notices.is_due(state.clock):
            is_leaving, is_stopping = notices.ask(state.clock)
        is_last = state.clock == config.max_steps
        if is_last or is_leaving or state.clock % config.checkpoint_every == 0:
            state.pending = window.look(state.clock)
            if is_last or not window.is_in_trouble:
                saver.save(state)
        if is_leaving:
            saver.wait()  # the place may be gone before the next step
        if is_last or is_stopping:
            return


def _roll_back(state: TrainState, error: spikes.Diverged, saver: checkpoint.Saver, reports: Reports) -> None:
    """Weights and optimizer of the last checkpoint, and the clock as it is: the samples since then are passed over."""
    clock = state.clock
    saver.wait()
    if not checkpoint.restore(saver.folder, state, saver.identity):
        raise error
    log.warning("%s; going on from step %d with the weights of step %d", error, clock, state.clock)
    state.curve = spikes.rolled_back(state.curve, error)
    reports.again(state.curve[-1])
    state.clock, state.pending = clock, []
    saver.save(state)


def build_state(
    trainable: Trainable, config: TrainConfig, begin: Callable[[nn.Module], None] = lambda _: None
) -> TrainState:
    """Fresh weights, or what `begin` makes of them, the same on every rank for the same seed, with optimizer and moving average."""
    torch.manual_seed(config.seed)
    model = trainable.build()
    begin(model)
    model = model.to(distributed.device())
    model.train()
    model = execution.prepared(model, config, world_size=distributed.world_size())
    model = distributed.distribute(model, fsdp=config.fsdp)
    ema = Ema(distributed.unwrap(model), config.ema_decay)  # names without DDP's prefix, whatever the world
    return TrainState(model, optim.build_optimizer(model, config), ema)


def step(
    trainable: Trainable,
    state: TrainState,
    batch: Batch,
    config: TrainConfig,
    norm_limit: float,
    network: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    """One optimizer step; (per-sample losses (B,), global gradient norm ()), still on the device. Collective.

    A gradient norm that is no number or above `norm_limit` leaves weights and optimizer as they are. `network` is the
    state's model, or what calls it.
    """
    optim.set_learning_rate(state.optimizer, optim.learning_rate(state.clock, config))
    losses = [
        _backward(trainable, state.model, part, config, network, is_last=i == config.accumulate)
        for i, part in enumerate(parts(batch, config.accumulate), 1)
    ]
    grad_norm = distributed.whole(nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad_norm))
    state.optimizer.found_inf = spikes.found_inf(grad_norm, norm_limit)  # type: ignore[attr-defined]
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.ema.update(state.clock)
    return losses[0] if len(losses) == 1 else torch.cat(losses), grad_norm


def _backward(
    trainable: Trainable,
    model: nn.Module,
    part: Batch,
    config: TrainConfig,
    network: Callable[..., Any],
    *,
    is_last: bool,
) -> Tensor:
    """Adds the part's share to the gradients; its per-sample losses."""
    draws = Draws(config.seed, part["position"])
    device, bf16 = part["position"].device.type, config.precision == "bf16"
    with distributed.gradient_sync(model, enabled=is_last):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            losses = trainable.loss(network, part, draws)  # type: ignore[arg-type]
        mean = losses.mean()
        (mean / config.accumulate if config.accumulate > 1 else mean).backward()
    return losses.detach()


def parts(batch: Batch, count: int) -> list[Batch]:
    """`batch` in `count` equal parts, in order."""
    size = len(batch["position"]) // count
    if count == 1:
        return [batch]
    return [{name: values[i * size : (i + 1) * size] for name, values in batch.items()} for i in range(count)]


def publish(trainable: Trainable, state: TrainState, folder: Path) -> dict[str, Any]:
    """Writes the averaged weights with their configs into `folder` (rank 0); returns the trainable's facts. Collective."""
    with state.ema.swapped_in():
        weights = checkpoint.whole_weights(state.model)
    if distributed.rank() != 0:
        return {}
    model = trainable.build()
    model.load_state_dict(weights)
    return trainable.publish(model.eval(), folder)
