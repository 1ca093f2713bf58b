"""Many suspects ranked by verify.py --suspects: scores, their places among references, files, and hidden copies."""

import csv
import json
import math

import numpy as np
import pytest
import torch

import run
import verify
from data_aug.shapes import make_shapes
from defenses.dataset_inference import Mixture
from evaluation.candidates import Candidate
from evaluation.fidelity import mutual_information, nearest_neighbours, neighbour_overlap, shared_neighbours
from evaluation.statistics import hits_at, holm, rank_p, rate_interval, z_scores
from files.writing import save_checkpoint
from models import build_encoder, load_encoder, read_checkpoint
from ranking.disguises import DISGUISES, Thief, hide
from ranking.probe_images import choose_trained, contested_values, make_probes, noise_images
from ranking.scores import Options, Reading, Scorer
from ranking.standing import Standing, common_scores, give_verdicts, references_needed, stand, true_rates
from ranking.suspects import find_suspects, look_at, read_truth
from tests.conftest import call_main
from tests.networks import FP32, small_encoder
from utils import UserError, seeded

NAMES = ("cosine", "information", "noise", "textures", "contested")


# ---- places among references -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 4, 12])
@pytest.mark.parametrize("columns", [1, 5])
def test_z_scores_are_of_the_other_rows(rows, columns):
    values = np.random.default_rng(rows).normal(3, 2, (rows, columns))
    z = z_scores(values)
    for i in range(rows):
        for j in range(columns):
            others = [values[k, j] for k in range(rows) if k != i]
            mean = sum(others) / len(others)
            deviation = math.sqrt(sum((one - mean) ** 2 for one in others) / (len(others) - 1))
            assert z[i, j] == pytest.approx((values[i, j] - mean) / deviation)


def test_others_that_are_all_equal_give_a_finite_z():
    z = z_scores(np.array([[2.0, 1.0], [1.0, 1.0], [1.0, 1.0]]))
    assert z[0].tolist() == [pytest.approx(1e9), 0]
    assert np.isfinite(z).all()


@pytest.mark.parametrize(
    ("totals", "p"),
    [
        ([9, 1, 2, 3], 1 / 4),
        ([2, 1, 2, 3], 3 / 4),  # a tie counts against the claim
        ([0, 1, 2, 3], 1),
        ([5, 5 + 1e-12, 0], 2 / 3),  # equal up to rounding
        ([1] + [0] * 19, 1 / 20),
    ],
)
def test_a_p_value_is_a_place(totals, p):
    assert rank_p(totals) == pytest.approx(p)


def reading(draws, shift=0.0, images=40):
    """An encoder's scores, at random, and above other encoders' by a shift."""
    scores = {name: float(draws.normal(shift)) for name in NAMES if name != "contested"}
    common = torch.from_numpy(draws.integers(0, 11, images) / 10 + 0.1 * shift).clamp(0, 1)
    return Reading(scores, {}, common)


@pytest.mark.parametrize("combine", ["maximum", "sum"])
def test_innocent_suspects_have_p_values_as_they_should(combine):
    """Of suspects of the references' kind a share a has p at most a, whatever is combined and chosen by the others.

    Had the references a part in their own mean and deviation, a quarter would have p at most 0.1 by the maximum.
    """
    draws, cases = np.random.default_rng(0), 600
    p = [stand(reading(draws), [reading(draws) for _ in range(9)], NAMES).p[combine] for _ in range(cases)]
    for level in (0.1, 0.3, 0.5):
        low, high = rate_interval(sum(one <= level + 1e-9 for one in p), cases)
        assert low < level < high
    assert min(p) == pytest.approx(1 / 10)


