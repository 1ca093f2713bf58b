"""The detector: statistics by slow formulas, streams of which one is more suspect, and the command that judges it."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import detect
from attacks import Attack
from attacks.adaptive import ask_as_sybils, ask_within
from attacks.client import CPU, Client
from data_aug.datasets import load_dataset
from data_aug.images import Stored
from defenses.buckets import Hyperplanes
from defenses.detection import SCORES, Detection, non_normality, scores_of, similarity
from defenses.nearest import BLOCK, Memory, nearest_distances
from defenses.prada import growing_set_distances, prada
from evaluation import represent, streams, watching
from evaluation.statistics import auc_interval
from files.writing import save_checkpoint
from models import build_encoder
from utils import Precision, UserError, generator, seeded
from victim import Victim, digest_tensor, image_digests

DIM = 16


def vectors(count, seed=0, dim=DIM):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def slow_nearest(rows, size):
    distances = [math.inf]
    for i in range(1, len(rows)):
        earlier = [1 - F.cosine_similarity(rows[i].double(), row.double(), dim=0).item() for row in rows[:i][-size:]]
        distances.append(min(earlier))
    return torch.tensor(distances)


# ---- nearest distances -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_nearest_distances_are_those_of_the_slow_formula(size):
    rows = vectors(60)
    rows[30:40] = 3 * rows[20:30] + 0.01 * vectors(10, seed=1)  # its length means nothing
    torch.testing.assert_close(nearest_distances(rows, size), slow_nearest(rows, size), rtol=1e-4, atol=1e-6)


def test_a_repeated_vector_is_at_distance_zero_while_it_is_remembered():
    rows = vectors(50)
    assert torch.equal(nearest_distances(rows.repeat(2, 1), 50)[50:], torch.zeros(50))
    assert (nearest_distances(rows.repeat(2, 1), 49)[50:] > 0.1).all()


def test_distances_do_not_depend_on_how_the_stream_is_cut():
    rows = vectors(BLOCK + 90)
    rows[BLOCK + 10 :] = rows[:80]  # crosses the block of one call
    whole = nearest_distances(rows, BLOCK + 10)
    assert torch.equal(whole[BLOCK + 10 :], torch.zeros(80))
    for cut in (1, 37, BLOCK):
        memory = Memory(BLOCK + 10)
        parts = torch.cat([memory.nearest(part) for part in rows.split(cut)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_nothing_asked_is_nothing_remembered():
    memory = Memory(5)
    assert memory.nearest(vectors(0)).shape == (0,)
    assert memory.nearest(vectors(1)).tolist() == [math.inf]


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_similarity_is_one_less_the_mean_distance():
    assert similarity(torch.tensor([0.0, 0.5, 0.1])) == pytest.approx(0.8)
    assert similarity(torch.empty(0)) == 0


def test_non_normality_is_that_of_scipy_without_the_outliers():
    distances = vectors(300, dim=1)[:, 0].abs()
    distances[17] = 40.0
    kept = distances[torch.arange(300) != 17].double()
    mean, deviation = distances.double().mean(), distances.double().std(correction=0)
    assert ((kept - mean).abs() <= 3 * deviation).all()
    assert abs(distances[17] - mean) > 3 * deviation
    assert non_normality(distances) == pytest.approx(1 - stats.shapiro(kept.numpy()).statistic)
    assert non_normality(distances) < 1 - stats.shapiro(distances.double().numpy()).statistic


def test_non_normality_by_the_definition_of_w_for_three():
    a, b, c = 0.1, 0.4, 0.5  # for three values the weights are -1, 0, 1 over the root of 2
    mean = (a + b + c) / 3
    w = (c - a) ** 2 / 2 / ((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2)
    assert non_normality(torch.tensor([b, c, a])) == pytest.approx(1 - w, abs=1e-6)


def test_non_normality_where_w_means_nothing():
    assert non_normality(torch.tensor([0.1, 0.7])) == 0
    assert non_normality(torch.full((20,), 0.3)) == 1


def test_non_normality_of_long_streams_warns_of_nothing(recwarn):
    assert non_normality(vectors(6000, dim=1)[:, 0]) < 0.01
    assert not recwarn.list


def test_coverage_counts_the_buckets_met():
    rows = vectors(40)
    normals = Hyperplanes.draw(5, DIM, generator(3, "detection")).normals
    met = {tuple(float(normal @ row) > 0 for normal in normals) for row in rows}
    assert 1 < len(met) < 32
    assert scores_of(rows, bits=5, secret=3)["coverage"] == pytest.approx(100 * len(met) / 32)


# ---- PRADA -----------------------------------------------------------------------------------------------------------


def slow_prada(rows, classes):
    """The distances by the paper's algorithm, in plain lists, and the lowest W over the stream."""
    sets, joined, threshold, distances, lowest = {}, {}, {}, [], 1.0
    for x, c in zip(rows.tolist(), classes.tolist(), strict=True):
        if c not in sets:
            sets[c], joined[c], threshold[c] = [x], [0.0], 0.0
            continue
        d = min(math.dist(x, y) for y in sets[c])
        distances.append(d)
        if d > threshold[c]:
            sets[c].append(x)
            joined[c].append(d)
            mean = sum(joined[c]) / len(joined[c])
            deviation = math.sqrt(sum((value - mean) ** 2 for value in joined[c]) / len(joined[c]))
            threshold[c] = max(threshold[c], mean - deviation)
        if len(distances) > 100:
            mean = sum(distances) / len(distances)
            deviation = math.sqrt(sum((value - mean) ** 2 for value in distances) / len(distances))
            kept = [value for value in distances if abs(value - mean) <= 3 * deviation]
            lowest = min(lowest, stats.shapiro(kept).statistic)
    return distances, lowest


