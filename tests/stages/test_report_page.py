from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from stages import report_page, report_pictures
from stages.pictures import png
from stages.report_data import (
    Artifact,
    AttributeAccuracy,
    Curve,
    Dataset,
    Diagnostic,
    Generated,
    Interpolation,
    LedgerEntry,
    Picture,
    Reconstruction,
    ReportData,
    Score,
    Share,
    StageRun,
    Variation,
)
from stages.report_page import png_data_uri, png_size, render

HOSTILE = '<script>alert("1")</script> & <img src=http://example.org/x onerror=a>'
COLOURS = {
    "red": (206, 62, 54),
    "green": (66, 148, 88),
    "blue": (58, 104, 186),
    "yellow": (226, 184, 62),
    "purple": (128, 84, 168),
}
GROUNDS = {"white": (246, 244, 240), "black": (28, 28, 30), "grey": (150, 150, 152), "cream": (238, 222, 186)}
SHAPES = ("circle", "square", "triangle")


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def scene(index: int, *, size: int = 32, noise: float = 0.0) -> tuple[bytes, str]:
    """A drawn shape as PNG, and its caption."""
    rng = np.random.default_rng(index)
    colour, ground, shape = rng.choice(list(COLOURS)), rng.choice(list(GROUNDS)), rng.choice(SHAPES)
    picture = Image.new("RGB", (size * 4, size * 4), GROUNDS[ground])
    x, y, r = (
        float(v) * size * 4
        for v in (rng.uniform(0.35, 0.65), rng.uniform(0.35, 0.65), rng.choice([0.17, 0.28]))
    )
    draw = ImageDraw.Draw(picture)
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
    else:
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=COLOURS[colour])
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float64)
    noisy = np.clip(pixels + noise * rng.standard_normal(pixels.shape), 0, 255).astype(np.uint8)
    return encode(Image.fromarray(noisy)), f"a {colour} {shape} on a {ground} background"


def blend(first: bytes, second: bytes, weight: float) -> bytes:
    a, b = (Image.open(io.BytesIO(png)) for png in (first, second))
    return encode(Image.blend(a, b, weight))


def losses(steps: int, floor: float, seed: int) -> tuple[tuple[float, float], ...]:
    rng = np.random.default_rng(seed)
    return tuple(
        (s, floor + (1 - floor) * math.exp(-s / steps * 6) + 0.05 * rng.random()) for s in range(1, steps, 5)
    )


def small_report(**changes: object) -> ReportData:
    return ReportData(
        **{
            "title": "Shapes from words",
            "run": "demo",
            "recipe": "demo",
            "created": datetime(2031, 5, 4, 10, 30, tzinfo=UTC),
            "seconds": 512.3,
            "summary": "91.4 % of 512 prompts came out right in every attribute.",
            **changes,
        }
    )


STAGES = {
    "shard": (),
    "clip": ("shard",),
    "embed": ("shard", "clip"),
    "vae": ("shard",),
    "encode": ("shard", "vae"),
    "prior": ("embed",),
    "denoiser": ("embed", "encode"),
    "generate": ("clip", "vae", "prior", "denoiser"),
    "evaluate": ("shard", "generate"),
    "report": ("evaluate",),
}
SECONDS = (6.2, 64.0, 11.3, 82.0, 9.7, 58.0, 171.0, 22.4, 7.5, 0.8)
MATCH = "Images in which every attribute is as the prompt says."
SAMPLER = "exact recogniser; 20 Euler steps, guidance 2.5, one seed per prompt"
FRECHET = "How far the features of the generated images lie from those of the dataset."
SCORES = (
    ("prompt_accuracy", "Prompt accuracy, seen", 0.914, 0.887, 0.936, "%", "higher", 512, MATCH, SAMPLER),
    (
        "prompt_accuracy_heldout",
        "Prompt accuracy, held out",
        0.773,
        0.692,
        0.838,
        "%",
        "higher",
        128,
        MATCH,
        SAMPLER,
    ),
    (
        "fd_clip",
        "Fréchet distance (CLIP)",
        0.0713,
        0.0688,
        0.0744,
        "",
        "lower",
        512,
        FRECHET,
        "64-d, 512 against 2,000",
    ),
    (
        "vae_psnr",
        "VAE reconstruction",
        31.42,
        31.1,
        31.7,
        "dB",
        "higher",
        512,
        "Peak signal-to-noise ratio.",
        "mean",
    ),
    ("cmmd", "CMMD", 0.412, None, None, "", "lower", None, "Kernel distance on CLIP features.", ""),
)


