"""The black box: what it answers, counts, refuses and never changes; and what an attacker keeps of it."""

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from data_aug.datasets import to_float
from defenses import Defence, build_defences
from models import build_encoder
from utils import UserError
from victim import BudgetExceeded, Ledger, Purchases, Service, Victim, image_digests


@dataclass
class Times(Defence):
    """Multiplies answers, and keeps what it saw of the queries."""

    factor: float = 1.0
    seen: list = field(default_factory=list)

    def __call__(self, answers, query):
        self.seen += [(query.account, query.first + row, digest) for row, digest in enumerate(query.digests)]
        return self.factor * answers


class RememberingTimes(Times):
    remembers = True


class PlusOne(Defence):
    def __call__(self, answers, query):
        return answers + 1


class Same(Defence):
    def __call__(self, answers, query):
        self.query = query
        return answers


def test_answers_are_the_representations(encoder, images):
    answers = Victim(encoder).query(images)
    assert answers.shape == (12, 256)
    assert answers.dtype == torch.float32
    assert not answers.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(answers, encoder.eval()(images.float() / 255))


def test_a_service_answers_what_it_sells(encoder, images):
    service = Service(encoder.eval(), "both")
    with torch.no_grad():
        expected = service(images.float() / 255)
    victim = Victim(service)
    assert victim.dim == 256 + 16
    torch.testing.assert_close(victim.query(images), expected)


def test_uint8_and_float_are_the_same_query(encoder, images):
    victim = Victim(encoder)
    assert torch.equal(victim.query(images), victim.query(images.float() / 255))
    assert victim.ledger.summary() == {"queries": 24, "distinct": 12, "calls": 2}


def test_digests_tell_images_apart(images):
    assert image_digests(images) == image_digests(to_float(images))
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    assert [a == b for a, b in zip(image_digests(images), image_digests(other), strict=True)] == [False] + 11 * [True]


def test_ledger_counts_queries_distinct_images_and_calls_by_account(encoder, images):
    victim = Victim(encoder)
    victim.query(images[:5], account="a")
    victim.query(images[3:8], account="a")
    victim.query(images[:2], account="b")
    assert victim.ledger.summary() == {"queries": 12, "distinct": 8, "calls": 3}
    by_account = {name: (one.queries, one.distinct, one.calls) for name, one in victim.ledger.accounts.items()}
    assert by_account == {"a": (10, 8, 2), "b": (2, 2, 1)}


def test_ledger_survives_a_checkpoint(encoder, images, tmp_path):
    victim = Victim(encoder)
    victim.query(images)
    victim.query(images[:4], account="b")
    torch.save(victim.ledger.state_dict(), tmp_path / "ledger")
    restored = Ledger()
    restored.load_state_dict(torch.load(tmp_path / "ledger", weights_only=True))
    assert restored.summary() == victim.ledger.summary()
    assert restored.accounts == victim.ledger.accounts


def test_budget_refuses_the_query_that_would_exceed_it(encoder, images):
    watch = Times()
    victim = Victim(encoder, budget=10, defences=[watch])
    victim.query(images[:6])
    with pytest.raises(BudgetExceeded, match=r"5 images.*budget of 10.*6 are spent"):
        victim.query(images[:5])
    assert victim.ledger.summary() == {"queries": 6, "distinct": 6, "calls": 1}
    assert len(watch.seen) == 6
    victim.query(images[6:10])
    assert victim.ledger.queries == 10
    assert issubclass(BudgetExceeded, UserError)


def test_queries_change_nothing_in_the_encoder(encoder, images):
    encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    victim = Victim(encoder)
    inside = copy.deepcopy(victim._service.state_dict())
    victim.query(images)
    victim.query(images * 0)
    for state, earlier in ((encoder.state_dict(), before), (victim._service.state_dict(), inside)):
        assert all(torch.equal(value, earlier[key]) for key, value in state.items())
    assert encoder.training
    assert not any(module.training for module in victim._service.modules())
    assert not any(parameter.requires_grad for parameter in victim._service.parameters())


def test_training_the_original_does_not_change_the_answers(encoder, images):
    victim = Victim(encoder)
    before = victim.query(images)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert torch.equal(victim.query(images), before)


def test_version_follows_the_weights(encoder):
    version = Victim(encoder).version
    assert version == Victim(encoder).version
    with torch.no_grad():
        encoder.backbone.conv1.weight[0, 0, 0, 0] += 1
    assert version != Victim(encoder).version


# ---- defences --------------------------------------------------------------------------------------------------------


def test_defences_change_answers_in_order(encoder, images):
    plain = Victim(encoder).query(images)
    assert torch.equal(Victim(encoder, defences=[Times(factor=2.0), PlusOne()]).query(images), 2 * plain + 1)
    assert torch.equal(Victim(encoder, defences=[PlusOne(), Times(factor=2.0)]).query(images), 2 * (plain + 1))


def test_a_defence_sees_each_query_once(encoder, images):
    first, second = Times(), Times()
    victim = Victim(encoder, defences=[first, second])
    for account, part in (("x", images[:5]), ("y", images[:3]), ("x", images[5:6]), ("x", images[:4])):
        victim.query(part, account)
    digests = image_digests(images)
    asked = {"x": [*digests[:6], *digests[:4]], "y": digests[:3]}
    for watch in (first, second):
        for account, expected in asked.items():
            rows = [(row, digest) for name, row, digest in watch.seen if name == account]
            assert rows == list(enumerate(expected))