def pixels(count, seed=0):
    return torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [103, 104, 140])
def test_prada_is_that_of_its_paper(length):
    images, classes = pixels(length), torch.arange(length) % 3
    images[90:] = images[40 : length - 50] // 2  # some are nearer than others, and their class another
    distances, lowest = slow_prada(images.flatten(1) / 255, classes)
    assert len(distances) == length - 3
    assert growing_set_distances(images.flatten(1) / 255, classes) == pytest.approx(distances, abs=1e-6)
    found = prada(images, classes)
    assert found is None if length == 103 else found == pytest.approx(1 - lowest, abs=1e-6)


def test_prada_sees_only_queries_of_the_same_class_and_of_its_growing_set():
    rows = torch.tensor([0.0, 10, 1, 10, 11, 4.0, 4.5])[:, None]
    classes = torch.tensor([0, 1, 0, 0, 1, 0, 0])
    # All of class 0 join: its threshold stays 0, since their mean less their deviation is never above.
    assert growing_set_distances(rows, classes).tolist() == pytest.approx([1, 9, 1, 3, 0.5])


def test_prada_says_nothing_of_few_queries_and_flags_an_attacker_who_repeats():
    images = pixels(300)
    classes = torch.arange(300) % 2
    assert prada(images[:102], classes[:102]) is None
    assert prada(images[:103], classes[:103]) > 0
    repeated = prada(images[:150].repeat(2, 1, 1, 1), classes[:150].repeat(2))
    assert prada(images, classes) < 0.1 < repeated


# ---- which streams look more like an attack --------------------------------------------------------------------------


def fresh():
    return vectors(400, dim=64)


def views():
    centres = vectors(200, dim=64)
    return torch.cat([centres + 0.3 * vectors(200, seed, 64) for seed in (1, 2)])


def narrow():
    return vectors(1, dim=64) + 0.3 * vectors(400, seed=5, dim=64)


STREAMS = {"fresh": fresh, "views": views, "repeat": lambda: fresh()[:200].repeat(2, 1), "narrow": narrow}


@pytest.mark.parametrize(
    ("name", "more", "less"),
    [
        ("nearest", "repeat", "fresh"),
        ("nearest", "views", "fresh"),
        ("nearest", "repeat", "views"),
        ("nearest", "narrow", "fresh"),  # what it cannot do: a narrow task looks like an attack
        ("coverage", "fresh", "narrow"),
        ("coverage", "fresh", "repeat"),  # nor can this find one who repeats
        ("normality", "repeat", "fresh"),
        ("normality", "views", "fresh"),
    ],
)
def test_the_direction_of_each_score(name, more, less):
    assert scores_of(STREAMS[more]())[name] > scores_of(STREAMS[less]())[name] + 0.01


