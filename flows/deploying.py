"""What runs by itself, from a reviewable file to a Prefect server: work pool, automation, deployments and their schedules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError, ScriptError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from data.errors import UserError
from flows.deployed import TAG

FILE = Path(__file__).parents[1] / "infra" / "prefect" / "prefect.yaml"
ZOMBIES = "darkroom: a run whose process has gone is crashed"
HEARTBEAT_SECONDS = 30
"""The least that Prefect allows; `prefect.yaml` gives it to every run."""
MISSED = timedelta(seconds=4 * HEARTBEAT_SECONDS)
EPOCH = "2020-01-01T00:00:00+00:00"
"""Where an interval counts from, unless the file says: one that counted from now would change with every deploy."""


@dataclass(frozen=True)
class Applied:
    """What `deploy` did about one thing on the server."""

    kind: str
    name: str
    change: str
    """created, changed, or unchanged."""
    details: tuple[str, ...] = ()
    """What of it changed."""


def deploy(file: Path, fill: Mapping[str, str]) -> list[Applied]:
    """Makes the server at PREFECT_API_URL hold what `file` says, and returns what that took; the second time, nothing.

    `fill` goes into every `run` that leaves its keys out and whose flow takes them. Raises UserError for a file that cannot be
    applied, and where no server answers.
    """
    entries = _entries(file)
    with server() as client:
        pools = sorted({entry["work_pool"]["name"] for entry in entries})
        done = [_apply_pool(client, name) for name in pools]
        done.append(_apply_automation(client))
        return done + [_apply(client, entry, fill) for entry in entries]


@contextmanager
def server() -> Iterator[SyncPrefectClient]:
    """A client of the server at PREFECT_API_URL. Raises UserError where none is named or none answers."""
    url = PREFECT_API_URL.value()
    if not url:
        raise UserError(
            "no Prefect server is named: set PREFECT_API_URL, such as http://127.0.0.1:4200/api, or use `darkroom serve`"
        )
    with get_client(sync_client=True) as client:
        if trouble := client.api_healthcheck():
            raise UserError(f"PREFECT_API_URL={url}: no Prefect server answers there ({trouble})")
        yield client


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(file.read_text())["deployments"]
        named = [(entry["name"], entry["entrypoint"], entry["work_pool"]["name"]) for entry in entries]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a prefect.yaml") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file}: `deployments` must be a list, each with name, entrypoint and work_pool.name"
        ) from error
    assert len(named) == len(entries)
    return entries


def _apply_pool(client: SyncPrefectClient, name: str) -> Applied:
    try:
        client.read_work_pool(name)
        return Applied("work pool", name, "unchanged")
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        return Applied("work pool", name, "created")


def _apply_automation(client: SyncPrefectClient) -> Applied:
    wanted = AutomationCore(
        name=ZOMBIES,
        description="A run that stops beating without having ended lost its process and its worker; the next run resumes it.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={
                "prefect.resource.id": f"prefect.tag.{TAG}",
                "prefect.resource.role": "tag",
            },
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.heartbeat"},
            expect={
                f"prefect.flow-run.{event}"
                for event in ("heartbeat", "Completed", "Failed", "Crashed", "Cancelled", "Suspended")
            },
            threshold=1,
            within=MISSED,
        ),
        actions=[
            ChangeFlowRunState(
                state="CRASHED",
                message=f"no heartbeat for {MISSED.seconds} s: its process has gone; the next run resumes it",
            )
        ],
    )
    found = client.read_automations_by_name(ZOMBIES)
    if not found:
        client.create_automation(wanted)
        return Applied("automation", ZOMBIES, "created")
    if all(
        getattr(found[0], name) == getattr(wanted, name) for name in ("description", "trigger", "actions")
    ):
        return Applied("automation", ZOMBIES, "unchanged")
    client.update_automation(found[0].id, wanted)
    return Applied("automation", ZOMBIES, "changed")


def _apply(client: SyncPrefectClient, entry: Mapping[str, Any], fill: Mapping[str, str]) -> Applied:
    flow = _flow(entry["entrypoint"])
    name = f"{flow.name}/{entry['name']}"
    wanted = _wanted(entry, flow, fill)
    try:
        present = _present(client.read_deployment_by_name(name))
    except ObjectNotFound:
        present = None
    if present is not None and not (changed := _changes(wanted, present)):
        return Applied("deployment", name, "unchanged")
    try:
        client.create_deployment(client.create_flow_from_name(flow.name), **wanted)
    except PrefectHTTPStatusError as error:
        raise UserError(f"deployment {name}: {error.response.json().get('detail', error)}") from error
    return (
        Applied("deployment", name, "created")
        if present is None
        else Applied("deployment", name, "changed", changed)
    )


def _flow(entrypoint: str) -> Flow[..., Any]:
    try:
        return load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    except (ImportError, ScriptError, ValueError, AttributeError) as error:
        raise UserError(f"entrypoint {entrypoint}: no flow can be imported from there ({error})") from error


def _wanted(entry: Mapping[str, Any], flow: Flow[..., Any], fill: Mapping[str, str]) -> dict[str, Any]:
    """The deployment as the client's `create_deployment` takes it."""
    schema = parameter_schema(flow).model_dump(exclude_unset=True)
    run = _filled((entry.get("parameters") or {}).get("run") or {}, schema, fill)
    limit = entry.get("concurrency_limit") or {}
    limit = limit if isinstance(limit, dict) else {"limit": limit}
    return {
        "name": entry["name"],
        "entrypoint": entry["entrypoint"],
        "description": entry.get("description") or flow.description,
        "tags": list(entry.get("tags") or ()),
        "work_pool_name": entry["work_pool"]["name"],
        "job_variables": dict(entry["work_pool"].get("job_variables") or {}),
        "parameters": {**(entry.get("parameters") or {}), "run": run},
        "enforce_parameter_schema": entry.get("enforce_parameter_schema", True),
        "parameter_openapi_schema": schema,
        "concurrency_limit": limit.get("limit"),
        "concurrency_options": ConcurrencyOptions(
            collision_strategy=limit.get("collision_strategy", "ENQUEUE"),
            grace_period_seconds=limit.get("grace_period_seconds"),
        ),
        "schedules": [_schedule(each, run) for each in entry.get("schedules") or ()],
        "pull_steps": [],
    }


