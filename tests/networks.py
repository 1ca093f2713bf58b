"""Small encoders and trainers of them, and networks as the authors of other projects build them."""

import copy
import functools
import itertools
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from attacks import Attack
from data_aug.images import Stored
from loss import STEAL_LOSSES, TRAIN_LOSSES
from models import SimSiamHeads, load_encoder, projection_head, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from models.simclr import SimCLREncoder
from simclr import SimCLR
from training.recipe import Recipe
from training.run import Run
from utils import Precision, UserError, seeded

FP32 = Precision("fp32", torch.device("cpu"))

# ---- small encoders ----


class Small(nn.Module):
    """A backbone of two convolutions: images (B, 3, H, W) -> representations (B, dim), in a hundredth of the time."""

    def __init__(self, dim=32):
        super().__init__()
        self.dim = dim
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 4, stride=4, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, dim, 3, stride=2, bias=False), nn.BatchNorm2d(dim)
        self.fc = nn.Identity()

    def represent(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x))).mean(dim=(2, 3))


def small_encoder(out_dim=None, seed=1, dim=32):
    """An untrained encoder with the backbone `Small`; no checkpoint of it is read back as an encoder."""
    with seeded(seed):
        return SimCLREncoder(Small(dim), "small", projection_head(dim, out_dim) if out_dim else None)


def few(loss):
    """The loss, for batches of a few images."""
    return loss.bind({"queue": 7, "bn_groups": 2}) if "queue" in loss.settings else loss


def trainer(folder, model=None, losstype="infonce", resume=False, precision=FP32, **values):
    """A trainer for the encoder with a head that is given, or for a small copy without one, of two epochs of batches
    of 4; `values` are of the recipe."""
    loss = (TRAIN_LOSSES if model is not None and model.has_head else STEAL_LOSSES)[losstype]
    model = model or small_encoder()
    recipe = Recipe(**{"epochs": 2, "batch_size": 4, **values})
    with seeded(0):
        heads = SimSiamHeads(model.output_dim, 32) if loss.predictor else None
        companion = heads or few(loss).make_companion(model, 12, recipe.batch_size)
    return SimCLR(model, loss, recipe, Run(folder, precision, {"kind": "stolen"}, resume), companion)


def steal(job, images, victim, labels=None, **values):
    """Lets a trainer steal with images in memory; `values` are of the attack."""
    values = {"n_views": job.loss.min_views, "plain_first": job.loss.plain_first, **values}
    job.steal(Stored(images), victim, Attack(**values), labels)


def weights(folder):
    return read_checkpoint(folder / "checkpoint.pth.tar")["state_dict"]


def losses(folder):
    """The loss of each epoch that a run has finished."""
    return [line["loss"] for line in Run(folder, FP32).lines()]


def same(a, b):
    """Whether two state dictionaries are bit-identical."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- other projects' ----


def randomise(network):
    """Statistics and scales of BatchNorm as training leaves them, not ones and zeros."""
    draws = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor, low, high in ((module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 2.0)):
                tensor.copy_(torch.rand(tensor.shape, generator=draws) * (high - low) + low)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.weight.shape, generator=draws) + 0.5)
                module.bias.data.copy_(torch.rand(module.bias.shape, generator=draws) * 0.4 - 0.2)
            module.num_batches_tracked.fill_(7)
    return network.eval()


@functools.cache
def torch_resnet(name="resnet18", cifar=None):
    """torchvision's, its last layer left out; `cifar` is the padding of a 3x3 stem without max-pool. Not to change."""
    network = getattr(torchvision.models, name)()
    network.fc = nn.Identity()
    if cifar is not None:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=cifar, bias=False)
        network.maxpool = nn.Identity()
    return randomise(network)


def parts(**modules):
    """A module with these children, in this order."""
    return nn.ModuleDict(modules)


def mlp(*widths):
    return nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:]))


class LightlyBlock(nn.Module):
    """A basic block with lightly's names."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def lightly_resnet():
    """The children of lightly's CIFAR ResNet-18, whose first ReLU is a function and no child."""
    widths = (64, 64, 128, 256, 512)
    stages = [
        nn.Sequential(LightlyBlock(before, width, 1 + (before < width)), LightlyBlock(width, width, 1))
        for before, width in itertools.pairwise(widths)
    ]
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
    return randomise(nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


def with_fc(network, fc):
    """The network with another last layer, and the same tensors."""
    whole = copy.copy(network)
    whole._modules = {**network._modules, "fc": fc}
    return whole


def wrapped(state, prefix="module."):
    return {prefix + key: value for key, value in state.items()}


def simsiam(network):
    projector = nn.Sequential(nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512))
    whole = parts(encoder=with_fc(network, projector), predictor=mlp(512, 64, 512))
    return {"epoch": 100, "arch": "resnet18", "state_dict": wrapped(whole.state_dict()), "optimizer": {}}