def fingerprint(stage: str) -> str:
    return f"{(list(STAGES).index(stage) + 1) * 0x1A2B3C4D5E7:012x}"


def share(value: float, n: int) -> Share:
    return Share(value=value, low=max(value - 0.03, 0.0), high=min(value + 0.03, 1.0), n=n)


def plan() -> tuple[StageRun, ...]:
    runs = []
    for name, seconds in zip(STAGES, SECONDS, strict=True):
        cached, fanned = name in ("shard", "clip"), name in ("shard", "embed", "encode")
        runs.append(
            StageRun(
                name=name,
                status="cached" if cached else "ran",
                reason="snapshot found" if cached else "denoiser.learning_rate changed",
                seconds=seconds,
                fingerprint=fingerprint(name),
                devices="0.12 CPU-hours",
                cost="0.0048 USD",
                samples=9600 if fanned else None,
                shards=10 if fanned else None,
                bytes=18_432_000,
            )
        )
    return tuple(runs)


def scores() -> tuple[Score, ...]:
    names = ("name", "label", "value", "low", "high", "unit", "better", "n", "meaning", "protocol")
    return tuple(Score(**dict(zip(names, row, strict=True)), headline=row[0] != "cmmd") for row in SCORES)


def pictures() -> dict[str, object]:
    """The parts of a report that hold PNGs."""
    scenes = [scene(i) for i in range(40)]
    return {
        "dataset": Dataset(
            pairs=9600,
            shards=10,
            bytes=18_432_000,
            caption_lengths={n: int(900 * math.exp(-(((n - 42) / 9) ** 2))) for n in range(20, 68)},
            image_sizes={(32 + n, 32): 9600 - n for n in range(10)},
            samples=tuple(Picture(png=p, caption=c) for p, c in [*scenes[:11], (scenes[11][0], HOSTILE)]),
        ),
        "generated": tuple(
            Generated(png=png, prompt=text, correct=i % 9 != 4, heldout=i % 8 == 7)
            for i, (png, text) in enumerate(scenes)
        ),
        "variations": tuple(
            Variation(
                original=png, caption=text, variations=tuple(scene(i, noise=6 + 3 * k)[0] for k in range(5))
            )
            for i, (png, text) in enumerate(scenes[:4])
        ),
        "interpolations": tuple(
            Interpolation(frames=tuple(blend(a, b, w / 8) for w in range(9)), start=start, end=end)
            for (a, start), (b, end) in zip(scenes[:3], scenes[20:23], strict=True)
        ),
        "reconstructions": tuple(
            Reconstruction(original=png, decoded=scene(i, noise=9)[0], psnr=29.1 + i / 3, caption=text)
            for i, (png, text) in enumerate(scenes[:8])
        ),
    }


def full_report() -> ReportData:
    rejected = {"filtered": {"too_small": 5}, "failed": {"truncated": 7}}
    return small_report(
        **pictures(),
        plan=plan(),
        ledger=(
            LedgerEntry(stage="shard", attempted=9612, written=9600, **rejected),
            LedgerEntry(stage="embed", attempted=9600, written=9600),
        ),
        scores=scores(),
        accuracy=(
            AttributeAccuracy(attribute="colour", seen=share(0.99, 512), heldout=share(0.97, 128)),
            AttributeAccuracy(attribute="shape", seen=share(0.93, 512), heldout=share(0.81, 128)),
            AttributeAccuracy(attribute="size", seen=share(1.0, 512), heldout=None),
            AttributeAccuracy(attribute="all", seen=share(0.914, 512), heldout=share(0.773, 128)),
        ),
        diagnostics=(
            Diagnostic(
                label="predicted",
                value=0.871,
                low=0.864,
                high=0.878,
                meaning="by the prior, from its own caption",
            ),
            Diagnostic(label="text embedding", value=0.512, meaning="the baseline: no prior at all"),
            Diagnostic(
                label="unrelated caption", value=-0.034, meaning="predicted from another picture's caption"
            ),
        ),
        curves=(
            Curve(stage="clip", train=losses(1200, 0.12, 1), validation=losses(1200, 0.2, 9)[9::10]),
            Curve(stage="vae", train=losses(600, 0.01, 2), note="600 steps of 64"),
            Curve(stage="prior", train=losses(1500, 0.3, 3), note="1,500 steps of 256"),
            Curve(stage="denoiser", train=losses(2000, 0.25, 4), note="2,000 steps of 64"),
        ),
        lineage=tuple(Artifact(stage=s, fingerprint=fingerprint(s), parents=p) for s, p in STAGES.items()),
        environment={
            "Python": "3.11",
            "torch": "2.15.0",
            "Ray": "2.60.0",
            "Cores": "2",
            "Accelerator": "none",
        },
        config={"seed": 0, "denoiser": {"max_steps": 2000, "learning_rate": 1e-3, "note": HOSTILE}},
    )


