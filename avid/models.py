"""The networks: one encoder and one head a modality (docs/method.md section 8).

In: float clips, video B×3×T×S×S and audio B×1×frames×bins.
Out: features (what transfers downstream) and unit embeddings (what the losses see) of both modalities.

Parameter names are those of the checkpoints released with AVID-CMA, which the default configuration matches shape by shape.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import config, temporal_tasks
from .files import ConfigError


class Output(NamedTuple):
    video: torch.Tensor  # B×D, unit embeddings v_i
    audio: torch.Tensor  # B×D, unit embeddings a_i
    video_features: torch.Tensor  # B×8·width
    audio_features: torch.Tensor  # B×8·width
    temporal: dict  # task → logits


class R2Plus1DBlock(nn.Module):
    """Two 3×3×3 convolutions, each factored into 1×3×3 then 3×1×1 without a widened middle, and a shortcut [A]."""

    def __init__(self, c_in, c_out, stride):  # stride in time, height and width alike
        super().__init__()
        self.spt_conv1 = nn.Conv3d(c_in, c_out, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.spt_bn1 = nn.BatchNorm3d(c_out)
        self.tmp_conv1 = nn.Conv3d(c_out, c_out, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)
        self.tmp_bn1 = nn.BatchNorm3d(c_out)
        self.spt_conv2 = nn.Conv3d(c_out, c_out, (1, 3, 3), 1, (0, 1, 1), bias=False)
        self.spt_bn2 = nn.BatchNorm3d(c_out)
        self.tmp_conv2 = nn.Conv3d(c_out, c_out, (3, 1, 1), 1, (1, 0, 0), bias=False)
        self.out_bn = nn.BatchNorm3d(c_out)
        if stride != 1 or c_in != c_out:
            self.res_conv = nn.Conv3d(c_in, c_out, 1, stride, bias=False)  # no batch norm on the shortcut [A]
        else:
            self.res_conv = nn.Identity()

    def forward(self, x):  # B×C×T×H×W
        y = F.relu(self.spt_bn1(self.spt_conv1(x)))
        y = F.relu(self.tmp_bn1(self.tmp_conv1(y)))
        y = F.relu(self.spt_bn2(self.spt_conv2(y)))
        return F.relu(self.out_bn(self.tmp_conv2(y) + self.res_conv(x)))


class R2Plus1D(nn.Module):
    """The video network: R(2+1)D-18 as AVID builds it [A] for width 64 and depth 2."""

    def __init__(self, width=64, depth=2):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv3d(3, width, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            first = R2Plus1DBlock(channels[stage - 1], channels[stage], stride=1 if stage == 1 else 2)
            rest = [R2Plus1DBlock(channels[stage], channels[stage], stride=1) for _ in range(depth - 1)]
            setattr(self, f"conv{stage + 1}x", nn.Sequential(first, *rest))
        self.dim = channels[-1]

    def forward(self, x):  # B×3×T×S×S
        x = self.conv5x(self.conv4x(self.conv3x(self.conv2x(self.conv1(x)))))
        return x.amax((2, 3, 4))  # B×8·width


class AudioBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and ReLU, no shortcut [A]."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x):  # B×C×frames×bins
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class AudioNet(nn.Module):
    """The audio network: nine 2-D convolutions over the spectrogram [A]."""

    def __init__(self, width=64):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(1, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.block1 = AudioBlock(width, width, 2)
        self.block2 = AudioBlock(width, 2 * width, 2)
        self.block3 = AudioBlock(2 * width, 4 * width, 2)
        self.block4 = AudioBlock(4 * width, 8 * width, 1)
        self.dim = 8 * width

    def forward(self, x):  # B×1×frames×bins
        x = self.block4(self.block3(self.block2(self.block1(self.conv1(x)))))
        return x.amax((2, 3))  # B×8·width


class Head(nn.Module):
    """MLP from features to embeddings: three linear layers, ReLU between [A].

    norm="batch" puts batch norm behind each layer, the last one without scale and shift [C]: it takes away the direction
    that all embeddings of an untrained network share (docs/method.md section 11).
    """

    def __init__(self, dim, embedding, norm="none"):
        super().__init__()
        plain = norm == "none"
        layers = []
        for _ in range(2):
            # a bias before batch norm would have no gradient but rounding noise, which Adam would blow up
            layers += (
                [nn.Linear(dim, dim, bias=plain)] + ([] if plain else [nn.BatchNorm1d(dim)]) + [nn.ReLU()]
            )
        layers += [nn.Linear(dim, embedding, bias=plain)] + (
            [] if plain else [nn.BatchNorm1d(embedding, affine=False)]
        )
        self.projection = nn.Sequential(*layers)

    def forward(self, features):  # B×dim
        return F.normalize(self.projection(features).float(), dim=1)  # B×D, unit length


def torchvision_network(name):
    """A video network of torchvision's without its classifier; its width and depth are what they are."""

    def build(width, depth):
        if (width, depth) != (config.Model().width, config.Model().depth):
            raise ConfigError(
                f"model.video={name} takes no model.width and no model.depth; leave both out, or use avid"
            )
        network = getattr(torchvision.models.video, name)(weights=None)
        if name == "s3d":
            network.dim = network.classifier[1].in_channels
            network.avgpool, network.classifier = nn.AdaptiveAvgPool3d(1), nn.Identity()
        else:
            network.dim = network.fc.in_features
            network.fc = nn.Identity()
        return network

    return build


