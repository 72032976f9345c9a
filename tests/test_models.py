"""The networks against the checkpoints released with AVID-CMA, and against section 8 of docs/method.md."""

import ast
from pathlib import Path

import pytest
import torch

from avid import config, models

RELEASED = {  # {name in a released checkpoint: shape}
    name: ast.literal_eval(shape)
    for name, shape in (
        line.split(" ", 1)
        for line in (Path(__file__).parent / "avid_checkpoint_keys.txt").read_text().splitlines()
        if not line.startswith("#")
    )
}
SMALL = {"width": 8, "depth": 1, "embedding": 16}
TASKS = {"speed_video": 4, "direction_audio": 2, "order_video": 3, "order_cross": 3}


def network(tasks=(), seed=0, **model):
    # torchvision's networks have one size
    small = SMALL if model.get("video", "avid") == "avid" else {"embedding": 16}
    torch.manual_seed(seed)
    return models.AudioVisual(config.Model(**{**small, **model}), tasks)


def clips(batch=4, frames=8, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, frames, size, size, generator=generator), torch.randn(
        batch, 1, 40, 32, generator=generator
    )


@pytest.fixture(scope="module")
def released():
    """The network of the default configuration."""
    torch.manual_seed(0)
    return models.AudioVisual(config.Model())


# --------------------------------------------------------------------------------------- released checkpoints


def test_names_and_shapes_are_those_of_the_released_checkpoints(released):
    shapes = {f"module.{name}": tuple(tensor.shape) for name, tensor in released.state_dict().items()}
    assert shapes == RELEASED


def test_a_released_checkpoint_loads(released):
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.randn(shape, generator=generator) for name, shape in RELEASED.items() if shape}
    state |= {name: torch.tensor(7) for name, shape in RELEASED.items() if not shape}
    models.load(released, {"model": state, "epoch": 400}, "AVID.pth.tar")
    for name, tensor in released.state_dict().items():
        assert torch.equal(tensor, state[f"module.{name}"]), name


def test_released_names_and_own_names_give_the_same_features():
    one, native, released_ = network(seed=1), network(seed=2), network(seed=3)
    state = one.state_dict()
    models.load(native, {"network": state}, "last.pt")
    models.load(
        released_,
        {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 1},
        "AVID.pth.tar",
    )
    video, audio = torch.randn(2, 3, 4, 32, 32), torch.randn(2, 1, 40, 33)
    for x, y in zip(native.eval()(video, audio)[:4], released_.eval()(video, audio)[:4], strict=True):
        assert torch.equal(x, y)


def test_a_checkpoint_of_this_project_loads():
    one, other = network(seed=1), network(seed=2)
    models.load(other, {"network": one.state_dict()}, "last.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_tensors_that_do_not_fit_are_named():
    state = network().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    into = network(seed=0)
    wrong = dict(state)
    wrong["video_proj.projection.4.weight"] = torch.zeros(3, 3)
    wrong["classifier.weight"] = wrong.pop("audio_model.conv1.0.weight")
    with pytest.raises(models.ModelError) as caught:
        models.load(into, {"network": wrong}, "some.pt")
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "some.pt",
        "1 missing: audio_model.conv1.0.weight",
        "1 left over: classifier.weight",
        "1 of another shape: video_proj.projection.4.weight",
    ):
        assert part in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in into.state_dict().items())  # untouched
    with pytest.raises(models.ModelError, match=r"some.pt holds neither .* only step, bank"):
        models.load(into, {"step": 1, "bank": {}}, "some.pt")
    for other in ({"model": torch.zeros(2)}, {"network": {"epoch": 3}}):
        with pytest.raises(models.ModelError, match=r"some.pt holds neither .* only (model|network)"):
            models.load(into, other, "some.pt")


# ----------------------------------------------------------------------------------------------- architecture


def test_the_video_network_halves_time_and_space_as_described(released):
    """Stem and pooling quarter the space, stages 2 to 4 halve time and space: 8×64² becomes 512×1×2×2."""
    shapes = []
    hooks = [
        getattr(released.video_model, name).register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape[1:]))
        )
        for name in ("conv1", "conv2x", "conv3x", "conv4x", "conv5x")
    ]
    with torch.no_grad():
        embedding, features = released.eval().encode_video(torch.randn(1, 3, 8, 64, 64))
    for hook in hooks:
        hook.remove()
    assert shapes == [(64, 8, 16, 16), (64, 8, 16, 16), (128, 4, 8, 8), (256, 2, 4, 4), (512, 1, 2, 2)]
    assert (embedding.shape, features.shape) == ((1, 128), (1, 512))