def _filled(run: Mapping[str, Any], schema: Mapping[str, Any], fill: Mapping[str, str]) -> dict[str, Any]:
    """`run` with what of `fill` it leaves out and its model has."""
    model = schema["properties"]["run"].get("$ref", "").rpartition("/")[2]
    takes = schema.get("definitions", {}).get(model, {}).get("properties", {})
    return {**{key: value for key, value in fill.items() if key in takes}, **run}


def _schedule(entry: Mapping[str, Any], run: Mapping[str, Any]) -> DeploymentScheduleCreate:
    timing = {key: entry[key] for key in ("timezone", "day_or") if key in entry}
    try:
        if "cron" in entry:
            schedule = CronSchedule(cron=entry["cron"], **timing)
        elif "interval" in entry:
            anchor = datetime.fromisoformat(str(entry.get("anchor_date", EPOCH)))
            every = timedelta(seconds=entry["interval"])
            schedule = IntervalSchedule(interval=every, anchor_date=anchor, **timing)
        else:
            schedule = RRuleSchedule(rrule=entry["rrule"], **timing)
        own = (entry.get("parameters") or {}).get("run")
        return DeploymentScheduleCreate(
            schedule=schedule,
            active=entry.get("active", False),
            slug=entry["slug"],
            parameters={"run": {**run, **own}} if own else {},
        )
    except (KeyError, TypeError, ValidationError, ValueError) as error:
        raise UserError(
            f"schedule {dict(entry)}: {' '.join(str(error).split())}; it needs a slug and one of cron, interval "
            "(seconds) and rrule"
        ) from error


def _present(found: DeploymentResponse) -> dict[str, Any]:
    limit = found.global_concurrency_limit
    return {
        name: getattr(found, name)
        for name in ("name", "entrypoint", "description", "tags", "work_pool_name", "job_variables")
    } | {
        "parameters": found.parameters,
        "enforce_parameter_schema": found.enforce_parameter_schema,
        "parameter_openapi_schema": found.parameter_openapi_schema,
        "concurrency_limit": limit.limit if limit else None,
        "concurrency_options": found.concurrency_options,
        "schedules": found.schedules,
        "pull_steps": found.pull_steps or [],
    }


def _changes(wanted: Mapping[str, Any], present: Mapping[str, Any]) -> tuple[str, ...]:
    """What of a deployment differs, schedules by their slugs."""
    changed = [
        name for name in wanted if name != "schedules" and _plain(wanted[name]) != _plain(present[name])
    ]
    now, then = _by_slug(wanted["schedules"]), _by_slug(present["schedules"])
    slugs = [slug for slug in sorted({**then, **now}) if now.get(slug) != then.get(slug)]
    return (*changed, *(f"schedule {slug}" for slug in slugs))


def _by_slug(schedules: Any) -> dict[str, Any]:
    kept = {"schedule", "active", "parameters"}
    return {s.slug or str(s.schedule): s.model_dump(mode="json", include=kept) for s in schedules}


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, ConcurrencyOptions) else value
