"""Where does it sound? A heat map of the picture for its sound, by class activation.

In: a network and a table of videos with sound; of the toy, its manifest, which knows where the thing is.
Out: maps, drawn over frames; how many of them are brightest on the thing.
"""

import dataclasses

import numpy as np
import torch

from avid import data, datasets, progress
from avid.files import ConfigError, printable

PLACE = ("x", "y", "radius")  # columns of a manifest: see toy.place
GRID = 100  # points a side, by which the thing's share of the picture is counted


def heat_maps(network, video, audio):
    """What in a picture speaks for its sound: clips for the network, B×3×T×S×S, B×1×F×bins → B×t×h×w.

    The last feature map A before pooling, each channel c weighted by the gradient of the similarity at the
    pooled features f: Σ_c ∂(p·a)/∂f_c · A_c, with p the projection of f before it is brought to unit length
    [C]. The gradient of v·a would be orthogonal to p, and its sum over the pooled features near 0, whatever
    the picture shows. network: an AudioVisual, in the mode that it is in; its parameters get no gradient.
    """
    maps = []
    after = torch.nn.AdaptiveAvgPool3d, torch.nn.Identity  # the last map, of torchvision's networks
    layers = [layer for layer in network.video_model.children() if not isinstance(layer, after)]
    hooks = [layer.register_forward_hook(lambda *call: maps.append(call[2])) for layer in layers]
    with torch.no_grad():
        sound, _ = network.encode_audio(audio)  # a, B×D
        _, features = network.encode_video(video)  # f, B×F
    for hook in hooks:
        hook.remove()
    with torch.enable_grad():
        features = features.clone().requires_grad_()
        similarity = (network.video_proj.projection(features) * sound).sum()
        (weight,) = torch.autograd.grad(similarity, features)  # B×F
    last = [x for x in maps if x.ndim == 5][-1].float()  # B×F×t×h×w
    if last.shape[1] != features.shape[1]:
        name = type(network.video_model).__name__
        raise ConfigError(f"no maps of {name}: its features are not the largest values of a map over space")
    return torch.einsum("bc,bcthw->bthw", weight, last)


def measure(subject, table):
    """Maps of the clip in the middle of each video, and where they are brightest. → (result, [(row of the
    table, t×h×w), …])

    result: videos, files, skipped; and, where the table knows the place of the thing, three shares in
    percent: of maps whose brightest cell has its middle on the thing (a disc), the mean over t; of cells
    that have, what a random choice would get; of the picture that the thing covers. Raises ConfigError of
    a toy that was written before its manifest held places.
    """
    cfg, network = subject.cfg, subject.network
    known = places(table)
    if cfg.data.name == "toy" and known is None:
        raise ConfigError(
            f"{table.root / 'manifest.csv'} does not say where things are; delete it, and the same command "
            "writes it anew, and no video"
        )
    clips, maps, skipped = data.Clips(table, cfg, training=False, clips=1), [], 0
    batches = data.loader(clips, cfg.data.workers, batch_size=cfg.eval.batch_size)
    for batch in progress.bar(batches, table.name, unit="batch", leave=False):
        skipped += len(batch["failures"])
        if "index" in batch:
            batch = data.to_device(batch, subject.device, cfg.audio)
            heat = heat_maps(network, batch["video"], batch["audio"]).cpu()
            maps += zip(batch["index"].tolist(), heat, strict=True)
    if not maps:
        raise data.MediaError(f"none of the {len(table)} files of {table.name} has a picture and a sound")
    result = {"videos": len(maps), "files": len(table), "skipped": skipped}
    if known is not None:
        pairs = [(heat, known[row]) for row, heat in maps]
        whole, crop = np.empty((1, GRID, GRID)), cfg.eval.crop
        shares = {
            "brightest on the thing": [on_thing(heat, at, crop)[brightest(heat)] for heat, at in pairs],
            "cells on the thing": [on_thing(heat, at, crop).mean() for heat, at in pairs],
            "covered by the thing": [on_thing(whole, at, 1.0).mean() for _, at in pairs],
        }
        result |= {f"{name} %": 100 * np.mean(values).item() for name, values in shares.items()}
    return result, maps


