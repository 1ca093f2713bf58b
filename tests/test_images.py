"""Images of any size from every form, their views against torchvision's on PIL images, and batches of them."""

import builtins
import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import dataloader
from torchvision.transforms import CenterCrop, Compose, Resize, functional

import data_aug.images
import data_aug.workers
from data_aug.augment import draw_boxes
from data_aug.datasets import load_dataset
from data_aug.folders import read_picture
from data_aug.images import Batch, Loading, Stored, Streamed, Views, as_images, open_pictures, stream
from tests.conftest import ROOT
from utils import STOP_SIGNALS, UserError, generator

CPU = torch.device("cpu")
MODES = ("RGB", "L", "RGBA", "CMYK", "P", "1", "LA", "I;16")
FORMATS = {"CMYK": "jpeg", "RGB": "jpeg", "L": "jpeg"}  # png for the others
SIZES = ((60, 47), (31, 80), (300, 225), (20, 20), (257, 224), (40, 400))  # width, height


def noise(width, height, mode="RGB", seed=0):
    """A coarse random picture, as a photograph neither flat nor noise in every pixel."""
    values = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("L").convert(mode) if mode in ("LA", "I;16") else image.convert(mode)


def write(path, *args, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = noise(*args, **kwargs)
    image.save(path, FORMATS.get(image.mode, "png"))  # whatever the name says: ImageNet has a PNG named JPEG, too
    return path


@pytest.fixture
def imagenet(tmp_path):
    """A data root with ImageNet's layout below imagenet/: 2 classes of 6 pictures in train, 1 of 2 in val."""
    for i, (label, size) in enumerate((label, size) for label in ("n01", "n02") for size in SIZES):
        write(tmp_path / "imagenet" / "train" / label / f"{label}_{i}.JPEG", *size, mode=MODES[i % len(MODES)], seed=i)
    for i in range(2):
        write(tmp_path / "imagenet" / "val" / "n02" / f"val_{i}.JPEG", 50 + i, 40, seed=50 + i)
    return tmp_path


@pytest.fixture
def train(imagenet):
    return open_pictures("imagenet", imagenet, "train")


@pytest.fixture
def broken(train):
    """Pictures of which the one at position 3 was cut off; the cut file."""
    path = train.folder / os.fsdecode(train.names[3])
    path.write_bytes(path.read_bytes()[:200])
    return train, path


def array(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def positions(count, size=4):
    return torch.arange(count).split(size)


def collect(views, batches, workers=0):
    return list(stream(views, batches, workers, CPU))


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_imagenet_in_either_root(imagenet):
    for root in (imagenet, imagenet / "imagenet", str(imagenet)):
        train, val = (open_pictures("imagenet", root, split) for split in ("train", "test"))
        assert (train.name, train.split, len(train), train.classes) == ("imagenet", "train", 12, 2)
        assert train.labels.dtype == torch.int64
        assert train.labels.tolist() == [0] * 6 + [1] * 6
        # Numbered as in train, although val has no image of the first class.
        assert (len(val), val.labels.tolist(), val[0].size, val[1].size) == (2, [1, 1], (50, 40), (51, 40))


def test_imagenet_that_is_not_there(imagenet):
    text = refusal(open_pictures, "imagenet", imagenet / "none", "train")
    assert str(imagenet / "none" / "imagenet" / "train") in text
    assert "--data" in text
    (imagenet / "only" / "train" / "n01").mkdir(parents=True)
    assert "no folder" in refusal(open_pictures, "imagenet", imagenet / "only", "test")
    assert "no images below" in refusal(open_pictures, "imagenet", imagenet / "only", "train")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(tmp_path, mode):
    colour = Image.new("RGB", (30, 20), (200, 30, 100))
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 30), 100 * 256, np.uint16))
    else:
        image = colour.quantize() if mode == "P" else colour.convert("L").convert(mode) if mode == "LA" else colour
    image.convert(mode).save(tmp_path / "image", FORMATS.get(mode, "png"))
    picture = read_picture(tmp_path / "image")
    assert (picture.mode, picture.size) == ("RGB", (30, 20))
    grey = colour.convert("L").getpixel((0, 0))
    expected = {"L": [grey] * 3, "LA": [grey] * 3, "I;16": [100] * 3, "1": picture.getpixel((3, 3))}
    assert picture.getpixel((3, 3)) == pytest.approx(expected.get(mode, (200, 30, 100)), abs=3)


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 256, 0x8000, 0xFFFF]], np.uint16)).save(tmp_path / "deep.png")
    assert array(read_picture(tmp_path / "deep.png"))[0, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("size", [28, 96])
def test_npz_files_in_their_own_size(write_npz, tmp_path, size):
    path = write_npz("stl10", train=6, test=4, size=size)
    for name in ("stl10", f"npz:{path}"):
        test = open_pictures(name, tmp_path, "test")
        assert (len(test), test[3].size, test.classes) == (4, (size, size), 4)
        with np.load(path) as arrays:
            assert np.array_equal(np.array(test[3]), arrays["x_test"][3])
            assert np.array_equal(test.labels.numpy(), arrays["y_test"])


def test_unlabelled_images(tmp_path):
    np.savez(tmp_path / "stl10.npz", x_unlabeled=np.zeros((3, 96, 96, 3), np.uint8))
    unlabelled = open_pictures("stl10", tmp_path, "unlabeled")
    assert (unlabelled.labels.tolist(), unlabelled.classes) == ([-1] * 3, 0)


def test_made_sets_are_those_of_load_dataset():
    made, labels = load_dataset("shapes", split="test")
    test = open_pictures("shapes", "nowhere", "test")
    assert torch.equal(array(test[7]), made[7])
    assert torch.equal(test.labels, labels)


def test_digits_have_no_frame(tmp_path):
    digits = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in digits.shape)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + digits.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x05" + bytes(range(5)))
    assert np.array_equal(np.array(open_pictures("mnist", tmp_path, "train")[2])[..., 1], digits[2])


