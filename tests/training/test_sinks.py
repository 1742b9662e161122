"""Rows of a training: kept in Parquet and in TensorBoard's own format, across interruptions."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from tensorboardX.proto.event_pb2 import Event

from data.errors import UserError
from training import sinks
from training.sinks import Sinks


def _row(step: int, loss: float, **more: object) -> dict[str, object]:
    return {"step": step, "loss": loss, **more}


def _events(folder: Path) -> list[Event]:
    """Every event of the files under `folder`, read by the format's definition: length, CRC, payload, CRC."""
    found = []
    for path in sorted((folder / "tensorboard").glob("events.*")):
        payload = path.read_bytes()
        while payload:
            (length,) = struct.unpack("<Q", payload[:8])
            found.append(Event.FromString(payload[12 : 12 + length]))
            payload = payload[12 + length + 4 :]
    return found


def test_rows_are_kept_as_columns_and_as_scalars(tmp_path: Path) -> None:
    kept = Sinks(str(tmp_path))
    kept.write(_row(20, 0.5, device="cpu"))
    kept.write(_row(40, 0.25, validation_loss=0.75, device="cpu"))
    kept.close()
    assert pq.read_table(tmp_path / "metrics.parquet").to_pylist() == [
        {"step": 20, "loss": 0.5, "device": "cpu", "validation_loss": None},
        {"step": 40, "loss": 0.25, "device": "cpu", "validation_loss": 0.75},
    ]
    scalars = [(v.tag, e.step, v.simple_value) for e in _events(tmp_path) for v in e.summary.value]
    assert scalars == [("loss", 20, 0.5), ("loss", 40, 0.25), ("validation_loss", 40, 0.75)]


def test_steps_that_are_made_again_replace_those_of_the_killed_process(tmp_path: Path) -> None:
    first = Sinks(str(tmp_path))
    for step in (20, 40, 60):
        first.write(_row(step, 1.0))
    first.close()
    second = Sinks(str(tmp_path))
    second.write(_row(40, 0.5))
    second.close()
    rows = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert [(row["step"], row["loss"]) for row in rows] == [(20, 1.0), (40, 0.5)]
    starts = [event for event in _events(tmp_path) if event.session_log.status == 1]
    assert [event.step for event in starts] == [20, 40], "TensorBoard is told to forget what came after"


def test_a_rollback_takes_back_the_rows_after_the_one_that_it_tells_again(tmp_path: Path) -> None:
    kept = Sinks(str(tmp_path))
    for step in (20, 40, 60):
        kept.write(_row(step, 1.0, rollbacks=0))
    kept.write(_row(20, 1.0, rollbacks=1))
    kept.write(_row(80, 0.5, rollbacks=0))
    kept.close()
    rows = pq.read_table(tmp_path / "metrics.parquet").to_pylist()
    assert [(row["step"], row["rollbacks"]) for row in rows] == [(20, 1), (80, 0)]
    starts = [event for event in _events(tmp_path) if event.session_log.status == 1]
    assert [event.step for event in starts] == [20, 20], "TensorBoard is told to forget what came after"
    told = [(e.step, v.simple_value) for e in _events(tmp_path) for v in e.summary.value]
    assert told[-4:] == [(20, 1.0), (20, 1.0), (80, 0.5), (80, 0.0)]


def test_many_rows_are_on_disk_before_the_end(tmp_path: Path) -> None:
    kept = Sinks(str(tmp_path))
    for step in range(1, 52):
        kept.write(_row(step, 1.0))
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 50
    kept.close()
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 51


def test_what_a_checkpoint_holds_is_on_disk_before_it(tmp_path: Path) -> None:
    """Else a kill after it would leave a hole: nobody tells those steps again."""
    kept = Sinks(str(tmp_path))
    kept.write(_row(20, 1.0))
    kept.flush()
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 1
    written = (tmp_path / "metrics.parquet").stat().st_mtime_ns
    kept.flush()
    assert (tmp_path / "metrics.parquet").stat().st_mtime_ns == written, "nothing is new"
    assert [v.tag for e in _events(tmp_path) for v in e.summary.value] == ["loss"]


