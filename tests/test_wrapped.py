"""Networks that are not this project's: any module behind the API, and timm's architectures on both sides."""

import sys

import pytest
import torch
from torch import nn

import linear_eval
import run
import steal
from defenses.rounding import Rounding
from files.writing import save_checkpoint
from models import ARCHITECTURES, as_encoder, build_encoder, checkpoint, load_encoder, read_checkpoint
from models.exporting import ExportedEncoder, write_export
from tests.conftest import ATTACK, JUDGE, made
from tests.networks import losses, refusal, same, small_encoder, trainer
from tests.networks import steal as steal_from
from utils import UserError, seeded
from victim import Victim

timm = pytest.importorskip("timm")


class Pixels(nn.Module):
    """The means of the channels: a module without parameters."""

    def forward(self, images):
        return images.mean(dim=(2, 3))


class Named(Pixels):
    """As other libraries return what they compute."""

    def forward(self, images):
        return {"features": super().forward(images)}


def network():
    with seeded(3):
        return nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ---- any module ----


@pytest.mark.parametrize(("make", "dim"), [(network, 8), (Pixels, 3), (lambda: nn.Flatten(), 3 * 32 * 32)])
def test_any_module_answers(make, dim, images):
    module = make()
    victim = Victim(module, budget=len(images), dim=dim)
    answers = victim.query(images)
    assert answers.shape == (len(images), victim.dim) == (len(images), dim)
    torch.testing.assert_close(answers, module.eval()(images / 255))  # in another memory format
    assert (victim.ledger.queries, victim.ledger.distinct, victim.ledger.calls) == (12, 12, 1)
    with pytest.raises(UserError, match="would exceed the budget"):
        victim.query(images)


def test_a_module_is_copied_and_defended_as_an_encoder_is(images):
    module = network()
    victim = Victim(module, defences=[Rounding()], dim=8)
    before = victim.query(images[:4])
    nn.init.zeros_(module[0].weight)
    assert torch.equal(victim.query(images[:4]), before)
    assert not torch.equal(before, network().eval()(images[:4] / 255))


@pytest.mark.parametrize("make", [network, lambda: nn.Conv2d(3, 8, 3), Named])
def test_another_width_than_promised_is_refused_before_anything_is_recorded(make, images):
    victim = Victim(make(), dim=9)
    with pytest.raises(ValueError, match="not rows of dim=9 numbers"):
        victim.query(images)
    assert victim.ledger.queries == 0


def test_the_width_has_to_be_known():
    with pytest.raises(ValueError, match="give dim, the width of the rows of Sequential"):
        Victim(network())
    with pytest.raises(ValueError, match="give dim, the width of the rows of SimCLREncoder: 32"):
        Victim(small_encoder(), dim=9)
    encoder = small_encoder()
    assert as_encoder(encoder, 32) is encoder


def test_a_module_is_stolen(images, tmp_path):
    copy = trainer(tmp_path, small_encoder(dim=8), "mse", epochs=3)
    steal_from(copy, images, Victim(network(), dim=8))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


# ---- timm ----

# The smallest of their kinds: the width of h, and how a network for images of a fixed size is built.
NAMES = {
    "test_resnet": (96, {}),
    "test_vit": (64, {"img_size": 32, "patch_size": 4}),
    "test_maxvit": (128, {"img_size": 32}),
    "vit_tiny_patch16_224": (192, {"img_size": 32, "patch_size": 4}),
}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_timm_s_architectures_are_built_for_small_images(name, tmp_path):
    width, built = NAMES[name]
    with seeded(0):
        encoder = build_encoder(f"timm:{name}", 16).eval()
    assert (encoder.dim, encoder.input_size) == (width, built.get("img_size"))
    assert encoder.project(torch.rand(2, 3, 40, 40)).shape == (2, 16)
    theirs, images = timm.create_model(name, num_classes=0, **built).eval(), torch.rand(2, 3, 32, 32)
    theirs.load_state_dict(encoder.backbone.model.state_dict())
    assert torch.equal(encoder(images), theirs(images))
    save_checkpoint({"arch": encoder.arch, "state_dict": encoder.state_dict()}, tmp_path / "c")
    again = load_encoder(tmp_path / "c")
    assert (again.arch, again.input_size, again.out_dim) == (f"timm:{name}", encoder.input_size, 16)
    assert same(again.state_dict(), encoder.state_dict())


