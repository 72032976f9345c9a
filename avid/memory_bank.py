"""The memory bank: one slowly moving target per instance and modality, docs/method.md 1.

In: embeddings of the global batch (gathered over ranks by the caller) and the instances that they belong to.
Out: memories, candidates to tell an instance from, and how far each instance's sound agrees with its picture.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .config import ConfigError


@dataclass
class Candidates:
    index: torch.Tensor  # C        instances
    valid: torch.Tensor  # C bool   True once per instance, where it stands first
    column: torch.Tensor  # B       where each instance of the batch stands, always valid


class MemoryBank(torch.nn.Module):
    """Memories v̄, ā of N instances, float32, unit length, at random on the sphere [A]; the same on every rank.

    video, audio N×D; agreement v̄_i·ā_i N. All are buffers: state_dict holds the whole bank. momentum m of `update`.
    """

    def __init__(self, num_instances, dim, momentum, seed):
        super().__init__()
        self.momentum = momentum
        generator = torch.Generator().manual_seed(seed)
        for modality in ("video", "audio"):
            memory = torch.randn(num_instances, dim, generator=generator)
            self.register_buffer(modality, F.normalize(memory, dim=1))  # N×D
        self.register_buffer("agreement", (self.video * self.audio).sum(1))  # N
        self.register_buffer("agreement_sum", self.agreement.double().sum())
        self.register_buffer("agreement_sum_squares", self.agreement.double().square().sum())

    def agreement_mean_std(self):
        """μ, σ of the agreement over the whole bank, from running sums: two float64 0-dim tensors; σ ≥ 0, never NaN."""
        mean = self.agreement_sum / len(self.agreement)
        variance = self.agreement_sum_squares / len(self.agreement) - mean.square()
        return mean, variance.clamp(min=0).sqrt()

    def candidates(self, index, num_negatives, generator_seed):
        """The instances that each row of the batch is told from: its own, then K drawn uniformly with replacement [A].

        index B: instances of the global batch; num_negatives: K, or "all", the whole bank; generator_seed: the same on
        every rank. -> Candidates, C = B + K or N. An instance that stands twice is valid once, where it stands first.
        """
        if num_negatives == "all":
            everything = torch.arange(len(self.video), device=index.device)
            return Candidates(everything, torch.ones_like(everything, dtype=torch.bool), index)
        # drawn on the CPU: the same bits on every device; 8 KB at K = 1024, copied without waiting for the device
        generator = torch.Generator().manual_seed(generator_seed)
        negatives = torch.randint(len(self.video), (num_negatives,), generator=generator)  # K
        candidates = torch.cat([index, negatives.to(index.device, non_blocking=True)])  # C
        first = _first_occurrence(candidates)  # C
        valid = first == torch.arange(len(candidates), device=index.device)
        return Candidates(candidates, valid, first[: len(index)])

    @torch.no_grad()
    def neighbourhood(self, modality, index, contrast, seeds):
        """Positives and negatives of each instance from the bank as it is now, section 7 [P: the idea, C: the law].

        modality: of the memories; index b: instances; contrast: config.Contrast; seeds: b integers, one a row, so that a row's
        draw does not depend on the rank that makes it. -> positives b×n_pos, drawn without replacement from the k_pos nearest
        to the instance's own memory with probability ∝ exp(sim/τ_p); negatives b×n, without replacement from the others with
        probability ∝ exp(sim/τ_n), n = contrast.negatives or as many as there are. The instance itself is neither.
        ConfigError where the bank has no negatives left.
        """
        memory = self.video if modality == "video" else self.audio
        others = len(memory) - contrast.k_pos - 1
        if others < 1:
            raise ConfigError(f"contrast.k_pos = {contrast.k_pos} leaves no negatives among {len(memory)} videos; lower it")
        similarity = memory[index] @ memory.T  # b×N
        similarity.scatter_(1, index[:, None], -torch.inf)
        nearest = similarity.topk(contrast.k_pos, 1).indices  # b×k
        # the largest of log p + Gumbel noise are draws without replacement
        gumbel = torch.stack([_gumbel(seed, len(memory), memory.device) for seed in seeds])  # b×N
        positive = (similarity / contrast.tau_p + gumbel).gather(1, nearest)  # b×k
        positives = nearest.gather(1, positive.topk(contrast.n_pos, 1).indices)  # b×n_pos
        negative = (similarity / contrast.tau_n).nan_to_num(nan=-torch.inf) + gumbel  # b×N   (−∞ / ∞ is NaN: i itself)
        negative.scatter_(1, nearest, -torch.inf).scatter_(1, index[:, None], -torch.inf)
        return positives, negative.topk(min(contrast.negatives, others), 1).indices

    @torch.no_grad()
    def update(self, index, video, audio):
        """v̄_i ← normalise(m·v̄_i + (1 − m)·v_i), ā_i likewise, section 1 [A]; the cost does not depend on N.

        index B, video and audio B×D of the GLOBAL batch, any float type, on every rank the same. An instance that
        stands twice is updated once, by its first row. Where the new memory would be zero or not finite, the old stays.
        """
        first = _first_occurrence(index)  # B   rows of one instance all write the same: their order does not matter
        video = self._moved(self.video[index], video[first])  # B×D
        audio = self._moved(self.audio[index], audio[first])  # B×D
        agreement = (video * audio).sum(1)  # B
        once = (first == torch.arange(len(index), device=index.device)).double()  # B
        old, new = self.agreement[index].double(), agreement.double()
        self.agreement_sum += (once * (new - old)).sum()
        self.agreement_sum_squares += (once * (new.square() - old.square())).sum()
        self.video[index], self.audio[index], self.agreement[index] = video, audio, agreement

    def _moved(self, memory, embedding):
        moved = self.momentum * memory + (1 - self.momentum) * embedding.float()  # B×D
        length = moved.norm(dim=1, keepdim=True)  # B×1
        return torch.where((length > 1e-6) & length.isfinite(), moved / length, memory)

    @torch.no_grad()
    def health(self):
        """Mean cosine between two instances' memories, a modality, and the agreement's mean and std: floats by name.

        O(N·D): once an epoch. A mean cosine near 1 says that the bank has collapsed to one direction.
        """
        mean, std = self.agreement_mean_std()
        return {
            "cosine_video": _mean_cosine(self.video),
            "cosine_audio": _mean_cosine(self.audio),
            "agreement_mean": mean.item(),
            "agreement_std": std.item(),
        }


def _gumbel(seed, n, device):
    """n draws of the standard Gumbel distribution."""
    generator = torch.Generator(device).manual_seed(seed)
    return -torch.empty(n, device=device).exponential_(generator=generator).log()


def _first_occurrence(index):
    """For each entry, where its value stands first: B -> B. By sorting: static shapes, no wait for the device."""
    ordered, position = index.sort(stable=True)  # equal values stay in order, so the leftmost of them stood first
    return position[torch.searchsorted(ordered, index)]


def _mean_cosine(memory):
    """Mean of x_i·x_j over i ≠ j, N×D unit vectors: N²·|mean|² is the sum over all pairs, N of which are i = j."""
    n = len(memory)
    mean = memory.sum(0, dtype=torch.float64) / n  # D
    return ((n * mean.square().sum() - 1) / max(n - 1, 1)).item()
