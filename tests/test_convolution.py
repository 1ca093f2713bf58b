"""The convolution of several images side by side, against PyTorch's."""

import pytest
import torch
from torch import nn

from models import build_encoder
from models.convolution import Conv2d, convolve_side_by_side

CASES = [
    # height, width, stride, images side by side
    (4, 4, 1, 8),
    (8, 8, 1, 4),
    (8, 8, 2, 8),
    (7, 7, 1, 2),
    (7, 7, 2, 4),
    (5, 6, 2, 2),
    (6, 5, 2, 8),
    (1, 1, 1, 4),
    (2, 1, 2, 8),
]


@pytest.mark.parametrize(("height", "width", "stride", "count"), CASES)
def test_images_side_by_side_give_pytorchs_maps_and_gradients(height, width, stride, count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, height, width, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, generator=generator)
    results = []
    for way in (
        lambda x, w: convolve_side_by_side(x, w, stride, count),
        lambda x, w: nn.functional.conv2d(x, w, stride=stride, padding=1),
    ):
        inputs = [images.clone().requires_grad_(), weight.clone().requires_grad_()]
        maps = way(*inputs)
        gradients = torch.autograd.grad(maps.square().sum(), inputs)
        results.append([maps, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("side", "images", "wide"), [(4, 32, True), (8, 32, True), (4, 7, False), (32, 32, False)])
def test_small_maps_in_bf16_alone_stand_side_by_side(monkeypatch, stride, side, images, wide):
    asked = []

    def count(*args):
        asked.append(args[-1])
        return convolve_side_by_side(*args)

    monkeypatch.setattr("models.convolution.convolve_side_by_side", count)
    monkeypatch.setattr("models.convolution.cpu_units", lambda: {"amx_bf16"})
    layer = Conv2d(4, 6, 3, stride=stride, padding=1, bias=False)
    x = torch.randn(images, 4, side, side, generator=torch.Generator().manual_seed(0))
    maps = layer(x)
    assert not asked
    layer, x = layer.bfloat16(), x.bfloat16().contiguous(memory_format=torch.channels_last)
    small = layer(x)
    assert bool(asked) == wide
    assert small.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(small.float(), maps, atol=0.03, rtol=0.03)
    asked.clear()
    monkeypatch.setattr("models.convolution.cpu_units", lambda: {"avx512_bf16"})  # without tiles to fill
    layer(x)
    assert not asked


def test_a_resnet_has_pytorchs_parameters_and_in_bf16_its_answers():
    torch.manual_seed(0)
    model = build_encoder("resnet10w32").eval()
    images = torch.rand(64, 3, 32, 32)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        fast = model(images.contiguous(memory_format=torch.channels_last))
    assert torch.nn.functional.cosine_similarity(exact, fast.float()).min() > 0.999
    assert all(type(m) is Conv2d for m in model.modules() if isinstance(m, nn.Conv2d))
