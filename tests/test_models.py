"""Architectures, key layouts, and checkpoints that fit or are refused with the reason."""

import os
import pickle

import pytest
import torch
import torchvision

from models import ARCHITECTURES, build_copy, build_encoder, load_encoder
from utils import UserError, seeded

# (representation width, parameters of the backbone, state_dict entries with a head), from the description of the
# 2022 code; the small network is this project's own.
KNOWN = {"resnet18": (512, 11.169e6, 124), "resnet34": (512, 21.277e6, 220), "resnet50": (2048, 23.500e6, 322)}


@pytest.mark.parametrize("arch", KNOWN)
def test_architecture_has_the_known_size(arch):
    width, parameters, entries = KNOWN[arch]
    encoder = build_encoder(arch, out_dim=128)
    assert encoder.dim == width
    backbone = sum(p.numel() for name, p in encoder.named_parameters() if ".fc." not in name)
    assert backbone == pytest.approx(parameters, rel=1e-4)
    assert len(encoder.state_dict()) == entries


def test_key_layout_is_that_of_2022():
    shapes = {key: tuple(value.shape) for key, value in build_encoder("resnet34", out_dim=128).state_dict().items()}
    assert shapes["backbone.conv1.weight"] == (64, 3, 3, 3)
    assert shapes["backbone.bn1.running_mean"] == (64,)
    assert shapes["backbone.layer2.0.shortcut.0.weight"] == (128, 64, 1, 1)
    assert shapes["backbone.layer4.2.bn2.num_batches_tracked"] == ()
    assert shapes["backbone.fc.0.weight"] == (512, 512)
    assert shapes["backbone.fc.2.weight"] == (128, 512)
    assert "backbone.layer1.0.shortcut.0.weight" not in shapes
    assert "backbone.layer1.0.shortcut.0.weight" in build_encoder("resnet50").state_dict()


TORCHVISIONS = [arch for arch in ARCHITECTURES if arch.endswith("-imagenet") and not arch.startswith("resnet10")]


@pytest.mark.parametrize("arch", TORCHVISIONS)
def test_imagenet_stem_makes_the_networks_of_torchvision(arch):
    with torch.device("meta"):
        ours = build_encoder(arch).state_dict()
        theirs = getattr(torchvision.models, arch.removesuffix("-imagenet"))().state_dict()
    renamed = {f"backbone.{key.replace('downsample', 'shortcut')}": value.shape for key, value in theirs.items()}
    assert {key: value.shape for key, value in ours.items()} == {k: v for k, v in renamed.items() if ".fc." not in k}


def test_imagenet_stem_is_initialised_as_torchvision_does():
    with seeded(0):
        weight = build_encoder("resnet18-imagenet").backbone.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(("stem", "side"), [("cifar", 4), ("imagenet", 1), ("padding2", 5), ("norelu", 4)])
def test_stems_give_maps_of_their_size(stem, side):
    encoder = build_encoder("resnet18" if stem == "cifar" else f"resnet18-{stem}")
    maps, first = [], []
    encoder.backbone.layer1.register_forward_hook(lambda module, args, output: first.append(args[0]))
    encoder.backbone.layer4.register_forward_hook(lambda module, args, output: maps.append(output))
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 512)
    assert maps[0].shape[2:] == (side, side)
    assert (first[0] < 0).any() == (stem == "norelu")


def test_images_of_another_size_are_resized_before_they_are_normalised():
    with seeded(0):
        encoder = build_encoder("resnet10w32", None, ([0.5] * 3, [0.1] * 3), input_size=48).eval()
    seen = []
    encoder.backbone.conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    images = torch.rand(2, 3, 20, 30)
    encoder(images)
    resized = torch.nn.functional.interpolate(images, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen[0], (resized - 0.5) / 0.1)
    encoder(resized)
    assert torch.equal(seen[1], seen[0])
    assert build_copy("resnet10w32", 16, input_size=48).input_size == 48


def test_input_size_survives_the_checkpoint(tmp_path):
    state = build_encoder("resnet10w32").state_dict()
    torch.save({"arch": "resnet10w32", "state_dict": state, "input_size": 48}, tmp_path / "c")
    assert load_encoder(tmp_path / "c").input_size == 48


def test_small_network_is_small():
    encoder = build_encoder("resnet10w32", out_dim=128)
    assert encoder.dim == 256
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, 256)
    assert encoder.project(torch.rand(2, 3, 32, 32)).shape == (2, 128)