class Page(HTMLParser):
    """What a page consists of: tags with attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in {"meta", "link", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render(full_report())


def test_a_full_report_shows_every_section_with_tables_pictures_and_charts(html: str) -> None:
    page = Page(html)
    anchors = [attributes["id"] for attributes in page.all("section")]
    assert anchors == list(report_page.sections(full_report()))
    assert len(anchors) == 11
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == 11
    assert page.open == []
    assert {a["href"] for a in page.all("a")} == {f"#{anchor}" for anchor in anchors}
    assert len(page.all("table")) == 7
    assert len(page.all("polyline")) == 9  # per curve raw and average, and one validation
    pictures = 14 + 40 + 4 * 6 + 3 * 9 + 8 * 2 + 12  # film, generated, variations, strips, pairs, samples
    assert len(page.all("img")) == pictures


def test_the_page_is_accessible(html: str) -> None:
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    assert all("alt" in attributes for attributes in page.all("img"))
    assert (
        sum(not attributes["alt"] for attributes in page.all("img")) == 14
    )  # the film repeats pictures shown below
    assert all(attributes.get("scope") in {"col", "row"} for attributes in page.all("th"))
    charts = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert charts and all(a["role"] == "img" and a["aria-label"] for a in charts)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_refers_to_a_network_and_the_policy_forbids_it(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        for name in {"src", "href", "srcset", "poster", "action", "data", "background"} & set(attributes):
            assert attributes[name].startswith(("#", "data:")), f"<{tag} {name}={attributes[name][:80]!r}>"
        assert "url(" not in attributes.get("style", "")
    style = html.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|//", style)
    policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:;") and "script-src" not in policies[0]
    assert not page.all("script") and not page.all("iframe")


def test_captions_are_escaped_wherever_they_appear() -> None:
    png, _ = scene(0)
    page = Page(
        render(
            small_report(
                summary=HOSTILE,
                generated=(Generated(png=png, prompt=HOSTILE),),
                interpolations=(Interpolation(frames=(png, png), start=HOSTILE, end=HOSTILE),),
                lineage=(Artifact(stage=HOSTILE, fingerprint="0"),),
                curves=(Curve(stage=HOSTILE, train=((1, 2.0), (2, 1.0))),),
                ledger=(LedgerEntry(stage=HOSTILE, attempted=1, written=0, failed={HOSTILE: 1}),),
                config={HOSTILE: HOSTILE},
            )
        )
    )
    assert not page.all("script")
    assert all("onerror" not in attributes for attributes in page.all("img"))
    assert page.text.count(HOSTILE) >= 8
    assert f"generated for: {HOSTILE}" in [attributes["alt"] for attributes in page.all("img")]


def test_empty_sections_are_left_out() -> None:
    page = Page(render(small_report()))
    assert page.all("section") == page.all("img") == page.all("table") == page.all("nav") == []
    assert "91.4 % of 512 prompts" in page.text


def test_how_far_scores_can_be_believed_stands_above_them() -> None:
    score = Score(
        name="fd_clip", label="FD", value=1.0, low=0.5, high=1.5, n=16, better="lower", meaning="a distance"
    )
    page = render(small_report(scores=(score,), warnings=("16 images for the 64 dimensions of clip: <few>",)))
    at = page.index("16 images for the 64 dimensions of clip: &lt;few&gt;")
    assert page.index('<section id="scores"') < at < page.index("Table of scores")


def test_images_without_a_known_truth_have_no_verdict_and_no_accuracy_table() -> None:
    png, _ = scene(0)
    text = Page(render(small_report(generated=(Generated(png=png, prompt="otter"),)))).text
    assert "otter" in text
    assert not any(word in text for word in ("✓", "✕", "held out", "Held out", "Prompt accuracy"))


def test_what_a_training_drew_stands_under_its_curve(tmp_path) -> None:
    kept = tmp_path / "_meta" / "samples"
    kept.mkdir(parents=True)
    for step in (400, 800, 1200, 1600, 2000):
        (kept / f"step_{step:08d}.png").write_bytes(png(np.full((4, 8, 3), step % 251, np.uint8)))
    drawn = tuple(report_pictures.drawn_in_training(str(tmp_path)))
    assert [item.caption for item in drawn] == ["step 400", "step 1,200", "step 2,000"]
    assert list(report_pictures.drawn_in_training(str(tmp_path / "_meta"))) == []
    curve = Curve(stage="vae", train=((1, 2.0), (2, 1.0)), samples=drawn)
    alts = [image["alt"] for image in Page(render(small_report(curves=(curve,)))).all("img")]
    assert [alt for alt in alts if "of vae" in alt] == [f"{item.caption} of vae" for item in drawn]


def test_curves_without_a_finite_loss_are_left_out() -> None:
    broken = Curve(stage="vae", train=((1, math.nan), (2, math.inf)))
    assert report_page.sections(small_report(curves=(broken,))) == {}
    kept = Curve(stage="prior", train=((1, math.nan), (2, 0.5)))
    assert len(Page(render(small_report(curves=(broken, kept)))).all("svg")) == 2  # the mark and one chart


@pytest.mark.parametrize(
    ("attempted", "verdict"),
    [
        (10, "✓ balances"),
        (12, "✕ does not balance: 2 in no count"),
        (9, "✕ does not balance: 1 counted twice"),
    ],
)
def test_the_ledger_says_whether_it_balances(attempted: int, verdict: str) -> None:
    entry = LedgerEntry(
        stage="shard", attempted=attempted, written=7, filtered={"too_small": 2}, failed={"truncated": 1}
    )
    text = Page(render(small_report(ledger=(entry,)))).text
    assert f"{attempted} attempted = 7 written + 2 filtered + 1 failed" in text
    assert verdict in text


def test_a_picture_survives_its_data_uri_and_anything_else_is_refused() -> None:
    png, _ = scene(3, size=24)
    prefix, payload = png_data_uri(png).split(",")
    assert prefix == "data:image/png;base64" and base64.b64decode(payload) == png
    assert png_size(png) == (24, 24)
    for other in (b"", b"\xff\xd8\xff\xe0 jpeg", b"<svg onload=a>", png[:12]):
        with pytest.raises(ValueError, match="PNG"):
            png_data_uri(other)


def test_small_pictures_are_enlarged_by_whole_factors_and_large_ones_fit() -> None:
    widths = {
        width: report_page.tile_width(encode(Image.new("L", (width, 4))), 128)
        for width in (8, 28, 32, 64, 100, 256)
    }
    assert widths == {8: 128, 28: 112, 32: 128, 64: 128, 100: 100, 256: 128}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.9137, "%", "91.4 %"),
        (31.4159, "dB", "31.4 dB"),
        (0.07129, "", "0.0713"),
        (-0.5, "", "−0.500"),
        (12345.6, "", "12,346"),
        (0.0, "", "0"),
        (None, "", "–"),
        (math.nan, "%", "–"),
    ],
)
def test_scores_are_written_with_three_significant_digits(value: float | None, unit: str, text: str) -> None:
    assert report_page.score_text(value, unit) == text


def test_times_and_sizes_read_well() -> None:
    times = [report_page.duration(s) for s in (0, 9.949, 9.96, 59.6, 185, 3599.6, 7620)]
    assert times == ["0.0 s", "9.9 s", "10 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min"]
    sizes = [report_page.file_size(n) for n in (0, 999, 1000, 18_432_000, 999_600, 5e14)]
    assert sizes == ["0 B", "999 B", "1.00 kB", "18.4 MB", "1.00 MB", "500 TB"]


FLAGS = (
    "--headless",
    "--no-sandbox",
    "--hide-scrollbars",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)


class Browser:
    """Headless Chromium over its DevTools pipe: JSON messages ended by NUL, commands down, answers and events up."""

    def __init__(self, down: int, up: int) -> None:
        self._down, self._up = down, up
        self._buffer = b""
        self._last = 0
        self.events: list[dict] = []

    def call(self, method: str, *, session: str | None = None, **params: object) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self, seconds: float = 60.0) -> dict:
        deadline = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._up], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._up, 1 << 20) if ready else b""
            assert chunk, "Chromium ended or said nothing for a minute"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextmanager
def chromium() -> Iterator[Browser]:
    binary = shutil.which("chromium")
    if binary is None:
        pytest.skip("Debian's package chromium is not installed, so no browser can open the report")
    from_us, down = os.pipe()
    up, to_us = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        redirected = ["bash", "-c", f'exec "$@" 3<&{from_us} 4>&{to_us}', "chromium", *command]
        with subprocess.Popen(redirected, pass_fds=(from_us, to_us), stderr=subprocess.DEVNULL) as process:
            os.close(from_us)
            os.close(to_us)
            try:
                browser = Browser(down, up)
                yield browser
                browser.call("Browser.close")
                process.wait(timeout=30)
            finally:
                process.kill()
                os.close(down)
                os.close(up)


MEASURE = """(() => {
  const wide = [...document.querySelectorAll('body *')].filter(
    e => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.scroll, .film, pre'));
  const images = [...document.images];
  return {
    page: document.documentElement.scrollWidth, window: innerWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
    images: images.length, empty: images.filter(i => !i.naturalWidth).length,
    pixelated: images.filter(i => getComputedStyle(i).imageRendering === 'pixelated').length,
    curves: [...document.querySelectorAll('polyline')].filter(p => p.getBoundingClientRect().width > 50).length,
    tables: [...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().height > 20).length,
    type: [...document.querySelectorAll('.chart text')].map(t => t.getBoundingClientRect().height).sort((a, b) => a - b)[0],
    background: getComputedStyle(document.body).backgroundColor,
    scripts: document.scripts.length,
  };
})()"""


CROSS_THE_POLICY = """new Promise(blocked => {
  document.addEventListener('securitypolicyviolation', event => blocked(event.effectiveDirective));
  new Image().src = 'http://192.0.2.1/pixel.png';
})"""

SCREENS = [(360, 800, "light"), (360, 800, "dark"), (1280, 900, "light"), (1280, 900, "dark")]


class Tab:
    """One page of the browser, and what it asked of the network and complained about."""

    def __init__(self, browser: Browser, path: Path) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=path.as_uri())
        browser.wait_for("Page.loadEventFired")

    def call(self, method: str, **params: object) -> dict:
        return self._browser.call(method, session=self._session, **params)

    def evaluate(self, expression: str) -> object:
        options = {"returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", expression=expression, **options)["result"]["value"]

    def resize(self, width: int, height: int, theme: str, media: str = "screen") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def events(self, *methods: str) -> list[dict]:
        return [event["params"] for event in self._browser.events if event.get("method") in methods]


@pytest.mark.slow
def test_chromium_shows_the_report_on_phone_and_desk_in_both_themes_and_asks_nothing_of_the_network(
    html: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    backgrounds = set()
    with chromium() as browser:
        tab = Tab(browser, path)
        for width, height, theme in SCREENS:
            tab.resize(width, height, theme)
            found = tab.evaluate(MEASURE)
            assert (found["window"], found["page"], found["wide"]) == (width, width, [])
            assert (found["images"], found["empty"], found["pixelated"]) == (133, 0, 133)
            assert (found["curves"], found["tables"], found["scripts"]) == (9, 7, 0)
            assert found["type"] >= 8, "chart labels are too small to read"
            backgrounds.add(found["background"])
            picture = tmp_path / f"report-{width}-{theme}.png"
            picture.write_bytes(tab.screenshot())
            assert np.asarray(Image.open(picture).convert("L")).std() > 10
        tab.resize(794, 1123, "light", media="print")  # A4 at 96 dpi
        assert tab.evaluate(MEASURE)["page"] == 794
        requested = [event["request"]["url"] for event in tab.events("Network.requestWillBeSent")]
        assert [url for url in requested if not url.startswith("data:")] == [path.as_uri()]
        assert tab.events("Log.entryAdded", "Runtime.exceptionThrown") == []
        assert tab.evaluate(CROSS_THE_POLICY) == "img-src"
    assert len(backgrounds) == 2
