"""Encoders in other formats: each file, read by the format's own library, gives the encoder's numbers."""

import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import export
import steal
from files.writing import save_checkpoint
from models import ARCHITECTURES, build_encoder, load_encoder, read_checkpoint
from models.exporting import EXPORT_FORMATS, ExportedEncoder, write_export
from models.files import DESCRIPTION
from models.resnet import resnet10w32
from tests.conftest import ATTACK, call_main, made
from tests.networks import small_encoder
from utils import UserError, seeded
from victim import version_of

timm = pytest.importorskip("timm")
onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
onnxruntime = pytest.importorskip("onnxruntime")

# The operators of a network with plain convolutions; the fast form of models/convolution.py would need more.
PLAIN = {"Conv", "BatchNormalization", "Relu", "MaxPool", "Add", "Sub", "Div", "Mul", "MatMul", "Gemm"}
PLAIN |= {"GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Shape", "Concat"}


@pytest.fixture
def exported(tmp_path, monkeypatch, capsys):
    """Calls export.py in this process; its exit code, output and errors."""

    def call(*arguments):
        line = ["export.py", *arguments, "--checkpoint-dir", tmp_path / "checkpoints"]
        monkeypatch.setattr(sys, "argv", list(map(str, line)))
        capsys.readouterr()
        code = 0
        try:
            export.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def files(_trained, data, tmp_path_factory):
    """Checkpoints: a victim, its copies with and without a map to the width of the answers, and other people's."""
    folder = tmp_path_factory.mktemp("exported")
    victim = next(_trained.rglob("victim-*-infonce-1ep-seed0-*/checkpoint.pth.tar"))
    sold = shutil.copy(victim, folder / "sold.pth.tar")  # its copies go below this folder
    assert call_main(steal, data, folder, *ATTACK, "--victim", sold, "--victimhead", "True") == 0
    return {
        "victim": victim,
        "copy": next(_trained.rglob("stolen-svhn-resnet10w32-mse-*/checkpoint.pth.tar")),
        "narrow copy": next((folder / "checkpoints").rglob("stolen-*/checkpoint.pth.tar")),
        "foreign": data / "simsiam.pth.tar",
        "headed": data / "headed.pth.tar",
    }


def onnx_reader(path, name, size):
    graph = onnx.load(path).graph
    ((entry,), (output,)) = ([*graph.input], [*graph.output])
    assert entry.name == name
    assert [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim] == ["batch", 3, size, size]
    assert {node.op_type for node in graph.node} <= PLAIN
    assert {value.data_type for value in graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([output.name], {name: images.numpy()})[0])


# How somebody else reads each format: a path, the input's name and the images' side -> a function of images.
READERS = {
    "onnx": onnx_reader,
    "torchscript": lambda path, name, size: torch.jit.load(path),
    "safetensors": lambda path, name, size: load_encoder(path).output,
    "hf": lambda path, name, size: load_encoder(path).output,
}


