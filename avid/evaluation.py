"""What a network knows: the network to evaluate, features of a data set, linear classifiers, ranking.

In: a checkpoint and a table of files; or plain arrays.
Out: features and embeddings, one row a clip or a video; accuracies and recalls as plain numbers, in percent.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import cli, config, data, datasets, distributed, files, models, progress, run, temporal_tasks, toy

OF_A_DATA_SET = ("label", "subset", "decode", "shuffle")  # settings data.* of which another knows nothing
COLLAPSED = 0.95  # mean cosine within a bank that calls for a warning

# ------------------------------------------------------------------------ the network, its data, plain errors


@dataclass
class Subject:
    """The network under evaluation, and where its results go."""

    network: models.AudioVisual
    cfg: config.Config
    device: torch.device
    name: str  # the checkpoint's path, or random
    hash: str  # of the checkpoint file; of an untrained network: its seed
    out: Path

    def describe(self):
        """What every result names: data, split, seed, checkpoint."""
        source = self.cfg.data
        return {
            "checkpoint": self.name,
            "checkpoint_hash": self.hash,
            "data": source.name,
            **({"subset": source.subset} if source.subset else {}),
            "split": source.split or datasets.row(source).evaluation,
            "seed": self.cfg.seed,
        }


USER_ERRORS = (
    config.ConfigError,
    run.CheckpointError,
    models.ModelError,
    datasets.DataError,
    data.MediaError,
    FloatingPointError,
)


@contextlib.contextmanager
def plain_errors():
    """What the user can mend ends the program with one line and exit code 2, Ctrl-C with one line and 130."""
    try:
        with distributed.clean_end():
            yield
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from what is kept", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    except USER_ERRORS as error:
        config.stop(message_of(error))


def message_of(error):
    """What an error says in one line; of one from a decoding process, what stands below its traceback."""
    message = str(error)
    if message.startswith("Caught "):
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message


def subject(arguments):
    """The network that a command line (cli.evaluation_parser) names. The settings are the checkpoint's, then
    --cfg's, then the overrides. An untrained network still needs `calibrate_batch_norm`. Raises
    CheckpointError, ConfigError."""
    state = {} if arguments.ckpt == "random" else run.load_checkpoint(arguments.ckpt)
    default = None if "config" in state else "avid" if state else "toy"  # AVID-CMA's hold no settings
    name = arguments.cfg or default
    if "config" in state:
        try:
            config.load(None, base=state["config"])
        except config.ConfigError as error:
            raise config.ConfigError(
                f"{arguments.ckpt} holds settings that this version does not take: {error}"
            ) from None
    base = state.get("config")
    if base:
        of_data = base["data"] | {"split": ""}  # the part that it was trained on
        asked = [text for text in cli.overrides(arguments) if text.startswith("data.name=")]
        if asked and asked[-1] != f"data.name={of_data['name']}":
            of_data = {key: value for key, value in of_data.items() if key not in OF_A_DATA_SET}
        base = base | {"data": of_data}
    cfg = config.load(name, cli.overrides(arguments), base=base)
    out = Path(arguments.out or (Path(arguments.ckpt).parent if state else "runs/random"))
    files.check_folder(out)
    if not state:  # a checkpoint's settings are what its network was built with
        models.check(cfg.model)
    torch.manual_seed(cfg.seed)
    network = models.AudioVisual(cfg.model, temporal_tasks.classes(cfg) if "network" in state else ())
    if state:
        models.load(network, state, arguments.ckpt)
    device = distributed.start().device  # of many processes (--mode finetune): of this rank
    digest = files.file_hash(arguments.ckpt) if state else f"untrained, seed {cfg.seed}"
    return Subject(network.to(device).eval(), cfg, device, arguments.ckpt, digest, out)


def tables(cfg):
    """The (training, evaluation) tables of every division that data.split asks for.

    The toy is written if need be. Where a data set has no parts of its own, a fifth of each class is held
    out, by the seed [C]. Raises DataError.
    """
    source = toy.source(cfg)
    if divisions := datasets.row(source).divisions:
        numbers = range(1, divisions + 1) if source.split == "all" else [source.split or "1"]
        pairs = [(f"train{n}", f"test{n}") for n in numbers]
    else:
        pairs = [("train", source.split or datasets.row(source).evaluation)]
    # all are read before the first is used
    pairs = [[*map(datasets.read(source, *pair), pair)] for pair in pairs]
    for train, test in pairs:
        new = datasets.unseen(test, train)
        yield (train, new) if len(new) else datasets.hold_out(train, cfg.seed)


def modalities_of(cfg, asked=None):
    """The modalities of the data set's files, or the one asked for. Raises ConfigError where they lack it."""
    held = datasets.row(cfg.data).modalities
    if asked and asked not in held:
        raise config.ConfigError(
            f"--modality {asked} cannot be had: {cfg.data.name} has no pictures; use --modality audio"
        )
    return (asked,) if asked else held


