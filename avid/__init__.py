"""avid: self-supervised learning from video and sound, after two papers. Start reading at train.py, or:

import avid
model = avid.load("runs/toy/last.pt")
found = model.embed("dog.mp4")
"""


def load(checkpoint, device=None, cfg=None, settings=()):
    """The network of a checkpoint, ready to embed files: an embedding.Model, with `embed(files)`.

    checkpoint: a file of train.py's (a run's last.pt), or one released with AVID-CMA; or "random", an
    untrained network, whose batch-norm statistics are those of the files that it embeds first. device:
    "cpu", "cuda", a torch.device; None: the GPU where there is one. cfg: a YAML file or a packaged
    configuration, and settings: ["key=value", …], change the checkpoint's own settings: where it has none
    (AVID-CMA's, "random"), cfg is "avid" or "toy".

    Raises run.CheckpointError, config.ConfigError, models.ModelError: one line each, which names the file.
    """
    from . import embedding  # here: `import avid` is quick, and its command lines answer without torch

    return embedding.load(checkpoint, device, cfg, settings)