def moco_v2(network):
    whole = parts(encoder_q=with_fc(network, mlp(512, 512, 128)), encoder_k=network).state_dict()
    queue = {"queue": torch.rand(128, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": wrapped({**whole, **queue})}


def moco_v3(network):
    whole = parts(base_encoder=with_fc(network, mlp(512, 64, 16)), momentum_encoder=network, predictor=mlp(16, 16, 16))
    return {"state_dict": wrapped(whole.state_dict())}


def solo(network, backbone="backbone"):
    extra = {f"momentum_{backbone}": network, "projector": mlp(512, 64, 16), "classifier": nn.Linear(512, 10)}
    return {"epoch": 1, "global_step": 9, "state_dict": parts(**{backbone: network}, **extra).state_dict()}


def lightly(network):
    return {"state_dict": parts(backbone=network, projection_head=mlp(512, 64, 16)).state_dict()}


def lightly_torchvision(network):
    """A sequence of all children but the last."""
    return lightly(nn.Sequential(*list(network.children())[:-1]))


def sthalles(network):
    state = parts(backbone=with_fc(network, mlp(512, 512, 128))).state_dict()
    return {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": {}}


def copy_of_2022(network, width=128, wrapper="module."):
    return {"state_dict": wrapped(parts(backbone=with_fc(network, mlp(512, 512, width))).state_dict(), wrapper)}


def barlow_whole(network):
    whole = parts(backbone=network, projector=mlp(512, 64, 16), bn=nn.BatchNorm1d(16))
    return {"epoch": 3, "model": wrapped(whole.state_dict())}


def dino_whole(network):
    other = {key: value + 1 for key, value in network.state_dict().items()}
    teacher = parts(backbone=network, head=mlp(512, 64, 16)).state_dict()
    return {"student": wrapped(other, "module.backbone."), "teacher": teacher, "epoch": 5}


def torchvision_old(network):
    """A file from before BatchNorm counted batches."""
    state = with_fc(network, nn.Linear(512, 1000)).state_dict()
    return {key: value for key, value in state.items() if "num_batches" not in key}


def supcontrast(network):
    whole = parts(encoder=network, head=mlp(512, 512, 128)).state_dict()
    inner = {key.replace("encoder.", "encoder.module."): value for key, value in whole.items()}
    return {"opt": Namespace(lr=0.5), "model": inner, "optimizer": {}, "epoch": 3}


def spijkervet(network):
    return parts(encoder=network, projector=mlp(512, 512, 64)).state_dict()


def swav(network):
    whole = {
        **network.state_dict(),
        **parts(projection_head=mlp(512, 64, 16), prototypes=nn.Linear(16, 9)).state_dict(),
    }
    return wrapped(whole)


def mmselfsup(network):
    neck = nn.ModuleDict({"fc0": nn.Linear(512, 64), "bn0": nn.BatchNorm1d(64)})
    return {"meta": {"epoch": 3}, "state_dict": parts(backbone=network, neck=neck).state_dict()}


def vissl(network):
    model = {"trunk": wrapped(network.state_dict(), "_feature_blocks."), "heads": mlp(512, 64, 16).state_dict()}
    return {"phase_idx": 9, "classy_state_dict": {"base_model": {"model": model}}}


def averaged(network):
    """By torch's AveragedModel, as for SWA."""
    state = torch.optim.swa_utils.AveragedModel(with_fc(network, nn.Linear(512, 9))).state_dict()
    assert "n_averaged" in state
    return state


def pytorch_cifar(network):
    state = {key.removeprefix("backbone."): value for key, value in network.state_dict().items()}
    whole = {**state, "linear.weight": torch.rand(10, 512), "linear.bias": torch.rand(10)}
    return {"net": wrapped(whole), "acc": 91.2, "epoch": 3}


def probe_of_2022(network):
    state = {key.removeprefix("backbone."): value for key, value in network.state_dict().items()}
    return {**state, "fc.weight": torch.rand(10, 512), "fc.bias": torch.rand(10)}


def called_net(network):
    return {"model_state_dict": parts(net=with_fc(network, nn.Linear(512, 9)), projection=mlp(512, 8, 8)).state_dict()}


def symmetrized(network):
    """A copy by the 2022 code's own SimSiam, whose predictor has no bottleneck."""
    projector = nn.Sequential(nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512))
    whole = parts(encoder=with_fc(network, projector), predictor=mlp(512, 512, 512))
    return {"epoch": 100, "arch": "resnet34", "state_dict": whole.state_dict(), "optimizer": {}}


def own(network):
    return {"epoch": 200, "arch": "resnet34", "state_dict": wrapped(network.state_dict(), "_orig_mod.")}


def prepared(images, size, normalize):
    """What reaches the network of images (B, 3, H, W) in [0, 1], by hand."""
    if size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if normalize:
        images = torchvision.transforms.functional.normalize(images, *normalize)
    return images


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


def refusal(source, **options):
    """The one line by which a path, or the content of a file, is refused."""
    load = encoder_from_checkpoint if isinstance(source, dict) else load_encoder
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
