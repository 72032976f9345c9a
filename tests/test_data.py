"""Clips from files. Draws depend on (seed, step, row of the batch) alone; an unusable file is named and
replaced.
"""

import dataclasses
import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import chirps, numbers, tone, write_media

from avid import config, data, datasets, media, toy
from avid.data import BatchSampler, Clips, augment, central_crop, collate, random_crop, to_device
from avid.media import Media, MediaError
from avid.temporal_tasks import Clip

FPS = 25
# no resizing and no cropping, so that the numbers in the frames can be read
WHOLE = {"size": 64, "crop_area": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}


def settings(video=(), audio=(), temporal=(), clips=3, seed=0):
    return config.Config(
        seed=seed,
        video=config.Video(**{"frames": 4, "fps": 8.0, "size": 32, **dict(video)}),
        audio=config.Audio(
            **{"seconds": 0.5, "rate_hz": 16000, "frames_per_s": 50, "n_fft": 256, "mels": 16, **dict(audio)}
        ),
        temporal=config.Temporal(**dict(temporal)),
        eval=config.Eval(clips=clips, crop=1.0),
    )


def folder_table(root):
    return datasets.load(config.Data(name="folder", root=str(root)), "train")


def good(path, seconds=4.0, **content):
    frame_s = np.arange(round(seconds * FPS)) / FPS
    wave = content.pop("wave", tone(500, seconds, 16000))
    return write_media(path, frame_s=frame_s, wave=wave, rate_hz=16000, **content)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Six usable videos of 4 s."""
    root = tmp_path_factory.mktemp("good")
    for k in range(6):
        good(root / f"{k}.mp4", wave=tone(300 + 150 * k, 4.0, 16000))
    return folder_table(root)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Six files. Numbers 1, 3 and 5 cannot be used, each for another reason."""
    root = tmp_path_factory.mktemp("mixed")
    for k in (0, 2, 4):
        good(root / f"{k}.mp4")
    (root / "1.mp4").write_bytes(b"no video")
    write_media(root / "3.mp4", frame_s=np.arange(50) / FPS)
    write_media(root / "5.mp4", wave=tone(500, 2.0, 16000), rate_hz=16000)
    return folder_table(root)


REASONS = {1: "cannot be opened: Invalid data found when processing input", 3: "no sound", 5: "no picture"}


def same(one, other):
    """Whether two items are equal bit for bit."""
    if one.keys() != other.keys():
        return False
    return all(torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in one.items())


def shown(video):
    """The numbers that the frames of a clip show, 3×T×64×64."""
    return numbers(video.permute(1, 2, 3, 0).numpy())


# --------------------------------------------------------------------------------------------- training clips


def test_an_item_depends_on_its_draw_alone(table):
    cfg = settings(
        temporal={"moments": 2, "speeds": [1, 2], "reverse": True},
        audio={"mask_time": 0.2, "mask_frequency": 0.2},
    )
    clips = Clips(table, cfg, training=True)
    item = clips[2, (3, 10, 4)]
    assert same(item, clips[2, (3, 10, 4)])
    assert same(item, Clips(table, cfg, training=True)[2, (3, 10, 4)])
    others = [clips[2, (3, 10, 5)], clips[2, (3, 11, 4)]]
    others.append(Clips(table, dataclasses.replace(cfg, seed=1), training=True)[2, (3, 10, 4)])
    for other in others:
        for name in ("video", "audio", "jitter", "mask"):
            assert not torch.equal(item[name], other[name]), name


def test_a_file_is_opened_once_by_each_decoder(table, monkeypatch):
    opened = []
    for module, name in ((media.av, "open"), (media.decord, "VideoReader")):
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, plain=plain, name=name, **k: (opened.append(name), plain(*a, **k))[1]
        )
    item = Clips(table, settings(temporal={"moments": 2}), training=True)[0, (3, 0, 0)]
    assert len(item["video"]) == len(item["audio"]) == 2
    assert sorted(opened) == ["VideoReader", "open"]


