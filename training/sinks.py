"""Where the rows of a training go while it runs: Parquet and TensorBoard always, Weights & Biases or MLflow when asked for.

A row is a flat dict with `step`; its numbers are the metrics. Only rank 0 has sinks.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data import storage
from data.errors import UserError

log = logging.getLogger("darkroom.train")

Row = Mapping[str, Any]


class Sink(Protocol):
    """One place that keeps rows."""

    def write(self, row: Row) -> None:
        """Takes one row."""
        ...

    def flush(self) -> None:
        """All that was taken is safe, should this process be killed."""
        ...

    def close(self) -> None:
        """Nothing follows; all that was taken is safe."""
        ...


class ParquetSink:
    """`metrics.parquet`, one column per metric; a row replaces those of its step and later: a resume or rollback voids them."""

    WRITE_EVERY = 50

    def __init__(self, folder: str) -> None:
        self.path = storage.join(folder, "metrics.parquet")
        self.rows: list[Row] = rows_at(self.path)
        self.is_ahead = False
        """Of what lies on disk."""

    def write(self, row: Row) -> None:
        """Keeps the row; every fiftieth brings all of them to disk."""
        self.rows = [kept for kept in self.rows if kept["step"] < row["step"]] + [dict(row)]
        self.is_ahead = True
        if len(self.rows) % self.WRITE_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        """Brings all rows to disk in one step."""
        if not self.is_ahead:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        columns = {name: [row.get(name) for row in self.rows] for name in names}
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        storage.write_bytes(self.path, buffer.getvalue())
        self.is_ahead = False

    def close(self) -> None:
        """As `flush`."""
        self.flush()


class TensorBoardSink:
    """An event file under `tensorboard/`; steps from a row's own on that were written before it are purged.

    They are a killed process's, or a rollback's, which begins another file: only a file's beginning can purge. An object store gets it when the sink is closed, since no file grows there.
    """

    def __init__(self, folder: str) -> None:
        self.url, self.writer, self.last = storage.join(folder, "tensorboard"), None, -1
        is_local = storage.is_local(folder)
        self.folder = storage.local_path(self.url) if is_local else Path(tempfile.mkdtemp(prefix="darkroom-"))

    def write(self, row: Row) -> None:
        """One scalar per metric."""
        if self.writer is None or row["step"] <= self.last:
            self._begin(row["step"])
        assert self.writer is not None
        for name, value in metrics_of(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.last = row["step"]

    def _begin(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        if self.writer is not None:
            self.writer.close()
        unique = f".{time.time_ns():x}"  # a file's own name knows seconds only
        self.writer = SummaryWriter(str(self.folder), purge_step=step, flush_secs=10, filename_suffix=unique)

    def flush(self) -> None:
        """Brings the file to disk; it does so every ten seconds by itself."""
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        """Ends the file."""
        if self.writer is not None:
            self.writer.close()
        if not storage.is_local(self.url):
            for path in self.folder.iterdir():
                storage.publish_file(path, storage.join(self.url, path.name))
            self.folder.rmdir()


class WandbSink:
    """A run of Weights & Biases, the same one after a resume; where it goes is for its own environment variables.

    Rows are ordered by a metric `step`: W&B drops what lies before its own last step, as rows made again after a resume do.
    """

    def __init__(self, folder: str, run: str, config: Row) -> None:
        import wandb

        here = folder if storage.is_local(folder) else tempfile.gettempdir()
        self.run = wandb.init(
            project="darkroom", id=run, name=run, dir=here, config=dict(config), resume="allow"
        )
        self.is_new = not self.run.resumed
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, row: Row) -> None:
        """One entry of the run's history."""
        self.run.log({"step": row["step"], **metrics_of(row)})

    def flush(self) -> None:
        """Nothing: its own process sends what it was given."""

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


class MlflowSink:
    """A run of MLflow in the experiment `darkroom`, the same one after a resume; where it goes is for MLFLOW_TRACKING_URI."""

    def __init__(self, run: str, config: Row) -> None:
        import mlflow

        mlflow.set_experiment("darkroom")
        self.mlflow = mlflow
        named = f"attributes.run_name = '{run}'"
        earlier = mlflow.search_runs(experiment_names=["darkroom"], filter_string=named, output_format="list")
        self.is_new = not earlier
        known = earlier[0].data.params if earlier else {}
        self.params = {name: value for name, value in config.items() if name not in known}
        """What is still to be told: MLflow refuses a parameter that changes, such as the `max_steps` of a longer training."""
        mlflow.start_run(run_id=earlier[0].info.run_id if earlier else None, run_name=run)

    def write(self, row: Row) -> None:
        """The row's metrics at its step."""
        if self.params:
            self.mlflow.log_params(self.params)
            self.params = {}
        self.mlflow.log_metrics(metrics_of(row), step=row["step"])

    def flush(self) -> None:
        """Nothing: a row is sent as it is written."""

    def close(self) -> None:
        """Ends the run."""
        self.mlflow.end_run()


