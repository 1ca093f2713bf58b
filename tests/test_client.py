"""The attacker's client: what it pays for, keeps, and reads back after a kill."""

import resource
import shutil
import signal

import numpy as np
import pytest
import torch

from attacks import Attack
from attacks.buy import buy
from attacks.client import Client
from attacks.records import Kept, QueryFile
from data_aug.images import Stored
from defenses import DEFENCES, Defence
from tests.test_victim import Times
from utils import UserError
from victim import BudgetExceeded, Victim, image_digests


class RememberingTimes(Times):
    remembers = True


class Signed(Defence):
    """Numbers far beyond float16, of both signs."""

    def __call__(self, answers, call):
        signs = 1 - 2 * (torch.arange(answers.shape[1]) % 2)
        return (answers + 1) * 1e5 * signs


LAYOUT = QueryFile(None, 256, np.float32).layout  # of an untrained small encoder's answers


def kept_in(path):
    """The records in a client's file."""
    return np.fromfile(path, LAYOUT)


def ask(client, images, account="default"):
    return client.ask(Stored(images), torch.arange(len(images)), account)


@pytest.mark.parametrize("repeat", [1, 3])
def test_a_client_that_asks_again_pays_again(repeat, encoder, images):
    """By itself, and for `repeat` askings of each image."""
    victim = Victim(encoder, budget=12 * repeat)
    Client(victim, repeat=repeat, batch_size=5).ask(Stored(images), torch.arange(12))
    assert (victim.ledger.queries, victim.ledger.distinct) == (12 * repeat, 12)
    with pytest.raises(BudgetExceeded):
        Client(victim).ask(Stored(images[:1]), torch.arange(1))
    with pytest.raises(BudgetExceeded):
        Client(Victim(encoder, budget=12 * repeat), repeat=repeat + 1).ask(Stored(images), torch.arange(12))


def test_a_clients_answers_are_in_the_order_of_asking(encoder, images, tmp_path):
    victim = Victim(encoder)
    client = Client(victim, tmp_path / "kept", batch_size=5)
    rows = torch.cat([ask(client, images[:7]), ask(client, images[7:], "b"), ask(client, images[:0])])
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, Victim(encoder).query(images))
    kept = kept_in(tmp_path / "kept")
    assert kept["answer"].tobytes() == rows.numpy().tobytes()
    assert kept["answered"].all()
    assert kept["call"].tolist() == [0] * 5 + [1] * 2 + [2] * 5
    assert kept["account"].tolist() == [b"default"] * 7 + [b"b"] * 5
    assert [bytes(digest) for digest in kept["digest"]] == image_digests(images)
    assert {name: account.queries for name, account in victim.ledger.accounts.items()} == {"default": 7, "b": 5}
    assert victim.ledger.calls == 3


def test_a_client_remembers_what_each_query_was_a_view_of(encoder, images):
    client = Client(Victim(encoder), repeat=2)
    client.ask(Stored(images[:4]), torch.tensor([5, 6, 5, 6]), "a")
    client.ask(Stored(images[:2]), torch.tensor([1, 0]), "b")
    client.ask(Stored(images[4:5]), torch.tensor([9]), "a")
    found = {account: sources.tolist() for account, sources in client.sources.items()}
    assert found == {"a": [5, 6, 5, 6, 5, 6, 5, 6, 9, 9], "b": [1, 0, 1, 0]}
    assert client.queries == 14


def test_repeated_answers_are_averaged(encoder, images, tmp_path):
    """Over draws of the noise that are made anew for each query; the file has each of them."""
    victim = Victim(encoder, defences=[DEFENCES["noise"]()])
    mean = ask(Client(victim, tmp_path / "kept", repeat=3, batch_size=5), images)
    each = torch.from_numpy(kept_in(tmp_path / "kept")["answer"].copy()).view(3, 12, 256)
    assert not torch.equal(each[0], each[1])
    torch.testing.assert_close(mean, each.mean(dim=0))


@pytest.mark.parametrize(("watch", "expected"), [(Times, 5), (RememberingTimes, 12)])
def test_a_killed_attack_pays_for_no_answer_twice(encoder, images, tmp_path, watch, expected):
    whole = ask(Client(Victim(encoder), tmp_path / "whole", batch_size=4), images)
    kept = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(kept[: 7 * LAYOUT.itemsize + 100])  # seven answers and a part of the eighth
    watch = watch(factor=2.0)
    victim = Victim(encoder, budget=12, defences=[watch])
    answers = ask(Client(victim, tmp_path / "cut", batch_size=4), images)
    digests = image_digests(images)
    assert watch.seen == [("default", row, digests[row]) for row in range(12 - expected, 12)]
    # What was paid for comes from the file, as it is there.
    torch.testing.assert_close(answers, torch.cat([whole[:7], 2 * whole[7:]]))
    assert kept_in(tmp_path / "cut")["answer"].tobytes() == answers.numpy().tobytes()
    assert victim.ledger.queries == victim.ledger.distinct == victim.ledger.near_distinct == 12


