"""The four diffs of docs/extending.md, each applied to a copy of the project, which then trains with it."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import ENVIRONMENT, TINY

import train
from avid import (
    avid_cma,
    config,
    data,
    datasets,
    distributed,
    evaluation,
    finetune,
    losses,
    media,
    memory_bank,
    models,
    protocols,
    spectrogram,
    temporal_tasks,
    toy,
)
from avid.tools import distortions, fingerprint, statistics, sync, where

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
DIFFS = {  # of each section with a diff: what stands between ```diff and ```
    title: "".join(re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for title, _, text in (section.partition("\n") for section in PAGE.split("\n## ")[1:])
}
ONE_EPOCH = ["optim.epochs=1", "log.check_epochs=1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy world of 24 training and 8 test videos, where train.py looks for it."""
    root = tmp_path_factory.mktemp("world")
    toy.write(root, config.load("toy", TINY).toy, seed=0, workers=1, progress=False)
    return root


@pytest.fixture
def changed(tmp_path):
    """Apply the diff of a section to a copy of the project: its folder."""

    def apply(title):
        copy = tmp_path / "project"
        shutil.copytree(ROOT / "avid", copy / "avid", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "train.py", copy)
        options = {"cwd": copy, "env": {**ENVIRONMENT, "GIT_CEILING_DIRECTORIES": str(tmp_path)}}
        command = ["git", "apply", "--verbose", "-"]
        done = subprocess.run(command, input=DIFFS[title], text=True, capture_output=True, **options)
        assert done.returncode == 0, f"docs/extending.md, {title}: make the diff again\n{done.stderr}"
        return copy

    return apply


