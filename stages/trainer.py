"""Ray's trainer without the actors that have nothing to do here: each one imports for seconds before a training begins."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class ColumnTrainer(TorchTrainer):
    """A `TorchTrainer` that is given no datasets, since our loader reads columns, and starts no actor to manage them.

    With `alone`, on a cluster that ends with this process, none either that frees the workers' places when Ray's controller
    dies: that fails the training, and the cluster goes with the run.
    """

    def __init__(self, *arguments: Any, alone: bool, **options: Any) -> None:
        self._needless = (DatasetsCallback, PlacementGroupCleanerCallback) if alone else (DatasetsCallback,)
        super().__init__(*arguments, **options)

    def _create_default_callbacks(self) -> list:
        return [call for call in super()._create_default_callbacks() if not isinstance(call, self._needless)]