def test_a_folder_has_the_files_that_load_dataset_reads(tmp_path):
    for label in ("ant", "bee"):
        for i in range(20):
            (tmp_path / "set" / label / "deep").mkdir(parents=True, exist_ok=True)
            below = "deep" if i % 2 else ""
            Image.new("RGB", (40, 40), (10 * i, len(label), ord(label[0]))).save(
                tmp_path / "set" / label / below / f"{i:02}.PNG"
            )
    name = f"folder:{tmp_path / 'set'}"
    for split, number in (("train", 36), ("test", 4)):
        loaded, labels = load_dataset(name, split=split)
        found = open_pictures(name, "nowhere", split)
        assert (len(found), found.classes, found[0].size) == (number, 2, (40, 40))
        assert torch.equal(found.labels, labels)
        assert torch.equal(torch.stack([array(found[i])[:, 0, 0] for i in range(number)]), loaded[:, :, 0, 0])


def test_listing_a_folder_opens_and_asks_about_no_file(imagenet, monkeypatch):
    asked = []
    for module, name in ((os, "stat"), (os, "lstat"), (builtins, "open")):
        real = getattr(module, name)

        def spy(path, *args, real=real, **kwargs):
            asked.append(str(path))
            return real(path, *args, **kwargs)

        monkeypatch.setattr(module, name, spy)
    train = open_pictures("imagenet", imagenet, "train")
    assert not [path for path in asked if path.endswith("JPEG")]
    train[0].load()
    assert [path for path in asked if path.endswith("JPEG")]


def test_bad_names(tmp_path):
    assert "choose from imagenet, cifar10" in refusal(open_pictures, "imagenette", tmp_path, "train")
    assert "no folder" in refusal(open_pictures, f"folder:{tmp_path / 'none'}", tmp_path, "train")
    with pytest.raises(ValueError, match="no size in common"):
        load_dataset(f"folder:{tmp_path}", size=None)
    with pytest.raises(ValueError, match="no view 'centre'"):
        Views(None, "centre")