def test_a_standing_is_by_the_slow_formula():
    draws = np.random.default_rng(1)
    own, others = reading(draws, shift=2), [reading(draws) for _ in range(5)]
    standing = stand(own, others, NAMES)
    everyone, totals = [own, *others], []
    for i in range(6):
        z = []
        for name in NAMES:
            if name == "contested":
                values = contested_values(torch.stack([one.common for one in everyone]), 0.2).tolist()
            else:
                values = [one.scores[name] for one in everyone]
            rest = values[:i] + values[i + 1 :]
            z.append((values[i] - np.mean(rest)) / np.std(rest, ddof=1))
        totals.append((max(z), sum(z)))
        if i == 0:
            assert standing.z == pytest.approx(dict(zip(NAMES, z, strict=True)))
    for place, how in enumerate(("maximum", "sum")):
        assert standing.combined[how] == pytest.approx(totals[0][place])
        assert standing.p[how] == sum(one[place] >= totals[0][place] for one in totals) / 6


def test_a_score_that_a_suspect_lacks_has_no_part():
    draws = np.random.default_rng(2)
    own, others = reading(draws), [reading(draws) for _ in range(4)]
    whole = stand(own, others, [name for name in NAMES if name != "cosine"])
    del own.scores["cosine"]
    assert stand(own, others, NAMES) == whole
    assert common_scores([own, *others], NAMES) == ["information", "noise", "textures", "contested"]


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_contested_images_are_chosen_by_the_others(share):
    common = torch.rand(5, 20, generator=torch.Generator().manual_seed(0))
    found = contested_values(common, share)
    for i in range(5):
        others = [sum(common[k, image].item() for k in range(5) if k != i) for image in range(20)]
        chosen = sorted(range(20), key=lambda image, others=others: others[image])[: round(20 * share)]
        assert found[i].item() == pytest.approx(100 * sum(common[i, image].item() for image in chosen) / len(chosen))


# ---- verdicts and rates ----------------------------------------------------------------------------------------------


def placed(p, doubted=False):
    return Standing({}, {}, {"maximum": 0.0, "sum": 0.0}, {"maximum": p, "sum": 1.0}, doubted=doubted)


@pytest.mark.parametrize(
    ("p", "references", "level", "verdicts"),
    [
        ([1 / 40, 20 / 40], 39, 0.1, ["stolen", "no proof of theft"]),
        ([1 / 40, 20 / 40], 39, 0.05, ["undecided", "no proof of theft"]),  # 2 / 40 is not below 0.05
        ([1 / 41, 1 / 41], 40, 0.05, ["stolen", "stolen"]),
        ([2 / 41, 1 / 41], 40, 0.05, ["stolen", "stolen"]),  # by Holm's second step 2 / 41
        ([1 / 20], 19, 0.05, ["undecided"]),
        ([1 / 21], 20, 0.05, ["stolen"]),
    ],
)
def test_a_verdict_needs_enough_references(p, references, level, verdicts):
    standings = [placed(one) for one in p]
    give_verdicts(standings, references, "maximum", level)
    assert [one.verdict for one in standings] == verdicts
    assert [one.p_holm for one in standings] == holm(p)
    enough = references >= references_needed(len(p), level)
    assert enough == (len(p) / (references + 1) < level)


def test_on_a_doubted_suspect_nothing_is_decided():
    standings = [placed(1 / 200, doubted=True), placed(1 / 200)]
    give_verdicts(standings, 199, "maximum", 0.05)
    assert [one.verdict for one in standings] == ["undecided", "stolen"]


@pytest.mark.parametrize(
    ("guilty", "innocent", "rate", "hits"),
    [
        ([5, 4, 3], [1, 2], 0.05, 3),
        ([5, 4, 1.5], [1, 2], 0.05, 2),  # above all of the innocent
        ([5, 4, 2], [1, 2], 0.05, 2),  # a tie with the highest of the innocent is a false accusation
        ([9, 7, 5, 3, 1], [*range(20)], 0.05, 0),
        ([25, 19, 18.5, 18, 3], [*range(20)], 0.05, 3),  # one of 20 is 5 %
        ([25, 19, 18.5, 18, 3], [*range(20)], 0.01, 1),
        ([1], [0] * 200, 0.01, 1),
    ],
)
def test_the_rate_of_hits_at_a_rate_of_false_accusations(guilty, innocent, rate, hits):
    assert hits_at(guilty, innocent, rate) == hits


