"""Every layout of other people's checkpoints, written by networks of the same structure, and what is refused."""

import copy
import functools
import itertools
import json
import os
import pickle
import re
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import linear_eval
import steal
from models import build_encoder, load_encoder, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from models.layouts import CIFAR10, IMAGENET, LAYOUTS, OWN, Layout
from runs import home_of, locate
from tests.conftest import COPY, JUDGE, ROOT, SMALL
from utils import UserError

# ---- networks as their authors build them ----


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


def own(network):
    return {"epoch": 200, "arch": "resnet34", "state_dict": wrapped(network.state_dict(), "_orig_mod.")}


AT_224 = (224, IMAGENET)
SOLO_32 = (32, CIFAR10)

# name: the network, how its file is made, the layout, the architecture, (size, normalisation), prefixes ignored
FILES = {
    "simsiam": (torch_resnet, simsiam, "SimSiam", "resnet18-imagenet", AT_224, "encoder.fc., predictor."),
    "moco": (torch_resnet, moco_v2, "MoCo v1/v2", "resnet18-imagenet", AT_224, "encoder_q.fc., encoder_k., queue"),
    "moco3": (
        *(torch_resnet, moco_v3, "MoCo v3", "resnet18-imagenet", AT_224),
        "base_encoder.fc., momentum_encoder., predictor.",
    ),
    "solo": (
        torch_resnet,
        solo,
        "solo-learn",
        "resnet18-imagenet",
        AT_224,
        "momentum_backbone., projector., classifier.",
    ),
    "solo-cifar": (
        *(lambda: torch_resnet(cifar=2), solo, "solo-learn", "resnet18-padding2", SOLO_32),
        "momentum_backbone., projector., classifier.",
    ),
    "solo-older": (
        *(lambda: torch_resnet(cifar=2), lambda network: solo(network, "encoder"), "solo-learn, older"),
        *("resnet18-padding2", SOLO_32, "momentum_encoder., projector., classifier."),
    ),
    "lightly": (
        *(lightly_resnet, lightly, "lightly, its own ResNet", "resnet18-norelu", (32, IMAGENET), "projection_head."),
    ),
    "lightly-torchvision": (
        *(torch_resnet, lightly_torchvision, "lightly, torchvision's ResNet", "resnet18-imagenet", AT_224),
        "projection_head.",
    ),
    "sthalles": (torch_resnet, sthalles, "sthalles/SimCLR", "resnet18-imagenet", (None, None), ""),
    "2022": (*(torch_resnet, copy_of_2022, "2022 code, ImageNet scale", "resnet18-imagenet", AT_224, "backbone.fc."),),
    "2022-one-gpu": (
        *(torch_resnet, lambda network: copy_of_2022(network, 512, ""), "2022 code, ImageNet scale"),
        *("resnet18-imagenet", AT_224, "backbone.fc."),
    ),
    "barlow": (
        *(torch_resnet, nn.Module.state_dict, "Barlow Twins, VICReg or DINO, backbone alone"),
        *("resnet18-imagenet", AT_224, ""),
    ),
    "barlow-whole": (
        *(torch_resnet, barlow_whole, "Barlow Twins, VICReg or DINO (model)", "resnet18-imagenet", AT_224),
        "projector., bn.",
    ),
    "dino-whole": (
        *(torch_resnet, dino_whole, "Barlow Twins, VICReg or DINO (teacher)", "resnet18-imagenet", AT_224, "head."),
    ),
    "torchvision": (torch_resnet, torchvision_old, "torchvision", "resnet18-imagenet", AT_224, "fc."),
    "torchvision-50": (
        *(lambda: torch_resnet("resnet50"), lambda network: with_fc(network, nn.Linear(2048, 9)).state_dict()),
        *("torchvision", "resnet50-imagenet", AT_224, "fc."),
    ),
    "own": (*(lambda: randomise(build_encoder("resnet10w32", 16)), own, OWN.name, "resnet10w32", (None, None), ""),),
}