# ---- on the black box ------------------------------------------------------------------------------------------------


def asked(encoder, images, size, account="default"):
    """The answers to a stream, and the detector that watched it."""
    detector = Detection(secret=4)
    victim = Victim(encoder, defences=[detector])
    return torch.cat([victim.query(part, account) for part in images.split(size)]), detector


@pytest.fixture
def stream(images):
    return torch.cat([images, images[3:8]])


def test_answers_are_not_changed(encoder, stream):
    answers, detector = asked(encoder, stream, 17)
    assert torch.equal(answers, Victim(encoder).query(stream))
    assert detector.width(7) == 7
    assert detector.remembers


def test_scores_are_those_of_the_whole_stream_of_representations(encoder, stream):
    expected = scores_of(Victim(encoder).query(stream), secret=4)
    assert expected.keys() == SCORES.keys()
    assert asked(encoder, stream, 17)[1].scores() == pytest.approx(expected, abs=1e-5)
    for size in (1, 5):
        detector = asked(encoder, stream, size)[1]
        distances = detector.distances()
        assert distances.shape == (16,)
        # The encoder rounds batches of another size otherwise, which W of distances this small shows.
        assert distances[11:].max() < 1e-5 < distances[:11].min()
        for name in ("nearest", "coverage"):
            assert detector.scores()[name] == pytest.approx(expected[name], abs=1e-4)


def test_accounts_are_watched_apart(encoder, images):
    detector = Detection(secret=4)
    victim = Victim(encoder, defences=[detector])
    victim.query(images[:6], "a")
    victim.query(images, "b")
    victim.query(images[:6], "a")
    assert detector.scores("b") == pytest.approx(asked(encoder, images, 12)[1].scores(), abs=1e-3)
    assert detector.distances("a")[5:].max() < 1e-5 < detector.distances("b").min()
    assert detector.scores("nobody") == {}
    assert detector.distances("nobody").shape == (0,)
    assert detector.report({"nobody": torch.empty(0)}) == {}
    both = victim.report({"a": torch.arange(12), "b": torch.arange(12), "nobody": torch.empty(0)})
    assert both == {f"detection_{name}": max(detector.scores(one)[name] for one in "ab") for name in SCORES}


def test_what_an_earlier_process_answered_counts(encoder, stream):
    detector = Detection(secret=4)
    victim = Victim(encoder, defences=[detector])
    victim.replay(digest_tensor(stream[:12]), images=stream[:12])
    victim.query(stream[12:])
    assert detector.distances()[11:].max() < 1e-5


@pytest.mark.parametrize("setting", [{"detection_memory": 0}, {"detection_bits": 0}, {"detection_bits": 25}])
def test_bad_settings_are_refused(setting):
    with pytest.raises(UserError, match=r"--detection-(memory|bits) \d+ is not"):
        Detection(**setting)


# ---- the command -----------------------------------------------------------------------------------------------------

