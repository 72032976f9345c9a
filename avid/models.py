"""The networks: one encoder and one head a modality (docs/method.md section 8).

In: float clips, video B×3×T×S×S and audio B×1×frames×bins.
Out: features (what transfers downstream) and unit embeddings (what the losses see) of both modalities.

Parameter names are those of the checkpoints released with AVID-CMA, and so are the default shapes.
"""

import contextlib
import functools
import inspect
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import config, temporal_tasks
from .files import ConfigError


class Output(NamedTuple):
    video: torch.Tensor  # B×D, unit embeddings v_i
    audio: torch.Tensor  # B×D, unit embeddings a_i
    video_features: torch.Tensor  # B×F_v, 8·width of avid's
    audio_features: torch.Tensor  # B×F_a, 8·width of avid's
    temporal: dict  # task → logits, a row a question


class R2Plus1DBlock(nn.Module):
    """Two 3×3×3 convolutions, each as 1×3×3 then 3×1×1 without a widened middle, and a shortcut [A]."""

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


class TimewiseVideo(nn.Module):
    """A small network that keeps time [C]: it looks at each frame alone, then at neighbouring ones.

    The networks above take the largest value over all time: these features say in which eighth of the clip
    something was. For what picture and sound share moment by moment, as lips and speech (docs/method.md 8).
    """

    def __init__(self, width=64):
        super().__init__()
        self.space = stack(nn.Conv3d, nn.BatchNorm3d, 3, width, (1, 3, 3), [(1, 2, 2)] * 4, (0, 1, 1))
        self.time = Timewise(9 * 4 * width, 8 * width)
        self.dim = self.time.dim

    def forward(self, x):  # B×3×T×S×S
        x = F.adaptive_avg_pool3d(self.space(x), (x.shape[2], 3, 3))  # B×4·width×T×3×3
        return self.time(x.transpose(1, 2).flatten(2).transpose(1, 2))  # B×64·width


class TimewiseAudio(nn.Module):
    """The same for sound [C]: convolutions that halve the bins, and the first two the frames, too."""

    def __init__(self, width=64):
        super().__init__()
        strides = (2, 2), (2, 2), (1, 2), (1, 2)
        self.frequency = stack(nn.Conv2d, nn.BatchNorm2d, 1, width, (3, 3), strides, (1, 1))
        self.time = Timewise(4 * 4 * width, 8 * width)
        self.dim = self.time.dim

    def forward(self, x):  # B×1×frames×bins
        x = self.frequency(x)  # B×4·width×T×bins/16
        x = F.adaptive_avg_pool2d(x, (x.shape[2], 4))  # B×4·width×T×4
        return self.time(x.transpose(2, 3).flatten(1, 2))  # B×64·width