@pytest.mark.parametrize("training", [True, False])
def test_clips_of_files_kept_in_memory_are_identical(tmp_path, training):
    """Also at another sample rate, and with the same reasons for unusable files."""
    world = config.Toy(train=3, test=1, seconds=3.0, size=48)
    folder = toy.write(tmp_path, world, seed=0, workers=1, progress=False)
    (folder / "train" / "00001.mp4").write_bytes(b"no video")
    table = datasets.load(config.Data(root=str(folder)), "train")
    cfg = settings(
        temporal={"moments": 2, "speeds": [1, 2], "reverse": True},
        audio={"rate_hz": 8000, "frames_per_s": 40},
    )
    kept = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, in_memory=True))
    for k in range(12):
        key = (k % 3, (3, k, 0)) if training else k % 3
        assert same(Clips(table, kept, training)[key], Clips(table, cfg, training)[key])
    for path in folder.rglob("*.mp4"):
        path.unlink()
    # training reads from memory; an evaluation reads each file only once
    failures = Clips(table, kept, training)[(0, (3, 0, 0)) if training else 0]["failures"]
    assert bool(failures) != training


@pytest.mark.parametrize("moments", [1, 2])
def test_shapes_and_types_of_an_item(table, moments):
    item = Clips(table, settings(temporal={"moments": moments}), training=True)[0, (3, 0, 0)]
    found = {name: (tuple(x.shape), x.dtype) for name, x in item.items() if torch.is_tensor(x)}
    assert found["video"] == ((moments, 3, 4, 32, 32), torch.uint8)
    assert found["audio"] == ((moments, 1, 25, 16), torch.float32)
    assert found["flip"] == ((moments,), torch.bool)
    assert found["jitter"] == ((moments, 4), torch.float32)
    assert item["index"] == 0
    assert item["failures"] == []


def test_one_modality_can_be_read_alone(table):
    for modality, other in (("video", "audio"), ("audio", "video")):
        item = Clips(table, settings(), training=True, modalities=(modality,))[0, (3, 0, 0)]
        assert modality in item
        assert other not in item


@pytest.mark.parametrize("how", ["epoch", "iid"])
def test_batches_do_not_depend_on_the_number_of_workers(table, how):
    def batches(workers):
        draws = BatchSampler(len(table), 4, how, seed=0, first_step=0, last_step=3)
        return list(data.loader(Clips(table, settings(), training=True), workers, batch_sampler=draws))

    without, with_one = batches(0), batches(1)
    assert len(without) == len(with_one) == 3
    assert all(same(one, other) for one, other in zip(without, with_one, strict=True))


def test_clips_start_anywhere_in_the_video(table):
    clips = Clips(table, settings(video=WHOLE), training=True)
    first = [shown(clips[0, (3, k, 0)]["video"][0])[0] for k in range(40)]
    assert min(first) < 15
    assert max(first) > 75
    assert max(first) <= 100 - 0.5 * FPS + 2  # half a second must follow


def test_frames_are_evenly_spaced_at_any_frame_rate(table):
    """8 of 25 frames a second: a step of 3.125 frames."""
    clips = Clips(table, settings(video={**WHOLE, "frames": 12}), training=True)
    for k in range(5):
        steps = np.diff(shown(clips[0, (3, k, 0)]["video"][0]))
        assert set(steps) <= {3, 4}
        assert steps.sum() == pytest.approx(11 * 3.125, abs=1)


def test_the_volume_shifts_all_columns_equally(table):
    loud = Clips(table, settings(audio={"volume": 0.5}), training=True)
    plain = Clips(table, settings(audio={"volume": 0.0}), training=True)
    gains = []
    for k in range(30):
        gain = loud[0, (3, k, 0)]["audio"] - plain[0, (3, k, 0)]["audio"]
        gains.append(gain[..., 3].median().item())
        torch.testing.assert_close(
            gain[..., 2:5], torch.full_like(gain[..., 2:5], gains[-1]), atol=1e-3, rtol=0
        )
    assert 20 * np.log10(0.5) <= min(gains) < -3
    assert 1.5 < max(gains) <= 20 * np.log10(1.5)


def test_sound_is_never_taken_from_beyond_its_end(table):
    """No window of the spectrogram reaches into the silence before or after the file."""
    clips = Clips(table, settings(), training=True)
    for k in range(30):
        audio = clips[0, (3, k, 0)]["audio"][0, 0]
        assert audio.amax(1).min() > -60


