"""What a network knows: features of a data set, a linear probe, ranking.

In: a network, a table of files; or plain arrays.
Out: features and embeddings, one row a clip or a video; accuracies and recalls as plain numbers.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from . import data


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


@torch.no_grad()
def extract(network, table, cfg, device, modalities=data.MODALITIES, clips=None, progress=None):
    """Features and embeddings of `clips` evenly spaced clips of every video of a table, in the table's order.

    network: models.AudioVisual, left in the mode it came in. progress: title of the bar; None: no bar. Files that cannot be
    used are left out and listed in `failures`.
    """
    clips = clips or cfg.eval.clips
    dataset = data.Clips(table, cfg, training=False, modalities=modalities, clips=clips)
    batches = data.loader(dataset, cfg.data.workers, batch_size=max(1, cfg.eval.batch_size // clips))
    was_training = network.training
    network.eval()
    index, failures, rows = [], {}, {}
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None, leave=False):
        failures.update(batch["failures"])
        if "index" not in batch:
            continue
        n = len(batch["index"])
        index.append(batch["index"].numpy())
        batch = data.to_device(batch, device)
        for modality in modalities:
            encode = network.encode_video if modality == "video" else network.encode_audio
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and cfg.optim.amp != "none"):
                embeddings, features = encode(batch[modality])
            for name, x in (("embeddings", embeddings), ("features", features)):
                rows.setdefault((name, modality), []).append(x.float().view(n, clips, -1).cpu().numpy())
    network.train(was_training)
    if not index:
        raise data.MediaError(
            f"none of the {len(table.paths)} files of {table.name} can be used: {next(iter(failures.values()))}"
        )
    found = Features(np.concatenate(index), failures=failures)
    for (name, modality), parts in rows.items():
        getattr(found, name)[modality] = np.concatenate(parts)
    return found


@torch.no_grad()
def settle_batch_norm(network, table, cfg, device):
    """Set the batch-norm statistics of an untrained network from data: without it features vanish, and the floor looks lower than it is."""
    draws = data.Draws(len(table.paths), min(cfg.optim.batch_size, len(table.paths)), "iid", cfg.seed, 0, cfg.eval.settle_batches)
    network.train()
    for batch in data.loader(data.Clips(table, cfg, training=True), cfg.data.workers, batch_sampler=draws):
        batch = data.to_device(batch, device)
        network(batch["video"], batch["audio"])
    network.eval()


def linear_probe(train_x, train_y, test_x, test_y, seed, strengths=(0.01, 0.1, 1.0, 10.0)):
    """L2-regularised multinomial logistic regression on frozen features (docs/method.md section 10).

    train_x n×K×F, train_y n; test_x m×K×F, test_y m. Every clip of a training video is a sample; the regularisation is chosen on a
    fifth of the training videos. → {top1, top5: of videos, softmax averaged over clips; clip_top1; C; classes × classes confusion}
    """
    order = np.random.default_rng(seed).permutation(len(train_x))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]

    def fit(rows, C):
        x = train_x[rows].reshape(-1, train_x.shape[-1])
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))
        return classifier.fit(x, np.repeat(train_y[rows], train_x.shape[1]))

    def probabilities(classifier, x):
        return classifier.predict_proba(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:2], -1)  # m×K×classes

    def score(classifier, x, y):
        return (classifier.classes_[probabilities(classifier, x).mean(1).argmax(1)] == y).mean()

    best = max(strengths, key=lambda C: score(fit(kept, C), train_x[held], train_y[held]))
    classifier = fit(order, best)
    clip = probabilities(classifier, test_x)
    return {**accuracies(clip, test_y, classifier.classes_), "C": best}


def accuracies(scores, labels, classes):
    """Scores n×K×classes of K clips a video, labels n → top1, top5 of videos (scores averaged over clips) and clip_top1, in percent."""
    video = scores.mean(1)  # n×classes
    ranked = classes[np.argsort(-video, axis=1, kind="stable")]  # n×classes
    hits = ranked == labels[:, None]
    clips = classes[scores.argmax(2)] == labels[:, None]
    return {
        "top1": 100 * hits[:, 0].mean().item(),
        "top5": 100 * hits[:, :5].any(1).mean().item(),
        "clip_top1": 100 * clips.mean().item(),
    }


def nearest(queries, gallery, k, chunk=65536, exclude=None):
    """The k most similar rows of the gallery for each query, best first, without a matrix of all similarities.

    queries q×D, gallery g×D, unit rows → positions q×k int64. exclude: q positions that do not count (the query itself), or None.
    """
    queries, gallery = torch.as_tensor(queries), torch.as_tensor(gallery)
    k = min(k, len(gallery) - (exclude is not None))
    best = torch.full((len(queries), k), -torch.inf)
    found = torch.zeros(len(queries), k, dtype=torch.long)
    rows = torch.arange(len(queries))
    for begin in range(0, len(gallery), chunk):
        similarity = queries @ gallery[begin : begin + chunk].T  # q×chunk
        if exclude is not None:
            own = torch.as_tensor(exclude) - begin
            inside = (own >= 0) & (own < similarity.shape[1])
            similarity[rows[inside], own[inside]] = -torch.inf
        top, position = similarity.topk(min(k, similarity.shape[1]))
        best, order = torch.cat([best, top], 1).topk(k)
        found = torch.cat([found, position + begin], 1).gather(1, order)
    return found.numpy()


def recall(found, matches, ks=(1, 5, 10, 20)):
    """R@k in percent: the share of queries with a match among the k nearest. found q×k positions; matches(q, found) → bool q×k."""
    hits = matches(np.arange(len(found))[:, None], found)  # q×k
    return {f"R@{k}": 100 * hits[:, :k].any(1).mean().item() for k in ks if k <= found.shape[1]}


def cross_modal(found, labels=None, ks=(1, 5)):
    """Retrieval between picture and sound of the same videos: instance and, with labels n (−1: none), class R@k, both directions.

    found: Features with embeddings of both modalities.
    """
    video, audio = found.video_level("embeddings", "video"), found.video_level("embeddings", "audio")
    results = {}
    for name, query, gallery in (("v→a", video, audio), ("a→v", audio, video)):
        ranked = nearest(query, gallery, max(ks))
        results |= {f"{name} instance {k}": v for k, v in recall(ranked, lambda q, f: q == f, ks).items()}
        if labels is not None and (labels >= 0).all():
            results |= {f"{name} class {k}": v for k, v in recall(ranked, lambda q, f: labels[q] == labels[f], ks).items()}
    return results
