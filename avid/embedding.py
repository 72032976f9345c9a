"""Embeddings of anyone's files: `avid.load(checkpoint).embed(files)`.

In: a checkpoint, and files with a picture, a sound or both; no labels, no data set.
Out: unit vectors to compare, features to go on with, and when each clip begins, as NumPy arrays.
"""

import os
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from . import config, data, datasets, models, run, temporal_tasks
from .files import file_hash, printable
from .media import MODALITIES, MediaError
from .progress import bar as progress_bar
from .spectrogram import columns

ARRAYS = [modality + what for what in ("", "_features", "_clips") for modality in MODALITIES]


# ----------------------------------------------------------------------------------------------- the network


def network(checkpoint, name=None, overrides=()):
    """The network of a checkpoint, its settings, and its hash: (models.AudioVisual, config.Config, str).

    checkpoint: a path, or random; name: a configuration that changes the checkpoint's settings, or None;
    overrides: of config.load. A checkpoint released with AVID-CMA holds no settings: they are those of
    `avid`. An untrained network has those of `toy`, and its seed for a hash. Raises CheckpointError,
    ConfigError, ModelError.
    """
    state = {} if str(checkpoint) == "random" else run.load_checkpoint(checkpoint)
    if "config" not in state:
        name = name or ("avid" if state else "toy")
    else:
        try:
            config.load(None, base=state["config"])
        except config.ConfigError as error:
            raise config.ConfigError(
                f"{checkpoint} holds settings that this version does not take: {error}"
            ) from None
    cfg = config.load(name, overrides, base=state.get("config"))
    if not state:  # a checkpoint's settings are what its network was built with
        models.check(cfg.model)
    torch.manual_seed(cfg.seed)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg) if "network" in state else ())
    if not state:
        return network, cfg, f"untrained, seed {cfg.seed}"
    models.load(network, state, checkpoint)
    return network, cfg, file_hash(checkpoint)


def load(checkpoint, device=None, cfg=None, settings=()):
    """The Model of a checkpoint: see `avid.load`."""
    with torch.random.fork_rng(devices=[]):  # a notebook's own random numbers are not disturbed
        module, cfg, mark = network(checkpoint, cfg, settings)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        module = module.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # no such name, no such device
        reason = str(error).splitlines()[0]
        raise config.ConfigError(f"device {device} cannot be used: {reason}; try cpu") from None
    return Model(module, cfg, device, mark, untrained=str(checkpoint) == "random")


# ------------------------------------------------------------------------------------------------- the files


class Clips(data.AnyClips):
    """The evaluation clips of files of which each has a picture, a sound, or both.

    Besides the tensors of both modalities, zeros for one that the file lacks, an item has `has`, bool 2, of
    MODALITIES; and `times_s`, float64 K, when each clip begins.
    """

    def __init__(self, table, cfg):
        super().__init__(table, cfg, training=False)
        video, audio, k = cfg.video, cfg.audio, self.clips
        self.blank = {
            "video": torch.zeros(k, 3, video.frames, video.size, video.size, dtype=torch.uint8),
            "audio": torch.zeros(k, 1, columns(audio), config.bands(audio)),
        }

    def read(self, index, rng):
        part = self.part(index)
        there = part.modalities
        with part.open(index) as media:
            when = part.evenly(*part.usable(media))
            item = dict(self.blank)
            if "video" in there:
                item["video"] = data.rows_stacked([part.picture(media, clip, rng) for clip in when])
                media.close_picture()
            if "audio" in there:
                item["audio"] = torch.stack([part.loudness(media, clip, rng) for clip in when])
        item["has"] = torch.tensor([modality in there for modality in MODALITIES])
        item["times_s"] = torch.tensor([clip.start_s for clip in when], dtype=torch.float64)
        return item


# ---------------------------------------------------------------------------------------- what comes of them