def test_many_files_take_little_memory(train, write_npz, tmp_path):
    many = data_aug.images._Files(
        "many", "train", torch.arange(10_000), train.folder, np.tile(train.names, 834)[:10_000]
    )
    assert len(pickle.dumps(Views(many, "crop"))) < 10_000 * (8 + many.names.itemsize) + 2_000
    # As a worker that is started anew gets it: the images are in shared memory.
    name = f"npz:{write_npz(train=200, size=96)}"
    assert len(bytes(ForkingPickler.dumps(Views(open_pictures(name, tmp_path, "train"), "crop")))) < 10_000


# ---- views -----------------------------------------------------------------------------------------------------------


def test_a_crop_is_torchvisions_with_the_drawn_box(train):
    flips = 0
    for position in range(len(train)):
        for epoch in range(3):
            draws = generator(3, "query view", epoch, position)
            picture = train[position]
            box = draw_boxes(1, picture.height, picture.width, draws)[0].tolist()
            expected = functional.resized_crop(picture, *box, [48, 48])
            if torch.rand((), generator=draws) < 0.5:
                expected, flips = functional.hflip(expected), flips + 1
            view = Views(train, "crop", size=48, seed=3)[position, epoch]
            assert (view.shape, view.dtype) == ((3, 48, 48), torch.uint8)
            assert torch.equal(view, array(expected))
    assert 8 < flips < 28


