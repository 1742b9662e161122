"""Stages as Ray Jobs: submitted over HTTP by their spec, adopted where they run already, watched by their log.

Done means that the snapshot exists; a job's own status is told only where it does not. A client that is killed leaves its
job running, one that is told to stop stops it. Nothing here starts Ray.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data import storage
from data.config import Config, operational
from data.errors import StageFailed, UserError
from data.manifest import Snapshot
from stages import cluster, journal
from stages.catalogue import made
from stages.contract import Progress, StageSpec

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from stages.job_client import JobClient, Log

log = logging.getLogger("darkroom.jobs")

STOP_SECONDS = 60
"""Between a job's SIGTERM and its SIGKILL: time for a checkpoint. Ray's default is 3."""
HEADS = 3
"""Heads of a cluster on which one run submits the same stage, when each of them is lost."""


class JobsConfig(Config):
    """How stages run as jobs of the cluster that `--address http://…` names; no part of any result."""

    python: str = operational("python", description="the interpreter, where the cluster runs a job")
    working_dir: str | None = operational(
        None, description="folder whose code is sent to the cluster; none: Darkroom is installed there"
    )
    driver_cpus: float = operational(
        0.0, ge=0, description="CPUs held by the process that drives a stage; with 0 it runs on the head"
    )
    start_seconds: float = operational(300.0, gt=0, description="give up a job that has not begun by then")
    silence_seconds: float = operational(
        60.0, gt=0, description="give up when the cluster has not answered for this long"
    )


def is_job_server(address: str) -> bool:
    """Whether `--address` names a job server and not a cluster to attach to."""
    return address.startswith(("http://", "https://"))


def require(address: str) -> None:
    """Raises UserError when no job server of a fitting Ray answers at `address`, or when it does not take our token."""
    _client(address)


def run_as_job(
    spec: StageSpec,
    address: str,
    config: JobsConfig,
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
    if snapshot := made(spec):
        return snapshot
    client, request = _client(address), _request(spec, config, later)
    failure: Exception = StageFailed(f"{address} lost its head {HEADS} times while {spec.stage} ran")
    for _ in range(HEADS):
        job = _adopt_or_submit(client, spec, request, config)
        try:
            failure = _followed(client, job, spec, config, progress, say)
        except _HeadLost:
            log.warning("the head of %s does not know job %s any more: submitting it again", address, job)
            continue
        except StageFailed as error:
            failure = error
        break
    if snapshot := made(spec):
        return snapshot
    raise failure


class _HeadLost(Exception):
    pass


def _client(address: str) -> JobClient:
    cluster.prepare_environment(address)
    from stages.job_client import JobClient

    return JobClient(address)


def _request(spec: StageSpec, config: JobsConfig, later: Sequence[StageSpec]) -> dict[str, Any]:
    """What is submitted; the specs are written to the store, each beside its artifact. No secret is in any of it."""
    uri, *others = [_written(each) for each in (spec, *later)]
    checked = [part for other in others for part in ("--then", other)]
    entrypoint = [config.python, "-m", "stages", uri, "--address", "auto", "--journal", *checked]
    return {
        "entrypoint": shlex.join(entrypoint),
        "entrypoint_num_cpus": config.driver_cpus,
        "metadata": {"spec": uri, "asks": config.model_dump_json()},
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
        | ({"working_dir": config.working_dir} if config.working_dir else {}),
    }


def _written(spec: StageSpec) -> str:
    uri = storage.join(spec.folder, "_meta", "specs", f"{spec.fingerprint}.json")
    storage.write_bytes(uri, spec.model_dump_json().encode())
    return uri


def _adopt_or_submit(client: JobClient, spec: StageSpec, request: dict[str, Any], config: JobsConfig) -> str:
    """The id of the job that makes `spec`: one that is under way, or a new one. Who comes second adopts."""
    from stages.job_client import NoSuchJob, Unanswered

    number, why, give_up = 1, "", time.monotonic() + config.start_seconds
    while time.monotonic() < give_up:
        job = f"{spec.stage}-{spec.fingerprint}-a{number}"
        try:
            if _is_under_way(client.look(job), request):
                log.info("%s goes on as job %s", spec.stage, job)
                return job
            number += 1
        except NoSuchJob:
            try:
                client.submit(job, **request)
                log.info("%s is job %s", spec.stage, job)
                return job
            except Unanswered as error:  # or someone else was faster: the next look tells
                why = str(error)
                time.sleep(1.0)
        except Unanswered as error:
            why = str(error)
            time.sleep(1.0)
    raise StageFailed(f"{client.address} took no job within {config.start_seconds:g} s ({why})")


def _is_under_way(info: JobDetails, request: Mapping[str, Any]) -> bool:
    """Whether a job is ours to follow. One of the same name may be of another root; one that waits may wait for what is no
    longer asked for."""
    metadata = info.metadata or {}
    if info.status.is_terminal() or metadata.get("spec") != request["metadata"]["spec"]:
        return False
    return info.status == "RUNNING" or metadata == request["metadata"]


def _followed(
    client: JobClient,
    job: str,
    spec: StageSpec,
    config: JobsConfig,
    progress: Progress,
    say: Callable[[str], None],
) -> Exception:
    """Watches `job` to its end; returns what to raise if there is no snapshot then. Stops it when this process is told to."""
    told = _Told(progress, say)
    with client.log(job) as lines:
        try:
            info = _ended(client, job, spec, config, lines, told)
        except Exception:
            raise
        except BaseException:  # Ctrl-C, or what Prefect makes of a cancelled run
            _stop(client, job, lines, told)
            raise
        told.hear(lines.rest(10.0))
    return told.failure or _unexplained(info, job, spec, config, client.address)


class _Told:
    """What a job's log has told so far."""

    def __init__(self, progress: Progress, say: Callable[[str], None]) -> None:
        self.progress, self.say = progress, say
        self.failure: Exception | None = None
        self.at = time.monotonic()

    def hear(self, lines: Iterable[str]) -> None:
        """Passes progress on as progress, and lines that are none of the journal's as they are."""
        for line in lines:
            self.at = time.monotonic()
            match journal.parsed(line):
                case journal.Moved() as moved:
                    self.progress(moved.done, moved.total, moved.unit, moved.note)
                case journal.Failed() as failed:
                    self.failure = failed.error()
                case _:
                    self.say(line)


