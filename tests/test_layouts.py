"""Every layout of other people's checkpoints, written by networks of the same structure, and what is refused."""

import functools
import os
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linear_eval
import steal
from models import build_encoder, load_encoder, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from models.layouts import CIFAR10, CIFAR10_BY_IMAGE, IMAGENET, IMAGENET_SWAV, LAYOUTS, OWN, Layout
from models.tensors import ENTRIES
from tests.conftest import ATTACK, JUDGE, ROOT, SMALL
from tests.conftest import made as made_by
from tests.networks import (
    assert_same,
    averaged,
    barlow_whole,
    called_net,
    copy_of_2022,
    dino_whole,
    lightly,
    lightly_resnet,
    lightly_torchvision,
    mmselfsup,
    moco_v2,
    moco_v3,
    own,
    parts,
    prepared,
    probe_of_2022,
    pytorch_cifar,
    randomise,
    refusal,
    simsiam,
    solo,
    spijkervet,
    sthalles,
    supcontrast,
    swav,
    symmetrized,
    torch_resnet,
    torchvision_old,
    vissl,
    with_fc,
    wrapped,
)

AT_224 = (224, IMAGENET)
SOLO_32 = (32, CIFAR10)


@functools.cache
def own_resnet18():
    """The network that SupContrast and pytorch-cifar write down too. Not to be changed."""
    return randomise(build_encoder("resnet18")).backbone


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
    "symmetrized": (
        *(torch_resnet, symmetrized, "2022 code, symmetrized", "resnet18-imagenet", (None, None)),
        "encoder.fc., predictor.",
    ),
    "supcontrast": (own_resnet18, supcontrast, "SupContrast (model)", "resnet18", (32, CIFAR10_BY_IMAGE), "head."),
    "supcontrast-224": (torch_resnet, supcontrast, "SupContrast (model)", "resnet18-imagenet", AT_224, "head."),
    "spijkervet": (torch_resnet, spijkervet, "Spijkervet/SimCLR", "resnet18-imagenet", (224, None), "projector."),
    "swav": (torch_resnet, swav, "SwAV", "resnet18-imagenet", (224, IMAGENET_SWAV), "projection_head., prototypes"),
    "mmselfsup": (torch_resnet, mmselfsup, "mmselfsup", "resnet18-imagenet", AT_224, "neck."),
    "vissl": (
        *(torch_resnet, vissl, "vissl (classy_state_dict.base_model.model.trunk)", "resnet18-imagenet", AT_224, ""),
    ),
    "averaged": (torch_resnet, averaged, "torchvision", "resnet18-imagenet", AT_224, "fc."),
    "pytorch-cifar": (
        *(own_resnet18, pytorch_cifar, "pytorch-cifar (net)", "resnet18", (32, CIFAR10_BY_IMAGE), "linear."),
    ),
    "2022-probe": (own_resnet18, probe_of_2022, "2022 code, network of a probe", "resnet18", (None, None), "fc."),
    "net": (
        *(torch_resnet, called_net, "a ResNet called net (model_state_dict)", "resnet18-imagenet", AT_224),
        "net.fc., projection",
    ),
    "model": (
        *(torch_resnet, lambda network: {"state_dict": wrapped(network.state_dict(), "model.")}),
        *("a ResNet called model", "resnet18-imagenet", AT_224, ""),
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


# Variants of layouts: what is added to the encoder's tensors under a prefix, and the layout.
VARIANTS = {
    "SimSiam whose predictor is square": ("module.encoder.", {"module.predictor.0.weight": (512, 512)}, "SimSiam"),
    "SupContrast's classifier": ("encoder.", {"fc.weight": (10, 512)}, "SupContrast"),
    "mmselfsup, MoCo": ("backbone.", {"neck.mlp.0.weight": (8, 8), "encoder_q.0.conv1.weight": (8, 3)}, "mmselfsup"),
    "mmselfsup, BYOL": ("backbone.", {"neck.fc0.weight": (8, 8), "target_net.module.0.bn1.bias": (8,)}, "mmselfsup"),
    "mmselfsup's classifier": ("backbone.", {"head.fc.weight": (10, 512)}, "mmselfsup"),
    "DeepCluster-v2": ("module.", {"module.prototypes.prototypes0.weight": (30, 8)}, "SwAV"),
    "average of several GPUs'": (
        "module.module.",
        {"module.module.fc.weight": (10, 512), "n_averaged": ()},
        "torchvision",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_a_layout_are_read(name):
    prefix, more, layout = VARIANTS[name]
    state = {f"{prefix}{key}": value for key, value in torch_resnet().state_dict().items()}
    encoder = encoder_from_checkpoint({"state_dict": {**state, **{key: torch.ones(of) for key, of in more.items()}}})
    assert encoder.report.startswith(f"layout of {layout}: resnet18-imagenet")


@pytest.mark.parametrize("name", ["simsiam", "torchvision"])
def test_a_files_own_size_and_normalisation_come_first(name, tmp_path):
    ours = ((0.5,) * 3, (0.25,) * 3)
    torch.save({**made(name)[1], "normalize": ours, "input_size": 48}, tmp_path / "c")
    encoder = load_encoder(tmp_path / "c")
    assert (encoder.input_size, encoder.normalize) == (48, ours)


def test_the_pages_example_of_a_further_layout_works(monkeypatch):
    line = re.search(r"^```python\n(Layout\(.*\))\n```", (ROOT / "docs" / "checkpoints.md").read_text(), re.MULTILINE)
    # The page's own text, from this repository: running it as printed is the point.
    row = eval(line[1], {"Layout": Layout, "IMAGENET": IMAGENET})
    monkeypatch.setattr("models.checkpoint.LAYOUTS", (*LAYOUTS, row))
    whole = parts(cnn=with_fc(torch_resnet(), nn.Linear(512, 10)), projection=nn.Linear(512, 8))
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


def change(name, function):
    """The content of a row of FILES, with its tensors changed by a function."""
    checkpoint = made(name)[1]
    entry = next((entry for entry in ENTRIES if checkpoint.get(entry)), None)
    if entry == "classy_state_dict":
        state = dict(checkpoint[entry]["base_model"]["model"]["trunk"])
        function(state)
        return {entry: {"base_model": {"model": {"trunk": state}}}}
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
    parallel = ("simsiam", "moco", "moco3", "2022", "barlow-whole", "swav", "averaged", "pytorch-cifar")
    prefix = "module." if name in parallel else ""
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


def test_code_in_a_file_is_refused_with_the_way_out_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = {"student": {}, "teacher": {"backbone.bn1.weight": torch.ones(64)}, "args": Code()}
    torch.save(checkpoint, tmp_path / "evil.pth", pickle_module=pickle)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"architecture": "resnet18"}')
    torch.save(checkpoint, tmp_path / "folder" / "pytorch_model.bin", pickle_module=pickle)
    for path in ("evil.pth", "folder"):
        text = refusal(tmp_path / path)
        assert "is not a file of weights only (it needs posix.system)" in text
        assert "save its weights alone: torch.save(model.state_dict(), NEW)" in text
    assert not (tmp_path / "attacked").exists()


# ---- the scripts ----


def test_another_projects_encoder_is_stolen_and_judged(call, refused, tmp_path):
    torch.save(made("torchvision")[1], tmp_path / "weights.pth")
    code, out, err = call(steal, *ATTACK, "--victim", tmp_path / "weights.pth")
    assert code == 0, err
    assert "weights.pth: layout of torchvision: resnet18-imagenet" in out
    checkpoint = read_checkpoint(made_by(out))
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


def test_a_victim_by_the_name_of_its_run(call, trained, tmp_path):
    victim = trained.parent.parent
    for name in (victim.name, victim):
        code, out, err = call(steal, *ATTACK, "--arch", "resnet10w32", "--epochstrain", "1", "--victim", name)
        assert code == 0, err
        assert f"victim: {victim}" in out
    assert "layout of" not in out