@functools.cache
def made(name):
    """The network and the file's content of a row of FILES. Not to be changed."""
    torch.manual_seed(0)
    network = FILES[name][0]()
    return network, FILES[name][1](network)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Writes a file of FILES once; returns its path."""
    folder = tmp_path_factory.mktemp("files")

    def once(name):
        path = folder / f"{name}.pth"
        if not path.exists():
            torch.save(made(name)[1], path)
        return path

    return once


def prepared(images, size, normalize):
    """What reaches the network of images (B, 3, H, W) in [0, 1], by hand."""
    if size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if normalize:
        images = torchvision.transforms.functional.normalize(images, *normalize)
    return images


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item())


def test_every_layout_has_a_file_here():
    assert {OWN.name, *(layout.name for layout in LAYOUTS)} == {row[2].split(" (")[0] for row in FILES.values()}


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_representations_are_those_of_the_source(name, write):
    *_, layout, arch, (size, normalize), ignored = FILES[name]
    network, encoder = made(name)[0], load_encoder(write(name))
    assert (encoder.arch, encoder.input_size, encoder.normalize) == (arch, size, normalize)
    assert not encoder.training
    # As the source answers prepared images: here of 64 x 64, so that it doesn't take long.
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    theirs = network(images)
    assert theirs.std(dim=0).max() > 1e-3
    encoder.input_size, encoder.normalize = None, None
    assert_same(encoder(images), theirs)
    assert f"layout of {layout}: {arch}" in encoder.report
    assert f"h of {encoder.dim} numbers" in encoder.report
    assert f" ignored ({ignored});" in encoder.report if ignored else " 0 ignored;" in encoder.report
    assert encoder.report.count("\n") == 0


@pytest.mark.parametrize("name", ["simsiam", "solo-cifar", "sthalles"])
@torch.no_grad()
def test_images_of_any_size_are_brought_to_what_the_source_expects(name, write):
    network, path = made(name)[0], write(name)
    images = torch.rand(2, 3, 40, 48, generator=torch.Generator().manual_seed(1))
    assert_same(load_encoder(path)(images), network(prepared(images, *FILES[name][4])))


@torch.no_grad()
def test_the_report_counts_keys_and_says_what_was_assumed(write):
    encoder, keys = load_encoder(write("simsiam")), len(made("simsiam")[1]["state_dict"])
    ignored = keys - len(encoder.state_dict())
    assert encoder.report == (
        f"layout of SimSiam: resnet18-imagenet with the imagenet stem, h of 512 numbers; {keys - ignored} keys used, "
        f"{ignored} ignored (encoder.fc., predictor.); images resized to 224 x 224, normalised by mean "
        "(0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225)"
    )
    assert "with its head" in load_encoder(write("sthalles")).report
    assert "images taken as sent, not normalised" in load_encoder(write("sthalles")).report


@torch.no_grad()
def test_the_head_of_sthalles_is_kept(write):
    encoder, state = load_encoder(write("sthalles")), made("sthalles")[1]["state_dict"]
    assert encoder.out_dim == 128
    h = torch.rand(2, 512)
    by_hand = F.linear(
        F.relu(F.linear(h, state["backbone.fc.0.weight"], state["backbone.fc.0.bias"])),
        *(state[f"backbone.fc.2.{kind}"] for kind in ("weight", "bias")),
    )
    torch.testing.assert_close(encoder.backbone.fc(h), by_hand)
    assert load_encoder(write("2022")).out_dim is None


@pytest.mark.parametrize("name", ["simsiam", "torchvision"])
def test_a_files_own_size_and_normalisation_come_first(name, tmp_path):
    ours = ((0.5,) * 3, (0.25,) * 3)
    torch.save({**made(name)[1], "normalize": ours, "input_size": 48}, tmp_path / "c")
    encoder = load_encoder(tmp_path / "c")
    assert (encoder.input_size, encoder.normalize) == (48, ours)


def test_the_pages_example_of_a_further_layout_works(monkeypatch):
    line = re.search(r"^```python\n(Layout\(.*\))\n```", (ROOT / "docs" / "checkpoints.md").read_text(), re.MULTILINE)
    row = eval(line[1], {"Layout": Layout, "IMAGENET": IMAGENET})
    monkeypatch.setattr("models.checkpoint.LAYOUTS", (*LAYOUTS, row))
    whole = parts(net=with_fc(torch_resnet(), nn.Linear(512, 10)), projection=nn.Linear(512, 8))
    assert "layout of that project: resnet18-imagenet" in encoder_from_checkpoint(whole.state_dict()).report


def test_stems_that_no_tensor_shows_are_told_apart_by_the_file_or_the_caller(tmp_path):
    state = build_encoder("resnet18-padding2").state_dict()
    for entry, insisted, found in (
        *(("resnet18-padding2", None, "resnet18-padding2"), ("resnet18", None, "resnet18")),
        *(("resnet34", None, "resnet18"), ("resnet34", "resnet18-padding2", "resnet18-padding2")),
    ):
        torch.save({"arch": entry, "state_dict": state}, tmp_path / "c")
        assert load_encoder(tmp_path / "c", arch=insisted).arch == found
    torch.save({"arch": "resnet18", "state_dict": state}, tmp_path / "c")
    assert "holds a resnet18, not a resnet18-padding2" in refusal(tmp_path / "c", arch="resnet18-padding2")


# ---- refusals ----


def refusal(source, **options):
    """The one line by which a path, or the content of a file, is refused."""
    load = encoder_from_checkpoint if isinstance(source, dict) else load_encoder
    with pytest.raises(UserError) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(name, function):
    """The content of a row of FILES, with its tensors changed by a function."""
    checkpoint = made(name)[1]
    entry = next((entry for entry in ("state_dict", "model", "teacher") if entry in checkpoint), None)
    state = dict(checkpoint[entry] if entry else checkpoint)
    function(state)
    return {**checkpoint, entry: state} if entry else state


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"torchvision-50"}))
def test_half_a_model_is_refused(name):
    def halve(state):
        for key in [key for key in state if "bn2.running_var" in key][::2]:
            del state[key]

    text = refusal(change(name, halve))
    assert "missing: backbone.layer1.0.bn2.running_var" in text
    assert "unexpected" not in text
    assert "misshapen" not in text


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"torchvision-50"}))
def test_a_key_without_a_place_is_refused(name):
    prefix = "module." if name in ("simsiam", "moco", "moco3", "2022", "barlow-whole") else ""
    prefix = "_orig_mod." if name == "own" else prefix
    text = refusal(change(name, lambda state: state.update({f"{prefix}surprise.weight": torch.zeros(1)})))
    assert "1 unexpected: " in text
    assert "surprise.weight" in text


def test_a_key_cannot_stand_in_for_another():
    def move(state):
        state["module.backbone.bn1.weight"] = state.pop("module.encoder.bn1.weight")

    text = refusal(change("simsiam", move))
    assert "taken for the layout of SimSiam, does not fit resnet18-imagenet: 1 missing: backbone.bn1.weight" in text
    assert "1 unexpected: backbone.bn1.weight (outside encoder.)" in text

    def both(state):
        state["layer2.0.shortcut.1.bias"] = state["layer2.0.downsample.1.bias"] + 1

    assert "1 unexpected: layer2.0.shortcut.1.bias (twice)" in refusal(change("torchvision", both))


def test_wrong_shapes_are_refused():
    def narrow(state):
        state["module.encoder.layer3.0.conv1.weight"] = torch.zeros(8, 8, 3, 3)

    text = refusal(change("simsiam", narrow))
    assert "1 misshapen: backbone.layer3.0.conv1.weight (8, 8, 3, 3) for (256, 128, 3, 3)" in text
    # A stem that the layout does not have.
    narrow_stem = {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    assert "1 misshapen: backbone.conv1.weight" in refusal(
        change("torchvision", lambda state: state.update(narrow_stem))
    )


def test_unknown_layouts_and_other_architectures(write, tmp_path):
    torch.save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path / "vit.pth")
    assert "in no layout of docs/checkpoints.md: its keys are blocks.0.attn" in refusal(tmp_path / "vit.pth")
    text = refusal(write("torchvision"), arch="resnet34")
    assert "holds a resnet18-imagenet, not a resnet34" in text


class Code:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(("content", "named"), [(Code(), "posix.system"), (Namespace(arch="x"), "argparse.Namespace")])
def test_code_in_a_file_is_refused_with_the_way_out_and_not_run(content, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = {"student": {}, "teacher": {"backbone.bn1.weight": torch.ones(64)}, "args": content}
    torch.save(checkpoint, tmp_path / "evil.pth", pickle_module=pickle)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"architecture": "resnet18"}')
    torch.save(checkpoint, tmp_path / "folder" / "pytorch_model.bin", pickle_module=pickle)
    for path in ("evil.pth", "folder"):
        text = refusal(tmp_path / path)
        assert f"is not a file of weights only (it needs {named})" in text
        assert "torch.save(torch.load(OLD, weights_only=False)" in text
    assert not (tmp_path / "attacked").exists()


# ---- folders of timm and Hugging Face ----


@pytest.fixture
def timm_folder(tmp_path):
    """A folder by timm of a small ResNet with a classifier; returns it and the network without one."""
    timm = pytest.importorskip("timm")
    folder = tmp_path / "timm"
    network = randomise(timm.create_model("resnet10t", num_classes=7))
    timm.models.save_for_hf(network, folder, safe_serialization="both")
    network.reset_classifier(0)
    return folder, network


def huggingface_folder(folder, kind="resnet", task=False, preprocessor=True):
    """A folder by transformers of a small network; returns it."""
    transformers = pytest.importorskip("transformers")
    config = {
        "resnet": lambda: transformers.ResNetConfig(
            hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, layer_type="basic"
        ),
        "vit": lambda: transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_labels=3,
        ),
    }[kind]()
    model = transformers.AutoModelForImageClassification if task else transformers.AutoModel
    network = randomise(model.from_config(config, attn_implementation="eager"))
    network.save_pretrained(folder)
    if preprocessor:
        settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return network


@torch.no_grad()
def test_a_timm_folder_is_read(timm_folder):
    folder, network = timm_folder
    for name in ("model.safetensors", "pytorch_model.bin"):  # the first is read while it is there
        encoder = copy.deepcopy(load_encoder(folder))
        assert (encoder.arch, encoder.dim, encoder.has_head) == ("timm/resnet10t", 512, False)
        images = torch.rand(2, 3, 32, 32)
        assert_same(encoder(images), network(prepared(images, 176, IMAGENET)))
        assert "layout of a timm folder: timm/resnet10t, h of 512 numbers" in encoder.report
        assert "2 ignored (fc.); images resized to 176 x 176, normalised" in encoder.report
        (folder / name).unlink()


@torch.no_grad()
def test_a_huggingface_folder_is_read(tmp_path):
    network = huggingface_folder(tmp_path / "plain")
    encoder = copy.deepcopy(load_encoder(tmp_path / "plain"))
    assert (encoder.arch, encoder.dim, encoder.input_size) == ("huggingface/resnet", 16, 32)
    images = torch.rand(2, 3, 40, 40)
    expected = network(prepared(images, 32, ((0.5,) * 3, (0.5,) * 3)))
    assert_same(encoder(images), expected.pooler_output.flatten(1))
    assert " 0 ignored; images resized to 32 x 32, normalised by mean (0.5, 0.5, 0.5)" in encoder.report


@torch.no_grad()
def test_tokens_are_averaged_where_nothing_is_pooled(tmp_path):
    """As for a classifier's folder, whose network has no pooler."""
    network = huggingface_folder(tmp_path / "vit", "vit", task=True, preprocessor=False)
    encoder = load_encoder(tmp_path / "vit")
    assert (encoder.arch, encoder.input_size, encoder.normalize) == ("huggingface/vit", 32, None)
    assert "2 ignored (classifier.)" in encoder.report
    images = torch.rand(2, 3, 32, 32)
    assert_same(encoder(images), network.vit(images).last_hidden_state.mean(dim=1))


