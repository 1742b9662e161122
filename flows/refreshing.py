"""A system kept up with its data: what a refresh runs, and how its outcome is held against the run that serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data.errors import UserError
from data.manifest import load_snapshot
from data.stored import name_of
from flows import assignments, places, pointers, recipes, runs
from flows.comparing import measured_in, measured_of
from flows.parameters import RefreshParameters, assigned
from flows.plan import Plan
from flows.planning import recipe_plan
from stages.contract import InputRef
from training.metrics.comparison import Measured
from training.metrics.protocol import differences

ENCODERS, CONTINUED = ("clip", "vae"), ("prior", "denoiser")
JUDGED = ("generate", "evaluate")
"""The stages that measure a system whose parts are made."""


@dataclass(frozen=True)
class Refresh:
    """What a refresh would run."""

    plan: Plan
    holder: str | None
    """The run that serves; None where none does, and the refresh is a run of the whole recipe."""
    earlier: Mapping[str, InputRef]
    """The holder's parts, by stage."""
    is_news: bool
    """Whether there are data that the holder was not trained on."""


def refresh_of(run: RefreshParameters) -> Refresh:
    """The refresh of `run`: the holder's encoders stay, so that new shards alone are embedded and encoded, and the training of
    its prior and denoiser goes on from its weights. Raises UserError where the holder is of another recipe or has lost a part.
    """
    root = places.checked_root(run.root)
    holder = pointers.pointed(root).get("production")
    if holder is None:
        return Refresh(run.plan(), None, {}, is_news=True)
    earlier = _parts(root, holder, run)
    continues = run.keep_encoders
    plan = recipe_plan(
        run.recipe,
        data=run.data,
        assignments=[*run.assignments, *(assigned(run.continued) if continues else ())],
        root=root,
        retry_failed=run.retry_failed,
        made={kind: earlier[kind] for kind in ENCODERS if kind in earlier} if continues else {},
        start={part: earlier[part] for part in CONTINUED} if continues else {},
    )
    known = earlier["denoiser"].open().parents["data"].fingerprint
    data = next(stage for stage in plan.stages if stage.name == "shard")
    return Refresh(plan, holder, earlier, is_news=data.fingerprint != known)


def holder_scores(refresh: Refresh, run: RefreshParameters) -> dict[str, Mapping[str, Measured]]:
    """{holder: its scores}, of pictures that it draws for the prompts of the new data and that are measured against these.

    Its own scores where all of them compare as they are; empty where nothing serves.
    """
    if refresh.holder is None:
        return {}
    own, new = (
        measured_of(refresh.plan.root, refresh.holder),
        measured_of(refresh.plan.root, refresh.plan.run),
    )
    if not any(differences(own[name].protocol, new[name].protocol) for name in new if name in own):
        return {refresh.holder: own}
    plan = recipe_plan(
        run.recipe,
        data=run.data,
        assignments=run.assignments,
        root=refresh.plan.root,
        retry_failed=run.retry_failed,
        made=refresh.earlier,
    )
    if pending := [stage for stage in plan.pending if stage.name in JUDGED]:
        runs.note_start(plan.root, plan.run, [plan])
        runs.run_stages(plan, pending, address=run.address, verbose=False)
        runs.forget_start(plan.root, plan.run)
    folder = next(stage.folder for stage in plan.stages if stage.name == "evaluate")
    return {refresh.holder: measured_in(folder)}


def _parts(root: str, holder: str, run: RefreshParameters) -> dict[str, InputRef]:
    """The holder's trained parts as far as stages of ours made them and `run` names no others."""
    record = runs.find(root, holder)
    recipe = assignments.edited(recipes.find(run.recipe), run.assignments)
    if (then := record["recipe"].get("name")) != recipe.name:
        raise UserError(
            f"production is {holder}, a run of {then}: refresh that recipe, or promote a run of {recipe.name}"
        )
    folders = {**record["external"], **record["folders"]}
    given = {kind for kind in ENCODERS if getattr(recipe, kind).pretrained}
    parts = {}
    for part in (*ENCODERS, *CONTINUED):
        if part in given or (part in ENCODERS and not name_of(folders.get(part, ""))):
            continue
        folder = folders[part]
        ref = InputRef(stage=part, folder=folder, fingerprint=folder.rsplit("/", 1)[1])
        if load_snapshot(folder, ref.fingerprint) is None:
            raise UserError(
                f"production is {holder}, which has lost its {part} ({folder}): run its recipe again, or promote another run"
            )
        parts[part] = ref
    return parts