def _ended(
    client: JobClient, job: str, spec: StageSpec, config: JobsConfig, lines: Log, told: _Told
) -> JobDetails:
    """What the cluster says of `job` at its end. Raises StageFailed at the deadlines, _HeadLost where it is unknown."""
    from stages.job_client import NoSuchJob, Unanswered

    began = answered = time.monotonic()
    patience = spec.fanout.stall_seconds + STOP_SECONDS
    while True:
        told.hear(lines.lines(1.0))
        now = time.monotonic()
        try:
            info = client.look(job)
            answered = now
        except NoSuchJob as error:
            raise _HeadLost from error
        except Unanswered as error:
            if now - answered < config.silence_seconds:
                continue
            raise StageFailed(
                f"{client.address} has not answered for {config.silence_seconds:g} s ({error}; jobs.silence_seconds); the same "
                f"command goes on with job {job} if that still runs, and resumes what it made if not"
            ) from error
        if info.status.is_terminal():
            return info
        if info.status == "PENDING" and now - began > config.start_seconds:
            client.stop(job)
            raise StageFailed(_waiting(job, info, config))
        if info.status == "RUNNING" and now - told.at > patience:
            client.stop(job)
            raise StageFailed(
                f"job {job} has told nothing for {patience:g} s (fanout.stall_seconds), and was stopped"
            )


def _stop(client: JobClient, job: str, lines: Log, told: _Told) -> None:
    """Stops `job` and waits until it has kept what it made."""
    from stages.job_client import NoSuchJob, Unanswered

    log.warning("stopping job %s, which keeps what it has made", job)
    give_up = time.monotonic() + STOP_SECONDS + 15
    try:
        client.stop(job)
        while client.look(job).status == "RUNNING" and time.monotonic() < give_up:
            told.hear(lines.lines(1.0))
        log.warning("job %s is stopped", job)
    except (NoSuchJob, Unanswered, UserError) as error:
        log.warning("job %s could not be stopped (%s); it may still run", job, error)


def _waiting(job: str, info: JobDetails, config: JobsConfig) -> str:
    asked = (
        f"{config.driver_cpus:g} CPUs on one node (jobs.driver_cpus)"
        if config.driver_cpus
        else "a place on the head"
    )
    return (
        f"job {job} did not begin within {config.start_seconds:g} s (jobs.start_seconds): it waits for {asked}"
        + (f" and for {config.working_dir} to be unpacked there" if config.working_dir else "")
        + f". Ray says: {_last_line(info.message)}"
    )


def _unexplained(info: JobDetails, job: str, spec: StageSpec, config: JobsConfig, address: str) -> Exception:
    """What to raise where a job ended without a snapshot and without a word of its own."""
    said = _last_line(info.message)
    if info.status == "STOPPED":
        return StageFailed(f"job {job} was stopped; the same command resumes it")
    if info.status == "SUCCEEDED":
        return UserError(
            f"job {job} is done, but {spec.folder} has no snapshot here: give a --root that this machine and every node "
            "of the cluster share"
        )
    if info.driver_exit_code in (126, 127) or "No module named" in said:
        return UserError(
            f"the cluster cannot run `{config.python} -m stages` ({said}): install Darkroom there and start Ray from its "
            "environment, or name its interpreter with jobs.python, or send the code with jobs.working_dir"
        )
    return StageFailed(
        f"job {job} ended without its snapshot ({said}); the same command resumes it, and "
        f"`ray job logs --address {address} {job}` shows what it said"
    )


def _last_line(text: str | None) -> str:
    return ([line.strip() for line in (text or "").splitlines() if line.strip()] or ["nothing"])[-1]