def test_a_defence_sees_the_true_representations_and_projections(encoder, images):
    last = Same()
    Victim(encoder, defences=[Times(factor=3.0), last]).query(images)
    with torch.no_grad():
        h = encoder.eval()(images.float() / 255)
        torch.testing.assert_close(last.query.representations, h)
        torch.testing.assert_close(last.query.projections, encoder.backbone.fc(h))


@pytest.mark.parametrize("name", [None, "truncate", "topk", "same"])
def test_answers_never_share_storage_with_what_is_not_sold(encoder, images, name):
    same = Same()
    defences = build_defences([name], {"dimensions": 3, "top_k": 3}) if name in ("truncate", "topk") else []
    answers = Victim(encoder, defences=[*defences, *([same] if name == "same" else [])]).query(images)
    assert answers.untyped_storage().nbytes() == 4 * answers.numel()
    if name == "same":
        kept = same.query.representations
        assert torch.equal(answers, kept)
        assert answers.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()


def test_a_victim_without_a_head_cannot_compare_projections(images):
    with pytest.raises(UserError, match="no head"):
        Victim(build_encoder("resnet10w32"), defences=build_defences(["poisoning"], {}))


def test_width_of_answers_is_that_after_all_defences(encoder, images):
    victim = Victim(encoder, defences=build_defences(["truncate", "transform"], {"transform": "pad-shuffle"}))
    assert victim.dim == victim.query(images).shape[1] == 160
    with pytest.raises(UserError, match=r"--top-k 200 .* 128 numbers"):
        Victim(encoder, defences=build_defences(["truncate", "topk"], {"top_k": 200}))


# ---- the attacker's side ---------------------------------------------------------------------------------------------


def kept_in(path):
    """The records of an untrained small encoder's answers in a file."""
    return np.fromfile(path, [("digest", np.uint8, 16), ("answer", np.float32, 256)])


def test_purchases_are_the_answers_in_their_order(encoder, images, tmp_path):
    victim = Victim(encoder)
    purchases = Purchases(victim, tmp_path / "kept", batch_size=5)
    rows = torch.cat([purchases.ask(images[:7]), purchases.ask(images[7:], account="b"), purchases.ask(images[:0])])
    torch.testing.assert_close(rows, Victim(encoder).query(images))
    kept = kept_in(tmp_path / "kept")
    assert kept["answer"].tobytes() == rows.numpy().tobytes()
    assert [bytes(one) for one in kept["digest"]] == image_digests(images)
    assert {name: one.queries for name, one in victim.ledger.accounts.items()} == {"default": 7, "b": 5}
    assert victim.ledger.calls == 3


@pytest.mark.parametrize(("watch", "expected"), [(Times, 5), (RememberingTimes, 12)])
def test_a_killed_attack_pays_for_no_answer_twice(encoder, images, tmp_path, watch, expected):
    whole = Purchases(Victim(encoder), tmp_path / "whole", batch_size=4).ask(images)
    kept = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(kept[: 7 * (16 + 256 * 4) + 100])  # seven answers and a part of the eighth
    watch = watch(factor=2.0)
    victim = Victim(encoder, budget=12, defences=[watch])
    answers = Purchases(victim, tmp_path / "cut", batch_size=4).ask(images)
    digests = image_digests(images)
    assert watch.seen == [("default", row, digests[row]) for row in range(12 - expected, 12)]
    # What was paid for comes from the file, as it is there.
    torch.testing.assert_close(answers, torch.cat([whole[:7], 2 * whole[7:]]))
    assert kept_in(tmp_path / "cut")["answer"].tobytes() == answers.numpy().tobytes()
    assert victim.ledger.queries == victim.ledger.distinct == 12


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
    settings = {"poison_threshold": 0.99992, "bucket_bits": 3, "bucket_alpha": 5.0, "bucket_beta": 20.0}
    images = images // 16
    for row, image in enumerate(images):
        image[row % 3] += 20 * row
    asked = (("default", images), ("b", images[2:6]), ("default", images[4:8]))

    def attack(keep):
        victim = Victim(encoder, defences=build_defences(names, settings, secret=3))
        purchases = Purchases(victim, keep, batch_size=5)
        return victim, torch.cat([purchases.ask(part, account) for account, part in asked])

    victim, whole = attack(tmp_path / "kept")
    kept = (tmp_path / "kept").read_bytes()
    (tmp_path / "kept").write_bytes(kept[: int(rows * (16 + 4 * victim.dim))])
    resumed, answers = attack(tmp_path / "kept")
    torch.testing.assert_close(answers, whole, rtol=1e-4, atol=1e-4)
    again = np.fromfile(tmp_path / "kept", Purchases(victim).record)
    assert again["answer"].tobytes() == answers.numpy().tobytes()
    for one, other in zip(victim.ledger.accounts.values(), resumed.ledger.accounts.values(), strict=True):
        assert (one.queries, one.images) == (other.queries, other.images)
    if "poisoning" in names:
        flagged = whole[:, 0] > 900
        assert flagged.any()
        assert not flagged.all()
