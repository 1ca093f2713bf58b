"""What each defence does to answers, compared with its formula written out in loops, as slow and plain as can be."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score, roc_auc_score

from attacks.client import jitter
from data_aug import digests
from data_aug.datasets import load_dataset
from data_aug.digests import perceptual_hashes
from defenses.buckets import Buckets, Centroids, Coverage, Hyperplanes, even_coverage, queries_for
from defenses.noise import Noise
from defenses.poisoning import detection_figures, repeats
from defenses.transform import AFFINE, KINDS, Transform
from models.simclr import SimCLREncoder
from tests.test_defences import DIM, Pixels, ask, random_images, represent, stream, victim_with
from utils import UserError
from victim import Victim


@pytest.fixture
def images():
    return stream()


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "sigma"), [(5.0, 0.5), (-1.0, 2.0), (0.0, 0.01)])
@pytest.mark.parametrize("consistent", [False, True])
def test_noise_is_normal(mu, sigma, consistent):
    images = random_images(2000)
    if consistent:  # images so small have few hashes: one image of each
        images = images[np.unique(perceptual_hashes(images, 7).numpy(), axis=0, return_index=True)[1]]
        assert len(images) > 100
    noise = ask(victim_with("noise", mu=mu, sigma=sigma, consistent_noise=consistent), images) - represent(images)
    z, count = (noise - mu) / sigma, noise.numel()
    assert abs(z.mean()) < 4 / count**0.5
    assert abs(z.std() - 1) < 4 / (2 * count) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / count) ** 0.5
    # Each number of each answer is a draw of its own: neither rows nor columns repeat one another.
    for rows in (z, z.T):
        neighbours = (rows[1:] * rows[:-1]).mean()
        assert abs(neighbours) < 4 / (count - rows.shape[1]) ** 0.5


def test_noise_without_a_deviation_leaves_the_shift(images):
    torch.testing.assert_close(ask(victim_with("noise", mu=3.0, sigma=0.0), images), represent(images) + 3)


def test_the_same_image_asked_again_gets_fresh_noise_unless_it_is_consistent():
    images = random_images(3)
    asked = images[[0, 1, 0, 2, 1, 0]]
    noise = ask(victim_with("noise"), asked) - represent(asked)
    assert all((noise[i] - noise[j]).abs().max() > 0.1 for i in range(6) for j in range(i))
    victim = victim_with("noise", consistent_noise=True)
    noise = torch.cat([ask(victim, asked, size, account) - represent(asked) for size, account in ((2, "a"), (6, "b"))])
    which = [0, 1, 0, 2, 1, 0] * 2
    for i in range(12):
        for j in range(i):
            assert ((noise[i] - noise[j]).abs().max() < 1e-5) == (which[i] == which[j])


# ---- poisoning -------------------------------------------------------------------------------------------------------


def slow_scores(images, memory):
    """The largest (cos + 1) / 2 of each query's projection to those of the `memory` queries before it."""
    head = Pixels().fc.weight.tolist()
    z = [[sum(w * x for w, x in zip(row, h, strict=True)) for row in head] for h in represent(images).tolist()]
    scores = []
    for i in range(len(z)):
        best = -math.inf
        for j in range(max(0, i - memory), i):
            product = sum(a * b for a, b in zip(z[i], z[j], strict=True))
            best = max(best, (product / math.hypot(*z[i]) / math.hypot(*z[j]) + 1) / 2)
        scores.append(best)
    return torch.tensor(scores)


@pytest.mark.parametrize("memory", [1, 3, 4, 20, 100])
@pytest.mark.parametrize("size", [1, 5, 48])
def test_poisoning_compares_with_the_queries_before(images, memory, size):
    expected = slow_scores(images, memory)
    for threshold in (0.6, 0.8, 0.95):
        victim = victim_with("poisoning", poison_memory=memory, poison_threshold=threshold)
        answers = ask(victim, images, size)
        torch.testing.assert_close(victim.defences[0].scores(), expected)
        flagged = expected > threshold
        assert torch.equal(answers[~flagged], represent(images)[~flagged])
        assert ((answers[flagged] - 1000).abs() < 5 * 0.5).all()
        assert not flagged.all()
        assert flagged.any() or memory < 4  # the near ones are four apart


