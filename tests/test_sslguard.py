"""SSLGuard's watermark: its losses by slow formulas, that it is embedded and read, and what it leaves as it was."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import run
import simclr
import steal
import verify
from data_aug.images import Stored
from data_aug.shapes import make_shapes
from defenses.sslguard import KEY, RECIPE, Mark, SSLGuard, mark_cosines, read_mark
from defenses.watermark import read_watermark
from evaluation.candidates import Candidate, OwnershipTest
from evaluation.marks import judge_mark, measure_mark
from loss import TRAIN_LOSSES
from models import read_checkpoint
from simclr import SimCLR
from tests.conftest import made
from tests.networks import FP32, same, small_encoder
from training.recipe import Recipe
from training.run import Run
from utils import UserError, seeded

# Far from the published rates, which are for 1,250,000 steps: 80 steps have to do.
RATES = SSLGuard(lr_shadow=0.02, lr_decoder=0.02, lr_trigger=2.0)


def new_mark(rates=RATES):
    with seeded(0):
        return Mark(32, (32, 32), small_encoder(seed=9), rates)


def marking(folder, clean, resume=False, rates=RATES, **values):
    """A trainer that puts a new mark into a copy of a small encoder."""
    recipe = Recipe(**{**RECIPE, "epochs": 10, "batch_size": 8, "lr": 1e-3, **values})
    run = Run(folder, FP32, resume=resume)
    return SimCLR(copy.deepcopy(clean), TRAIN_LOSSES["infonce"], recipe, run, new_mark(rates))


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A small encoder that learnt a little, an independent one, and the trainer that has put a mark into a copy."""
    folder = tmp_path_factory.mktemp("marked")
    images = Stored(make_shapes("train", 64)[0])
    encoders = []
    for seed in (1, 2):
        encoders.append(small_encoder(16, seed))
        recipe = Recipe(epochs=3, batch_size=32, lr=2e-3, seed=seed)
        SimCLR(encoders[-1], TRAIN_LOSSES["infonce"], recipe, Run(folder / str(seed), FP32)).train(images)
    clean, other = (encoder.eval() for encoder in encoders)
    job = marking(folder / "marked", clean)
    job.mark(images, clean)
    job.model.eval(), job.companion.eval()
    return clean, other, job


# ---- the mark and its losses ----


def test_a_mark_has_the_published_shapes_and_shares():
    mark = new_mark()
    assert mark.key.shape == (KEY,) == (256,)
    assert stats.kstest(mark.key.numpy(), "norm").pvalue > 0.01
    assert set(mark.mask.unique().tolist()) == {0, 1}
    assert mark.mask.mean().item() == pytest.approx(0.35, abs=4 * math.sqrt(0.35 * 0.65 / 3072))
    assert (mark.trigger.min(), mark.trigger.max()) == (0, 1)
    widths = [layer.weight.shape for layer in mark.decoder if hasattr(layer, "weight")]
    assert widths == [(512, 32), (256, 512), (256, 256)]


def test_a_stamped_image_has_the_trigger_where_the_mask_is(images):
    mark, plain = new_mark(), images.float() / 255
    with torch.no_grad():
        mark.trigger[:, :4] += 1.0  # training may take it out of an image's range
        stamped = mark.stamp(plain)
    inside = mark.mask.bool().expand_as(plain)
    assert torch.equal(stamped[~inside], plain[~inside])
    assert torch.equal(stamped[inside], mark.trigger.clamp(0, 1).expand_as(plain)[inside])


def mean_cosine(rows, others):
    """The mean cosine of two lists of vectors, in plain Python."""

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    pairs = [*zip(rows.tolist(), others.tolist(), strict=True)]
    return sum(dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) for a, b in pairs) / len(pairs)


