"""What runs by itself, from a reviewable file to a Prefect server: work pool, automation, deployments and their schedules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentCreate, DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.client.schemas.sorting import DeploymentSort
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import (
    MissingFlowError,
    ObjectAlreadyExists,
    ObjectNotFound,
    PrefectHTTPStatusError,
    ScriptError,
)
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError as InvalidParameters
from prefect.utilities.schema_tools.validation import validate
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from data.errors import UserError
from flows.deployed import TAG

FILE = Path(__file__).parents[1] / "infra" / "prefect" / "prefect.yaml"
PAGE = 200
"""As many as a server gives at once."""
ZOMBIES = "darkroom: a run whose process has gone is crashed"
HEARTBEAT_SECONDS = 30
"""The least that Prefect allows; `prefect.yaml` gives it to every run."""
MISSED = timedelta(seconds=4 * HEARTBEAT_SECONDS)
KEYS = (
    "name", "entrypoint", "description", "tags", "parameters", "enforce_parameter_schema", "concurrency_limit", "work_pool",
    "schedules",
)  # fmt: skip
"""Of a deployment in the file, what is applied; of a schedule, its timing and what stands beside it."""
TIMINGS = ("cron", "interval", "rrule")
SCHEDULE_KEYS = ("slug", *TIMINGS, "timezone", "day_or", "anchor_date", "active", "parameters")
EPOCH = "2020-01-01T00:00:00+00:00"
"""Where an interval counts from, unless the file says: one that counted from now would change with every deploy."""


@dataclass(frozen=True)
class Applied:
    """What `deploy` did about one thing on the server."""

    kind: str
    name: str
    change: str
    """created, changed, unchanged, not in the file, or removed."""
    details: tuple[str, ...] = ()
    """What of it changed."""


def deploy(file: Path, fill: Mapping[str, str], *, prune: bool = False) -> list[Applied]:
    """Makes the server at PREFECT_API_URL hold what `file` says, and returns what that took; the second time, nothing.

    `fill` goes into every `run` that leaves its keys out and whose flow takes them. Deployments with our tag that are not in
    the file are told, and removed where `prune` says so. Raises UserError for a file that cannot be applied, and where no
    server answers.
    """
    wanted = [_read(entry, fill) for entry in _entries(file)]
    _refuse_twice(file, [f"{flow.name}/{each['name']}" for flow, each in wanted])
    with server() as client:
        pools = sorted({each["work_pool_name"] for _, each in wanted})
        done = [_apply_pool(client, name) for name in pools]
        done.append(_apply_automation(client))
        done += [_apply(client, flow, each) for flow, each in wanted]
        return done + _left_over(client, {f"{flow.name}/{each['name']}" for flow, each in wanted}, prune)


def _left_over(client: SyncPrefectClient, kept: Collection[str], prune: bool) -> list[Applied]:
    """The deployments that carry our tag and are not `kept`, gone where `prune` says so."""
    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found = {f"{client.read_flow(each.flow_id).name}/{each.name}": each for each in _all(client, ours)}
    left = sorted(found.keys() - kept)
    for name in left if prune else ():
        client.delete_deployment(found[name].id)
    return [Applied("deployment", name, "removed" if prune else "not in the file") for name in left]


def _all(client: SyncPrefectClient, chosen: DeploymentFilter) -> Iterator[DeploymentResponse]:
    """Page by page, as the server gives them."""
    offset = 0
    while page := client.read_deployments(
        deployment_filter=chosen, sort=DeploymentSort.NAME_ASC, limit=PAGE, offset=offset
    ):
        yield from page
        offset += len(page)


@contextmanager
def server() -> Iterator[SyncPrefectClient]:
    """A client of the server at PREFECT_API_URL. Raises UserError where none is named or none answers."""
    url = PREFECT_API_URL.value()
    if not url:
        raise UserError(
            "no Prefect server is named: set PREFECT_API_URL, such as http://127.0.0.1:4200/api, or use `darkroom serve`"
        )
    with get_client(sync_client=True) as client:
        if trouble := _trouble(client):
            raise UserError(f"PREFECT_API_URL={url}: no Prefect server answers there ({trouble})")
        yield client


def _trouble(client: SyncPrefectClient) -> Exception | str | None:
    """Why what listens there is no server's API; its pages answer to everything."""
    try:
        if trouble := client.api_healthcheck():
            return trouble
        client.api_version()
    except ValueError:
        return "it answers with a page: an address of the API ends in /api"
    return None


