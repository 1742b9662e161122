"""Nothing secret is written down, and nothing that lies in a store leads out of it."""

from __future__ import annotations

import json

import pytest

from data.errors import UserError
from data.manifest import FileRecord, Snapshot, publish_snapshot
from data.verify import verify
from flows import cli, embedded_prefect

PASSWORD = "pa55w0rd-of-the-source"


@pytest.mark.parametrize(
    "line",
    [
        ["status", f"--root=s3://KEY:{PASSWORD}@bucket/x"],
        ["run", "demo", f"--root=https://me:{PASSWORD}@host/x"],
        ["plan", "demo", f"--data=s3://KEY:{PASSWORD}@bucket/x.parquet"],
        ["plan", "demo", f"--set=source.path=s3://KEY:{PASSWORD}@bucket/x"],
        ["plan", "demo", f"--set=vae.pretrained=abfs://c@a.net/x?sig={PASSWORD}"],
        ["prepare", f"sftp://me:{PASSWORD}@host/x"],
        ["verify", f"s3://KEY:{PASSWORD}@bucket"],
        ["run", "demo", f"--address=http://me:{PASSWORD}@127.0.0.1:8265"],
    ],
)
def test_a_place_with_credentials_is_refused_without_repeating_them(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(line) == 2
    said = capsys.readouterr()
    assert "a URL with credentials in it" in said.err and said.err.count("\n") == 1
    assert PASSWORD not in said.err + said.out and list(tmp_path.iterdir()) == []


def test_prefect_is_not_given_a_url_that_it_would_log(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://me:{PASSWORD}@127.0.0.1:4200/api")
    with pytest.raises(UserError, match=r"PREFECT_API_URL names http://\*\*\*@127.0.0.1:4200/api"):
        embedded_prefect.configure(tmp_path, verbose=False)


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "a/../../outside", "a\\b", "", "a/.."])
def test_a_manifest_leads_nowhere_else(path, tmp_path, capsys):
    (tmp_path / "outside").write_text("untouched")
    folder = tmp_path / "store" / "vae" / "key"
    file = FileRecord(path="inside", bytes=9, sha256="0" * 64)
    made = publish_snapshot(
        str(folder), Snapshot(stage="vae", version=1, fingerprint="key", config={}, files=(file,))
    )
    manifest = folder / "_meta" / "snapshots" / "key.json"
    manifest.write_text(made.model_dump_json().replace('"inside"', json.dumps(path)))
    (problem,) = verify(str(tmp_path)).problems
    assert problem.uri.endswith("key.json") and "is not a Snapshot" in problem.problem
    for line in (["verify", str(tmp_path)], ["lineage", str(folder)], ["status", f"--root={tmp_path}"]):
        assert cli.main(line) in (0, 1), line
    said = capsys.readouterr().err
    assert "Traceback" not in said and (tmp_path / "outside").read_text() == "untouched"


@pytest.mark.parametrize("name", ["../key", "a/b", "..", "/x"])
def test_a_snapshot_is_named_by_one_word(name):
    with pytest.raises(ValueError, match=r"leaves its folder|is no part of a path"):
        Snapshot(stage="vae", version=1, fingerprint=name, config={})


@pytest.mark.parametrize("name", ["../../etc", "..", "/etc", "store/../.."])
def test_a_run_is_a_folder_of_its_root(name, tmp_path, capsys):
    (tmp_path / "root").mkdir()
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "run.json").write_text('{"run": "etc", "report": "stolen"}')
    (tmp_path / "root" / "latest").write_text(name)
    for run in (name, "latest"):
        assert cli.main(["report", run, f"--root={tmp_path}/root/x/.."]) == 2
    assert "stolen" not in capsys.readouterr().out