def test_every_part_of_the_audio_network_but_the_last_halves_its_input(released):
    shapes = []
    hooks = [
        getattr(released.audio_model, name).register_forward_hook(
            lambda module, inputs, output: shapes.append(tuple(output.shape[1:]))
        )
        for name in ("conv1", "block1", "block2", "block3", "block4")
    ]
    with torch.no_grad():
        embedding, features = released.eval().encode_audio(torch.randn(1, 1, 200, 80))
    for hook in hooks:
        hook.remove()
    assert shapes == [(64, 100, 40), (64, 50, 20), (128, 25, 10), (256, 13, 5), (512, 13, 5)]
    assert (embedding.shape, features.shape) == ((1, 128), (1, 512))


@pytest.mark.parametrize("modality, last", [("video", "conv5x"), ("audio", "block4")])
def test_features_are_the_largest_values_over_time_and_space(modality, last):
    model, maps = network().eval(), []
    getattr(getattr(model, f"{modality}_model"), last).register_forward_hook(
        lambda module, inputs, output: maps.append(output)
    )
    _, features = model.encode(modality, dict(zip(("video", "audio"), clips(size=64), strict=True))[modality])
    assert maps[0][0, 0].numel() > 1
    torch.testing.assert_close(features, maps[0].flatten(2).max(2).values)


def test_a_block_adds_its_input():
    """y = ReLU(BN(F(x) + shortcut(x))): with F = 0 the normalised shortcut is left."""
    block = models.R2Plus1DBlock(4, 4, stride=1).train()
    torch.nn.init.zeros_(block.tmp_conv2.weight)
    x = torch.randn(2, 4, 3, 5, 5)
    normal = (x - x.mean((0, 2, 3, 4), keepdim=True)) / x.std((0, 2, 3, 4), keepdim=True, correction=0)
    torch.testing.assert_close(block(x), normal.clamp_min(0), atol=1e-4, rtol=1e-4)
    wider = models.R2Plus1DBlock(4, 6, stride=2)
    assert wider(x).shape == (2, 6, 2, 3, 3)
    assert wider.res_conv.weight.shape == (6, 4, 1, 1, 1)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("depth", [1, 3])
def test_width_and_depth_set_the_size_of_the_networks(width, depth):
    model = network(width=width, depth=depth, embedding=10)
    assert len(model.video_model.conv3x) == depth
    output = model(*clips())
    assert output.video_features.shape == output.audio_features.shape == (4, 8 * width)
    assert output.video.shape == output.audio.shape == (4, 10)


EVERY = [(modality, name) for modality, networks in models.NETWORKS.items() for name in networks]


@pytest.mark.parametrize("modality, backbone", EVERY)
def test_every_backbone_gives_features_and_embeddings(modality, backbone):
    model = network(**{modality: backbone}).eval()
    video, audio = clips(batch=2, frames=16, size=64)
    with torch.no_grad():
        output = model(video, audio)
    assert output.video_features.shape == (2, model.video_model.dim)
    assert output.audio_features.shape == (2, model.audio_model.dim)
    assert output.video.shape == output.audio.shape == (2, 16)
    for embeddings, features in zip(output[:2], output[2:4], strict=True):
        assert torch.isfinite(embeddings).all()
        assert not torch.allclose(features[0], features[1])


@pytest.mark.parametrize("modality, backbone", EVERY)
def test_a_size_that_a_backbone_does_not_take_is_an_error(modality, backbone):
    """Every size either changes the network or is refused by name, with what to write instead."""
    sizes = {"width": 8, "depth": 1} if modality == "video" else {"width": 8}
    for size, value in sizes.items():
        model = config.Model(**{modality: backbone, size: value})
        built, default = (
            models.encoder(m, modality).state_dict() for m in (model, config.Model(**{modality: backbone}))
        )
        changed = {n: x.shape for n, x in built.items()} != {n: x.shape for n, x in default.items()}
        assert changed == (backbone == "avid" or (backbone == "timewise" and size == "width"))
        if changed:
            models.check(model)
        else:
            default = getattr(config.Model(), size)
            expected = f"model.{size}: {value}; expected {default}, model.{modality}={backbone}"
            with pytest.raises(config.ConfigError, match=expected):
                models.check(model)