def test_representation_is_the_mean_of_the_last_map_after_relu(encoder):
    maps = []
    encoder.eval().backbone.layer4.register_forward_hook(lambda module, args, output: maps.append(output))
    h = encoder(torch.rand(3, 3, 32, 32))
    assert (h >= 0).all()
    torch.testing.assert_close(h, torch.nn.functional.avg_pool2d(maps[0], 4).flatten(1))


def test_any_image_size_gives_the_nominal_width(encoder):
    assert encoder(torch.rand(2, 3, 96, 96)).shape == (2, 256)


def test_an_encoder_without_head_says_so():
    with pytest.raises(ValueError, match="no projection head"):
        build_encoder("resnet10w32").project(torch.rand(1, 3, 32, 32))


def test_normalisation_is_inside_and_survives_the_checkpoint(tmp_path):
    with seeded(0):
        plain, normalised = build_encoder("resnet10w32"), None
    normalize = ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    normalised = build_encoder("resnet10w32", normalize=normalize)
    normalised.load_state_dict(plain.state_dict())
    path = tmp_path / "c.pth.tar"
    torch.save({"arch": "resnet10w32", "state_dict": normalised.state_dict(), "normalize": normalize}, path)
    images = torch.rand(4, 3, 32, 32)
    by_hand = (images - torch.tensor(normalize[0]).view(3, 1, 1)) / torch.tensor(normalize[1]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(load_encoder(path)(images), plain.eval()(by_hand))


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if "-" not in arch])
def test_checkpoint_of_2022_loads_by_its_keys(arch, tmp_path):
    """Four entries, and `arch` wrong as it was for stolen encoders."""
    original = build_encoder(arch, out_dim=10).eval()
    path = tmp_path / "old.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": original.state_dict(), "optimizer": {}}, path)
    loaded = load_encoder(path)
    assert loaded.arch == arch
    assert loaded.out_dim == 10
    assert not loaded.training
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), original(images))
        assert torch.equal(loaded.project(images), original.project(images))


def test_head_with_batch_norm_loads(tmp_path):
    original = build_encoder("resnet10w32", out_dim=24, head="mlp-bn")
    assert "backbone.fc.3.weight" in original.state_dict()
    torch.save({"arch": "resnet10w32", "state_dict": original.state_dict()}, tmp_path / "c")
    assert load_encoder(tmp_path / "c").out_dim == 24


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        load_encoder(path, **options)
    return str(caught.value)


def test_says_which_keys_do_not_fit(tmp_path):
    state = build_encoder("resnet10w32").state_dict()
    del state["backbone.bn1.weight"]
    state["backbone.extra"] = torch.zeros(1)
    state["backbone.conv1.weight"] = torch.zeros(32, 3, 5, 5)
    torch.save({"arch": "resnet10w32", "state_dict": state}, tmp_path / "c")
    text = refusal(tmp_path / "c")
    assert "1 missing: backbone.bn1.weight" in text
    assert "1 unexpected: backbone.extra" in text
    assert "1 misshapen: backbone.conv1.weight (32, 3, 5, 5) for (32, 3, 3, 3)" in text


def test_another_architecture_is_named(tmp_path):
    torch.save({"arch": "resnet10w32", "state_dict": build_encoder("resnet10w32").state_dict()}, tmp_path / "c")
    assert "holds a resnet10w32, not a resnet34" in refusal(tmp_path / "c", arch="resnet34")


def test_missing_truncated_and_foreign_files(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "nothing")
    torch.save({"arch": "resnet10w32", "state_dict": build_encoder("resnet10w32").state_dict()}, tmp_path / "c")
    whole = (tmp_path / "c").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert "cut" in refusal(tmp_path / "cut")
    (tmp_path / "text").write_text("not a checkpoint at all")
    assert "text" in refusal(tmp_path / "text")
    torch.save([1, 2], tmp_path / "list")
    assert "list" in refusal(tmp_path / "list")
    torch.save({"weights": 1}, tmp_path / "dict")
    assert "no state_dict" in refusal(tmp_path / "dict")


class _Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"arch": "resnet10w32", "state_dict": _Attack()}, tmp_path / "evil", pickle_module=pickle)
    assert "weights only" in refusal(tmp_path / "evil")
    assert not (tmp_path / "attacked").exists()


def test_loading_leaves_the_global_generator_alone(tmp_path):
    torch.save({"arch": "resnet10w32", "state_dict": build_encoder("resnet10w32").state_dict()}, tmp_path / "c")
    before = torch.get_rng_state()
    load_encoder(tmp_path / "c")
    assert torch.equal(torch.get_rng_state(), before)