def _refuse_twice(file: Path, names: Sequence[str]) -> None:
    """A deployment that a file has twice would be changed from one to the other by every deploy."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{file}: {', '.join(twice)} is there twice: give each deployment of a flow its own name"
        )


def _entries(file: Path) -> list[dict[str, Any]]:
    try:
        entries = yaml.safe_load(file.read_text())["deployments"]
        named = [(each["name"], each["entrypoint"], each["work_pool"]["name"]) for each in _listed(entries)]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a prefect.yaml") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file}: `deployments` must be a list, each with name, entrypoint and work_pool.name"
        ) from error
    for name in {name for entry in named for name in (entry[0], entry[2])}:
        if not isinstance(name, str) or not name.strip() or set(name) & set("/%&<>"):
            raise UserError(f"{file}: {name!r} names no deployment or pool: write a word without / % & < >")
    return entries


def _listed(entries: Any) -> list[dict[str, Any]]:
    if not isinstance(entries, list):
        raise TypeError
    return entries


def _read(entry: Mapping[str, Any], fill: Mapping[str, str]) -> tuple[Flow[..., Any], dict[str, Any]]:
    """The flow of an entry and its deployment, which the server has no reason to refuse."""
    flow = _flow(entry["entrypoint"])
    try:
        _refuse_keys(entry, KEYS)
        _refuse_keys(entry["work_pool"], ("name", "job_variables"))
        wanted = _wanted(entry, flow, fill)
        DeploymentCreate(flow_id=uuid4(), **wanted)
        for given in (wanted["parameters"], *(each.parameters for each in wanted["schedules"])):
            _refuse_unknown(given, wanted["parameter_openapi_schema"])
    except UserError:
        raise
    except (AttributeError, TypeError, ValueError, InvalidParameters) as error:
        raise UserError(
            f"deployment {flow.name}/{entry['name']}: {_line(error)}; {FILE.name} of the checkout shows how each key is written"
        ) from error
    return flow, wanted


def _refuse_keys(entry: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises where something of the file would silently not be applied, such as a key that is misspelt."""
    if unknown := sorted({*map(str, entry)} - {*known}):
        raise ValueError(f"{', '.join(unknown)} is not applied, only {', '.join(known)}")


def _refuse_unknown(parameters: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raises where a run would be refused for what is given; what is left out may be given when it is started."""
    if unknown := sorted(set(parameters) - set(schema["properties"])):
        raise ValueError(
            f"the flow has no parameter {', '.join(unknown)}, only {', '.join(schema['properties'])}"
        )
    validate(dict(parameters), dict(schema), raise_on_error=True, ignore_required=True)  # pyright: ignore[reportArgumentType]


def _line(error: Exception) -> str:
    """What an error says, in one line; of pydantic's, where and what."""
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return " ".join(str(error).split())


def _apply_pool(client: SyncPrefectClient, name: str) -> Applied:
    try:
        client.read_work_pool(name)
        return Applied("work pool", name, "unchanged")
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        try:
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        except ObjectAlreadyExists:  # another deploy was faster
            return Applied("work pool", name, "unchanged")
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


def _apply(client: SyncPrefectClient, flow: Flow[..., Any], wanted: Mapping[str, Any]) -> Applied:
    name = f"{flow.name}/{wanted['name']}"
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
    except (ImportError, MissingFlowError, ScriptError, TypeError, ValueError, AttributeError) as error:
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
        "schedules": _schedules(entry.get("schedules") or (), run),
        "pull_steps": [],
    }


def _filled(run: Mapping[str, Any], schema: Mapping[str, Any], fill: Mapping[str, str]) -> dict[str, Any]:
    """`run` with what of `fill` it leaves out and its model has."""
    model = schema["properties"].get("run", {}).get("$ref", "").rpartition("/")[2]
    takes = schema.get("definitions", {}).get(model, {}).get("properties", {})
    return {**{key: value for key, value in fill.items() if key in takes}, **run}


def _schedules(entries: Sequence[Any], run: Mapping[str, Any]) -> list[DeploymentScheduleCreate]:
    found = [_schedule(each, run) for each in entries]
    if len({each.slug for each in found}) < len(found):
        raise ValueError(f"schedules {', '.join(str(each.slug) for each in found)}: give each its own slug")
    return found


def _schedule(entry: Mapping[str, Any], run: Mapping[str, Any]) -> DeploymentScheduleCreate:
    try:
        _refuse_keys(entry, SCHEDULE_KEYS)
        if sum(key in entry for key in TIMINGS) != 1 or not isinstance(entry["slug"], str):
            raise ValueError(f"it has {', '.join(key for key in entry if key != 'slug')}")
        timing = {key: entry[key] for key in ("timezone", "day_or") if key in entry}
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
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"schedule {entry}: {_line(error)}; it needs a slug and one of cron, interval (seconds) and rrule"
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