@pytest.mark.parametrize("modality", models.NETWORKS)
def test_timewise_features_say_when_something_happens(modality):
    """An event in one eighth of a clip changes the features of this eighth, and hardly any others: picture,
    its neighbours'; sound, two on either side, as far as its convolutions reach."""
    reach = {"video": 1, "audio": 2}[modality]
    torch.manual_seed(0)
    encoder = models.encoder(config.Model(**{modality: "timewise"}), modality).eval()
    video, audio = clips(batch=1, frames=16)
    clip = video if modality == "video" else audio.repeat(1, 1, 2, 1)[:, :, :64]
    plain, eighth = encoder(clip).view(-1, 8), clip.shape[2] // 8  # of its features, the time comes last
    for when in range(8):
        changed = clip.clone()
        changed[:, :, when * eighth : (when + 1) * eighth] += 1
        differs = (encoder(changed).view(-1, 8) - plain).abs().amax(0) > 1e-4
        assert differs[when]
        assert not differs[: max(when - reach, 0)].any() and not differs[when + reach + 1 :].any()


def test_the_audio_network_has_the_width_of_the_torchvision_network_beside_it():
    model = config.Model(video="r3d_18")
    models.check(model)
    assert model.width == 64
    both = [models.encoder(model, modality) for modality in ("video", "audio")]
    assert [next(network.parameters()).shape[0] for network in both] == [64, 64]
    assert [network.dim for network in both] == [512, 512]


def test_a_checkpoint_from_when_sizes_were_ignored_still_loads():
    """Then torchvision's networks accepted any width and depth, and the audio network had that width."""
    one, other = (network(seed=seed, video="r3d_18", width=8, depth=1) for seed in (1, 2))
    assert (one.video_model.dim, one.audio_model.dim) == (512, 64)
    models.load(other, {"network": one.state_dict()}, "last.pt")
    assert torch.equal(one.audio_proj.projection[0].weight, other.audio_proj.projection[0].weight)


# ------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("head_norm", ["none", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_embeddings_have_unit_length(head_norm, training):
    output = network(head_norm=head_norm).train(training)(*clips())
    for embedding in (output.video, output.audio):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4))
        assert embedding.dtype == torch.float32


def test_embeddings_have_unit_length_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        output = network()(*clips())
    for embedding, features in ((output.video, output.video_features), (output.audio, output.audio_features)):
        assert embedding.dtype == features.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)


def test_batch_norm_in_the_heads_removes_the_common_direction():
    """Without it, the embeddings of an untrained network all point in nearly the same direction."""

    def mean_cosine(head_norm):
        v = network(head_norm=head_norm).train()(*clips(batch=16)).video.detach()
        return ((v @ v.T).sum() - 16) / (16 * 15)

    assert mean_cosine("none") > 0.8
    assert abs(mean_cosine("batch")) < 0.2


def test_batch_norm_follows_each_layer_and_the_last_has_no_scale_and_shift():
    names = [name for name, _ in network(head_norm="batch").video_proj.named_parameters()]
    assert names == [
        f"projection.{at}.{what}" for at, what in ((0, "weight"), (1, "weight"), (1, "bias"))
    ] + [f"projection.{at}.{what}" for at, what in ((3, "weight"), (4, "weight"), (4, "bias"), (6, "weight"))]


def test_in_evaluation_a_clip_does_not_depend_on_the_others():
    model, (video, audio) = network(head_norm="batch").eval(), clips()
    together, alone = model(video, audio), model(video[2:3], audio[2:3])
    torch.testing.assert_close(together.video[2:3], alone.video, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.audio[2:3], alone.audio, atol=1e-5, rtol=1e-4)


def test_encode_equals_forward_of_one_modality():
    model, (video, audio) = network().eval(), clips()
    output = model(video, audio)
    for modality, x, embedding, features in (
        ("video", video, output.video, output.video_features),
        ("audio", audio, output.audio, output.audio_features),
    ):
        assert torch.equal(model.encode(modality, x)[0], embedding)
        assert torch.equal(model.encode(modality, x)[1], features)


