"""The settings of a run: every one with its default, its unit and its source.

In: a YAML file that states what differs from the defaults here, and `key=value` overrides.
Out: a `Config`. A wrong key, type or value raises `ConfigError`, one line that names the nearest right key.

Sources: [P] a paper's abstract, all of it that could be read; [A] the public AVID-CMA code and its first
author's answers; [F] one later implementation by others, LivienMajer/cmvra; [S] other public work of the same
authors; [C] our choice. docs/method.md explains.
"""

import dataclasses
import difflib
import functools
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from . import datasets, files
from .files import ConfigError

PACKAGED = Path(__file__).parent / "configs"
RENAMED = {"eval.settle_batches": "eval.calibration_batches"}  # settings of earlier versions
WRITTEN = "# settings of a run, written by train.py; the run folder is known by this line\n"


def setting(default, help, *, at_least=None, above=None, at_most=None, below=None, choices=None, needs=()):
    """A field with its default, what it is, its choices or its range (of a list: of each number in it), and
    what its value needs if it is not zero (a weight: some of NEEDS)."""
    metadata = {
        "help": help,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "choices": choices,
        "needs": needs,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def range_text(at_least=None, above=None, at_most=None, below=None, choices=None, **_):
    """The range or the choices of a setting in words; empty where every value will do."""
    if choices:
        return "one of " + ", ".join(map(str, choices))
    low = (
        f"more than {above:g}"
        if above is not None
        else f"{at_least:g} or more"
        if at_least is not None
        else ""
    )
    high = (
        f"less than {below:g}" if below is not None else f"at most {at_most:g}" if at_most is not None else ""
    )
    if at_least is not None and at_most is not None:
        return f"{at_least:g} to {at_most:g}"
    return " and ".join(filter(None, (low, high)))


def in_range(value, at_least=None, above=None, at_most=None, below=None, choices=None, **_):
    if choices:
        return value in choices
    return (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )


# fmt: off
@dataclass
class Data:
    name: str = setting("toy", "data set", choices=tuple(datasets.DATA))
    root: str = setting("data",
        "folder of the data set; the toy is written into a folder of its own below it")
    split: str = setting("", "part to read; empty: the data set's own train (test for evaluation)")
    label: str = setting("label", "column of the manifest that is the class (evaluation only)")
    subset: str = setting("", "esc10: the 10 classes of ESC-10 of data set esc50; empty: the whole data set")
    need: str = setting("both",
        "what a file to train on must hold; any: picture or sound, and what needs both is masked [C]",
        choices=("both", "any"))
    workers: int = setting(8,
        "decoding processes a rank; 0: none, and a decoder that hangs or dies ends the run [C]", at_least=0)
    timeout_s: float = setting(60.0,
        "s; a file on which a decoding process takes longer, twice, is given up [C]", above=0, at_most=86400)
    in_memory: bool = setting(False,
        "each process of a training keeps what it decoded, whole and as it is: for small data sets [C]")
    clips_per_open: int = setting(1,
        "places of a batch that take clips of one opened file: cheaper, less mixed batches [C]", at_least=1)
    decode: str = setting("cpu",
        "device: of packed data, decoding processes only read bytes; the device does the rest [C]",
        choices=("cpu", "device"))
    shuffle: str = setting("full",
        "shards: of packed data, a batch comes out of one shard or two, for slow disks [C]",
        choices=("full", "shards"))
    max_bad_share: float = setting(0.1,
        "stop when more than this share of the drawn files cannot be used [C]", at_least=0, at_most=1)


@dataclass
class Video:
    frames: int = setting(8, "frames a clip [A]. temporal: 16 [S]", at_least=1)
    fps: float = setting(16.0, "frames a second of the clip, whatever the file's [A]", above=0)
    size: int = setting(112, "side of the square clip, pixels [S: temporal; A: 224]", at_least=1)
    offset_s: float = setting(0.0,
        "s that the picture's middle may lie from the sound's [C: 0; A: 1.25, docs/method.md 12]",
        at_least=0)
    crop_area: list[float] = setting([0.08, 1.0], "area of the random crop, share of the frame [A]",
        above=0, at_most=1)
    crop_ratio: list[float] = setting([0.75, 1.3333], "width / height of the random crop [A]", above=0)
    flip: float = setting(0.5, "probability of a horizontal flip [A]", at_least=0, at_most=1)
    jitter: list[float] = setting([0.4, 0.4, 0.4, 0.2],
        "strength of brightness, contrast, saturation, hue [A]", at_least=0, at_most=1)
    grey: float = setting(0.0, "probability of a clip without colour. temporal: 0.2 [S]",
        at_least=0, at_most=1)


@dataclass
class Audio:
    seconds: float = setting(2.0, "length of the sound clip, s [A]", above=0)
    rate_hz: int = setting(24000, "sample rate, Hz [A]", at_least=1)
    frames_per_s: int = setting(100, "spectrogram columns a second [A]", at_least=1)
    frontend: str = setting("log",
        "log: log-mel or, where mels is 0, linear bins [C]; avid: the spectrogram of AVID's networks [A]",
        choices=("log", "avid"))
    n_fft: int = setting(512,
        "window and FFT length, samples: 257 bins [C]; frontend=avid: twice as long, bins in pairs [A]",
        at_least=1)
    mels: int = setting(80, "mel bands of frontend=log; 0: the linear bins [C; S: 128]", at_least=0)
    statistics: str = setting("",
        "mean and deviation of each band: a file of python -m avid statistics [A, S]; empty: -50, 20 dB [C]")
    volume: float = setting(0.1, "random gain, ± this share [A]", at_least=0, below=1)
    mask_time: float = setting(0.0, "widest masked stretch, share of the columns. temporal: 0.2 [C]",
        at_least=0, at_most=1)
    mask_frequency: float = setting(0.0, "widest masked band, share of the bins. temporal: 0.2 [C]",
        at_least=0, at_most=1)


@dataclass
class Temporal:
    moments: int = setting(1,
        "clips a video: 1, or 2, which order and the contrast within a modality need [P]", choices=(1, 2))
    speeds: list[int] = setting([1], "playback speeds, drawn equally often. temporal: 1, 2, 4, 8 [S]",
        at_least=1)
    reverse: bool = setting(False, "half of the clips run backwards [P]")


@dataclass
class Model:
    video: str = setting("avid",
        "video network: avid [A]; timewise, small, keeps time [C]; or torchvision's r2plus1d_18, r3d_18, s3d")
    audio: str = setting("avid", "audio network: avid [A]; timewise, small, keeps time [C]")
    width: int = setting(64, "channels of both networks' stems; features of avid's: 8 × this [A]", at_least=1)
    depth: int = setting(2, "residual blocks a stage of avid's video network [A]", at_least=1)
    embedding: int = setting(128, "D, dimensions of the embeddings [A]", at_least=1)
    head_norm: str = setting("none",
        "batch: batch norm in the heads and at their end [C; A: none]", choices=("none", "batch"))


@dataclass
class Bank:
    momentum: float = setting(0.5, "m: memory ← m · memory + (1 − m) · embedding [A]", at_least=0, at_most=1)
    num_negatives: int | str = setting(1024,
        "K, negatives drawn from the bank [A]; all: every instance [C]")
    candidates: str = setting("shared",
        "shared: K a step for the whole batch, and the batch itself [C]; own: K for each sample [A]",
        choices=("shared", "own"))
    dtype: str = setting("float32", "what memories are stored as [A: float32]",
        choices=("float32", "float16", "bfloat16"))
    spread: bool = setting(False,
        "each rank holds a part of the bank instead of all of it, docs/scaling.md [C]")


@dataclass
class Loss:
    form: str = setting("softmax",
        "softmax: cross entropy over the candidates [P]; nce: noise contrastive estimation [A]",
        choices=("softmax", "nce"))
    temperature: float = setting(0.07, "τ [A]", above=0)
    w_min: float = setting(1.0, "least weight of a faulty positive; 1: weights off. robust: 0.25 [F]",
        at_least=0, at_most=1)
    delta: float = setting(0.0, "δ: the weights' threshold is μ + δσ [F]")
    kappa: float = setting(0.5, "κ: the weights' variance is κσ² [F]", above=0)
    soft: float = setting(0.0, "λ, share of the soft target; 0: one-hot. robust: 0.5 [F]",
        at_least=0, at_most=1)
    estimator: str = setting("cycle",
        "estimator of the soft target [P: that there is one; F: cycle, swapped]",
        choices=("bootstrap", "swapped", "neighbor", "cycle"))
    tau_s: float = setting(0.02, "τ_s of the soft targets [F]", above=0)
    tau_t: float = setting(0.07, "τ_t of the cycle's outer steps [F]", above=0)
    warmup_epochs: int = setting(0, "epochs of plain xID before weights and soft targets [C]", at_least=0)


@dataclass
class Contrast:
    temperature: float = setting(0.07, "τ of the contrast between clips [C]", above=0)
    n_pos: int = setting(4, "positives from the bank besides the matched clip; 0: none [C]", at_least=0)
    k_pos: int = setting(32, "they are drawn from the k nearest memories, which are never negatives [C]",
        at_least=0)
    tau_p: float = setting(0.1, "τ_p: drawn with probability ∝ exp(sim/τ_p) [C]", above=0)
    negatives: int = setting(1024, "negatives drawn for each instance [C]", at_least=1)
    sample: int = setting(0,
        "look for them among so many instances, drawn each step; 0: among all, docs/scaling.md [C]",
        at_least=0)
    batch: bool = setting(False, "other clips of the batch, live, are negatives too [C]")
    tau_n: float = setting(float("inf"),
        "τ_n: drawn with probability ∝ exp(sim/τ_n); .inf: uniformly, smaller: harder [C]", above=0)


@dataclass
class Agreement:
    positives: int = setting(32, "k, positives of each instance: those most similar to it [A]", at_least=1)
    by: str = setting("consensus",
        "similarity: the lesser of both modalities' (consensus), the greater (union), or one's [A]",
        choices=("consensus", "union", "video", "audio"))
    negatives: int = setting(64, "negatives of each sample within a modality [A]", at_least=1)
    every_epochs: int = setting(50,
        "epochs after which positives are found anew [A: 5 of 10 clips]", at_least=1)


NEEDS = {  # of a term: the setting, and whether it is so; the classes of a task are there only then
    "temporal.moments=2": lambda cfg: cfg.temporal.moments == 2,
    "temporal.speeds=[1,2,4,8]": lambda cfg: len(cfg.temporal.speeds) > 1,
    "temporal.reverse=true": lambda cfg: cfg.temporal.reverse,
    # a rank looks for neighbours in the whole bank, or all ranks together in a sample of it
    "bank.spread=false, or a contrast.sample": lambda cfg: not cfg.bank.spread or cfg.contrast.sample > 0,
    "video.offset_s=0": lambda cfg: not cfg.video.offset_s,  # picture and sound cover the same interval
    "weights.xid above 0": lambda cfg: cfg.weights.xid > 0,  # which makes the memories
    "bank.spread=false": lambda cfg: not cfg.bank.spread,  # a rank compares all memories with all
}
PAIR, SPEEDS, REVERSE, NEIGHBOURS, MATCHED, MEMORIES, WHOLE_BANK = NEEDS


@dataclass
class Weights:
    xid: float = setting(1.0,
        "cross-modal instance discrimination, plain or robust [P]; avid: 0.5, mean of directions [A]",
        at_least=0)
    cma: float = setting(0.0, "cross-modal agreement: positives within a modality. avid_cma: 0.25 [A]",
        at_least=0, needs=(MEMORIES, WHOLE_BANK))
    contrast_vv: float = setting(0.0, "contrast of the two moments' video clips, (v, v') [P]",
        at_least=0, needs=(PAIR, NEIGHBOURS))
    contrast_aa: float = setting(0.0, "contrast of the two moments' audio clips, (a, a') [P]",
        at_least=0, needs=(PAIR, NEIGHBOURS))
    contrast_va: float = setting(0.0, "contrast of a video clip with sounds, (v, a) [P]",
        at_least=0, needs=(NEIGHBOURS,))
    contrast_av: float = setting(0.0, "contrast of an audio clip with videos, (a, v) [P]",
        at_least=0, needs=(NEIGHBOURS,))
    speed_video: float = setting(0.0, "playback speed of a video clip [P]", at_least=0, needs=(SPEEDS,))
    speed_audio: float = setting(0.0, "playback speed of an audio clip [P]", at_least=0, needs=(SPEEDS,))
    direction_video: float = setting(0.0, "direction of a video clip [P]", at_least=0, needs=(REVERSE,))
    direction_audio: float = setting(0.0, "direction of an audio clip [P]", at_least=0, needs=(REVERSE,))
    order_video: float = setting(0.0, "order of two video clips, (v, v') [P]",
        at_least=0, needs=(PAIR, MATCHED))
    order_audio: float = setting(0.0, "order of two audio clips, (a, a') [P]",
        at_least=0, needs=(PAIR, MATCHED))
    order_cross: float = setting(0.0, "order of a video clip and an audio clip, (v, a') and (a, v') [P]",
        at_least=0, needs=(PAIR, MATCHED))


@dataclass
class Optim:
    epochs: int = setting(200, "epochs; one is N / batch_size steps [A: 200 or 300]", at_least=1)
    batch_size: int = setting(256, "clips a step over all ranks [A: 256 on each of 4 machines]", at_least=1)
    draws: str = setting("epoch",
        "epoch: shuffled passes [C]; copies: passes over copies of each video [A]; iid: with replacement [C]",
        choices=("epoch", "copies", "iid"))
    copies: int = setting(10, "copies of each video in a pass of draws=copies [A]", at_least=1)
    lr: float = setting(2e-4, "learning rate of Adam [A]", above=0)
    weight_decay: float = setting(1e-5, "L2 penalty of Adam [A]", at_least=0)
    schedule: str = setting("cosine", "after the warm-up [C; A: constant]",
        choices=("cosine", "steps", "constant"))
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up [C]", at_least=0)
    milestones: list[float] = setting([0.5, 0.75],
        "schedule=steps: when lr is multiplied by gamma, shares of the run [C]", at_least=0, at_most=1)
    gamma: float = setting(0.1, "factor of schedule=steps [C]", at_least=0)
    max_bad_steps: int = setting(10, "stop when so many steps in a row are not finite [C]", at_least=1)
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0: no clipping [C]", at_least=0)
    amp: str = setting("bf16",
        "autocast on CUDA; fp16 with a scaled loss; a CPU computes in float32 [C]",
        choices=("bf16", "fp16", "none"))
    compile: bool = setting(False, "torch.compile the network [C]")
    accumulate: int = setting(1,
        "parts in which a batch passes the network: less memory, a third more time [C]", at_least=1)
    checkpoint_activations: bool = setting(False,
        "backward computes the networks again: less memory, more time [C]")
    sync_bn: bool = setting(True, "batch statistics over all ranks [C]")


@dataclass
class Finetune:
    epochs: int = setting(160, "passes over the labelled videos, one clip each [A: 16 of 10 clips]",
        at_least=1)
    warmup_epochs: int = setting(50, "passes before them that train the classifier alone [A: 5 of 10 clips]",
        at_least=0)
    batch_size: int = setting(64, "clips a step over all ranks [A; of 32 frames: 32]", at_least=1)
    lr: float = setting(1e-4, "learning rate of Adam [A]", above=0)
    weight_decay: float = setting(0.0, "L2 penalty of Adam [A]", at_least=0)
    milestones: list[float] = setting([0.375, 0.625, 0.875],
        "when lr is multiplied by gamma, shares of the epochs [A]", at_least=0, at_most=1)
    gamma: float = setting(0.3, "factor at the milestones [A]", at_least=0)
    dropout: float = setting(0.5, "probability that a feature is dropped before the classifier [A]",
        at_least=0, below=1)


@dataclass
class Log:
    every_steps: int = setting(20, "steps between two lines of metrics.jsonl", at_least=1)
    check_epochs: int = setting(5, "epochs between two checks on held-out videos; 0: none", at_least=0)
    check_videos: int = setting(2000, "held-out videos a check looks at, at most", at_least=1)
    checkpoint_minutes: float = setting(10.0, "minutes between two checkpoints within an epoch", at_least=0)
    tensorboard: bool = setting(False, "also write for TensorBoard what metrics.jsonl gets [C]")


@dataclass
class Eval:
    clips: int = setting(10, "clips a video, evenly spaced [A]", at_least=1)
    crop: float = setting(0.875, "side of the central crop, share of the short side [A]", above=0, at_most=1)
    batch_size: int = setting(64, "videos a forward pass", at_least=1)
    calibration_batches: int = setting(20,
        "batches that set an untrained network's batch-norm statistics [C]", at_least=0)


@dataclass
class Toy:
    train: int = setting(800, "training videos", at_least=1)
    test: int = setting(300, "test videos", at_least=1)
    seconds: float = setting(6.0, "length of a video, s", above=0)
    size: int = setting(64, "side of a video, pixels", at_least=1)
    fps: int = setting(16, "frames a second", at_least=1)
    rate_hz: int = setting(16000, "sample rate of the sound, Hz", at_least=1)
    faulty: float = setting(0.0, "share of training videos whose sound does not belong to them",
        at_least=0, at_most=1)
# fmt: on


@dataclass
class Config:
    seed: int = setting(0, "decides everything random, the toy data included", at_least=0)
    out: str = setting("", "run folder; empty: runs/<name of the configuration>")
    init: str = setting(
        "", "checkpoint whose weights, and bank where it is of the same videos, training begins with"
    )
    profile: bool = setting(False, "trace a few steps of training with torch's profiler")
    data: Data = field(default_factory=Data)
    video: Video = field(default_factory=Video)
    audio: Audio = field(default_factory=Audio)
    model: Model = field(default_factory=Model)
    bank: Bank = field(default_factory=Bank)
    loss: Loss = field(default_factory=Loss)
    temporal: Temporal = field(default_factory=Temporal)
    contrast: Contrast = field(default_factory=Contrast)
    agreement: Agreement = field(default_factory=Agreement)
    weights: Weights = field(default_factory=Weights)
    optim: Optim = field(default_factory=Optim)
    finetune: Finetune = field(default_factory=Finetune)
    log: Log = field(default_factory=Log)
    eval: Eval = field(default_factory=Eval)
    toy: Toy = field(default_factory=Toy)


def fields(schema=Config, prefix=""):
    """Every setting as (dotted key, dataclasses.Field)."""
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            yield from fields(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def settings():
    """Every setting as (dotted key, default, help with the range)."""
    for key, f in fields():
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        needs = f.metadata["needs"] and "needs " + " and ".join(f.metadata["needs"])
        yield key, default, "; ".join(filter(None, (f.metadata["help"], range_text(**f.metadata), needs)))


TEXTS = {key for key, default, _ in settings() if isinstance(default, str)}
GROUPS = {  # name of a group: its first setting
    f.name: f"{f.name}.{dataclasses.fields(f.type)[0].name}"
    for f in dataclasses.fields(Config)
    if dataclasses.is_dataclass(f.type)
}


def load(name="toy", overrides=(), base=None):
    """The configuration `name` (a path, or a packaged name with or without .yaml) with `key=value` overrides.

    `base`: a dict of settings to start from instead of a file (an evaluation starts from its checkpoint's).
    Raises ConfigError.
    """
    layers = [] if base is None else [_layer(base)]
    if name:
        layers.append(_read(name))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or "" in key.split("."):
            raise ConfigError(f"{override} is no setting; write key=value, --help lists the keys")
        try:
            if key in TEXTS:  # as it is: YAML would end a folder's name at a # and take ~ for nothing
                layers.append(OmegaConf.create())
                OmegaConf.update(layers[-1], key, value)
            else:
                layers.append(OmegaConf.from_dotlist([override]))
        except Exception as error:  # the YAML parser's own errors
            raise ConfigError(f"cannot read {override}: {_fault(error)}") from None
    for layer in layers:
        for old, new in RENAMED.items():
            if (value := OmegaConf.select(layer, old)) is not None:
                OmegaConf.update(layer, new, value)
                del OmegaConf.select(layer, old.rpartition(".")[0])[old.rpartition(".")[2]]
        for key, value in OmegaConf.to_container(layer).items():
            if key in GROUPS and not isinstance(value, dict):
                raise ConfigError(f"{key} is not a setting but a group of them, such as {GROUPS[key]}")
    try:
        lists = {key: default for key, default, _ in settings() if isinstance(default, list)}
        for key, default in lists.items():  # OmegaConf's own complaint about these names no setting
            if any(OmegaConf.is_dict(OmegaConf.select(layer, key)) for layer in layers):
                raise ConfigError(f"wrong value for {key}: not a list; expected one, such as {default}")
        if missing := set().union(*map(OmegaConf.missing_keys, layers)):
            raise ConfigError(
                f"wrong value for {min(missing)}: ???; expected a value, which ??? does not give"
            )
        cfg = OmegaConf.to_object(OmegaConf.merge(_defaults(), *layers))
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error, layers)) from None
    cfg.out = cfg.out or f"runs/{Path(name).stem if name else 'eval'}"
    cfg.audio.statistics = statistics_text(cfg.audio.statistics)
    _check(cfg)
    return cfg