def stack(conv, norm, c_in, width, kernel, strides, padding):
    """Four convolutions with batch norm and ReLU, of width, 2, 4 and 4 times as many channels."""
    channels, layers = (c_in, width, 2 * width, 4 * width, 4 * width), []
    for (before, after), stride in zip(itertools.pairwise(channels), strides, strict=True):
        layers += [
            conv(before, after, kernel, stride, padding, bias=False),
            norm(after),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class Timewise(nn.Module):
    """B×c_in×T → a convolution over neighbouring times, and its mean in each eighth of them: B×8·c_out."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm1d(c_out)
        self.dim = 8 * c_out

    def forward(self, x):
        return F.adaptive_avg_pool1d(F.relu(self.bn(self.conv(x))), 8).flatten(1)


class Head(nn.Module):
    """MLP from features to embeddings: three linear layers, ReLU between [A].

    norm="batch" puts batch norm behind each layer, the last one without scale and shift [C]: it takes away
    the direction that all embeddings of an untrained network share (docs/method.md section 11).
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
    """A video network of torchvision's without its classifier. Its width, 64, and its depth are its own."""
    import torchvision  # here: it takes two seconds

    network = getattr(torchvision.models.video, name)(weights=None)
    if name == "s3d":
        network.dim = network.classifier[1].in_channels
        network.avgpool, network.classifier = nn.AdaptiveAvgPool3d(1), nn.Identity()
    else:
        network.dim = network.fc.in_features
        network.fc = nn.Identity()
    return network


# name → constructor of a module with a `dim`: from clips, B×3×T×S×S or B×1×frames×bins, to features B×dim.
# It is given those of its SIZES, settings of model.*, that are among its parameters.
VIDEO = {
    "avid": R2Plus1D,
    "timewise": TimewiseVideo,
    "r2plus1d_18": functools.partial(torchvision_network, "r2plus1d_18"),
    "r3d_18": functools.partial(torchvision_network, "r3d_18"),
    "s3d": functools.partial(torchvision_network, "s3d"),
}
AUDIO = {"avid": AudioNet, "timewise": TimewiseAudio}
NETWORKS = {"video": VIDEO, "audio": AUDIO}
SIZES = {"video": ("width", "depth"), "audio": ("width",)}


def constructor(model, modality):
    """What model.video or model.audio names, and the sizes that it takes. Raises ConfigError if unknown."""
    networks, name = NETWORKS[modality], getattr(model, modality)
    if name not in networks:
        raise ConfigError(f"wrong value for model.{modality}: {name}; expected one of {', '.join(networks)}")
    parameters = inspect.signature(networks[name]).parameters
    return networks[name], [size for size in SIZES[modality] if size in parameters]


def encoder(model, modality):
    """The network of a modality as config.Model describes it, drawn from torch's global generator."""
    build, taken = constructor(model, modality)
    return build(**{size: getattr(model, size) for size in taken})


def check(model):
    """Raise ConfigError where config.Model names an unknown network, or a size that its network has not."""
    for modality in NETWORKS:
        _, taken = constructor(model, modality)
        for size in SIZES[modality]:
            value, default = getattr(model, size), getattr(config.Model(), size)
            if size not in taken and value != default:
                name = f"model.{modality}={getattr(model, modality)}"
                raise ConfigError(
                    f"wrong value for model.{size}: {value}; expected {default}, {name} has its own {size}"
                )


class AudioVisual(nn.Module):
    """Both encoders, both heads, and those of the temporal tasks.

    model: config.Model; tasks: {task: number of classes}, of temporal_tasks.classes. The networks are drawn
    from torch's global generator: seed it first. Raises ConfigError for the name of an unknown network.
    """

    def __init__(self, model, tasks=()):
        super().__init__()
        self.embedding = model.embedding
        self.video_model, self.audio_model = encoder(model, "video"), encoder(model, "audio")
        self.video_proj = Head(self.video_model.dim, model.embedding, model.head_norm)
        self.audio_proj = Head(self.audio_model.dim, model.embedding, model.head_norm)
        dims = {"video": self.video_model.dim, "audio": self.audio_model.dim}
        self.temporal = temporal_tasks.Heads(dims, dict(tasks))
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # [C]
        self.video_model.to(memory_format=torch.channels_last_3d)
        self.audio_model.to(memory_format=torch.channels_last)

    def encode_video(self, video):
        """B×3×T×S×S → unit embeddings v_i B×D, features B×F_v, both float32."""
        features = self.video_model(video.contiguous(memory_format=torch.channels_last_3d)).float()
        return self.video_proj(features), features

    def encode_audio(self, audio):
        """B×1×frames×bins → unit embeddings a_i B×D, features B×F_a, both float32."""
        features = self.audio_model(audio.contiguous(memory_format=torch.channels_last)).float()
        return self.audio_proj(features), features

    def encode(self, modality, clips):
        """encode_video or encode_audio, by name."""
        return self.encode_video(clips) if modality == "video" else self.encode_audio(clips)

    def nothing(self, modality, n):
        """What `encode` gives of n clips that are not there: zeros n×D, n×F. Backward ends at them, so that
        it runs where a batch, or the share of one rank, has nothing that a term is about."""
        like, dims = next(self.parameters()), (self.embedding, getattr(self, f"{modality}_model").dim)
        return tuple(like.new_zeros(n, dim, requires_grad=True) for dim in dims)

    def forward(self, video, audio):
        """Float clips, B×3×T×S×S and B×1×frames×bins → Output. A video's two clips stand side by side.

        Where one of them is None, no file of the batch has it: its embeddings and features are zeros.
        """
        v, video_features = self.nothing("video", len(audio)) if video is None else self.encode_video(video)
        a, audio_features = self.nothing("audio", len(video)) if audio is None else self.encode_audio(audio)
        return Output(v, a, video_features, audio_features, self.temporal(video_features, audio_features))


def checkpoint_activations(network):
    """Have both encoders keep only what stands between their blocks; backward computes the rest again.

    network: AudioVisual, changed in place: the same outputs, gradients, names of parameters and running
    statistics, for the time of a second forward pass. Raises ConfigError where an encoder has no blocks, or
    dropout, which the second pass would draw anew.
    """
    for encoder in (network.video_model, network.audio_model):
        found = list(blocks(encoder))
        if not found or any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in encoder.modules()):
            raise ConfigError(
                f"optim.checkpoint_activations=true cannot be had with {type(encoder).__name__}, which has "
                f"{'dropout' if found else 'no blocks'}; leave it out, or choose another network (model.*)"
            )
        for block in found:
            block.forward = functools.partial(recomputed, block, block.forward)