@pytest.mark.parametrize("head_norm", ["none", "batch"])
@pytest.mark.parametrize("tasks", [{}, TASKS], ids=["without tasks", "with tasks"])
def test_the_gradient_reaches_every_parameter(head_norm, tasks):
    model = network(tasks, head_norm=head_norm).train()
    output = model(*clips(batch=8))
    torch.manual_seed(1)
    sum(
        (x * torch.randn_like(x)).sum() for x in (output.video, output.audio, *output.temporal.values())
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_temporal_heads_give_logits_of_their_classes():
    output = network(TASKS)(*clips(batch=6))
    shapes = {task: tuple(logits.shape) for task, logits in output.temporal.items()}
    assert shapes == {
        "speed_video": (6, 4),
        "direction_audio": (6, 2),
        "order_video": (3, 3),
        "order_cross": (6, 3),
    }


def test_the_seed_decides_the_network():
    one, same, other = (network(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["video_model.conv1.0.weight"], other["video_model.conv1.0.weight"])


# ----------------------------------------------------------------------------------------------------- memory


def step(forward, inputs, parameters):
    """Forward and backward: (loss, bytes that forward kept for backward, without the parameters)."""
    kept, own = {}, {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = forward(*inputs)
        outputs = [x for x in outputs if torch.is_tensor(x)]
        torch.manual_seed(1)
        loss = sum((x * torch.randn_like(x)).sum() for x in outputs)
    loss.backward()
    return loss.detach(), sum(kept.values())


@pytest.mark.parametrize("modality, backbone", EVERY)
def test_checkpointed_activations_give_the_same_step_from_less_memory(modality, backbone):
    """Bit for bit: outputs, gradients, running statistics (a batch counts once) and all names."""
    plain, checkpointed = (network(**{modality: backbone}).train() for _ in range(2))
    models.checkpoint_activations(checkpointed)
    plain, checkpointed = (getattr(model, f"{modality}_model") for model in (plain, checkpointed))
    frames, size = {"s3d": (8, 64), "avid": (8, 32)}.get(backbone, (4, 32))
    clip = clips(batch=2, frames=frames, size=size)[modality == "audio"]
    (loss, kept), (loss_again, kept_again) = (
        step(lambda x, m=model: [m(x)], [clip], model.parameters()) for model in (plain, checkpointed)
    )
    assert torch.equal(loss, loss_again)
    assert kept_again < 0.5 * kept
    for (name, one), (name_again, other) in zip(
        plain.named_parameters(), checkpointed.named_parameters(), strict=True
    ):
        assert name == name_again
        assert torch.equal(one.grad, other.grad), name
    state = checkpointed.state_dict()
    assert state.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert not name.endswith("num_batches_tracked") or value == 1


@pytest.mark.parametrize("modality", ["video", "audio"])
def test_checkpointed_activations_give_the_same_step_when_compiled(modality):
    plain, checkpointed = (network(width=4).train() for _ in range(2))
    models.checkpoint_activations(checkpointed)
    one, other = (getattr(model, f"{modality}_model") for model in (plain, checkpointed))
    clip = clips()[modality == "audio"]
    loss, _ = step(one, (clip,), one.parameters())
    loss_again, _ = step(
        torch.compile(other, backend="aot_eager_decomp_partition"), (clip,), other.parameters()
    )
    torch.testing.assert_close(loss, loss_again, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-3 * a.grad.norm(), name
    for (name, a), b in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers, fault", [([], "no blocks"), ([torch.nn.Dropout(0.5)], "dropout")])
def test_a_network_that_cannot_be_checkpointed_says_so(layers, fault):
    """Plain layers only: nothing would be saved. Dropout: the second pass would drop other features."""
    model = network()
    stem = torch.nn.Conv2d(1, 4, 3)
    model.audio_model = torch.nn.Sequential(torch.nn.Sequential(stem, *layers) if layers else stem)
    with pytest.raises(config.ConfigError, match=f"checkpoint_activations=true cannot be had .* {fault}"):
        models.checkpoint_activations(model)


def test_checkpointed_activations_change_nothing_in_evaluation():
    model, (video, audio) = network().eval(), clips()
    before = model(video, audio)
    models.checkpoint_activations(model)
    with torch.inference_mode():
        after = model(video, audio)
    assert all(torch.equal(x, y) for x, y in zip(before[:4], after[:4], strict=True))
