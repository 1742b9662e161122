"""Ray's trainer with what our own loop needs of it, and no actor that has nothing to do here: each one imports for seconds.

The controller's process never imports torch: workers make their process group themselves, and are told what to train by
name. Nothing here may bring it in.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.config import FailureConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from stages import logs, restarts, telemetry
from training import checkpoint_facts


class ColumnTrainer(DataParallelTrainer):
    """Runs a function on workers that read columns for themselves: it is given no datasets, and starts no actor to manage them.

    With `alone`, on a cluster that ends with this process, none either that frees the workers' places when Ray's controller
    dies, since that fails the training and the cluster goes with the run, and none that asks for more nodes. The limits of
    its FailureConfig count from the newest of the `checkpoints`. What fails is counted as of `place`, a run and a stage.
    """

    def __init__(
        self, *arguments: Any, alone: bool, checkpoints: str, place: Mapping[str, str | int], **options: Any
    ) -> None:
        self._alone, self._checkpoints, self._place = alone, checkpoints, dict(place)
        self._needless = (DatasetsCallback, PlacementGroupCleanerCallback) if alone else (DatasetsCallback,)
        super().__init__(*arguments, backend_config=_Devices(), **options)

    def _create_default_callbacks(self) -> list:
        return [call for call in super()._create_default_callbacks() if not isinstance(call, self._needless)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        limits = self.run_config.failure_config
        options["failure_policy"] = WhileItAdvances(limits, self._checkpoints, self._place)
        if self._alone:
            options["scaling_policy"] = _Unannounced(self.scaling_config)
        return super()._initialize_and_run_controller(**options)


class WhileItAdvances(DefaultFailurePolicy):
    """Workers that died are replaced as long as checkpoints advance, and not at all when they would fail of the same again."""

    def __init__(self, limits: FailureConfig, checkpoints: str, place: Mapping[str, str | int]) -> None:
        super().__init__(limits)
        self._checkpoints, self._seen = checkpoints, checkpoint_facts.latest(checkpoints)
        self._place = dict(place)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether to start the workers again; what has failed before the newest checkpoint does not count."""
        with logs.at(**self._place):
            telemetry.tell("darkroom_failed_attempts", 1, reason=restarts.reason(training_failed_error))
        if restarts.final(training_failed_error):
            return FailureDecision.RAISE
        newest = checkpoint_facts.latest(self._checkpoints)
        if newest != self._seen:
            self._seen, self._worker_group_failures, self._controller_failures = newest, 0, 0
        return super().make_decision(training_failed_error)


class _Unannounced(FixedScalingPolicy):
    """Workers of a fixed number on nodes that are there: nobody is asked for any."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _send_resource_request(self) -> None:
        pass

    _maybe_send_resource_request = _send_resource_request


class _Devices(BackendConfig):
    """Every worker sees the GPUs of all workers on its node, as under `torchrun`, and uses the one of its LOCAL_RANK."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _SharedDevices


class _SharedDevices(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:  # noqa: ARG002
        """Has the workers import now, while Ray still replaces one that dies: later, that would fail the training."""
        worker_group.execute(_load)


def _load() -> None:
    import_module("stages.train_worker")