QUICK = ("--dataset", "shapes", "--streams", "4", "--stream-length", "30", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def owned(encoder, write_npz, tmp_path):
    path = tmp_path / "owned.pth.tar"
    state = {"arch": "resnet10w32", "state_dict": encoder.state_dict(), "epoch": 1}
    save_checkpoint({**state, "settings": {"dataset": f"npz:{write_npz(test=200)}"}}, path)
    return path


def shown(row, key, form):
    """A figure with its interval."""
    value, low, high = (f"{row[name]:{form}}" for name in (key, f"{key}_low", f"{key}_high"))
    return f"{value} [{low}, {high}]"


def test_the_command_prints_and_records_its_table(call, owned, write_npz, tmp_path):
    few = f"npz:{write_npz(test=200)}"
    arguments = (*QUICK, "--dataset", few, "--victim", owned, "--dataset-users", "svhn", "--repeat", "3")
    code, out, err = call(detect, *arguments)
    assert code == 0, err
    row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text())
    assert {"command", "commit", "torch", "device", "seed"} <= row.keys()
    assert (row["streams"], row["stream_length"], row["images"], row["repeat"]) == (4, 30, 200, 3)
    assert "users draw from 50% of each class" in row["parting"]
    assert row["parting"] in out
    assert "logistic regression on 64 labelled images of npz:" in out
    for users in ("task", "other"):
        for name in (*SCORES, "prada"):
            keys = [f"{users}_{attacker}_{name}" for attacker in streams.ATTACKERS]
            if name == "prada":  # which says nothing of 30 queries: no figure, and an empty cell
                assert not any(key.endswith("_prada") or key.startswith("flagged") for key in row)
                assert f"| {users} | prada |{'  |' * len(keys)}\n" in f"{out}\n"
                continue
            cells = [f"{shown(row, f'auc_{key}', '.3f')}, {shown(row, f'detected_{key}', '.0%')}" for key in keys]
            assert f"| {users} | {name} | {' | '.join(cells)} |" in out
    assert len(streams.ATTACKERS) == 5
    assert "| sybils | 16 |" in out  # four accounts for each of four attacks
    # Two of three queries are at distance 0: no encoder can hide that.
    assert row["auc_task_repeat_nearest"] == row["detected_task_repeat_nearest"] == 1
    assert "PRADA says nothing of streams of 100 distances or fewer" in out
    code, again, _ = call(detect, *arguments, "--resume")
    assert code == 0
    assert "has its results already" in again
    assert f"| other | normality | {cells[0]}" in again
    assert len((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()) == 1


def test_without_the_owners_labelled_images_there_is_no_prada(call, encoder, write_npz, tmp_path):
    settings = {"dataset": "npz:nowhere.npz"}
    state = {"arch": "resnet10w32", "state_dict": encoder.state_dict(), "epoch": 1, "settings": settings}
    save_checkpoint(state, tmp_path / "elsewhere.pth.tar")
    arguments = (*QUICK, "--dataset", f"npz:{write_npz(test=200)}", "--streams", "1")
    code, out, err = call(detect, *arguments, "--victim", tmp_path / "elsewhere.pth.tar")
    assert code == 0, err
    assert "without PRADA, which needs labelled images of the owner's: " in out
    assert "prada" not in out


def test_a_victim_of_unknown_data_has_no_classifier_of_its_owners(call, encoder, write_npz, tmp_path):
    """The attackers' data set may not stand in for the owner's."""
    path = tmp_path / "unknown.pth.tar"
    save_checkpoint({"arch": "resnet10w32", "state_dict": encoder.state_dict(), "epoch": 1}, path)
    code, out, err = call(detect, *QUICK, "--dataset", f"npz:{write_npz(test=200)}", "--streams", "1", "--victim", path)
    assert code == 0, err
    assert "without PRADA, which needs labelled images of the owner's: " in out
    assert "does not say what it was trained on" in out
    assert "prada" not in out


def test_refusals_are_one_line(refused, owned, tmp_path):
    victim = ("--victim", owned)
    assert "lower --stream-length 900" in refused(detect, *QUICK, *victim, "--stream-length", "900")
    assert "has 10 classes" in refused(detect, *QUICK, *victim, "--user-classes", "11")
    assert "--stream-length: '9' is not a whole number of at least 10" in refused(
        detect, *QUICK, *victim, "--stream-length", "9"
    )
    assert "--dataset-users shapes" in refused(detect, *QUICK, *victim, "--dataset-users", "shapes")
    assert "24 images" in refused(detect, *QUICK, *victim, "--dataset-users", "mnist")
    assert "--detection-bits: '30' is not" in refused(detect, *QUICK, *victim, "--detection-bits", "30")
    assert "--streams" in refused(detect, *QUICK, *victim, "--streams", "0")
    assert "nowhere" in refused(detect, *QUICK, "--victim", tmp_path / "nowhere")
    assert not (tmp_path / "checkpoints").exists()


def test_a_copy_is_not_taken_for_a_victim(refused, trained):
    assert "is a copy" in refused(detect, *QUICK, "--victim", trained)


# ---- its parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "share"), [(300, 0.5), (500, 0.75)])
def test_users_and_attackers_have_images_of_their_own_where_these_suffice(length, share):
    _, labels = load_dataset("shapes", split="test")
    attackers, users, words = streams.part_images(labels, length, 2, seed=0)
    assert set(attackers.tolist()).isdisjoint(users.tolist())
    assert len(attackers) + len(users) == 4000
    assert labels[users].bincount().tolist() == [int(400 * share)] * 10
    assert f"{share:.0%}" in words
    other, _, _ = streams.part_images(labels, length, 2, seed=1)
    assert not torch.equal(attackers.sort().values, other.sort().values)


def test_users_and_attackers_share_images_where_these_are_few():
    attackers, users, words = streams.part_images(torch.arange(40) % 4, 20, 2, seed=0)
    assert attackers.tolist() == users.tolist() == list(range(40))
    assert "same images" in words


@pytest.mark.parametrize(
    ("images", "length", "classes", "message"),
    [
        (40, 21, 2, "may have 20 images .* lower --stream-length 21, or raise --user-classes"),
        (8, 10, 2, "may have 4 images .* choose another --dataset, or raise --user-classes"),
        (40, 10, 5, "--user-classes 5: the test split has 4 classes, give that or less"),
    ],
)
def test_too_few_images_for_a_stream_are_a_line_that_helps(images, length, classes, message):
    with pytest.raises(UserError, match=message):
        streams.part_images(torch.arange(images) % 4, length, classes, seed=0)


def test_users_ask_about_different_images_of_few_classes():
    labels, chosen = torch.arange(90) % 9, torch.arange(0, 90, 2)
    tasks = set()
    for number in range(6):
        drawn = streams.draw_task(chosen, labels[chosen], 10, 2, generator(0, "task", number))
        assert len(set(drawn.tolist())) == 10
        assert set(drawn.tolist()) <= set(chosen.tolist())
        assert len(set(labels[drawn].tolist())) == 2
        tasks.add(tuple(sorted(set(labels[drawn].tolist()))))
    assert len(tasks) > 1


@pytest.fixture(scope="module")
def pool():
    """120 shapes as an untrained encoder sees them, and a victim that answers so."""
    with seeded(0):
        model = build_encoder("resnet10w32").eval()
    images = load_dataset("shapes", split="test")[0][:120]
    return model, streams.Sent(images, represent(model, images))


def test_attackers_send_what_their_names_say(pool):
    model, all_of_them = pool
    settings = streams.Streams(streams=2, stream_length=11, repeat=4, sybils=3)
    features = partial(streams.untrained_features, "resnet10w32", model.dim, Precision("fp32", CPU), 0)
    sent = [*streams.attackers_streams(settings, partial(represent, model), features, all_of_them, seed=0)]
    one = ["plain", "views", "repeat", "sybils", "sybils", "sybils", "few-buckets"]
    assert [kind for kind, _ in sent] == one * 2
    digests = {digest: index for index, digest in enumerate(image_digests(all_of_them.images))}
    for kind, stream in sent:
        found = [digests.get(digest) for digest in image_digests(stream.images)]
        torch.testing.assert_close(stream.representations, represent(model, stream.images), rtol=1e-3, atol=1e-4)
        assert len(found) == 11 if kind != "sybils" else len(found) in (3, 4, 5)
        if kind == "views":
            assert found.count(None) > 8
            continue
        assert None not in found
        assert len(set(found)) == (3 if kind == "repeat" else len(found))
        assert kind != "repeat" or found == (found[:3] * 4)[:11]
    assert not torch.equal(sent[0][1].images, sent[7][1].images)


def test_accounts_of_sybils_are_those_of_the_attack(pool):
    """Image by image and account by account what the attack asks with the same budget."""
    model, all_of_them = pool
    length, accounts = 60, 4
    attack = Attack(sybils=accounts, shared=3)
    asked = torch.randperm(120, generator=generator(0, "t"))[:length]
    found = streams.sybil_accounts(asked, accounts, length)
    client = Client(Victim(model))
    index = asked[: attack.images(length)]
    ask_as_sybils(client, Stored(all_of_them.images[index]), index, accounts, attack.shared)
    assert [stream.tolist() for stream in found] == [sources.tolist() for sources in client.sources.values()]
    assert sum(map(len, found)) == client.victim.ledger.queries == length


def test_few_buckets_are_chosen_as_the_attack_chooses(pool):
    model, all_of_them = pool
    features = torch.randn(120, 6, generator=generator(0, "features"))
    client = Client(Victim(model))
    expected, _, _ = ask_within(client, Stored(all_of_them.images), features, 40, 100.0, generator(0, "t"))
    found = streams.few_buckets(all_of_them, features, 40, generator(0, "t"))
    assert len(found) == 40
    assert torch.equal(found, expected)


def test_an_account_of_sybils_covers_less_than_one_attacker(pool):
    _, all_of_them = pool
    asked = torch.arange(100)
    whole = scores_of(all_of_them.at(asked).representations)["coverage"]
    for part in streams.sybil_accounts(asked, 4, 100):
        assert scores_of(all_of_them.at(part).representations)["coverage"] < whole


def test_prada_flags_the_streams_whose_w_is_below_delta():
    scores = {kind: {"nearest": [0.1, 0.2], "prada": [0.05, 0.15]} for kind in (*streams.ATTACKERS, "task")}
    figures = watching.stream_figures(scores, prada_delta=0.9)
    assert figures["flagged_plain"] == figures["flagged_task"] == 0.5
    low, high = stats.binomtest(1, 2).proportion_ci(method="exact")
    assert (figures["flagged_plain_low"], figures["flagged_plain_high"]) == pytest.approx((low, high), abs=1e-6)
    assert f"| plain | 2 | 0.15 | 0.1 | 50% [{low:.0%}, {high:.0%}] |" in watching.stream_table(scores, figures)


def test_curves_are_the_roc_of_each_statistic():
    scores = {kind: {"nearest": [3.0, 1.0], "prada": []} for kind in streams.ATTACKERS}
    scores["task"] = {"nearest": [2.0, 0.0], "prada": [0.1]}
    curves = watching.stream_curves(scores)
    assert curves.keys() == {f"task_{kind}_nearest" for kind in streams.ATTACKERS}
    assert curves["task_plain_nearest"] == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]


