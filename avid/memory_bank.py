"""The memory bank: one slowly moving target per instance and modality, docs/method.md 1.

In: embeddings of the global batch (gathered over ranks by the caller) and the instances that they belong to.
Out: memories, candidates to tell an instance from, and how far each instance's sound agrees with its picture.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from . import distributed
from .config import ConfigError
from .losses import agreement

PIECE = 65536  # rows that are drawn, compared or gathered at a time
FARTHEST = -1e30  # the similarity of a memory that an instance cannot have; what is excluded has −inf
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Candidates:
    index: torch.Tensor | None  # C instances; None: all of them
    valid: torch.Tensor  # C bool   True once per instance, where it stands first
    column: torch.Tensor  # B       where each instance of the batch stands, always valid


class MemoryBank(torch.nn.Module):
    """Memories v̄, ā of N instances, unit length, at random on the sphere [A]; the same on every rank.

    video, audio N×D of dtype: float32, float16 or bfloat16; agreement v̄_i·ā_i N float32, of the memories as
    they are stored. All are buffers: state_dict holds the whole bank. momentum m of `update`.
    """

    def __init__(self, num_instances, dim, momentum, seed, dtype="float32"):
        super().__init__()
        self.num_instances, self.momentum = num_instances, momentum
        for modality in ("video", "audio"):
            self.register_buffer(modality, torch.zeros(self._rows(), dim, dtype=HALF.get(dtype)))  # N×D
        self._begin(seed)
        self.register_buffer("agreement", agreement(self.video, self.audio))  # N
        self.register_buffer("agreement_sum", self._total(self.agreement.double().sum()))
        self.register_buffer("agreement_sum_squares", self._total(self.agreement.double().square().sum()))

    def read(self, name, index):
        """The memories `video` or `audio` (…×D), or the `agreement` (…), of instances: index …, or None for
        all of them."""
        stored = getattr(self, name)
        return (
            stored
            if index is None
            else stored.index_select(0, index.flatten()).view(*index.shape, *stored.shape[1:])
        )

    # what a bank whose rows are spread over the ranks does another way
    def _begin(self, seed):
        """Draw all memories."""
        generator = torch.Generator().manual_seed(seed)
        for modality in ("video", "audio"):
            for index in torch.arange(self.num_instances).split(PIECE):
                self._write(modality, index, _on_the_sphere(len(index), self.video.shape[1], generator))

    def _rows(self):
        return self.num_instances

    def _write(self, name, index, value):
        stored = getattr(self, name)
        stored[index] = value.to(stored.dtype)

    def _total(self, x):
        """The sum over what each rank holds."""
        return x

    def _held(self):
        """How many instances this rank holds."""
        return self.num_instances

    def _local(self):
        """Their rows: {buffer: tensor}."""
        return {name: x[: self._held()] for name, x in self.named_buffers() if x.dim()}

    def _own(self, modality, index):
        """The memories of this rank's instances."""
        return self.read(modality, index)

    def load_rows(self, folder, state):
        """Take this rank's rows out of what a spread bank's `save_rows` wrote. Every rank calls."""
        distributed.load_rows(folder, self._local(), self.num_instances)
        for name, x in self.named_buffers():
            if not x.dim():
                x.copy_(state[name])

    def has(self, modality, index=None):
        """Whether instances (…, None: all) have a picture, or a sound: bool; None: all have, as here."""
        return None

    def agreement_mean_std(self):
        """μ, σ of the agreement over the whole bank, from running sums: two float64 0-dim tensors; σ ≥ 0,
        never NaN."""
        mean = self.agreement_sum / self.num_instances
        variance = self.agreement_sum_squares / self.num_instances - mean.square()
        return mean, variance.clamp(min=0).sqrt()

    def candidates(self, index, num_negatives, generator_seed):
        """The instances that each row of the batch is told from: its own, then K drawn uniformly with
        replacement [A].

        index B: instances of the global batch; num_negatives: K, or "all", the whole bank; generator_seed:
        the same on every rank. -> Candidates, C = B + K or N. An instance that stands twice is valid once,
        where it stands first.
        """
        if num_negatives == "all":
            return Candidates(
                None, torch.ones(self.num_instances, dtype=torch.bool, device=index.device), index
            )
        generator = torch.Generator().manual_seed(generator_seed)  # on the CPU: the same bits on every device
        negatives = torch.randint(self.num_instances, (num_negatives,), generator=generator)  # K
        candidates = torch.cat([index, distributed.to_device(negatives, index.device)])  # C
        first = _first_occurrence(candidates)  # C
        valid = first == torch.arange(len(candidates), device=index.device)
        return Candidates(candidates, valid, first[: len(index)])

    def own_negatives(self, index, num_negatives, generator_seed, excluded=None):
        """Each sample's own K negatives, drawn uniformly with replacement, never the sample itself [A].

        index B: instances of the global batch; generator_seed: the same on every rank; excluded B×k:
        instances that are no negatives either, each once and without the sample itself -> B×K.
        """
        excluded = index[:, None] if excluded is None else torch.cat([index[:, None], excluded], 1)  # B×(1+k)
        others = self.num_instances - excluded.shape[1]
        if others < 1:
            raise ConfigError(
                f"bank.candidates=own leaves no negatives among {self.num_instances} videos; train on more, "
                "or lower agreement.positives"
            )
        generator = torch.Generator().manual_seed(generator_seed)  # on the CPU, as in `candidates`
        place = torch.randint(others, (len(index), num_negatives), generator=generator)  # B×K
        return _skip(distributed.to_device(place, index.device), excluded)

    @torch.no_grad()
    def neighbourhood(self, modality, index, contrast, seeds, draws=None, sample=None):
        """Positives and negatives of each instance from the bank as it is now, section 7 [P: the idea, C: the
        law].

        modality: of the memories; index b: instances; contrast: config.Contrast; seeds: b integers, one a
        row, so that a row's draw does not depend on the rank that makes it; draws: what `draw_neighbours`
        gives for them, b rows each, or None: drawn here. → positives b×n_pos, drawn without replacement from
        the k_pos nearest to the instance's own memory with probability ∝ exp(sim/τ_p); negatives b×n, without
        replacement from the others with probability ∝ exp(sim/τ_n), n = contrast.negatives or as many as
        there are. The instance itself is neither. ConfigError where the bank has no negatives left.

        sample: S instances that `draw_sample` drew, the same for all rows of all ranks: the bank is taken to
        hold no others, and an instance that is not among them leaves out the last one. So each row has S − 1
        candidates, drawn uniformly without replacement from the N − 1 others; the cost does not depend on N.
        """
        _, near, far = self._neighbourhood(modality, index, contrast, seeds, draws, sample)
        return (near, far) if sample is None else (sample[near], sample[far])

    @torch.no_grad()
    def neighbours(self, modality, index, contrast, seeds, draws=None, sample=None):
        """The memories of `neighbourhood`, positives b×n_pos×D and negatives b×n×D, and which of them count:
        bool b×n_pos, b×n; None: all."""
        memory, near, far = self._neighbourhood(modality, index, contrast, seeds, draws, sample)
        there = self.has(modality, sample)  # N or S
        return memory[near], memory[far], None if there is None else (there[near], there[far])

    def _neighbourhood(self, modality, index, contrast, seeds, draws, sample):
        """The memories that are looked at, and which of them are positives and negatives."""
        memory = getattr(self, modality) if sample is None else self.read(modality, sample)  # N×D, or S×D
        others = len(memory) - contrast.k_pos - 1
        if others < 1:
            raise ConfigError(
                f"contrast.k_pos = {contrast.k_pos} leaves no negatives among {len(memory)} videos; lower it"
            )
        if draws is None:
            rows = zip(*(draw_neighbours(len(memory), contrast, seed) for seed in seeds), strict=True)
            draws = [distributed.to_device(torch.stack(row), index.device) for row in rows]
        gumbel, places = draws  # b×k, b×n
        own = self._own(modality, index).float()  # b×D
        itself = index if sample is None else _place(index, sample)  # b   where each row stands in memory
        with torch.autocast(memory.device.type, enabled=False):
            similarity = torch.cat([own @ some.float().T for some in memory.split(PIECE)], 1)  # b×N
        similarity.scatter_(1, itself[:, None], -torch.inf)
        there = self.has(modality, sample)
        if there is not None:
            similarity.masked_fill_(~there, FARTHEST)
        nearness, nearest = similarity.topk(contrast.k_pos, 1)  # b×k

        # the largest of log p + Gumbel noise are draws without replacement
        drawn = (nearness / contrast.tau_p + gumbel).topk(contrast.n_pos, 1).indices
        positives = nearest.gather(1, drawn)  # b×n_pos
        excluded = torch.cat([itself[:, None], nearest], 1)  # b×(k+1)
        if math.isinf(contrast.tau_n):
            return memory, positives, _skip(places, excluded)
        noise = torch.stack([_gumbel(seed, len(memory), memory.device) for seed in seeds])  # b×N
        negative = (similarity / contrast.tau_n).add_(noise).scatter_(1, excluded, -torch.inf)  # b×N
        return memory, positives, negative.topk(min(contrast.negatives, others), 1).indices

    @torch.no_grad()
    def update(self, index, video, audio, where=None):
        """v̄_i ← normalise(m·v̄_i + (1 − m)·v_i), ā_i likewise, section 1 [A]; the cost does not depend on N.

        index B: the instances of the GLOBAL batch, on every rank the same; video, audio: embeddings of this
        rank's clips, b·M×D, any float type: the mean over an instance's M clips counts. An instance that
        stands twice is updated once, by its first row. Where the new memory would be zero or not finite, or
        `where` (0-dim bool) is false, the old stays.
        """
        per_instance = (len(index) // distributed.world_size(), -1, video.shape[-1])  # b×M×D
        both = torch.cat([x.detach().view(per_instance).mean(1) for x in (video, audio)], 1)  # b×2D
        if where is not None:
            both = torch.where(where, both, torch.nan)
        video, audio = distributed.gather(both).chunk(2, 1)  # B×D each
        first = _first_occurrence(index)  # B; rows of one instance write the same: their order is all one
        video = self._moved(self.read("video", index), video[first])  # B×D
        audio = self._moved(self.read("audio", index), audio[first])  # B×D
        agreed = agreement(video, audio)  # B
        once = (first == torch.arange(len(index), device=index.device)).double()  # B
        old, new = self.read("agreement", index).double(), agreed.double()
        self.agreement_sum += (once * (new - old)).sum()
        self.agreement_sum_squares += (once * (new.square() - old.square())).sum()
        for name, value in {"video": video, "audio": audio, "agreement": agreed}.items():
            self._write(name, index, value)

    def _moved(self, memory, embedding):
        moved = self.momentum * memory.float() + (1 - self.momentum) * embedding.float()  # B×D
        length = moved.norm(dim=1, keepdim=True)  # B×1
        return torch.where((length > 1e-6) & length.isfinite(), (moved / length).to(memory.dtype), memory)

    @torch.no_grad()
    def health(self):
        """Mean cosine between two instances' memories, a modality, and the agreement's mean and std: floats
        by name.

        O(N·D): once an epoch. A mean cosine near 1 says that the bank has collapsed to one direction.
        """
        mean, std = self.agreement_mean_std()
        return {
            "cosine_video": self._mean_cosine("video"),
            "cosine_audio": self._mean_cosine("audio"),
            "agreement_mean": mean.item(),
            "agreement_std": std.item(),
        }

    def _mean_cosine(self, modality):
        """Mean of x_i·x_j over i ≠ j of N unit vectors: N²·|mean|² is the sum over all pairs, N of which are
        i = j."""
        n = self.num_instances
        mean = self._total(getattr(self, modality).sum(0, dtype=torch.float64)) / n  # D
        return ((n * mean.square().sum() - 1) / max(n - 1, 1)).item()


class SpreadBank(MemoryBank):
    """The same bank, its rows spread over R ranks: rank r holds the instances r·n to (r + 1)·n − 1, n =
    ⌈N/R⌉.

    Whatever is asked of it, all ranks ask together and, but for neighbours, with the same index; all
    instances at once cannot be had, nor neighbours without a sample. The last row of every buffer is zero: it
    stands for the instances that other ranks hold. Its first memories are drawn by pieces, so that a rank
    draws its own alone; up to 65,536 instances they are MemoryBank's.
    """

    def _begin(self, seed):
        first = distributed.rank() * (self._rows() - 1)
        for piece in range(first // PIECE, -(-(first + self._held()) // PIECE)):
            index = torch.arange(piece * PIECE, min((piece + 1) * PIECE, self.num_instances))
            generator = torch.Generator().manual_seed(hash((seed, piece)) % 2**63 if piece else seed)
            for modality in ("video", "audio"):
                self._write(modality, index, _on_the_sphere(len(index), self.video.shape[1], generator))

    def _rows(self):
        return -(-self.num_instances // distributed.world_size()) + 1

    def _held(self):
        rows = self._rows() - 1
        return min(max(self.num_instances - distributed.rank() * rows, 0), rows)

    def _own(self, modality, index):
        of_all = self.read(modality, distributed.gather(index))  # B×D
        return of_all.chunk(distributed.world_size())[distributed.rank()]

    def _row(self, index):
        """Where instances stand among this rank's: … -> …; those of other ranks in the last row."""
        row, last = index - distributed.rank() * (self._rows() - 1), self._rows() - 1
        return torch.where((row >= 0) & (row < last), row, last)

    def read(self, name, index):
        return self._total(super().read(name, self._row(index)))  # one rank's row, and zeros

    def _write(self, name, index, value):
        super()._write(name, self._row(index), value)
        getattr(self, name)[-1:].zero_()  # not [-1] = 0, a copy from the host

    def _total(self, x):
        return distributed.total(x)

    def state_dict(self):
        raise NotImplementedError("this rank has a part of the bank: save_rows writes all of it")

    def save_rows(self, folder):
        """Write the bank into `folder`, each rank its rows; returns the rest of the state, and the CRC-32 of
        each file. Every rank calls. OSError."""
        rest = {name: x for name, x in self.named_buffers() if not x.dim()}
        return rest | {"crc32": distributed.save_rows(folder, self._local(), self.num_instances)}

    def load_state_dict(self, state):
        """Take this rank's rows out of the state of a bank in one piece."""
        begin, rows = distributed.rank() * (self._rows() - 1), self._rows() - 1
        for name, stored in self.named_buffers():
            saved = state[name]
            if stored.dim():
                saved = saved[begin : begin + rows]
                stored[: len(saved)] = saved.to(stored.device)
            else:
                stored.copy_(saved)


class PartialBank(MemoryBank):
    """The same bank of files of which some have no picture or no sound, as becomes known when they are read.

    held N×2 bool, of video and audio: what each instance has, both until `mark` says otherwise. A memory that
    an instance cannot have is no candidate, no neighbour, does not move and is in no statistics.
    """

    def __init__(self, num_instances, dim, momentum, seed, dtype="float32"):
        super().__init__(num_instances, dim, momentum, seed, dtype)
        self.register_buffer("held", torch.ones(num_instances, 2, dtype=torch.bool))  # N×2

    def mark(self, index, held):
        """Note what instances have: index B, of the global batch; held B×2."""
        self.held[index] = held

    def has(self, modality, index=None):
        column = self.held[:, 0 if modality == "video" else 1]
        return column if index is None else column[index]

    def agreement_mean_std(self):
        """μ, σ over the instances that have both: O(N)."""
        paired, agreed = self.held.all(1).double(), self.agreement.double()  # N
        mean = (paired * agreed).sum() / paired.sum().clamp(min=1)
        variance = (paired * (agreed - mean).square()).sum() / paired.sum().clamp(min=1)
        return mean, variance.sqrt()

    def _mean_cosine(self, modality):
        """Of those that have it; 0 where fewer than two do."""
        memories = getattr(self, modality)[self.has(modality)]  # n×D
        n, total = len(memories), memories.sum(0, dtype=torch.float64)  # D
        return (total.square().sum().item() - n) / max(n * (n - 1), 1)

    def candidates(self, index, num_negatives, generator_seed):
        """Those that have both. The column of an instance that has not is another's, the first valid one."""
        found = super().candidates(index, num_negatives, generator_seed)
        paired = self.held.all(1) if found.index is None else self.held[found.index].all(1)  # C
        valid = found.valid & paired
        valid = valid | ~valid.any()  # no pair at all: no row of the batch counts
        column = torch.where(valid[found.column], found.column, valid.int().argmax())
        return Candidates(found.index, valid, column)

    def update(self, index, video, audio, where=None):
        held = index.chunk(distributed.world_size())[distributed.rank()]  # b, this rank's instances
        both = []
        for modality, x in (("video", video), ("audio", audio)):
            lacking = ~self.has(modality, held).repeat_interleave(len(x) // len(held))  # b·M
            both.append(x.detach().masked_fill(lacking[:, None], torch.nan))  # not finite: moves nothing
        super().update(index, *both, where=where)


def kind(cfg):
    """The class of the bank that the settings ask for."""
    return SpreadBank if cfg.bank.spread else PartialBank if cfg.data.need == "any" else MemoryBank


def draw_sample(num_instances, contrast, seed, device="cpu"):
    """The instances among which neighbours are looked for: contrast.sample of them, distinct, each as
    likely, in random order.

    → S int64 on the device, at most N; None where contrast.sample is 0: all. seed: the same for all ranks.
    """
    if not contrast.sample:
        return None
    size = min(contrast.sample, num_instances)
    drawn = np.random.default_rng(seed).choice(num_instances, size, replace=False)
    return distributed.to_device(torch.from_numpy(drawn), torch.device(device))


def draw_neighbours(num_instances, contrast, seed):
    """What chance there is in the neighbours of one instance, drawn on the CPU: the same bits on every
    device.

    It needs no memories, so that the processes that decode draw it ahead. num_instances: N, or the size of
    the sample. → Gumbel noise of the k_pos nearest, k; which of the others, counted from 0, are negatives, n:
    drawn uniformly without replacement, none for a finite τ_n, which looks at them.
    """
    rng, others = np.random.default_rng(seed), num_instances - contrast.k_pos - 1
    gumbel, n = rng.gumbel(size=contrast.k_pos), min(contrast.negatives, others)
    uniform = math.isinf(contrast.tau_n)
    places = rng.choice(others, n if uniform else 0, replace=False, shuffle=False)
    return torch.from_numpy(gumbel), torch.from_numpy(places)


def row_seed(seed, modality, step, place):
    """The seed of what is drawn for a place in the global batch of a step, whatever rank it falls to."""
    return hash((seed, step, modality == "audio", place)) % 2**63


def _on_the_sphere(rows, dim, generator):
    """Vectors of unit length, rows×D, in random directions."""
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def _place(index, sample):
    """Where instances stand in a sample, b; the last place for one that is not in it."""
    there = index[:, None] == sample  # b×S
    return torch.where(there.any(1), there.int().argmax(1), len(sample) - 1)


def _gumbel(seed, n, device):
    """n draws of the standard Gumbel distribution."""
    generator = torch.Generator(device).manual_seed(seed)
    return -torch.empty(n, device=device).exponential_(generator=generator).log()


def _skip(place, excluded):
    """The place-th of the numbers 0, 1, … that are not excluded: place b×n, excluded b×k -> b×n."""
    ranks = torch.arange(excluded.shape[1], device=excluded.device)  # k
    before = excluded.sort(1).values - ranks  # b×k, how many numbers before each are not excluded
    return place + torch.searchsorted(before, place, right=True)


def _first_occurrence(index):
    """For each entry, where its value stands first: B -> B. By sorting: static shapes, no wait for the
    device."""
    # equal values stay in order, so the leftmost of them stood first
    ordered, position = index.sort(stable=True)
    return position[torch.searchsorted(ordered, index)]