def test_rates_are_of_all_suspects_whose_truth_is_known():
    """20 others from 0 to 19; of four stolen two are above them, one ties with the highest, and one cannot be read."""

    def at(value):
        return Standing({}, {"cosine": value}, {"maximum": value, "sum": -value}, {"maximum": 1.0, "sum": 1.0})

    standings = {f"innocent{value}": at(value) for value in range(20)}
    standings |= {"a": at(30), "b": at(25), "c": at(19), "broken": None, "unknown": at(18)}
    truth = {**{f"innocent{value}": False for value in range(20)}, **dict.fromkeys(("a", "b", "c", "broken"), True)}
    rates = true_rates(standings, truth)
    assert [*rates] == ["cosine", "maximum", "sum"]
    assert (rates["cosine"]["tpr_1"], rates["cosine"]["tpr_5"]) == (0.5, 0.75)
    assert (rates["cosine"]["tpr_5_low"], rates["cosine"]["tpr_5_high"]) == rate_interval(3, 4)
    assert rates["cosine"]["auc"] == pytest.approx((20 + 20 + 19.5 + 0) / 80)
    assert rates["sum"]["tpr_5"] == 0


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [1, 5, 30])
def test_shared_neighbours_by_the_slow_formula(neighbours):
    a, b = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))

    def nearest(rows, i):
        order = sorted(range(12), key=lambda j: -torch.cosine_similarity(rows[i], rows[j], dim=0).item())
        return set([j for j in order if j != i][:neighbours])

    shares = [len(nearest(a, i) & nearest(b, i)) / min(neighbours, 11) for i in range(12)]
    found = shared_neighbours(*(nearest_neighbours(rows, neighbours) for rows in (a, b)))
    assert found.tolist() == pytest.approx(shares)
    assert neighbour_overlap(a, b, neighbours) == pytest.approx(100 * sum(shares) / 12)


@pytest.fixture(scope="module")
def scorer():
    """Scores by a small victim; `own` is the victim itself."""
    images = make_probes(make_shapes("train", 60)[0], make_shapes("test", 40)[0], 24, seed=0)
    victim = Candidate("victim", None, {}, small_encoder())
    options = Options(Mixture("diag", 2))
    return Scorer(victim, images, ("dataset-inference", *NAMES), options, FP32, 0), victim.encoder


def test_each_score_is_what_its_name_says(scorer):
    score, own = scorer
    other = small_encoder(seed=5)
    h, v = ({name: run(images) for name, images in score.images.sets().items()} for run in (rows(other), rows(own)))
    reading = score(other)
    for name in ("noise", "textures"):
        overlap = neighbour_overlap(h[name] - h[name].mean(dim=0), v[name] - v[name].mean(dim=0))
        assert reading.scores[name] == pytest.approx(overlap)
    centred = [one["trained"] - one["trained"].mean(dim=0) for one in (h, v)]
    cosines = [abs(torch.cosine_similarity(a, b, dim=0).item()) for a, b in zip(*centred, strict=True)]
    assert reading.scores["cosine"] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert reading.scores["information"] == pytest.approx(mutual_information(v["trained"], h["trained"]), rel=1e-4)
    overlap = neighbour_overlap(h["unseen"] - h["unseen"].mean(dim=0), v["unseen"] - v["unseen"].mean(dim=0))
    assert 100 * reading.common.mean().item() == pytest.approx(overlap)
    assert not reading.lacking


def rows(encoder):
    """A function of uint8 images: their representations by an encoder."""
    with torch.no_grad():
        return lambda images: encoder.eval()(images.float() / 255).detach()


def test_the_victim_is_nearest_to_itself(scorer):
    score, own = scorer
    itself, other = score(own), score(small_encoder(seed=5))
    assert itself.scores["cosine"] == pytest.approx(1)
    assert itself.common.min() == 1
    for name in ("information", "noise", "textures"):
        assert itself.scores[name] > other.scores[name]


def test_a_score_that_an_encoder_cannot_have_is_named(scorer):
    reading = scorer[0](small_encoder(dim=20))
    assert reading.lacking == {"cosine": "20 numbers, the victim has 32"}
    assert {"information", "noise", "textures", "dataset-inference"} == reading.scores.keys()


