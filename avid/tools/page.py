"""Pages to look at, in any browser, without a network: what a search found, or all that a run folder holds.

    python -m avid page runs/toy                      runs/toy/page.html

In: what was found, or a run folder.
Out: one HTML file; pictures are in it, videos and sounds are linked where they lie, relative to it.
"""

import argparse
import base64
import csv
import dataclasses
import functools
import html
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from avid import cli, config, files
from avid.files import ConfigError

MARK = '<meta name="generator" content="avid">'
WIDTH = 240  # of a picture, pixels
LONGEST_S = 30.0  # of a spectrogram

STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #fff; --ink: #1b1b1a; --faint: #5c5c58;
  --line: #d4d4cf; --link: #0b57a4; --good: #16703a; --bad: #a3301c; }
@media (prefers-color-scheme: dark) { :root { --ground: #161615; --card: #21211f; --ink: #ecece8;
  --faint: #adada6; --line: #44443f; --link: #8fc1ff; --good: #7fd79c; --bad: #ff9c87; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h1, h2, h3, p, a, figcaption { overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--card); padding: .5rem; }
nav ul { columns: 18rem; padding-left: 1.2rem; } nav li { break-inside: avoid; }
.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); }
.cards li { content-visibility: auto; contain-intrinsic-size: auto 16rem; }
.query { max-width: 22rem; }
figure { margin: 0; height: 100%; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .5rem; }
figure:focus-within { border-color: var(--link); }
figure img, figure video, figure audio { display: block; width: 100%; border-radius: .25rem; }
figure video { aspect-ratio: 4 / 3; background: #000; object-fit: contain; }
figure img { max-height: 11rem; object-fit: contain; background: #000; margin-bottom: .3rem; }
figcaption { padding-top: .4rem; font-size: .875rem; }
figcaption p { margin: .15rem 0; } .faint { color: var(--faint); }
.good { color: var(--good); } .bad, .fault { color: var(--bad); } .good, .bad { font-weight: 600; }
.scroll { overflow-x: auto; margin-bottom: 1rem; } .pictures { display: flex; flex-wrap: wrap; gap: .8rem; }
.pictures img { max-width: 100%; height: auto; background: #fff; border-radius: .25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid var(--line); max-width: 32rem; overflow-wrap: break-word; }
thead th { border-bottom-width: 2px; } .number { text-align: right; }
summary { cursor: pointer; }
"""
SCRIPT = """
const status = document.getElementById("status");
document.addEventListener("play", event => {
  for (const other of document.querySelectorAll("video, audio")) if (other !== event.target) other.pause();
}, true);
document.addEventListener("error", event => {
  const figure = event.target.closest("figure");
  if (!figure || figure.querySelector(".fault")) return;
  const fault = document.createElement("p");
  fault.className = "fault";
  fault.textContent = "This browser cannot play this file; its name leads to it.";
  figure.querySelector("figcaption").append(fault);
  status.textContent = `${figure.querySelector("a").textContent}: ${fault.textContent}`;
}, true);
"""


# ------------------------------------------------------------------------------------------------ the pieces


def check_page(path):
    """Raise ConfigError where something else than a page of this program stands at `path`, or it cannot be
    written."""
    path = Path(path)
    files.check_folder(path.parent)
    if path.exists() and not (path.is_file() and MARK.encode() in path.read_bytes()[:1024]):
        raise ConfigError(f"{path} is no page of avid's; move it away, or write elsewhere")


def write(path, title, subtitle, body, links=()):
    """Write a page, whole or not at all. title, subtitle: texts; body: HTML; links: (id, text) of its
    sections."""
    nav = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in links)
    nav = f'<nav aria-label="Sections"><ul>{nav}</ul></nav>' if len(links) > 1 else ""
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#content">to the content</a>
<header><h1>{escape(title)}</h1><p class="faint">{escape(subtitle)}</p>{nav}</header>
<main id="content" tabindex="-1">
{body}
</main>
<p id="status" role="status"></p>
<script>{SCRIPT}</script>
</body>
</html>
"""
    with files.replacing(path) as file:
        file.write(text)


def escape(text):
    """Text as HTML, without characters that a page cannot have."""
    return html.escape(files.printable(text))


def address(path, page):
    """The relative address of a file on a page."""
    return quote(os.fsencode(os.path.relpath(path, Path(page).parent)))


def data_uri(kind, content):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def section(anchor, title, content, level=2):
    head = f'<h{level} id="{anchor}">{escape(title)}</h{level}>'
    return f'<section aria-labelledby="{anchor}">{head}\n{content}\n</section>'


def table(caption, columns, rows, numbers=()):
    """columns: names; rows: lists of values, the first one names the row; numbers: the columns that hold
    numbers."""

    def cell(tag, i, value, scope=""):
        side = ' class="number"' if columns[i] in numbers else ""
        return f"<{tag}{scope}{side}>{escape(value)}</{tag}>"

    def line(row):
        return cell("th", 0, row[0], ' scope="row"') + "".join(
            cell("td", i, x) for i, x in enumerate(row[1:], 1)
        )

    head = "".join(cell("th", i, name, ' scope="col"') for i, name in enumerate(columns))
    body = "\n".join(f"<tr>{line(row)}</tr>" for row in rows)
    text = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    around = f'class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"'
    return f"<div {around}><table>{text}</table></div>"


# --------------------------------------------------------------------------------------- what a search found


FOUND = {  # modality of the query, of what is found: heading
    ("video", "video"): "Like its picture",
    ("audio", "audio"): "Like its sound",
    ("video", "audio"): "Sounds for its picture",
    ("audio", "video"): "Pictures for its sound",
}


@dataclass
class Shown:
    """A file on a page, at a moment."""

    path: Path
    name: str
    time_s: float
    label: str = ""
    score: float | None = None
    same: bool | None = None  # of the query's class; None: that is not known
    rank: int | None = None
    there: tuple = ()  # of video, audio
    picture: str = ""  # a data URI: a frame of the moment, or the spectrogram of its sound
    heat: str = ""  # a data URI: that frame with a heat map over it
    fault: str = ""  # why it cannot be looked at


def look(path, time_s, cfg, whole=False, **more):
    """A Shown with a picture: the middle frame of the clip that begins at time_s or, of a sound alone, the
    clip's spectrogram.

    whole: that of all the sound from there on, at most LONGEST_S.
    """
    from avid import media, spectrogram

    shown = Shown(Path(path), time_s=time_s, **more)
    length_s = {"video": cfg.video.frames / cfg.video.fps, "audio": cfg.audio.seconds}
    try:
        shown.there = media.held(path)
        kind = shown.there[0]
        with media.Media(path, (kind,)) as file:
            if kind == "video":
                middle_s = time_s + max(length_s[modality] for modality in shown.there) / 2
                shown.picture = jpeg(file.frames([middle_s])[0])
            else:
                seconds = (
                    min(max(file.last_s - time_s, cfg.audio.seconds), LONGEST_S)
                    if whole
                    else cfg.audio.seconds
                )
                audio = dataclasses.replace(cfg.audio, seconds=seconds)
                shown.picture = jpeg(coloured(spectrogram.spectrogram(file, time_s, audio)[0]))
    except media.MediaError as error:
        shown.fault = str(error)
    return shown


def check_files(table):
    """Raise ConfigError where a datasets.Table is of packed data: a page plays and links files."""
    if table.record is not None:
        raise ConfigError(
            f"a page plays the original files, and {table.root} is packed; name the folder that was packed, "
            "or leave --page out"
        )


def of_table(table, row, clip, cfg, modalities, clips=None, **more):
    """The `look` of an evaluation clip (its number of `clips`) of a row of a datasets.Table, with its
    class."""
    from avid import data

    taken = data.Clips(table, cfg, training=False, modalities=modalities, clips=clips)
    path, label = table.root / table.paths[row], table.labels[row]
    names = [table.classes[i] for i in (label.nonzero()[0] if label.ndim else [label] if label >= 0 else [])]
    with taken.open(row) as media:
        time_s = taken.evenly(*taken.usable(media))[clip].start_s
    return look(path, time_s, cfg, name=table.name_of(row), label=", ".join(names), **more)


def coloured(image):
    """A spectrogram, F×bins, as H×W×3 uint8: time from left to right, high above low."""
    import matplotlib

    low, high = image.min(), image.max()
    return matplotlib.colormaps["magma"](
        ((image - low) / (high - low).clamp(min=1e-6)).T.flip(0).numpy(), bytes=True
    )[..., :3]


def jpeg(image):
    """An image, H×W×3 uint8, as a data URI, WIDTH pixels wide."""
    import numpy as np
    import torch
    from torchvision.io import encode_jpeg

    image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    size = [max(round(image.shape[2] * WIDTH / image.shape[3]), 1), WIDTH]
    image = torch.nn.functional.interpolate(image, size, mode="bilinear", antialias=True)[0]
    return data_uri("image/jpeg", encode_jpeg(image, quality=80).numpy().tobytes())


def clock(time_s):
    """12.34 s as 0:12.3."""
    tenths = round(time_s * 10)
    return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"


JUDGED = {  # whether the class is the query's: how that is said, and shown
    True: ("✓ same class: ", ' class="good"'),
    False: ("✗ other class: ", ' class="bad"'),
    None: ("class: ", ""),
}


def card(shown, page):
    """A file on the page at `page`: it plays from its moment on."""
    link, kind, at = address(shown.path, page), (*shown.there, "audio")[0], clock(shown.time_s)
    rank = f"{shown.rank}. " if shown.rank else ""
    label = escape(f"{rank}{shown.name}, from {at}")
    parts = []
    if shown.heat:
        parts.append(f'<img src="{shown.heat}" alt="where it sounds in {label}: bright">')
    if kind == "audio" and shown.picture:
        parts.append(f'<img src="{shown.picture}" alt="spectrogram of {label}">')
    if not shown.fault:
        poster = f' poster="{shown.picture}"' if kind == "video" else ""
        source = f'src="{link}#t={shown.time_s:.2f}"{poster}'
        parts.append(f'<{kind} controls preload="none" {source} aria-label="{label}"></{kind}>')
    facts = [f"from {at}"]
    if shown.score is not None:
        facts.append(f"score {shown.score:.3f}")
    if len(shown.there) == 1:
        facts.append("no sound" if kind == "video" else "no picture")
    caption = [f'<p>{rank}<a href="{link}"><bdi>{escape(shown.name)}</bdi></a></p>']
    caption.append(f'<p class="faint">{", ".join(facts)}</p>')
    if shown.label:
        said, side = JUDGED[shown.same]
        caption.append(f"<p{side}>{said}{escape(shown.label)}</p>")
    if shown.fault:
        caption.append(f'<p class="fault">{escape(shown.fault)}</p>')
    parts.append(f"<figcaption>{''.join(caption)}</figcaption>")
    return "<figure>" + "\n".join(parts) + "</figure>"


def cards(shown, page):
    """Several files on a page, in order."""
    if not shown:
        return '<p class="faint">No file has one.</p>'
    items = "\n".join(f"<li>{card(one, page)}</li>" for one in shown)
    return f'<ol class="cards" role="list">{items}</ol>'


def write_found(path, title, subtitle, queries):
    """Write a page of queries and what they found: [(Shown, [(heading, [Shown, …]), …]), …]."""
    body, links = [], []
    for number, (query, lists) in enumerate(queries, 1):
        anchor = f"query-{number}"
        links.append((anchor, query.name))
        content = f'<div class="query">{card(query, path)}</div>\n'
        content += "\n".join(
            section(f"{anchor}-{i}", heading, cards(found, path), level=3)
            for i, (heading, found) in enumerate(lists, 1)
        )
        body.append(section(anchor, query.name, content))
    write(path, title, subtitle, "\n".join(body), links)


def write_retrieval(path, subject, task, queries, gallery, nearest):
    """Write a page of queries of eval_retrieval.py and what they found.

    queries, gallery: (evaluation.Features, datasets.Table); nearest: {number of a query: numbers of the
    gallery, best first}.
    """
    from avid import datasets

    (found, table), (there, theirs), cfg = queries, gallery, subject.cfg
    of, to = ("video", "audio") if task == "cross" else (task, task)
    same = datasets.same_class(table.labels[found.index], theirs.labels[there.index])
    what = "embeddings" if task == "cross" else "features"
    key, value, sight = (
        found.video_level(what, of),
        there.video_level(what, to),
        found.video_level("embeddings", of),
    )
    lists = []
    for q, finds in nearest.items():
        query = of_table(table, found.index[q], 0, cfg, (of,))
        shown = []
        for rank, g in enumerate(finds, 1):
            clip = int((there.embeddings[to][g] @ sight[q]).argmax())
            one = of_table(
                theirs, there.index[g], clip, cfg, (to,), rank=rank, score=float(key[q] @ value[g])
            )
            one.same = bool(same(q, g)) if query.label and one.label else None
            shown.append(one)
        lists.append((query, [(FOUND[of, to], shown)]))
    write_found(path, f"What {task} finds", f"{table.name}, checkpoint {subject.name}", lists)


# ------------------------------------------------------------------------------------------ what a run holds


ALT = {  # picture: what it shows
    "curves.png": "training curves over epochs: losses, held-out retrieval, the bank's health",
    "temporal.png": "confusion matrices of the temporal tasks on held-out videos, rows: the truth",
    "weights.png": "histograms of agreement and weight of the training pairs, true and faulty ones apart",
}
MOST_COLUMNS = 24  # of a table
MOST_FILES = 100  # on the page, of those that could not be used
DESCRIBED = ("checkpoint", "checkpoint_hash", "data", "split", "seed")  # how every result begins


def run_page(folder):
    """Write <folder>/page.html: curves, the bank's health, confusion matrices, results, retrieval,
    settings. → its path

    Raises ConfigError where the folder holds no run, or page.html is something else.
    """
    folder = Path(folder)
    path, metrics = folder / "page.html", folder / "metrics.jsonl"
    if not metrics.is_file() or not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} holds no run of train.py; name its --out, such as runs/toy")
    check_page(path)
    cfg = config.load(folder / "config.yaml")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if lines and not (folder / "curves.png").exists():
        from . import figures

        figures.curves(metrics, folder / "curves.png")
    drawn = sorted(picture.name for picture in folder.glob("*.png"))
    retrieval = [name for name in drawn if name.startswith("retrieval-")]
    others = [name for name in drawn if name not in (*retrieval, "curves.png", "temporal.png")]
    checks = [line for line in lines if any(name.startswith("cosine_") for name in line)]
    parts = {
        "Curves": pictures([name for name in drawn if name == "curves.png"]),
        "The bank": of_checks(
            "the bank at each check", checks, lambda name: name.startswith(("cosine", "agreement")), 3
        ),
        "Held-out retrieval": of_checks("R@k at each check, %", checks, lambda name: "→" in name, 1),
        "Temporal tasks": pictures([name for name in drawn if name == "temporal.png"])
        + of_checks(
            "held-out accuracy at each check, %", checks, lambda name: name.startswith("held-out"), 1
        ),
        "Results": results(folder),
        "What queries found": pages(folder) + pictures(retrieval),
        "Other pictures": pictures(others),
        "Left out": left_out(folder, lines),
        "Settings": settings(cfg),
    }
    parts = {title: content for title, content in parts.items() if content}
    step, epoch = (lines[-1]["step"], lines[-1]["epoch"]) if lines else (0, 0)
    subtitle = f"{cfg.data.name}, step {step:,}, epoch {epoch:g} of {cfg.optim.epochs}, {folder.resolve()}"
    body = "\n".join(
        section(f"part-{i}", title, content) for i, (title, content) in enumerate(parts.items(), 1)
    )
    write(
        path,
        f"Run {folder.resolve().name}",
        subtitle,
        body,
        [(f"part-{i}", title) for i, title in enumerate(parts, 1)],
    )
    return path


def pictures(names):
    """Pictures of the run folder, each as wide as it is or as the page."""
    drawn = [f'<img src="{quote(name)}" alt="{escape(ALT.get(name, Path(name).stem))}">' for name in names]
    return f'<div class="pictures">{"".join(drawn)}</div>' if drawn else ""


def pages(folder):
    """Links to the pages that eval_retrieval.py --page wrote into the run folder."""
    names = sorted(page.name for page in folder.glob("retrieval-*.html"))
    links = "".join(f'<li><a href="{quote(name)}">{escape(Path(name).stem)}</a></li>' for name in names)
    return f"<ul>{links}</ul>\n" if names else ""


def of_checks(caption, checks, holds, digits):
    """A table of those numbers of the checks whose names hold, a row a check."""
    names = [name for name in dict.fromkeys(name for line in checks for name in line) if holds(name)]
    rows = [
        [f"{line['epoch']:g}", *(f"{line[name]:.{digits}f}" if name in line else "" for name in names)]
        for line in checks
    ]
    return table(caption, ["epoch", *names], rows, numbers=["epoch", *names]) if names else ""


def results(folder):
    """The JSON files of the evaluations: those that measure the same in one table, a row each."""
    groups = {}  # what was measured → rows
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        if isinstance(result, dict) and result.keys() >= {*DESCRIBED}:
            names = [name for name in result if name not in (*DESCRIBED, "divisions")]
            rows = groups.setdefault(tuple(names), [])
            where = [result["data"], result["split"], result["checkpoint_hash"], result["seed"]]
            rows.append([path.stem, *where, *(text(result[name]) for name in names)])
            divisions = result.get("divisions") or []
            for i, part in enumerate(divisions if len(divisions) > 1 else [], 1):
                rows.append(
                    [f"{path.stem}, division {i}", *where, *(text(part.get(name, "")) for name in names)]
                )
    tables = []
    for names, rows in groups.items():
        caption = ", ".join(row[0] for row in rows if ", division" not in row[0])
        columns = ["result", "data", "split", "checkpoint", "seed", *names]
        if len(columns) <= MOST_COLUMNS:
            tables.append(table(caption, columns, rows, columns[4:]))
        else:  # a row a number
            columns, *rows = zip(columns, *rows, strict=True)
            content = table(caption, columns, rows, columns[1:])
            tables.append(
                f"<details><summary>{escape(caption)}: {len(rows)} rows</summary>{content}</details>"
            )
    return "\n".join(tables)


def text(value):
    """A result's value: numbers that are no counts with one decimal, small ones with three digits."""
    return (
        (f"{value:.1f}" if abs(value) >= 1 or not value else f"{value:.3g}")
        if isinstance(value, float)
        else str(value)
    )


def left_out(folder, lines):
    """Files that could not be used, and steps that were not finite."""
    content, skipped = "", folder / "skipped.csv"
    if skipped.is_file():
        with open(skipped, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = list(csv.reader(file))[1:]
        caption = f"{len(rows):,} files could not be used" + f", the first {MOST_FILES}" * (
            len(rows) > MOST_FILES
        )
        content += table(caption, ["file", "why"], rows[:MOST_FILES])
    if steps := [
        [line["step"], line["not_finite"], ", ".join(line["files"])] for line in lines if "not_finite" in line
    ]:
        content += table(
            f"{len(steps):,} steps were left out, they were not finite",
            ["step", "what", "files"],
            steps,
            ["step"],
        )
    return content


def settings(cfg):
    """Every setting, those that differ from their default first."""
    rows = []
    for key, default, what in config.settings():
        rows.append([key, functools.reduce(getattr, key.split("."), cfg), default, what])
    changed = [row for row in rows if row[1] != row[2]]
    columns = ["setting", "value", "default", "what it is"]
    content = table(f"{len(changed)} settings differ from their defaults", columns, changed)
    every = table(f"all {len(rows)} settings", columns, rows)
    return f"{content}<details><summary>All settings</summary>{every}</details>"


# ---------------------------------------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m avid page", description=__doc__, formatter_class=cli.Help
    )
    parser.add_argument("run", help="a run folder of train.py")
    try:
        print(f"written: {run_page(parser.parse_args((argv or sys.argv[1:])[1:]).run)}")
    except (ConfigError, OSError) as error:
        config.stop(error)