@pytest.mark.parametrize("size", [224, 64, 21])
def test_the_centre_is_torchvisions(tmp_path, size):
    expected = Compose([Resize(size * 256 // 224), CenterCrop(size)])
    large = [shape for shape in (*SIZES, (375, 500), (301, 226)) if min(shape) >= size]
    for i, shape in enumerate(large):
        write(tmp_path / f"{i}.png", *shape)
    views = Views(open_pictures(f"folder:{tmp_path}", tmp_path, "train"), "center", size)
    assert len(views) == len(large) > 1
    for i in range(len(views)):
        assert torch.equal(views[i], array(expected(views.pictures[i])))


def test_of_a_small_picture_the_whole_square_is_resized(write_npz, tmp_path):
    small = open_pictures(f"npz:{write_npz(train=3)}", tmp_path, "train")
    expected = functional.resize(small[1], [224, 224])
    assert torch.equal(Views(small, "center")[1], array(expected))
    wide = noise(100, 60)
    square = functional.resize(functional.center_crop(wide, [60, 60]), [224, 224])
    assert torch.equal(array(data_aug.images._centre(wide, 224)), array(square))


def test_views_differ_by_seed_purpose_and_epoch_and_position_alone_is_epoch_zero(train):
    views = Views(train, "crop", size=32)
    assert torch.equal(views[2], views[2, 0])
    assert torch.equal(views[torch.tensor(2)], views[2])
    others = [views[2, 1], Views(train, "crop", 32, seed=1)[2], Views(train, "crop", 32, purpose="copy view")[2]]
    assert not any(torch.equal(views[2], other) for other in others)
    center = Views(train, "center", size=32)
    assert torch.equal(center[2, 5], center[2, 0])


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_the_same_in_any_worker_batch_and_order(train, workers):
    views = Views(train, "crop", size=32)
    single = torch.stack([views[i] for i in range(len(train))])
    batches = collect(views, positions(len(train), 5), workers)
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert all(batch.dtype == torch.uint8 and batch.device == CPU for batch in batches)
    assert torch.equal(torch.cat(batches), single)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(collect(views, order.split(7), workers)), single[order])
    mixed = [[(2, 1), (0, 0)], [(2, 0)]]
    assert torch.equal(
        torch.cat(collect(views, mixed, workers)), torch.stack([views[item] for item in mixed[0] + mixed[1]])
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(broken, workers):
    train, path = broken
    batches = stream(Views(train, "crop", 32), positions(len(train), 2), workers, CPU)
    assert len(next(batches)) == 2
    text = refusal(next, batches)
    assert text.startswith(f"{path} is not an image that can be read: ")
    assert multiprocessing.active_children() == []


def test_only_the_death_of_a_worker_becomes_a_line_for_the_user():
    def broken():
        yield torch.zeros(1)
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.")

    batches = broken()
    data_aug.workers._next(batches)
    with pytest.raises(RuntimeError, match="Caught"):
        data_aug.workers._next(batches)
    assert data_aug.workers._next(batches) is None


@pytest.fixture
def quickly(monkeypatch):
    """Torch asks every 5 seconds whether the workers live; here more often."""
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def test_a_worker_that_dies_is_one_line_where_the_next_batch_is_asked_for(train, quickly):
    handler = signal.getsignal(signal.SIGCHLD)
    batches = stream(Views(train, "crop", 32), positions(len(train), 1), 2, CPU)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    time.sleep(0.1)  # here nothing is raised
    assert "--workers" in refusal(lambda: list(batches))
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_no_shared_memory_is_one_line(train, monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)\nNo space left on device")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    text = refusal(collect, Views(train, "crop", 32), positions(4), workers=1)
    assert "--workers" in text


def test_closing_early_ends_the_workers(train):
    views = Views(train, "crop", 32)
    with contextlib.closing(stream(views, positions(len(train), 1), 2, CPU)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []
    for _ in stream(views, positions(len(train), 1), 1, CPU):
        break
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.5], ids=lambda delay: f"after {delay} s")
def test_a_signal_to_the_whole_group_ends_no_worker_however_early_it_comes(train, number, delay, monkeypatch):
    start = data_aug.workers._start

    def started(loader):
        iterator = start(loader)
        time.sleep(delay)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, number)
        return iterator

    monkeypatch.setattr(data_aug.workers, "_start", started)
    views = Views(train, "center", 32)
    batches = torch.arange(len(train)).split(4)
    assert len(collect(views, batches, workers=2)) == len(batches)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


@pytest.mark.parametrize("workers", [0, 1])
def test_global_generators_are_left_alone(train, workers):
    def states():
        return torch.get_rng_state().tolist(), random.getstate()

    before = states()
    collect(Views(train, "crop", 32), positions(len(train)), workers)
    assert states() == before


def test_workers_have_one_thread_and_batches_leave_shared_memory(train):
    class Threads(data_aug.images.Pictures):
        def __getitem__(self, position):
            return Image.new("RGB", (8, 8), (torch.get_num_threads(),) * 3)

    (batch,) = collect(Views(Threads("threads", "train", torch.zeros(3)), "center", 8), positions(3), workers=1)
    assert batch.eq(1).all()
    assert not batch.is_shared()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_come_to_the_device(train):
    views = Views(train, "crop", 32)
    batches = list(stream(views, positions(len(train)), 1, torch.device("cuda")))
    assert torch.equal(torch.cat(batches).cpu(), torch.cat(collect(views, positions(len(train)))))


# ---- batches ---------------------------------------------------------------------------------------------------------


def halves(rank):
    """The share of one of two processes, the first of which gets the odd image."""
    return lambda count: slice(0, -(-count // 2)) if rank == 0 else slice(-(-count // 2), count)


@pytest.fixture
def both_forms(write_npz, tmp_path):
    """The same 11 images of 32 x 32, stored and streamed: the centres of larger ones."""
    views = Views(open_pictures(f"npz:{write_npz(train=11, size=40)}", tmp_path, "train"), "center", 32)
    return Stored(torch.stack([views[i] for i in range(11)])), Streamed(views, torch.arange(11), workers=0)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert isinstance(ours, Batch)
        for field, dtype in (("index", torch.int64), ("local", torch.int64), ("images", torch.uint8)):
            assert getattr(ours, field).dtype == dtype
            assert torch.equal(getattr(ours, field), getattr(theirs, field))


@pytest.mark.parametrize("number", [0, 2], ids=["no workers", "two workers"])
def test_stored_and_streamed_images_make_the_same_batches(both_forms, number):
    stored, streamed = both_forms
    streamed = Streamed(streamed.views, streamed.positions, number)
    index = torch.randperm(11, generator=torch.Generator().manual_seed(1)).split(4)
    assert (len(stored), stored.size) == (len(streamed), streamed.size) == (11, (32, 32))
    assert_same(streamed.batches(index, CPU), stored.batches(index, CPU))
    for batch, expected in zip(stored.batches(index, CPU), index, strict=True):
        assert torch.equal(batch.index, expected)
        assert torch.equal(batch.local, expected)
        assert torch.equal(batch.images, stored.tensor[expected])
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("form", [0, 1], ids=["stored", "streamed"])
def test_the_shares_of_two_processes_are_the_whole(both_forms, form):
    images = both_forms[form]
    index = torch.randperm(11, generator=torch.Generator().manual_seed(2)).split(5)  # the last of one image
    # Both shares of the same object: nothing of a process stays in it.
    first, second = (list(images.batches(index, CPU, share=halves(rank))) for rank in (0, 1))
    assert [len(batch.local) for batch in first + second] == [3, 3, 1, 2, 2, 0]
    for whole, *shares in zip(images.batches(index, CPU), first, second, strict=True):
        for share in shares:
            assert torch.equal(share.index, whole.index)
            assert torch.equal(share.images, both_forms[0].tensor[share.local])
        assert torch.equal(torch.cat([share.local for share in shares]), whole.local)
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)


@pytest.mark.parametrize("form", [0, 1], ids=["stored", "streamed"])
def test_some_of_the_images(both_forms, form):
    images, tensor = both_forms[form], both_forms[0].tensor
    for rows in (slice(3, 9), torch.tensor([7, 2, 2, 10])):
        part = images[rows]
        assert type(part) is type(images)
        (batch,) = part.batches([torch.arange(len(part))], CPU)
        assert torch.equal(batch.images, tensor[rows])
        assert torch.equal(batch.index, torch.arange(len(part)))
    assert list(images.batches([], CPU)) == []
    assert torch.equal(next(iter(images.to("cpu").batches([torch.tensor([4])], CPU))).images, tensor[4:5])


def test_streamed_views_are_those_of_the_epoch(train):
    images = Streamed(Views(train, "crop", 32), torch.tensor([5, 0, 3]), workers=0)
    views = [next(images.batches([torch.tensor([2, 0])], CPU, epoch)).images for epoch in (0, 1)]
    for epoch in (0, 1):
        assert torch.equal(views[epoch], torch.stack([images.views[3, epoch], images.views[5, epoch]]))
    assert not torch.equal(*views)
    assert torch.equal(next(images.batches([torch.tensor([2, 0])], CPU)).images, views[0])


def test_closing_the_batches_ends_the_workers(train):
    images = Streamed(Views(train, "center", 32), torch.arange(len(train)), workers=2)
    with contextlib.closing(images.batches(positions(len(train), 1), CPU)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert multiprocessing.active_children() == []


def test_stored_images_are_uint8_of_three_channels_and_stay_where_they_are(images):
    stored = as_images(images)
    assert as_images(stored) is stored
    assert stored.tensor is stored.to("cpu").tensor is images
    assert stored[2:5].tensor.data_ptr() == images[2:].data_ptr()
    for wrong in (images.float(), images[0], images[:, :1], images.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match="uint8 of shape"):
            Stored(wrong)


def test_no_workers_are_the_fewest():
    assert Loading().workers == 8
    assert Loading(workers=0).workers == 0
    with pytest.raises(UserError, match="--workers -1"):
        Loading(workers=-1)


def test_data_aug_knows_of_no_processes():
    names = sorted(path.stem for path in (ROOT / "data_aug").glob("[a-z]*.py"))
    code = "import sys\n" + "".join(f"import data_aug.{name}\n" for name in names)
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    known = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert known & set(done.stdout.split()) == {"data_aug", "files", "settings", "utils"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_of_either_form_are_on_the_device(both_forms):
    device = torch.device("cuda")
    stored, streamed = both_forms
    index = torch.randperm(11).split(4)
    expected = list(stored.batches(index, CPU, share=halves(1)))
    on_device = [part.to(device) for part in index]
    for images in (stored, stored.to(device), streamed):
        for given in (index, on_device):
            found = list(images.batches(given, device, share=halves(1)))
            assert {field.device.type for batch in found for field in batch} == {"cuda"}
            assert_same([Batch(*(field.cpu() for field in batch)) for batch in found], expected)
