"""Properties that hold for any input: temporal plans, lists, rankings, memory bank, order of draws."""

import math
import string

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from avid import config, data, datasets, evaluation, memory_bank, temporal_tasks
from avid.temporal_tasks import UNKNOWN


def property_settings(examples):
    """The same examples in every run, and no deadline: a slow machine is no error."""
    fixture = HealthCheck.function_scoped_fixture  # every example writes its own files
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=[fixture]
    )


seeds = st.integers(0, 2**32 - 1)

# ------------------------------------------------------------------------------------------------------ plans


@property_settings(300)
@given(
    first_s=st.floats(0, 1e4),
    room_s=st.floats(1e-3, 1e4),
    length_s=st.floats(0.05, 100),
    speeds=st.lists(st.integers(1, 16), min_size=1, max_size=5, unique=True).map(sorted),
    moments=st.sampled_from((1, 2)),
    reverse=st.booleans(),
    seed=seeds,
)
def test_a_plan_stays_inside_the_video_and_its_labels_are_right(
    first_s, room_s, length_s, speeds, moments, reverse, seed
):
    last_s = first_s + room_s
    room_s = last_s - first_s  # after rounding
    assume(room_s > 0)
    temporal = config.Temporal(moments=moments, speeds=speeds, reverse=reverse)
    clips, labels = temporal_tasks.plan(first_s, last_s, length_s, temporal, np.random.default_rng(seed))
    assert len(clips) == len(labels["speed"]) == len(labels["direction"]) == moments
    fits = [s for s in speeds if s * length_s <= room_s]
    slack = 1e-9 * max(last_s, 1.0)
    lengths_s = [clip.speed * length_s for clip in clips]
    for clip, length, speed, direction in zip(
        clips, lengths_s, labels["speed"], labels["direction"], strict=True
    ):
        assert clip.speed in (fits or speeds[:1])
        assert clip.start_s >= first_s - slack and math.isfinite(clip.start_s)
        assert clip.start_s + length <= last_s + slack if fits else clip.start_s <= first_s + slack
        assert speed == (speeds.index(clip.speed) if len(fits) > 1 else UNKNOWN)
        assert direction == (int(clip.backward) if fits else UNKNOWN)
        assert reverse or not clip.backward
    if moments == 1 or sum(lengths_s) > room_s:
        assert labels["order"] == UNKNOWN
    else:
        (a, b), (first, second) = (clip.start_s for clip in clips), lengths_s
        shared = min(a + first, b + second) - max(a, b)
        if labels["order"] == 1:
            assert shared >= min(lengths_s) / 2 - slack
        else:
            assert shared <= slack and (a < b) == (labels["order"] == 0)


@property_settings(100)
@given(
    first_s=st.floats(0, 1e4),
    room_s=st.floats(1e-3, 1e4),
    length_s=st.floats(0.05, 100),
    clips=st.integers(1, 20),
)
def test_evaluation_clips_cover_a_video_from_beginning_to_end(first_s, room_s, length_s, clips):
    last_s, slack = first_s + room_s, 1e-9 * (first_s + room_s)
    starts_s = np.array([clip.start_s for clip in temporal_tasks.evenly(first_s, last_s, length_s, clips)])
    assert len(starts_s) == clips and (np.diff(starts_s) >= 0).all()
    end_s = max(last_s - length_s, first_s)
    assert first_s - slack <= starts_s[0] and starts_s[-1] <= end_s + slack
    if clips > 1:
        assert starts_s[0] == first_s and starts_s[-1] == pytest.approx(end_s, abs=slack)
        np.testing.assert_allclose(np.diff(starts_s), (end_s - first_s) / (clips - 1), atol=slack)


# ------------------------------------------------------------------------------------------------------ lists

letters = string.ascii_letters + string.digits + "äß漢🎵 _-,;'\"()#&%~"
words = st.text(letters, min_size=1, max_size=12).map(str.strip).filter(bool)
names = words.filter(lambda word: not word.startswith(".") and word[1:2] != ":")