def test_half_a_folder_is_refused(timm_folder, tmp_path):
    folder, _ = timm_folder
    (folder / "model.safetensors").unlink()
    state = torch.load(folder / "pytorch_model.bin")
    del state["layer1.0.bn1.weight"]
    torch.save({**state, "surprise": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert "1 missing: layer1.0.bn1.weight; 1 unexpected: surprise" in refusal(folder)
    huggingface_folder(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "hidden_sizes": [8, 32]}))
    assert "misshapen: " in refusal(tmp_path / "other")


def test_folders_that_name_no_network_to_build(timm_folder, tmp_path):
    folder, _ = timm_folder
    for settings, expected in (
        ({"architecture": "hf-hub:someone/something"}, "has no architecture 'hf-hub:someone/something'"),
        ({"architecture": "resnet10t", "model_args": {"depth": 3}}, "timm cannot build resnet10t"),
        ({"model_type": "nothing"}, "transformers cannot build nothing"),
        ({"model_type": "detr", "backbone_config": {"model_type": "timm_backbone"}}, "would be downloaded"),
        ({"model_type": "bert"}, "transformers"),
        ({}, "names no network"),
        ([], "not an object of settings"),
    ):
        (folder / "config.json").write_text(json.dumps(settings))
        refusal_of_it = refusal(folder)
        assert expected in refusal_of_it or "missing" in refusal_of_it
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refusal(folder)
    assert "needs config.json and model.safetensors or pytorch_model.bin" in refusal(tmp_path)