# A network for images of one size is built for the size asked for: its name, the size, and its patches.
BUILT = [("test_vit", 48, 6), ("test_vit", 44, 4), ("vit_tiny_patch16_224", 64, 8), ("vit_tiny_patch16_224", 224, 16)]


@pytest.mark.parametrize(("name", "size", "patch"), BUILT)
@torch.no_grad()
def test_timm_s_architectures_are_built_for_other_sizes(name, size, patch, tmp_path):
    with seeded(0):
        encoder = build_encoder(f"timm:{name}", 16, input_size=size).eval()
    theirs = timm.create_model(name, num_classes=0, img_size=size, patch_size=patch).eval()
    theirs.load_state_dict(encoder.backbone.model.state_dict())
    images = torch.rand(2, 3, size, size)
    assert torch.equal(encoder(images), theirs(images))
    content = {"arch": encoder.arch, "state_dict": encoder.state_dict(), "input_size": size}
    save_checkpoint(content, tmp_path / "c")
    again = load_encoder(tmp_path / "c")
    assert again.input_size == size
    assert torch.equal(again(images), encoder(images))
    save_checkpoint({**content, "input_size": 32}, tmp_path / "c")
    assert f"does not fit timm:{name}" in refusal(tmp_path / "c")


def test_a_network_of_any_size_is_the_same_at_all_sizes():
    encoder = build_encoder("timm:test_resnet", input_size=48)
    assert encoder.input_size == 48
    assert encoder.state_dict().keys() == build_encoder("timm:test_resnet").state_dict().keys()


def test_sizes_that_a_network_cannot_have_are_refused(refused):
    name = "timm:vit_tiny_patch16_224"
    with pytest.raises(UserError, match=rf"^{name} cannot be built for images of 200 x 200, give another --size: its"):
        build_encoder(name, input_size=200)
    line = ("--arch", name, "--dataset", "mnist", "--device", "cpu")
    assert "give another --size: its patches are of 16 x 16 pixels" in refused(run, *line, "--size", "136")


@pytest.mark.parametrize("form", ["safetensors", "hf"])
def test_weights_of_timm_s_architectures_are_exported(form, tmp_path):
    encoder = build_encoder("timm:test_vit")
    assert write_export(ExportedEncoder(encoder), form, tmp_path / "file") == 0
    assert same(load_encoder(tmp_path / "file").state_dict(), encoder.state_dict())


def test_the_seed_decides_the_weights():
    first, again = (_built(seed) for seed in (0, 0))
    assert same(first, again)
    assert not same(first, _built(1))


def _built(seed):
    with seeded(seed):
        return build_encoder("timm:test_vit", 16).state_dict()


def test_files_that_name_another_network_than_they_hold(tmp_path):
    state = build_encoder("timm:test_vit").state_dict()
    for arch, expected in (
        ("timm:test_resnet", "does not fit"),
        ("timm:no_such_network", "has no architecture 'no_such_network'"),
        ("timm:hf-hub:someone/network", "has no architecture 'hf-hub:someone/network'"),
        ("timm:local-dir:/tmp", "has no architecture 'local-dir:/tmp'"),
        ("resnet18", "does not fit"),
    ):
        save_checkpoint({"arch": arch, "state_dict": state}, tmp_path / "c")
        assert expected in refusal(tmp_path / "c"), arch
    save_checkpoint({"arch": "timm:test_vit", "state_dict": state}, tmp_path / "c")
    assert "holds a timm:test_vit, not a timm:test_resnet" in refusal(tmp_path / "c", arch="timm:test_resnet")
    del state["backbone.model.cls_token"]
    save_checkpoint({"arch": "timm:test_vit", "state_dict": state}, tmp_path / "c")
    assert "does not fit timm:test_vit: 1 missing: backbone.model.cls_token" in refusal(tmp_path / "c")