@st.composite
def tables(draw):
    """Rows of a manifest: distinct paths, a class, a split, the part to use."""
    paths = draw(
        st.lists(
            st.lists(names, min_size=1, max_size=3).map(lambda parts: "/".join(parts) + ".mp4"),
            min_size=1,
            max_size=6,
            unique=True,
        )
    )
    rows = []
    for path in paths:
        start_s = draw(st.integers(0, 10**6)) / 1000
        end_s = start_s + draw(st.integers(1, 10**6)) / 1000
        times = draw(st.sampled_from(((0.0, np.inf), (start_s, end_s), (0.0, end_s), (start_s, np.inf))))
        rows.append((path, draw(st.just("") | words), draw(st.sampled_from(("train", "test", ""))), *times))
    return rows


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@property_settings(60)
@given(
    rows=tables(),
    newline=st.sampled_from(("\n", "\r\n")),
    mark=st.sampled_from(("", "\ufeff")),
    blank=st.booleans(),
)
def test_any_well_formed_manifest_is_read_as_it_was_written(tmp_path_factory, rows, newline, mark, blank):
    root = tmp_path_factory.mktemp("list")
    lines = ["path,label,split,start,end"]
    for path, label, split, start_s, end_s in rows:
        assume(not any(other != path and other.startswith(path + "/") for other, *_ in rows))
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
        start, end = f"{start_s:.3f}" if start_s else "", f"{end_s:.3f}" if end_s < np.inf else ""
        lines += [",".join([quoted(path), quoted(label), split, start, end])] + [""] * blank
    (root / "manifest.csv").write_bytes((mark + newline.join(lines)).encode())
    table = datasets.load(config.Data(name="manifest", root=str(root)), "all")
    assert table.paths == [path for path, *_ in rows] and not table.missing
    assert [table.classes[i] if i >= 0 else "" for i in table.labels] == [label for _, label, *_ in rows]
    assert table.classes == sorted({label for _, label, *_ in rows} - {""})
    assert table.columns["split"] == [split for _, _, split, *_ in rows]
    np.testing.assert_allclose(table.start_s, [row[3] for row in rows])
    np.testing.assert_allclose(table.end_s, [row[4] for row in rows])
    (root / "manifest.csv").unlink()


LIST_FILES = {
    "manifest": "manifest.csv",
    "kinetics400": "train.csv",
    "vggsound": "vggsound.csv",
    "audioset": "train_segments.csv",
    "ucf101": "ucfTrainTestlist/trainlist01.txt",
    "hmdb51": "testTrainMulti_7030_splits/wave_test_split1.txt",
    "esc50": "meta/esc50.csv",
}
FIRST_LINES = {
    "manifest": "path,label,split,start,end",
    "kinetics400": "label,youtube_id,time_start,time_end,split",
    "vggsound": "abc,3,dog,train",
    "audioset": "# a comment",
    "ucf101": "x/a.avi 1",
    "hmdb51": "a.avi 1",
    "esc50": "filename,fold,category,esc10",
}
fields = st.sampled_from(
    [
        "a.mp4",
        "x/a",
        "..",
        "/",
        "a",
        "abc",
        '"',
        '""',
        "\\",
        "0",
        "1",
        "-1",
        ".5",
        "9" * 400,
        "nan",
        "True",
        "train",
        "#",
        " ",
        "\r",
        "\x85",
        "٣",
        "a" * 300,
    ]
)
nearly_valid = st.lists(
    st.lists(fields, min_size=1, max_size=6).map(",".join) | st.text(max_size=30), max_size=5
).map("\n".join)


@property_settings(250)
@given(
    name=st.sampled_from(sorted(LIST_FILES)),
    head=st.booleans(),
    content=st.binary(max_size=200) | nearly_valid.map(lambda text: text.encode("utf-8", "replace")),
)
def test_any_bytes_as_a_list_give_a_table_or_an_error_that_says_why(tmp_path_factory, name, head, content):
    root = tmp_path_factory.getbasetemp() / f"bytes-{name}"
    path = root / LIST_FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / "a.mp4").touch()
    (root / "class_labels_indices.csv").write_text("index,mid,display_name\n0,/m/0,dog\n")
    (root / "ucfTrainTestlist").mkdir(exist_ok=True)
    (root / "ucfTrainTestlist" / "testlist01.txt").write_text("x/b.avi\n")
    path.write_bytes((FIRST_LINES[name] + "\n").encode() * head + content)
    try:
        table = datasets.load(config.Data(name=name, root=str(root)), "train")
    except datasets.DataError as error:
        message, *layout = str(error).split("\n")
        assert str(root) in message and len(message) < 1200
        assert not layout or layout[0].startswith("expected, with root")
    else:
        assert len(table) == len(table.labels) == len(table.start_s) == len(set(table.paths)) > 0
        assert all((root / file).is_file() for file in table.paths) and (table.start_s < table.end_s).all()