def test_the_memory_is_longer_than_a_call():
    images = random_images(1500)
    victim = victim_with("poisoning", poison_memory=1500, poison_threshold=0.9999)
    ask(victim, images, 100)
    assert (ask(victim, images[:2]) > 900).all()
    victim = victim_with("poisoning", poison_memory=1499, poison_threshold=0.9999)
    ask(victim, images, 100)
    assert torch.equal(ask(victim, images[:1]), represent(images[:1]))


def test_repeats_are_the_later_queries_of_an_image():
    which = torch.randint(0, 100, (300,), generator=torch.Generator().manual_seed(0))
    assert repeats(which).tolist() == [int(image) in which[:row].tolist() for row, image in enumerate(which)]


def test_poisoned_answers_are_normal():
    images = random_images(1).repeat(2001, 1, 1, 1)
    answers = ask(victim_with("poisoning", sigma=2.0), images, 500)[1:]
    z = (answers.double() - 1000) / 2
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * z.numel()) ** 0.5
    assert (ask(victim_with("poisoning", sigma=0.0), images[:5])[1:] == 1000).all()


def test_poisoning_remembers_each_account_by_itself(images):
    victim = victim_with("poisoning", poison_memory=100)
    ask(victim, images, 5, "a")
    again = ask(victim, images, 5, "b")
    defence = victim.defences[0]
    torch.testing.assert_close(defence.scores("b"), defence.scores("a"))
    assert torch.equal(again[:4], represent(images[:4]))
    assert (ask(victim, images, 7, "a") > 900).all()
    assert len(defence.scores("a")) == 96
    assert len(defence.scores("nobody")) == 0


def test_detection_figures_are_f1_and_auc():
    draws = torch.Generator().manual_seed(0)
    truth = torch.rand(60, generator=draws) < 0.4
    scores = (torch.rand(60, generator=draws) + 0.3 * truth).mul(20).round() / 20  # with ties
    scores[0], truth[0] = -math.inf, False  # the first query has nothing before it
    found = detection_figures(scores, truth, 0.775)
    rows = list(zip(scores.tolist(), truth.tolist(), strict=True))
    hits, wrong = sum(s > 0.775 and t for s, t in rows), sum((s > 0.775) != t for s, t in rows)
    pairs = [(s, o) for s, t in rows if t for o, u in rows if not u]
    auc = sum(1.0 if s > o else 0.5 if s == o else 0.0 for s, o in pairs) / len(pairs)
    assert found == pytest.approx({"f1": 2 * hits / (2 * hits + wrong), "auc": auc})
    assert found["f1"] == pytest.approx(f1_score(truth, scores > 0.775))
    assert found["auc"] == pytest.approx(roc_auc_score(truth, scores.clamp_min(-1)))


