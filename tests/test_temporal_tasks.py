"""When clips are taken, whether labels match what clips show, and what the heads see."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import numbers, write_media

from avid import config, data, temporal_tasks
from avid.temporal_tasks import ORDERS, TASKS, UNKNOWN, plan

FOUR = config.Temporal(moments=2, speeds=[1, 2, 4, 8], reverse=True)


def plans(length_s, temporal=FOUR, clip_s=0.5, count=3000, first_s=2.0):
    rng = np.random.default_rng(0)
    return [plan(first_s, first_s + length_s, clip_s, temporal, rng) for _ in range(count)]


def equally_often(values, of):
    """Whether each value in `of` comes equally often, within five standard deviations."""
    counts = np.array([np.sum(np.array(values) == value) for value in of])
    share = 1 / len(of)
    return np.abs(counts - len(values) * share).max() < 5 * np.sqrt(len(values) * share * (1 - share))


@pytest.mark.parametrize("length_s", [4.0, 6.0, 10.0, 600.0])
def test_the_classes_of_every_task_come_equally_often(length_s):
    labels = [label for _, label in plans(length_s)]
    for moment in (0, 1):
        assert equally_often([label["speed"][moment] for label in labels], range(4))
        assert equally_often([label["direction"][moment] for label in labels], range(2))
    assert equally_often([label["order"] for label in labels if label["order"] != UNKNOWN], range(3))


def test_no_label_gives_away_another():
    """The order is drawn equally often for every pair of speeds and directions that allows it."""
    labels = [label for _, label in plans(6.0, count=20000)]
    for pair in [(0, 0), (3, 0), (2, 3), (3, 3)]:
        orders = [label["order"] for label in labels if tuple(label["speed"]) == pair]
        assert (UNKNOWN in orders) == (pair == (3, 3))  # two clips of 4 s overlap in 6 s
        assert set(orders) == {UNKNOWN} or equally_often(orders, range(3))
    for direction in (0, 1):
        assert equally_often(
            [label["speed"][1] for label in labels if label["direction"] == [direction, 1]], range(4)
        )


@pytest.mark.parametrize("length_s", [0.7, 1.2, 2.5, 6.0, 10.0])
def test_clips_lie_within_the_video_and_their_order_is_the_label(length_s):
    for clips, label in plans(length_s, count=1000):
        (a, b), (c, d) = [(clip.start_s, clip.start_s + clip.speed * 0.5) for clip in clips]
        assert 2.0 - 1e-9 <= min(a, c) and max(b, d) <= 2.0 + length_s + 1e-9
        assert a == pytest.approx(min(max(a, 2.0), 2.0 + length_s))
        shared = min(b, d) - max(a, c)
        if label["order"] == UNKNOWN:
            assert clips[0].speed * 0.5 + clips[1].speed * 0.5 > length_s
        elif ORDERS[label["order"]] == "overlapping":
            assert shared >= 0.5 * min(b - a, d - c) - 1e-9
        elif ORDERS[label["order"]] == "before":
            assert b <= c + 1e-9
        else:
            assert d <= a + 1e-9


def test_labels_that_a_video_is_too_short_for_are_unknown():
    for clips, label in plans(0.3, count=50):  # too short for one clip
        assert [clip.speed for clip in clips] == [1, 1]
        assert (
            label["speed"] == [UNKNOWN] * 2
            and label["direction"] == [UNKNOWN] * 2
            and label["order"] == UNKNOWN
        )
    for _, label in plans(0.9, count=50):  # enough for a clip at one speed
        assert (
            label["speed"] == [UNKNOWN] * 2
            and UNKNOWN not in label["direction"]
            and label["order"] == UNKNOWN
        )
    speeds = [speed for _, label in plans(2.5) for speed in label["speed"]]
    assert equally_often(speeds, range(3))  # 8× does not fit


def test_two_clips_that_fill_the_video_fit_whatever_rounding_says():
    assert 11.0 - 8.8 - 2.2 < 0
    early, late = temporal_tasks._starts(0, 8.8, 2.2, 11.0, np.random.default_rng(0))
    assert early == 0 and late == 8.8


def test_a_run_without_tasks_takes_one_clip_anywhere():
    starts = [clips[0].start_s for clips, _ in plans(10.0, config.Temporal())]
    assert len(plans(10.0, config.Temporal(), count=1)[0][0]) == 1
    assert min(starts) < 2.1 and max(starts) > 11.4 and np.mean(starts) == pytest.approx(6.75, abs=0.2)


@pytest.mark.parametrize("fps", [8, 15, 25, 30000 / 1001, 60])
def test_clips_show_what_their_labels_say(tmp_path, fps):
    """Frames show their number and a tone rises evenly, so every label can be read from the clip itself."""
    seconds, rate_hz, climb_hz = 4.2, 16000, 1500
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    sweep = 0.5 * np.sin(2 * np.pi * (300 * t + climb_hz * t**2 / 2)).astype(np.float32)[None]
    path = write_media(
        tmp_path / "a.mp4", frame_s=np.arange(round(seconds * fps)) / fps, wave=sweep, rate_hz=rate_hz
    )
    whole = "video.size=64 video.crop_area=[1,1] video.crop_ratio=[1,1] video.flip=0"
    alone = [f"weights.contrast_{name}=0" for name in ("vv", "aa", "va", "av")]  # one video has no neighbours
    cfg = config.load("toy_temporal", [*whole.split(), "audio.mels=0", "audio.volume=0", *alone])
    columns = {"paths": [path.name], "root": tmp_path, "start_s": [0.0], "end_s": [np.inf]}
    one = SimpleNamespace(**columns, record=None)
    clips = data.Clips(one, cfg, training=True)
    time_of_bin = (np.arange(257) * rate_hz / 512 - 300) / climb_hz
    seen = set()
    for draw in range(120):
        item = clips[0, (3, 0, draw)]
        spans = []
        for moment in range(2):
            frame_s = np.array(numbers(item["video"][moment].permute(1, 2, 3, 0))) / fps  # T
            heard_s = time_of_bin[item["audio"][moment, 0].argmax(1)]  # F
            speed = cfg.temporal.speeds[item["speed"][moment]] if item["speed"][moment] != UNKNOWN else 1
            sign = -1 if item["direction"][moment] else 1
            assert np.polyfit(np.arange(8) / 16, frame_s, 1)[0] == pytest.approx(
                sign * speed, abs=0.3 if fps > 8 else 0.45
            )
            assert np.polyfit(np.arange(50) / 100, heard_s, 1)[0] == pytest.approx(
                sign * speed, abs=0.1 * speed
            )
            middle = heard_s.mean()
            # picture and sound are of one interval
            assert frame_s.mean() + 0.5 / fps == pytest.approx(middle, abs=0.02 + 0.6 / fps)
            spans.append((middle - speed / 4, middle + speed / 4))
        (a, b), (c, d) = spans
        if item["order"] != UNKNOWN:
            order = 0 if b <= c + 0.03 else 2 if d <= a + 0.03 else 1
            assert order == item["order"]
        seen |= {("speed", int(s)) for s in item["speed"]} | {("order", int(item["order"]))}
    assert seen >= {("speed", 0), ("speed", 1), ("speed", 2), ("order", 0), ("order", 1), ("order", 2)}


def test_heads_see_the_clips_that_their_labels_are_about():
    """The features are numbers of clips. A pair is two moments of one modality, or a clip and the other
    modality's other moment.
    """
    dim = {"video": 2, "audio": 3}
    heads = temporal_tasks.Heads(dim, {"order_video": 3, "order_cross": 3, "speed_audio": 4})
    pairs = {}
    for task, head in heads.heads.items():
        head.register_forward_hook(lambda _, inputs, __, task=task: pairs.__setitem__(task, inputs[0]))
    video = torch.arange(4.0)[:, None].expand(4, 2)  # two videos, two moments each: 0 1 | 2 3
    audio = 10 + torch.arange(4.0)[:, None].expand(4, 3)
    logits = heads(video, audio)
    assert {task: tuple(x.shape) for task, x in logits.items()} == {
        "order_video": (2, 3),
        "order_cross": (4, 3),
        "speed_audio": (4, 4),
    }
    assert pairs["order_video"].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert pairs["order_cross"].tolist() == [
        [0, 0, 11, 11, 11],
        [2, 2, 13, 13, 13],
        [1, 1, 10, 10, 10],
        [3, 3, 12, 12, 12],
    ]
    assert pairs["speed_audio"].tolist() == audio.tolist()


def test_every_task_has_a_weight_labels_and_a_head():
    """Every other weight belongs to xid, cma or a contrast, so none in config.py is without effect."""
    weights = {name for name in vars(config.Weights()) if not name.startswith(("xid", "cma", "contrast_"))}
    assert weights == TASKS.keys()
    _, labels = plan(0.0, 100.0, 0.5, FOUR, np.random.default_rng(0))
    batch = {kind: torch.tensor([label, label]) for kind, label in labels.items()}  # of two videos
    dim = {"video": 3, "audio": 5}
    cfg = config.load("toy_temporal")
    assert temporal_tasks.classes(cfg) == {name: len(task.classes(FOUR)) for name, task in TASKS.items()}
    logits = temporal_tasks.Heads(dim, temporal_tasks.classes(cfg))(torch.randn(4, 3), torch.randn(4, 5))
    for name, task in TASKS.items():
        target = task.targets(batch)
        assert logits[name].shape == (len(target), len(task.classes(FOUR)))
        assert 0 <= target.min() and target.max() < len(task.classes(FOUR))


def test_the_heads_of_a_checkpoint_keep_their_names_and_their_order():
    """Old checkpoints load by these names, and a seed draws the heads in this order."""
    tasks = temporal_tasks.classes(config.load("toy_temporal"))
    names = [name for name, _ in temporal_tasks.Heads({"video": 3, "audio": 5}, tasks).named_parameters()]
    assert names[:4] == [f"heads.speed_{m}.{p}" for m in ("video", "audio") for p in ("weight", "bias")]
    assert names[4:8] == [f"heads.direction_{m}.{p}" for m in ("video", "audio") for p in ("weight", "bias")]
    layers = [f"{layer}.{p}" for layer in (0, 2) for p in ("weight", "bias")]
    assert names[8:] == [f"heads.order_{m}.{layer}" for m in ("video", "audio", "cross") for layer in layers]


def test_the_help_and_the_error_name_what_a_term_needs():
    needs = {"speed_video": "temporal.speeds", "direction_audio": "temporal.reverse"}
    needs |= dict.fromkeys(("order_cross", "contrast_vv", "contrast_aa"), "temporal.moments=2")
    for name, needed in needs.items():
        (text,) = (text for key, _, text in config.settings() if key == f"weights.{name}")
        assert f"needs {needed}" in text
        with pytest.raises(config.ConfigError, match=f"weights.{name}=1.0 needs {needed}"):
            config.load("toy", [f"weights.{name}=1"])
    for name in ("vv", "aa", "va", "av"):
        asked = [f"weights.contrast_{name}=1", "temporal.moments=2", "bank.spread=true"]
        with pytest.raises(config.ConfigError, match=f"weights.contrast_{name}=1.0 needs bank.spread=false"):
            config.load("toy", asked)
        config.load("toy", [*asked, "contrast.sample=1000"])
    asked = ["weights.cma=1", "loss.warmup_epochs=1", "bank.spread=true", "contrast.sample=1000"]
    with pytest.raises(config.ConfigError, match=r"weights\.cma=1\.0 needs bank\.spread=false"):
        config.load("toy", asked)


def test_targets_have_the_order_of_the_logits():
    batch = {"speed": torch.tensor([[0, 3], [UNKNOWN, 1]]), "order": torch.tensor([0, UNKNOWN])}
    assert TASKS["speed_video"].targets(batch).tolist() == [0, 3, UNKNOWN, 1]
    assert TASKS["order_audio"].targets(batch).tolist() == [0, UNKNOWN]
    seen_from_the_other_side = [2, UNKNOWN]
    assert TASKS["order_cross"].targets(batch).tolist() == [0, UNKNOWN, *seen_from_the_other_side]


def test_unknown_labels_do_not_count():
    logits = torch.randn(5, 3, requires_grad=True)
    target = torch.tensor([0, UNKNOWN, 2, 1, UNKNOWN])
    loss, right, known = temporal_tasks.task_loss(logits, target)
    loss.backward()
    probability = logits.detach().double().softmax(1)
    assert loss.item() == pytest.approx(
        -sum(probability[i, target[i]].log().item() for i in (0, 2, 3)), rel=1e-5
    )
    assert known == 3 and right == sum(probability[i].argmax() == target[i] for i in (0, 2, 3))
    assert logits.grad[[1, 4]].abs().max() == 0
    nothing, _, known = temporal_tasks.task_loss(logits, torch.full((5,), UNKNOWN))
    assert nothing == 0 and known == 0
