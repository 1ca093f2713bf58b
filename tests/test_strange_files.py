"""Random content, random bytes and random changes: whatever a file holds, it gives a checked value or one line."""

import io
import json
import math
from argparse import Namespace
from collections import OrderedDict
from functools import partial

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from files.reading import read_json, read_lines, read_yaml
from models import ARCHITECTURES, SimCLREncoder, build_encoder, load_encoder
from models.checkpoint import encoder_from_checkpoint
from models.resnet import BasicBlock, ResNet
from training.lars import LARS
from training.record import Record
from training.resuming import load_optimizer
from utils import UserError, seeded

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAN = math.nan


def outcome(function, *arguments):
    """What a function returns, or the line of its UserError."""
    try:
        return function(*arguments)
    except UserError as error:
        line = str(error)
    assert len(line.splitlines()) == 1
    return line


# ---- texts -----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BYTES = st.binary(max_size=60) | st.text(max_size=40).map(lambda value: value.encode("utf-8", "surrogatepass"))
BYTES |= st.text("{}[]:-&*!<|>\"'a1\t\n ,", max_size=40).map(str.encode)


@FEW
@given(BYTES | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_mapping_or_one_line(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (read_yaml, read_json):
        found = outcome(read, path, "settings")
        assert isinstance(found, dict) or str(path) in found


@FEW
@given(st.dictionaries(st.text(min_size=1), JSON, max_size=3))
def test_what_is_written_is_read(tmp_path, content):
    (tmp_path / "file").write_text(json.dumps(content))
    assert repr(read_json(tmp_path / "file", "settings")) == repr(content)
    (tmp_path / "lines").write_text(f"{json.dumps(content)}\n{json.dumps(content)}\n")
    assert repr(read_lines(tmp_path / "lines")) == repr([content, content])
    plain = {"a": 1, "b": [True, None, "c"]}
    (tmp_path / "file").write_text(yaml.safe_dump(plain))
    assert read_yaml(tmp_path / "file", "settings") == plain


@FEW
@given(st.lists(BYTES.filter(lambda line: b"\n" not in line), max_size=5))
def test_broken_lines_are_skipped_and_whole_ones_kept(tmp_path, lines):
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join([b'{"first": 1}', *lines, b'{"last": 2}', b'{"cut": ']))
    found = read_lines(path)
    assert found[0] == {"first": 1}
    assert found[-1] == {"last": 2}
    assert all(isinstance(line, dict) for line in found)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A copy's checkpoint of 60 kB, of an architecture that is known while this fixture is there."""
    with pytest.MonkeyPatch.context() as patch, seeded(0):
        patch.setitem(ARCHITECTURES, "tiny", partial(ResNet, BasicBlock, (1, 1, 1, 1), width=2))
        state = build_encoder("tiny", 4).state_dict()
        ledger = {"default": {"queries": 2, "calls": 1, "images": torch.zeros(2, 16, dtype=torch.uint8)}}
        yield {
            **{"epoch": 1, "arch": "tiny", "normalize": None, "input_size": 32, "kind": "stolen"},
            **{"settings": {"epochs": 1}, "state_dict": state, "ledger": ledger, "images": 3},
            **{"query_digests": torch.zeros(2, 16, dtype=torch.uint8), "defence_report": {"noise": 1.0}},
        }


KERNEL = (2, 3, 3, 3)  # the shape of the first convolution
TENSORS = (
    *(torch.tensor(1.0), torch.zeros(0), torch.full((2,), -1.0), torch.ones(KERNEL).half() * 6e4),
    *(torch.zeros(3, dtype=torch.int64), torch.zeros(KERNEL, dtype=torch.complex64), torch.zeros(KERNEL).bool()),
    *(torch.full(KERNEL, NAN), torch.zeros(1).expand(10**13), torch.zeros(1, 1, 1, 1).expand(KERNEL)),
    *(torch.eye(3).to_sparse(), torch.empty(KERNEL, device="meta"), torch.nn.Parameter(torch.zeros(2))),
)
KEYS = "state_dict model teacher net model_state_dict classy_state_dict base_model trunk encoder epoch arch normalize "
KEYS += "input_size settings ledger query_set library config preprocessor met row begun images n_averaged fc.weight "
KEYS += "backbone.conv1.weight module.encoder.layer1.0.conv1.weight layer1.0.downsample.0.weight predictor.0.weight "
KEYS += "backbone.fc.2.weight backbone.fc.3.weight backbone.fc.weight"
NAMES = st.sampled_from(KEYS.split()) | st.text(max_size=3) | st.integers() | st.none() | st.tuples(st.integers())
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
LEAVES |= st.sampled_from((*TENSORS, Namespace(a=1), 1j, "tiny", "resnet18", "timm", "huggingface", 10**30, -1, 32))
CONTENTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(NAMES, inner, max_size=4),
        st.dictionaries(NAMES, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


def spots(content):
    """Every mapping in nested content, with each of its keys."""
    for key, value in content.items():
        yield content, key
        if isinstance(value, dict):
            yield from spots(value)


def drawn_spot(data, content):
    """A mapping in the content and one of its keys, drawn by number: hypothesis would print every tensor."""
    there = list(spots(content))
    return there[data.draw(st.integers(0, len(there) - 1))]


def copied(content):
    return {key: copied(value) if isinstance(value, dict) else value for key, value in content.items()}


def assert_encoder_or_line(found, name):
    """An encoder computes; a line names the file."""
    if isinstance(found, SimCLREncoder):
        assert found(torch.rand(2, 3, 32, 32)).isfinite().all()
    else:
        assert name in found


@settings(FEW, max_examples=120)
@given(st.data())
@torch.no_grad()
def test_a_checkpoint_that_is_forged_anywhere(tiny, data):
    """Entries with other values or names: the encoder, and the record of what was asked."""
    content = copied(tiny)
    for _ in range(data.draw(st.integers(1, 2))):
        place, key = drawn_spot(data, content)
        if data.draw(st.booleans()):
            place[key] = data.draw(CONTENTS)
        else:
            place[data.draw(NAMES)] = place.pop(key)
    assert_encoder_or_line(outcome(encoder_from_checkpoint, content, "file"), "file")
    record = outcome(Record.of, content)
    assert isinstance(record, str) or record.figures()["queries"] >= 0


@settings(FEW, max_examples=100)
@given(st.data())
@torch.no_grad()
def test_a_file_that_is_changed_anywhere(tiny, tmp_path, data):
    """Bytes written over or left out, in both formats of torch.save."""
    buffer, path = io.BytesIO(), tmp_path / "file.pth"
    torch.save(tiny, buffer, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(buffer.getvalue())
    start = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 400))
    stop = min(len(content), start + data.draw(st.sampled_from((1, 16, 5000, 10**6))))
    content[start:stop] = data.draw(st.binary(max_size=16))
    path.write_bytes(content)
    assert_encoder_or_line(outcome(load_encoder, path), str(path))


@FEW
@given(BYTES | st.binary(max_size=600))
def test_any_bytes_are_one_line(tmp_path, content):
    for name in ("file", "file.pth.tar", "file.safetensors", "file.onnx"):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in outcome(load_encoder, tmp_path / name)


# ---- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True),
    "lars": lambda parameters: LARS(parameters, lr=0.1),
}


def step(layer, optimizer):
    optimizer.zero_grad()
    layer(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


@settings(FEW, max_examples=40)
@pytest.mark.parametrize("name", OPTIMIZERS)
@given(data=st.data())
def test_an_optimizers_forged_state_reaches_no_other_memory(name, data):
    """What is taken has the parameters' shapes, and the next step gives finite weights."""
    with seeded(0):
        layer = torch.nn.Linear(3, 2)
    optimizer = OPTIMIZERS[name](layer.parameters())
    step(layer, optimizer)
    content = copied(optimizer.state_dict())
    place, key = drawn_spot(data, content)
    place[key] = data.draw(CONTENTS)
    if isinstance(outcome(load_optimizer, optimizer, content, "file"), str):
        return
    step(layer, optimizer)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    for parameter, entries in optimizer.state.items():
        assert all(value.shape in (parameter.shape, ()) for value in entries.values())
