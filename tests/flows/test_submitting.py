"""A run that is left to a cluster: what its command line becomes there."""

from __future__ import annotations

import pytest

from data.errors import UserError
from flows.submitting import _absolute, submit


def test_a_setting_that_names_a_place_here_names_it_there_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    assert _absolute("clip.pretrained=./weights") == f"clip.pretrained={tmp_path / 'weights'}"
    for other in (
        "clip.pretrained=weights",
        "clip.pretrained=ViT-L-14/openai",
        "seed=3",
        "vae.pretrained=a/b=c",
    ):
        assert _absolute(other) == other


def test_a_run_is_submitted_to_a_job_server_alone(plan_of):
    with pytest.raises(UserError, match="http://HOST:8265"):
        submit(plan_of(), "demo", [], "auto", retry_failed=False)