# --------------------------------------------------------------------------------------------------- rankings


@st.composite
def galleries(draw):
    """Unit vectors as queries and gallery, some with ties, and (k, rows, columns) of the search."""
    rng = np.random.default_rng(draw(seeds))
    dim, q, g = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(2, 30))
    x = rng.standard_normal((q + g, dim)).astype(np.float32)
    if draw(st.booleans()):
        x = np.sign(x)  # many ties
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x[:q], x[q:], draw(st.integers(1, g)), draw(st.integers(1, q + 3)), draw(st.integers(1, g + 3))


@property_settings(120)
@given(case=galleries(), among_themselves=st.booleans())
def test_the_nearest_are_those_of_a_full_sort_for_any_block_sizes(case, among_themselves):
    queries, gallery, k, rows, columns = case
    exclude = None
    if among_themselves:
        queries, exclude = gallery, np.arange(len(gallery))
    found = evaluation.nearest(queries, gallery, k, exclude, rows, columns)
    similarity = queries.astype(float) @ gallery.astype(float).T
    if among_themselves:
        np.fill_diagonal(similarity, -np.inf)
        assert (found != exclude[:, None]).all()
    k = min(k, len(gallery) - among_themselves)
    assert found.shape == (len(queries), k)
    assert all(len(set(row)) == k for row in found.tolist())
    best = -np.sort(-similarity, 1)[:, :k]
    # ties come in any order
    np.testing.assert_allclose(np.take_along_axis(similarity, found, 1), best, atol=1e-6)


@property_settings(60)
@given(
    seed=seeds, q=st.integers(1, 20), g=st.integers(1, 20), classes=st.integers(1, 4), several=st.booleans()
)
def test_recall_grows_with_k_and_agrees_with_loops(seed, q, g, classes, several):
    rng = np.random.default_rng(seed)
    found = np.stack([rng.permutation(g) for _ in range(q)])
    if several:
        query, gallery = ((rng.random((n, classes)) < 0.4).astype(np.uint8) for n in (q, g))
    else:
        query, gallery = (rng.integers(-1, classes, n) for n in (q, g))
    result = evaluation.recall(found, datasets.same_class(query, gallery), ks=range(1, g + 1))
    values = [result[f"R@{k}"] for k in range(1, g + 1)]
    assert (np.diff(values) >= 0).all() and 0 <= values[0] <= values[-1] <= 100

    def alike(a, b):
        return any(x == y == 1 for x, y in zip(a, b, strict=True)) if several else a == b != -1

    for k in (1, g):
        hits = sum(any(alike(query[i], gallery[j]) for j in found[i, :k]) for i in range(q))
        assert result[f"R@{k}"] == pytest.approx(100 * hits / q)


@property_settings(60)
@given(seed=seeds, n=st.integers(1, 20), clips=st.integers(1, 4), classes=st.integers(2, 9))
def test_accuracies_do_not_depend_on_the_order_of_videos_or_classes(seed, n, clips, classes):
    rng = np.random.default_rng(seed)
    scores, labels, names = (
        rng.standard_normal((n, clips, classes)),
        rng.integers(0, classes, n),
        np.arange(classes),
    )
    result = evaluation.accuracies(scores, labels, names)
    assert 0 <= result["top1"] <= result["top5"] <= 100 and (classes > 5 or result["top5"] == 100)
    assert result["top1"] == pytest.approx(
        100 * np.mean([scores[i].mean(0).argmax() == labels[i] for i in range(n)])
    )
    assert result["clip_top1"] == pytest.approx(
        100 * np.mean([row.argmax() == labels[i] for i in range(n) for row in scores[i]])
    )
    videos, columns = rng.permutation(n), rng.permutation(classes)
    assert evaluation.accuracies(
        scores[videos][:, :, columns], labels[videos], names[columns]
    ) == pytest.approx(result)


# --------------------------------------------------------------------------------------------------- the bank