def test_a_service_without_its_library_is_refused_by_its_setting() -> None:
    sinks.require("", "vae.log_to")
    with pytest.raises(UserError, match=r"vae\.log_to=nowhere_to_log, but the Python library nowhere_to_log"):
        sinks.require("nowhere_to_log", "vae.log_to")


class FakeWandb(ModuleType):
    """The calls of `wandb` that a sink makes, noted; a run's history drops what lies before its last step, as W&B does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.defined: list[tuple[str, str | None]] = []
        self.histories: dict[str, list[dict[str, float]]] = {}
        self.finished = 0
        self.is_down = False

    def init(self, **arguments: Any) -> Any:
        self.inits.append(arguments)
        is_known = arguments["id"] in self.histories
        history = self.histories.setdefault(arguments["id"], [])
        return SimpleNamespace(
            define_metric=lambda name, step_metric=None: self.defined.append((name, step_metric)),
            log=lambda metrics, step=None: self._log(history, metrics, step),
            finish=self._finish,
            resumed=is_known,
        )

    def _log(self, history: list[dict[str, float]], metrics: dict[str, float], step: int | None) -> None:
        if self.is_down:
            raise ConnectionError("no answer")
        step = len(history) if step is None else step
        if not history or step > history[-1]["_step"]:
            history.append({"_step": step, **metrics})

    def _finish(self) -> None:
        self.finished += 1


class FakeMlflow(ModuleType):
    """The calls of `mlflow` that a sink makes, noted; like it, it refuses a parameter that changes and a second active run."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: list[Any] = []
        self.active: Any = None
        self.metrics: list[tuple[str, int, dict[str, float]]] = []
        self.is_down = False

    def set_experiment(self, name: str) -> None:
        self._answer()
        self.experiment = name

    def search_runs(
        self, *, experiment_names: list[str], filter_string: str, output_format: str
    ) -> list[Any]:
        assert (experiment_names, output_format) == ([self.experiment], "list")
        return [run for run in self.runs if filter_string == f"attributes.run_name = '{run.name}'"]

    def start_run(self, run_id: str | None = None, run_name: str = "") -> None:
        assert self.active is None, "a run is active already"
        if run_id is None:
            info = SimpleNamespace(run_id=f"id{len(self.runs)}")
            self.runs.append(SimpleNamespace(name=run_name, info=info, data=SimpleNamespace(params={})))
            run_id = info.run_id
        self.active = next(run for run in self.runs if run.info.run_id == run_id)

    def log_params(self, params: dict[str, Any]) -> None:
        self._answer()
        for name, value in params.items():
            assert self.active.data.params.setdefault(name, str(value)) == str(value), f"{name} changes"

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self._answer()
        self.metrics.append((self.active.info.run_id, step, metrics))

    def end_run(self) -> None:
        self.active = None

    def _answer(self) -> None:
        if self.is_down:
            raise ConnectionError("no answer")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def _resumed(folder: Path, services: str, changes: dict[str, Any]) -> None:
    """A training killed after step 60 whose last checkpoint is that of step 20, and its resume with a changed config."""
    config = {"max_steps": 60, "seed": 1}
    killed = Sinks(str(folder), services, run="vae-1a", config=config)
    for step in (20, 40, 60):
        killed.write(_row(step, 1.0, device="cpu"))
    if mlflow := sys.modules.get("mlflow"):
        mlflow.active = None  # with its process
    again = Sinks(str(folder), services, run="vae-1a", config=config | changes)
    for step in (40, 60, 80):
        again.write(_row(step, 0.5, device="cpu"))
    again.close()


