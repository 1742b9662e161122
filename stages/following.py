"""A job watched to its end: its log heard, its cluster asked, every wait with a deadline. Imported where a job is submitted."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable

from ray.job_submission import JobDetails

from data.errors import StageFailed, UserError
from stages import journal
from stages.cluster import ray_command
from stages.contract import STOP_SECONDS, Progress, StageSpec
from stages.job_client import JobClient, Log, NoSuchJob, Unanswered

log = logging.getLogger("darkroom.jobs")

SLACK_SECONDS = 15.0
"""What a stage that notices its own trouble, or ends, may take to tell."""


class HeadLost(Exception):
    """The cluster does not know the job any more: its head is another one now."""


class Following:
    """One job that makes `spec`, and what its log has told so far."""

    def __init__(
        self, client: JobClient, job: str, spec: StageSpec, progress: Progress, say: Callable[[str], None]
    ) -> None:
        self.client, self.job, self.spec = client, job, spec
        self.progress, self.say = progress, say
        self.failure: Exception | None = None
        self.told = time.monotonic()

    def to_its_end(self) -> Exception:
        """Waits for the job's end; returns what to raise if there is no snapshot then.

        Raises StageFailed at the deadlines, and HeadLost. Stops the job when this process is told to stop.
        """
        with self.client.log(self.job) as lines:
            try:
                info = self._ended(lines)
            except Exception:
                raise
            except BaseException:  # Ctrl-C, or what Prefect makes of a cancelled run
                self._stop(lines)
                raise
            self._hear(lines.rest(SLACK_SECONDS))
        return self.failure or self._unexplained(info)

    def _hear(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.told = time.monotonic()
            match journal.parsed(line):
                case journal.Moved() as moved:
                    self.progress(moved.done, moved.total, moved.unit, moved.note)
                case journal.Failed() as failed:
                    self.failure = failed.error()
                case _:
                    self.say(line)

    def _ended(self, lines: Log) -> JobDetails:
        """What the cluster says of the job at its end."""
        began = answered = time.monotonic()
        while True:
            self._hear(lines.lines(1.0))
            try:
                info = self.client.look(self.job)
            except NoSuchJob as error:
                raise HeadLost from error
            except Unanswered as error:
                self._refuse_silence(answered, error)
                continue
            if info.status.is_terminal():
                return info
            answered = time.monotonic()
            self._refuse_delay(info, began)

    def _refuse_silence(self, since: float, error: Unanswered) -> None:
        if time.monotonic() - since > (patience := self.spec.jobs.silence_seconds):
            raise StageFailed(
                f"{self.client.address} has not answered for {patience:g} s ({error}; jobs.silence_seconds): the same command "
                f"goes on with job {self.job} if that still runs, and else with what it made"
            ) from error

    def _refuse_delay(self, info: JobDetails, began: float) -> None:
        now, patience = time.monotonic(), self.spec.fanout.stall_seconds + SLACK_SECONDS
        if info.status == "PENDING" and now - began > self.spec.jobs.start_seconds:
            trouble = self._waiting(info)
        elif info.status == "RUNNING" and now - self.told > patience:
            trouble = (
                f"job {self.job} has told nothing for {patience:g} s (fanout.stall_seconds), and was stopped"
            )
        else:
            return
        with contextlib.suppress(NoSuchJob, Unanswered):
            self.client.stop(self.job)
        raise StageFailed(trouble)

    def _stop(self, lines: Log) -> None:
        """Stops the job and waits until it has kept what it made."""
        log.warning("stopping job %s, which keeps what it has made", self.job)
        give_up = time.monotonic() + STOP_SECONDS + SLACK_SECONDS
        try:
            self.client.stop(self.job)
            while self.client.look(self.job).status == "RUNNING" and time.monotonic() < give_up:
                self._hear(lines.lines(1.0))
            log.warning("job %s is stopped", self.job)
        except (NoSuchJob, Unanswered, UserError) as error:
            log.warning("job %s could not be stopped (%s); it may still run", self.job, error)

    def _waiting(self, info: JobDetails) -> str:
        config = self.spec.jobs
        asked = (
            f"{config.driver_cpus:g} CPUs of one node (jobs.driver_cpus)"
            if config.driver_cpus
            else "a place on the head"
        )
        unpacked = f" and for {config.working_dir} to be unpacked there" if config.working_dir else ""
        return (
            f"job {self.job} did not begin within {config.start_seconds:g} s (jobs.start_seconds): it waits for {asked}"
            f"{unpacked}; Ray says: {_last_line(info.message)}"
        )

    def _unexplained(self, info: JobDetails) -> Exception:
        """What to raise where a job ended without a snapshot and without a word of its own."""
        said, python = _last_line(info.message), self.spec.jobs.python
        if info.status == "STOPPED":
            return StageFailed(f"job {self.job} was stopped; the same command resumes it")
        if info.status == "SUCCEEDED":
            return UserError(
                f"job {self.job} is done, but {self.spec.folder} has no snapshot here: give a --root that this machine and "
                "every node of the cluster share"
            )
        if info.driver_exit_code in (126, 127) or "No module named" in said:
            return UserError(
                f"the cluster cannot run `{python} -m stages` ({said}): install Darkroom there and start Ray from its "
                "environment, or name its interpreter with jobs.python, or send the code with jobs.working_dir"
            )
        return StageFailed(
            f"job {self.job} ended without its snapshot ({said}); the same command resumes it, and "
            f"`{ray_command()} job logs --address {self.client.address} {self.job}` shows what it said"
        )


def _last_line(text: str | None) -> str:
    return ([line.strip() for line in (text or "").splitlines() if line.strip()] or ["nothing"])[-1]
