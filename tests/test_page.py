"""Pages in a real browser: every file plays from its time, nothing fails, and the pages work with a screen
reader and without a mouse."""

import html.parser
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, MISSING, Browser
from conftest import chirps, write_media
from test_train import TINY

from avid import config
from avid.tools import page

NAMES = (  # names such as users' files have
    "【公式】とても長い名前の動画 – Ünïcödé & “quotes” 'n' <b>tags 100% #1 [dQw4w9WgXcQ] "
    + "x" * 120
    + ".mp4",
    "فيديو طويل جدا.mp4",
    "a?b=c&d;e+f%20g.mp4",
    "-leading dash and  two spaces.mp4",
    "javascript:alert(1).mp4",
)

PLAYS = """(async () => {
  const played = [];
  for (const media of document.querySelectorAll("video, audio")) {
    media.muted = true;
    const from = parseFloat(media.getAttribute("src").split("#t=")[1]);
    let how = "plays";
    const asked = performance.now();
    try { await media.play(); } catch (error) { how = String(error); }
    const latest = from + 0.5 + (performance.now() - asked) / 1000;  // a busy machine tells it late
    played.push([media.ariaLabel, how, from, media.currentTime, latest]);
    media.pause();
  }
  return played;
})()"""
PICTURES = """[...document.images].map(image => [image.alt, image.complete && image.naturalWidth])"""
POSTERS = """Promise.all([...document.querySelectorAll("video[poster]")].map(video => new Promise(done => {
  const image = new Image();
  image.onload = () => done(image.naturalWidth);
  image.onerror = () => done(0);
  image.src = video.poster;
})))"""
CONTRASTS = """[...document.querySelectorAll("h1, h2, h3, p, a, li, td, th, caption, summary")].flatMap(
  element => {
  const numbers = text => text.match(/[\\d.]+/g).map(Number);
  const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) =>
    0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  let ground = element;
  while (ground && numbers(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  if (!element.textContent.trim() || element.className === "skip") return [];
  const colours = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
  const pair = colours.map(numbers).map(light);
  return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
})"""


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip(MISSING)
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files with difficult names, a mute video, a sound, a broken file, and one that browsers cannot play."""
    root = tmp_path_factory.mktemp("pages")
    wave = chirps((0.4, 1.9), 2.4, 48000)
    plain = write_media(root / "plain.mp4", np.arange(60) / 25, wave)
    for name in NAMES:
        (root / "below here" / name).parent.mkdir(exist_ok=True)
        os.link(plain, root / "below here" / name)
    write_media(root / "mute.mp4", np.arange(40) / 20)
    write_media(root / "sound.wav", wave=wave, codecs=("", "pcm_s16le"))
    write_media(root / "old.avi", np.arange(50) / 25, codecs=("mpeg4", ""))
    (root / "broken.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def results_page(folder):
    """A page of search results in a folder beside the files, with lists of all kinds. One has 200 files."""
    cfg = config.load("toy", TINY)
    query = page.look(folder / "sound.wav", 0.0, cfg, whole=True, name="sound.wav", label="chirp")
    hard = [
        page.look(
            folder / "below here" / name,
            1.3,
            cfg,
            name=name,
            label="chirp" * (i % 3 > 0),
            score=0.9 - i / 10,
            same=(None, True, False)[i % 3],
            rank=i + 1,
        )
        for i, name in enumerate(NAMES)
    ]
    odd = [
        page.look(folder / name, 0.7, cfg, name=name, score=0.5, rank=i)
        for i, name in enumerate(("mute.mp4", "sound.wav", "broken.mp4"), 1)
    ]
    many = [
        page.look(folder / "plain.mp4", 0.5 + i / 200, cfg, name=f"{i}.mp4", score=0.5, rank=i)
        for i in range(1, 201)
    ]
    path = folder / "pages" / "found.html"
    lists = [
        ("Like its picture", hard),
        ("Like its sound", odd),
        ("Sounds for its picture", []),
        ("Pictures for its sound", many),
    ]
    page.write_found(
        path,
        "What was found",
        "files & <their> names",
        [(query, lists), (hard[0], [("Like its picture", odd)])],
    )
    return path


class Links(html.parser.HTMLParser):
    """(tag, address) of every link on a page. Tags that are not closed in their order are an error."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.ids = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found += [(tag, attributes[key]) for key in ("src", "href", "poster") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_links_are_relative_and_lead_to_the_files(results_page, folder):
    """The page loads nothing from elsewhere, and it still works when it is moved together with its files."""
    links = Links(results_page.read_text(encoding="utf-8"))
    assert len(links.ids) == len(set(links.ids))
    files = set()
    for _, address in links.found:
        if address.startswith("#"):
            assert address[1:] in links.ids
        elif not address.startswith("data:"):
            parts = urllib.parse.urlsplit(address)
            assert (
                not parts.scheme and not parts.netloc and not parts.path.startswith("/") and not parts.query
            )
            files.add((results_page.parent / urllib.parse.unquote(parts.path)).resolve())
    assert files == {folder / "below here" / name for name in NAMES} | {
        folder / name for name in ("mute.mp4", "sound.wav", "plain.mp4", "broken.mp4")
    }
    assert results_page.stat().st_size < 2_000_000  # 212 files