def test_wandb_gets_one_run_and_keeps_the_rows_that_a_resume_makes_again(tmp_path: Path, wandb) -> None:
    _resumed(tmp_path, "wandb", {"max_steps": 80})
    first, second = wandb.inits
    assert first == {
        "project": "darkroom", "id": "vae-1a", "name": "vae-1a", "dir": str(tmp_path),
        "config": {"max_steps": 60, "seed": 1}, "resume": "allow",
    }  # fmt: skip
    assert second["id"] == "vae-1a" and second["config"]["max_steps"] == 80
    assert ("step", None) in wandb.defined and ("*", "step") in wandb.defined
    history = [(row["step"], row["loss"]) for row in wandb.histories["vae-1a"]]
    assert history == [(20, 1.0), (40, 1.0), (60, 1.0), (40, 0.5), (60, 0.5), (80, 0.5)]
    assert all("device" not in row for row in wandb.histories["vae-1a"])
    assert wandb.finished == 1


def test_mlflow_gets_one_run_whose_parameters_are_told_once(tmp_path: Path, mlflow) -> None:
    _resumed(tmp_path, "mlflow", {"max_steps": 80, "new": 2})
    (run,) = mlflow.runs
    assert run.name == "vae-1a" and run.data.params == {"max_steps": "60", "seed": "1", "new": "2"}
    told = [(step, metrics) for _, step, metrics in mlflow.metrics]
    assert told == [(s, {"loss": 1.0}) for s in (20, 40, 60)] + [(s, {"loss": 0.5}) for s in (40, 60, 80)]
    assert mlflow.active is None


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_longer_trainings_own_run_has_the_rows_of_the_shorter_one(
    tmp_path: Path, request, service: str
) -> None:
    fake, told = request.getfixturevalue(service), {"wandb": _told_wandb, "mlflow": _told_mlflow}[service]
    shorter = Sinks(str(tmp_path))
    for step in (20, 40):
        shorter.write(_row(step, 1.0))
    shorter.close()
    for steps in ((60, 80), (100,)):
        longer = Sinks(str(tmp_path), service, run="vae-1a")
        for step in steps:
            longer.write(_row(step, 0.5))
        longer.close()
    assert told(fake) == [20, 40, 60, 80, 100]


def _told_wandb(fake: FakeWandb) -> list[float]:
    return [row["step"] for row in fake.histories.get("vae-1a", [])]


def _told_mlflow(fake: FakeMlflow) -> list[float]:
    return [step for _, step, _ in fake.metrics]


@pytest.mark.parametrize(("service", "told"), [("wandb", _told_wandb), ("mlflow", _told_mlflow)])
def test_a_server_that_fails_ends_no_training_and_gets_the_rows_when_it_is_back(
    tmp_path: Path, request, monkeypatch, caplog, service: str, told: Callable[[Any], list[float]]
) -> None:
    monkeypatch.setattr(sinks.Service, "PAUSE", 0.0)
    fake = request.getfixturevalue(service)
    fake.is_down = True
    kept = Sinks(str(tmp_path), service, run="vae-1a", config={"seed": 1})
    for step in (20, 40):
        kept.write(_row(step, 1.0))
        kept.flush()
    assert told(fake) == []
    fake.is_down = False
    kept.write(_row(60, 1.0))
    kept.close()
    assert told(fake) == [20, 40, 60]
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warning == f"{service} fails, and the training goes on: ConnectionError: no answer"


def test_a_server_that_failed_is_left_alone_for_a_while_and_what_it_missed_is_told(
    tmp_path: Path, wandb, caplog
) -> None:
    kept = Sinks(str(tmp_path), "wandb", run="vae-1a")
    wandb.is_down = True
    kept.write(_row(20, 1.0))
    wandb.is_down = False
    kept.write(_row(40, 1.0))
    assert _told_wandb(wandb) == [], "not yet asked again"
    wandb.is_down = True
    kept.close()
    assert "wandb did not get 2 rows; metrics.parquet has all of them" in caplog.text
    assert pq.read_table(tmp_path / "metrics.parquet").num_rows == 2
