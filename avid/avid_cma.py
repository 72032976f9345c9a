"""AVID and AVID+CMA, from which Robust-xID comes: each sample's own negatives, noise contrastive estimation,
agreement.

In: live embeddings of the global batch's clips, and the memory bank; docs/method.md section 12 has the
equations. Out: losses a clip; what must be kept beside the bank: the partition estimate and each instance's
positives.
"""

import torch

from . import distributed, losses

SIMILARITIES = 2**27  # that are held at a time


class Discrimination(torch.nn.Module):
    """The terms of AVID (`xid`) and of its cross-modal agreement (`cma`), section 12 [A]. cfg: config.Config.

    State: partition Z̄ (0-dim; 0: not estimated yet), of loss.form=nce; positives N×k int32, of weights.cma:
    the instances that agree most with each, found anew every agreement.every_epochs.
    """

    def __init__(self, cfg, bank, warmup_steps, epoch_steps):
        super().__init__()
        # in a list: the bank is no part of this one's state
        self.cfg, self.bank, self.warmup_steps = cfg, [bank], warmup_steps
        self.find_steps = cfg.agreement.every_epochs * epoch_steps
        if cfg.loss.form == "nce":
            self.register_buffer("partition", torch.zeros((), device=bank.video.device))
            self.estimated = False
        if cfg.weights.cma:
            shape = bank.num_instances, cfg.agreement.positives
            positives = torch.zeros(shape, dtype=torch.int32, device=bank.video.device)  # N×k
            self.register_buffer("positives", positives)

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.cfg.loss.form == "nce":
            self.estimated = bool(self.partition > 0)

    def take_partition(self, partition):
        """Go on with Z̄ of the run whose bank this one takes [A]."""
        if self.cfg.loss.form == "nce" and partition is not None and partition > 0:
            self.partition.copy_(partition)
            self.estimated = True

    def agrees(self, step):
        """Whether cma counts at this step; where it is due, the positives are found first. Once a step, on
        every rank.
        """
        since = step - self.warmup_steps
        if not self.cfg.weights.cma or since < 0:
            return False
        if since % self.find_steps == 0:
            find_positives(self.positives, self.bank[0], self.cfg.agreement.by)
        return True

    def xid(self, video, audio, index, local, step, agreed):
        """Each clip told from its own K negatives, by the memories of the other modality: losses b·M.

        video, audio b·M×D, live; index B: instances of the global batch; local: B×… → b·M×…, as this rank's
        clips stand; agreed: whether the positives that agree are no negatives.
        """
        cfg, bank = self.cfg, self.bank[0]
        excluded = self.positives[index].long() if agreed else None
        drawn = local(bank.own_negatives(index, cfg.bank.num_negatives, cfg.seed + step, excluded))  # b·M×K
        own, (v, a) = local(index)[:, None], (bank.read("video", drawn), bank.read("audio", drawn))  # b·M×K×D
        if cfg.loss.form == "nce" and not self.estimated:  # once, at the beginning: it then stands [A]
            estimate = losses.partition(video, a, cfg.loss.temperature)
            self.partition.copy_(distributed.total(estimate) / distributed.world_size())
            self.estimated = True
        return self.discriminate(video, bank.read("audio", own), a) + self.discriminate(
            audio, bank.read("video", own), v
        )

    def cma(self, video, audio, index, local, step):
        """Each clip told from negatives as one of its k positives, within its modality: losses b·M. Arguments
        as xid's.
        """
        cfg, bank = self.cfg, self.bank[0]
        alike = self.positives[index].long()  # B×k
        drawn = bank.own_negatives(index, cfg.agreement.negatives, 2**40 + cfg.seed + step, alike)  # B×K'
        alike, drawn = local(alike), local(drawn)
        return sum(
            self.discriminate(x, bank.read(modality, alike), bank.read(modality, drawn))
            for modality, x in (("video", video), ("audio", audio))
        )

    def discriminate(self, x, positives, negatives):
        """x b·M×D; positives b·M×P×D and negatives b·M×K×D, memories → b·M."""
        if self.cfg.loss.form == "nce":
            return losses.nce(x, positives, negatives, self.cfg.loss.temperature, self.partition)
        return losses.instance(x, positives, negatives, self.cfg.loss.temperature)


@torch.no_grad()
def find_positives(positives, bank, by):
    """Write each instance's k most similar ones, ascending, into positives N×k; O(N²·D). bank:
    memory_bank.MemoryBank.
    """
    n, k = positives.shape
    for queries in torch.arange(n, device=positives.device).split(max(SIMILARITIES // n, 1)):
        alike = similarity(bank.video, bank.audio, queries, by)  # q×N
        alike.scatter_(1, queries[:, None], -torch.inf)  # not the instance itself
        positives[queries] = alike.topk(k, 1).indices.sort(1).values.int()


def similarity(video, audio, queries, by):
    """How alike instances are, (12d) [A]: memories v̄, ā N×D of any float type, queries q → q×N.

    by: consensus, min(v̄_i·v̄_j, ā_i·ā_j), high where both are alike; union, the greater of the two; video or
    audio alone.
    """
    if by in ("video", "audio"):
        memories = (video if by == "video" else audio).float()
        return memories[queries] @ memories.T
    seen, heard = (similarity(video, audio, queries, one) for one in ("video", "audio"))
    return torch.minimum(seen, heard) if by == "consensus" else torch.maximum(seen, heard)
