"""Figures: each shows what it should and can be read at the width of a page."""

import json
import os

import numpy as np
import pytest
from conftest import write_media
from matplotlib import colors
from PIL import Image

from avid import config, datasets
from avid.tools import figures

TEMPORAL = config.Temporal(speeds=[1, 4])
TASKS = ("speed_video", "speed_audio", "direction_video", "order_video", "order_cross")


@pytest.fixture
def drawn(monkeypatch):
    """A list of (figure, dpi), one for each figure that was written."""
    seen = []
    write = figures.write

    def record(figure, path, dpi=110):
        figure.canvas.draw()
        seen.append((figure, dpi))
        write(figure, path, dpi)

    monkeypatch.setattr(figures, "write", record)
    return seen


def write_log(path, steps, terms=("xid",), tasks=()):
    """A metrics.jsonl of a run with a check every fifth step."""
    lines = []
    for step in range(1, steps + 1):
        losses = {term: 5.0 / step + n for n, term in enumerate(terms)}
        line = {"step": step, "epoch": step / 2, "loss": sum(losses.values()), **losses}
        line |= {f"{task} %": 50.0 + n for n, task in enumerate(tasks)}
        lines.append(
            line | {"grad_norm": 1.0, "lr": 0.1, "clips_per_s": 9.0, "data_wait": 0.1, "bad_files": 0}
        )
        if step % 5 == 0:
            found = {
                f"{way} {by} R@{k}": 10.0
                for way in ("v→a", "a→v")
                for by in ("class", "instance")
                for k in (1, 5)
            }
            health = {"cosine_video": 0.1, "cosine_audio": 0.2, "agreement_mean": 0.5, "agreement_std": 0.1}
            held_out = {f"held-out {task} %": 60.0 for task in tasks}
            lines.append({"step": step, "epoch": step / 2, **health, **found, **held_out})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def panels(figure):
    return {axis.get_title(): axis for axis in figure.axes if axis.axison}


def line_labels(axis):
    return [line.get_label() for line in axis.get_lines()]


# ----------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("tasks", [(), TASKS])
def test_curves_are_two_rows_that_fit_a_page(tasks, tmp_path, drawn):
    terms = ("xid", "contrast_vv", *tasks) if tasks else ("xid",)
    figures.curves(write_log(tmp_path / "m.jsonl", 10, terms, tasks), tmp_path / "curves.png")
    ((figure, dpi),) = drawn
    shown = panels(figure)
    assert len(shown) == (8 if tasks else 6)
    rows = {round(axis.get_position().y0, 2) for axis in shown.values()}
    assert len(rows) == 2
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == pytest.approx(dpi * figures.WIDTH, abs=1) and width / height > 1.2
    sizes = [text.get_fontsize() for axis in shown.values() for text in (axis.title, *axis.get_xticklabels())]
    assert min(sizes) * 900 / 72 / figures.WIDTH > 8  # in pixels of a page that is 900 wide


def test_no_legend_lies_on_a_panel_or_on_another_legend(tmp_path, drawn):
    terms = ("xid", "contrast_vv", "contrast_va", "contrast_av", "contrast_aa", *TASKS)
    figures.curves(write_log(tmp_path / "m.jsonl", 10, terms, TASKS), tmp_path / "curves.png")
    ((figure, _),) = drawn
    shown = panels(figure)
    legends = [axis.get_legend().get_window_extent() for axis in shown.values() if axis.get_legend()]
    assert len(legends) == 5
    for n, legend in enumerate(legends):
        assert not any(legend.overlaps(axis.get_window_extent()) for axis in shown.values())
        assert not any(legend.overlaps(other) for other in legends[:n])
        assert figure.bbox.y0 <= legend.y0 and figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1