def python(project, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


def run(project, *settings, spy=""):
    """Train in a copy, after the code `spy`: (what it printed, the lines of its log, its last checkpoint)."""
    started = (
        f"{spy}\nimport runpy, sys; sys.path.insert(0, '.'); runpy.run_path('train.py', run_name='__main__')"
    )
    done = python(project, "-c", started, "out=run", *TINY, *ONE_EPOCH, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    return done.stdout + done.stderr, log, torch.load(project / "run" / "last.pt", weights_only=True)


MODULES = [train, config, data, datasets, distortions, evaluation, fingerprint, finetune, losses, media]
MODULES += [avid_cma, protocols, spectrogram, distributed, statistics, sync, where]
MODULES += [memory_bank, models, temporal_tasks, memory_bank.MemoryBank, train.Objective]


@pytest.mark.parametrize("page", ["method.md", "extending.md"])
def test_the_pages_name_functions_and_settings_that_exist(page):
    """losses.contrast, MemoryBank.update, loss.estimator, …: all that looks like a name or a setting."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"https?://\S+", "", text)
    names = set(re.findall(r"\b([A-Za-z_]{2,}(?:\.[A-Za-z_]\w*)+)", text))
    names = {
        name
        for name in names
        if not name.endswith((".md", ".py", ".diff", ".yaml", ".npz")) and name != "nn.Sequential"
    }
    places = {place.__name__.rpartition(".")[2]: place for place in MODULES}
    settings = {key for key, _, _ in config.settings()}
    settings |= {"weights.pace_video", "weights.uniformity"}  # of the diffs
    for name in names - settings:
        first, *rest = name.split(".")
        assert first in places, name
        functools.reduce(getattr, rest, places[first])
    assert len(names - settings) > 3


def test_each_change_is_made_where_the_page_says():
    touched = {title: re.findall(r"^\+\+\+ b/(\S+)$", diff, re.MULTILINE) for title, diff in DIFFS.items()}
    assert touched == {
        "A loss term": ["avid/config.py", "avid/losses.py", "train.py"],
        "A pretext task": ["avid/config.py", "avid/temporal_tasks.py"],
        "A data set": ["avid/datasets.py"],
        "A backbone": ["avid/models.py"],
    }
    for title, diff in DIFFS.items():  # small, and nothing but the change
        assert 2 <= len(re.findall(r"^@@ ", diff, re.MULTILINE)) <= 3, title
        assert len(re.findall(r"^\+(?!\+\+ )", diff, re.MULTILINE)) <= 20, title


def test_a_loss_term(changed, world):
    _, log, _ = run(changed("A loss term"), f"data.root={world}", "weights.uniformity=0.5")
    steps = [line for line in log if "loss" in line]
    assert len(steps) == 3
    for line in steps:
        assert -16 < line["uniformity"] < 0  # of two modalities, log e^{−2·2²} each at the least
        assert line["loss"] == pytest.approx(line["xid"] + 0.5 * line["uniformity"], rel=1e-5)


PRINT_TICKS = """
from avid.tools import figures
write = figures.write
def spy(figure, path, **options):
    print(path.name, [text.get_text() for text in figure.axes[0].get_xticklabels()])
    write(figure, path, **options)
figures.write = spy
"""


def test_a_pretext_task(changed, world):
    project, term = changed("A pretext task"), ["weights.xid=0", "weights.pace_video=1"]
    settings = "temporal.moments=2 temporal.speeds=[1,2] audio.seconds=0.25".split()
    text, log, last = run(project, f"data.root={world}", *settings, *term, spy=PRINT_TICKS)
    assert last["network"]["temporal.heads.pace_video.2.weight"].shape == (3, 32)
    step, check = (
        next(line for line in log if name in line) for name in ("pace_video", "held-out pace_video %")
    )
    assert 0 < step["pace_video"] < 10 and step["loss"] == pytest.approx(step["pace_video"])
    assert 0 <= step["pace_video %"] <= 100 and 0 <= check["held-out pace_video %"] <= 100
    assert "temporal.png ['slower', 'equal', 'faster']" in text  # the ticks of its confusion matrix
    refused = python(project, "train.py", *term)
    assert refused.returncode == 2 and "weights.pace_video=1.0 needs temporal.moments=2" in refused.stderr


def test_a_data_set(changed, world):
    project, root = changed("A data set"), world / "AVE_Dataset"
    videos = sorted(world.glob("toy-*/*/*.mp4"))
    assert len(videos) == 32
    (root / "AVE").mkdir(parents=True)
    lists = {"train": ["Horse&not-on-disk&good&0&10\n"], "val": [], "test": []}
    for i, video in enumerate(videos):
        shutil.copy(video, root / "AVE" / f"id-{i:02d}_x.mp4")
        part = "train" if i < 20 else "val" if i < 24 else "test"
        lists[part].append(f"{('Church bell', 'Horse')[i % 2]}&id-{i:02d}_x&good&0&2\n")
    lists["test"].append("Horse&id-03_x&good&1&2\n")  # another event of a training video
    for part, lines in lists.items():
        (root / f"{part}Set.txt").write_text("".join(lines))
    text, log, last = run(project, "data.name=ave", f"data.root={root}")
    assert "ave train: 20 files, 2 classes; 1 more are listed and not on disk, e.g. not-on-disk" in text
    assert "ave test: 8 files, 2 classes" in text
    assert last["videos"]["count"] == len(last["bank"]["agreement"]) == 20
    assert any("v→a class R@1" in line for line in log)
    (root / "valSet.txt").write_text("Church bell&id-20_x\n")
    refused = python(project, "-m", "avid", "check", "--data", "ave", "--root", str(root), "--split", "val")
    assert refused.returncode == 2 and "valSet.txt, line 1: 'Church bell&id-20_x' where" in refused.stderr


def test_a_backbone(changed, world):
    names = "model.video=mc3_18 model.audio=resnet18 optim.checkpoint_activations=true".split()
    project = changed("A backbone")
    _, log, last = run(project, f"data.root={world}", *names, "model.width=64", "model.depth=2")
    network = last["network"]
    assert network["audio_model.conv1.weight"].shape == (64, 1, 7, 7)
    assert network["video_model.layer2.0.conv1.0.weight"].shape[2:] == (1, 3, 3)  # MC3: 2-D from there on
    assert network["video_proj.projection.0.weight"].shape == (512, 512)
    assert all(line["xid"] > 0 for line in log if "loss" in line)
    assert any("v→a class R@1" in line for line in log)