# ------------------------------------------------------------------------------------------ picture and sound


def test_picture_and_sound_of_a_clip_share_their_middle(tmp_path):
    """A chirp sounds while frame 50 is shown. Both are in the middle of the clip, although its sound is
    shorter.
    """
    good(tmp_path / "a.mp4", wave=chirps([2.0], 4.0, 16000))
    cfg = settings(video={**WHOLE, "frames": 25, "fps": 25.0}, audio={"seconds": 0.5}, clips=1)
    clips = Clips(folder_table(tmp_path), cfg, training=False)
    item = clips[0]
    assert shown(item["video"][0]) == list(range(38, 63))  # 1 s around 2 s
    loudness = item["audio"][0, 0].amax(1)
    assert 12 <= loudness.argmax() <= 15  # 25 columns around 2 s; the chirp lasts three of them


def test_an_offset_moves_the_video_within_the_sound(table):
    """As in AVID: 0.5 s of video start up to `offset_s` before or after their place in the middle of the
    sound.
    """
    cfg = settings(video={**WHOLE, "frames": 4, "fps": 8.0, "offset_s": 0.75}, audio={"seconds": 1.0})
    clips, moved = Clips(table, cfg, training=True), []
    starts_s = []
    with Media(table.root / table.paths[0]) as media:
        first_s, last_s = clips.usable(media)
        for k in range(300):
            rng = np.random.default_rng(k)
            clip = Clip(rng.uniform(first_s, last_s - 1.0))
            shared = clips.start_of(clip, 0.5)
            start_s = clips.moved(shared, clip, media, rng)
            assert media.first_s <= start_s <= media.last_s - 0.5
            if 0.75 < shared - media.first_s < 4.0 - 0.5 - 0.75:
                moved.append(start_s - shared)
            starts_s.append(start_s)
    assert min(moved) < -0.7 and max(moved) > 0.7 and np.abs(moved).max() <= 0.75
    assert np.histogram(moved, 5, (-0.75, 0.75))[0].min() > 0.1 * len(moved)  # uniform
    assert min(starts_s) < 0.15 and max(starts_s) > 3.3  # up to the ends of the file


def test_without_an_offset_nothing_is_drawn_for_it(table):
    """A clip is the same bit for bit as before, and an evaluation has no offset."""
    plain = Clips(table, settings(), training=True)[0, (3, 1, 0)]
    assert same(Clips(table, settings(video={"offset_s": 0.0}), training=True)[0, (3, 1, 0)], plain)
    assert not same(Clips(table, settings(video={"offset_s": 0.5}), training=True)[0, (3, 1, 0)], plain)
    evaluated = [Clips(table, settings(video={"offset_s": x}), training=False)[1] for x in (0.0, 0.5)]
    assert same(*evaluated)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("speed", [1, 2, 4])
def test_speed_and_direction(tmp_path, speed, backward):
    """Frames and columns of sound are `speed` times further apart. A backward clip reverses both."""
    wave = tone(500, 4.0, 16000)
    wave[:, :16000] = wave[:, 32000:] = 0.0  # a tone from 1 s to 2 s
    path = good(tmp_path / "a.mp4", wave=wave)
    cfg = settings(video={**WHOLE, "frames": 8, "fps": 12.5}, audio={"seconds": 0.64})
    clips = Clips(folder_table(tmp_path), cfg, training=False)
    media, rng = Media(path), np.random.default_rng(0)
    clip = Clip(0.9, speed, backward)
    frames = shown(clips.picture(media, clip, rng))
    expected = [int((0.9 + (k + 0.5) * speed / 12.5) * FPS + 1e-6) for k in range(8)]
    assert frames == (expected[::-1] if backward else expected)
    column_s = 0.9 + (np.arange(32) + 0.5) * speed / 50
    loudness = clips.loudness(media, clip, rng)[0].amax(1).numpy()[:: -1 if backward else 1]
    sounds = (column_s > 1.04) & (column_s < 1.96)
    silent = (column_s < 0.96) | (column_s > 2.04)
    assert sounds.any()
    assert silent.any()
    assert loudness[sounds].min() > -10
    assert loudness[silent].max() < -35


