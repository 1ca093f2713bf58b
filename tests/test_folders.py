"""Folders of timm and Hugging Face: what is read, what is refused, and that nothing is fetched."""

import copy
import json
import sys

import pytest
import torch

import steal
from models import load_encoder, read_checkpoint
from models.layouts import IMAGENET
from tests.conftest import ATTACK, made
from tests.networks import assert_same, prepared, randomise, refusal


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
        ({"model_type": "bert"}, "a larger network than the weights beside it"),
        ({}, "names no network"),
        ([], "is not an object of settings"),
    ):
        (folder / "config.json").write_text(json.dumps(settings))
        refusal_of_it = refusal(folder)
        assert expected in refusal_of_it or "missing" in refusal_of_it
    (folder / "config.json").write_text("{")
    assert "cannot be read as an object of settings" in refusal(folder)
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


def test_a_folder_is_stolen_from(call, tmp_path):
    huggingface_folder(tmp_path / "bought")
    code, out, err = call(steal, *ATTACK, "--victim", tmp_path / "bought")
    assert code == 0, err
    copied = made(out)
    assert "/bought-" in copied
    assert read_checkpoint(copied)["settings"]["arch"] == "huggingface/resnet"
