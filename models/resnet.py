"""ResNets with the CIFAR stem (a 3x3 convolution without max-pool, which keeps the detail of 32 x 32 images) or others.

Parameter names follow the 2022 code (`conv1`, `bn1`, `layer1.0.shortcut.0`, ...), whose checkpoints load here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convolution import Conv2d


@dataclass(frozen=True)
class Stem:
    """The layers before the first block: a convolution, BatchNorm, and usually a ReLU."""

    kernel: int
    stride: int
    padding: int
    relu: bool = True
    pool: bool = False  # 3x3 max-pool of stride 2 at the end


STEMS = {
    "cifar": Stem(3, 1, 1),
    "imagenet": Stem(7, 2, 3, pool=True),  # of the paper and of torchvision
    "padding2": Stem(3, 1, 2),  # of solo-learn: 32 x 32 images become maps of 34 x 34
    "norelu": Stem(3, 1, 1, relu=False),  # of lightly: its CIFAR networks lose a ReLU where they become backbones
}


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., CVPR 2016, figure 5 left)."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = Conv2d(channels_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut (He et al., CVPR 2016, figure 5 right)."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int):
        super().__init__()
        channels_out = self.expansion * width
        self.conv1 = Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = Conv2d(width, channels_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        self.shortcut = _shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A ResNet with a stem of STEMS: images (B, 3, H, W) -> `fc` of the representation (B, dim).

    `dim` is 8 * width * expansion. `fc` is the identity until a model puts its head there.
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: Sequence[int], width: int = 64, stem: str = "cifar"
    ):
        super().__init__()
        self.stem = stem
        first = STEMS[stem]
        self.conv1 = Conv2d(3, width, first.kernel, stride=first.stride, padding=first.padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, count in enumerate(blocks):
            stage_width = width * 2**stage
            layers = []
            for index in range(count):
                layers.append(block(channels, stage_width, stride=2 if stage > 0 and index == 0 else 1))
                channels = stage_width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.dim = channels
        self.fc: nn.Module = nn.Identity()
        if stem == "imagenet":
            self._initialise_as_torchvision()

    def _initialise_as_torchvision(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def represent(self, x: Tensor) -> Tensor:
        """Representation h (B, dim) of images (B, 3, H, W): the average over the last feature map.

        The 2022 code pools 4 x 4 windows; for its 32 x 32 images that is this average.
        """
        stem, x = STEMS[self.stem], self.bn1(self.conv1(x))
        if stem.relu:
            x = F.relu(x, inplace=True)
        if stem.pool:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.represent(x))


def resnet10w32(stem: str = "cifar") -> ResNet:
    """ResNet-10 of width 32, h of 256: small enough to train on a CPU in minutes."""
    return ResNet(BasicBlock, (1, 1, 1, 1), width=32, stem=stem)


def resnet18(stem: str = "cifar") -> ResNet:
    """ResNet-18, h of 512."""
    return ResNet(BasicBlock, (2, 2, 2, 2), stem=stem)


def resnet34(stem: str = "cifar") -> ResNet:
    """ResNet-34, h of 512."""
    return ResNet(BasicBlock, (3, 4, 6, 3), stem=stem)


def resnet50(stem: str = "cifar") -> ResNet:
    """ResNet-50, h of 2048."""
    return ResNet(Bottleneck, (3, 4, 6, 3), stem=stem)


def resnet101(stem: str = "cifar") -> ResNet:
    """ResNet-101, h of 2048."""
    return ResNet(Bottleneck, (3, 4, 23, 3), stem=stem)