def test_an_encoder_of_no_numbers_has_no_reading(scorer):
    broken = small_encoder()
    with torch.no_grad():
        broken.backbone.conv2.weight.fill_(math.nan)
    with pytest.raises(UserError, match="too large or no numbers"):
        scorer[0](broken)


# What a thief's map leaves of a copy's scores as they were. A turn mixes dimensions that never vary with others, and
# the information is estimated without the former: it changes by a hundredth.
KEPT = {
    "shuffled": ("information", "noise", "textures"),
    "rotated": ("noise", "textures"),
    "padded": ("information", "noise", "textures"),
    "rescaled": (),
    "pruned": (),
}


@pytest.mark.parametrize("disguise", KEPT)
def test_what_a_disguise_leaves_of_a_copy(scorer, disguise):
    score, own = scorer
    hidden = score(DISGUISES[disguise](own, Thief(None, FP32)).eval(), outputs=True)
    plain = score(own)
    same = {
        name for name, value in plain.scores.items() if hidden.scores.get(name) == pytest.approx(value, rel=1e-3)
    } - {"dataset-inference"}
    assert same == set(KEPT[disguise])
    assert ("cosine" in hidden.lacking) == (disguise == "padded")


def test_turned_dimensions_are_turned_back_by_align(scorer):
    images, own = scorer[0].images, scorer[1]
    victim = Candidate("victim", None, {}, own)
    names = ("cosine",)
    aligned = Scorer(victim, make_probes(make_shapes("train", 80)[0], images.unseen, 20, 0), names, OPTIONS, FP32, 0)
    for disguise in ("shuffled", "rotated"):
        hidden = DISGUISES[disguise](own, Thief(None, FP32)).eval()
        assert aligned(hidden, outputs=True).scores["cosine"] == pytest.approx(1, abs=1e-3)
        assert scorer[0](hidden, outputs=True).scores["cosine"] < 0.6
    with pytest.raises(UserError, match="20 images do not determine a turn of 32 dimensions: give --num-train 64"):
        Scorer(victim, make_probes(images.trained[:40], images.unseen, 20, 0), names, OPTIONS, FP32, 0)


OPTIONS = Options(Mixture("diag", 2), align=True)


@pytest.mark.parametrize("disguise", ["fine-tuned", "distilled"])
def test_a_thief_trains_on_what_it_has(disguise, encoder, monkeypatch):
    """The trained disguises change the weights, leave the copy as it was, and follow from the seed."""
    for recipe in ("TUNING", "DISTILLING"):
        monkeypatch.setattr(f"ranking.disguises.{recipe}", run.Recipe(epochs=1, batch_size=8, lr=1e-3))
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    thief = Thief(make_shapes("train", 16)[0], FP32)
    first, second = (DISGUISES[disguise](encoder, thief).state_dict() for _ in range(2))
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first["backbone.conv1.weight"], before["backbone.conv1.weight"])


def test_hidden_copies_are_written_as_suspects(encoder, images, monkeypatch, tmp_path):
    """Each is read back as what was made of the copy, and says what its attacker queried, but not of whom."""
    for name in ("fine-tuned", "distilled"):
        monkeypatch.delitem(DISGUISES, name)
    digests = torch.arange(32, dtype=torch.uint8).view(2, 16)
    content = {"state_dict": encoder.state_dict(), "query_digests": digests, "stolen_from": "0" * 16, "settings": {}}
    save_checkpoint(content, tmp_path / "stolen.pth.tar")
    (tmp_path / "out").mkdir()
    thief = Thief(None, FP32)
    paths = hide(tmp_path / "stolen.pth.tar", tmp_path / "out", thief, "stolen")
    assert [path.name for path in paths] == [f"stolen-{name}.pth.tar" for name in ("copy", *DISGUISES)]
    suspects = find_suspects(tmp_path / "out", tmp_path)
    look_at(suspects)
    assert not [suspect.reason for suspect in suspects if suspect.reason]
    assert all(torch.equal(suspect.record["query_digests"], digests) for suspect in suspects)
    assert "stolen_from" not in read_checkpoint(paths[0])
    encoder.backbone.fc = torch.nn.Identity()
    with torch.no_grad():
        for path, make in zip(paths[1:], DISGUISES.values(), strict=True):
            made = make(encoder, thief).eval().output(images / 255)
            torch.testing.assert_close(load_encoder(path).output(images / 255), made)


