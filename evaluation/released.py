"""The evaluation protocol of the 2022 code, for comparison only."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.probes import EachEpoch, Labelled, classes_of, top1_top5
from models import SimCLREncoder
from training.represent import check_finite, represent_batch
from utils import Precision, seeded

TEST_BATCH = 64  # test images per batch there; of STL-10 two training batches


def released_probe(
    encoder: SimCLREncoder,
    train: Labelled,
    test: Labelled,
    lr: float,
    precision: Precision,
    epochs: int = 100,
    weight_decay: float = 8e-4,
    batch_size: int = 256,
    test_batch_size: int = TEST_BATCH,
    seed: int = 0,
    each_epoch: EachEpoch = lambda epoch, scores: None,
) -> dict[str, float]:
    """The 2022 protocol with its quirks: top1 and top5 in percent.

    train, test: uint8 images and labels, in batches of their order. The "frozen" backbone stays in train mode, so it
    normalises by each batch's statistics (test batches too), and accuracy is the mean of the batches' percentages,
    whatever the last batch's size. h is not standardised. Works on a copy: the encoder given does not change.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(False).train()
    train, test = (tuple(part.to(precision.device) for part in both) for both in (train, test))
    with seeded(seed, "probe"):
        layer = nn.Linear(encoder.dim, classes_of(train, test)).to(precision.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def features(batch: Tensor) -> Tensor:
        h = represent_batch(encoder, batch, precision)
        check_finite(h.norm(dim=1), precision)
        return h

    def batches(x: Tensor, y: Tensor, size: int) -> zip:
        return zip(x.split(size), y.split(size), strict=True)

    scores: dict[str, float] = {}
    for epoch in range(epochs):
        for batch, truth in batches(*train, batch_size):
            loss = F.cross_entropy(layer(features(batch)), truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            parts = [top1_top5(layer(features(batch)), truth) for batch, truth in batches(*test, test_batch_size)]
        scores = {name: sum(part[name] for part in parts) / len(parts) for name in ("top1", "top5")}
        each_epoch(epoch, scores)
    return scores