def test_a_short_video_repeats_and_its_sound_ends_in_silence(tmp_path):
    good(tmp_path / "a.mp4", seconds=0.6)
    cfg = settings(video={**WHOLE, "frames": 25, "fps": 25.0}, audio={"seconds": 1.0}, clips=1)
    for training in (False, True):
        clips = Clips(folder_table(tmp_path), cfg, training=training)
        item = clips[(0, (3, 0, 0)) if training else 0]
        frames = shown(item["video"][0])
        assert len(frames) == 25
        assert np.diff(frames).tolist().count(1) >= 22
        assert max(frames) == 14
        assert min(frames) == 0
        sound = item["audio"][0, 0].amax(1)
        assert sound[:25].min() > -60
        assert sound[33:].max() == -100.0


def test_clips_stay_within_the_part_that_a_table_names(table):
    part = datasets.take(table, [0, 1])
    part.start_s[:], part.end_s[:] = 1.0, 2.0
    cfg = settings(video=WHOLE)
    for k in range(10):
        frames = shown(Clips(part, cfg, training=True)[0, (3, k, 0)]["video"][0])
        assert 25 <= min(frames)
        assert max(frames) < 50
    part.start_s[:], part.end_s[:] = 7.0, 9.0
    item = Clips(part, cfg, training=False)[0]
    assert item["failures"] == [(0, "picture and sound, or the asked part, do not overlap in time")]


# ------------------------------------------------------------------------------------------- evaluation clips


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_evaluation_clips_are_evenly_spaced_over_the_whole_video(table, count):
    clips = Clips(table, settings(video={**WHOLE, "frames": 8, "fps": 16.0}), training=False, clips=count)
    item = clips[1]
    assert item["video"].shape == (count, 3, 8, 64, 64)
    assert item["audio"].shape == (count, 1, 25, 16)
    assert not {"flip", "jitter", "mask"} & item.keys()
    first = np.array([shown(clip)[0] for clip in item["video"]])
    edge_s = 0.5 * 256 / 16000
    last = (4.0 - 0.5 - 2 * edge_s) * FPS
    expected = [last / 2] if count == 1 else np.linspace(0, last, count)
    assert np.abs(first - (np.array(expected) + (0.5 / 16 + edge_s) * FPS)).max() <= 1.01
    assert same(item, clips[1])  # nothing is random


def test_evaluation_takes_the_central_square(tmp_path):
    good(tmp_path / "a.mp4")
    cfg = dataclasses.replace(settings(video={"size": 32}), eval=config.Eval(clips=1, crop=0.5))
    video = Clips(folder_table(tmp_path), cfg, training=False)[0]["video"][0]
    whole = Clips(folder_table(tmp_path), settings(video={"size": 64}, clips=1), training=False)[0]["video"][
        0
    ]
    assert torch.equal(video, whole[..., 16:48, 16:48])


# --------------------------------------------------------------------------------------------- unusable files


def test_an_unusable_file_is_replaced_and_named(mixed):
    clips = Clips(mixed, settings(), training=True)
    for index in range(6):
        item = clips[index, (3, 1, index)]
        assert item["index"] in (0, 2, 4)
        assert item["video"].shape == (1, 3, 4, 32, 32)
        tried = [at for at, _ in item["failures"]]
        if index in REASONS:
            assert tried[0] == index
        else:
            assert item["index"] == index
        assert all(reason == REASONS[at] for at, reason in item["failures"])
        assert same(item, clips[index, (3, 1, index)])  # the replacement depends on the draw, too


def test_replacements_are_drawn_from_all_files(mixed):
    clips = Clips(mixed, settings(), training=True)
    assert {clips[1, (3, step, 0)]["index"] for step in range(25)} == {0, 2, 4}


def test_an_unusable_file_has_no_evaluation_clips(mixed):
    clips = Clips(mixed, settings(), training=False)
    for index, reason in REASONS.items():
        assert clips[index] == {"index": index, "failures": [(index, reason)]}
    assert "video" in clips[0]