class ServerSink(Sink, Protocol):
    """A sink that may have had rows in an earlier process."""

    is_new: bool
    """It never had any."""


class Service:
    """A sink at a server, which may fail: rows wait for it, and the training goes on.

    `connect` makes the sink, now and, where that fails, later. A new one is told `earlier` rows first: those of the shorter
    training that this one goes on from. After a failure, told once, the server is left alone for
    PAUSE seconds, since clients try for minutes before they give up.
    """

    PAUSE = 600.0

    def __init__(self, name: str, connect: Callable[[], ServerSink], earlier: list[Row]) -> None:
        self.name, self.connect, self.earlier = name, connect, earlier
        self.sink: ServerSink | None = None
        self.unsent: list[Row] = []
        self.retry_at, self.has_warned = 0.0, False
        self._try(self._send)

    def write(self, row: Row) -> None:
        """Sends the row and what waits, or lets it wait."""
        self.unsent.append(row)
        if time.monotonic() >= self.retry_at:
            self._try(self._send)

    def flush(self) -> None:
        """As the sink; rows that wait are in `metrics.parquet`."""
        if self.sink is not None:
            self._try(self.sink.flush)

    def close(self) -> None:
        """Sends what waits, a last time, and ends the sink."""
        self._try(self._send)
        if self.sink is not None:
            self._try(self.sink.close)
        if self.unsent:
            log.warning(
                "%s did not get %d rows; metrics.parquet has all of them", self.name, len(self.unsent)
            )

    def _send(self) -> None:
        if self.sink is None:
            self.sink = self.connect()
            self.unsent[:0] = self.earlier if self.sink.is_new else []
        while self.unsent:
            self.sink.write(self.unsent[0])
            del self.unsent[0]

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (
            Exception
        ) as error:  # whatever a client library raises: its metrics are no reason to end a training
            self.retry_at = time.monotonic() + self.PAUSE
            if not self.has_warned:
                log.warning(
                    "%s fails, and the training goes on: %s: %s", self.name, type(error).__name__, error
                )
            self.has_warned = True


class Sinks:
    """Every sink of one training; `folder` takes the files of those that write any, `services` is `TrainConfig.log_to`."""

    def __init__(self, folder: str, services: str = "", *, run: str = "", config: Row | None = None) -> None:
        if storage.is_local(folder):
            storage.local_path(folder).mkdir(parents=True, exist_ok=True)
        rows = ParquetSink(folder)
        earlier = list(rows.rows)
        self.sinks: list[Sink] = [rows, TensorBoardSink(folder)]
        if "wandb" in services.split(","):
            self.sinks.append(Service("wandb", lambda: WandbSink(folder, run, config or {}), earlier))
        if "mlflow" in services.split(","):
            self.sinks.append(Service("mlflow", lambda: MlflowSink(run, config or {}), earlier))

    def write(self, row: Row) -> None:
        """Gives the row to every sink."""
        for sink in self.sinks:
            sink.write(row)

    def flush(self) -> None:
        """Makes safe what every sink was given."""
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        """Closes every sink."""
        for sink in self.sinks:
            sink.close()


def rows_at(url: str) -> list[Row]:
    """What a `metrics.parquet` holds; nothing where there is none."""
    return pq.read_table(io.BytesIO(storage.read_bytes(url))).to_pylist() if storage.exists(url) else []


def require(services: str, setting: str) -> None:
    """Raises UserError when a service is asked for by `setting` whose library is not installed."""
    for service in filter(None, services.split(",")):
        if importlib.util.find_spec(service) is None:
            raise UserError(
                f"{setting}={service}, but the Python library {service} is not installed: "
                f"`pip install {service}`, or leave it out (Parquet and TensorBoard are always written)"
            )


def metrics_of(row: Row) -> dict[str, float]:
    """The numbers of a row, but for its step."""
    return {name: float(value) for name, value in row.items() if isinstance(value, Real) and name != "step"}
