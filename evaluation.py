"""How good an encoder is, by probes on frozen representations, and how close a copy is to its victim."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from attacks import Streamed
from data_aug.datasets import HELD_OUT, load_labelled, to_float
from distributed import gather
from models import SimCLREncoder
from probes import (
    EachEpoch,
    Labelled,
    Probe,
    classes_of,
    knn_accuracy,
    linear_probe,
    logistic_regression,
    top1_top5,
)
from utils import Precision, UserError, quiet, seeded
from victim import image_digests

Space = tuple[Labelled, Labelled]  # representations of training and test images


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Within it the encoder is in eval mode; afterwards RuntimeError if any parameter or buffer has changed."""
    before = {key: value.detach().clone() for key, value in encoder.state_dict().items()}
    training = encoder.training
    encoder.eval()
    yield
    encoder.train(training)
    for key, value in encoder.state_dict().items():
        if not torch.equal(value, before[key]):
            raise RuntimeError(f"evaluation changed the encoder: {key}")


def represent(
    encoder: nn.Module,
    images: Tensor,
    precision: Precision | None = None,
    batch_size: int = 1000,
    output: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Representations (N, D), float32, of uint8 or float images (N, 3, H, W), by the frozen encoder on its device.

    `output` is a method of the encoder to call instead, such as `encoder.project`.
    """
    precision = precision or Precision("fp32", next(encoder.parameters()).device)
    with frozen(encoder):
        return torch.cat([represent_batch(output or encoder, part, precision) for part in images.split(batch_size)])


@torch.no_grad()
def represent_batch(encoder: Callable[[Tensor], Tensor], images: Tensor, precision: Precision) -> Tensor:
    """Representations (B, D), float32, of uint8 or float images (B, 3, H, W), by an encoder in eval mode."""
    images = to_float(images.to(precision.device)).contiguous(memory_format=precision.memory_format)
    with precision.autocast():
        return encoder(images).float()


def represent_streamed(encoder: nn.Module, images: Streamed, precision: Precision, batch_size: int = 256) -> Tensor:
    """As `represent`, of images that are streamed: (N, D) on the encoder's device, in float16 as they are many.

    Each process of a job represents its share of every batch; all get all rows.
    """
    batches = torch.arange(len(images)).split(batch_size)
    bar = tqdm(total=len(images), desc="representations", unit="img", disable=quiet(), leave=False)
    parts = []
    with bar, frozen(encoder):
        for index, own in images.shares(batches, precision.device):
            parts.append(gather(represent_batch(encoder, own, precision).half(), len(index)))
            bar.update(len(index))
    return torch.cat(parts)


def represent_both(encoder: nn.Module, train: Labelled, test: Labelled, precision: Precision) -> Space:
    """`represent` of labelled uint8 images for training and test, on the precision's device."""
    held = ((represent(encoder, images, precision), labels.to(precision.device)) for images, labels in (train, test))
    return tuple(held)


def released_probe(
    encoder: SimCLREncoder,
    train: Labelled,
    test: Labelled,
    lr: float,
    precision: Precision,
    epochs: int = 100,
    weight_decay: float = 8e-4,
    batch_size: int = 256,
    test_batch_size: int = 64,
    seed: int = 0,
    each_epoch: EachEpoch = lambda epoch, scores: None,
) -> dict[str, float]:
    """The 2022 protocol with its quirks, for comparison only: top1 and top5 in percent.

    train, test: uint8 images and labels. The "frozen" backbone stays in train mode, so it normalises by each batch's
    own statistics (test batches too), and accuracy is the mean of the batches' percentages, however large the last is.
    Works on a copy: the encoder that was given does not change.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(False).train()
    device = precision.device
    (images, labels), (test_images, test_labels) = ((x.to(device), y.to(device)) for x, y in (train, test))
    with seeded(seed, "probe"):
        layer = nn.Linear(encoder.dim, classes_of(train, test)).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    def features(batch: Tensor) -> Tensor:
        with torch.no_grad(), precision.autocast():
            return encoder(to_float(batch).contiguous(memory_format=precision.memory_format)).float()

    scores: dict[str, float] = {}
    for epoch in range(epochs):
        for batch, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            loss = F.cross_entropy(layer(features(batch)), truth)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        batches = []
        with torch.no_grad():
            for batch, truth in zip(
                test_images.split(test_batch_size), test_labels.split(test_batch_size), strict=True
            ):
                batches.append(top1_top5(layer(features(batch)), truth))
        scores = {key: sum(one[key] for one in batches) / len(batches) for key in ("top1", "top5")}
        each_epoch(epoch, scores)
    return scores


def evaluate(train: Labelled, test: Labelled, lr: float, seed: int = 0, **options) -> tuple[dict[str, float], Probe]:
    """The scores of representations (N, D) with labels (N,), in percent, and the 2022 probe.

    top1 and top5: `linear_probe`, which gets the options; top1_converged: `logistic_regression`; knn: `knn_accuracy`.
    """
    probe = linear_probe(train, test, lr, seed, **options)
    converged = logistic_regression(train, test, seed)
    scores = {
        "top1": probe.scores["top1"],
        "top5": probe.scores["top5"],
        "top1_converged": converged.scores["top1"],
        "strength": converged.scores["strength"],
        "knn": knn_accuracy(train, test),
    }
    return scores, probe


# ---- how close a copy is ----


def fidelity(copy: Tensor, victim: Tensor, output: Tensor | None = None, neighbours: int = 10) -> dict[str, float]:
    """How close representations (N, D) of a copy are to the victim's (N, E) of the same images.

    l2 and cosine: mean Euclidean and cosine distance of `output` (N, E), the copy's features in the victim's width (the
    representations themselves if not given), left out where the widths differ. cka: `linear_cka`. overlap:
    `neighbour_overlap`. They mean something beside an independent encoder's figures only.
    """
    output = copy if output is None else output
    figures = {}
    if output.shape == victim.shape:
        figures["l2"] = (output - victim).norm(dim=1).mean().item()
        figures["cosine"] = 1 - F.cosine_similarity(output, victim).mean().item()
    figures["cka"] = linear_cka(copy, victim)
    figures["overlap"] = neighbour_overlap(copy, victim, neighbours)
    return figures


def linear_cka(a: Tensor, b: Tensor) -> float:
    """Linear centred kernel alignment of (N, D) and (N, E), from 0 to 1 (Kornblith et al., ICML 2019, section 3).

    |A'B|^2 / (|A'A| |B'B|) in Frobenius norms, columns centred; turning or scaling a set does not change it.
    """
    a, b = ((x - x.mean(dim=0)).double() for x in (a, b))
    return ((a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm()).clamp_min(1e-30)).item()


def neighbour_overlap(a: Tensor, b: Tensor, neighbours: int = 10) -> float:
    """The mean share in percent of the nearest neighbours by cosine that (N, D) and (N, E) have in common."""
    neighbours = min(neighbours, len(a) - 1)

    def nearest(features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=1)
        parts = []
        for start in range(0, len(unit), 1000):
            similarity = unit[start : start + 1000] @ unit.T
            similarity[:, start:].fill_diagonal_(-2)  # an image is not its own neighbour
            parts.append(similarity.topk(neighbours, dim=1).indices)
        return torch.cat(parts)

    common = (nearest(a)[:, :, None] == nearest(b)[:, None, :]).any(dim=2)
    return 100.0 * common.float().mean().item()


def agreement(a: Tensor, b: Tensor) -> float:
    """Share in percent of images for which two classifiers predict (N,) the same."""
    return 100.0 * (a == b).float().mean().item()


def compare(
    spaces: Mapping[str, Space], seed: int = 0, head: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """`fidelity` of `copy` to `victim` on test images, with the agreement of what is predicted of them downstream.

    The same figures of `independent` have names that begin with independent_. `head` takes the copy's representations
    to the victim's width where these differ; the predictions are those of `logistic_regression`.
    """
    predictions = {name: logistic_regression(*space, seed).predictions for name, space in spaces.items()}
    seen = {name: test[0] for name, (_, test) in spaces.items()}
    figures = {}
    for name, prefix in (("copy", ""), ("independent", "independent_")):
        output = head(seen[name]) if head and name == "copy" else None
        close = fidelity(seen[name], seen["victim"], output)
        close["agreement"] = agreement(predictions[name], predictions["victim"])
        figures |= {prefix + key: value for key, value in close.items()}
    return figures


# ---- which images ----


def load_test(
    name: str, root: Path, copy: Mapping, number: int | None = None, last_thousand: bool = False
) -> tuple[Tensor, Tensor, int]:
    """Test images uint8 (N, 3, H, W), their labels (N,), and how many of them the checkpoint's copy queried.

    All are taken, but the last 1,000 only where the others may have been queried (or `last_thousand`), or as many as
    `number`. UserError when images were queried that needn't have been.
    """
    images, labels = load_labelled(name, root, "test")
    queried = copy.get("query_set", {})
    from_test = (queried.get("dataset"), queried.get("split")) == (name, "test")
    if number is None:
        number = HELD_OUT if from_test or last_thousand else len(images)
    if number > len(images):
        raise UserError(f"--num-test {number}: the test split of {name} has {len(images)} images")
    images, labels = images[-number:], labels[-number:]
    common = count_queried(images, copy["query_digests"]) if queried else 0
    # Publishers' own copies of an image in both splits are theirs to mend: they are counted, not refused.
    if common and (from_test or queried["dataset"] != name):
        raise UserError(f"{common} of the {len(images)} test images were queried: lower --num-test, or test on others")
    return images, labels, common


def count_queried(images: Tensor, digests: Tensor) -> int:
    """How many of the images (N, 3, H, W) are, pixel for pixel, among those with digests uint8 (M, 16)."""
    queried = {bytes(row) for row in digests.numpy()}
    return sum(digest in queried for digest in image_digests(images))
