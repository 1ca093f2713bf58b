"""The attacker's client: what it pays for, keeps, and reads back after a kill."""

import numpy as np
import pytest
import torch

from attacks.client import Client
from data_aug.images import Stored
from defenses import DEFENCES, Defence
from tests.test_victim import Times
from victim import BudgetExceeded, Victim, image_digests


class RememberingTimes(Times):
    remembers = True


class Signed(Defence):
    """Numbers far beyond float16, of both signs."""

    def __call__(self, answers, call):
        signs = 1 - 2 * (torch.arange(answers.shape[1]) % 2)
        return (answers + 1) * 1e5 * signs


def kept_in(path):
    """The records of an untrained small encoder's answers in a file."""
    return np.fromfile(path, [("digest", np.uint8, 16), ("answer", np.float32, 256)])


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
    (tmp_path / "cut").write_bytes(kept[: 7 * (16 + 256 * 4) + 100])  # seven answers and a part of the eighth
    watch = watch(factor=2.0)
    victim = Victim(encoder, budget=12, defences=[watch])
    answers = ask(Client(victim, tmp_path / "cut", batch_size=4), images)
    digests = image_digests(images)
    assert watch.seen == [("default", row, digests[row]) for row in range(12 - expected, 12)]
    # What was paid for comes from the file, as it is there.
    torch.testing.assert_close(answers, torch.cat([whole[:7], 2 * whole[7:]]))
    assert kept_in(tmp_path / "cut")["answer"].tobytes() == answers.numpy().tobytes()
    assert victim.ledger.queries == victim.ledger.distinct == 12


class Killing(Victim):
    """A victim that does not answer after so many calls, and counts the images that it was sent over its API."""

    def __init__(self, *arguments, calls, **options):
        super().__init__(*arguments, **options)
        self.calls_left, self.sent = calls, 0

    def query(self, images, account="default", gather=None):
        if not self.calls_left:
            raise ConnectionError
        self.calls_left -= 1
        self.sent += len(images)
        return super().query(images, account, gather)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("calls", [0, 1, 2, 5])
def test_a_client_that_is_resumed_pays_for_the_rest_only(calls, dtype, encoder, images, tmp_path):
    """Killed between calls, in the second of three askings or before; and the ledgers end alike."""
    whole = Victim(encoder)
    expected = ask(Client(whole, tmp_path / "whole", 3, dtype, batch_size=5), images)
    killed = Killing(encoder, calls=calls)
    with pytest.raises(ConnectionError):
        ask(Client(killed, tmp_path / "kept", 3, dtype, batch_size=5), images)
    rest = Killing(encoder, calls=100, budget=36)
    client = Client(rest, tmp_path / "kept", 3, dtype, batch_size=5)
    answers = ask(client, images)
    assert killed.sent == [0, 5, 10, 22][[0, 1, 2, 5].index(calls)]
    assert rest.sent == 36 - killed.sent
    assert rest.ledger.queries == client.queries == 36
    assert rest.ledger.accounts["default"].images == whole.ledger.accounts["default"].images
    torch.testing.assert_close(torch.as_tensor(answers), torch.as_tensor(expected), rtol=1e-3, atol=1e-3)
    assert client.sources["default"].tolist() == list(range(12)) * 3


def test_answers_in_float16_stay_in_the_file(encoder, images, tmp_path):
    victim = Victim(encoder)
    client = Client(victim, tmp_path / "kept", dtype=np.float16, batch_size=5)
    answers = ask(client, images)
    assert isinstance(answers, np.memmap)
    assert (answers.dtype, answers.shape) == (np.float16, (12, 256))
    assert np.array_equal(answers, Victim(encoder).query(images).numpy().astype(np.float16))
    assert ask(client, images[:0]).shape == (0, 256)
    assert np.array_equal(ask(client, images[3:5], "b"), answers[3:5])  # those asked about before stay apart
    assert (tmp_path / "kept").stat().st_size == 14 * (16 + 2 * 256)


def test_answers_beyond_float16_are_its_largest_numbers(encoder, images, tmp_path):
    """A defence may exaggerate an answer; infinity would make every loss of it not a number."""
    answers = {}
    for dtype in (np.float16, np.float32):
        victim = Victim(encoder, defences=[Signed()])
        answers[dtype] = ask(Client(victim, tmp_path / dtype.__name__, dtype=dtype, batch_size=5), images)
    assert np.isfinite(answers[np.float16]).all()
    assert answers[np.float32].abs().max() > 65504
    assert np.array_equal(answers[np.float16], answers[np.float32].clamp(-65504, 65504).numpy().astype(np.float16))
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
    (tmp_path / "kept").write_bytes(kept[: int(rows * (16 + 4 * first.victim.dim))])
    resumed, answers = attack(tmp_path / "kept")
    torch.testing.assert_close(answers, whole, rtol=1e-4, atol=1e-4)
    again = np.fromfile(tmp_path / "kept", first.layout)
    assert again["answer"].tobytes() == answers.numpy().tobytes()
    ledgers = (client.victim.ledger.accounts.values() for client in (first, resumed))
    for account, other in zip(*ledgers, strict=True):
        assert (account.queries, account.images) == (other.queries, other.images)
    if "poisoning" in names:
        flagged = whole[:, 0] > 900
        assert flagged.any()
        assert not flagged.all()
