"""How close two encoders are, against slow formulas, and what each figure survives."""

import math

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from evaluation import agreement, compare, fidelity, linear_cka, neighbour_overlap, represent_both
from evaluation.fidelity import InformationScore, centred_cosines, mutual_information, untrained_like
from models import build_encoder
from utils import Precision, UserError, generator, seeded

FP32 = Precision("fp32", torch.device("cpu"))


@pytest.fixture
def pair():
    """Representations of the same 60 images by two encoders of different widths."""
    draw = torch.Generator().manual_seed(1)
    a = torch.randn(60, 12, generator=draw)
    return a, a[:, :7] + torch.randn(60, 7, generator=draw)


# ---- CKA ----


def slow_hsic(k, m):
    """Song et al., JMLR 13, 2012: the unbiased estimator, by Gram matrices without their diagonals."""
    n = len(k)
    k, m = (x - x.diag().diag() for x in (k, m))
    one = torch.ones(n, dtype=k.dtype)
    apart = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + apart - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def slow_cka(a, b):
    """Kornblith et al., equation 3: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), with the unbiased HSIC."""
    k, m = (x.double() @ x.double().T for x in (a, b))
    return float(slow_hsic(k, m) / (slow_hsic(k, k) * slow_hsic(m, m)).sqrt())


def test_linear_cka_is_that_of_gram_matrices(pair):
    assert linear_cka(*pair) == pytest.approx(slow_cka(*pair), rel=1e-9)
    assert 0.1 < linear_cka(*pair) < 0.9
    shifted = [rows + 7 for rows in pair]  # the estimator itself does not see a shift
    assert slow_cka(*shifted) == pytest.approx(slow_cka(*pair), rel=1e-6)
    assert linear_cka(*shifted) == pytest.approx(linear_cka(*pair), rel=1e-4)


def test_linear_cka_ignores_turning_scaling_and_shifting(pair):
    a, _ = pair
    turn = torch.linalg.qr(torch.randn(12, 12, generator=generator(2, "turn")))[0]
    assert linear_cka(a, 3 * a @ turn + 5) == pytest.approx(1, abs=1e-5)


def test_linear_cka_of_independent_noise_is_0_however_wide():
    """With the biased estimator 0.67."""
    a, b = torch.randn(2, 1000, 2048, generator=generator(0, "noise"))
    assert abs(linear_cka(a, b)) < 0.01
    assert linear_cka(a, a) == pytest.approx(1)
    a, b = (x - x.mean(dim=0) for x in (a, b))
    biased = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert biased == pytest.approx(0.67, abs=0.01)


def test_linear_cka_of_too_few_images_or_of_constants():
    with pytest.raises(UserError, match="3 images are too few for CKA: give 4 or more"):
        linear_cka(torch.eye(3), torch.eye(3))
    assert linear_cka(torch.ones(5, 3), torch.eye(5)) == 0


# ---- the scores of dataset inference's authors ----


@pytest.fixture(scope="module")
def spaces():
    """Representations (300, 32) of the same images by a victim, a copy of it and two encoders that know neither."""
    draws = generator(0, "spaces")

    def encoder():
        return torch.randn(300, 6, generator=draws) @ torch.randn(6, 32, generator=draws) + 3

    victim = encoder()
    copy = victim + 0.5 * torch.randn(300, 32, generator=draws)
    return victim, copy, encoder(), encoder()


def shuffled(h):
    return h[:, torch.randperm(h.shape[1], generator=generator(0, "shuffle"))]


def test_centred_cosines_are_the_formula(spaces):
    a, b = spaces[:2]
    for i, cosine in enumerate(centred_cosines(a, b)[:5]):
        x, y = a[i] - a.mean(dim=0), b[i] - b.mean(dim=0)
        assert cosine == pytest.approx(float(x @ y / (x.norm() * y.norm())), rel=1e-4)


def test_score_c_survives_scale_and_shift_and_is_lost_by_shuffling(spaces):
    victim, copy, _, _ = spaces

    def score(rows):
        return centred_cosines(rows, victim).abs().mean().item()

    assert score(copy) > 0.9
    assert score(5 * copy - torch.arange(32)) == pytest.approx(score(copy), abs=1e-5)
    assert score(shuffled(copy)) < 0.4


def test_score_c_of_independent_directions_is_that_of_chance():
    a, b = torch.randn(2, 1000, 512, generator=generator(0, "noise"))
    assert centred_cosines(a, b).abs().mean() == pytest.approx(math.sqrt(2 / (math.pi * 512)), rel=0.05)


def slow_entropy(rows):
    """Kozachenko and Leonenko: D mean(log R) + log V_D + log(N - 1) + gamma, R to the nearest other row."""
    count, width = rows.shape
    distances = [min((rows[i] - rows[j]).norm().item() for j in range(count) if j != i) for i in range(count)]
    ball = math.pi ** (width / 2) / math.gamma(width / 2 + 1)
    mean = sum(math.log(distance + 1e-10) for distance in distances) / count
    return width * mean + math.log(ball) + math.log(count - 1) + 0.5772156649


def test_mutual_information_is_that_of_nearest_neighbours(spaces):
    a, b = (rows[:60].double() for rows in spaces[:2])
    a, b = ((x - x.mean(dim=0)) / (x - x.mean(dim=0)).norm(dim=1, keepdim=True) for x in (a, b))
    expected = slow_entropy(a) + slow_entropy(b) - slow_entropy(torch.cat([a, b], dim=1))
    assert mutual_information(spaces[0][:60], spaces[1][:60]) == pytest.approx(expected, rel=1e-5)