def test_every_file_plays_from_its_time_without_an_error(results_page, browser):
    browser.problems.clear()
    browser.open(results_page)
    played = browser.evaluate(PLAYS)
    assert len(played) == 1 + 5 + 2 + 200 + 1 + 2
    wrong = [one for one in played if one[1] != "plays" or not one[2] - 0.05 <= one[3] < one[4]]
    assert not wrong
    assert [width for _, width in browser.evaluate(PICTURES) if not width] == []
    posters = browser.evaluate(POSTERS)
    assert len(posters) == 5 + 1 + 200 + 1 + 1 and min(posters) == page.WIDTH
    assert browser.problems == []


def test_one_file_plays_at_a_time(results_page, browser):
    browser.open(results_page)
    playing = """(async () => {
      const [first, second] = document.querySelectorAll("video");
      first.muted = second.muted = true;
      await first.play();
      await second.play();
      return [first.paused, second.paused];
    })()"""
    assert browser.evaluate(playing) == [True, False]


def test_the_page_says_which_file_the_browser_cannot_play(folder, browser):
    """AVI, as in UCF101. The card and the screen reader say so. The link stays for other programs."""
    cfg = config.load("toy", TINY)
    query = page.look(folder / "old.avi", 0.0, cfg, name="old.avi")
    assert query.picture
    page.write_found(folder / "old.html", "Found", "", [(query, [])])
    browser.open(folder / "old.html")
    (played,) = browser.evaluate(PLAYS)
    assert played[1].startswith("NotSupportedError")
    expected = "This browser cannot play this file; its name leads to it."
    assert browser.evaluate("document.querySelector('.fault').textContent") == expected
    assert browser.evaluate("document.querySelector('[role=status]').textContent") == f"old.avi: {expected}"