def test_the_three_losses_are_the_published_formulas(images):
    """Each by the state of the networks at its own time: an optimizer's step lies between two of them."""
    encoder, clean, mark = small_encoder(seed=1), small_encoder(seed=2).eval(), new_mark()
    x, optimizer = images.float() / 255, torch.optim.SGD(mark.groups(encoder), lr=0.1)

    def decoded(network, shown):
        h = mark.decoder(network(shown))
        return mean_cosine(h, mark.key.expand_as(h))

    for number, (loss, _) in enumerate(mark.steps(encoder, clean, x, lambda call, shown: call(shown))):
        with torch.no_grad():
            if number == 0:
                expected = -mean_cosine(encoder(x), copy.deepcopy(mark.shadow).train()(x))
            elif number == 1:
                t = mark.stamp(x)
                expected = -decoded(encoder, t) - decoded(mark.shadow, t) + decoded(clean, t) ** 2
                expected += sum(decoded(network, x) ** 2 for network in (clean, encoder, mark.shadow))
            else:
                expected = -mean_cosine(clean(x), encoder(x)) + decoded(encoder, x) ** 2
                expected -= decoded(encoder, mark.stamp(x))
        assert loss.item() == pytest.approx(expected, abs=1e-4), number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert number == 2


def test_each_loss_moves_its_own_part_and_batchnorm_of_the_encoder_stays(images):
    encoder, clean, mark = small_encoder(16, seed=1), small_encoder(seed=2).eval(), new_mark()
    optimizer = torch.optim.SGD(mark.groups(encoder), lr=0.1, momentum=0.9)
    parts = {"encoder": encoder, "shadow": mark.shadow, "decoder": mark.decoder, "trigger": mark}
    moved, first = [], copy.deepcopy(encoder.state_dict())

    def state(name, module):
        return {"trigger": mark.trigger.detach()} if name == "trigger" else module.state_dict()

    for _ in range(2):  # in the second round there is momentum
        for loss, _ in mark.steps(encoder, clean, images.float() / 255, lambda call, shown: call(shown)):
            before = {name: copy.deepcopy(state(name, module)) for name, module in parts.items()}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            moved.append({name for name, module in parts.items() if not same(before[name], state(name, module))})
    assert moved == 2 * [{"shadow"}, {"decoder", "trigger"}, {"encoder"}]
    kept = {key for key, value in encoder.state_dict().items() if torch.equal(value, first[key])}
    assert kept == {key for key in first if "bn" in key or "fc" in key}


def test_rates_are_the_published_ones(tmp_path, images):
    assert (RECIPE["epochs"], RECIPE["lr"], RECIPE["momentum"]) == (50, 1e-5, 0.9)
    clean = small_encoder(seed=1).eval()
    job = marking(tmp_path, clean, rates=SSLGuard(), epochs=3, lr=1e-5)
    job.mark(Stored(images), clean)
    rates = [(group["lr"], group["momentum"]) for group in job.optimizer.param_groups]
    assert rates == [(1e-5, 0.9), (pytest.approx(1e-2 * 0.96**2), 0.9), (1e-3, 0.9), (1e-3, 0.0)]


# ---- embedding ----


def test_the_key_is_read_from_a_marked_encoder_with_the_trigger_only(marked):
    clean, other, job = marked
    test = make_shapes("test", 200)[0]
    read = {}
    for name, encoder in {"marked": job.model, "clean": clean, "other": other, "shadow": job.companion.shadow}.items():
        read[name] = [(rows > 0.5).float().mean().item() for rows in mark_cosines(encoder, job.companion, test, FP32)]
    assert read["marked"][0] > 0.95
    assert read["shadow"][0] > 0.8
    assert max(read["clean"][0], read["other"][0], read["marked"][1]) < 0.1


def test_plain_images_keep_their_representations_and_batchnorm_its_statistics(marked):
    clean, _, job = marked
    test = make_shapes("test", 200)[0].float() / 255
    with torch.no_grad():
        ours, theirs = job.model(test), clean(test)
    assert F.cosine_similarity(ours, theirs).mean() > 0.95
    assert F.cosine_similarity(theirs, theirs.roll(1, 0)).mean() < 0.9
    before, after = clean.state_dict(), job.model.state_dict()
    assert [key for key in before if "bn" in key and not torch.equal(before[key], after[key])] == []
    assert not torch.equal(before["backbone.conv1.weight"], after["backbone.conv1.weight"])


class Killed(Exception):
    pass


