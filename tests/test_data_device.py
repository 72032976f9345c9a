"""Batches on the device: flip, colour, masks and normalisation, each against plain numbers."""

import numpy as np
import pytest
import torch

from avid import config
from avid.data import augment, hue_rotation, mask, to_device


def videos(batch=3, seed=0):
    return torch.rand(batch, 3, 2, 5, 6, generator=torch.Generator().manual_seed(seed))


def off(batch=3):
    """No flip, no jitter, no grey."""
    return {
        "flip": torch.zeros(batch, dtype=torch.bool),
        "jitter": torch.zeros(batch, 4),
        "grey": torch.zeros(batch, dtype=torch.bool),
    }


def jitter(*strengths):
    return torch.tensor([strengths]).expand(3, 4)


def test_without_jitter_and_flip_nothing_changes():
    torch.testing.assert_close(augment(videos(), **off()), videos(), atol=1e-6, rtol=0)


def test_a_flip_mirrors_some_clips_from_left_to_right():
    flip = torch.tensor([True, False, True])
    flipped = augment(videos(), **{**off(), "flip": flip})
    torch.testing.assert_close(flipped[flip], videos()[flip].flip(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(flipped[~flip], videos()[~flip], atol=1e-6, rtol=0)


def test_all_frames_of_a_clip_are_changed_alike():
    still = videos()[:, :, :1].expand(-1, -1, 4, -1, -1).contiguous()
    strong = torch.tensor([[0.3, -0.2, 0.4, 0.1], [-0.4, 0.4, -0.4, -0.2], [0.1, 0.1, 0.1, 0.5]])
    changed = augment(still, **{**off(), "flip": torch.tensor([True, False, True]), "jitter": strong})
    torch.testing.assert_close(changed, changed[:, :, :1].expand_as(changed))
    assert not torch.allclose(changed, still, atol=0.01)
    for k in range(3):  # a clip changes as it would alone
        alone = augment(still[k : k + 1], torch.tensor([k != 1]), strong[k : k + 1], torch.tensor([False]))
        torch.testing.assert_close(changed[k : k + 1], alone)


def test_values_stay_between_0_and_1():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        strong = torch.rand(3, 4, generator=generator) * 2 - 1
        changed = augment(videos(), **{**off(), "jitter": strong * torch.tensor([1, 1, 1, 0.5])})
        assert changed.min() >= 0
        assert changed.max() <= 1


def test_brightness_contrast_and_saturation_in_plain_numbers():
    """As in torchvision: brightness scales, contrast blends with the mean grey, saturation with each pixel's
    grey.
    """
    x = videos() * 0.5
    luma = (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None, None]).sum(1, keepdim=True)
    mean = luma.mean((1, 2, 3, 4), keepdim=True)
    for strengths, expected in (
        ((0.3, 0, 0, 0), 1.3 * x),
        ((0, 0.4, 0, 0), 1.4 * (x - mean) + mean),
        ((0, -1.0, 0, 0), mean.expand_as(x)),
        ((0, 0, 0.4, 0), 1.4 * x - 0.4 * luma),
        ((0, 0, -1.0, 0), luma.expand_as(x)),
    ):
        changed = augment(x.clone(), **{**off(), "jitter": jitter(*map(float, strengths))})
        torch.testing.assert_close(changed, expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_grey_removes_all_colour():
    grey = torch.tensor([True, False, False])
    changed = augment(videos(), **{**off(), "grey": grey})
    torch.testing.assert_close(
        changed[0], changed[0].mean(0, keepdim=True).expand_as(changed[0]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(changed[1:], videos()[1:], atol=1e-6, rtol=0)


def test_the_hue_turns_about_the_grey_axis():
    turns = torch.tensor([0.0, 1 / 3, -1 / 3, 0.17, 1.0])
    matrices = hue_rotation(turns)
    torch.testing.assert_close(matrices @ torch.ones(3), torch.ones(5, 3))  # grey stays grey
    # a rotation
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3).expand(5, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrices[0], torch.eye(3))
    torch.testing.assert_close(matrices[4], torch.eye(3), atol=1e-5, rtol=0)
    red, green, blue = torch.eye(3)
    torch.testing.assert_close(matrices[1] @ red, green, atol=1e-6, rtol=0)  # a third of the circle
    torch.testing.assert_close(matrices[2] @ red, blue, atol=1e-6, rtol=0)
    grey = torch.full((3, 3, 2, 5, 6), 0.4)
    torch.testing.assert_close(augment(grey.clone(), **{**off(), "jitter": jitter(0.0, 0.0, 0.0, 0.3)}), grey)


def test_masks_cover_their_share_of_columns_and_bins():
    audio = torch.randn(3, 1, 20, 10) + 5
    shares = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.25, 0.5, 0.0, 0.0], [0.0, 0.1, 0.6, 0.8]])
    masked = mask(audio, shares)
    zero = masked == 0
    assert torch.equal(masked[0], audio[0])
    assert zero[1, 0, 5:10].all()
    assert zero[1].sum() == 5 * 10
    assert zero[2, 0, :2].all()
    assert zero[2, 0, :, 6:8].all()
    assert zero[2].sum() == 2 * 10 + 20 * 2 - 4
    assert torch.equal(masked[~zero], audio[~zero])


