"""`darkroom score` on folders of pictures, with random weights: what is said, what is refused, and no network."""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import normalize, resize
from transformers import Dinov2Model

from flows import cli
from training.metrics import extractors

CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A CLIP of random weights that tells pictures apart."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CLIP)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP, "preprocess_cfg": {"size": 16}})
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def draw(
    folder: Path, count: int, seed: int, *, sides: tuple[int, ...] = (20,), captions: bool = False
) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        side = sides[number % len(sides)]
        pixels = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-60, 60, (side, side, 3))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:04d}.png")
        if captions:
            (folder / f"{number:04d}.txt").write_text(f"picture {number}")
    return folder


def damage(path: Path) -> None:
    """Flips a bit of the last value."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    return draw(tmp_path / "real", 40, 0), draw(tmp_path / "fake", 36, 1)


Scores = Callable[..., dict[str, Any]]


@pytest.fixture
def scores(capsys) -> Scores:
    def run(*line: object) -> dict[str, Any]:
        assert cli.main(["score", "--json", *map(str, line)]) == 0
        printed = capsys.readouterr().out
        assert printed.count("\n") == 1
        document = json.loads(printed)
        return {"warnings": document["warnings"]} | {score["name"]: score for score in document["scores"]}

    return run


@pytest.fixture
def complaint(capsys) -> Callable[..., str]:
    def run(*line: object) -> str:
        assert cli.main(["score", *map(str, line)]) == 2
        printed = capsys.readouterr()
        said = printed.err[printed.err.index("darkroom: ") :]
        assert "Traceback" not in said and not printed.out
        return said

    return run


def test_two_folders_and_a_clip_give_values_intervals_and_a_protocol(folders, clip, scores, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_network)
    monkeypatch.setattr(socket, "create_connection", no_network)
    found = scores("--real", folders[0], "--fake", folders[1], "--extractor", f"clip={clip}")
    assert found.keys() == {"warnings", "fd_clip", "cmmd"}
    for name in ("fd_clip", "cmmd"):
        score = found[name]
        assert score["low"] <= score["value"] <= score["high"] and score["n"] == 36
        assert score["protocol"]["reference_n"] == 40 and len(score["protocol"]["extractor_digest"]) == 64
        assert score["protocol"]["metric"] == name
    facts = found["fd_clip"]["facts"]
    assert (facts["rank_real"], facts["rank_generated"], facts["clipped_mass"]) == (8, 8, 0.0)
    assert facts["mean_term"] + facts["covariance_term"] == pytest.approx(found["fd_clip"]["value"])


def test_a_folder_against_itself_is_at_no_distance_and_in_full_reach(folders, clip, scores):
    found = scores(
        "--real",
        folders[0],
        "--fake",
        folders[0],
        "--extractor",
        f"clip={clip}",
        "--metrics=fd_clip,cmmd_biased",
    )
    assert found["fd_clip"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert found["cmmd_biased"]["value"] == pytest.approx(0.0, abs=1e-9)


def test_captions_beside_the_pictures_add_the_clip_score(tmp_path, clip, scores):
    real, fake = draw(tmp_path / "real", 12, 0), draw(tmp_path / "fake", 12, 1, captions=True)
    line = ("--real", real, "--fake", fake, "--extractor", f"clip={clip}")
    assert -1 <= scores(*line)["clip_score"]["value"] <= 1
    found = scores(*line, "--metrics=clip_score,clip_score_x100,clip_score_x2.5,caption_recall_10")
    assert found["clip_score_x100"]["value"] == pytest.approx(100 * max(found["clip_score"]["value"], 0))
    assert 0 < found["caption_recall_10"]["value"] <= 1


def test_saved_statistics_give_what_the_folder_gave(folders, clip, scores, complaint, tmp_path):
    line = ("--fake", folders[1], "--extractor", f"clip={clip}")
    first = scores("--real", folders[0], *line, "--save-real", tmp_path / "real.npz")
    told = json.loads((tmp_path / "real.json").read_text())
    assert told["extractor"] == "clip" and told["n"] == 40
    again = scores("--real", tmp_path / "real.npz", *line)
    for name in ("fd_clip", "cmmd"):
        assert again[name]["value"] == pytest.approx(first[name]["value"], rel=1e-9)
        assert again[name]["protocol"] == first[name]["protocol"], "they compare"
    np.savez(tmp_path / "real.npz", mu=np.zeros(8), sigma=np.eye(8))
    assert "real.json tells of another file than" in complaint("--real", tmp_path / "real.npz", *line)


def test_a_place_that_cannot_keep_statistics_is_refused_before_pictures_are_looked_at(
    folders, clip, complaint, tmp_path, monkeypatch
):
    monkeypatch.setattr(extractors, "load", None)
    line = ("--real", folders[0], "--fake", folders[1], "--extractor", f"clip={clip}", "--metrics=fd_clip")
    assert "there is no folder" in complaint(*line, "--save-real", tmp_path / "absent" / "real.npz")


def test_pictures_are_never_left_out_in_silence(folders, clip, complaint):
    line = ("--real", folders[0], "--fake", folders[1], "--extractor", f"clip={clip}")
    odd = folders[1] / "9999.png"
    odd.symlink_to("nowhere.png")
    assert f"{odd} is no file, or a link that leads to none" in complaint(*line)
    odd.unlink()
    os.mkfifo(odd)
    assert f"{odd} is no file" in complaint(*line)
    odd.unlink()
    for target in (folders[0], folders[1]):  # another folder, and a loop
        (folders[1] / "more").symlink_to(target)
        assert "more is a link to a folder, which would not be followed" in complaint(*line)
        (folders[1] / "more").unlink()


def test_a_picture_that_no_memory_holds_is_refused_by_its_header(folders, clip, complaint):
    line = ("--real", folders[0], "--fake", folders[1], "--extractor", f"clip={clip}")
    strip, vast = folders[1] / "strip.png", folders[1] / "vast.png"
    Image.new("RGB", (4000, 2)).save(strip)
    assert "strip.png is no picture to be scored (4000x2 is longer than 200 to 1)" in complaint(*line)
    strip.unlink()
    Image.new("1", (20_000, 20_000)).save(vast)
    assert "vast.png is no picture to be scored (the header announces 20000x20000" in complaint(*line)


def test_no_folder_is_not_the_one_that_one_stands_in(folders, clip, complaint, monkeypatch):
    monkeypatch.chdir(folders[0])
    given = ("--extractor", f"clip={clip}")
    assert "--fake (nothing) does not exist" in complaint("--real", folders[0], "--fake", "", *given)
    assert "--real (nothing) does not exist" in complaint("--real", "", "--fake", folders[1], *given)


def test_a_caption_that_is_missing_is_said(tmp_path, clip, scores):
    real, fake = draw(tmp_path / "real", 12, 0), draw(tmp_path / "fake", 12, 1, captions=True)
    (fake / "0007.txt").unlink()
    found = scores("--real", real, "--fake", fake, "--extractor", f"clip={clip}")
    assert "clip_score" not in found
    assert any("1 of 12 pictures of" in said and "0007.png" in said for said in found["warnings"])


def test_a_mean_and_a_covariance_are_enough_for_a_frechet_distance(
    folders, clip, scores, complaint, tmp_path
):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(8), sigma=np.eye(8))
    line = ("--real", tmp_path / "stats.npz", "--fake", folders[1], "--extractor", f"clip={clip}")
    found = scores(*line)
    assert (
        found.keys() == {"warnings", "fd_clip"} and "no features of single pictures" in found["warnings"][0]
    )
    assert "give the folder of pictures" in complaint(*line, "--metrics=cmmd")
    saving = complaint(*line, "--save-real", tmp_path / "again.npz")
    assert f"{tmp_path}/stats.npz has a mean and a covariance alone, which are saved already" in saving
    assert not (tmp_path / "again.npz").exists()


def test_features_of_a_clip_do_not_depend_on_what_stands_beside_a_picture_or_caption(clip):
    extractor = extractors.load("clip", str(clip))
    rng = np.random.default_rng(0)
    pictures = [torch.from_numpy(rng.integers(0, 256, (3, 20, 24 + i), dtype=np.uint8)) for i in range(19)]
    captions = [f"picture {i}" * (i + 1) for i in range(19)]
    together, read = extractor.features(pictures), extractor.text(captions)
    assert together.shape == read.shape == (19, 8)
    for start, end in ((0, 16), (3, 19), (18, 19), (7, 9)):
        assert torch.equal(extractor.features(pictures[start:end]), together[start:end])
        np.testing.assert_array_equal(extractor.text(captions[start:end]), read[start:end])


def test_scored_folders_are_held_against_each_other_pair_by_pair(
    folders, clip, tmp_path, monkeypatch, capsys
):
    """Two systems: the difference has an interval of its own."""
    other = draw(tmp_path / "other", 36, 2)
    line = ["score", "--json", f"--real={folders[0]}", f"--extractor=clip={clip}", "--images-per-prompt=2"]
    for name, fake in (("a", folders[1]), ("b", other)):
        assert cli.main([*line, f"--fake={fake}"]) == 0
        (tmp_path / f"{name}.json").write_text(capsys.readouterr().out)
    assert cli.main(["compare", "--json", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["metrics"]}
    assert rows.keys() == {"fd_clip", "cmmd"}
    difference = rows["fd_clip"]["against_first"][str(tmp_path / "b.json")]
    assert difference["low"] < difference["value"] < difference["high"]
    told = json.loads((tmp_path / "a.json").read_text())["scores"][0]
    assert told["protocol"]["images_per_prompt"] == 2 and len(told["deletions"]["sizes"]) == 16
    assert all(size % 2 == 0 for size in told["deletions"]["sizes"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "a.json", "./a.json"]) == 2
    assert "named twice" in capsys.readouterr().err
    (tmp_path / "torn.json").write_text('{"scores": [')
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "torn.json")]) == 2
    assert "is not what `darkroom score --json` prints" in capsys.readouterr().err


def test_folders_of_other_captions_do_not_compare(tmp_path, clip, capsys):
    real = draw(tmp_path / "real", 12, 0)
    for name, word in (("a", "picture"), ("b", "painting")):
        fake = draw(tmp_path / name, 12, 1, captions=True)
        (fake / "0003.txt").write_text(f"a {word}")
        assert (
            cli.main(["score", "--json", f"--real={real}", f"--fake={fake}", f"--extractor=clip={clip}"]) == 0
        )
        (tmp_path / f"{name}.json").write_text(capsys.readouterr().out)
    assert cli.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "prompts" in capsys.readouterr().err


def test_pictures_that_are_no_whole_number_of_prompts_are_refused(folders, clip, complaint):
    line = ("--real", folders[0], "--fake", folders[1], "--extractor", f"clip={clip}", "--images-per-prompt")
    for given in (5, 0):
        assert "has 36 pictures, which are no whole number of prompts" in complaint(*line, given)


def test_pictures_that_should_share_a_prompt_and_have_other_captions_are_refused(tmp_path, clip, complaint):
    real, fake = draw(tmp_path / "real", 12, 0), draw(tmp_path / "fake", 12, 1, captions=True)
    line = ("--real", real, "--fake", fake, "--extractor", f"clip={clip}", "--images-per-prompt", "2")
    for number in range(12):
        (fake / f"{number:04d}.txt").write_text("a cat" if number < 7 else "a dog")
    assert "0006.png and " in (said := complaint(*line)) and "0007.png should share a prompt" in said


def test_intervals_of_a_single_prompt_say_what_they_are_of(folders, clip, capsys):
    line = ["score", "--json", f"--real={folders[0]}", f"--fake={folders[1]}", f"--extractor=clip={clip}"]
    assert cli.main([*line, "--images-per-prompt=36"]) == 0
    assert any("share one prompt" in said for said in json.loads(capsys.readouterr().out)["warnings"])


def test_kept_features_are_not_extracted_again(folders, clip, scores, tmp_path, monkeypatch, complaint):
    line = (
        "--real",
        folders[0],
        "--fake",
        folders[1],
        "--extractor",
        f"clip={clip}",
        "--features",
        tmp_path / "kept",
    )
    first = scores(*line)

    def no_look(*_: object) -> None:
        raise AssertionError("a picture was looked at again")

    monkeypatch.setattr(extractors, "clip_images", no_look)
    assert scores(*line) == first
    assert scores(*line, "--metrics=cmmd_biased")["cmmd_biased"]["value"] > 0
    with pytest.raises(AssertionError, match="looked at again"):
        damage(next((tmp_path / "kept").rglob("*.npy")))
        scores(*line)
    (tmp_path / "file").write_text("no folder")
    assert "--features" in complaint(*line[:-1], tmp_path / "file")
    assert "s3://bucket/kept is no folder of this machine" in complaint(*line[:-1], "s3://bucket/kept")


def test_pictures_in_a_file_of_guided_diffusion_are_the_real_ones(folders, clip, scores, tmp_path):
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folders[0].glob("*.png"))])
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    line = ("--fake", folders[1], "--extractor", f"clip={clip}")
    of_file, of_folder = scores("--real", tmp_path / "real.npz", *line), scores("--real", folders[0], *line)
    for name in ("fd_clip", "cmmd"):
        assert of_file[name]["value"] == of_folder[name]["value"]
        assert of_file[name]["protocol"]["reference_n"] == 40


@pytest.mark.slow
def test_inception_from_a_file_gives_its_metrics_and_those_of_the_clean_resize(
    folders, inception_weights, scores, complaint
):
    given = ("--real", folders[0], "--fake", folders[1], "--extractor")
    names = ("fid", "fid_clean", "kid", "inception_score")
    found = scores(*given, f"inception:custom={inception_weights}", f"--metrics={','.join(names)}")
    assert found.keys() == {"warnings", *names}
    assert all(np.isfinite(found[name]["value"]) for name in names)
    assert {found[name]["protocol"]["resize"] for name in ("fid", "kid")} == {"tf1"}
    assert found["fid_clean"]["protocol"]["resize"] == "clean"
    assert found["fid"]["value"] != found["fid_clean"]["value"]
    assert "36 images for the 2048 dimensions of inception" in " ".join(found["warnings"])
    assert "inception:custom=PATH" in complaint(*given, f"inception={inception_weights}")


def test_dinov2_is_read_from_a_folder_and_looks_at_each_picture_alone(folders, scores, dinov2_folder):
    found = scores("--real", folders[0], "--fake", folders[1], "--extractor", f"dinov2={dinov2_folder}")
    assert found["fd_dinov2"]["value"] > 0 and found["fd_dinov2"]["protocol"]["resize"].startswith("bicubic")
    extractor = extractors.load("dinov2", str(dinov2_folder))
    rng = np.random.default_rng(0)
    pictures = [torch.from_numpy(rng.integers(0, 256, (3, 20 + i, 24), dtype=np.uint8)) for i in range(17)]
    together = extractor.features(pictures)
    assert torch.equal(extractor.features(pictures[16:]), together[16:])
    with pytest.raises(ValueError, match="uint8"):
        extractor.features([pictures[0].float() / 255])
    model, mean, std = (
        Dinov2Model.from_pretrained(dinov2_folder),
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
    )
    resized = [resize(p.float(), [224, 224], InterpolationMode.BICUBIC, antialias=True) for p in pictures]
    with torch.inference_mode():
        expected = [model(normalize(x / 255, mean, std)[None]).last_hidden_state[0, 0] for x in resized]
    torch.testing.assert_close(together, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_mixed_sizes_and_few_pictures_are_said(tmp_path, clip, scores):
    real, fake = draw(tmp_path / "real", 8, 0, sides=(20, 30)), draw(tmp_path / "fake", 6, 1)
    said = scores("--real", real, "--fake", fake, "--extractor", f"clip={clip}")["warnings"]
    assert any("2 sizes, 20x20 to 30x30" in line for line in said)
    assert any("6 images for the 8 dimensions of clip" in line for line in said)


def test_pictures_that_make_no_distribution_are_refused(folders, clip, complaint, tmp_path):
    def refused(fake: Path) -> str:
        return complaint("--real", folders[0], "--fake", fake, "--extractor", f"clip={clip}")

    assert "does not exist" in refused(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "is empty" in refused(tmp_path / "empty")
    assert "has one picture, 0000.png" in refused(draw(tmp_path / "one", 1, 2))
    assert "fd_clip: its interval leaves samples out, so it needs at least 3 of them, got 2" in refused(
        draw(tmp_path / "two", 2, 2)
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no picture")
    assert "has no pictures" in refused(tmp_path / "notes")
    broken = draw(tmp_path / "broken", 3, 3)
    (broken / "0001.png").write_text("<html>not found</html>")
    assert "0001.png is no whole picture" in refused(broken)


def test_missing_or_wrong_weights_are_refused_with_what_to_give(folders, clip, complaint, tmp_path):
    line = ("--real", folders[0], "--fake", folders[1])
    said = complaint(*line)
    assert "pt_inception-2015-12-05-6726825d.pth" in said and "facebook/dinov2-large" in said
    assert "weights are missing" in complaint(*line, "--metrics=fid", "--extractor", f"clip={clip}")
    assert "no such metric; there are fid," in complaint(*line, "--metrics=fidd")
    assert "needs a caption NAME.txt" in complaint(
        *line, "--metrics=clip_score", "--extractor", f"clip={clip}"
    )
    (tmp_path / "weights.pth").write_text("other bytes")
    assert "inception:custom=PATH" in complaint(*line, "--extractor", f"inception={tmp_path / 'weights.pth'}")
    for spec in ("inception", "vgg=x", "clip:custom=x", f"clip={tmp_path / 'absent'}"):
        assert f"--extractor {spec}" in complaint(*line, "--extractor", spec)
    assert "holds a None and no dinov2" in complaint(
        *line, "--extractor", f"dinov2={with_config(tmp_path / 'other')}"
    )


def with_config(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_features_that_are_not_finite_are_refused(folders, complaint, tmp_path):
    torch.manual_seed(0)
    state = open_clip.model.CLIP(**CLIP).state_dict()
    state["visual.conv1.weight"][:] = float("nan")
    (tmp_path / "nan").mkdir()
    (tmp_path / "nan" / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CLIP, "preprocess_cfg": {"size": 16}})
    )
    save_file(state, tmp_path / "nan" / "open_clip_model.safetensors")
    said = complaint("--real", folders[0], "--fake", folders[1], "--extractor", f"clip={tmp_path / 'nan'}")
    assert "clip gives NaN or infinity for" in said and "0000.png" in said


def test_statistics_of_another_extractor_or_width_or_kind_are_refused(folders, clip, complaint, tmp_path):
    def refused(path: Path) -> str:
        return complaint("--real", path, "--fake", folders[1], "--extractor", f"clip={clip}")

    np.savez(tmp_path / "wide.npz", mu=np.zeros(9), sigma=np.eye(9))
    assert "have width 9, and clip gives 8" in refused(tmp_path / "wide.npz")
    np.savez(tmp_path / "told.npz", mu=np.zeros(8), sigma=np.eye(8))
    (tmp_path / "told.json").write_text(json.dumps({"extractor": "dinov2"}))
    assert "statistics of extractor dinov2" in refused(tmp_path / "told.npz")
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    assert "has no mu and sigma, no feats and no arr_0 but weights" in refused(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    assert "no .npz file of plain arrays" in refused(tmp_path / "text.npz")
    assert "does not exist" in refused(tmp_path / "absent.npz")
    for name, feats, what in (
        ("nan", np.full((9, 8), np.nan), "no matrix (N, D) of finite floats"),
        ("whole", np.zeros((9, 8), np.int64), "no matrix (N, D) of finite floats"),
        ("single", np.zeros((1, 8)), "features of 1 pictures: a distribution needs many"),
    ):
        np.savez(tmp_path / f"{name}.npz", feats=feats)
        assert what in refused(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 16, 16, 3), np.uint8))
    assert "has 1 pictures" in refused(tmp_path / "one.npz")
    np.savez(tmp_path / "many.npz", mu=np.zeros(8), sigma=np.eye(8), n=np.array("many"))
    assert "its n is no number of pictures" in refused(tmp_path / "many.npz")
    np.savez(tmp_path / "negative.npz", mu=np.zeros(8), sigma=-np.eye(8))
    assert "sigma has negative variances" in refused(tmp_path / "negative.npz")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(len))
    assert "it names builtins.len" in refused(tmp_path / "evil.pkl")
