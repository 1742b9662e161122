"""`darkroom lineage`: from a run or an artifact up to the rows of the source, and what of it is not there any more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data.manifest import Parent, Snapshot, publish_snapshot
from flows import cli
from flows.lineage import Artifact, Lineage, Link, lineage, nearest_parents
from flows.settings import of_stage


@pytest.fixture
def root(untrained_run, tmp_path) -> Path:
    """A finished run's root that was moved: the paths in its records lead nowhere."""
    moved = Path(shutil.copytree(untrained_run[0], tmp_path / "root"))
    for record in [*moved.glob("*/run.json"), *moved.glob("store/*/*/_meta/snapshots/*")]:
        record.write_text(record.read_text().replace(str(untrained_run[0]), str(tmp_path / "gone")))
    return moved


def stages(found: Lineage) -> dict[str, Artifact]:
    return {artifact.stage: artifact for artifact in found.artifacts}


def folder_of(root: Path, stage: str) -> Path:
    (folder,) = (root / "store" / stage).iterdir()
    return folder


def test_a_run_leads_up_to_the_rows_of_its_source(root, untrained_run):
    found = lineage(str(root), "latest")
    assert found.run and found.run["run"] == untrained_run[1]["run"] and found.recipe == "demo"
    made = stages(found)
    assert set(made) == {stage["name"] for stage in untrained_run[1]["stages"]}
    assert [found.tops] == [(made["report"].id,)]
    assert all(a.state == "made" and a.bytes and a.version and a.created for a in made.values())
    assert all(a.folder.startswith(str(root)) for a in made.values()), "of a moved root, what lies there now"
    source = made["shard"].source
    assert source and (source.kind, source.rows, source.is_there) == ("shapes", 60, None)
    assert made["vae"].settings == {"vae.block_out_channels": ([16, 32, 32], [8, 8, 8])}
    assert nearest_parents(found.artifacts)[made["denoiser"].id] == [made["embed"].id, made["encode"].id]
    assert nearest_parents(found.artifacts)[made["report"].id] == [made["evaluate"].id]


def test_a_source_that_is_none_is_not_told(root):
    (snapshot,) = (folder_of(root, "shard") / "_meta" / "snapshots").iterdir()
    snapshot.write_text(json.dumps(json.loads(snapshot.read_text()) | {"facts": {"source": 3}}))
    assert stages(lineage(str(root), "latest"))["shard"].source is None


@pytest.mark.parametrize("inside", ["", "/", "/_meta/snapshots/{name}.json", "/model/config.json"])
def test_an_artifact_is_named_by_its_folder_a_snapshot_or_a_file_of_it(root, inside, monkeypatch):
    folder = folder_of(root, "vae")
    place = f"{folder}{inside.format(name=folder.name)}"
    if "model" in inside:
        place = str(next(folder.rglob("config.json")))
    found = lineage("unused", place)
    assert found.run is None and set(stages(found)) == {"vae", "shard"}
    monkeypatch.chdir(root.parent)
    assert lineage(str(root), f"store/vae/{folder.name}").artifacts == found.artifacts
    assert lineage("unused", f"root/store/vae/{folder.name}").artifacts == found.artifacts


def test_a_missing_a_damaged_and_a_changed_parent_are_told(root):
    shutil.rmtree(folder_of(root, "clip"))
    next((folder_of(root, "vae") / "_meta/snapshots").iterdir()).write_text("{")
    (path,) = (folder_of(root, "prior") / "_meta/snapshots").iterdir()
    prior = Snapshot.model_validate_json(path.read_text())
    path.write_text(prior.model_copy(update={"files": prior.files[:1]}).model_dump_json())
    made = stages(lineage(str(root), "latest"))
    told = {stage: a.state for stage, a in made.items() if a.state != "made"}
    assert told == {"clip": "missing", "vae": "damaged"}
    changed = {(a.stage, role) for a in made.values() for role, link in a.parents.items() if link.is_changed}
    assert changed == {("generate", "prior"), ("evaluate", "prior"), ("report", "prior")}


def test_what_only_the_first_root_still_has_is_found_there(untrained_run, tmp_path):
    root = Path(shutil.copytree(untrained_run[0], tmp_path / "copy"))
    shutil.rmtree(folder_of(root, "shard"))
    shard = stages(lineage(str(root), "latest"))["shard"]
    assert shard.state == "made" and shard.folder.startswith(str(untrained_run[0]))


def test_weights_from_elsewhere_are_named_and_those_of_a_store_followed(root, tmp_path):
    clip, made = folder_of(root, "clip"), tmp_path / "mine"
    for name, folder in (("hub", "ViT-L-14/openai"), ("gone", "/nowhere/vae"), ("stored", str(clip))):
        weights = Snapshot(stage="clip", version=0, fingerprint=name, config={}, folder=folder)
        embed = Snapshot(
            stage="embed", version=1, fingerprint=name, config={}, parents={"clip": weights.as_parent()}
        )
        publish_snapshot(str(made / name), embed)
    above = {name: stages(lineage("unused", str(made / name)))["clip"] for name in ("hub", "gone", "stored")}
    assert (above["hub"].state, above["hub"].folder) == ("external", "ViT-L-14/openai")
    assert above["gone"].state == "missing"
    assert (above["stored"].state, above["stored"].fingerprint) == ("made", clip.name)


def test_manifests_that_lead_in_a_circle_or_out_of_the_store_end(tmp_path):
    folder = tmp_path / "store/vae/a"
    link = Parent(stage="vae", folder=str(folder), fingerprint="a", digest="0")
    out = Parent(stage="clip", folder="/store/../x", fingerprint="x", digest="0")
    publish_snapshot(
        str(folder),
        Snapshot(stage="vae", version=1, fingerprint="a", config={}, parents={"a": link, "b": out}),
    )
    made = stages(lineage("unused", str(folder)))
    assert made["vae"].parents["a"] == Link(artifact="vae/a", is_changed=True)
    assert made["clip"].state == "missing"


def test_the_tree_says_it_all_in_a_few_lines(root, capsys):
    shutil.rmtree(folder_of(root, "clip"))
    assert cli.main(["lineage", "latest", f"--root={root}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("shard" in line and "(above)" in line for line in lines) == 1
    assert any("shapes  60 rows, digest" in line for line in lines)
    assert any("is missing" in line for line in lines)
    assert any("unlike recipe demo: prior.attention_head_dim 32 → 8" in line for line in lines)
    assert cli.main(["lineage", "latest", f"--root={root}", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Lineage.model_validate(document) == lineage(str(root), "latest")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("nothing", "there is no run 'nothing'"),
        ("store/vae/nothing", "does not exist"),
        ("./store", "belongs to no finished artifact"),
        ("nosuch://store/vae/x", "cannot be looked at"),
    ],
)
def test_what_was_not_made_is_one_sentence(root, place, sentence, capsys, monkeypatch):
    monkeypatch.chdir(root)
    assert cli.main(["lineage", place, f"--root={root}"]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_a_stage_keeps_its_settings_under_the_paths_of_the_recipe():
    assert of_stage("shard", {"shard": {"image_size": 8}, "after": ""}) == {
        "shard.image_size": 8,
        "after": "",
    }
    assert of_stage("generate", {"seed": 1}) == of_stage("evaluate", {"seed": 1}) == {"evaluate.seed": 1}