def test_what_a_folder_asks_for_is_not_fetched(timm_folder, tmp_path):
    """timm's own arguments in a configuration would load other weights."""
    folder, network = timm_folder
    config = json.loads((folder / "config.json").read_text())
    config["model_args"] = {"checkpoint_path": str(tmp_path / "other.pth"), "pretrained": True}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_encoder(folder).backbone.model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("package", ["timm", "transformers", "safetensors"])
def test_an_absent_package_is_named(package, timm_folder, tmp_path, monkeypatch):
    huggingface_folder(tmp_path / "transformers")
    monkeypatch.setitem(sys.modules, package, None)
    folder = timm_folder[0] if package != "transformers" else tmp_path / "transformers"
    assert f"pip install {package}" in refusal(folder)


# ---- the scripts ----

ATTACK = (
    *COPY,
    "--dataset",
    "cifar10",
    "--archstolen",
    "resnet10w32",
    "--losstype",
    "mse",
    "-b",
    "8",
    "--device",
    "cpu",
)


def test_another_projects_encoder_is_stolen_and_judged(call, refused, tmp_path):
    torch.save(made("torchvision")[1], tmp_path / "weights.pth")
    code, out, err = call(steal, *ATTACK, "--victim", tmp_path / "weights.pth")
    assert code == 0, err
    assert "weights.pth: layout of torchvision: resnet18-imagenet" in out
    checkpoint = read_checkpoint(out.splitlines()[-1].removeprefix("copy: "))
    assert checkpoint["ledger"]["default"]["queries"] == 24
    assert checkpoint["settings"]["arch"] == "resnet18-imagenet"
    assert checkpoint["state_dict"]["backbone.fc.weight"].shape == (512, 256)
    assert "holds a resnet18-imagenet, not a resnet34" in refused(
        steal, *ATTACK, "--arch", "resnet34", "--victim", tmp_path / "weights.pth"
    )
    judge = [flag for flag in JUDGE if flag not in SMALL[:2]]
    line = (*judge, "--modeltype", "victim", "--victim", tmp_path / "weights.pth", "--dataset-test", "mnist")
    code, out, err = call(linear_eval, *line)
    assert code == 0, err
    assert "arch resnet18-imagenet" in out


