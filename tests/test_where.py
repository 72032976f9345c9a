"""Heat maps of where a picture makes its sound: against references, and on things at known places."""

import copy
import csv
import dataclasses
import types

import numpy as np
import pytest
import torch
from test_train import TINY
from torch import nn

from avid import config, data, datasets, models, toy
from avid.files import ConfigError
from avid.tools import where


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny toy and an untrained network: (evaluation.Subject, its test table)."""
    root = tmp_path_factory.mktemp("where")
    cfg = config.load("toy", [*TINY, f"data.root={root}", "toy.test=12"])
    folder = toy.write(root, cfg.toy, cfg.seed, 1, progress=False)
    torch.manual_seed(0)
    network = models.AudioVisual(cfg.model).eval()
    table = datasets.load(dataclasses.replace(cfg.data, root=str(folder)), "test")
    return types.SimpleNamespace(network=network, cfg=cfg, device=torch.device("cpu"), name="random"), table


def clips(b=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, 3, 4, 64, 64, generator=generator), torch.randn(b, 1, 50, 32, generator=generator)


def test_a_map_is_the_last_features_weighted_by_the_gradient_of_the_similarity(world):
    """The reference runs stage by stage and takes the gradient by finite differences in float64."""
    network = world[0].network
    video, audio = clips()
    found = where.heat_maps(network, video, audio)
    with torch.no_grad():
        stages, head = network.video_model, copy.deepcopy(network.video_proj.projection).double()
        last = stages.conv5x(
            stages.conv4x(stages.conv3x(stages.conv2x(stages.conv1(video))))
        ).double()  # B×F×t×h×w
        features, sound = last.amax((2, 3, 4)), network.encode_audio(audio)[0].double()
        expected = torch.zeros(len(last), *last.shape[2:], dtype=torch.float64)
        for c in range(features.shape[1]):
            step = torch.zeros_like(features)
            step[:, c] = 1e-6
            slope = ((head(features + step) - head(features - step)) * sound).sum(1) / 2e-6  # B
            expected += slope[:, None, None, None] * last[:, c]
    assert found.shape == (3, 1, 2, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["r3d_18", "s3d"])
def test_networks_that_average_have_a_map_before_the_average(name):
    cfg = config.load("toy", [f"model.video={name}", "model.width=64", "model.depth=2", "audio.mels=32"])
    network = models.AudioVisual(cfg.model).eval()
    video, audio = torch.randn(1, 3, 16, 64, 64), torch.randn(1, 1, 50, 32)
    maps = where.heat_maps(network, video, audio)
    assert maps.ndim == 4 and maps.shape[2:] == ((4, 4) if name == "r3d_18" else (2, 2))


def test_a_network_that_keeps_time_has_no_map():
    model = config.load("toy", ["model.video=timewise", "model.depth=2", "audio.mels=32"]).model
    clips = torch.randn(1, 3, 16, 64, 64), torch.randn(1, 1, 50, 32)
    with pytest.raises(ConfigError, match="no maps of TimewiseVideo"):
        where.heat_maps(models.AudioVisual(model).eval(), *clips)


class Colours(nn.Module):
    """A video network that sees colours, in cells of 8 pixels."""

    def __init__(self):
        super().__init__()
        self.cells = nn.AvgPool3d((1, 8, 8))

    def forward(self, video):
        return self.cells(video).amax((2, 3, 4))


def test_the_map_is_bright_on_what_sounds():
    """Red matches sounds of the first direction and blue of the third; the map is bright on the thing that is
    heard.
    """
    head = nn.Module()
    head.projection = nn.Identity()
    network = types.SimpleNamespace(video_model=Colours(), video_proj=head)
    network.encode_video = lambda video: (None, network.video_model(video))
    network.encode_audio = lambda audio: (audio, None)
    video = torch.zeros(2, 3, 2, 32, 32)
    video[:, 0, :, 0:8, 24:32] = 1.0
    video[:, 2, :, 16:24, 8:16] = 1.0
    maps = where.heat_maps(network, video, torch.eye(3)[[0, 2]])
    assert maps.shape == (2, 2, 4, 4)
    assert [where.brightest(heat) for heat in maps] == [(0, 3), (2, 1)]
    assert maps[0].sum() == pytest.approx(2.0)  # one cell a frame


def test_cells_on_the_thing_lie_within_its_radius():
    heat = torch.zeros(1, 4, 4)
    on = where.on_thing(heat, (0.375, 0.625, 0.2), crop=1.0)
    assert np.argwhere(on).tolist() == [[2, 1]]
    on = where.on_thing(
        heat, (0.5, 0.5, 0.1), crop=0.2
    )  # a map of the middle: all but its corners lie on the thing
    assert on.sum() == 12 and not on[0, 0]
    assert where.on_thing(np.empty((1, 100, 100)), (0.5, 0.5, 0.3), 1.0).mean() == pytest.approx(
        np.pi * 0.09, rel=0.01
    )


def test_shares_are_counted_over_videos(world):
    subject, table = world
    result, maps = where.measure(subject, table)
    assert result["videos"] == 12 and result["skipped"] == 0 and [row for row, _ in maps] == list(range(12))
    item = data.collate([data.Clips(table, subject.cfg, training=False, clips=1)[5]])
    batch = data.to_device(item, subject.device, subject.cfg.audio)
    torch.testing.assert_close(
        maps[5][1], where.heat_maps(subject.network, batch["video"], batch["audio"])[0], rtol=1e-3, atol=1e-5
    )
    hits, cells = 0, 0
    rows = toy.table(subject.cfg.toy, subject.cfg.seed)[-12:]
    for row, (_, heat) in zip(rows, maps, strict=True):
        inside = {}
        for i in range(heat.shape[1]):
            for j in range(heat.shape[2]):
                y, x = (i + 0.5) / heat.shape[1], (j + 0.5) / heat.shape[2]
                inside[float(heat[:, i, j].mean())] = (x - row["x"]) ** 2 + (y - row["y"]) ** 2 < row[
                    "radius"
                ] ** 2
        hits += inside[max(inside)]
        cells += sum(inside.values()) / len(inside)
    assert result["brightest on the thing %"] == pytest.approx(100 * hits / 12)
    assert result["cells on the thing %"] == pytest.approx(100 * cells / 12)
    assert 20 < result["covered by the thing %"] < 60


def test_without_places_there_are_maps_and_no_shares(world):
    subject, table = world
    cfg = dataclasses.replace(subject.cfg, data=dataclasses.replace(subject.cfg.data, name="manifest"))
    other = types.SimpleNamespace(**{**vars(subject), "cfg": cfg})
    bare = dataclasses.replace(table, columns={})
    result, maps = where.measure(other, bare)
    assert result == {"videos": 12, "files": 12, "skipped": 0} and len(maps) == 12
    odd = dataclasses.replace(table, columns={**table.columns, "x": ["here"] * 12})
    with pytest.raises(datasets.DataError, match="x, y, radius have to be numbers"):
        where.measure(other, odd)


def test_the_place_is_where_the_thing_is():
    """In the rendered pixels, a round thing has edges within its circle, and the background has few."""
    settings = config.Toy(train=40, test=1, seconds=2.0, size=64)
    for row in toy.table(settings, 3)[:40]:
        if row["label"] not in ("drum", "clarinet"):
            continue
        frames, _ = toy.render(settings, 3, row)
        frame, background = (
            frames[16].astype(float),
            np.median(frames[:, :3, :3].astype(float), axis=(0, 1, 2)),
        )
        y, x = (np.mgrid[:64, :64] + 0.5) / 64
        inside = np.hypot(x - row["x"], y - row["y"]) < row["radius"]
        edge = np.abs(np.diff(frame.mean(2), axis=1)).astype(float)[:, :]
        on, off = edge[inside[:, 1:]].mean(), edge[~inside[:, 1:]].mean()
        assert on > 2.5 * off, (row, background)


def test_a_manifest_without_places_is_read_and_can_be_written_anew(world, tmp_path):
    """An earlier version wrote such manifests. Nothing is rewritten by itself, and videos stay as
    they are.
    """
    cfg = dataclasses.replace(world[0].cfg, data=dataclasses.replace(world[0].cfg.data, root=str(tmp_path)))
    folder = toy.write(tmp_path, cfg.toy, cfg.seed, 1, progress=False)
    path = folder / "manifest.csv"
    new = path.read_bytes()
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path, "w", newline="") as file:
        lines = csv.DictWriter(
            file, [name for name in toy.COLUMNS if name not in where.PLACE], extrasaction="ignore"
        )
        lines.writeheader()
        lines.writerows(rows)
    old = path.read_bytes()
    assert toy.write(tmp_path, cfg.toy, cfg.seed, 1, progress=False) == folder and path.read_bytes() == old
    table = datasets.load(dataclasses.replace(cfg.data, root=str(folder)), "test")
    expected = world[1]
    assert table.paths == expected.paths and (table.labels == expected.labels).all()
    subject = types.SimpleNamespace(**{**vars(world[0]), "cfg": cfg})
    with pytest.raises(config.ConfigError, match=r"manifest\.csv does not say where things are; delete it"):
        where.measure(subject, table)
    path.unlink()
    videos = {video: video.stat().st_mtime_ns for video in folder.rglob("*.mp4")}
    toy.write(tmp_path, cfg.toy, cfg.seed, 1, progress=False)
    assert path.read_bytes() == new
    assert {video: video.stat().st_mtime_ns for video in folder.rglob("*.mp4")} == videos


def test_maps_are_written_as_a_picture_and_a_page(world, tmp_path):
    subject, table = world
    _, maps = where.measure(subject, table)
    where.draw(tmp_path / "where.png", table, maps[:8], subject.cfg)
    assert (tmp_path / "where.png").stat().st_size > 10_000
    where.write_page(tmp_path / "where.html", table, maps[:3], subject)
    text = (tmp_path / "where.html").read_text(encoding="utf-8")
    assert text.count('alt="where it sounds in ') == 3 and text.count("<video ") == 3
