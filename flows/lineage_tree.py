"""A lineage as a tree on the terminal: what was made at the root, the rows of the source at the leaves."""

from __future__ import annotations

from rich.text import Text
from rich.tree import Tree

from flows.console import duration, size
from flows.lineage import Artifact, Lineage, Source, nearest_parents

STATES = {
    "missing": "is missing: no such snapshot lies there any more",
    "damaged": "is damaged: its snapshot cannot be read; `darkroom verify --repair` on it may help",
    "external": "weights made elsewhere",
}


def tree(found: Lineage) -> Tree:
    """Every artifact once in full; where it is met again, by name alone."""
    top = Tree(_run_line(found), guide_style="dim")
    below = nearest_parents(found.artifacts)
    known = {artifact.id: artifact for artifact in found.artifacts}
    shown: set[str] = set()
    pending = [(top, id, False) for id in reversed(found.tops)]
    while pending:
        branch, id, is_changed = pending.pop()
        artifact = known[id]
        label = _label(artifact, found.recipe, is_again=id in shown)
        if is_changed:
            label.append("\nholds other content now than the one above was made from", "yellow")
        branch = branch.add(label)
        if id in shown:
            continue
        shown.add(id)
        if artifact.source:
            branch.add(_source_line(artifact.source))
        changed = {link.artifact for link in artifact.parents.values() if link.is_changed}
        pending += [(branch, up, up in changed) for up in reversed(below[id])]
    return top


def _run_line(found: Lineage) -> Text:
    if found.run is None:
        return Text(found.of, "bold")
    facts = [f"recipe {found.recipe}"]
    if found.run["finished"]:
        facts.append(f"finished {_when(found.run['finished'])}")
    if found.run["seconds"]:
        facts.append(f"in {duration(found.run['seconds'])}")
    return Text.assemble((found.run["run"], "bold"), f"  {', '.join(facts)}")


def _label(artifact: Artifact, recipe: str, *, is_again: bool) -> Text:
    text = Text.assemble((artifact.stage, "bold"), " ", (artifact.fingerprint, "cyan"))
    if is_again:
        return text.append("  (above)", "dim")
    if artifact.state != "made":
        text.append(f"  {STATES[artifact.state]}", "" if artifact.state == "external" else "red")
        return text.append(f"\n{artifact.folder}", "dim")
    text.append(f"  {_facts(artifact)}", "dim")
    if artifact.settings:
        told = ", ".join(f"{path} {then} → {now}" for path, (then, now) in sorted(artifact.settings.items()))
        text.append(f"\nunlike recipe {recipe}: {told}")
    return text


def _facts(artifact: Artifact) -> str:
    facts = [f"v{artifact.version}"]
    if artifact.created:
        facts.append(_when(artifact.created))
    if artifact.seconds:
        facts.append(f"took {duration(artifact.seconds)}")
    if artifact.shards:
        plural = "" if artifact.shards == 1 else "s"
        facts.append(f"{artifact.samples:,} samples in {artifact.shards:,} shard{plural}")
    if artifact.grown_from:
        facts.append(f"grown from {artifact.grown_from}")
    if artifact.bytes is not None:
        facts.append(size(artifact.bytes))
    return ", ".join(facts)


def _source_line(source: Source) -> Text:
    limited = f", the first {source.limit:,}" if source.limit else ""
    text = Text.assemble(
        (source.path or source.kind, "bold"), f"  {source.rows:,} rows{limited}, digest {source.digest}"
    )
    return text.append("  is not there any more", "red") if source.is_there is False else text


def _when(iso: str) -> str:
    return f"{iso[:16].replace('T', ' ')} UTC"