def test_a_name_that_timm_has_not_is_refused(refused):
    assert "has no architecture 'resnet10x'" in refused(run, "--arch", "timm:resnet10x")
    assert "has no architecture 'resnet10t.c3_in1k'" in refused(run, "--arch", "timm:resnet10t.c3_in1k")


def test_an_absent_timm_is_named(refused, tmp_path, monkeypatch):
    save_checkpoint(
        {"arch": "timm:test_vit", "state_dict": build_encoder("timm:test_vit").state_dict()}, tmp_path / "c"
    )
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "timm:test_vit needs the package timm: pip install timm" in refused(run, "--arch", "timm:test_vit")
    monkeypatch.setattr(checkpoint, "_outline", checkpoint._outline.__wrapped__)  # what is known of it is forgotten
    assert "timm:test_vit needs the package timm: pip install timm" in refusal(tmp_path / "c")
    assert "timm:test_vit" in ARCHITECTURES
    assert "timm:test_vit" not in [*ARCHITECTURES]


def test_a_transformer_steals_a_resnet_and_a_resnet_a_transformer(call, trained, tmp_path):
    """Trained for an epoch, saved, found by the flags, stolen and judged."""
    transformer = ("--arch", "timm:test_vit", "--dataset", "cifar10", "--epochs", "1", "-b", "32", "--device", "cpu")
    code, out, err = call(run, *transformer)
    assert code == 0, err
    victim = load_encoder(made(out))
    assert (victim.arch, victim.input_size, victim.out_dim) == ("timm:test_vit", 32, 128)
    code, out, err = call(steal, *ATTACK, "--arch", "timm:test_vit")
    assert code == 0, err
    assert read_checkpoint(made(out))["settings"]["arch"] == "timm:test_vit"
    assert load_encoder(made(out)).output_dim == victim.dim

    resnet = next(tmp_path.rglob("victim-cifar10-resnet10w32-infonce-1ep-seed0-*/checkpoint.pth.tar"))
    flags = [word for word in ATTACK if word not in ("--archstolen", "resnet10w32")]
    code, out, err = call(steal, *flags, "--victim", resnet, "--archstolen", "timm:vit_tiny_patch16_224")
    assert code == 0, err
    copy = load_encoder(made(out))
    assert (copy.arch, copy.dim, copy.output_dim) == ("timm:vit_tiny_patch16_224", 192, 256)
    found = ("--archstolen", "timm:vit_tiny_patch16_224", "--dataset", "cifar10", "--dataset-test", "mnist")
    code, out, err = call(linear_eval, *JUDGE[2:], *found)
    assert code == 0, err
    assert "arch timm:vit_tiny_patch16_224" in out


def test_both_directions_at_another_size(call, data, tmp_path):
    """Victim, copy and evaluation are of the size that the victim was trained at, without a further flag."""
    train = ("--dataset", "mnist", "--epochs", "1", "-b", "20", "--size", "48", "--device", "cpu")
    tiny, resnet = "timm:vit_tiny_patch16_224", "resnet10w32"
    for arch, stolen in ((tiny, resnet), (resnet, tiny)):
        code, out, err = call(run, *train, "--arch", arch)
        assert code == 0, err
        victim = made(out)
        attack = [word for word in ATTACK if word not in ("--dataset", "cifar10", "--archstolen", "resnet10w32")]
        code, out, err = call(steal, *attack, "--victim", victim, "--archstolen", stolen)
        assert code == 0, err
        copy = made(out)
        sizes = [(encoder.arch, encoder.input_size) for encoder in map(load_encoder, (victim, copy))]
        assert sizes == [(arch, 48), (stolen, 48)]
        for judged in (("--modeltype", "victim", "--victim", victim), ("--stolen", copy, "--fidelity")):
            line = (*judged, "-n", "40", "--probe-epochs", "2", "--dataset-test", "mnist", "--device", "cpu")
            code, out, err = call(linear_eval, *line, *(("--independent", "random") if "--fidelity" in line else ()))
            assert code == 0, err
            assert "top1" in out