def test_the_estimate_of_a_normal_distributions_entropy_is_near_it():
    rows = torch.randn(150, 2, generator=generator(0, "normal"))
    assert slow_entropy(rows) == pytest.approx(math.log(2 * math.pi * math.e), abs=0.2)


def test_score_s_is_1_for_the_victim_and_0_for_an_untrained_encoder(spaces):
    victim, copy, independent, untrained = spaces
    score = InformationScore(victim, untrained)
    assert (score(victim), score(untrained)) == (1, 0)
    assert score(independent) < 0.5 < 0.6 < score(copy) < 1


def test_score_s_survives_shuffling_padding_scale_and_shift(spaces):
    victim, copy, _, untrained = spaces
    score = InformationScore(victim, untrained)
    changed = (shuffled(copy), torch.cat([copy, torch.full((300, 9), 4.2)], dim=1), 5 * copy - torch.arange(32))
    assert [score(rows) for rows in changed] == pytest.approx([score(copy)] * 3, abs=1e-3)


def test_score_s_of_many_images_is_that_of_some_of_them(spaces):
    victim, copy, _, untrained = spaces
    some = InformationScore(victim[::3], untrained[::3])(copy[::3])
    assert InformationScore(victim, untrained, most=100)(copy) == pytest.approx(some)


def test_an_untrained_encoder_has_the_victims_form(encoder):
    other = untrained_like(encoder, 0)
    assert (other.arch, other.dim, other.has_head) == (encoder.arch, encoder.dim, False)
    weights = [one.backbone.conv1.weight for one in (encoder, other, untrained_like(encoder, 0))]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    encoder.arch = "from elsewhere"
    assert untrained_like(encoder, 0) is None


# ---- neighbours, classifiers, all together ----


@pytest.mark.parametrize("neighbours", [1, 10])
def test_neighbour_overlap_agrees_with_scikit_learn(pair, neighbours):
    def nearest(features):
        search = NearestNeighbors(n_neighbors=neighbours, metric="cosine").fit(features.numpy())
        return search.kneighbors(return_distance=False)  # without arguments an image is not its own neighbour

    common = [len(set(p) & set(q)) for p, q in zip(*map(nearest, pair), strict=True)]
    assert neighbour_overlap(*pair, neighbours) == pytest.approx(100 * sum(common) / (60 * neighbours))


def test_neighbour_overlap_of_more_than_a_block_and_of_few_images():
    features = torch.randn(1500, 3, generator=torch.Generator().manual_seed(0))
    assert neighbour_overlap(features, 2 * features) == 100
    assert neighbour_overlap(features, features.flip(0)) < 10
    assert neighbour_overlap(features[:4], features[:4]) == 100


def test_fidelity_written_out(pair):
    a, b = pair
    mapped = a[:, :7]
    figures = fidelity(a, b, mapped)
    distances = [float((x - y).square().sum().sqrt()) for x, y in zip(mapped, b, strict=True)]
    cosines = [float(x @ y / (x.norm() * y.norm())) for x, y in zip(mapped, b, strict=True)]
    assert figures["l2"] == pytest.approx(sum(distances) / 60, rel=1e-5)
    assert figures["cosine"] == pytest.approx(1 - sum(cosines) / 60, rel=1e-4)
    assert figures["centred_cosine"] == pytest.approx(centred_cosines(mapped, b).abs().mean().item())
    assert figures["cka"] == linear_cka(a, b)
    assert figures["overlap"] == neighbour_overlap(a, b)
    assert set(fidelity(a, b)) == {"cka", "overlap"}  # other widths have no distance


def test_fidelity_of_a_perfect_copy(pair):
    figures = fidelity(pair[0], pair[0])
    assert figures == pytest.approx({"l2": 0, "cosine": 0, "centred_cosine": 1, "cka": 1, "overlap": 100}, abs=1e-5)


def test_agreement():
    assert agreement(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])) == 75


def test_compare_sets_the_copy_beside_an_independent_encoder(encoder, images):
    labelled = images, torch.arange(12) % 3
    with seeded(7):
        other = build_encoder("resnet10w32")
    own, others = (represent_both(one, labelled, labelled, FP32) for one in (encoder, other))
    figures = compare({"copy": own, "victim": own, "independent": others}, untrained=others[1][0])
    assert figures["l2"] == pytest.approx(0, abs=1e-4)
    assert (figures["overlap"], figures["agreement"]) == (100, 100)
    assert figures["independent_l2"] > 0.1
    assert figures["independent_cka"] < figures["cka"] == pytest.approx(1)
    assert figures["independent_centred_cosine"] < figures["centred_cosine"] == pytest.approx(1)
    assert (figures["mutual_information"], figures["independent_mutual_information"]) == (1, 0)


def test_compare_measures_a_copy_of_another_width_through_its_map(pair):
    """The first 7 of a copy's 12 numbers are the victim's, which its map takes out of them."""
    labels = torch.arange(60) % 3
    wide, narrow = pair[0], pair[0][:, :7].clone()
    spaces = {name: ((rows, labels),) * 2 for name, rows in (("copy", wide), ("victim", narrow), ("independent", wide))}
    figures = compare(spaces, head=lambda rows: rows[:, :7])
    assert figures["l2"] == pytest.approx(0, abs=1e-5)
    assert figures["cka"] == figures["independent_cka"] < 1
    assert "independent_l2" not in figures  # nothing leads from there to the victim's width