@pytest.mark.parametrize("width", [320, 1280])
def test_no_name_is_wider_than_the_page(results_page, browser, width):
    browser.open(results_page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    wider = """[...document.querySelectorAll("figure")].filter(figure => {
      const edge = figure.getBoundingClientRect().right + 1;
      return [...figure.querySelectorAll("*")].some(part => part.getBoundingClientRect().right > edge);
    }).length"""
    assert browser.evaluate(wider) == 0


def test_a_screen_reader_gets_every_role_and_name(results_page, browser):
    browser.open(results_page)
    nodes = browser.accessible_nodes()
    roles = [role for role, _ in nodes]
    assert roles.count("main") == 1 and roles.count("navigation") == 1 and roles.count("banner") == 1
    assert ("heading", "What was found") in nodes and ("heading", "Pictures for its sound") in nodes
    assert ("region", "Like its picture") in nodes
    for role, name in nodes:
        if role in ("link", "image", "Video", "Audio", "region", "navigation", "button"):
            assert name.strip(), role
    for name in NAMES:
        assert ("link", name.replace("  ", " ")) in nodes or ("link", name) in nodes
    assert any(role == "Audio" and name == "2. sound.wav, from 0:00.7" for role, name in nodes)
    assert ("image", "spectrogram of 2. sound.wav, from 0:00.7") in nodes
    text = " ".join(name for role, name in nodes if role == "StaticText")
    for expected in (
        "no sound",
        "no picture",
        "score 0.900",
        "✓ same class: chirp",
        "✗ other class: chirp",
        "No file has one.",
    ):
        assert expected in text


def test_the_keyboard_reaches_every_control_and_the_focus_is_visible(results_page, browser):
    browser.open(results_page)
    focus = """(() => {
      const at = document.activeElement, figure = at.closest("figure"), style = getComputedStyle(at);
      const last = [...document.querySelectorAll("figure")].at(-1);
      const card = figure && getComputedStyle(figure).borderColor !== getComputedStyle(last).borderColor;
      return [at.tagName, at.textContent, style.outlineStyle !== "none", card];
    })()"""
    reached = []
    for _ in range(8):
        browser.press("Tab")
        reached.append(browser.evaluate(focus))
    assert reached[0][:2] == ["A", "to the content"]
    assert [tag for tag, *_ in reached[1:4]] == ["A", "A", "AUDIO"]  # two sections and the query
    for tag, _, outlined, card in reached:  # the browser itself marks the buttons of a player
        assert card if tag in ("AUDIO", "VIDEO") else outlined
    browser.open(results_page)
    browser.press("Tab")
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.id") == "content"


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast_in_light_and_in_dark(results_page, browser, dark):
    """Contrasts of at least 4.5, as WCAG 2 level AA requires."""
    browser.open(results_page, dark=dark)
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(re.search(r"\d+", ground)[0])
    assert red < 60 if dark else red > 200
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 200 and min(contrasts) >= 4.5


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "other.html").write_text("<p>other")
    with pytest.raises(config.ConfigError, match=r"other\.html is no page of avid's; move it away"):
        page.check_page(tmp_path / "other.html")
    page.write(tmp_path / "page.html", "Title", "", "")
    page.check_page(tmp_path / "page.html")


def test_a_long_page_loads_and_lays_out_only_what_is_needed(results_page, browser):
    """No media are loaded before they are played, and cards outside the window are not laid out."""
    browser.open(results_page)
    loaded = "[...document.querySelectorAll('video, audio')].filter(media => media.readyState).length"
    assert browser.evaluate(loaded) == 0
    hidden = """[...document.querySelectorAll(".cards li")].filter(
      item => !item.firstElementChild.checkVisibility({contentVisibilityAuto: true})).length"""
    assert browser.evaluate(hidden) > 150


def test_names_are_shown_as_they_are_and_in_one_line():
    for name in ("👨\u200d👩\u200d👧.mp4", "Recording at 3.14\u202fPM.mov", "می\u200cخواهم\u00a0.mp4"):
        assert page.escape(name) == name
    assert page.escape("a\n\u202eb\udcff\u2028<") == r"a\n\u202eb\udcff\u2028&lt;"


def test_times_are_shown_in_minutes_and_seconds():
    assert [page.clock(s) for s in (0, 9.96, 59.96, 61.04, 3723.5)] == [
        "0:00.0",
        "0:10.0",
        "1:00.0",
        "1:01.0",
        "62:03.5",
    ]