def test_views_of_queried_images_are_detected(images):
    victim = victim_with("poisoning")
    near = (random_images(48, seed=5) // 20).int()
    ask(victim, torch.cat([images[1::3], (images[1::3].int() + near[1::3]).clamp(0, 255).byte()]), 10)
    assert detection_figures(victim.defences[0].scores(), torch.arange(32) >= 16, 0.8)["auc"] > 0.95


def test_poisoning_reports_what_it_found(images):
    victim = victim_with("poisoning")
    order = {"a": torch.tensor([0, 1, 2, 0, 5, 0, 2, 7]), "b": torch.tensor([2, 1, 1])}
    for account, which in order.items():
        ask(victim, images[which], 3, account)
    truth = [int(i) in which[:row].tolist() for which in order.values() for row, i in enumerate(which)]
    scores = torch.cat([slow_scores(images[which], 20) for which in order.values()])
    figures = detection_figures(scores, torch.tensor(truth), 0.8)
    found = victim.defences[0].report(order)
    assert found == pytest.approx({"poisoned": (scores > 0.8).sum().item(), **figures})
    assert found["auc"] == 1
    victim = victim_with("poisoning")
    ask(victim, images[:3])
    assert victim.defences[0].report({"default": torch.arange(3)}).keys() == {"poisoned"}


# ---- rounding, topk, truncate, entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [0, 1, 3, 6])
def test_rounding(images, decimals):
    answers = ask(victim_with("rounding", decimals=decimals), images)
    for answer, h in zip(answers.flatten().tolist(), represent(images).flatten().tolist(), strict=True):
        assert answer == pytest.approx(round(answer * 10**decimals) / 10**decimals, abs=5e-7)
        assert abs(answer - h) < 0.5 / 10**decimals + 1e-6


@pytest.mark.parametrize("k", [1, 5, DIM])
def test_topk(images, k):
    answers = ask(victim_with("topk", top_k=k), images)
    for answer, h in zip(answers.tolist(), represent(images).tolist(), strict=True):
        kept = [i for i, number in enumerate(answer) if number]
        assert len(kept) == k
        assert [answer[i] for i in kept] == pytest.approx([h[i] for i in kept], abs=1e-6)
        left_out = [abs(h[i]) for i in range(DIM) if i not in kept]
        assert min(abs(h[i]) for i in kept) >= max(left_out, default=0) - 1e-6


@pytest.mark.parametrize("k", [1, 7, DIM])
def test_truncate(images, k):
    victim = victim_with("truncate", dimensions=k)
    answers = ask(victim, images)
    assert victim.dim == k
    assert answers.tolist() == [h[:k] for h in Victim(SimCLREncoder(Pixels(), "pixels")).query(images).tolist()]
    assert answers.untyped_storage().nbytes() == 4 * k * len(images)


def test_entropy(images):
    for answer, h in zip(ask(victim_with("entropy"), images).tolist(), represent(images).tolist(), strict=True):
        total = sum(math.exp(number) for number in h)
        assert answer == pytest.approx([math.exp(number) / total for number in h], rel=1e-5)


# ---- transform -------------------------------------------------------------------------------------------------------


def transformed(kind, images, account="default", secret=7):
    return ask(victim_with("transform", secret, transform=kind), images, account=account)


def test_orthogonal_maps_keep_distances_and_norms(images):
    h = represent(images).double()
    for account in ("a", "b"):
        answers = transformed("orthogonal", images, account).double()
        torch.testing.assert_close(torch.cdist(answers, answers), torch.cdist(h, h), rtol=0, atol=1e-4)
        torch.testing.assert_close(answers.norm(dim=1), h.norm(dim=1), rtol=0, atol=1e-5)
        turn = torch.linalg.lstsq(h, answers).solution
        torch.testing.assert_close(turn @ turn.T, torch.eye(DIM).double(), rtol=0, atol=1e-4)


def test_orthogonal_maps_turn_no_direction_more_often_than_another(images):
    # Uniform over the group: a unit vector's image has mean 0 and variance 1 / D in each number, over accounts.
    victim = victim_with("transform")
    h = represent(images[:1])
    turned = torch.cat([victim.query(images[:1], f"account {i}") for i in range(400)]) / h.norm() * DIM**0.5
    assert (turned.mean(dim=0).abs() < 4.5 / 400**0.5).all()
    assert abs(turned.mean()) < 4 / turned.numel() ** 0.5
    torch.testing.assert_close(turned.var(dim=0), torch.ones(DIM), rtol=0, atol=4.5 * (2 / 400) ** 0.5)


def test_shuffles_give_the_same_numbers_in_another_order(images):
    h, answers = represent(images), transformed("shuffle", images)
    order = [[i for i in range(DIM) if torch.allclose(answers[:, j], h[:, i])] for j in range(DIM)]
    assert all(len(sources) == 1 for sources in order)
    assert sorted(sources[0] for sources in order) == list(range(DIM))
    assert [sources[0] for sources in order] != list(range(DIM))


def fits(h, answers):
    """For each column of the answers, the column of h that it is an affine function of, the factor and the offset."""
    found = []
    for column in answers.T:
        design = torch.stack([h, torch.ones_like(h)], dim=2).transpose(0, 1)  # (D, B, 2)
        solution = torch.linalg.lstsq(design, column[None, :, None].expand(len(design), -1, -1)).solution
        errors = (design @ solution - column[None, :, None]).abs().amax(dim=(1, 2))
        source = errors.argmin().item()
        assert errors[source] < 1e-4
        found.append((source, *solution[source, :, 0].tolist()))
    return found


def test_affine_stretches_and_shifts_each_dimension_where_it_is(images):
    found = fits(represent(images), transformed("affine", images))
    assert [source for source, _, _ in found] == list(range(DIM))
    scales, shifts = ([one[i] for one in found] for i in (1, 2))
    for values in (scales, shifts):
        assert -1 <= min(values) < -0.3
        assert 0.3 < max(values) <= 1


def test_mild_scale_shuffle_stretches_and_shifts_each_dimension_and_shuffles(images):
    found = fits(represent(images), transformed("mild-scale-shuffle", images))
    sources = [source for source, _, _ in found]
    assert sorted(sources) == list(range(DIM)) != sources
    assert all(0.5 <= scale <= 2 and -1 <= shift <= 1 for _, scale, shift in found)
    assert max(scale for _, scale, _ in found) - min(scale for _, scale, _ in found) > 0.5


@pytest.mark.parametrize(
    ("kind", "constants"), [("pad", DIM), ("add", DIM), ("affine-pad-shuffle", DIM), ("quarter-pad-shuffle", DIM // 4)]
)
def test_padding_adds_constants(kind, constants, images):
    """As many as B4B adds, from N(0, 1); where they stand, and whether the answer's own numbers keep their order."""
    victim, h = victim_with("transform", transform=kind), represent(images)
    answers = torch.cat([victim.query(part) for part in images.split(20)])
    constant = (answers == answers[0]).all(dim=0)
    assert victim.dim == answers.shape[1] == DIM + constants
    assert constant.sum() == constants
    if kind == "quarter-pad-shuffle":
        assert ((answers[0, constant] >= 0) & (answers[0, constant] <= 1)).all()
    else:
        many = torch.cat([victim.query(images[:2], f"{i}") for i in range(60)], dim=1)
        drawn = many[0, (many == many[0]).all(dim=0)]
        assert len(drawn) == 60 * DIM
        assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    places = constant.nonzero()[:, 0].tolist()
    assert places not in (list(range(DIM, DIM + constants)), list(range(constants)))
    if kind == "affine-pad-shuffle":
        found = fits(h, answers[:, ~constant])
        assert sorted(source for source, _, _ in found) == list(range(DIM)) != [source for source, _, _ in found]
        assert all(-1 <= scale <= 1 and -1 <= shift <= 1 for _, scale, shift in found)
        return
    torch.testing.assert_close(answers[:, ~constant].sort(dim=1).values, h.sort(dim=1).values)
    assert torch.allclose(answers[:, ~constant], h) == (kind == "add")


def test_wets_map_is_circulant_and_makes_each_number_a_mean(images):
    """The matrix by its definition: row i is the first row, shifted by i."""
    transform = Transform(secret=7, transform="wet")
    for dim in (DIM, 64):
        matrix = transform.map_of("default", dim)(torch.eye(dim)).T
        first = matrix[0].tolist()
        expected = [[first[(j - i) % dim] for j in range(dim)] for i in range(dim)]
        torch.testing.assert_close(matrix, torch.tensor(expected))
        assert matrix.sum(dim=1).tolist() == pytest.approx([1] * dim)
        assert min(first) == 0 or dim < 25
        assert sum(number > 0 for number in first) == min(dim, 25)
        assert np.linalg.matrix_rank(matrix.numpy()) == dim
    h, matrix = represent(images), transform.map_of("default", DIM)(torch.eye(DIM)).T
    torch.testing.assert_close(transformed("wet", images), torch.stack([matrix @ row for row in h]))


@pytest.mark.parametrize("kind", AFFINE)
def test_what_an_account_was_given_is_undone_by_its_map_alone(kind, images):
    h, transform = represent(images), Transform(secret=7, transform=kind)
    answers = transformed(kind, images, "a")
    torch.testing.assert_close(transform.inverse("a", DIM)(answers), h, rtol=1e-3, atol=1e-2)
    assert (transform.inverse("b", DIM)(answers) - h).abs().max() > 0.5
    dense = transform.map_of("a", DIM)
    shift = dense(torch.zeros(1, DIM)).double()
    matrix = dense(torch.eye(DIM)).double() - shift
    other = torch.randn(5, transform.width(DIM), generator=torch.Generator().manual_seed(0))
    expected = (other.double() - shift) @ torch.linalg.pinv(matrix)
    torch.testing.assert_close(transform.inverse("a", DIM)(other).double(), expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_affine_is_not_undone():
    for kind in set(KINDS) - set(AFFINE):
        with pytest.raises(UserError, match=f"--transform {kind} cannot be undone: choose from orthogonal, "):
            Transform(transform=kind).inverse("default", DIM)


def test_binary_answers_say_on_which_sides_of_planes_through_random_points():
    """Along a line each number changes at most once; the planes lie around the points of N(0, 1), not the origin."""
    victim = victim_with("transform", transform="binary")
    assert victim.dim == 2 * DIM
    steps = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 4)
    answers = victim.query(steps.contiguous())
    assert set(answers.unique().tolist()) == {0.0, 1.0}
    changes = answers.diff(dim=0).abs().sum(dim=0)
    assert changes.max() == 1
    # (h - p) n = 0 where h = t (1, ..., 1): t = p n / 1 n, a Cauchy variable for normal p and n; |t| <= 2 are asked.
    several = torch.cat([victim.query(steps.contiguous(), f"{i}") for i in range(40)], dim=1)
    crossed = several.diff(dim=0).abs().sum(dim=0).double().mean().item()
    assert crossed == pytest.approx(mean_share(), abs=4 * (0.25 / several.shape[1]) ** 0.5)
    opposite = victim.query(255 - steps)
    assert not torch.equal(opposite, 1 - answers)  # as it would be for planes through the origin


def mean_share():
    """How often a random plane through a point from N(0, 1)^D crosses the segment from (-2, ..., -2) to (2, ..., 2)."""
    # p n given n is N(0, |n|^2), and 1 n given |n| is |n| cos of the angle to (1, ..., 1) times the root of D.
    draws = np.random.default_rng(0)
    normals, points = draws.standard_normal((2, 20000, DIM))
    return float((np.abs((normals * points).sum(axis=1)) < 2 * np.abs(normals.sum(axis=1))).mean())


def test_binary_origin_answers_say_on_which_sides_of_hyperplanes(images):
    images = random_images(20)
    h = represent(images)
    answers = torch.cat([transformed("binary-origin", images, secret=secret) for secret in range(40)], dim=1)
    assert set(answers.unique().tolist()) == {0.0, 1.0}
    opposite = torch.cat([transformed("binary-origin", 255 - images, secret=secret) for secret in range(40)], dim=1)
    assert torch.equal(opposite, 1 - answers)
    angle = torch.nn.functional.cosine_similarity(h[:, None], h[None], dim=2).clamp(-1, 1).acos() / math.pi
    differ = (answers[:, None] != answers[None]).float().mean(dim=2)  # Goemans & Williamson: its mean is angle / pi
    assert (differ - angle).abs().max() < 4.5 * 0.5 / (40 * DIM) ** 0.5


# ---- buckets ---------------------------------------------------------------------------------------------------------


def slow_coverage(rows, normals):
    """Percent of the buckets that are occupied after each row."""
    occupied, percent = set(), []
    for row in rows.tolist():
        occupied.add(tuple(sum(a * b for a, b in zip(row, normal, strict=True)) > 0 for normal in normals.tolist()))
        percent.append(100 * len(occupied) / 2 ** len(normals))
    return percent


@pytest.mark.parametrize("bits", [1, 4, 9])
@pytest.mark.parametrize("size", [1, 5, 48])
def test_coverage_counts_occupied_buckets(images, bits, size):
    draws = torch.Generator().manual_seed(bits)
    normals, rows = torch.randn(bits, DIM, generator=draws), represent(images)
    coverage = Coverage(Hyperplanes(normals))
    found = torch.cat([coverage.add(part) for part in rows.split(size)])
    assert found.tolist() == pytest.approx(slow_coverage(rows, normals))
    assert coverage.percent == pytest.approx(found[-1].item())


@pytest.mark.parametrize(("lam", "alpha", "beta"), [(1e-6, 0.8, 80.0), (1e-7, 1.0, 80.0), (0.01, 5.0, 10.0)])
def test_sigma_of_coverage(lam, alpha, beta):
    defence = Buckets(bucket_lambda=lam, bucket_alpha=alpha, bucket_beta=beta)
    coverage = [0.0, 0.1, 1.0, 5.0, 25.0, beta, 100.0]
    expected = [min(lam * (math.exp(math.log(alpha / lam) * o / beta) - 1), 1e6) for o in coverage]
    assert defence.sigma(torch.tensor(coverage)).tolist() == pytest.approx(expected, rel=1e-4)
    assert defence.sigma(torch.tensor([0.0, beta])).tolist() == pytest.approx([0, alpha - lam], rel=1e-4)


def test_noise_of_buckets_grows_with_an_accounts_coverage():
    images = random_images(600)
    victim = victim_with("buckets", bucket_bits=8)
    defence = victim.defences[0]
    assert defence.coverage("a") == 0
    noise = (ask(victim, images, 64, "a") - represent(images)).double()
    percent = slow_coverage(represent(images), defence._cells.normals)
    assert defence.coverage("a") == pytest.approx(percent[-1])
    sigma = torch.tensor([1e-6 * (math.exp(math.log(5 / 1e-6) * o / 30) - 1) for o in percent], dtype=torch.double)
    sigma = sigma.clamp_max(1e6)
    assert sigma[-1] > 1e3 * sigma[0]
    z = (noise / sigma[:, None])[sigma > 1e-3]  # above what float32 loses
    assert abs(z.mean()) < 4 / z.numel() ** 0.5
    assert abs(z.std() - 1) < 4 / (2 * z.numel()) ** 0.5
    assert (z.square().mean(dim=1) - 1).abs().max() < 5 * (2 / DIM) ** 0.5  # in each answer, not only in the mean
    # An account that asks the same again stays where it was.
    repeated = ask(victim, images[:1].repeat(50, 1, 1, 1), account="b") - represent(images[:1])
    assert defence.coverage("b") == pytest.approx(100 / 256)
    assert repeated.abs().max() < 1e-5
    assert defence.coverage("a") == pytest.approx(percent[-1])


def test_expected_coverage_is_that_of_balls_in_bins():
    """1 - (1 - 1/K)^N, against the sum over cells and against balls thrown; 4,000 queries: 62 % of 4,096 buckets."""
    assert even_coverage(4000, 4096) == pytest.approx(62.34, abs=0.01)
    assert even_coverage(50_000, 4096) == pytest.approx(100, abs=0.01)
    draws = torch.Generator().manual_seed(0)
    thrown = [torch.randint(0, 256, (300,), generator=draws).unique().numel() / 2.56 for _ in range(200)]
    assert even_coverage(300, 256) == pytest.approx(sum(thrown) / 200, abs=0.5)
    assert even_coverage(0, 8) == 0
    assert (even_coverage(0, 1), even_coverage(3, 1)) == (0, 100)
    for percent in (5.0, 62.34, 80.0):
        assert even_coverage(queries_for(percent, 4096), 4096) == pytest.approx(percent)
    assert queries_for(100, 4096) == math.inf


def test_buckets_say_what_a_budget_can_reach():
    """Where its noise can act: at 4,000 queries sigma is 0.04 at most, at 1,000 it is nothing."""
    defence = Buckets()
    words = defence.outlook(4000)
    sigma = 1e-6 * (math.exp(math.log(0.8 / 1e-6) * 62.3415 / 80) - 1)
    assert "an account with 4,000 queries occupies 62.3 % of 4,096 buckets if all are equally likely" in words
    assert f"sigma {sigma:.3g} at most (alpha 0.8 at 80 % takes 6,592 queries)" in words
    assert "alpha 0.8 at 100 % is never reached" in Buckets(bucket_beta=100.0).outlook(4000)
    assert "sigma 3.87e-05" in Buckets().outlook(1000)
    assert "far above alpha" not in words
    # 4,000 queries are far beyond 4 % of the buckets, 170 just beyond.
    assert "takes 168 queries), far above alpha: " in Buckets(bucket_beta=4.0).outlook(4000)
    assert "far above" not in Buckets(bucket_beta=4.0).outlook(170)
    report = defence.report({"a": torch.arange(30), "b": torch.arange(4000)})
    assert report["even_coverage"] == pytest.approx(62.34, abs=0.01)
    assert report["even_sigma"] == pytest.approx(sigma, rel=1e-3)


def test_centred_hyperplanes_go_through_the_mean_of_the_owners_images():
    """Representations far from the origin, as after a ReLU: through the origin nearly all fall into a few buckets."""
    rows = torch.randn(4000, DIM, generator=torch.Generator().manual_seed(0)) + 4
    normals = torch.randn(8, DIM, generator=torch.Generator().manual_seed(1))
    centre = rows.mean(dim=0)
    found = Hyperplanes(normals, centre)(rows)
    assert torch.equal(found, Hyperplanes(normals)(rows - centre))
    origin, centred = (Coverage(cells).add(rows)[-1] for cells in (Hyperplanes(normals), Hyperplanes(normals, centre)))
    assert origin < 50 < 95 < centred
    defence = Buckets(bucket_bits=8, bucket_cells="centred")
    assert defence.owner_images > 1000
    defence.prepare(rows)
    torch.testing.assert_close(defence._cells.centre, centre)


def test_kmeans_cells_are_those_of_the_nearest_centroid():
    draws = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(8, DIM, generator=draws)
    rows = centres.repeat_interleave(50, 0) + 0.5 * torch.randn(400, DIM, generator=draws)
    cells = Centroids.fit(rows, 8)
    nearest = [min(range(8), key=lambda k: math.dist(row, cells.centroids[k].tolist())) for row in rows.tolist()]
    assert cells(rows).tolist() == nearest
    assert cells.count == 8
    distance = (rows - cells.centroids[cells(rows)]).norm(dim=1).mean()
    assert distance < 0.6 * torch.cdist(rows, rows[torch.randperm(400, generator=draws)[:8]]).amin(dim=1).mean()
    coverage = Coverage(cells)
    assert coverage.add(rows[:120]).tolist()[-1] == pytest.approx(100 * len(set(nearest[:120])) / 8)
    with pytest.raises(UserError, match="8 centroids, and the owner has 5 images: lower --bucket-bits to 2"):
        Centroids.fit(rows[:5], 8)


@pytest.mark.parametrize("cells", ["centred", "kmeans"])
def test_cells_of_the_owners_images_are_made_before_the_first_query(cells, images):
    victim = Victim(SimCLREncoder(Pixels(), "pixels"), defences=[Buckets(bucket_bits=4, bucket_cells=cells)])
    with pytest.raises(UserError, match=f"--bucket-cells {cells} are made from the owner's images"):
        victim.query(images[:2])
    victim.prepare(random_images(100, seed=9))
    victim.query(images)
    defence = victim.defences[0]
    expected = Coverage(defence._cells).add(represent(images))[-1].item()
    assert defence.coverage() == pytest.approx(expected)
    assert expected > 100 / 16


# ---- near-copies -----------------------------------------------------------------------------------------------------


def slow_hash(image, thresholds):
    """The lowest frequencies of an image (3, 32, 32) against thresholds, by the definition of the cosine transform."""
    grey = image.double().sum(dim=0)
    small = [[16 * grey[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean().item() for j in range(8)] for i in range(8)]
    found = []
    for u in range(5):
        for v in range(5):
            waves = [[math.cos(math.pi * k * (2 * i + 1) / 16) for i in range(8)] for k in (u, v)]
            found.append(sum(small[i][j] * waves[0][i] * waves[1][j] for i in range(8) for j in range(8)))
    return [value > threshold for value, threshold in zip(found[:24], thresholds, strict=True)]


@pytest.mark.parametrize("secret", [None, 5])
def test_perceptual_hashes_compare_the_lowest_frequencies_with_thresholds(secret):
    images = load_dataset("shapes", split="test")[0][:6]
    hashes, thresholds = perceptual_hashes(images, secret), digests._thresholds(secret).tolist()
    assert all(500 <= abs(threshold) <= 2001 for threshold in thresholds[1:])
    assert 0.25 <= thresholds[0] / (64 * 16 * 765) <= 0.75
    assert not any(threshold.is_integer() for threshold in thresholds)
    assert thresholds != digests._thresholds(6).tolist()
    assert (hashes.dtype, hashes.shape) == (torch.uint8, (6, 3))
    bits = [[bool(byte >> place & 1) for byte in row for place in range(8)] for row in hashes.tolist()]
    assert bits == [slow_hash(image, thresholds) for image in images]
    for other in (images.float() / 255, images.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(perceptual_hashes(other, secret), hashes)
    assert torch.equal(torch.cat([perceptual_hashes(image[None], secret) for image in images]), hashes)
    black, white = perceptual_hashes(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 2, 4))
    assert black.tolist() != white.tolist()  # by their mean


def test_noise_is_keyed_by_the_secrets_thresholds_and_near_copies_are_counted_by_public_ones():
    class Keyed(Noise):
        remembers = True  # so that a replay answers too
        keys = ()

        def __call__(self, answers, call):
            self.keys = call.hashes
            return answers

    images = load_dataset("shapes", split="test")[0][:300].float().mean(dim=(2, 3), keepdim=True).byte()
    images = torch.cat([images.expand(-1, 3, 2, 4), random_images(100)])
    defence, public = Keyed(secret=11), perceptual_hashes(images)
    victim = Victim(SimCLREncoder(Pixels(), "pixels"), defences=[defence])
    victim.query(images)
    expected = digests.unpack_digests(perceptual_hashes(images, 11), digests.HASH_BYTES)
    assert defence.keys == expected != digests.unpack_digests(public, digests.HASH_BYTES)
    assert victim.ledger.near_distinct == len(public.unique(dim=0))
    defence.keys = ()
    victim.replay(digests.digest_tensor(images), images=images)
    assert defence.keys == expected


def mirrored(images):
    half = images[..., :16]
    return torch.cat([half, half.flip(3)], dim=3)


def mirrored_twice(images):
    half = mirrored(images)[:, :, :16]
    return torch.cat([half, half.flip(2)], dim=2)


def constant(images):
    return images.float().mean(dim=(1, 2, 3), keepdim=True).byte().expand_as(images)


@pytest.mark.parametrize("made", [mirrored, mirrored_twice, constant])
def test_near_copies_of_images_with_symmetries_share_a_hash_too(made):
    """Half of their frequencies or more are exactly 0."""
    images = made(load_dataset("shapes", split="test")[0][:500])
    hashes = perceptual_hashes(images, 5)
    for place in ((0, 0, 0), (1, 9, 20), (2, 31, 14)):
        one_pixel = images.clone()
        one_pixel[:, *place] ^= 1
        assert (perceptual_hashes(one_pixel, 5) == hashes).all(dim=1).float().mean() > 0.99
    near = perceptual_hashes(jitter(images, 8, number=1), 5)
    assert (near == hashes).all(dim=1).float().mean() > 0.5


def test_near_copies_share_a_hash_and_different_images_do_not():
    images = load_dataset("shapes", split="test")[0]
    hashes = perceptual_hashes(images)
    one_pixel = images.clone()
    one_pixel[:, 1, 9, 20] ^= 1
    kept = {0: (perceptual_hashes(one_pixel) == hashes).all(dim=1).float().mean().item()}
    for levels in (1, 8):
        near = perceptual_hashes(jitter(images[:500], levels, number=1))
        kept[levels] = (near == hashes[:500]).all(dim=1).float().mean().item()
    assert kept[0] > 0.99
    assert 0.9 < kept[1] <= 1
    assert 0.5 < kept[8] < kept[1]  # who changes more crosses more boundaries
    assert len(hashes.unique(dim=0)) > 0.9 * len(images)