def blocks(encoder):
    """The children of an encoder that have layers of their own; of a sequence of such blocks, each."""
    for child in encoder.children():
        inner = list(child.children())
        if isinstance(child, nn.Sequential) and any(list(layer.children()) for layer in inner):
            yield from inner
        elif inner:  # a block, or a stem of plain layers
            yield child


def recomputed(block, forward, *inputs):
    """forward(*inputs) of a block, whose activations are not kept for backward."""
    # compiled, the second pass has no side effects as it is, and takes no context
    contexts = (
        {}
        if torch.compiler.is_compiling()
        else {"context_fn": lambda: (contextlib.nullcontext(), buffers_kept(block))}
    )
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **contexts)


def in_parts(network, parts):
    """Have both encoders take a training batch in `parts` equal parts, one after the other.

    network: AudioVisual, changed in place. Of a part only the output is kept, and backward computes it again:
    the memory of one part, for the time of a second forward pass. The loss sees the whole batch; batch norm
    has the statistics of a part, and its running ones move once a part. Raises ConfigError where there is
    dropout, which the second pass would draw anew.
    """
    if any(isinstance(layer, nn.modules.dropout._DropoutNd) for layer in network.modules()):
        raise ConfigError(
            f"optim.accumulate={parts} cannot be had with dropout; leave it out, or choose another network "
            "(model.*)"
        )

    def encode(modules, whole, clips):
        if not network.training:
            return whole(clips)
        outputs = [recomputed(modules, whole, part) for part in clips.chunk(parts)]
        return tuple(map(torch.cat, zip(*outputs, strict=True)))

    for modality in NETWORKS:
        # what has buffers, which the second pass must leave alone
        modules = nn.ModuleList([getattr(network, f"{modality}_model"), getattr(network, f"{modality}_proj")])
        whole = getattr(network, f"encode_{modality}")
        setattr(network, f"encode_{modality}", functools.partial(encode, modules, whole))


@contextlib.contextmanager
def buffers_kept(block):
    """Within, batch norm counts a batch in copies of its running statistics: the block's own stay."""
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
    """Load a checkpoint's dict into an AudioVisual, whole or not at all; path: for messages.

    state: one of train.py's, {"network": …}, or one released with AVID-CMA, {"model": …}, whose names begin
    with "module.". Raises ModelError for missing, left-over or wrongly shaped parameters.
    """
    weights = state.get("network", state.get("model"))
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ModelError(
            f"{path} holds neither a network of this project nor an AVID-CMA model, only {_some(state)}; "
            "give a last.pt of train.py, or a released AVID-CMA checkpoint"
        )
    weights = {str(name).removeprefix("module."): weight for name, weight in weights.items()}
    own = network.state_dict()
    both = own.keys() & weights.keys()
    wrong = {
        "missing": [name for name in own if name not in weights],
        "left over": [name for name in weights if name not in own],
        "of another shape": [name for name in own if name in both and weights[name].shape != own[name].shape],
    }
    if any(wrong.values()):
        faults = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in wrong.items() if names)
        raise ModelError(
            f"{path} does not fit the network that the settings describe: {faults}; "
            "give those that it was trained with (model.*, weights.*), by --cfg or key=value"
        )
    network.load_state_dict(weights)


def _some(names):
    return ", ".join([*map(str, list(names)[:5]), *["…"][: len(names) > 5]])