def test_the_clips_of_all_videos_become_one_batch_and_are_normalised():
    video = (
        torch.arange(256, dtype=torch.uint8)
        .repeat(2 * 2 * 3 * 2 * 3 * 4 // 32)[: 2 * 2 * 3 * 2 * 3 * 4]
        .view(2, 2, 3, 2, 3, 4)
    )
    audio = torch.linspace(-100, 0, 2 * 2 * 5 * 6).view(2, 2, 1, 5, 6)
    batch = to_device(
        {"video": video, "audio": audio, "index": torch.tensor([7, 9]), "failures": []},
        torch.device("cpu"),
        config.Audio(),
    )
    assert batch["video"].shape == (4, 3, 2, 3, 4)
    assert batch["audio"].shape == (4, 1, 5, 6)
    assert batch["index"].tolist() == [7, 9]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    for clip in range(4):
        for channel in range(3):
            expected = (video[clip // 2, clip % 2, channel].numpy() / 255 - mean[channel]) / std[channel]
            np.testing.assert_allclose(batch["video"][clip, channel], expected, atol=1e-5)
    np.testing.assert_allclose(batch["audio"], (audio.flatten(0, 1) + 50) / 20, atol=1e-5)


def test_each_band_is_normalised_by_its_own_statistics():
    audio = torch.linspace(-100, 0, 2 * 1 * 5 * 3).view(2, 1, 1, 5, 3)
    mean, std = torch.tensor([-80.0, -40.5, -10.0]), torch.tensor([10.0, 20.0, 5.25])
    settings = config.Audio(mels=3, statistics="-80/10 -40.5/20 -10/5.25")
    batch = to_device({"audio": audio, "index": torch.arange(2)}, torch.device("cpu"), settings)
    torch.testing.assert_close(batch["audio"], (audio.flatten(0, 1) - mean) / (std + 1e-5))
    masked = {"audio": audio, "index": torch.arange(2), "mask": torch.tensor([[[0.0, 1.0, 0.0, 0.0]]] * 2)}
    assert not to_device(masked, torch.device("cpu"), settings)[
        "audio"
    ].any()  # a masked value is the mean of its band


def test_statistics_of_another_number_of_bands_are_refused():
    audio = torch.zeros(2, 1, 1, 5, 4)
    with pytest.raises(config.ConfigError, match=r"audio.statistics holds 3 bands where audio.\* give 4"):
        to_device(
            {"audio": audio}, torch.device("cpu"), config.Audio(mels=4, statistics="-80/10 -40.5/20 -10/5.25")
        )