@functools.lru_cache
def _defaults():
    return OmegaConf.structured(Config)


def _layer(base):
    """A dict of settings, of a checkpoint perhaps, which may hold anything."""
    try:
        layer = OmegaConf.create(base)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the settings hold what is none: {str(error).splitlines()[0]}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"the settings are a {type(base).__name__}, not a dict")
    return layer


def _read(name):
    path = next((p for p in (Path(name), PACKAGED / name, PACKAGED / f"{name}.yaml") if p.is_file()), None)
    if path is None:
        packaged = ", ".join(sorted(p.stem for p in PACKAGED.glob("*.yaml")))
        raise ConfigError(f"no configuration {name}: neither a file nor one of {packaged}")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # the YAML parser's own errors
        raise ConfigError(f"cannot read {path}: {_fault(error)}") from None
    if not OmegaConf.is_dict(layer):
        raise ConfigError(f"cannot read {path}: expected lines of the form key: value")
    return layer


def _fault(error):
    """What a YAML parser complains of, in one line."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, {error.problem}" if mark else " ".join(str(error).split())


def _one_line(error, layers):
    """What is wrong, said of the setting that OmegaConf complains of."""
    key = str(error.full_key or "").partition("[")[0]
    defaults = {known: default for known, default, _ in settings()}
    if key not in defaults:
        near = _nearest(key, [*defaults, *GROUPS])
        return f"unknown setting {key}" + (f"; did you mean {near}?" if near else "; --help lists them all")
    if isinstance(error, InterpolationResolutionError):
        return f"wrong value for {key}: {str(error).splitlines()[0]}"
    unset = object()
    given = [OmegaConf.select(layer, key, default=unset) for layer in layers]
    value = next(value for value in reversed(given) if value is not unset)
    kind = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", str: "a text"}[
        type(defaults[key])
    ]
    example = str(defaults[key]).lower() if isinstance(defaults[key], bool) else defaults[key]
    return f"wrong value for {key}: {value}; expected {kind}, such as {example}"


def _nearest(key, known):
    """The known key that `key` is most like, with its group or without; None if there is none."""

    def likeness(other):
        whole, last = ((key, other), (key.rpartition(".")[2], other.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in (whole, last))
        return max(whole, 0.85 * last), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


def _check(cfg):
    """Values that the types let through and no run could use: each by itself, then what concerns several."""

    def wrong(key, expected):
        raise ConfigError(f"wrong value for {key}: {value(key)}; expected {expected}")

    def value(key):
        return functools.reduce(getattr, key.split("."), cfg)

    for key, f in fields():
        given, default = value(key), f.default
        numbers = given if isinstance(given, list) else [given] if not isinstance(given, str) else []
        if isinstance(given, list) and not all(type(x) in (int, float) for x in given):
            wrong(key, f"a list of numbers, such as {f.default_factory()}")
        # contrast.tau_n: .inf is a value of its own
        endless = isinstance(default, float) and math.isinf(default)
        if any(math.isnan(x) or (math.isinf(x) and not endless) for x in numbers):
            wrong(key, "a finite number")
        if any(isinstance(x, int) and abs(x) >= 2**63 for x in numbers):
            wrong(key, "a number below 2^63")
        for x in given if isinstance(given, list) else [given]:
            if not in_range(x, **f.metadata):
                wrong(key, ("each " if isinstance(given, list) else "") + range_text(**f.metadata))

    data, video, audio, bank = cfg.data, cfg.video, cfg.audio, cfg.bank
    if {"/", "\\"} & set(data.split):
        wrong("data.split", "a name without / and \\, it becomes part of file names")
    row = datasets.DATA[data.name]
    for key, choices in {"data.split": row.splits, "data.label": row.labels}.items():
        if choices and value(key) not in (choices if key == "data.label" else ("", *choices)):
            among = choices if key == "data.label" else ("nothing", *choices)
            wrong(key, f"one of {', '.join(among)}")
    if row.written and data.subset:
        wrong("data.subset", "one of nothing")
    for key, default in {"data.decode": "cpu", "data.shuffle": "full"}.items():
        if data.name != "packed" and value(key) != default:
            wrong(key, f"{default}, as data.name={data.name} is not packed; see python -m avid pack")
    for key in ("video.crop_area", "video.crop_ratio"):
        if len(value(key)) != 2 or value(key)[0] > value(key)[1]:
            wrong(key, "[least, largest]")
    if len(video.jitter) != 4 or video.jitter[3] > 0.5:
        wrong("video.jitter", "four of 0 to 1, the last at most 0.5")
    if not cfg.temporal.speeds or sorted(set(cfg.temporal.speeds)) != cfg.temporal.speeds:
        wrong("temporal.speeds", "whole numbers from 1 on, ascending")
    if audio.seconds < audio.n_fft / audio.rate_hz:
        wrong("audio.seconds", "at least a window, audio.n_fft / audio.rate_hz")
    if audio.rate_hz % audio.frames_per_s:
        wrong("audio.frames_per_s", f"a divisor of audio.rate_hz = {audio.rate_hz}")
    if (
        audio.frontend == "avid"
        and round(audio.seconds * audio.frames_per_s) * audio.rate_hz <= audio.n_fft * audio.frames_per_s
    ):
        wrong("audio.seconds", "more than half of AVID's window, audio.n_fft / audio.rate_hz")
    if audio.frontend == "avid" and audio.n_fft % 2:
        wrong("audio.n_fft", "an even number: AVID's bins are averaged in pairs")
    if audio.statistics:
        band_statistics(audio)
    if audio.mels > audio.n_fft // 2 + 1:
        wrong("audio.mels", f"at most {audio.n_fft // 2 + 1}, the linear bins")
    if cfg.toy.seconds * cfg.toy.fps < 1:
        wrong("toy.seconds", f"at least a frame, 1/{cfg.toy.fps}")
    if cfg.contrast.n_pos > cfg.contrast.k_pos:
        wrong("contrast.n_pos", f"at most contrast.k_pos = {cfg.contrast.k_pos}")
    if bank.num_negatives != "all" and (isinstance(bank.num_negatives, str) or bank.num_negatives < 1):
        wrong("bank.num_negatives", "a count, or all")
    if bank.spread and bank.num_negatives == "all":
        raise ConfigError(
            "bank.spread=true needs a count of bank.num_negatives: to read all memories is to hold them all"
        )
    if bank.candidates == "own":
        for key, there, needed in (
            ("bank.num_negatives", bank.num_negatives != "all", "a count"),
            ("bank.spread", not bank.spread, "false: each rank reads other memories"),
            ("loss.soft", not cfg.loss.soft, "0: soft targets are over shared candidates"),
        ):
            if not there:
                wrong(key, f"{needed}; or bank.candidates=shared")
    if cfg.loss.form == "nce" and bank.candidates != "own":
        wrong(
            "loss.form",
            "softmax; or bank.candidates=own, as nce takes the negatives of each sample by themselves",
        )
    if data.need == "any":
        for key, there, needed in (
            ("bank.spread", not bank.spread, "false"),
            ("data.decode", data.decode == "cpu", "cpu"),
            ("bank.candidates", bank.candidates == "shared", "shared"),
            ("weights.cma", not cfg.weights.cma, "0: agreement is between picture and sound"),
        ):
            if not there:
                wrong(key, f"{needed}; or data.need=both")
        if not any(weight for name, weight in vars(cfg.weights).items() if len(needs(name)) == 1):
            raise ConfigError(
                "data.need=any needs a term of one modality, such as weights.contrast_vv or "
                "weights.speed_audio: a file without picture or without sound teaches nothing else"
            )
    for f in dataclasses.fields(Weights):
        weight = getattr(cfg.weights, f.name)
        for needed in f.metadata["needs"] if weight else ():
            if not NEEDS[needed](cfg):
                raise ConfigError(f"weights.{f.name}={weight} needs {needed}")


def needs(term):
    """The modalities that a term of Weights needs of a file."""
    letters, audio = term.rpartition("_")[2], ("audio",)
    one = {"vv": ("video",), "video": ("video",), "aa": audio, "audio": audio}
    return one.get(letters, ("video", "audio"))


def bands(audio):
    """The number of bands of a spectrogram."""
    return audio.mels if audio.frontend == "log" and audio.mels else audio.n_fft // 2 + 1


NUMBER = r"[-+]?[0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?"


def statistics_text(given):
    """What audio.statistics holds, as text: mean/deviation of each band, in dB. given: that, or a .npz file
    with mean and std.
    """
    if not given or re.fullmatch(rf"{NUMBER}/{NUMBER}(?: {NUMBER}/{NUMBER})*", given):
        return given
    try:
        with np.load(given, allow_pickle=False) as arrays:  # numbers alone: no code is run from a file
            mean, std = (np.asarray(arrays[name], np.float64).ravel() for name in ("mean", "std"))
    except FileNotFoundError:
        raise ConfigError(f"audio.statistics: no file {given}; {REMEDY}") from None
    except Exception as error:  # what is no .npz can fail in any way
        reason = getattr(error, "strerror", None) or f"numpy says {type(error).__name__}"
        raise ConfigError(
            f"audio.statistics: {given} is no .npz file with mean and std ({reason}); {REMEDY}"
        ) from None
    if (
        len(mean) != len(std)
        or not len(mean)
        or not (np.isfinite(mean) & np.isfinite(std) & (std >= 0)).all()
    ):
        raise ConfigError(
            f"audio.statistics: mean and std in {given} are no pairs of finite numbers; {REMEDY}"
        )
    return " ".join(f"{m:.6g}/{s:.6g}" for m, s in zip(mean, std, strict=True))


REMEDY = (
    "compute one with: python -m avid statistics --out FILE.npz …; that of AVID-CMA's released checkpoints "
    "is datasets/assets/audio-spectDB-24k-513-norm-stats.npz of its repository"
)


def band_statistics(audio):
    """(means, deviations) of the bands of a spectrogram, dB, two tuples, or None: the same for all bands.

    Raises ConfigError where AVID's spectrogram has none, and where there are not as many as bands.
    """
    if not audio.statistics:
        if audio.frontend == "avid":
            raise ConfigError(f"audio.frontend=avid needs audio.statistics=FILE.npz; {REMEDY}")
        return None
    mean, std = _pairs(audio.statistics)
    if len(mean) != bands(audio):
        raise ConfigError(
            f"audio.statistics holds {len(mean)} bands where audio.* give {bands(audio)}; compute it anew "
            "with the same settings: python -m avid statistics"
        )
    return mean, std


@functools.lru_cache
def _pairs(text):
    return tuple(zip(*(map(float, pair.split("/")) for pair in text.split()), strict=True))


def stop(message):
    """End the program with one line and exit code 2: the user's input, not the program, is at fault."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def flat(nested, prefix=""):
    """A nested dict of settings as {dotted key: value}."""
    pairs = {}
    for key, value in nested.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def save(cfg, path):
    """Write the configuration as YAML that `load` reads, whole or not at all."""
    with files.replacing(path) as file:
        file.write(WRITTEN)
        OmegaConf.save(OmegaConf.structured(cfg), file)