def test_figures_have_intervals_and_streams_without_a_score_are_left_out():
    users, attacks = [float(value) for value in range(40)], [30.5, 10.5, 60.5, 70.5]
    scores = {kind: {"nearest": attacks, "prada": [0.2, 0.3]} for kind in streams.ATTACKERS}
    scores["sybils"]["prada"] = []
    scores["task"] = {"nearest": users, "prada": [0.1]}
    figures = watching.stream_figures(scores, prada_delta=0.9)
    assert figures["auc_task_plain_nearest"] == pytest.approx((31 + 11 + 40 + 40) / 160)
    ends = [figures[f"auc_task_plain_nearest_{end}"] for end in ("low", "high")]
    assert ends == pytest.approx(auc_interval(attacks, users), abs=1e-6)
    low, high = stats.binomtest(2, 4).proportion_ci(method="exact")
    assert figures["detected_task_plain_nearest"] == 0.5  # 60.5 and 70.5 are above 37
    assert figures["detected_task_plain_nearest_low"] == pytest.approx(low, abs=1e-6)
    assert figures["detected_task_plain_nearest_high"] == pytest.approx(high, abs=1e-6)
    assert figures["auc_task_plain_prada"] == figures["flagged_plain"] == 1
    assert "auc_task_plain_prada_low" not in figures  # of a single user
    assert not any("sybils_prada" in name or "flagged_sybils" in name for name in figures)
    table = watching.stream_table(scores, figures)
    assert f"| sybils | 4 | {sum(attacks) / 4:.4g} |  |  |" in table
    assert "PRADA says nothing of streams of 100 distances or fewer" in table


def test_false_alarms_are_five_in_a_hundred_at_most():
    users = [float(value) for value in range(100)]
    assert watching.detected([94.0, 94.5, 95.0, 200.0], users) == 3  # five users exceed 94
    assert watching.detected([99.0, 99.5], users[-19:]) == 1  # of so few users none may
    assert watching.detected([1.0] * 4, [1.0] * 40) == 0
