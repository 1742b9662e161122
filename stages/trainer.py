"""Ray's trainer with what our own loop needs of it, and no actor that has nothing to do here: each one imports for seconds.

The controller's process never imports torch: workers make their process group themselves, and are told what to train by
name. Nothing here may bring it in.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer


class ColumnTrainer(DataParallelTrainer):
    """Runs a function on workers that read columns for themselves: it is given no datasets, and starts no actor to manage them.

    With `alone`, on a cluster that ends with this process, none either that frees the workers' places when Ray's controller
    dies, since that fails the training and the cluster goes with the run, and none that asks for more nodes.
    """

    def __init__(self, *arguments: Any, alone: bool, **options: Any) -> None:
        self._alone = alone
        self._needless = (DatasetsCallback, PlacementGroupCleanerCallback) if alone else (DatasetsCallback,)
        super().__init__(*arguments, backend_config=_Devices(), **options)

    def _create_default_callbacks(self) -> list:
        return [call for call in super()._create_default_callbacks() if not isinstance(call, self._needless)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._alone:
            options["scaling_policy"] = _Unannounced(self.scaling_config)
        return super()._initialize_and_run_controller(**options)


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