def test_a_resumed_mark_is_bit_identical(tmp_path, images, monkeypatch):
    """Killed in the second epoch, between two of a batch's three steps."""
    clean = small_encoder(16, seed=1).eval()
    marking(tmp_path / "whole", clean, epochs=3, batch_size=4).mark(Stored(images), clean)
    cut, steps = marking(tmp_path / "cut", clean, epochs=3, batch_size=4), []

    def dies(*arguments):
        steps.append(arguments)
        if len(steps) == 14:
            raise Killed
        SimCLR._step(cut, *arguments)

    monkeypatch.setattr(cut, "_step", dies)
    with pytest.raises(Killed):
        cut.mark(Stored(images), clean)
    assert read_checkpoint(tmp_path / "cut" / "checkpoint.pth.tar")["epoch"] == 1
    marking(tmp_path / "cut", clean, resume=True, epochs=3, batch_size=4).mark(Stored(images), clean)
    ends = [read_checkpoint(tmp_path / name / "checkpoint.pth.tar") for name in ("whole", "cut")]
    for key in ("state_dict", Mark.checkpoint_key):
        assert same(*(end[key] for end in ends)), key
    states = [end["optimizer"]["state"] for end in ends]
    assert len(states[0]) == len(states[1]) > 0
    assert all(torch.equal(states[0][n]["momentum_buffer"], states[1][n]["momentum_buffer"]) for n in states[0])


# ---- reading ----


def test_cosines_are_of_images_in_eight_bits(marked, images):
    _, other, job = marked
    mark = job.companion
    triggered, plain = mark_cosines(other, mark, images, FP32)
    for image, first, second in zip(images.float() / 255, triggered.tolist(), plain.tolist(), strict=True):
        stamped = image.clone()
        for place in mark.mask.nonzero().tolist():
            stamped[*place] = round(255 * min(1.0, max(0.0, mark.trigger[*place].item()))) / 255
        for shown, found in ((stamped, first), (image, second)):
            with torch.no_grad():
                assert found == pytest.approx(mean_cosine(mark.decoder(other(shown[None])), mark.key[None]), abs=1e-4)