class Killed(BaseException):
    """Ends an attack where it is raised, as a kill does."""


class Killing(Victim):
    """A victim whose attacker is killed after so many calls: before it is asked, or before it can keep the answers."""

    def __init__(self, *arguments, calls, answers=False, **options):
        super().__init__(*arguments, **options)
        self.calls_left, self.answers, self.sent = calls, answers, 0

    def query(self, images, account="default", gather=None):
        if not self.calls_left and not self.answers:
            raise Killed
        answers = super().query(images, account, gather)
        self.sent += len(images)
        if not self.calls_left:
            raise Killed
        self.calls_left -= 1
        return answers


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_a_client_that_is_resumed_pays_for_the_rest_only(calls, dtype, encoder, images, tmp_path):
    """Killed between calls, in the second of three askings or before; and the ledgers end alike."""
    whole = Victim(encoder)
    expected = ask(Client(whole, tmp_path / "whole", 3, dtype, batch_size=5), images)
    killed = Killing(encoder, calls=calls)
    with pytest.raises(Killed):
        ask(Client(killed, tmp_path / "kept", 3, dtype, batch_size=5), images)
    rest = Killing(encoder, calls=100, budget=36)
    client = Client(rest, tmp_path / "kept", 3, dtype, batch_size=5)
    answers = ask(client, images)
    assert killed.sent == [0, 5, 10, 22][[0, 1, 2, 5].index(calls)]
    assert rest.sent == 36 - killed.sent
    assert rest.ledger.queries == client.queries == 36
    assert rest.ledger.accounts["default"].images == whole.ledger.accounts["default"].images
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-3)
    assert client.sources["default"].tolist() == list(range(12)) * 3


def test_answers_in_float16_stay_in_the_file(encoder, images, tmp_path):
    victim = Victim(encoder)
    client = Client(victim, tmp_path / "kept", dtype=np.float16, batch_size=5)
    answers = ask(client, images)
    assert isinstance(answers, Kept)
    assert len(answers) == 12
    rows = torch.arange(12)
    assert torch.equal(answers[rows], Victim(encoder).query(images).half().float())
    assert ask(client, images[:0])[rows[:0]].shape == (0, 256)
    again = ask(client, images[3:5], "b")  # those asked about before stay apart
    assert torch.equal(again[rows[:2]], answers[rows[3:5]])
    assert again.records.tolist() == [12, 13]
    assert client.file.layout["answer"].base == np.float16
    assert (tmp_path / "kept").stat().st_size == 14 * (16 + 32 + 4 + 1 + 2 * 256)


def test_answers_beyond_float16_are_its_largest_numbers(encoder, images, tmp_path):
    """A defence may exaggerate an answer; infinity would make every loss of it not a number."""
    answers = {}
    for dtype in (np.float16, np.float32):
        victim = Victim(encoder, defences=[Signed()])
        kept = ask(Client(victim, tmp_path / dtype.__name__, dtype=dtype, batch_size=5), images)
        answers[dtype] = kept if dtype is np.float32 else kept[torch.arange(12)]
    assert answers[np.float16].isfinite().all()
    assert answers[np.float32].abs().max() > 65504
    assert torch.equal(answers[np.float16], answers[np.float32].clamp(-65504, 65504).half().float())
    assert {65504.0, -65504.0} <= {*answers[np.float16][0, :2].tolist()}


SETTINGS = {"poisoning": {"poison_threshold": 0.99992}}
SETTINGS["buckets"] = {"bucket_bits": 3, "bucket_alpha": 5.0, "bucket_beta": 20.0}
DEFENCES_KEPT = (
    ["noise"],
    ["poisoning", "rounding"],
    ["buckets", "transform"],
    ["noise", "poisoning", "buckets", "topk", "truncate"],
)