@pytest.mark.parametrize("form", EXPORT_FORMATS)
@pytest.mark.parametrize(
    ("which", "flags", "output", "width", "size", "name"),
    [
        ("copy", "", "answers", 256, 32, "x"),
        ("narrow copy", "", "answers", 128, 32, "x"),
        ("narrow copy", "--output representation", "representation", 256, 32, "x"),
        ("victim", "", "representation", 256, 48, "pixels"),
        ("foreign", "", "representation", 256, 48, "x"),  # an encoder that resizes images to 224
    ],
)
@torch.no_grad()
def test_every_format_gives_every_encoder_s_numbers(
    form, which, flags, output, width, size, name, files, exported, tmp_path
):
    path = tmp_path / f"file{EXPORT_FORMATS[form].suffix}"
    flags = flags.split() + (["--size", size] if EXPORT_FORMATS[form].graph and (size, which) != (32, "copy") else [])
    flags += ["--input-name", name] if (form, name) == ("onnx", "pixels") else []
    code, out, err = exported(files[which], "--format", form, "--out", path, *flags)
    assert code == 0, err
    assert f"{output} of {width} numbers" in out
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    encoder, read = load_encoder(files[which]), READERS[form](str(path), name, size)
    for count in (1, 3):
        images = torch.rand(count, 3, size, size)
        expected = encoder.output(images) if output == "answers" else encoder(images)
        assert expected.shape == (count, width)
        torch.testing.assert_close(read(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_program_is_in_float32_by_plain_operators(files, tmp_path):
    """Whatever the encoder is in: the fast convolution of bf16 would cut the batch into rows of images."""
    network = ExportedEncoder(load_encoder(files["copy"]).bfloat16(), "answers")
    write_export(network, "torchscript", tmp_path / "a.pt")
    code = str(torch.jit.load(tmp_path / "a.pt").inlined_graph)
    assert code.count("aten::_convolution") == 12
    assert not [word for word in ("aten::pad", "aten::permute", "aten::transpose", "BFloat16") if word in code]


@pytest.mark.parametrize("form", ["safetensors", "hf"])
@torch.no_grad()
def test_weights_keep_what_no_tensor_shows(form, monkeypatch, tmp_path):
    """Normalisation and size, and the architecture where several have the same keys."""
    monkeypatch.setitem(ARCHITECTURES, "resnet10w32-norelu", partial(resnet10w32, "norelu"))
    with seeded(0):
        encoder = build_encoder("resnet10w32-norelu", 16, ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), "mlp-bn", 48).eval()
    write_export(ExportedEncoder(encoder, "answers"), form, tmp_path / "weights")
    again, images = load_encoder(tmp_path / "weights"), torch.rand(2, 3, 32, 32)
    assert (again.arch, again.input_size) == ("resnet10w32-norelu", 48)
    assert torch.equal(again.output(images), encoder.output(images))


def test_what_was_exported_is_a_victim_by_its_run_s_name(files, exported, call, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(files["victim"].parent, root / "bought", ignore=shutil.ignore_patterns("stolen-*", "linear-*"))
    code, out, err = exported("bought", "--format", "hf")
    assert code == 0, err
    folder = root / "bought" / "representation-hf"
    assert out.endswith(f"exported: {folder}\n")
    assert json.loads((folder / "config.json").read_text())["arch"] == "resnet10w32"
    code, out, err = call(steal, *ATTACK, "--victim", folder)
    assert code == 0, err
    assert version_of(load_encoder(files["victim"])) != read_checkpoint(made(out))["stolen_from"]  # it has no head
    assert version_of(load_encoder(folder)) == read_checkpoint(made(out))["stolen_from"]


# ---- what is refused ----


@pytest.fixture(scope="module")
def odd(files, tmp_path_factory):
    """Files that cannot be exported, or not so."""
    folder, held = tmp_path_factory.mktemp("odd"), read_checkpoint(files["copy"])
    weights = {key: value.contiguous() for key, value in held["state_dict"].items()}
    (folder / "notes.txt").write_text("not a network")
    (folder / "empty").mkdir()
    save_checkpoint({**held, "epoch": 0}, folder / "unfinished")
    headed = {**held, "settings": {**held["settings"], "attack": "stealhead"}}
    save_checkpoint(headed, folder / "by-stealhead")
    save_checkpoint({"state_dict": {"fc.weight": torch.rand(3, 8), "fc.bias": torch.rand(3)}}, folder / "probe")
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=2), folder / "timm")
    for name, said in (("cut", "{"), ("list", "[]"), ("number", '{"arch": 3}'), ("flat", '{"normalize": [1, 2]}')):
        save_file(weights, folder / name, {DESCRIPTION: said})
        (folder / f"{name}-folder").mkdir()
        save_file(weights, folder / f"{name}-folder" / "model.safetensors")
        (folder / f"{name}-folder" / "config.json").write_text(said.replace("{", '{"arch": null, ', said.count(":")))
    return {path.name: path for path in folder.iterdir()} | files


