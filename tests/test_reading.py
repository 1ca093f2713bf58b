"""What is read from files: values of the wrong kind, files of another kind, and states that don't fit, in one line."""

import copy
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import time
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from files import reading
from files.reading import checked, read_json, read_lines, read_yaml
from models import build_encoder, load_encoder, read_checkpoint
from models.checkpoint import encoder_from_checkpoint
from models.files import FIELDS
from models.layouts import IMAGENET
from tests.networks import refusal, torch_resnet
from training.lars import LARS
from training.resuming import load_optimizer
from utils import UserError, seeded

NAN, INF = float("nan"), float("inf")

# ---- values ----------------------------------------------------------------------------------------------------------

COUNT = reading.number(whole=True, at_least=0, at_most=9)
CHECKS = {
    "text": (reading.text(), ["", "a"], [None, 1, b"a", []]),
    "switch": (reading.switch(), [True, False], [None, 0, "True"]),
    "number": (reading.number(), [0, -1.5, 10], [None, True, "1", NAN, INF, 2**63, 1j]),
    "any number": (reading.number(finite=False), [NAN, INF, 1], [None, True, "1"]),
    "count": (COUNT, [0, 9], [-1, 10, 1.0, True, "1", None]),
    "optional": (reading.optional(COUNT), [None, 3], [-1, "3"]),
    "table": (reading.table(COUNT), [{}, {"a": 1}], [{1: 1}, {"a": -1}, [], None]),
    "record": (reading.record(a=COUNT), [{"a": 1}, {"a": 1, "b": None}], [{}, {"a": -1}, [], None]),
    "normalisation": (
        *(reading.normalisation, [IMAGENET, [[0, 0, 0], [1, 1, 1]]]),
        [None, 1, "ab", [IMAGENET[0]], [[0] * 3, [0] * 3], [[0] * 2, [1] * 3], [[NAN] * 3, [1] * 3], [[0] * 3] * 3],
    ),
    "tensor": (
        *(reading.tensor(torch.float32, (None, 2)), [torch.zeros(0, 2), torch.zeros(3, 2)]),
        [
            *(None, [[1.0, 2.0]], torch.zeros(2), torch.zeros(3, 3), torch.zeros(3, 2).double(), torch.tensor(1.0)),
            *(torch.full((1, 2), NAN), torch.zeros(1, 1).expand(10**12, 2), torch.zeros(3, 2).to_sparse()),
            torch.zeros(3, 2, device="meta"),
        ],
    ),
}


@pytest.mark.parametrize("name", CHECKS)
def test_values_are_checked(name):
    check, good, bad = CHECKS[name]
    assert [check(value) for value in good] == [None] * len(good)
    assert all(check(value) for value in bad)
    with pytest.raises(UserError, match=r"^file: key is not "):
        checked({"key": bad[0]}, {"key": check}, "file")


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [
        (read_yaml, b"- 1\n- 2", "it has no keys"),
        (read_yaml, b"a: [", "cannot be read as it"),
        (read_yaml, b"\xff\xfe\x00", "cannot be read as it"),
        (read_yaml, b"[" * 100_000, "cannot be read as it"),
        (
            read_yaml,
            b"a: &a [0,0]\n" + b"".join(b"%c: &%c [*%c,*%c,*%c,*%c]\n" % (c, c, *[c - 1] * 4) for c in range(98, 112)),
            "more than",
        ),
        (read_json, b"[1]", "but holds a list"),
        (read_json, b"{", "cannot be read as it"),
        (read_json, b"[" * 100_000, "cannot be read as it"),
        (read_json, b'{"a": ' + b"9" * 5000 + b"}", "cannot be read as it"),
    ],
)
def test_texts_that_hold_something_else_are_one_line(read, content, said, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / "file", "it")
    assert str(caught.value).startswith(f"{tmp_path}/file ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_pipes_and_folders_are_no_texts(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing"):
        with pytest.raises(UserError, match="is not a file"):
            read(path, "it")