@pytest.mark.parametrize("names", DEFENCES_KEPT, ids=",".join)
@pytest.mark.parametrize("rows", [0, 4, 9.4, 15, 20], ids=lambda rows: f"after-{rows}-rows")
def test_a_killed_attack_goes_on_as_if_it_had_not_been(encoder, images, tmp_path, names, rows):
    # To an untrained network all images are close: colours of their own, and a threshold among their similarities, for
    # some to be poisoned and some not.
    images = images // 16
    for row, image in enumerate(images):
        image[row % 3] += 20 * row
    asked = (("default", images), ("b", images[2:6]), ("default", images[4:8]))

    def attack(keep):
        defences = [DEFENCES[name](secret=3, **SETTINGS.get(name, {})) for name in names]
        victim = Victim(encoder, defences=defences)
        client = Client(victim, keep, batch_size=5)
        return client, torch.cat([ask(client, part, account) for account, part in asked])

    first, whole = attack(tmp_path / "kept")
    kept = (tmp_path / "kept").read_bytes()
    (tmp_path / "kept").write_bytes(kept[: int(rows * first.file.layout.itemsize)])
    resumed, answers = attack(tmp_path / "kept")
    torch.testing.assert_close(answers, whole, rtol=1e-4, atol=1e-4)
    again = np.fromfile(tmp_path / "kept", first.file.layout)
    assert again["answer"].tobytes() == answers.numpy().tobytes()
    ledgers = (client.victim.ledger.accounts.values() for client in (first, resumed))
    for account, other in zip(*ledgers, strict=True):
        assert (account.queries, account.images) == (other.queries, other.images)
    if "poisoning" in names:
        flagged = whole[:, 0] > 900
        assert flagged.any()
        assert not flagged.all()


# ---- answers that were lost ----

PLANS = {
    "plain": Attack(),
    "two-views": Attack(n_views=2),
    "asked-twice": Attack(repeat=2),
    "near-copies": Attack(repeat=2, jitter=3),
    "sybils": Attack(sybils=2, shared=4),
    "few-buckets": Attack(max_coverage=100.0),
}


def buy_all(victim, images, attack, keep, dtype=np.float32):
    client = Client(victim, keep, attack.repeat, dtype, batch_size=5, jitter=attack.jitter)
    draws = torch.Generator().manual_seed(0)
    features = images.flatten(1)[:, ::300].float()
    return buy(client, Stored(images), attack, attack.images(victim.budget), draws, lambda images: features)


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_what_was_asked_and_lost_counts_as_asked(plan, calls, encoder, images, tmp_path):
    """The victim is never asked beyond the budget, and the copy is trained on images that have all their answers."""
    attack = PLANS[plan]
    budget = 24 if attack.n_views * attack.repeat > 1 else 16 if plan == "sybils" else 12
    whole = buy_all(Victim(encoder, budget), images, attack, tmp_path / "whole")
    killed = Killing(encoder, budget, calls=calls, answers=True)
    with pytest.raises(Killed):
        buy_all(killed, images, attack, tmp_path / "kept")
    rest = Killing(encoder, budget, calls=100)
    bought = buy_all(rest, images, attack, tmp_path / "kept")
    assert rest.ledger.queries == killed.sent + rest.sent <= budget
    assert [account.queries for account in rest.ledger.accounts.values()] == [
        len(sources) for sources in bought.sources.values()
    ]
    lost = int((~kept_in(tmp_path / "kept")["answered"]).sum())
    assert lost
    fewest = len(whole) if attack.repeat > 1 and calls > 1 else len(whole) - 2 * lost
    assert fewest <= len(bought) <= len(whole) - (attack.repeat == 1)
    left_out = 0 if plan == "few-buckets" else len(whole) - len(bought)  # that one stops earlier instead
    assert bought.findings[-1] == f"{lost} answers were lost in a stop: {left_out} images are left out"
    where = {int(index): row for row, index in enumerate(whole.index)}
    rows = torch.tensor([where[int(index)] for index in bought.index])
    if plan not in ("few-buckets", "sybils"):  # these adapt to what they have
        expected = whole.rows.view(attack.n_views, len(whole), -1)[:, rows].flatten(0, 1)
        # Where one of two near-copies' answers is lost, the other stands for both.
        torch.testing.assert_close(bought.rows, expected, rtol=1e-4, atol=1e-2 if attack.jitter else 1e-4)
    assert bought.rows.isfinite().all()
    assert torch.equal(bought.images.tensor, images[bought.index])