def test_a_loss_that_is_the_only_term_is_drawn_once(tmp_path, drawn):
    figures.curves(write_log(tmp_path / "one.jsonl", 10), tmp_path / "one.png")
    figures.curves(
        write_log(tmp_path / "two.jsonl", 10, ("xid", "speed_video"), TASKS[:1]), tmp_path / "two.png"
    )
    # weights.xid=0.5
    (tmp_path / "half.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 1.5, "xid": 3.0}\n')
    figures.curves(tmp_path / "half.jsonl", tmp_path / "half.png")
    one, two, half = (line_labels(panels(figure)["loss"]) for figure, _ in drawn)
    assert one == ["xid"] and two == ["loss", "speed_video", "xid"] and half == ["loss", "xid"]


def test_few_points_are_marked_and_many_are_not(tmp_path, drawn):
    figures.curves(write_log(tmp_path / "few.jsonl", 5), tmp_path / "few.png")
    figures.curves(write_log(tmp_path / "many.jsonl", 100), tmp_path / "many.png")
    few, many = (panels(figure) for figure, _ in drawn)
    assert {line.get_marker() for axis in few.values() for line in axis.get_lines()} == {"o"}
    assert many["loss"].get_lines()[0].get_marker() == "None"
    assert many["bank"].get_lines()[0].get_marker() == "o"  # one point for each check


def test_one_quantity_has_one_colour_in_both_modalities(tmp_path, drawn):
    figures.curves(write_log(tmp_path / "m.jsonl", 5, ("xid", *TASKS), TASKS), tmp_path / "curves.png")
    ((figure, _),) = drawn
    lines = {line.get_label(): line for line in panels(figure)["held-out temporal tasks, %"].get_lines()}
    assert lines.keys() == set(TASKS)
    assert (
        lines["speed_video"].get_color()
        == lines["speed_audio"].get_color()
        != lines["order_video"].get_color()
    )
    assert lines["speed_video"].get_linestyle() != lines["speed_audio"].get_linestyle()
    assert lines["order_cross"].get_linestyle() not in (lines["speed_video"].get_linestyle(), "--")


@pytest.mark.parametrize("content", ["", '{"step": 1, "epoch": 0.1, "not_finite": "xid nan", "files": []}\n'])
def test_a_log_without_numbers_gives_an_empty_picture(content, tmp_path):
    (tmp_path / "m.jsonl").write_text(content)
    figures.curves(tmp_path / "m.jsonl", tmp_path / "curves.png")
    figures.check_picture(tmp_path / "curves.png")


# ----------------------------------------------------------------------------------------- confusion matrices


def test_confusion_matrices_have_a_title_labels_and_chance(tmp_path, drawn):
    counts = {
        "speed_video": np.diag([3, 1]),
        "order_cross": np.ones((3, 3), int),
        "direction_audio": np.eye(2, dtype=int),
    }
    figures.confusions(counts, TEMPORAL, tmp_path / "temporal.png")
    ((figure, _),) = drawn
    assert figure.get_suptitle().startswith("confusion matrices")
    shown = panels(figure)
    assert {title.replace("\n", ": ") for title in shown} == {
        "speed_video: 100%, chance 50%", "order_cross: 33%, chance 33%", "direction_audio: 100%, chance 50%"
    }  # fmt: skip
    for axis in figure.axes:
        assert figure.bbox.x0 <= axis.get_tightbbox().x0 and axis.get_tightbbox().x1 <= figure.bbox.x1
    ticks = [[label.get_text() for label in axis.get_yticklabels()] for axis in shown.values()]
    assert ticks == [["1×", "4×"], ["before", "overlapping", "after"], ["forward", "backward"]]


def test_a_single_confusion_matrix_has_a_title_in_the_singular(tmp_path, drawn):
    figures.confusions({"speed_video": np.eye(2, dtype=int)}, TEMPORAL, tmp_path / "temporal.png")
    assert drawn[0][0].get_suptitle().startswith("confusion matrix")


# --------------------------------------------------------------------------------------------- contact sheets


@pytest.mark.parametrize(
    ("query", "found", "colour"),
    [
        (2, 2, "tab:green"),
        (2, 0, "tab:red"),
        (0, 0, "tab:green"),
        (-1, 0, "tab:grey"),
        (0, -1, "tab:grey"),
        (-1, -1, "tab:grey"),
        ([1, 0, 1], [0, 0, 1], "tab:green"),
        ([1, 0, 0], [0, 1, 1], "tab:red"),
        ([0, 0, 0], [0, 1, 1], "tab:grey"),
        ([1, 0, 0], [0, 0, 0], "tab:grey"),
    ],
)
def test_green_and_red_only_where_both_have_a_class(query, found, colour):
    assert figures.frame_colour(np.array(query), np.array(found)) == colour


def test_a_contact_sheet_frames_results_by_their_class(tmp_path, drawn):
    rows = [
        "path,label,split",
        "a.mp4,dog,",
        "b.mp4,dog,",
        "c.mp4,a cat that has a very long name indeed,",
        "d.mp4,,",
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    for name in "abcd":
        write_media(tmp_path / f"{name}.mp4", np.arange(25) / 25)
    settings = ["data.name=manifest", f"data.root={tmp_path}", "video.size=32", "video.frames=2"]
    table = datasets.load(config.load("toy", settings).data, "all")
    cfg = config.load("toy", settings)
    finds = [datasets.take(table, [1, 2, 3]), datasets.take(table, [0])]
    figures.contact_sheet(tmp_path / "sheet.png", datasets.take(table, [0, 3]), finds, "video", "video", cfg)
    ((figure, dpi),) = drawn
    axes = np.array(figure.axes).reshape(2, 4)
    frames = [[colors.to_rgb(axis.spines["top"].get_edgecolor()) for axis in row] for row in axes]
    assert frames[0] == [colors.to_rgb(c) for c in ("black", "tab:green", "tab:red", "tab:grey")]
    assert frames[1][:2] == [colors.to_rgb(c) for c in ("black", "tab:grey")] and not axes[1, 2].axison
    assert [axis.get_title() for axis in axes[0, 1:]] == ["dog", "a cat that has a ve…", "d"]
    assert axes[0, 0].get_title() == "query\ndog" and axes[1, 0].get_title() == "d"
    assert dpi >= 120 and Image.open(tmp_path / "sheet.png").size[0] >= 120 * 1.4 * 4


def test_a_contact_sheet_takes_any_name_of_a_file(tmp_path, drawn):
    names = ["20231104_123456_holiday", "$5_or_$6_x^", os.fsdecode(b"\xff")]
    for name in names:
        write_media(tmp_path / f"{name}.mp4", np.arange(25) / 25)
    table = datasets.of_files([f"{name}.mp4" for name in names], tmp_path)
    cfg = config.load("toy", ["video.size=32", "video.frames=2"])
    figures.contact_sheet(tmp_path / "sheet.png", table, [table] * 3, "video", "video", cfg)
    ((figure, _),) = drawn
    titles = [axis.get_title() for axis in figure.axes[1:4]]
    assert titles == ["20231104_123456_hol…", "$5_or_$6_x^", r"\udcff"]