VIDEO = {"avid": R2Plus1D} | {name: torchvision_network(name) for name in ("r2plus1d_18", "r3d_18", "s3d")}
AUDIO = {"avid": AudioNet}


def check(model):
    """Raise ConfigError where config.Model names a network that there is not."""
    for key, networks in (("video", VIDEO), ("audio", AUDIO)):
        if (name := getattr(model, key)) not in networks:
            raise ConfigError(f"wrong value for model.{key}: {name}; expected one of {', '.join(networks)}")


class AudioVisual(nn.Module):
    """Both encoders, both heads, and those of the temporal tasks.

    model: config.Model; tasks: {task: classes}, of temporal_tasks.classes. The networks are drawn from torch's global generator: seed it first.
    """

    def __init__(self, model, tasks=()):
        super().__init__()
        check(model)
        self.video_model = VIDEO[model.video](model.width, model.depth)
        self.audio_model = AUDIO[model.audio](model.width)
        self.video_proj = Head(self.video_model.dim, model.embedding, model.head_norm)
        self.audio_proj = Head(self.audio_model.dim, model.embedding, model.head_norm)
        dims = {"video": self.video_model.dim, "audio": self.audio_model.dim}
        self.temporal = temporal_tasks.Heads(dims, dict(tasks))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # [C]
        self.video_model.to(memory_format=torch.channels_last_3d)
        self.audio_model.to(memory_format=torch.channels_last)

    def encode_video(self, video):
        """B×3×T×S×S → unit embeddings v_i B×D, features B×8·width, both float32."""
        features = self.video_model(video.contiguous(memory_format=torch.channels_last_3d)).float()
        return self.video_proj(features), features

    def encode_audio(self, audio):
        """B×1×frames×bins → unit embeddings a_i B×D, features B×8·width, both float32."""
        features = self.audio_model(audio.contiguous(memory_format=torch.channels_last)).float()
        return self.audio_proj(features), features

    def encode(self, modality, clips):
        """encode_video or encode_audio, by name."""
        return self.encode_video(clips) if modality == "video" else self.encode_audio(clips)

    def forward(self, video, audio):
        """Normalised float clips, B×3×T×S×S and B×1×frames×bins → Output. With two moments, a video's clips stand side by side."""
        (v, video_features), (a, audio_features) = self.encode_video(video), self.encode_audio(audio)
        return Output(v, a, video_features, audio_features, self.temporal(video_features, audio_features))


def checkpoint_activations(network):
    """Have the video network keep only what stands between its blocks; backward computes the rest again, block by block.

    network: an AudioVisual, changed in place: the same outputs, gradients, names of parameters and running statistics, for the
    time of a second forward pass of the video network.
    """
    for stage in network.video_model.children():
        blocks = list(stage.children()) if isinstance(stage, nn.Sequential) else []
        whole = not any(list(block.children()) for block in blocks)  # a stem of plain layers
        for block in [stage] if whole else blocks:
            block.forward = functools.partial(recomputed, block, block.forward)


def recomputed(block, forward, x):
    """forward(x) of a block, whose activations are not kept for backward."""
    # compiled, the second pass has no side effects as it is, and takes no context
    contexts = (
        {}
        if torch.compiler.is_compiling()
        else {"context_fn": lambda: (contextlib.nullcontext(), buffers_kept(block))}
    )
    return checkpoint(forward, x, use_reentrant=False, preserve_rng_state=False, **contexts)


@contextlib.contextmanager
def buffers_kept(block):
    """Within, batch norm counts a batch in copies of its running statistics: those of the block stay as they are."""
    kept = [
        (module, name, buffer)
        for module in block.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


class ModelError(Exception):
    """A checkpoint whose parameters are not this network's; the message names them."""


def load(network, state, path):
    """Load a checkpoint dict into an AudioVisual: one of train.py's, or one released with AVID-CMA, known by its key `model` and
    names that begin with "module.". path: for messages. Raises ModelError for missing, left-over or wrongly shaped parameters."""
    if "network" not in state and "model" not in state:
        raise ModelError(
            f"{path} holds neither a network of this project nor an AVID-CMA model, only {', '.join(map(str, state))}"
        )
    weights = state.get("network") or {name.removeprefix("module."): w for name, w in state["model"].items()}
    mine = network.state_dict()
    wrong = {
        "missing": [name for name in mine if name not in weights],
        "left over": [name for name in weights if name not in mine],
        "of another shape": [
            name for name in mine if name in weights and weights[name].shape != mine[name].shape
        ],
    }
    if any(wrong.values()):
        faults = "; ".join(
            f"{len(names)} {fault}: {', '.join(names[:5])}{', …' if names[5:] else ''}"
            for fault, names in wrong.items()
            if names
        )
        raise ModelError(f"{path} does not fit the network that the settings describe (model.*): {faults}")
    network.load_state_dict(weights)