# ---- probe images ----------------------------------------------------------------------------------------------------


def test_noise_images_have_cells_of_every_size():
    images = noise_images(8, (32, 32), torch.Generator().manual_seed(0))
    assert images.shape == (8, 3, 32, 32)
    for position, cells in enumerate((4, 8, 16, 32, 4, 8, 16, 32)):
        side = 32 // cells
        blocks = images[position].unfold(1, side, side).unfold(2, side, side)
        assert (blocks == blocks[..., :1, :1]).all()
        assert len(blocks[..., 0, 0].unique()) > 20


@pytest.mark.parametrize("size", [32, 48])
def test_probe_images_are_as_large_as_the_victims(size):
    trained = torch.zeros(5, 3, size, size, dtype=torch.uint8)
    first, second, other = (make_probes(trained, trained[:3], 20, seed) for seed in (0, 0, 1))
    assert first.textures.shape == first.noise.shape == (20, 3, size, size)
    for name in ("noise", "textures"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize(
    ("count", "number", "spare", "expected"),
    [
        (5000, None, False, 800),
        (5000, 60, True, 60),
        (100, None, True, 50),
        (100, 50, True, 50),
        (100, 100, False, 100),
    ],
)
def test_training_images_are_chosen_and_the_others_left(count, number, spare, expected):
    chosen, rest = choose_trained(count, number, spare, 0)
    assert len(chosen) == expected
    assert sorted([*chosen.tolist(), *rest.tolist()]) == [*range(count)]


@pytest.mark.parametrize(
    ("number", "spare", "message"),
    [
        (101, False, "was trained on 100 images: give 100 or less"),
        (51, True, "was trained on 100 images, and half of them train the shadows: give 50 or less"),
        (3, False, "3 training images of the victim are too few"),
    ],
)
def test_too_many_training_images_are_refused(number, spare, message):
    with pytest.raises(UserError, match=message):
        choose_trained(100, number, spare, 0)


# ---- suspects and the truth ------------------------------------------------------------------------------------------


def test_a_folder_has_a_suspect_in_each_file_and_folder(tmp_path):
    for name in ("b.pth.tar", "a.pt", ".hidden", "truth.csv", "notes.TXT"):
        (tmp_path / name).write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth.tar").write_text("x")
    (tmp_path / "huggingface").mkdir()
    found = {one.name: one.path for one in find_suspects(tmp_path, tmp_path)}
    assert list(found) == ["a.pt", "b.pth.tar", "huggingface", "run"]
    assert found["run"] == tmp_path / "run" / "checkpoint.pth.tar"
    assert found["huggingface"] == tmp_path / "huggingface"


def test_a_list_has_a_suspect_on_each_line(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "near.pt").write_text("x")
    (tmp_path / "runs" / "far").mkdir(parents=True)
    (tmp_path / "runs" / "far" / "checkpoint.pth.tar").write_text("x")
    (tmp_path / "lists" / "all.txt").write_text(f"near.pt\n\n  {tmp_path}/lists/near.pt \nfar\nnowhere.pt\nna\0ught\n")
    found = find_suspects(tmp_path / "lists" / "all.txt", tmp_path / "runs")
    near, far = tmp_path / "lists" / "near.pt", tmp_path / "runs" / "far" / "checkpoint.pth.tar"
    assert [one.path for one in found[:3]] == [near, near, far]
    look_at(found)
    assert ["no checkpoint at nowhere.pt" in found[3].reason, bool(found[4].reason)] == [True, True]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no suspects at"),
        ("", "has no suspects"),
        ("a.pt\nb.pt\na.pt\n", "lists a.pt twice"),
        (b"\x80\x02\xff\xfe", "cannot be read as a list of suspects"),
    ],
)
def test_a_list_that_is_none_is_refused(content, message, tmp_path):
    path = tmp_path / "list"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        find_suspects(path, tmp_path)