def labels_of(table, several=False):
    """The classes of a table's videos: N, or N×C where a video may have `several`. DataError where one has
    none."""
    if table.labels.ndim > 1 and not several:
        raise datasets.DataError(
            f"{table.name} has several classes a file; this evaluation needs one, use --mode linear or svm, "
            "or eval_retrieval.py"
        )
    without = ~has_class(table.labels)
    if without.any():
        raise datasets.DataError(
            f"{table.name}: {without.sum():,} of {len(table):,} files have no class, e.g. "
            f"{table.name_of(without.argmax())}; give them one, or take them off the list; "
            "without classes: python -m avid search, or eval_retrieval.py --task cross"
        )
    return table.labels


def has_class(labels):
    """Which videos have a class: labels N (−1: none) or N×C of 0 and 1 → bool N."""
    return labels.any(1) if labels.ndim > 1 else labels >= 0


# --------------------------------------------------------------------------------------------------- features


@dataclass
class Features:
    """n videos that could be read, K clips each."""

    index: np.ndarray  # n, rows of the table
    features: dict = field(default_factory=dict)  # modality → n×K×F
    embeddings: dict = field(default_factory=dict)  # modality → n×K×D, unit length
    failures: dict = field(default_factory=dict)  # row of the table → why it could not be read

    def video_level(self, what, modality):
        """Mean over a video's clips, back to unit length: n×F or n×D float32."""
        return F.normalize(torch.from_numpy(getattr(self, what)[modality]).mean(1), dim=1).numpy()

    def save(self, path, **more):
        """Write index, features_video, embeddings_audio, … and `more` arrays as an .npz."""
        arrays = {
            f"{what}_{modality}": x
            for what in ("features", "embeddings")
            for modality, x in getattr(self, what).items()
        }
        with files.replacing(path, "wb") as file:
            np.savez(file, index=self.index, failures=np.array(json.dumps(self.failures)), **arrays, **more)

    @classmethod
    def load(cls, path):
        with np.load(path, allow_pickle=False) as arrays:  # numbers and text: no code is run from a file
            found = cls(
                arrays["index"], failures={int(k): v for k, v in json.loads(str(arrays["failures"])).items()}
            )
            for name in arrays.files:
                what, _, modality = name.partition("_")
                if modality:
                    getattr(found, what)[modality] = arrays[name]
        return found