@st.composite
def updates(draw):
    n, dim, batch = draw(st.integers(2, 12)), draw(st.integers(1, 8)), draw(st.integers(1, 10))
    momentum = draw(st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.0)))
    index = draw(st.lists(st.integers(0, n - 1), min_size=batch, max_size=batch))
    factors = draw(
        st.lists(
            st.sampled_from((1.0, 1.0, 1.0, np.nan, np.inf, -np.inf, 0.0, 1e-30, 1e30)),
            min_size=batch,
            max_size=batch,
        )
    )
    return n, dim, momentum, torch.tensor(index), torch.tensor(factors), draw(seeds)


@property_settings(150)
@given(case=updates())
def test_a_bank_stays_on_the_sphere_and_its_sums_agree_with_its_memories(case):
    n, dim, momentum, index, factors, seed = case
    bank = memory_bank.MemoryBank(n, dim, momentum, seed)
    generator = torch.Generator().manual_seed(seed)
    video, audio = (
        torch.nn.functional.normalize(torch.randn(len(index), dim, generator=generator), dim=1)
        for _ in range(2)
    )
    video = video * factors[:, None].float()
    before = bank.video.clone(), bank.audio.clone()
    bank.update(index, video, audio)
    for memory in (bank.video, bank.audio):
        torch.testing.assert_close(memory.norm(dim=1), torch.ones(n))
    torch.testing.assert_close(bank.agreement, (bank.video * bank.audio).sum(1))
    agreement = bank.agreement.double()
    mean, std = bank.agreement_mean_std()
    assert mean.item() == pytest.approx(agreement.mean().item(), abs=1e-6)
    assert std.item() == pytest.approx(agreement.std(correction=0).item(), abs=1e-3) and std >= 0
    first = {i: row for row, i in reversed(list(enumerate(index.tolist())))}
    for i in range(n):  # an instance moves once, to its first row, if the result can be normalised
        for memory, old, new in ((bank.video, before[0], video), (bank.audio, before[1], audio)):
            moved = momentum * old[i] + (1 - momentum) * new[first[i]] if i in first else old[i]
            length = moved.norm()
            if i in first and length.isfinite() and length > 1e-6:
                torch.testing.assert_close(memory[i], moved / length)
            else:
                assert torch.equal(memory[i], old[i])


@property_settings(60)
@given(case=updates())
def test_a_bank_does_not_depend_on_the_order_of_rows(case):
    n, dim, momentum, index, _, seed = case
    index = index.unique()
    generator = torch.Generator().manual_seed(seed)
    video, audio = (torch.randn(len(index), dim, generator=generator) for _ in range(2))
    order = torch.randperm(len(index), generator=generator)
    one, other = (memory_bank.MemoryBank(n, dim, momentum, seed) for _ in range(2))
    one.update(index, video, audio)
    other.update(index[order], video[order], audio[order])
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]) or name.startswith("agreement_sum"), name
    torch.testing.assert_close(one.agreement_sum, other.agreement_sum)
    torch.testing.assert_close(one.agreement_sum_squares, other.agreement_sum_squares)


# ------------------------------------------------------------------------------------------------------ draws


@property_settings(100)
@given(
    per_rank=st.integers(1, 4),
    world=st.sampled_from((1, 2, 3, 4)),
    more=st.integers(0, 20),
    how=st.sampled_from(("epoch", "iid")),
    seed=seeds,
    first_step=st.integers(0, 30),
    steps=st.integers(1, 12),
)
def test_draws_are_the_same_for_any_number_of_ranks_and_from_any_step(
    per_rank, world, more, how, seed, first_step, steps
):
    batch, n = per_rank * 12, per_rank * 12 + more  # 12 can be shared by 1 to 4 ranks
    end = first_step + steps
    whole = list(data.BatchSampler(n, batch, how, seed, 0, end))
    shares = [
        list(data.BatchSampler(n, batch, how, seed, first_step, end, rank, world)) for rank in range(world)
    ]
    for step in range(first_step, end):
        together = [key for share in shares for key in share[step - first_step]]
        assert together == whole[step]
        assert all(0 <= index < n for index, _ in together) and len({draw for _, draw in together}) == batch
    if how == "epoch":
        epoch_steps = n // batch
        for epoch in range(end // epoch_steps):
            seen = [
                index for keys in whole[epoch * epoch_steps : (epoch + 1) * epoch_steps] for index, _ in keys
            ]
            assert len(set(seen)) == len(seen) == epoch_steps * batch
