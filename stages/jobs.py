"""Stages as Ray Jobs: submitted over HTTP by their spec, or adopted where they run already.

Done means that the snapshot exists; a job's own status is only told where it does not. A client that is killed leaves its
job running, one that is told to stop stops it. Nothing here starts Ray.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data import storage
from data.errors import StageFailed
from data.manifest import Snapshot
from stages import cluster, logs
from stages.contract import STOP_SECONDS, JobsConfig, Progress, StageSpec

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from stages.job_client import JobClient

log = logging.getLogger("darkroom.jobs")

HEADS = 3
"""Heads of a cluster on which one run submits the same stage, when each of them is lost."""


def is_job_server(address: str) -> bool:
    """Whether `--address` names a job server and not a cluster to attach to."""
    return address.startswith(("http://", "https://"))


def connect(address: str) -> JobClient:
    """A client of the job server at `address`. Raises UserError when none of a fitting Ray answers, or takes our token."""
    cluster.prepare_environment(address)
    from stages.job_client import JobClient

    return JobClient(address)


def run_as_job(
    spec: StageSpec,
    address: str,
    *,
    progress: Progress,
    say: Callable[[str], None],
    later: Sequence[StageSpec] = (),
) -> Snapshot:
    """The snapshot that `spec` names, made by a job of the cluster at `address`, or found.

    `say` is given the lines of the job's log that are no progress. Before it begins, the job refuses what the cluster can
    run neither now nor for one of the `later` stages. Raises what the stage raised; StageFailed when the job ended
    otherwise, did not begin or fell silent, or when the cluster did not answer.
    """
    if snapshot := spec.made():
        return snapshot
    client, asked = connect(address), _stage_request(spec, later)
    with logs.at(run=spec.run, stage=spec.stage):
        failure = _ended(client, spec, asked, progress, say)
    if snapshot := spec.made():
        return snapshot
    raise failure


def _ended(
    client: JobClient,
    spec: StageSpec,
    asked: Mapping[str, Any],
    progress: Progress,
    say: Callable[[str], None],
) -> Exception:
    """Follows the job that does `asked` to its end, on another head where one is lost; returns what to raise if it made no
    snapshot."""
    from stages.following import Following, HeadLost

    for _ in range(HEADS):
        job = adopt_or_submit(client, spec.stage, f"{spec.stage}-{spec.fingerprint}", asked, spec.jobs)
        try:
            return Following(client, job, spec, progress, say).to_its_end()
        except HeadLost:
            log.warning(
                "the head of %s does not know job %s any more: submitting it again", client.address, job
            )
        except StageFailed as error:
            return error
    return StageFailed(f"{client.address} lost its head {HEADS} times while {spec.stage} ran")


def request(
    makes: str, line: Sequence[str], config: JobsConfig, stop_seconds: int = STOP_SECONDS
) -> dict[str, Any]:
    """What is submitted so that `python LINE` makes what lies at the URI `makes`. No secret is in it."""
    folder = {"working_dir": config.working_dir} if config.working_dir else {}
    return {
        "entrypoint": shlex.join([config.python, *line]),
        "entrypoint_num_cpus": config.driver_cpus,
        "metadata": {"makes": makes, "waits_for": f"{config.driver_cpus:g} CPUs, {config.working_dir}"},
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_seconds)}} | folder,
    }


def adopt_or_submit(
    client: JobClient, what: str, name: str, request: Mapping[str, Any], config: JobsConfig
) -> str:
    """The id of the job `NAME-aN` that does `request`: one that is under way, or a new one. Who comes second adopts.

    Raises StageFailed when the cluster takes none within `config.start_seconds`.
    """
    from stages.job_client import NoSuchJob, Unanswered

    number, why, give_up = 1, "", time.monotonic() + config.start_seconds
    while time.monotonic() < give_up:
        job = f"{name}-a{number}"
        try:
            if _is_under_way(client.look(job), request):
                log.info("%s goes on as job %s", what, job)
                return job
            number += 1
        except NoSuchJob:
            try:
                client.submit(job, **request)
                log.info("%s is job %s", what, job)
                return job
            except Unanswered as error:  # or someone else was faster: the next look tells
                why = str(error)
                time.sleep(1.0)
        except Unanswered as error:
            why = str(error)
            time.sleep(1.0)
    raise StageFailed(f"{client.address} took no job within {config.start_seconds:g} s ({why})")


def _stage_request(spec: StageSpec, later: Sequence[StageSpec]) -> dict[str, Any]:
    """The request of a stage; the specs are written to the store, each beside its artifact."""
    uri, *others = [_written(each) for each in (spec, *later)]
    checked = [part for other in others for part in ("--then", other)]
    return request(uri, ["-m", "stages", uri, "--address", "auto", "--journal", *checked], spec.jobs)


def _written(spec: StageSpec) -> str:
    uri = storage.join(spec.folder, "_meta", "specs", f"{spec.fingerprint}.json")
    storage.write_bytes(uri, spec.model_dump_json().encode())
    return uri


def _is_under_way(info: JobDetails, request: Mapping[str, Any]) -> bool:
    """Whether a job is ours to follow. One of the same id may be of another root; one that waits may wait for what is no
    longer asked for."""
    theirs, ours = info.metadata or {}, request["metadata"]
    if info.status.is_terminal() or theirs.get("makes") != ours["makes"]:
        return False
    return info.status == "RUNNING" or theirs.get("waits_for") == ours["waits_for"]