def test_lost_answers_of_a_file_are_left_out(encoder, images, tmp_path):
    attack = Attack()
    with pytest.raises(Killed):
        buy_all(Killing(encoder, 12, calls=1, answers=True), images, attack, tmp_path / "kept", np.float16)
    bought = buy_all(Victim(encoder, 12), images, attack, tmp_path / "kept", np.float16)
    assert bought.index.tolist() == [0, 1, 2, 3, 4, 5, 6]
    expected = Victim(encoder).query(images[:7])
    torch.testing.assert_close(bought.rows[torch.arange(7)], expected, rtol=1e-3, atol=1e-3)


def test_a_larger_budget_pays_for_what_was_lost(encoder, images, tmp_path):
    with pytest.raises(Killed):
        buy_all(Killing(encoder, 17, calls=1, answers=True), images, Attack(), tmp_path / "kept")
    victim = Victim(encoder, 17)
    bought = ask(Client(victim, tmp_path / "kept", batch_size=5), images)
    torch.testing.assert_close(bought, Victim(encoder).query(images))
    assert victim.ledger.queries == 17


CHANGES = {
    "reversed": lambda images: images.flip(0),
    "shuffled": lambda images: images[torch.randperm(12, generator=torch.Generator().manual_seed(1))],
    "first-removed": lambda images: images[1:],
    "two-removed": lambda images: images[[0, 1, 3, 4, 5, 6, 8, 9, 10, 11]],
}


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_kept_answers_belong_to_images_not_to_positions(change, dtype, repeat, encoder, images, tmp_path):
    """Images in another order, or without some, get their answers back; only others are asked about."""
    with pytest.raises(Killed):
        ask(Client(Killing(encoder, calls=2), tmp_path / "kept", repeat, dtype, batch_size=5), images)
    now = CHANGES[change](images)
    victim = Killing(encoder, calls=100)
    found = ask(Client(victim, tmp_path / "kept", repeat, dtype, batch_size=5), now)
    found = found if isinstance(found, torch.Tensor) else found[torch.arange(len(now))]
    torch.testing.assert_close(found, Victim(encoder).query(now), rtol=1e-3, atol=1e-3)
    kept = {*image_digests(images[:10])}
    assert victim.sent == repeat * len(now) - sum(digest in kept for digest in image_digests(now))


def test_other_images_are_asked_about_anew_or_refused(encoder, images, tmp_path):
    """As far as the budget allows; never is an answer given to an image that it is not of."""
    Client(Victim(encoder), tmp_path / "kept").ask(Stored(images), torch.arange(12))
    others = torch.cat([images[:10], 255 - images[:2]])
    victim = Victim(encoder, budget=14)
    kept = tmp_path / "kept"
    shutil.copy(kept, tmp_path / "other")
    torch.testing.assert_close(ask(Client(victim, kept), others), Victim(encoder).query(others))
    assert victim.ledger.queries == 14
    with pytest.raises(UserError, match=r"2 of the images were not asked about .* has 1 queries left"):
        ask(Client(Victim(encoder, budget=13), tmp_path / "other"), others)
    remembering = Victim(encoder, budget=30, defences=[RememberingTimes()])
    with pytest.raises(UserError, match="cannot be brought back"):
        ask(Client(remembering, tmp_path / "other"), 255 - images)


def test_a_smaller_budget_than_what_was_asked_asks_nothing(encoder, images, tmp_path):
    Client(Victim(encoder), tmp_path / "kept").ask(Stored(images), torch.arange(12))
    shutil.copy(tmp_path / "kept", tmp_path / "other")
    victim = Killing(encoder, calls=100, budget=5)
    torch.testing.assert_close(ask(Client(victim, tmp_path / "kept"), images), Victim(encoder).query(images))
    with pytest.raises(UserError, match=r"12 of the images were not asked about .* has 0 queries left"):
        ask(Client(victim, tmp_path / "other"), 255 - images)
    assert victim.sent == 0


def test_a_call_that_is_refused_leaves_no_record(encoder, images, tmp_path):
    client = Client(Victim(encoder, budget=7), tmp_path / "kept", batch_size=5)
    with pytest.raises(BudgetExceeded):
        ask(client, images)
    assert len(kept_in(tmp_path / "kept")) == 5


def test_a_full_disk_is_met_before_the_victim_is_asked(encoder, images, tmp_path):
    victim = Killing(encoder, calls=100)
    client = Client(victim, tmp_path / "kept", batch_size=5)
    size = 5 * client.file.layout.itemsize
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, before[1]))
        with pytest.raises(OSError, match="too large"):
            ask(client, images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert victim.sent == 5
    assert (tmp_path / "kept").stat().st_size == size