@pytest.mark.parametrize(
    ("which", "flags", "expected"),
    [
        ("nothing", "", "no checkpoint at"),
        ("notes.txt", "", "a text, not a checkpoint"),
        ("empty", "", "is not a folder of timm or Hugging Face"),
        ("probe", "", "is in no layout of docs/checkpoints.md"),
        ("unfinished", "", "stopped after epoch 0 of 1"),
        ("cut", "", "cannot be read as a checkpoint: Expecting property name"),
        ("list", "", "has no keys, but is of type list"),
        ("number", "", "arch is not a text"),
        ("flat", "", "normalize is not a mean and a deviation"),
        ("cut-folder", "", "cannot be read as an object of settings: Expecting property name"),
        ("list-folder", "", "is not an object of settings"),
        ("number-folder", "", "arch is not a text"),
        ("flat-folder", "", "normalize is not a mean and a deviation"),
        ("victim", "--output answers", "was not trained to give a victim's answers"),
        ("foreign", "--output answers", "was not trained to give a victim's answers"),
        ("by-stealhead", "--output answers", "was not trained to give a victim's answers"),
        ("timm", "--format safetensors", "timm/resnet10t are in its library's own form"),
        ("timm", "--format hf", "timm/resnet10t are in its library's own form"),
        ("copy", "--format keras", "invalid choice: 'keras'"),
        ("copy", "--output logits", "invalid choice: 'logits'"),
        ("copy", "--size 0", "not a whole number of at least 1"),
        ("copy", "--format hf --size 64", "--size has no effect with --format hf"),
        ("copy", "--format torchscript --input-name y", "--input-name has no effect with --format torchscript"),
        ("copy", "--input-name 2b", "'2b' is no name"),
        ("copy", "--input-name answers", "is the name of the output"),
        ("copy", "--out {copy}", "is there already"),
        ("copy", "--format hf --out {empty}/..", "is there already"),
        ("copy", "--out /dev/null/x.onnx", "File exists: /dev/null"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(which, flags, expected, odd, exported, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out " in flags else ["--out", tmp_path / "file"]
    source = odd.get(which, tmp_path / "nothing")
    code, _, err = exported(source, *flags.format(**odd).split(), *out)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert expected in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("hf", "safetensors")])
def test_an_absent_package_is_named(form, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}: pip install -r requirements-export.txt"):
        write_export(ExportedEncoder(small_encoder()), form, tmp_path / "file")


@pytest.mark.parametrize("wrong", ["numbers", "NaN", "width", "batch"])
def test_a_file_that_gives_something_else_is_not_kept(wrong, tmp_path, monkeypatch):
    form = EXPORT_FORMATS["torchscript"]

    def write(network, path, name):
        class Other(nn.Module):
            samples = network.samples

            def forward(self, images):
                rows = network(images)
                if wrong == "numbers":
                    return rows * 1.001
                if wrong == "NaN":
                    return rows * float("nan")
                return rows[:, 1:] if wrong == "width" else rows[:2]

        form.write(Other(), path, name)

    monkeypatch.setitem(EXPORT_FORMATS, "torchscript", replace(form, write=write))
    expected = "the encoder" if wrong in ("width", "batch") else "differs from the encoder"
    with pytest.raises(UserError, match=expected):
        write_export(ExportedEncoder(small_encoder()), "torchscript", tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_network_that_no_graph_can_hold_is_refused(tmp_path):
    encoder = small_encoder()
    encoder.backbone.represent = lambda images: images[:, 0, 0] if images.sum() > 9 else images[:, 1, 1]
    with pytest.raises(UserError, match="small cannot be written as onnx: "):
        write_export(ExportedEncoder(encoder), "onnx", tmp_path / "file")
    assert not list(tmp_path.iterdir())