# ----------------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run and its evaluations, written without running them."""
    folder = tmp_path / "runs" / "a & b"
    folder.mkdir(parents=True)
    cfg = config.load("toy_temporal", ["optim.lr=0.5", "data.root=/data/<own>"])
    config.save(cfg, folder / "config.yaml")
    lines = [
        {"step": s, "epoch": s / 25, "loss": 5 - s / 50, "lr": 0.1, "grad_norm": 2.0, "clips_per_s": 99.0}
        for s in range(5, 55, 5)
    ]
    lines.append({"step": 30, "epoch": 1.2, "not_finite": "loss nan", "files": ["bad <1>.mp4"]})
    for epoch in (1, 2):
        numbers = {
            "cosine_video": 0.0123,
            "agreement_mean": 0.5,
            "v→a class R@1": 40.25,
            "held-out speed_video %": 77.7,
        }
        lines.append({"step": 25 * epoch, "epoch": epoch, **numbers})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    about = {
        "checkpoint": "last.pt",
        "checkpoint_hash": "0123456789ab",
        "data": "toy",
        "split": "test",
        "seed": 0,
    }
    for modality, top1 in (("video", 98.76), ("audio", 91.23)):
        result = {
            **about,
            "mode": "linear",
            "modality": modality,
            "top1": top1,
            "divisions": [{"top1": top1 - 1}, {"top1": top1 + 1}],
        }
        (folder / f"linear-{modality}-toy-test.json").write_text(json.dumps(result))
    wide = {**about, **{f"crop {i} video R@1": float(i) for i in range(60)}}
    (folder / "retrieval-fingerprint-toy-test.json").write_text(json.dumps(wide))
    (folder / "other.json").write_text('{"unrelated": 1}')
    (folder / "skipped.csv").write_text("path,reason\nx.mp4,no sound\n")
    for name in ("retrieval-cross-toy.png", "temporal.png", "weights.png"):
        from avid.tools import figures

        figure, _ = figures.plt.subplots(figsize=(2, 2))
        figures.write(figure, folder / name)
    page.write(folder / "retrieval-cross-toy.html", "Cross", "", "")
    return folder


def test_the_page_of_a_run_shows_everything_in_its_folder(run_folder):
    page.main(["page", str(run_folder)])
    text = (run_folder / "page.html").read_text(encoding="utf-8")
    links = {address for _, address in Links(text).found}
    pictures = {"curves.png", "temporal.png", "weights.png", "retrieval-cross-toy.png"}
    assert links >= pictures | {"retrieval-cross-toy.html"}
    assert all((run_folder / name).is_file() for name in pictures)  # the curves have been drawn
    for expected in (
        ">Run a &amp; b<", "step 50, epoch 2 of 32", "0.012", "40.2", "77.7", ">98.8<", ">91.2<", "99.8",
        "linear-video-toy-test, division 2", "crop 59 video R@1", "bad &lt;1&gt;.mp4", "x.mp4", "no sound",
        "/data/&lt;own&gt;", "optim.lr",
    ):  # fmt: skip
        assert expected in text, expected
    assert "unrelated&quot;" not in text and text.count("<table>") >= 8
    page.main(["page", str(run_folder)])  # its own page may be overwritten


def test_the_page_of_a_run_fits_a_narrow_window(run_folder, browser):
    page.main(["page", str(run_folder)])
    browser.problems.clear()
    browser.open(run_folder / "page.html", width=400, dark=True)
    assert [alt for alt, width in browser.evaluate(PICTURES) if not width or not alt] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400  # wide tables scroll by themselves
    broken = """[...document.querySelectorAll(".scroll td.number")].filter(cell => {
      const text = document.createRange();
      text.selectNodeContents(cell);
      return text.getClientRects().length > 1;  // one rectangle per line
    }).map(cell => cell.textContent)"""
    assert browser.evaluate("document.querySelectorAll('.scroll td.number').length") > 20
    assert browser.evaluate(broken) == []
    assert min(browser.evaluate(CONTRASTS)) >= 4.5
    nodes = browser.accessible_nodes()
    assert (
        ("heading", "Settings") in nodes
        and ("rowheader", "optim.lr") in nodes
        and ("columnheader", "default") in nodes
    )
    assert browser.problems == []


def test_a_folder_without_a_run_is_a_one_line_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        page.main(["page", str(tmp_path)])
    assert stop.value.code == 2
    assert f"{tmp_path} holds no run of train.py; name its --out, such as runs/toy" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["embed", "search", "page"])
def test_help_and_wrong_arguments_do_not_import_torch(command, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])}
    for more, code, expected in (("--help", 0, "usage: python -m avid"), ("--wings", 2, "error: ")):
        command_line = [sys.executable, "-m", "avid", command, more]
        done = subprocess.run(command_line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == code and expected in done.stdout + done.stderr, done.stderr