def places(table):
    """x, y, radius of each video's thing, N×3, where the manifest has them; else None. Raises DataError
    where one is no number."""
    if not table.columns.keys() >= {*PLACE}:
        return None
    try:
        return np.array([[float(value) for value in table.columns[name]] for name in PLACE]).T
    except ValueError as error:
        raise datasets.DataError(f"{table.name}: {', '.join(PLACE)} have to be numbers: {error}") from None


def brightest(heat):
    """The brightest cell of a map t×h×w: row and column, of its mean over t."""
    return np.unravel_index(int(heat.mean(0).argmax()), heat.shape[1:])


def on_thing(heat, place, crop):
    """Which cells of a map t×h×w have their middle on a disc: h×w bool. place: x, y, radius, shares of a
    square picture's side; crop: side of the picture's part that the map is of."""
    x, y, radius = place
    height, width = heat.shape[1:]
    rows, columns = ((np.arange(n) + 0.5) / n for n in (height, width))
    rows, columns = (0.5 + crop * (at - 0.5) for at in (rows, columns))
    return (columns - x) ** 2 + (rows[:, None] - y) ** 2 < radius**2


def overlay(frame, heat):
    """A frame S×S×3 uint8 with a map h×w over it, bright where it speaks for the sound: S×S×3 uint8."""
    import matplotlib

    size = frame.shape[:2]
    heat = torch.as_tensor(heat)[None, None].clamp(min=0)
    heat = torch.nn.functional.interpolate(heat, size, mode="bilinear")[0, 0]  # S×S
    heat = (heat / heat.max().clamp(min=1e-12)).numpy()[..., None]
    colour = matplotlib.colormaps["inferno"](heat[..., 0], bytes=True)[..., :3]
    return (frame * (1 - 0.65 * heat) + colour * 0.65 * heat).astype(np.uint8)


def frames(table, maps, cfg):
    """Of each of some maps: the middle frame that it is of, S×S×3, and that frame under it."""
    clips = data.Clips(table, cfg, training=False, modalities=data.MODALITIES, clips=1)
    for row, heat in maps:
        video = clips[row]["video"][0]  # 3×T×S×S
        frame = video[:, video.shape[1] // 2].permute(1, 2, 0).numpy()
        yield frame, overlay(frame, heat[len(heat) // 2])


def draw(path, table, maps, cfg, columns=6):
    """A sheet of some maps: each frame, and below it the map over the frame; a ring where the thing is, and
    a cross on the brightest cell."""
    from .figures import plt, write

    lines, known, crop = -(-len(maps) // columns), places(table), cfg.eval.crop
    size = {"figsize": (1.5 * columns, 3.1 * lines), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(2 * lines, columns, **size)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, ((row, heat), images) in enumerate(zip(maps, frames(table, maps, cfg), strict=True)):
        line, column = divmod(i, columns)
        label = table.labels[row]
        name = table.classes[label] if label.ndim == 0 and label >= 0 else ""
        axes[2 * line, column].set_title(printable(name), fontsize=8, parse_math=False)
        for below, image in enumerate(images):
            axis, side = axes[2 * line + below, column], len(image)
            axis.imshow(image)
            axis.autoscale(False)
            at, step = brightest(heat), [side / n for n in heat.shape[1:]]
            if below:
                axis.plot((at[1] + 0.5) * step[1] - 0.5, (at[0] + 0.5) * step[0] - 0.5, "+", color="white")
            if known is not None:
                x, y, radius = known[row]
                x, y = ((0.5 + (at - 0.5) / crop) * side - 0.5 for at in (x, y))
                axis.add_patch(
                    plt.Circle((x, y), radius / crop * side, fill=False, color="white", linewidth=1)
                )
    write(figure, path)


def write_page(path, table, maps, subject):
    """A page of some maps, each over its frame, above the video that plays from its clip on."""
    from . import page

    shown = []
    for (row, _), (_, image) in zip(maps, frames(table, maps, subject.cfg), strict=True):
        one = page.of_table(table, row, 0, subject.cfg, data.MODALITIES, clips=1)
        shown.append(dataclasses.replace(one, heat=page.jpeg(image)))
    subtitle = f"{table.name}, checkpoint {subject.name}: bright is what speaks for the sound"
    page.write(path, "Where does it sound?", subtitle, page.cards(shown, path))