def test_broken_lines_are_named_and_skipped(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n[2]\n\n{"a": \n\xff\n' + b"[" * 100_000 + b'\n{"a": 3}')
    assert read_lines(path) == [{"a": 1}, {"a": 3}]
    assert capsys.readouterr().err == f"{path}: 4 broken lines are skipped (2, 4, 5, 6)\n"


# ---- files of another kind -------------------------------------------------------------------------------------------


class Canary:
    """Makes a folder named `attacked` where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def archive(**entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as written:
        for name, content in entries.items():
            written.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # it is deprecated
        torch.jit.save(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)), file)
    return file.getvalue()


def tarred(content):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as written:
        entry = tarfile.TarInfo("checkpoint.pth")
        entry.size = len(content)
        written.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def numpy_bytes(write):
    file = io.BytesIO()
    write(file, numpy.zeros(3))
    return file.getvalue()


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


SOME = {"state_dict": {"conv1.weight": torch.ones(64, 64)}}
SAVE_STATE = "save its weights alone: torch.save(model.state_dict(), NEW)"
STRANGE = {
    "empty": (b"", "is an empty file: copy or download it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 9\n", "run git lfs pull"),
    "page": (b"<!DOCTYPE html><html><title>Virus scan warning</title></html>", "is a web page, not the file: download"),
    "error page": (b"\n <?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "text": (b"resnet18\n", "is a text, not a checkpoint"),
    "json": (b'{"epoch": 1}', "is a text, not a checkpoint"),
    "onnx": (b"\x08\x07\x12\x07pytorch\x1a\x052.0.0", "is of ONNX, a graph: give the weights"),
    "gz": (gzip.compress(saved(SOME)), "is packed by gzip: unpack it"),
    "zip": (archive(weights_dot_pth=saved(SOME)), "is a zip archive of weights.pth: unpack it"),
    "tar": (tarred(saved(SOME)), "is a tar archive: unpack it"),
    "npz": (numpy_bytes(numpy.savez), "has arrays of NumPy"),
    "npy": (numpy_bytes(numpy.save), "is an array of NumPy"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is of HDF5, as Keras writes"),
    "script": (
        scripted(),
        "is a TorchScript program, and code in files is never run: where it was made, save its weights alone",
    ),
    "module": (
        saved(nn.Conv2d(3, 4, 3)),
        f"is a pickled module (it needs torch.nn.modules.conv.Conv2d), .*{SAVE_STATE}",
    ),
    "old module": (saved(nn.ReLU(), _use_new_zipfile_serialization=False), f"is a pickled module .*{SAVE_STATE}"),
    "code": (saved({"state_dict": Canary()}, pickle_module=pickle), f"needs posix.mkdir.*never run: .*{SAVE_STATE}"),
    "old code": (saved({"a": Canary()}, _use_new_zipfile_serialization=False), "needs posix.mkdir.*never run"),
    "pickle": (pickle.dumps({"a": Canary()}), f"is a pickle that torch.save did not write: .*{SAVE_STATE}"),
    "deep": (b"\x80\x02" + b"}X\x01\0\0\0a" * 10**5 + b"N" + b"s" * 10**5 + b".", "is a pickle"),
    "old tar": (bytes(999), "is damaged or cut short"),
    "noise": (numpy.random.default_rng(0).bytes(999), "is damaged"),
    "cut": (saved(SOME)[:9999], "is damaged or cut short"),
    "flipped": (flipped(saved(SOME)), "is damaged"),
    "swells": (archive(a__data_dot_pkl=bytes(2**20)), "swells to 1 MiB"),
    "list": (saved([1, 2]), "holds a list, not a dictionary of weights"),
    "tensor": (saved(torch.zeros(3)), "holds a Tensor, not a dictionary of weights"),
    "nothing": (saved({}), "has no state_dict of tensors.*holds nothing"),
    "no weights": (saved({"state_dict": {}}), "has no state_dict of tensors"),
    "no tensors": (saved({"epoch": 1}), "has no state_dict of tensors.*holds epoch"),
    "mixed": (saved({"state_dict": {"a": torch.zeros(3), "extra": {"b": 1}}}), "has 'extra' among its weights"),
    "somebody's": (saved({"state_dict": {"a.weight": torch.zeros(3)}}), "in no layout of docs/checkpoints.md"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "has no state_dict of tensors"),
    "cut safetensors": (struct.pack("<Q", 12) + b'{"a":{"dtype', "is damaged or cut short"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_file_is_named_for_what_it_is_with_a_remedy(name, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    content, said = STRANGE[name]
    (tmp_path / "file.pth").write_bytes(content)
    text = refusal(tmp_path / "file.pth")
    assert text.startswith(f"{tmp_path}/file.pth ")
    assert all(part in text for part in said.split(".*"))
    assert "weights_only" not in text
    assert len(text) < 400
    assert not recwarn.list
    assert not (tmp_path / "attacked").exists()


def test_files_without_checksums_are_read(tmp_path):
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch_resnet().state_dict(), tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(computed)
    assert load_encoder(tmp_path / "file.pth").arch == "resnet18-imagenet"


def test_folders_pipes_and_loops_are_no_files(tmp_path):
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies" / "a.pth.tar").touch()
    assert "or give a file in it: a.pth.tar" in refusal(tmp_path / "copies")
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in refusal(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path}/loop" in refusal(tmp_path / "loop")
    assert "no checkpoint at" in refusal(tmp_path / "nothing")


def test_what_needs_no_code_is_read(tmp_path):
    """The options of a command line, as SupContrast, DINO and MAE save them; and the names that trainers use."""
    state = torch_resnet().state_dict()
    for number, content in enumerate(
        (
            {"opt": Namespace(lr=0.5), "model": state},
            {"epoch": 1, "model_state_dict": state},
            {"state_dict": {"model": state}},
            {"net": {f"module._orig_mod.{key}": value for key, value in state.items()}},
        )
    ):
        torch.save(content, tmp_path / str(number))
        assert load_encoder(tmp_path / str(number)).arch == "resnet18-imagenet"


# ---- what is inside --------------------------------------------------------------------------------------------------


with seeded(0):
    STATE = build_encoder("resnet10w32", 8).state_dict()


@pytest.fixture(scope="module")
def small():
    """The content of a small checkpoint of this project. Not to be changed."""
    return {"epoch": 1, "arch": "resnet10w32", "state_dict": STATE, "settings": {"epochs": 1}, "input_size": None}


def poked(value):
    def change(weight):
        weight.view(-1)[5] = value
        return weight

    return change


WEIGHTS = {
    "NaN": (poked(NAN), "with NaN or infinity: backbone.conv1.weight"),
    "infinity": (poked(-INF), "with NaN or infinity: backbone.conv1.weight"),
    "too large": (lambda weight: weight.double() * 1e300, "with NaN or infinity: backbone.conv1.weight"),
    "whole numbers": (torch.Tensor.long, "of another type: backbone.conv1.weight (torch.int64)"),
    "complex": (lambda weight: weight + 1j, "of another type: backbone.conv1.weight (torch.complex64)"),
    "a list": (torch.Tensor.tolist, "'backbone.conv1.weight' among its weights, which is no tensor"),
    "a view": (lambda weight: torch.zeros(1).expand(weight.shape), "which is no tensor of stored numbers"),
    "a huge view": (lambda weight: torch.zeros(1).expand(10**13), "which is no tensor of stored numbers"),
    "sparse": (lambda weight: weight.to_sparse(), "which is no tensor of stored numbers"),
    "meta": (lambda weight: weight.to("meta"), "which is no tensor of stored numbers"),
    "another shape": (lambda weight: weight[:1], "1 misshapen: backbone.conv1.weight (1, 3, 3, 3)"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_cannot_be_used_are_refused(name, small, tmp_path, recwarn):
    change, said = WEIGHTS[name]
    state = {**small["state_dict"]}
    state["backbone.conv1.weight"] = change(state["backbone.conv1.weight"].clone())
    torch.save({**small, "state_dict": state}, tmp_path / "file.pth")
    text = refusal(tmp_path / "file.pth")
    assert text.startswith(f"{tmp_path}/file.pth ")
    assert said in text
    assert not recwarn.list


def test_negative_variances_are_refused_and_other_precisions_are_not(small):
    state = {**small["state_dict"], "backbone.bn1.running_var": -torch.ones(32)}
    assert "with negative variances: backbone.bn1.running_var" in refusal({**small, "state_dict": state})
    for change in (torch.Tensor.double, torch.Tensor.half, torch.Tensor.bfloat16):
        state = {
            key: change(value) if value.is_floating_point() else value for key, value in small["state_dict"].items()
        }
        assert encoder_from_checkpoint({**small, "state_dict": state}).backbone.conv1.weight.dtype == torch.float32


FORGED = {
    "epoch": (-1, 1.0, INF, "1", None, True, torch.tensor(1)),
    "arch": (1, [], b"resnet18"),
    "normalize": (1, "ab", [0.5], ((0.5,) * 3,) * 3, ((0.5,) * 3, (0.0,) * 3), ((NAN,) * 3, (1.0,) * 3)),
    "input_size": (0, -1, 1.5, 10**6, "32", [32]),
    "kind": (None, 1),
    "settings": (None, [], "text", {1: 2}),
    "images": (-1, "text", {"a": {"b": None}}),
    "query_set": ([], 1),
    "query_indices": ([1], torch.zeros(3), torch.zeros(1, dtype=torch.int64).expand(10**13)),
    "ledger": ([], {"a": 1}, {"a": {"queries": 1, "calls": -1, "images": torch.zeros(0, dtype=torch.uint8)}}),
    "query_digests": ("../../x", torch.zeros(3, 16)),
    "defence_report": ({"a": "text"}, [1]),
    "begun": (1, {"step": -1, "seen": ([], [])}, {"step": 1, "seen": ([1.0], [])}, {"step": 1}),
    "row": ([],),
    "sslguard": ([], {"key": 1}, {"key": torch.zeros(3)}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FORGED.items() for value in values])
def test_entries_of_another_type_are_named_with_their_file(key, value, small, tmp_path):
    torch.save({"state_dict": {}, key: value}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"file.pth: {key} is not "):
        read_checkpoint(tmp_path / "file.pth")
    assert f": {key} is not " in refusal({**small, key: value})


def test_every_entry_that_is_checked_is_forged_here():
    assert FORGED.keys() | {"stolen_from", "victim_version", "drawn_for", "met"} == FIELDS.keys()


# Contents of any nesting, made of names that readers look for.
KNOWN = "state_dict model teacher net arch epoch normalize input_size settings library config backbone.conv1.weight "
KNOWN += "backbone.fc.weight layer1.0.downsample.0.weight module.a n_averaged x"
NAMES = st.sampled_from(KNOWN.split()) | st.none() | st.integers(0, 3) | st.text(max_size=3)
SHAPES = [(), (0,), (2, 3), (64, 3, 7, 7)]
TENSORS = [torch.zeros(shape) for shape in SHAPES] + [torch.full((3,), NAN), torch.zeros(3).long(), torch.zeros(2) + 1j]
TENSORS += [torch.zeros(1).expand(10**13), torch.eye(3).to_sparse(), torch.empty(3, device="meta")]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=3)
CONTENTS = st.recursive(
    LEAVES | st.sampled_from(TENSORS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)


def outcome(content):
    """The line by which a content is refused, or the encoder in it."""
    try:
        return encoder_from_checkpoint(content, "file")
    except UserError as error:
        return str(error)


@settings(max_examples=80, deadline=None)
@given(content=st.dictionaries(NAMES, CONTENTS, max_size=5), key=st.none() | st.sampled_from([*STATE]), junk=CONTENTS)
def test_any_content_is_an_encoder_or_one_line(content, key, junk):
    """Random contents; and a checkpoint that has them too, or an entry of them among its weights."""
    for tried in (content, {**content, "state_dict": STATE}, {**content, "state_dict": {**STATE, key: junk}}):
        result = outcome(tried)
        if isinstance(result, str):
            assert result.startswith("file")
            assert len(result.splitlines()) == 1
        else:
            assert all(value.isfinite().all() for value in result.state_dict().values())


# ---- an optimizer's state --------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda network: torch.optim.Adam(network.parameters(), fused=True),
    "sgd": lambda network: torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
    "lars": lambda network: LARS(network.parameters(), lr=0.1),
    "sgd without momentum": lambda network: torch.optim.SGD(network.parameters(), lr=0.1),
}


def stepped(name):
    """A network and its optimizer after a step."""
    with seeded(0):
        network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        optimizer = OPTIMIZERS[name](network)
        network(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    return network, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("begun", [True, False])
def test_an_optimizers_state_is_taken_with_the_settings_in_force(name, begun):
    saved_state = stepped(name)[1].state_dict() if begun else OPTIMIZERS[name](nn.Linear(4, 3)).state_dict()
    optimizer = OPTIMIZERS[name](nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)))
    saved_state["param_groups"][0]["lr"] = "text"
    lr = optimizer.param_groups[0]["lr"]
    load_optimizer(optimizer, saved_state, "file")
    assert optimizer.param_groups[0]["lr"] == lr
    for key, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, saved_state["state"][key][entry]) for entry, value in entries.items())


FAULTS = {
    "no mapping": lambda state: None,
    "no state": lambda state: {"param_groups": []},
    "a list": lambda state: {"state": [1]},
    "a parameter is missing": lambda state: state["state"].pop(1),
    "a parameter more": lambda state: state["state"].update({9: state["state"][0]}),
    "called otherwise": lambda state: state["state"].update({"0": state["state"].pop(0)}),
    "entries are missing": lambda state: state["state"].update({0: {}}),
    "entries are a list": lambda state: state["state"].update({0: [1]}),
    "an entry more": lambda state: state["state"][0].update(more=torch.zeros(3, 4)),
    "of another parameter": lambda state: state["state"].update({0: state["state"][1]}),
    "small": lambda state: _moments(state, torch.zeros(1)),
    "a number": lambda state: _moments(state, 1.5),
    "None": lambda state: _moments(state, None),
    "NaN": lambda state: _moments(state, torch.full((3, 4), NAN)),
    "float64": lambda state: _moments(state, torch.zeros(3, 4).double()),
    "a view": lambda state: _moments(state, torch.zeros(1).expand(3, 4)),
    "sparse": lambda state: _moments(state, torch.zeros(3, 4).to_sparse()),
}


def _moments(state, value):
    entries = state["state"][0]
    entries.update(dict.fromkeys(entries.keys() - {"step"}, value))


@pytest.mark.parametrize("name", ["adam", "sgd", "lars"])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_optimizers_state_that_does_not_fit_is_refused(name, fault):
    optimizer = stepped(name)[1]
    state = copy.deepcopy(optimizer.state_dict())
    made = FAULTS[fault](state)
    state = made if fault in ("no mapping", "no state", "a list") else state
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match=r"^file.*: train again without --resume$"):
        load_optimizer(optimizer, state, "file")
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("step", [torch.tensor(-1.0), torch.tensor(NAN), torch.ones(2), 3, None])
def test_adams_count_of_steps_is_checked(step):
    optimizer = stepped("adam")[1]
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    with pytest.raises(UserError, match=r"^file: step in the optimizer's state of parameter 0"):
        load_optimizer(optimizer, state, "file")


# ---- configurations of other libraries -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small folder of timm and one of Hugging Face."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("folders")
    (root / "timm").mkdir()
    save_file(timm.create_model("test_resnet", num_classes=0).state_dict(), root / "timm" / "model.safetensors")
    pretrained = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3, "classifier": "fc"}
    config = {"architecture": "test_resnet", "model_args": {}, "pretrained_cfg": pretrained}
    (root / "timm" / "config.json").write_text(json.dumps(config))
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.ResNetModel(transformers.ResNetConfig(**sizes)).save_pretrained(root / "huggingface")
    return root


CONFIGURED = [
    ("timm", {"model_args": {"layers": [10**6, 1, 1, 1]}}, "a larger network than the weights"),
    ("timm", {"model_args": {"layers": [99_999, 1, 1, 1]}}, "a larger network than the weights"),
    ("timm", {"model_args": {"layers": [10**9, 1, 1, 1]}}, "layers is beyond 1,000,000"),
    ("timm", {"model_args": {"channels": [10**5] * 4}}, "a larger network than the weights"),
    ("timm", {"model_args": {"width": 10**400}}, "width is beyond 1,000,000"),
    ("timm", {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 300_000}}, "a larger network than"),
    ("timm", {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 10**5}}, "a larger network than"),
    ("timm", {"architecture": 5}, "config.json: architecture is not a text"),
    ("timm", {"model_args": [8]}, "config.json: model_args is not a mapping"),
    ("timm", {"pretrained_cfg": ""}, "config.json: pretrained_cfg is not a mapping"),
    ("timm", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [-1, 8]}}, "mean and std is not a mean and a deviation"),
    ("timm", {"pretrained_cfg": {"mean": [NAN] * 3, "std": [1] * 3}}, "mean and std is not a mean and a deviation"),
    ("timm", {"pretrained_cfg": {"input_size": [3, 10**5, 10**5]}}, "the size of images is not"),
    ("huggingface", {"depths": [10**6, 1]}, "a larger network than the weights"),
    ("huggingface", {"hidden_sizes": [10**5, 10**5]}, "a larger network than the weights"),
    ("huggingface", {"model_type": "vit", "num_hidden_layers": 300_000}, "a larger network than the weights"),
    ("huggingface", {"model_type": "vit", "image_size": 10**5, "hidden_size": 12}, "a larger network than the weights"),
    ("huggingface", {"model_type": 5}, "config.json: model_type is not a text"),
    ("huggingface", {"image_size": -1}, "the size of images is not"),
]


@pytest.mark.parametrize(("library", "changed", "said"), CONFIGURED)
def test_a_configuration_is_bounded_by_the_weights_beside_it(library, changed, said, folders, tmp_path):
    folder = tmp_path / library
    folder.mkdir()
    for file in (folders / library).iterdir():
        (folder / file.name).symlink_to(file)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**content, **changed}))
    started = time.perf_counter()
    assert said in refusal(folder)
    assert time.perf_counter() - started < 30  # building such a network takes minutes


@pytest.mark.parametrize("library", ["timm", "huggingface"])
def test_weights_in_a_folder_are_checked_too(library, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    assert load_encoder(folders / library).arch.startswith(library)
    state = load_file(folders / library / "model.safetensors")
    key = next(key for key, value in state.items() if value.ndim == 4)
    config = (folders / library / "config.json").read_text()
    for number, change in enumerate((poked(NAN), lambda weight: weight + 1j)):
        folder = Path(tmp_path / str(number))
        folder.mkdir()
        (folder / "config.json").write_text(config)
        save_file({**state, key: change(state[key].clone())}, folder / "model.safetensors")
        assert "weights" in refusal(folder)