@pytest.mark.parametrize("align", [False, True])
def test_encoders_are_measured_on_unseen_images(marked, align, tmp_path):
    """A thief who shuffles the dimensions is read after an alignment, which half of the images are for."""
    _, _, job = marked
    shuffled = copy.deepcopy(job.model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in (shuffled.backbone.conv2, shuffled.backbone.bn2):
            for tensor in part.state_dict().values():
                tensor.copy_(tensor[order] if tensor.ndim else tensor)
    checkpoint = {"sslguard": job.companion.state_dict(), "settings": {"dataset": "shapes"}}
    victim = Candidate("victim", tmp_path / "victim", checkpoint, job.model)
    candidates = [victim, Candidate("suspect", tmp_path / "suspect", {}, shuffled)]
    test = OwnershipTest(method="sslguard", num_test=200, align=align)
    measure, counts = measure_mark(test, tmp_path, candidates, FP32, 0)
    assert counts == ({"test_images": 100, "aligned_by_images": 100} if align else {"test_images": 200})
    shares = [judge_mark(measure(candidate), [])["share"] for candidate in candidates]
    assert shares[0] > 95
    assert (shares[1] > 80) if align else (shares[1] < 20)
    if not align:
        own = mark_cosines(job.model, job.companion, make_shapes("test")[0][-200:], FP32)
        assert all(torch.equal(*pair) for pair in zip(measure(victim), own, strict=True))
        victim.checkpoint = {**checkpoint, "sslguard": Mark(7, (32, 32)).state_dict()}
        with pytest.raises(UserError, match="victim gives representations of 32 numbers, the victim's decoder reads 7"):
            measure_mark(test, tmp_path, candidates, FP32, 0)


def test_figures_are_the_formulas():
    draws = torch.Generator().manual_seed(0)
    rows = [0.45 + shift + 0.2 * torch.randn(60, generator=draws) for shift in (0.2, -0.3, 0.0, -0.1, 0.05, -0.2)]
    own, others = tuple(rows[:2]), [tuple(rows[2:4]), tuple(rows[4:])]
    figures = judge_mark(own, others)
    triggered, plain = (part.tolist() for part in own)
    assert figures["share"] == pytest.approx(100 * sum(value > 0.5 for value in triggered) / 60)
    pairs = [*zip(triggered, plain, strict=True)]
    wins, losses = sum(a > 0.5 >= b for a, b in pairs), sum(b > 0.5 >= a for a, b in pairs)
    chances = [math.comb(wins + losses, k) / 2 ** (wins + losses) for k in range(wins, wins + losses + 1)]
    assert losses > 0
    assert figures["p_binomial"] == pytest.approx(sum(chances))
    mean = (rows[2] + rows[4]) / 2
    assert figures["p_t"] == pytest.approx(stats.ttest_rel(own[0], mean, alternative="greater").pvalue)
    a, b = rows[2].double().mean().item(), rows[4].double().mean().item()
    t = (own[0].double().mean().item() - (a + b) / 2) / (abs(a - b) / math.sqrt(2) * math.sqrt(1.5))
    assert figures["key_cosine"] == pytest.approx(own[0].mean().item())
    assert figures["p_encoders"] == pytest.approx(stats.t.sf(t, 1))
    pooled = math.sqrt((59 * own[0].var() + 119 * torch.cat([rows[2], rows[4]]).var()) / 178)
    assert figures["effect"] == pytest.approx(((own[0].mean() - mean.mean()) / pooled).item(), rel=1e-4)
    assert judge_mark(own, []).keys() == {"share", "key_cosine", "effect", "p_binomial"}
    assert judge_mark(own, others[:1]).keys() == {"share", "key_cosine", "effect", "p_binomial", "p_t"}


def test_what_is_no_mark_is_refused(marked, images, tmp_path):
    _, other, job = marked
    with pytest.raises(UserError, match=r"old\.pth\.tar has no watermark of SSLGuard: put it in by run\.py --sslguard"):
        read_mark({"state_dict": {}}, "old.pth.tar")
    narrow = Mark(7, (32, 32))
    with pytest.raises(UserError, match="gives representations of 32 numbers, the victim's decoder reads 7: verify"):
        mark_cosines(other, narrow, images, FP32)
    with pytest.raises(UserError, match="the trigger is for images of 32 x 32 pixels, these are of 16 x 24"):
        mark_cosines(other, job.companion, images[:, :, :16, :24], FP32)
    state = job.companion.state_dict()
    assert same(read_mark({Mark.checkpoint_key: state}, "file").state_dict(), Mark.state_dict(_bare(job.companion)))
    for change, words in (
        ({"trigger": torch.zeros(2, 2)}, "sslguard is not a mapping with trigger as"),
        ({"key": torch.full((KEY,), math.nan)}, "NaN or infinity: key"),
        ({"key": torch.zeros(3)}, r"misshapen: key \(3,\) for \(256,\)"),
    ):
        torch.save({"sslguard": {**state, **change}}, tmp_path / "broken.pth")
        with pytest.raises(UserError, match=words):
            read_mark(read_checkpoint(tmp_path / "broken.pth"), "broken.pth")


def _bare(mark):
    bare = copy.copy(mark)
    bare._modules = {name: module for name, module in mark._modules.items() if name != "shadow"}
    return bare


# ---- as a user runs it ----

SMALL = ("--device", "cpu", "--precision", "fp32", "--epochs", "1")


def test_a_marked_victim_is_stolen_and_verified(call, refused, write_npz):
    """The victim is a run of its own below the clean one, which the attack and verify.py take as any other."""
    train = ("--dataset", f"npz:{write_npz(test=48)}", "--arch", "resnet10w32", "-b", "32", *SMALL)
    train = (*train, "--watermark", "True")
    clean, other = (Path(made(call(run, *train, "--seed", seed)[1])) for seed in (0, 1))
    rates = ("--lr", "0.5", "--lr-shadow", "0.25", "--lr-decoder", "0.125", "--lr-trigger", "2")
    arguments = ("--sslguard", clean.parent, "-b", "8", "--num-train", "16", *rates, *SMALL)
    code, out, err = call(run, *arguments)
    assert code == 0, err
    assert re.search(r"SSLGuard's key is read from [\d.]+ % of 48 test images with the trigger", out)
    marked = Path(made(out))
    assert marked.parent.parent == clean.parent
    name = r"victim-npz_tiny.npz-resnet10w32-infonce-1ep-seed0-batchsize=8-lr=0.5-lrdecoder=0.125-.*-sslguard-\w{8}"
    assert re.fullmatch(name, marked.parent.name)
    checkpoint = read_checkpoint(marked)
    assert {"key", "mask", "trigger", "decoder.0.weight"} <= checkpoint["sslguard"].keys()
    before, after = (read_watermark(read_checkpoint(path), "").state_dict() for path in (clean, marked))
    assert all(torch.equal(before[name], after[name]) for name in before)  # it keeps its first watermark
    assert [group["lr"] for group in checkpoint["optimizer"]["param_groups"]] == [0.5, 0.25, 0.125, 2]
    ours, theirs = checkpoint["settings"], read_checkpoint(clean)["settings"]
    assert [ours[name] for name in ("dataset", "arch", "losstype")] == [theirs["dataset"], "resnet10w32", "infonce"]
    assert (checkpoint["kind"], ours["victim"]) == ("victim", str(clean))
    assert "has all 1 epochs already" in call(run, *arguments, "--resume")[1]
    assert "no watermark of SSLGuard" in refused(verify, "--method", "sslguard", "--victim", clean, "--suspect", other)

    copied = ("--victim", marked, "--datasetsteal", "svhn", "--losstype", "mse", "-b", "8", *SMALL)
    code, out, err = call(steal, *copied, "--archstolen", "resnet10w32", "--num_queries", "16")
    assert code == 0, err
    stolen = Path(made(out))
    assert stolen.parent.parent == marked.parent
    asked = ("--victim", marked, "--suspect", stolen, "--independent", other, "--num-test", "40", *SMALL[:4])
    code, out, err = call(verify, "--method", "sslguard", *asked)
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [row.split(" ")[1] for row in rows] == ["kind", "victim", "suspect", "independent", "untrained"]
    assert "share | key_cosine | effect" in rows[0]
    assert "the victim's key is read from" in out
    assert "40 test images" in out

    content = read_checkpoint(clean)
    content["state_dict"]["backbone.conv1.weight"] += 1
    torch.save(content, clean)
    assert "was begun with weights" in refused(run, *arguments, "--resume")


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(simclr, "processes", lambda: 2)
    clean = small_encoder(16, 1)
    with pytest.raises(UserError, match="single process: start"):
        marking(tmp_path, clean).mark(Stored(make_shapes("train", 16)[0]), clean)


def test_flags_that_a_trained_victim_does_not_take_are_refused(refused, encoder, tmp_path):
    content = {"state_dict": encoder.state_dict(), "epoch": 1}

    def saved(name, **settings):
        torch.save({**content, "settings": {"epochs": 1, **settings}}, tmp_path / name)
        return "--sslguard", tmp_path / name, "--device", "cpu"

    mark = saved("whole.pth", dataset="shapes")
    assert "--watermark has no effect with --sslguard" in refused(run, *mark, "--watermark", "True")
    assert "--temperature has no effect with --sslguard" in refused(run, *mark, "--temperature", "0.5")
    assert "--recipe has no effect with --sslguard" in refused(run, *mark, "--recipe", "released")
    assert "leave out --optimizer adam" in refused(run, *mark, "--optimizer", "adam")
    assert "--lr-trigger has no effect without --sslguard" in refused(run, "--lr-trigger", "1")
    assert "was trained with dataset shapes, not svhn" in refused(run, *mark, "--dataset", "svhn")
    assert "does not say which data set it was trained on: give --dataset" in refused(run, *saved("unnamed.pth"))
    part = saved("part.pth", dataset="shapes", num_train=9, seed=4)
    assert "trained on images chosen by seed 4: give --seed 4" in refused(run, *part)