@torch.inference_mode()
def extract(network, clips, device, title=None):
    """Features and embeddings of every video of a data.Clips for evaluation, in its order.

    network: models.AudioVisual, left in the mode it came in. title: of the progress bar; None: no bar. Files
    that cannot be used are left out and listed in `failures`. Raises MediaError where no file can be used.
    """
    not_empty(clips.table)
    cfg, count, modalities = clips.cfg, clips.clips, clips.modalities
    batches = data.loader(clips, cfg.data.workers, batch_size=max(1, cfg.eval.batch_size // count))
    was_training = network.training
    network.eval()
    index, failures, rows = [], {}, {}
    bar = progress.bar(None, title, len(clips), unit="video", leave=False, disable=title is None)
    with bar:
        for batch in batches:
            failures.update(batch["failures"])
            bar.update(len(batch["failures"]) + len(batch.get("index", ())))
            if "index" not in batch:
                continue
            n = len(batch["index"])
            index.append(batch["index"].numpy())
            batch = data.to_device(batch, device, cfg.audio)
            with run.autocast(cfg.optim.amp, device):
                encoded = {modality: network.encode(modality, batch[modality]) for modality in modalities}
            for modality, pair in encoded.items():  # the first copy waits for the device, which is done then
                for name, x in zip(("embeddings", "features"), pair, strict=True):
                    rows.setdefault((name, modality), []).append(x.float().view(n, count, -1).cpu().numpy())
    network.train(was_training)
    if not index:
        raise data.MediaError(
            f"none of the {len(clips):,} files of {clips.table.name} can be used by {'+'.join(modalities)}: "
            f"{next(iter(failures.values()))}"
        )
    found = Features(np.concatenate(index), failures=failures)
    for (name, modality), parts in rows.items():
        getattr(found, name)[modality] = np.concatenate(parts)
    return found


def not_empty(table):
    """Raise DataError where a table has no rows, as `tables` may leave of small classes."""
    if not len(table):
        raise datasets.DataError(
            f"{table.name} holds no files: the only one of a class is held out; give each class two or more, "
            "or make parts train/ and test/"
        )


def features(subject, clips, *what, level="clip"):
    """`extract` with a progress bar, kept in <out>/features/: asked for again, it is read from there.

    clips: data.Clips for evaluation; what: numbers and texts that say how they differ from plain ones of the
    same settings. level="video": only the features are kept, their mean over a video's clips, of unit length
    (n×1×F). A kept file that cannot be read is written anew.
    """
    cfg, table = subject.cfg, clips.table
    content = [subject.hash, str(table.root.resolve()), table.paths]
    content += [[files.state(path) for path in datasets.sources(table)]]
    content += [table.start_s.tolist(), table.end_s.tolist(), clips.modalities, clips.clips, level, what]
    content += [dataclasses.asdict(part) for part in (cfg.video, cfg.audio, cfg.model, cfg.eval)]
    content += [dataclasses.asdict(cfg.temporal)] * (subject.name == "random")  # by which it was calibrated
    content += [cfg.optim.amp, cfg.data.decode, cfg.data.timeout_s]  # a file that took too long is a failure
    path = subject.out / "features" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            return Features.load(path)
        except Exception as error:  # a damaged file can fail in any way
            tqdm.write(f"{path} cannot be read and is written anew: {error}")
    title = " ".join(map(str, (table.name, *clips.modalities, *what)))
    found = extract(subject.network, clips, subject.device, title)
    for row, reason in found.failures.items():
        tqdm.write(f"skipped {data.shown(table, row)}: {reason}")
    if level == "video":
        means = {modality: found.video_level("features", modality)[:, None] for modality in clips.modalities}
        found = Features(found.index, means, failures=found.failures)
    found.save(path)
    return found


def features_of(subject, table, modality):
    """`features` of a table's videos by one modality alone: a mute video counts by its picture."""
    return features(subject, data.Clips(table, subject.cfg, training=False, modalities=(modality,)))


def in_common(parts):
    """Features of several modalities, read one by one, as one: of the videos that have them all."""
    index = functools.reduce(np.intersect1d, [part.index for part in parts])
    found = Features(index, failures={row: why for part in parts for row, why in part.failures.items()})
    for part in parts:
        here = np.isin(part.index, index)
        found.features |= {modality: x[here] for modality, x in part.features.items()}
        found.embeddings |= {modality: x[here] for modality, x in part.embeddings.items()}
    return found


@torch.no_grad()
def calibrate_batch_norm(subject, table, modalities=data.MODALITIES):
    """Set the batch-norm statistics of an untrained network from data, of each modality by itself: without it
    features vanish, and the floor looks lower than it is [C]. Nothing happens to a trained network, or to a
    modality a second time."""
    cfg, network = subject.cfg, subject.network
    for modality in modalities:
        if subject.name != "random" or f"{modality} calibrated" in subject.hash:
            continue
        not_empty(table)
        batch_size, batches = min(cfg.optim.batch_size, len(table)), cfg.eval.calibration_batches
        draws = data.BatchSampler(len(table), batch_size, "iid", cfg.seed, 0, batches)
        clips = data.Clips(table, cfg, training=True, modalities=(modality,))
        try:
            network.train()
            for batch in data.loader(clips, cfg.data.workers, batch_sampler=draws):
                network.encode(modality, data.to_device(batch, subject.device, cfg.audio)[modality])
        finally:
            network.eval()
        subject.hash += f", {modality} calibrated on {table.name} ({datasets.table_hash(table)}), "
        subject.hash += f"batches of {batch_size}"


@torch.no_grad()
def confusions(network, table, cfg, device, draws=2):
    """Confusion matrices of the temporal tasks on a table's videos: {task: C×C counts, row truth, column
    answer}.

    The clips are drawn as for training, `draws` times a video by the seed. Files that cannot be used are
    replaced by others, as in training.
    """
    keys = [(index, (5, draw, index)) for draw in range(draws) for index in range(len(table))]
    batches = [keys[i : i + cfg.eval.batch_size] for i in range(0, len(keys), cfg.eval.batch_size)]
    counts = {task: torch.zeros(n, n, dtype=torch.long) for task, n in temporal_tasks.classes(cfg).items()}
    was_training = network.training
    network.eval()
    for batch in data.loader(data.training_clips(table, cfg), cfg.data.workers, batch_sampler=batches):
        batch = data.to_device(batch, device, cfg.audio)
        with run.autocast(cfg.optim.amp, device):
            output = network(batch["video"], batch["audio"])
        for task, logits in output.temporal.items():
            truth = temporal_tasks.targets(task, batch)
            known = truth != temporal_tasks.UNKNOWN
            n = len(counts[task])
            counts[task] += (
                torch.bincount(truth[known] * n + logits[known].argmax(1), minlength=n * n).view(n, n).cpu()
            )
    network.train(was_training)
    return {task: count.numpy() for task, count in counts.items()}


@torch.no_grad()
def check(network, bank, held_out, cfg, world):
    """What training looks at every few epochs: the bank's health and, among held-out videos, cross-modal
    retrieval and the temporal tasks, whose confusion matrices go to <cfg.out>/temporal.png.

    bank: memory_bank.MemoryBank; held_out: datasets.Table or None. Every rank calls. → numbers by name; of
    the other ranks than the first, none.
    """
    results = bank.health()
    if world.rank > 0:
        return {}
    for modality in data.MODALITIES:
        if (cosine := results[f"cosine_{modality}"]) > COLLAPSED:
            tqdm.write(
                f"warning: the {modality} bank has collapsed to one direction (mean cosine {cosine:.3f}); "
                "try model.head_norm=batch optim.draws=iid, or a lower optim.lr"
            )
    tqdm.write("bank: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items()))
    if held_out is None:
        return results
    pairs = held_out if cfg.data.need == "both" else data.with_both(held_out)
    if len(pairs):
        try:
            found = extract(network, data.Clips(pairs, cfg, training=False, clips=1), world.device)
        except data.MediaError as error:
            tqdm.write(f"warning: nothing was held out: {error}; training goes on")
            return results
        recalls = cross_modal(found, pairs.labels[found.index])
        tqdm.write("held out: " + ", ".join(f"{name} {value:.1f}" for name, value in recalls.items()))
        results |= recalls
    if network.temporal.heads:
        from .tools import figures  # here: evaluation is read by many who draw nothing

        confusion = confusions(network, held_out, cfg, world.device)
        right = {task: n.trace().item() / max(n.sum().item(), 1) for task, n in confusion.items()}
        tasks = {f"held-out {task} %": 100 * share for task, share in right.items()}
        tqdm.write(", ".join(f"{name} {value:.1f}" for name, value in tasks.items()))
        figures.confusions(confusion, cfg.temporal, Path(cfg.out) / "temporal.png")
        results |= tasks
    return results


# ------------------------------------------------------------------------------------------------ classifiers

# of a classifier: C, the inverse of the L2 penalty
STRENGTHS = {"linear": (0.01, 0.1, 1.0, 10.0), "svm": (1e-4, 1e-3, 1e-2, 0.1, 1.0)}


def linear_probe(train_x, train_y, test_x, test_y, seed, classifier="linear", C=None):
    """A linear classifier on frozen, standardised features (docs/method.md section 10).

    train_x n×K×F, train_y n, or n×C of 0 and 1 where a video has several classes; test_x m×K×F, test_y
    likewise. classifier: linear (multinomial logistic regression; of several classes a video, one logistic
    regression a class) or svm (one against the rest). Every clip of a training video is a sample. C: None,
    the best of STRENGTHS on a fifth of the training videos.
    → `accuracies`, or `precisions` where a video has several classes, of softmax or margins averaged over
    clips; and C. Raises DataError where there are too few training videos.
    """
    # here: training and retrieval begin two seconds earlier without
    from sklearn import linear_model, multiclass, pipeline, preprocessing, svm

    logistic = functools.partial(linear_model.LogisticRegression, max_iter=1000)
    Classifier = {"linear": logistic, "svm": svm.LinearSVC}[classifier]
    several = train_y.ndim > 1
    score, best = (precisions, "mAP") if several else (accuracies, "top1")

    def fit(rows, C):
        """The classifier, and the classes that it knows."""
        x, y = train_x[rows].reshape(-1, train_x.shape[-1]), train_y[rows]
        model, classes = Classifier(C=C), np.unique(y)
        if several:
            classes = np.flatnonzero(y.any(0) & ~y.all(0))
            model, y = multiclass.OneVsRestClassifier(model), y[:, classes]
        standardised = pipeline.make_pipeline(preprocessing.StandardScaler(), model)
        return standardised.fit(x, np.repeat(y, train_x.shape[1], axis=0)), classes

    def scores(fitted, x):
        """m×K×classes."""
        flat = x.reshape(-1, x.shape[-1])
        values = fitted.predict_proba(flat) if classifier == "linear" else fitted.decision_function(flat)
        if values.ndim == 1:  # margins of two classes; of several classes a video, of the only one
            values = values[:, None] if several else np.stack([-values, values], 1)
        if several and len(fitted[-1].estimators_) == 1:  # of the only class, not of its absence
            values = values[:, -1:]
        return values.reshape(*x.shape[:2], -1)

    order = np.random.default_rng(seed).permutation(len(train_x))
    held, rest = np.split(order, [len(order) // 5]) if C is None else (None, order)
    if len(np.unique(train_y[rest], axis=0)) < 2 or (C is None and not len(held)):
        raise datasets.DataError(
            f"{len(train_y)} training videos are too few for a classifier; use more, of two classes or more"
        )
    if C is None:

        def held_out_score(C):
            fitted, classes = fit(rest, C)
            return score(scores(fitted, train_x[held]), train_y[held], classes)[best]

        C = max(STRENGTHS[classifier], key=held_out_score)
    fitted, classes = fit(order, C)
    return {**score(scores(fitted, test_x), test_y, classes), "C": C}


def few_shot(train_x, train_y, test_x, test_y, seed, shots=(1, 5, 20), draws=20):
    """A linear SVM from k labelled videos a class, all clips of each: {"k-shot top1": mean, "k-shot std":
    over the draws}.

    Arguments as linear_probe's; percent. Of a class with fewer videos, all are taken. The SVM's C is 1e-3
    [C]: nothing is left to choose it on.
    """
    results = {}
    for k in shots:
        top1 = []
        for draw in range(draws):
            order = np.random.default_rng((seed, k, draw)).permutation(len(train_y))
            few = np.concatenate([order[train_y[order] == label][:k] for label in np.unique(train_y)])
            top1.append(linear_probe(train_x[few], train_y[few], test_x, test_y, seed, "svm", C=1e-3)["top1"])
        results |= {f"{k}-shot top1": np.mean(top1).item(), f"{k}-shot std": np.std(top1).item()}
    return results


def accuracies(scores, labels, classes):
    """Scores n×K×classes of K clips a video, labels n → top1, top5 of videos, from scores averaged over
    clips, and clip_top1."""
    video = scores.mean(1)  # n×classes
    ranked = classes[np.argsort(-video, axis=1, kind="stable")]  # n×classes
    hits = ranked == labels[:, None]
    clips = classes[scores.argmax(2)] == labels[:, None]
    return {
        "top1": 100 * hits[:, 0].mean().item(),
        "top5": 100 * hits[:, :5].any(1).mean().item(),
        "clip_top1": 100 * clips.mean().item(),
    }


def precisions(scores, labels, classes):
    """Scores n×K×classes of K clips a video, labels n×C of 0 and 1, classes: which columns of them the scores
    are for.

    → mAP, the mean over classes of the average precision of ranking the videos by a class's score, averaged
    over clips; AUC, the mean area under the ROC curve; chance mAP, of a random ranking: the mean share of a
    class's videos; classes, how many there are: of the scored ones those that some videos have and others
    lack. Raises DataError where there is none.
    """
    from sklearn import metrics

    truth, video = labels[:, classes], scores.mean(1)  # n×classes
    there = truth.any(0) & ~truth.all(0)
    if not there.any():
        raise datasets.DataError(
            "no class that some of the evaluated videos have and others lack was trained"
        )
    pairs = [(truth[:, c], video[:, c]) for c in np.flatnonzero(there)]
    return {
        "mAP": 100 * float(np.mean([metrics.average_precision_score(*pair) for pair in pairs])),
        "AUC": 100 * float(np.mean([metrics.roc_auc_score(*pair) for pair in pairs])),
        "chance mAP": 100 * truth[:, there].mean().item(),
        "classes": len(pairs),
    }


# ---------------------------------------------------------------------------------------------------- ranking


def nearest(queries, gallery, k, exclude=None, rows=1024, columns=16384):
    """The k most similar rows of the gallery for each query, best first, without a matrix of all
    similarities.

    queries q×D, gallery g×D, unit rows → positions q×k int64. exclude: q positions that do not count (the
    query itself), or None. rows×columns similarities are held at a time.
    """
    queries, gallery = torch.as_tensor(queries), torch.as_tensor(gallery)
    k = min(k, len(gallery) - (exclude is not None))
    found = torch.empty(len(queries), k, dtype=torch.long)
    for start in range(0, len(queries), rows):
        some = queries[start : start + rows]
        best = torch.full((len(some), 0), -torch.inf)
        where = torch.zeros(len(some), 0, dtype=torch.long)
        for begin in range(0, len(gallery), columns):
            similarity = some @ gallery[begin : begin + columns].T  # rows×columns
            if exclude is not None:
                own = torch.as_tensor(exclude)[start : start + rows] - begin
                inside = (own >= 0) & (own < similarity.shape[1])
                similarity[inside.nonzero()[:, 0], own[inside]] = -torch.inf
            top, position = similarity.topk(min(k, similarity.shape[1]))
            best, where = torch.cat([best, top], 1), torch.cat([where, position + begin], 1)
            best, order = best.topk(min(k, best.shape[1]))
            where = where.gather(1, order)
        found[start : start + rows] = where
    return found.numpy()


def recall(found, matches, ks=(1, 5, 10, 20)):
    """R@k in percent: the share of queries with a match among the k nearest.

    found q×k positions; matches(q, found) → bool q×k.
    """
    hits = matches(np.arange(len(found))[:, None], found)  # q×k
    return {f"R@{k}": 100 * hits[:, :k].any(1).mean().item() for k in ks if k <= found.shape[1]}


def chance(matching, gallery, ks=(1, 5, 10, 20)):
    """R@k in percent of ranking the gallery at random, as {"R@1": …}.

    matching: q, how many videos of the gallery match each query; gallery: how many there are. None of the
    first k matches with the probability Π_{i<k} (gallery − matching − i) / (gallery − i).
    """
    matching, misses, results = np.asarray(matching), 1.0, {}
    for i in range(min(max(ks), gallery)):
        misses = misses * np.clip(gallery - matching - i, 0, None) / (gallery - i)  # q
        if i + 1 in ks:
            results[f"R@{i + 1}"] = 100 * float(np.mean(1 - misses))
    return results


def matching(query, gallery):
    """How many videos of the gallery share a class with each query: q. Labels as of datasets.same_class."""
    if query.ndim > 1:
        of_class = np.ascontiguousarray(gallery.T, dtype=bool)  # C×g
        return np.array([of_class[classes > 0].any(0).sum() for classes in query])
    counts = np.bincount(gallery[gallery >= 0], minlength=query.max(initial=0) + 1)
    return np.where(query >= 0, counts[query], 0)


def matches_among(labels):
    """What a match is among the same n videos: {"instance": `matches` of `recall`} and, where all have one,
    "class"."""
    matches = {"instance": np.equal}
    if has_class(labels).all():
        matches["class"] = datasets.same_class(labels, labels)
    return matches


def chance_among(labels, ks=(1, 5, 10, 20)):
    """`chance` among the same n videos: {"chance instance R@1": …} and, where all have one, by class."""
    n = len(labels)
    counts = {"instance": np.ones(n), "class": matching(labels, labels)}
    return {
        f"chance {by} {k}": value
        for by in matches_among(labels)
        for k, value in chance(counts[by], n, ks).items()
    }


def cross_modal(found, labels, ks=(1, 5)):
    """Retrieval between picture and sound of the same videos, both directions: R@k by instance and by class.

    found: Features with embeddings of both modalities; labels: n (−1: none), or n×C, of which a match shares
    one; where a video has none, nothing is found by class.
    """
    video, audio = found.video_level("embeddings", "video"), found.video_level("embeddings", "audio")
    results = {}
    for name, query, gallery in (("v→a", video, audio), ("a→v", audio, video)):
        ranked = nearest(query, gallery, max(ks))
        for by, match in matches_among(labels).items():
            results |= {f"{name} {by} {k}": value for k, value in recall(ranked, match, ks).items()}
    return results


# ---------------------------------------------------------------------------------------------------- results


def result_file(subject, name):
    """<out>/<name>-<data>-<split>.json, of ESC-10 with data.subset before the split. Raises ConfigError where
    something else than an earlier result is there."""
    measured, subset = subject.describe(), subject.cfg.data.subset
    path = subject.out / f"{name}-{measured['data']}{subset and f'-{subset}'}-{measured['split']}.json"
    try:
        usable = not path.exists() or measured.keys() <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError):  # a folder, no JSON, no dict
        usable = False
    if not usable:
        raise config.ConfigError(
            f"{path} is no result of an evaluation; move it away, or choose another --out"
        )
    return path


def write_result(subject, name, result):
    """Write `result_file`, whole or not at all: what was measured, and the result; returns both as one
    dict."""
    result, path = {**subject.describe(), **result}, result_file(subject, name)
    with files.replacing(path) as file:
        file.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    tqdm.write(f"written: {path}")
    return result


def print_table(rows, columns):
    """Rows, dicts, as aligned text; numbers that are no counts with one decimal."""
    text = [[f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *text, strict=True)]
    for line in (columns, *text):
        print("  ".join(value.rjust(width) for value, width in zip(line, widths, strict=True)))
