"""Attackers who adapt, against the defences that they are meant for; the victim is trained on the embedded shapes."""

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.cluster import KMeans

import steal
from attacks import Attack
from attacks.adaptive import (
    align,
    ask_as_sybils,
    ask_within,
    denoise,
    disagreeing,
    project_out,
    replaced,
    restore,
    restore_answers,
)
from attacks.answers import Answers
from attacks.buy import buy
from attacks.client import Client, jitter
from data_aug.datasets import load_dataset
from data_aug.digests import perceptual_hashes
from data_aug.images import Stored
from defenses import DEFENCES
from defenses.mark import Mark
from evaluation import linear_cka, represent
from evaluation.answer_marks import cosines_by_words
from models import read_checkpoint
from tests.conftest import STEAL, made
from tests.networks import small_encoder, trainer
from utils import UserError, generator
from victim import Victim, image_digests

QUERIES = 600
INDEX = torch.arange(QUERIES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A victim of a second or two: 1,000 shapes, 2 epochs."""
    model = small_encoder(16, seed=0, dim=256)
    job = trainer(tmp_path_factory.mktemp("victim"), model, batch_size=50, lr=2e-3)
    job.train(Stored(load_dataset("shapes", split="train")[0][:1000]))
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return load_dataset("shapes", split="test")[0][:QUERIES]


@pytest.fixture(scope="module")
def clean(encoder, images):
    return represent(encoder, images)


@pytest.fixture
def draws():
    return generator(0, "test")


def client_of(encoder, name=None, repeat=1, **settings):
    """An attacker's way to a victim with this defence."""
    defences = [DEFENCES[name](**settings)] if name else []
    return Client(Victim(encoder, defences=defences), repeat=repeat)


def ask(client, images, account="default"):
    return client.ask(Stored(images), torch.arange(len(images)), account)


def error(answers, clean):
    return (answers - clean).square().mean().item()


# ---- asking again ----


def test_asking_again_averages_fresh_noise_away_and_is_paid_for(encoder, images, clean):
    errors = {}
    for repeat in (1, 8):
        client = client_of(encoder, "noise", repeat, mu=0.0, sigma=0.5)
        errors[repeat] = error(ask(client, images), clean)
        assert client.victim.ledger.queries == repeat * QUERIES
        assert client.victim.ledger.distinct == QUERIES
    assert errors[8] == pytest.approx(errors[1] / 8, rel=0.05)


def test_asking_again_gains_nothing_against_consistent_noise(encoder, images, clean):
    client = client_of(encoder, "noise", 8, mu=0.0, sigma=0.5, consistent_noise=True)
    assert error(ask(client, images), clean) == pytest.approx(0.25, rel=0.05)
    assert client.sources["default"].tolist() == list(range(QUERIES)) * 8


class Exact(Victim):
    """A victim whose consistent noise is keyed by the exact pixels."""

    def _answer(self, images, digests, hashes, account, gather):
        return super()._answer(images, digests, digests, account, gather)


@pytest.mark.parametrize(
    ("levels", "victim", "low", "high"),
    [
        (0, Victim, 0.98, 1.02),  # nothing is gained by asking the same again
        (1, Exact, 0.23, 0.28),  # one level, where noise follows from the exact pixels: 1 / 4 after 16 askings
        (1, Victim, 0.9, 1.0),  # near-copies mostly get the same noise
        (16, Victim, 0.5, 0.95),  # stronger changes cross more boundaries
    ],
)
def test_what_an_attacker_gains_who_asks_near_copies(levels, victim, low, high, encoder, images, clean):
    """Root mean square error after 16 askings of each image, in standard deviations of consistent noise."""
    defence = DEFENCES["noise"](mu=0.0, sigma=1.0, consistent_noise=True, secret=3)
    client = Client(victim(encoder, defences=[defence]), repeat=16, jitter=levels)
    answers = ask(client, images[:60])
    assert low < error(answers, clean[:60]) ** 0.5 < high
    ledger = client.victim.ledger
    assert ledger.queries == 960
    assert ledger.distinct == (960 if levels else 60)
    assert ledger.near_distinct <= min(400, ledger.distinct)


def test_jittered_images_are_made_again_and_stay_close(images):
    for levels in (1, 7):
        changed = jitter(images[:20], levels, number=2)
        assert torch.equal(torch.cat([jitter(part, levels, number=2) for part in images[:20].split(3)]), changed)
        difference = changed.int() - images[:20].int()
        assert difference.abs().max() == levels
        middle = (images[:20] >= levels) & (images[:20] <= 255 - levels)
        counts = difference[middle].add(levels).bincount(minlength=2 * levels + 1) / middle.sum()
        assert (counts - 1 / (2 * levels + 1)).abs().max() < 0.01
        assert not torch.equal(jitter(images[:20], levels, number=3), changed)


# ---- answers undone ----


@pytest.mark.parametrize(
    ("name", "settings", "gain"),
    [
        ("rounding", {"decimals": 0}, 2),
        ("topk", {"top_k": 64}, 3),
        ("topk", {"top_k": 128}, 1.3),
        ("noise", {"mu": 0.0, "sigma": 0.5}, 3),
        ("noise", {"mu": 5.0, "sigma": 0.5}, 100),
    ],
)
def test_restored_answers_are_closer_to_the_truth(name, settings, gain, encoder, images, clean):
    answers = ask(client_of(encoder, name, **settings), images)
    better, words = restore(answers)
    assert error(better, clean) < error(answers, clean) / gain
    assert name[:3] in words.replace("-", "")


def test_undefended_answers_are_left_alone(clean):
    answers, words = restore(clean)
    assert answers is clean
    assert "as they are" in words


def test_noise_is_measured_whatever_the_shape():
    """Pure noise on a matrix of rank 3, with more rows than columns and with fewer."""
    draws = torch.Generator().manual_seed(0)
    for rows, dim in ((1000, 64), (40, 256)):
        signal = torch.randn(rows, 3, generator=draws) @ torch.randn(3, dim, generator=draws)
        noisy = signal + 0.3 * torch.randn(rows, dim, generator=draws)
        better, sigma = denoise(noisy)
        assert sigma == pytest.approx(0.3, rel=0.05)
        assert error(better, signal) < 0.3 * error(noisy, signal)
        assert error(denoise(noisy, 0.3)[0], signal) == pytest.approx(error(better, signal), rel=0.2)


def test_replaced_answers_are_seen_by_their_magnitude():
    answers = torch.rand(20, 8) + 1
    assert not replaced(answers).any()
    answers[[3, 11]] = 1000 + torch.randn(2, 8)
    assert replaced(answers).nonzero().flatten().tolist() == [3, 11]
    assert not replaced(torch.zeros(5, 8)).any()


def test_images_keep_their_good_answers_and_those_without_one_go():
    rows = torch.rand(8, 4) + 1  # four images, two views
    rows[[1, 4, 5]] = 1000.0  # view 0 of image 1, view 1 of images 0 and 1
    rows[0, 0] = 0.0  # a ReLU's
    numbers = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    attack = Attack(n_views=2)
    bought = Answers(torch.tensor([10, 11, 12, 13]), Stored(numbers[8:]), Stored(numbers[:8]), rows, attack)
    left = restore_answers(bought)
    assert left.index.tolist() == [10, 12, 13]
    assert left.images.tensor[:, 0, 0, 0].tolist() == [8, 10, 11]
    assert left.sent.tensor[:, 0, 0, 0].tolist() == [0, 2, 3, 4, 6, 7]
    expected = rows[[0, 2, 3, 0, 6, 7]]  # image 0's second view takes the first one's answer
    torch.testing.assert_close(left.rows, expected)
    assert "3 of 8 answers were replaced, 1 images lost" in left.findings[0]
    assert left.attack is attack


def test_an_attacker_who_restores_beats_poisoning(encoder, images, clean):
    """What is left after throwing replaced answers away is the truth."""
    client = client_of(encoder, "poisoning", poison_threshold=0.99)
    left = buy(client, Stored(images), Attack(restore=True), QUERIES, generator(0, "t"))
    assert 0 < len(left) < QUERIES
    torch.testing.assert_close(left.rows, clean[left.index], rtol=1e-3, atol=1e-3)
    assert torch.equal(left.images.tensor, images[left.index])
    assert client.victim.ledger.queries == len(left.sources["default"]) == QUERIES


# ---- a mark removed ----


@pytest.fixture(scope="module")
def features(images):
    """What the attacker's own, untrained encoder makes of the images."""
    return represent(small_encoder(seed=1, dim=256), images)


def test_answers_are_flagged_that_are_like_others_of_their_cluster_whose_features_are_not(clean, features):
    answers, own = clean[:150].double(), features[:150].double()
    unit = F.normalize(answers, dim=1)
    labels = KMeans(20, n_init=1, random_state=0).fit_predict(unit.float().numpy()).tolist()
    pairs = [(i, j) for i in range(150) for j in range(i + 1, 150) if labels[i] == labels[j]]
    ranks = [
        stats.rankdata([torch.cosine_similarity(rows[i], rows[j], dim=0).item() for i, j in pairs])
        for rows in (answers, own)
    ]
    above = sorted(zip((ranks[0] - ranks[1]).tolist(), pairs, strict=True), reverse=True)
    assert above[2][0] > above[3][0]  # 0.025 pairs for each answer: 3
    expected = sorted({i for _, pair in above[:3] for i in pair})
    assert disagreeing(answers.float(), own.float()).tolist() == expected


def test_projected_answers_have_nothing_of_the_first_directions_and_keep_their_lengths(clean):
    flagged = torch.arange(0, 90, 3)
    left = project_out(clean, flagged, 4).double()
    unit = F.normalize(clean, dim=1).double()
    directions = torch.linalg.eigh(unit[flagged].T @ unit[flagged]).eigenvectors[:, -4:]  # not centred
    assert (left @ directions).abs().max() < 1e-4
    rest = unit.clone()
    for direction in directions.T:  # one by one, as published
        rest = F.normalize(rest - (rest @ direction)[:, None] * direction, dim=1)
    torch.testing.assert_close(left, rest * clean.double().norm(dim=1, keepdim=True), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("settings", "removed"), [({}, True), ({"mark_directions": 4}, False)])
def test_cse_removes_one_direction_and_not_several(settings, removed, encoder, images, features):
    """WARDEN's claim: several directions withstand it."""
    mark = Mark(secret=3, **settings)
    client = Client(Victim(encoder, defences=[mark]))
    own = lambda sent: features  # noqa: E731
    plain, left = (
        buy(client, Stored(images), Attack(restore=how), QUERIES, generator(0, "t"), own) for how in (False, "cse")
    )
    key, hashes = mark.key(256), perceptual_hashes(images, 3)
    before, after = (cosines_by_words(F.normalize(one.rows, dim=1), key, hashes)[0].mean() for one in (plain, left))
    assert before > 0.1
    assert (after < before / 3) == removed
    assert "of 600 answers are like others that the attacker's encoder finds different" in left.findings[-1]
    assert torch.equal(left.index, plain.index)


def test_cse_that_would_leave_nothing_is_refused_before_a_query(encoder, images):
    client = client_of(encoder)
    for components in (256, 300):
        with pytest.raises(
            UserError, match=f"--cse-components {components} of the 256 numbers of an answer leave nothing"
        ):
            buy(client, Stored(images), Attack(restore="cse", cse_components=components), QUERIES, generator(0, "t"))
    assert client.victim.ledger.queries == 0


# ---- several accounts ----


@pytest.mark.parametrize("kind", ["orthogonal", "affine", "pad", "add", "affine-pad-shuffle", "mild-scale-shuffle"])
def test_sybils_answers_are_aligned(kind, encoder, images, clean):
    """In one account's coordinates they say of the images what the victim does; without the map they don't."""
    client = client_of(encoder, "transform", transform=kind)
    answers, found = ask_as_sybils(client, Stored(images), INDEX, sybils=3, shared=150)
    assert client.victim.ledger.queries == QUERIES + 2 * 150
    assert list(client.victim.ledger.accounts) == ["sybil-1", "sybil-2", "sybil-3"]
    assert len(found) == 2
    other = client_of(encoder, "transform", transform=kind)
    mixed = torch.cat([ask(other, part, f"sybil-{i + 1}") for i, part in enumerate(images.chunk(3))])
    whole = ask(client_of(encoder, "transform", transform=kind), images, "sybil-1")
    assert linear_cka(answers, clean) > 0.9 > linear_cka(mixed, clean)
    assert error(answers, whole) < 0.1 * error(mixed, whole)


def test_sybils_each_stay_below_a_coverage_that_one_account_reaches(encoder, images):
    """Buckets' noise follows an account's own queries."""
    settings = {"bucket_bits": 8, "bucket_beta": 20.0}
    alone, several = (client_of(encoder, "buckets", **settings) for _ in range(2))
    ask(alone, images)
    ask_as_sybils(several, Stored(images), INDEX, sybils=6, shared=20)
    (one,), (many,) = alone.victim.defences, several.victim.defences
    assert max(many.coverage(f"sybil-{i + 1}") for i in range(6)) < one.coverage()


def test_sybils_share_their_first_queries(encoder, images):
    """Which image each query of an account was of: the shared ones first, then the account's part of the others."""
    client = client_of(encoder)
    sources = torch.arange(20).repeat(2)  # two views of each image
    ask_as_sybils(client, Stored(images[:20].repeat(2, 1, 1, 1)), sources, sybils=2, shared=6)
    assert client.sources["sybil-1"].tolist() == [*range(6), *sources[6:23].tolist()]
    assert client.sources["sybil-2"].tolist() == [*range(6), *sources[23:].tolist()]


def test_alignment_finds_an_affine_map_and_says_what_it_misses():
    draws = torch.Generator().manual_seed(0)
    ours = torch.randn(300, 12, generator=draws)
    theirs = ours @ torch.randn(12, 16, generator=draws) + 3
    mapped, unexplained = align(theirs[:100], ours[:100], theirs[100:])
    torch.testing.assert_close(mapped, ours[100:], rtol=1e-3, atol=1e-3)
    assert unexplained < 1e-4
    unrelated = torch.randn(300, 16, generator=draws)
    assert align(unrelated[:100], ours[:100], unrelated[100:])[1] > 0.8


# ---- few buckets ----


def test_an_attacker_who_avoids_buckets_gets_less_noise(encoder):
    """As many queries: a lower coverage in the owner's table and answers closer to the truth; means of three owners."""
    pool = load_dataset("shapes", split="test")[0][:2000]
    truth = represent(encoder, pool)
    features = represent(small_encoder(seed=1, dim=256), pool)
    coverage, errors = {"plain": 0.0, "careful": 0.0}, {"plain": 0.0, "careful": 0.0}
    for secret in range(3):
        for name in coverage:
            client = client_of(encoder, "buckets", secret=secret, bucket_beta=2.0)
            if name == "plain":
                index, answers = INDEX, ask(client, pool[:QUERIES])
            else:
                draws = generator(secret, "t")
                index, answers, _ = ask_within(client, Stored(pool), features, QUERIES, 100.0, draws)
            assert len(index.unique()) == len(index) == QUERIES
            coverage[name] += client.victim.defences[0].coverage() / 3
            errors[name] += error(answers, truth[index]) / 3
    assert coverage["careful"] < 0.9 * coverage["plain"]
    assert errors["careful"] < 0.9 * errors["plain"]


def test_it_stops_when_its_own_table_is_full_enough(encoder, images, draws):
    client = client_of(encoder)
    features = torch.rand(QUERIES, 5, generator=draws)
    index, answers, words = ask_within(client, Stored(images), features, 500, 0.5, draws)
    assert 50 <= len(index) < 500
    assert len(answers) == len(index) == client.victim.ledger.queries
    assert torch.equal(client.sources["default"], index)
    assert f"{len(index)} of 500 images queried" in words
    asked = {digest for account in client.victim.ledger.accounts.values() for digest in account.images}
    assert asked == set(image_digests(images[index]))


def test_what_a_choosy_attacker_bought_is_of_the_images_that_it_chose(encoder, images, clean, draws):
    """Position, pixels and answer of each belong together, and no more are asked than it may."""
    attack = Attack(max_coverage=100.0)
    bought = buy(client_of(encoder), Stored(images), attack, 90, draws, lambda images: clean)
    assert len(bought) == len(bought.rows) == len(bought.index.unique()) == 90
    assert torch.equal(bought.images.tensor, images[bought.index])
    assert bought.sent is bought.images
    torch.testing.assert_close(bought.rows, clean[bought.index], rtol=1e-4, atol=1e-5)
    assert sorted(bought.index.tolist()) != list(range(90))


# ---- through the script ----


def copy_of(out):
    return read_checkpoint(made(out))


@pytest.mark.parametrize(
    ("flags", "images", "queries"),
    [
        (("--repeat", "3"), 8, 24),
        (("--repeat", "2", "--n-views", "2"), 6, 24),
        (("--repeat", "3", "--jitter", "2"), 8, 24),
        (("--sybils", "3", "--shared", "4"), 16, 24),
        (("--sybils", "2", "--shared", "4", "--repeat", "2"), 8, 24),
        (("--max-coverage", "100"), 24, 24),
        (("--restore", "cse"), 24, 24),
        (("--restore", "cse", "--n-views", "2"), 12, 24),
    ],
)
def test_the_budget_covers_every_asking(flags, images, queries, call, trained):
    code, out, err = call(steal, *STEAL, "-b", "4", *flags)
    assert code == 0, err
    checkpoint = copy_of(out)
    assert sum(account["queries"] for account in checkpoint["ledger"].values()) == queries
    assert checkpoint["query_set"]["images"] == len(checkpoint["query_indices"]) == images
    assert len(checkpoint["query_digests"]) == images


def test_images_whose_answers_were_thrown_away_were_queried_all_the_same(call, trained):
    """They are in the copy's record, which an evaluation keeps its test images apart from."""
    line = ("--losstype", "mse", "-b", "1", "--restore", "--defence", "poisoning")
    code, out, err = call(steal, *STEAL, *line)
    assert code == 0, err
    assert "23 of 24 answers were replaced, 23 images lost" in out  # to this victim all images are alike
    checkpoint = copy_of(out)
    assert checkpoint["query_set"]["images"] == len(checkpoint["query_digests"]) == 24


def test_an_attack_that_chooses_is_resumed_with_the_same_choice(call, trained, tmp_path):
    """Its features are those of the untrained copy, whatever the copy has become."""
    line = (*STEAL, "-b", "4", "--max-coverage", "50", "--defence", "buckets", "--epochs", "2")
    code, out, err = call(steal, *line)
    assert code == 0, err
    whole = copy_of(out)
    code, out, err = call(steal, *line, "--resume")
    assert code == 0, err
    assert torch.equal(copy_of(out)["query_indices"], whole["query_indices"])


def test_an_attackers_own_encoder_is_what_cse_compares_with(call, trained, refused):
    line = (*STEAL, "-b", "4", "--defence", "mark", "--restore", "cse", "--cse-components", "1")
    answers = {}
    for own in ((), ("--query-space", trained)):
        code, out, err = call(steal, *line, *own)
        assert code == 0, err
        answers[own] = copy_of(out)["state_dict"]
    first, second = answers.values()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert "--query-space has no effect without" in refused(steal, *STEAL, "--restore", "--query-space", trained)


def test_what_cannot_be_asked_is_refused(refused, trained):
    assert "'csf' is neither True, False nor cse" in refused(steal, *STEAL, "--restore", "csf")
    assert "--cse-components has no effect without --restore cse" in refused(steal, *STEAL, "--cse-components", "9")
    assert "too few for 30 askings" in refused(steal, *STEAL, "--repeat", "30")
    assert "--shared 1 is too few" in refused(steal, *STEAL, "--sybils", "2", "--shared", "1")
    assert "60 shared queries" in refused(steal, *STEAL, "--sybils", "4", "--shared", "20")
    assert "--max-coverage chooses" in refused(steal, *STEAL, "--max-coverage", "5", "--n-views", "2")
    for flag in (("--max-coverage", "5"), ("--restore",)):
        assert "take all answers together" in refused(steal, *STEAL, *flag, "--recipe", "released")
    assert "takes 60 images, the train split of svhn has 48" in refused(
        steal, *STEAL, "--max-coverage", "5", "--num_queries", "60"
    )
    assert "--jitter has no effect without --repeat" in refused(steal, *STEAL, "--jitter", "2")
    assert "--shared has no effect without --sybils" in refused(steal, *STEAL, "--shared", "20")


def test_every_defence_is_met_by_every_way_of_asking(encoder, images):
    """Nothing of an adaptive attacker depends on which defence answers."""
    settings = {"truncate": {"dimensions": 40}}
    for name in DEFENCES:
        client = client_of(encoder, name, 2, **settings.get(name, {}))
        bought = buy(client, Stored(images[:40]), Attack(repeat=2), 40, generator(0, "t"))
        assert bought.rows.shape == (40, client.victim.dim)
        assert bought.sources["default"].tolist() == list(range(40)) * 2