@dataclass
class Embedding:
    """What a network makes of one file, or of n files: then every array has n rows.

    Of one file, a modality that it lacks is None; of several, its rows are NaN. A file that cannot be used
    has no row: it is in `failures`.
    """

    video: np.ndarray  # D, unit length: the mean over the clips, to be compared with any `video` or `audio`
    audio: np.ndarray  # D, likewise
    video_features: np.ndarray  # F, the mean over the clips: what a classifier takes
    audio_features: np.ndarray  # F
    video_clips: np.ndarray  # K×D, unit length: each clip by itself
    audio_clips: np.ndarray  # K×D
    times: np.ndarray  # K, s: when each clip begins
    paths: list  # of one file: its path
    failures: dict = field(default_factory=dict)  # path → why it cannot be used

    def row(self, i):
        """The Embedding of file i of several."""
        arrays = {name: getattr(self, name)[i] for name in ARRAYS}
        arrays = {name: None if np.isnan(x).any() else x for name, x in arrays.items()}
        return Embedding(**arrays, times=self.times[i], paths=self.paths[i])


def stack(parts):
    """The Embedding of the files of several, one after the other."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in [*ARRAYS, "times"]}
    paths = [path for part in parts for path in part.paths]
    return Embedding(
        **arrays, paths=paths, failures={k: v for part in parts for k, v in part.failures.items()}
    )


def report(failures, files):
    """One line: how many of so many files could not be used, and why the first one could not."""
    path, reason = next(iter(failures.items()))
    return f"{len(failures):,} of {files:,} files cannot be used, e.g. {printable(path)}: {reason}"


@dataclass
class Model:
    """A network that embeds files. `avid.load` makes it."""

    network: models.AudioVisual  # the plain torch module
    cfg: config.Config  # the checkpoint's settings: they say how clips are taken
    device: torch.device
    hash: str  # of the checkpoint's file; of an untrained network, its seed
    untrained: bool = False

    def embed(self, files, workers=0, progress=None):
        """What the network makes of a file, or of a list of files: an Embedding.

        files: a path, or several; each file has a picture, a sound, or both. K = cfg.eval.clips clips,
        evenly spaced over it and cropped in the middle, go through the network in the mode of evaluation.
        workers: processes that decode; 0: this one, which is best for some files and in notebooks. With 1
        or more, a decoder that dies or hangs costs its file only. progress: whether to show a bar; None: of
        more than 8 files.

        Raises MediaError where a single file cannot be used. Of several, such files are in `failures`, and
        a line counts them.
        """
        one = isinstance(files, (str, os.PathLike))
        table = datasets.of_files([files] if one else files)
        if not len(table):
            raise MediaError("no files to embed: the list is empty")
        self.calibrate(table, workers)
        shown = len(table) > 8 if progress is None else progress
        parts = []
        with progress_bar(desc="embedding", total=len(table), unit="file", disable=not shown) as bar:
            for count, _, part in self.parts(table, workers):
                parts.append(part)
                bar.update(count)
        found = stack(parts)
        if not found.failures:
            return found.row(0) if one else found
        if one:
            raise MediaError(f"{table.paths[0]}: {found.failures[table.paths[0]]}")
        tqdm.write(report(found.failures, len(table)))
        return found

    @property
    def batch_size(self):
        """How many files go through the network at once."""
        return max(1, self.cfg.eval.batch_size // self.cfg.eval.clips)

    def parts(self, table, workers=0, rows=None):
        """Of each batch of a table's rows (all, or those of the sequence `rows`), in order: how many rows
        it has, those of them that can be used, and their Embedding."""
        for batch in self.batches(table, workers, range(len(table)) if rows is None else rows):
            usable = [int(i) for i in batch.get("index", ())]
            yield len(usable) + len(batch["failures"]), usable, self.encode(batch, table)

    def batches(self, table, workers, rows):
        batches = [list(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)]
        return data.loader(Clips(table, self.cfg), workers, batch_sampler=batches)

    def clips(self, batch):
        """Of a batch of n files, by modality: which files have it, bool n; and their clips, ready for the
        network, m·K×…"""
        batch = data.to_device(batch, self.device, self.cfg.audio)
        for has, modality in zip(batch["has"].T, MODALITIES, strict=True):
            clips = batch[modality]  # n·K×…
            yield modality, has.cpu().numpy(), clips[has.repeat_interleave(len(clips) // len(has))]

    def shapes(self):
        """Of one file, the shape of each of ARRAYS."""
        k, d = self.cfg.eval.clips, self.cfg.model.embedding
        dims = {"video": self.network.video_model.dim, "audio": self.network.audio_model.dim}
        shapes = {}
        for modality in MODALITIES:
            shapes |= {modality: (d,), f"{modality}_features": (dims[modality],), f"{modality}_clips": (k, d)}
        return shapes

    @torch.inference_mode()
    def encode(self, batch, table):
        """The Embedding of a batch of Clips of a table."""
        failures = {table.name_of(i): reason for i, reason in batch["failures"]}
        paths = [table.paths[i] for i in batch.get("index", ())]
        n, k = len(paths), self.cfg.eval.clips
        arrays = {name: np.full((n, *shape), np.nan, np.float32) for name, shape in self.shapes().items()}
        if not n:
            return Embedding(**arrays, times=np.empty((0, k)), paths=paths, failures=failures)
        half = self.device.type == "cuda" and self.cfg.optim.amp != "none"
        was_training = self.network.training
        self.network.eval()
        for modality, has, clips in self.clips(batch):
            if has.any():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    output = self.network.encode(modality, clips)  # m·K×D, m·K×F
                embeddings, features = (x.float().unflatten(0, (-1, k)).cpu().numpy() for x in output)
                mean = embeddings.mean(1)
                arrays[modality][has] = mean / np.linalg.norm(mean, axis=1, keepdims=True).clip(1e-12)
                arrays[f"{modality}_features"][has] = features.mean(1)
                arrays[f"{modality}_clips"][has] = embeddings
                if not (np.isfinite(embeddings).all() and np.isfinite(features).all()):
                    raise FloatingPointError(
                        f"the network's output is not finite, for example of {paths[has.argmax()]}"
                    )
        self.network.train(was_training)
        return Embedding(**arrays, times=batch["times_s"].numpy(), paths=paths, failures=failures)

    def calibrates(self, table):
        """The rows of a table that `calibrate` takes."""
        return range(min(len(table), self.batch_size * self.cfg.eval.calibration_batches))

    @torch.no_grad()
    def calibrate(self, table, workers=0):
        """Take an untrained network's batch-norm statistics from the first eval.calibration_batches batches
        of a table: without them its features vanish [C]. What has been trained, or has counted a batch,
        stays as it is. `embed` does so.

        Raises ConfigError where there is one clip only, which has no statistics.
        """
        fresh = {}  # modality → its batch norms
        for modality in MODALITIES if self.untrained else ():
            parts = getattr(self.network, f"{modality}_model"), getattr(self.network, f"{modality}_proj")
            norms = [m for part in parts for m in part.modules() if isinstance(m, _BatchNorm)]
            if norms and not norms[0].num_batches_tracked:
                fresh[modality] = norms
        if not fresh:
            return
        momentum = {norm: norm.momentum for norms in fresh.values() for norm in norms}
        for norm in momentum:
            norm.momentum = None  # the mean over all batches
        was_training = self.network.training
        self.network.train()
        seen = set()
        for batch in self.batches(table, workers, self.calibrates(table)):
            for modality, has, clips in self.clips(batch) if "index" in batch else ():
                if modality in fresh and has.any():
                    seen.add(modality)
                    if len(clips) > 1:
                        self.network.encode(modality, clips)
        self.network.train(was_training)
        for norm, before in momentum.items():
            norm.momentum = before
        if any(not fresh[modality][0].num_batches_tracked for modality in seen):
            raise config.ConfigError("an untrained network needs two clips or more; raise eval.clips")
