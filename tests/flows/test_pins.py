"""A root is held to the commit of the hub that a name stood for when it was first used there; a hub on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from hub_server import HubServer

from data.errors import UserError
from flows import pins
from stages.contract import InputRef
from training.encoders import weights_digest


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[HubServer]:
    """A hub with one VAE's config, and an empty cache."""
    import huggingface_hub.constants as constants

    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    server = HubServer({"somebody/tiny": folder})
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = f"{server.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.stop()


def of(source: str) -> InputRef:
    return InputRef(stage="vae", folder=source, fingerprint=weights_digest("vae", source)[:16], external=True)


def test_a_name_is_held_to_its_first_commit_in_one_root_and_free_in_another(hub, tmp_path):
    name, root = of("somebody/tiny"), str(tmp_path / "root")
    assert pins.pinned(root, name) == name, "nothing is asked of the hub before a run"
    assert not hub.asked
    first = hub.commit("somebody/tiny")
    held = pins.hold(root, name)
    assert held.folder == f"somebody/tiny@{first}" and held.fingerprint == name.fingerprint
    (tmp_path / "repository" / "config.json").write_text('{"newer": true}')
    assert pins.hold(root, name) == pins.pinned(root, name) == held
    other = pins.hold(str(tmp_path / "other"), name)
    assert other.folder == f"somebody/tiny@{hub.commit('somebody/tiny')}" != held.folder
    assert held.open().digest != other.open().digest, "what is made from the two is told apart"


def test_a_revision_that_is_asked_for_is_held_to_the_commit_behind_it(hub, tmp_path):
    held = pins.hold(str(tmp_path), of("somebody/tiny@main"))
    assert held.folder == f"somebody/tiny@{hub.commit('somebody/tiny')}"
    exact = of(held.folder)
    assert pins.hold(str(tmp_path), exact) == exact
    assert of("somebody/tiny@main").fingerprint != of("somebody/tiny").fingerprint


def test_folders_and_urls_are_no_names(tmp_path):
    for source in (str(tmp_path / "a@b"), "s3://bucket/store/vae/x"):
        ref = InputRef(stage="vae", folder=source, fingerprint="0" * 16, external=True)
        Path(tmp_path / "a@b").mkdir(exist_ok=True)
        assert pins.hold(str(tmp_path), ref) == ref
        assert ref.open().config == {}
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_had_is_said_and_not_noted(hub, tmp_path):
    with pytest.raises(UserError, match=r"somebody/else is no folder here and cannot be downloaded"):
        pins.hold(str(tmp_path / "root"), of("somebody/else"))
    assert not (tmp_path / "root").exists() and hub.asked


def test_a_note_that_names_no_commit_is_refused(tmp_path):
    note = tmp_path / "store" / "hub" / "vae.somebody+tiny.json"
    note.parent.mkdir(parents=True)
    for content in ("{", '{"commit": "../x"}', "[]"):
        note.write_text(content)
        with pytest.raises(UserError, match=r"somebody\+tiny.json names no commit: remove it"):
            pins.pinned(str(tmp_path), of("somebody/tiny"))