def test_a_folder_is_stolen_from(call, tmp_path):
    huggingface_folder(tmp_path / "bought")
    code, out, err = call(steal, *ATTACK, "--victim", tmp_path / "bought")
    assert code == 0, err
    copied = out.splitlines()[-1].removeprefix("copy: ")
    assert "/bought-" in copied
    assert read_checkpoint(copied)["settings"]["arch"] == "huggingface/resnet"


def test_a_victim_by_the_name_of_its_run(call, trained, tmp_path):
    victim = trained.parent.parent
    for name in (victim.name, victim):
        code, out, err = call(steal, *ATTACK, "--arch", "resnet10w32", "--epochstrain", "1", "--victim", name)
        assert code == 0, err
        assert f"victim: {victim / 'checkpoint.pth.tar'}" in out
    assert "layout of" not in out


def test_locate_takes_paths_folders_and_names(tmp_path):
    for name in ("a/x", "b/x", "b/y", "other"):
        (tmp_path / name).mkdir(parents=True)
        if name != "other":
            (tmp_path / name / "checkpoint.pth.tar").touch()
    found = {name: locate(tmp_path.__class__(name), tmp_path) for name in ("y", "a/x", "nothing", "other")}
    assert found["y"] == tmp_path / "b" / "y" / "checkpoint.pth.tar"
    assert found["a/x"] == tmp_path / "a" / "x" / "checkpoint.pth.tar"
    assert str(found["nothing"]) == "nothing"
    assert locate(tmp_path / "other", tmp_path) == tmp_path / "other"
    assert locate(tmp_path / "b" / "y", tmp_path / "a") == found["y"]
    with pytest.raises(UserError, match=r"several runs are named x: .*/a/x/.*/b/x/"):
        locate(tmp_path.__class__("x"), tmp_path)


def test_the_home_of_a_folder_follows_its_content(tmp_path):
    folder = tmp_path / "bought"
    folder.mkdir()
    (folder / "config.json").write_text("1")
    first = home_of(folder, tmp_path)
    assert first.name.startswith("bought-")
    (folder / "config.json").write_text("2")
    assert home_of(folder, tmp_path) != first
