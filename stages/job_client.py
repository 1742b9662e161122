"""The job server of a Ray cluster over HTTP: every request bounded in time, every refusal one sentence.

Ray is imported with this module, so import it where a job is about to be submitted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from typing import Any

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from data.errors import UserError
from stages.cluster import unauthorised

REQUEST_SECONDS = 30.0
logging.getLogger("ray.dashboard.modules").setLevel(logging.WARNING)
logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # says that a log has ended


class Unanswered(Exception):
    """The job server cannot be reached, or answers that it cannot do now what it was asked."""


class NoSuchJob(Exception):
    """The cluster knows no job of that id: it was never submitted, or its head is another one now."""


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text.strip().splitlines()[-1] if text.strip() else f"status {status}")
        self.status = status


class _Bounded(JobSubmissionClient):
    """Ray's client, which waits for an answer for ever, and tells refusals apart by their text alone."""

    def _do_request(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super()._do_request(*args, timeout=REQUEST_SECONDS, **kwargs)

    def _raise_error(self, r: requests.Response) -> None:
        raise _Refused(r.status_code, r.text)


class JobClient:
    """Jobs of the cluster whose job server listens at `address`."""

    def __init__(self, address: str) -> None:
        """Raises UserError when no job server of a fitting Ray answers there, or when it does not take our token."""
        os.environ["RAY_API_SERVER_ADDRESS"] = (
            address  # Ray's client lets RAY_ADDRESS win over what it is told
        )
        self.address = address
        try:
            self._client = self._asked(_Bounded, address)
        except UserError:
            raise
        except (
            Unanswered,
            RuntimeError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:  # another server's answer is anything
            raise UserError(
                f"--address {address}: no job server of a Ray cluster answers there ({_line(error)}); give the address of a "
                "head's dashboard, such as http://HOST:8265"
            ) from error
        theirs, ours = str(self._client._server_ray_version), ray.__version__
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise UserError(
                f"--address {address}: the cluster runs Ray {theirs}, and this Darkroom needs Ray {ours}: start the cluster "
                "from an image of this version"
            )

    def look(self, job: str) -> JobDetails:
        """What the cluster knows of `job`. Raises NoSuchJob or Unanswered."""
        try:
            return self._asked(self._client.get_job_info, job)
        except _Refused as error:
            if error.status == 404:
                raise NoSuchJob(job) from error
            raise Unanswered(str(error)) from error

    def submit(self, job: str, **request: Any) -> None:
        """Submits a job. Raises Unanswered, also where a job of that id is there already: `look` tells."""
        try:
            self._asked(self._client.submit_job, submission_id=job, **request)
        except _Refused as error:
            raise Unanswered(str(error)) from error

    def stop(self, job: str) -> None:
        """Asks `job` to stop; it then has the time that it was submitted with. Raises NoSuchJob or Unanswered."""
        try:
            self._asked(self._client.stop_job, job)
        except _Refused as error:
            raise (NoSuchJob(job) if error.status == 404 else Unanswered(str(error))) from error

    def log(self, job: str) -> Log:
        """The log of `job`, followed from its first line; to be used as a context."""
        return Log(self._client, job)

    def _asked(self, ask: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return ask(*args, **kwargs)
        except AuthenticationError as error:
            was_given = "invalid" in str(error).lower()
            raise UserError(unauthorised(self.address, was_given=was_given)) from error
        except (requests.exceptions.RequestException, ConnectionError) as error:
            raise Unanswered(type(error).__name__) from error  # its text repeats the request


class Log:
    """Follows a job's log in a thread, over interruptions of the connection, until the job has ended."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client, self._job, self._lines = client, job, queue.SimpleQueue[str]()
        self._seen, self._rest = 0, ""
        self._has_ended = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._following = self._loop.create_task(self._follow())
        self._thread = threading.Thread(target=self._run, daemon=True, name="darkroom-log")

    def __enter__(self) -> Log:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._following.cancel)
            self._thread.join(5)

    def lines(self, seconds: float) -> list[str]:
        """New lines; waits up to `seconds` for the first of them."""
        found = []
        deadline = time.monotonic() + seconds
        while True:
            try:
                found.append(self._lines.get(timeout=max(0.0, 0.0 if found else deadline - time.monotonic())))
            except queue.Empty:
                return found

    def rest(self, seconds: float) -> list[str]:
        """The lines up to the end of a job that has ended; waits up to `seconds` for that end."""
        self._has_ended.set()
        self._thread.join(seconds)
        return self.lines(0.0)

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._following)
        self._loop.close()

    async def _follow(self) -> None:
        while not self._has_ended.is_set():
            skip = self._seen  # every connection tells all from the first line on
            with contextlib.suppress(
                Exception
            ):  # whatever breaks it: the job itself is asked after elsewhere
                async for chunk in self._client.tail_job_logs(self._job):
                    news, skip = chunk[skip:], max(0, skip - len(chunk))
                    self._seen += len(news)
                    self._split(news)
            for _ in range(20):  # it also ends where the job goes on and a node between is lost
                if not self._has_ended.is_set():
                    await asyncio.sleep(0.1)

    def _split(self, news: str) -> None:
        *whole, self._rest = (self._rest + news).split("\n")
        for line in whole:
            self._lines.put(line)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