MAY_CHANGE = (  # when a run goes on
    "out", "profile", "log", "eval", "finetune", "data.root", "data.workers", "data.in_memory",
    "data.decode", "data.timeout_s", "data.max_bad_share", "bank.spread", "optim.accumulate",
    "optim.checkpoint_activations", "optim.epochs", "optim.max_bad_steps", "optim.lr", "optim.clip_grad",
    "optim.amp",
)  # fmt: skip


def same_run(before, now):
    """What a run that goes on has changed: lines to print, of those settings that alter its result.

    before, now: Config, or nested dicts of settings. Raises ConfigError where a setting differs that may not.
    """
    before, now = (flat(c if isinstance(c, dict) else dataclasses.asdict(c)) for c in (before, now))
    before = {RENAMED.get(key, key): value for key, value in before.items()}
    changed = {k: f"{k} was {before[k]} and is {now[k]}" for k in now if k in before and before[k] != now[k]}
    # a setting that the checkpoint does not know of had its default
    defaults = {key: default for key, default, _ in settings()}
    changed |= {
        k: f"{k} is {now[k]}, which the run did not have"
        for k in now
        if k not in before and now[k] != defaults[k]
    }
    if fixed := [text for k, text in changed.items() if not k.startswith(MAY_CHANGE)]:
        raise ConfigError(
            f"{now['out']} holds a run with other settings ({', '.join(fixed)}); choose another --out"
        )
    return [f"from here on {text}" for k, text in changed.items() if k.startswith("optim.")]