@pytest.fixture
def named(tmp_path):
    for name in ("a.pt", "b.pt", "c.pt"):
        (tmp_path / name).write_text("x")
    return find_suspects(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("content", "truth"),
    [
        ("suspect,stolen\na.pt,1\nb.pt,0\n", {"a.pt": True, "b.pt": False}),
        ("\ufeffteam,stolen, suspect\n7,True,a.pt\n8, no ,c.pt\n", {"a.pt": True, "c.pt": False}),
    ],
)
def test_the_truth_is_read(content, truth, named, tmp_path):
    (tmp_path / "truth.csv").write_text(content, encoding="utf-8")
    assert read_truth(tmp_path / "truth.csv", named) == truth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file at"),
        ("", "no columns suspect and stolen"),
        ("suspect,guilty\na.pt,1\n", "no columns suspect and stolen"),
        ("suspect,stolen\na.pt,1\nd.pt,0\n", "line 3: 'd.pt' is no suspect"),
        ("suspect,stolen\na.pt,1\na.pt,0\n", "line 3: 'a.pt' comes twice"),
        ("suspect,stolen\na.pt,perhaps\n", "line 2: stolen is 'perhaps': write 1 or 0"),
        ("suspect,stolen\na.pt\n", "line 2: stolen is '': write 1 or 0"),
        ("suspect,stolen\na.pt,1\nb.pt,1\n", "no suspects of both kinds"),
        (b"\xff\xfe\x00", "cannot be read as a table of suspects"),
    ],
)
def test_a_truth_that_is_none_is_refused(content, message, named, tmp_path):
    path = tmp_path / "truth.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        read_truth(path, named)


# ---- the whole, by verify.py -----------------------------------------------------------------------------------------

FEW = ("--num-train", "24", "--num-test", "30", "--probe-images", "20", "--covariance", "diag", "--components", "2")
CPU = ("--device", "cpu", "--precision", "fp32")


@pytest.fixture(scope="module")
def theft(tmp_path_factory):
    """A folder with a victim, three independent encoders, and in `suspects` two copies, a hidden one, four innocent
    encoders and a text."""
    folder = tmp_path_factory.mktemp("ranking")
    arrays = {}
    for split, number in (("train", 96), ("test", 40)):
        images, labels = make_shapes(split, number)
        arrays |= {f"x_{split}": images.permute(0, 2, 3, 1).numpy(), f"y_{split}": labels.numpy()}
    np.savez(folder / "few.npz", **arrays)
    train = ("--arch", "resnet10w32", "--dataset", f"npz:{folder}/few.npz", "--epochs", "1", "-b", "32", *CPU)
    assert call_main(run, folder, folder, *train, "--watermark", "True", "--out_dim", "16") == 0
    victim = next(folder.rglob("checkpoint.pth.tar"))
    (folder / "suspects").mkdir()
    with seeded(0):
        draws, state = torch.Generator().manual_seed(0), read_checkpoint(victim)["state_dict"]
        state = {key: value for key, value in state.items() if ".fc." not in key}
    for number in range(2):
        near = {
            key: value + 0.05 * value.std() * torch.randn(value.shape, generator=draws) if value.ndim == 4 else value
            for key, value in state.items()
        }
        save_checkpoint({"state_dict": near}, folder / "suspects" / f"copy{number}.pth.tar")
    hidden = DISGUISES["shuffled"](load_encoder(folder / "suspects" / "copy1.pth.tar"), Thief(None, FP32))
    save_checkpoint({"state_dict": hidden.state_dict()}, folder / "suspects" / "hidden.pth.tar")
    for number in range(7):
        with seeded(100 + number):
            innocent = {"state_dict": build_encoder("resnet10w32").state_dict()}
        place = folder / ("suspects" if number < 4 else "") / f"innocent{number}.pth.tar"
        save_checkpoint(innocent, place)
    (folder / "suspects" / "broken.pth.tar").write_text("not an encoder")
    stolen = {"copy0": 1, "copy1": 1, "hidden": 1, **{f"innocent{number}": 0 for number in range(4)}}
    lines = [f"{name}.pth.tar,{value}" for name, value in stolen.items()]
    (folder / "truth.csv").write_text("\n".join(["suspect,stolen", *lines]))
    return folder, victim