def test_too_many_unusable_files_in_a_row_are_an_error(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.mp4").write_bytes(b"no video")
    clips = Clips(folder_table(tmp_path), settings(), training=True)
    with pytest.raises(MediaError) as caught:
        clips[0, (3, 0, 0)]
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("20 files in a row cannot be used, the last one " + str(tmp_path))
    assert REASONS[1] in text
    assert "python -m avid check" in text


def test_evaluation_batches_leave_unusable_files_out(mixed):
    batches = list(data.loader(Clips(mixed, settings(), training=False), 0, batch_size=2))
    assert [batch["index"].tolist() for batch in batches] == [[0], [2], [4]]
    assert [batch["failures"] for batch in batches] == [[(k, REASONS[k])] for k in (1, 3, 5)]
    assert [tuple(batch["video"].shape) for batch in batches] == [(1, 3, 3, 4, 32, 32)] * 3


def test_a_batch_of_unusable_files_has_only_failures():
    assert collate(
        [{"index": 1, "failures": [(1, "no sound")]}, {"index": 3, "failures": [(3, "no picture")]}]
    ) == {"failures": [(1, "no sound"), (3, "no picture")]}


def test_a_batch_keeps_items_in_order_and_all_failures():
    items = [
        {
            "index": 4,
            "failures": [(1, "x"), (2, "y")],
            "video": torch.full((1, 3, 2, 4, 4), 4.0),
            "flip": torch.tensor([True]),
        },
        {"index": 0, "failures": [], "video": torch.zeros(1, 3, 2, 4, 4), "flip": torch.tensor([False])},
        {
            "index": 5,
            "failures": [(2, "y")],
            "video": torch.full((1, 3, 2, 4, 4), 5.0),
            "flip": torch.tensor([True]),
        },
    ]
    batch = collate(items)
    assert batch["index"].tolist() == [4, 0, 5]
    assert batch["video"][:, 0, 2, 1, 3, 3].tolist() == [4.0, 0.0, 5.0]
    assert batch["flip"].tolist() == [[True], [False], [True]]
    assert batch["failures"] == [(1, "x"), (2, "y"), (2, "y")]


def test_real_files_of_a_folder(real_media):
    """Two of these videos can be used. The other three have no sound and are named."""
    known = ["corrupted.mp4", "flipping_a_pancake.mkv", "nasa_13013.mp4", "part_0.mp4", "video_90.mov"]
    table = folder_table(real_media)
    table = datasets.take(table, [path.rpartition("/")[2] in known for path in table.paths])
    names = [path.rpartition("/")[2] for path in table.paths]
    assert sorted(names) == known
    failures, used = {}, []
    for batch in data.loader(Clips(table, settings(clips=2), training=False), 0, batch_size=2):
        failures |= {names[at]: reason for at, reason in batch["failures"]}
        used += [names[at] for at in batch.get("index", torch.tensor([])).tolist()]
        if "video" in batch:
            assert batch["video"].float().std() > 10
            assert batch["audio"].std() > 3
    assert failures == dict.fromkeys(["corrupted.mp4", "part_0.mp4", "video_90.mov"], "no sound")
    assert sorted(used) == ["flipping_a_pancake.mkv", "nasa_13013.mp4"]
    replaced = Clips(table, settings(), training=True)[names.index("part_0.mp4"), (3, 0, 0)]
    assert names[replaced["index"]] in used
    assert (names.index("part_0.mp4"), "no sound") in replaced["failures"]


# ------------------------------------------------------------------------------------------------------ draws


def indices_of(draws):
    return [[index for index, _ in batch] for batch in draws]


def test_an_epoch_is_a_permutation():
    draws = BatchSampler(12, 4, "epoch", seed=0, first_step=0, last_step=9)
    assert len(draws) == 9
    epochs = np.array(indices_of(draws)).reshape(3, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_an_epoch_leaves_out_an_incomplete_batch():
    epochs = np.array(indices_of(BatchSampler(11, 4, "epoch", seed=0, first_step=0, last_step=40))).reshape(
        20, 8
    )
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert set(epochs.flatten()) == set(range(11))  # other instances each epoch


def test_iid_draws_are_independent():
    """All instances are equally likely, and a batch repeats one as often as chance does."""
    batches = np.array(indices_of(BatchSampler(20, 10, "iid", seed=0, first_step=0, last_step=2000)))
    assert np.bincount(batches.flatten(), minlength=20) == pytest.approx(1000, abs=150)
    distinct = np.mean([len(set(batch)) for batch in batches])
    assert distinct == pytest.approx(20 * (1 - (19 / 20) ** 10), abs=0.1)


def test_a_pass_over_copies_holds_each_instance_once_per_copy():
    """5 copies of 12 instances are shuffled together into 60 draws. The next pass has another order."""
    sampler = BatchSampler(12, 4, "copies", seed=0, first_step=0, last_step=45, copies=5)
    passes = np.array(indices_of(sampler)).reshape(3, 60)
    for one in passes:
        assert np.bincount(one, minlength=12).tolist() == [5] * 12
        assert len(set(one[:12])) < 12  # some instance repeats before all have come
    assert len({tuple(one) for one in passes}) == 3
    alone = BatchSampler(12, 4, "copies", seed=0, first_step=0, last_step=9, copies=1)
    assert indices_of(alone) == indices_of(BatchSampler(12, 4, "epoch", seed=0, first_step=0, last_step=9))


def test_a_pass_over_copies_leaves_out_an_incomplete_batch():
    sampler = BatchSampler(5, 4, "copies", seed=0, first_step=0, last_step=6, copies=3)
    passes = np.array(indices_of(sampler)).reshape(2, 12)  # of 15 draws
    assert all(np.bincount(one, minlength=5).max() <= 3 for one in passes)


def test_copies_avoid_the_long_waits_at_the_end_of_an_epoch():
    """AVID's reason for copies: the instances at the end of an epoch were all last drawn long ago.

    Of the draws in the last tenth of a pass, this is the share whose instance has waited for more than 0.9 n
    draws. It is over half with epochs, and e^-0.9 = 0.41 with replacement.
    """
    n, batch = 200, 10

    def long_wait(how, copies=10):
        steps = 3 * copies * n // batch
        draws = np.concatenate(indices_of(BatchSampler(n, batch, how, 0, 0, steps, copies=copies)))
        last, waits = {}, []
        length = {"epoch": n, "copies": copies * n, "iid": copies * n}[how]
        for place, instance in enumerate(draws):
            if place >= 2 * n and place % length >= 0.9 * length:
                waits.append(place - last[instance] > 0.9 * n)
            last[instance] = place
        return np.mean(waits)

    assert long_wait("epoch") > 0.5
    assert long_wait("copies") == pytest.approx(long_wait("iid"), abs=0.08)
    assert long_wait("iid") == pytest.approx(np.exp(-0.9), abs=0.06)


@pytest.mark.parametrize("how", ["epoch", "copies", "iid"])
def test_resuming_at_a_step_continues_the_sequence(how):
    whole = list(BatchSampler(10, 3, how, seed=5, first_step=0, last_step=12, copies=2))
    for step in (1, 3, 7, 11):
        assert list(BatchSampler(10, 3, how, seed=5, first_step=step, last_step=12, copies=2)) == whole[step:]
    assert whole != list(BatchSampler(10, 3, how, seed=6, first_step=0, last_step=12, copies=2))


@pytest.mark.parametrize("how", ["epoch", "copies", "iid"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_batches_of_all_ranks_make_up_the_global_batch(how, world):
    whole = list(BatchSampler(30, 12, how, seed=0, first_step=2, last_step=8))
    shares = [
        list(BatchSampler(30, 12, how, seed=0, first_step=2, last_step=8, rank=rank, world=world))
        for rank in range(world)
    ]
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    assert {len(batch) for share in shares for batch in share} == {12 // world}


def test_no_draw_is_used_twice():
    draws = Counter(
        draw for batch in BatchSampler(10, 5, "iid", seed=0, first_step=0, last_step=20) for _, draw in batch
    )
    assert len(draws) == 100
    assert set(draws.values()) == {1}


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(
        ValueError, match=r"a batch of 8 is larger than the data set of 7 videos; lower optim.batch_size"
    ):
        BatchSampler(7, 8, "epoch", 0, 0, 1)
    assert len(next(iter(BatchSampler(7, 7, "epoch", 0, 0, 1)))) == 7


# --------------------------------------------------------------------------------------------------- cropping


def test_a_random_crop_has_the_requested_area_and_shape():
    rng, crops = np.random.default_rng(0), []
    for _ in range(2000):
        top, left, height, width = random_crop(120, 160, (0.2, 0.6), (0.75, 1.3333), rng)
        assert 0 <= top <= 120 - height
        assert 0 <= left <= 160 - width
        crops.append(
            (height * width / (120 * 160), width / height, (top + height / 2) / 120, (left + width / 2) / 160)
        )
    area, ratio, y, x = np.array(crops).T
    assert 0.19 < area.min() < 0.22
    assert 0.58 < area.max() < 0.61
    assert 0.73 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.36
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.02)
    assert y.mean() == pytest.approx(0.5, abs=0.02)
    assert x.mean() == pytest.approx(0.5, abs=0.02)


def test_a_crop_that_does_not_fit_becomes_the_central_square():
    assert random_crop(10, 1000, (0.9, 1.0), (1.0, 1.0), np.random.default_rng(0)) == (0, 495, 10, 10)


@pytest.mark.parametrize(
    "height, width, share, expected",
    [(120, 160, 1.0, (0, 20, 120, 120)), (8, 4, 0.5, (3, 1, 2, 2)), (3, 3, 0.1, (1, 1, 1, 1))],
)
def test_the_central_crop(height, width, share, expected):
    assert central_crop(height, width, share) == expected


# ---------------------------------------------------------------------------------------------- augmentations


def test_masks_are_at_most_as_wide_as_requested(table):
    clips = Clips(table, settings(audio={"mask_time": 0.2, "mask_frequency": 0.4}), training=True)
    rng = np.random.default_rng(0)
    shares = torch.cat([clips.draws(2, rng)["mask"] for _ in range(500)])
    width = shares[:, 1::2] - shares[:, ::2]
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert width[:, 0].max() == pytest.approx(0.2, abs=0.01)
    assert width[:, 1].max() == pytest.approx(0.4, abs=0.02)
    assert width.min() >= 0
    none = Clips(table, settings(), training=True).draws(2, rng)["mask"]
    assert torch.equal(none[:, 1::2], none[:, ::2])


def test_augmentations_are_as_frequent_as_requested(table):
    clips = Clips(
        table, settings(video={"flip": 0.3, "grey": 0.2, "jitter": [0.4, 0.3, 0.2, 0.1]}), training=True
    )
    rng = np.random.default_rng(0)
    draws = [clips.draws(2, rng) for _ in range(1000)]
    flip, grey, strengths = (torch.cat([draw[name] for draw in draws]) for name in ("flip", "grey", "jitter"))
    assert flip.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert grey.float().mean().item() == pytest.approx(0.2, abs=0.04)
    np.testing.assert_allclose(strengths.abs().amax(0), [0.4, 0.3, 0.2, 0.1], rtol=0.02)
    np.testing.assert_allclose(strengths.mean(0), 0, atol=0.02)


def test_training_batches_are_augmented_on_the_device(table):
    items = [Clips(table, settings(temporal={"moments": 2}), training=True)[k, (3, 0, k)] for k in range(3)]
    draws = SimpleNamespace(
        **{name: torch.cat([item[name] for item in items]) for name in ("flip", "jitter", "grey")}
    )
    plain = torch.cat([item["video"] for item in items]).float() / 255
    batch = to_device(collate(items), torch.device("cpu"), config.Audio())
    mean, std = (
        torch.tensor(data.PIXEL_MEAN)[:, None, None, None],
        torch.tensor(data.PIXEL_STD)[:, None, None, None],
    )
    expected = (augment(plain, draws.flip, draws.jitter, draws.grey) - mean) / std
    torch.testing.assert_close(batch["video"], expected)
    assert batch["video"].shape == (6, 3, 4, 32, 32) and batch["video"].is_contiguous()