@pytest.fixture
def ranks(call, theft):
    """Runs verify.py --suspects; returns what it prints, the rows of its table by suspect, and its row of results."""
    folder, victim = theft
    independents = [folder / f"innocent{number}.pth.tar" for number in (4, 5, 6)]

    def run_ranking(*arguments, suspects="suspects", independent=independents):
        named = ("--victim", victim, "--suspects", folder / suspects, "--independent", *independent)
        code, out, err = call(verify, *named, *FEW, *CPU, *arguments, folder=folder)
        assert code == 0, err
        with open(out.splitlines()[-1].removeprefix("ranking: "), newline="") as file:
            table = {row["suspect"].removesuffix(".pth.tar"): row for row in csv.DictReader(file)}
        return out, table, json.loads((folder / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])

    return run_ranking


def test_a_folder_is_ranked(ranks, theft):
    """Copies come first, the text is a line with its reason, and the rates are those of this order."""
    out, table, row = ranks("--shadows", "1", "--truth", theft[0] / "truth.csv", "--heads")
    assert set([*table][:3]) == {"copy0", "copy1", "hidden"}
    assert [*table][-1] == "broken"
    assert table["broken"]["verdict"] == "not scored"
    assert "a text, not a checkpoint" in table["broken"]["reason"]
    assert table["broken"]["p"] == ""
    for name, line in table.items():
        if name != "broken":
            z = [float(value) for key, value in line.items() if key.startswith("z_")]
            assert len(z) == 7
            assert float(line["maximum"]) == pytest.approx(max(z), rel=1e-4)
            assert float(line["sum"]) == pytest.approx(sum(z), rel=1e-4)
    assert [float(table[name]["p"]) for name in ("copy0", "copy1", "hidden")] == [0.2] * 3
    p = [float(line["p"]) for name, line in table.items() if name != "broken"]
    assert [float(line["p_holm"]) for name, line in table.items() if name != "broken"] == pytest.approx(holm(p))
    assert {table[name]["verdict"] for name in ("copy0", "copy1", "hidden")} == {"undecided"}
    assert float(table["hidden"]["cosine"]) < 0.5 < 0.9 < float(table["copy1"]["cosine"])
    assert float(table["hidden"]["noise"]) == pytest.approx(float(table["copy1"]["noise"]), abs=0.1)
    assert (row["model"], row["method"], row["suspects"], row["scored"]) == ("suspects", "ranking", 8, 7)
    assert (row["independents"], row["shadows"], row["smallest_p"]) == (3, 1, 0.2)
    assert (row["auc"], row["tpr_1"], row["tpr_5"]) == (1, 1, 1)
    assert [row["tpr_5_low"], row["tpr_5_high"]] == pytest.approx(rate_interval(3, 3), abs=1e-6)
    assert row["roc"][-1] == [1, 1]
    assert row["rates"]["cosine"]["tpr_5"] == pytest.approx(2 / 3)
    assert row["victim_z"]["cosine"] > 10
    assert "With 4 references it is 0.2 or more, by Holm for 7 suspects 1 or more" in out
    assert "that needs 140 references" in out
    assert "truth: 3 stolen, 4 others; of 1 suspects it is not known" in out


def test_a_suspect_is_found_where_references_are_enough(ranks, theft):
    """Of a single suspect at level 0.3 four references are; the shadow is trained once."""
    folder, _ = theft
    (folder / "one.txt").write_text("suspects/copy0.pth.tar\n")
    _, table, _ = ranks("--shadows", "1", "--level", "0.3", suspects="one.txt")
    assert table["suspects/copy0"]["verdict"] == "stolen"
    (folder / "other.txt").write_text("suspects/innocent0.pth.tar\n")
    out, table, _ = ranks("--shadows", "1", "--level", "0.3", "--combine", "sum", suspects="other.txt")
    assert table["suspects/innocent0"]["verdict"] == "no proof of theft"
    assert "has all 1 epochs already" in out
    (shadow,) = folder.rglob("shadow-seed1-*/checkpoint.pth.tar")
    content = read_checkpoint(shadow)
    assert (content["kind"], content["images"], content["arch"]) == ("shadow", 72, "resnet10w32")
    assert "watermark_state_dict" not in content


def test_scores_are_chosen_and_resume_only_shows(ranks, theft):
    (theft[0] / "two.txt").write_text("suspects/copy0.pth.tar\nsuspects/innocent0.pth.tar\n")
    arguments = ("--scores", "noise", "cosine", "--seed", "3")
    _, table, row = ranks(*arguments, suspects="two.txt")
    assert row["scores"] == ["cosine", "noise"]
    assert [key for key in table["suspects/copy0"] if key.startswith("z_")] == ["z_cosine", "z_noise"]
    again, same, _ = ranks(*arguments, "--resume", "True", suspects="two.txt")
    assert "has its results already" in again
    assert same == table


def test_a_suspect_of_the_victims_initial_weights_is_doubted(ranks, theft):
    folder, victim = theft
    content = read_checkpoint(victim)
    save_checkpoint({"state_dict": content["state_dict"], "settings": {"seed": 0}}, folder / "alike.pth.tar")
    (folder / "alike.txt").write_text("alike.pth.tar\n")
    _, table, _ = ranks("--scores", "cosine", "--level", "0.9", suspects="alike.txt")
    assert table["alike"]["verdict"] == "undecided"
    assert "began with the victim's initial weights" in table["alike"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suspects", "{suspects}"), "two or more encoders that are independent of the victim, and 0 given"),
        (("--suspects", "{suspects}", "--shadows", "1"), "and 1 given: give --independent PATH..., or --shadows N"),
        (("--suspects", "nowhere", "--shadows", "2"), "no suspects at nowhere"),
        (("--suspects", "{suspects}", "--shadows", "2", "--method", "watermark"), "leave out --method watermark"),
        (("--suspects", "{suspects}", "--shadows", "2", "--suspect", "a"), "--suspect has no effect with --suspects"),
        (("--suspects", "{suspects}", "--shadows", "2", "--crops"), "--crops has no effect with --method ranking"),
        (("--method", "ranking"), "give --suspects FOLDER"),
        (("--method", "watermark", "--suspect", "a", "--shadows", "2"), "--shadows has no effect without --suspects"),
        (("--suspects", "{suspects}", "--shadows", "2", "--scores", "luck"), "unknown score 'luck': choose from"),
        (("--suspects", "{suspects}", "--shadows", "2", "--scores", "sslguard"), "no watermark of SSLGuard"),
        (("--suspects", "{suspects}", "--shadows", "2", "--num-train", "49"), "give 48 or less"),
        (("--suspects", "{suspects}", "--shadows", "2", "--truth", "none.csv"), "no file at none.csv"),
        (("--suspects", "{suspects}", "--independent", "{victim}", "{other}"), "is the victim or a copy of it"),
        (
            ("--suspects", "{suspects}", "--independent", "{same}", "{other}"),
            "has the weights of the suspect innocent0",
        ),
        (("--suspects", "{suspects}", "--independent", "{other}", "nowhere.pt"), "no checkpoint at nowhere.pt"),
    ],
)
def test_a_ranking_that_cannot_be_is_one_line(arguments, message, theft, capsys):
    folder, victim = theft
    places = {"suspects": folder / "suspects", "victim": victim, "other": folder / "innocent4.pth.tar"}
    places["same"] = folder / "suspects" / "innocent0.pth.tar"
    words = [word.format(**places) for word in arguments]
    assert call_main(verify, folder, folder, "--victim", victim, *words, *CPU) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_victim_that_does_not_say_how_it_was_trained_has_no_shadows(theft):
    from ranking.shadows import train_shadows

    folder, victim = theft
    content = read_checkpoint(victim)
    for settings, message in (({}, "does not say how it was trained"), ({"losstype": "infonce", "lr": "x"}, "lr: 'x'")):
        forged = Candidate("victim", victim, {**content, "settings": settings}, load_encoder(victim))
        with pytest.raises(UserError, match=message):
            train_shadows(forged, *make_shapes("train", 40), 1, FP32, folder / "none")
    assert not (folder / "none").exists()
