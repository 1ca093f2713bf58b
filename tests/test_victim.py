"""The black box: what it answers, counts, refuses and never changes."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from attacks.client import jitter
from data_aug.datasets import load_dataset, to_float
from defenses import DEFENCES, Defence
from files.reading import checked
from models import build_encoder
from models.files import RECORDED
from training.record import Record
from utils import UserError
from victim import (
    Api,
    BudgetExceeded,
    Ledger,
    Victim,
    digest_tensor,
    image_digests,
    pack_digests,
    unpack_digests,
    version_of,
)


@dataclass
class Times(Defence):
    """Multiplies answers, and keeps what it saw of the queries."""

    factor: float = 1.0
    seen: list = field(default_factory=list)

    def __call__(self, answers, call):
        self.seen += [(call.account, call.first + row, digest) for row, digest in enumerate(call.digests)]
        return self.factor * answers


class PlusOne(Defence):
    def __call__(self, answers, call):
        return answers + 1


class Same(Defence):
    def __call__(self, answers, call):
        self.call = call
        return answers


def test_answers_are_the_representations(encoder, images):
    answers = Victim(encoder).query(images)
    assert answers.shape == (12, 256)
    assert answers.dtype == torch.float32
    assert not answers.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(answers, encoder.eval()(images.float() / 255))


def test_an_api_answers_its_output(encoder, images):
    classifier = torch.nn.Linear(256, 5)
    with torch.no_grad():
        h, z = encoder.eval()(images.float() / 255), encoder.project(images.float() / 255)
        logits = classifier(h)
    expected = {"representations": h, "projections": z, "both": torch.cat([h, z], dim=1)}
    expected |= {"probabilities": logits.softmax(dim=1), "labels": torch.eye(5)[logits.argmax(dim=1)]}
    for output, answers in expected.items():
        layer = classifier if output in ("probabilities", "labels") else None
        victim = Victim(Api(encoder, output, layer))
        assert victim.dim == answers.shape[1]
        found = victim.query(images)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, answers)


def test_uint8_and_float_are_the_same_query(encoder, images):
    victim = Victim(encoder)
    assert torch.equal(victim.query(images), victim.query(images.float() / 255))
    assert victim.ledger.summary() == {"queries": 24, "distinct": 12, "near_distinct": 12, "calls": 2}


def test_digests_tell_images_apart(images):
    assert image_digests(images) == image_digests(to_float(images))
    other = images.clone()
    other[0, 0, 0, 0] ^= 1
    assert [a == b for a, b in zip(image_digests(images), image_digests(other), strict=True)] == [False] + 11 * [True]


def test_digests_are_packed_and_unpacked(images):
    digests = image_digests(images)
    packed = digest_tensor(images)
    assert (packed.dtype, packed.shape) == (torch.uint8, (12, 16))
    assert torch.equal(packed, pack_digests(digests))
    assert unpack_digests(packed) == unpack_digests(packed.flatten()) == digests
    assert pack_digests([]).shape == (0, 16)


def test_ledger_counts_queries_distinct_images_and_calls_by_account(encoder, images):
    victim = Victim(encoder)
    victim.query(images[:5], account="a")
    victim.query(images[3:8], account="a")
    victim.query(images[:2], account="b")
    assert victim.ledger.summary() == {"queries": 12, "distinct": 8, "near_distinct": 8, "calls": 3}
    accounts = victim.ledger.accounts
    by_account = {name: (account.queries, account.distinct, account.calls) for name, account in accounts.items()}
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


def test_near_copies_of_an_image_are_distinct_and_counted_once_beside_that():
    """12 pictures, each as it is, with one pixel changed by a level, and with all pixels changed by up to a level."""
    pictures = load_dataset("shapes", split="test")[0][:12]
    one_pixel = pictures.clone()
    one_pixel[:, 0, 5, 5] ^= 1
    victim = Victim(build_encoder("resnet10w32"))
    for images in (pictures, one_pixel, jitter(pictures, 1, number=1)):
        victim.query(images)
    assert (victim.ledger.queries, victim.ledger.distinct) == (36, 36)
    assert 12 <= victim.ledger.near_distinct <= 14


def test_a_ledger_of_before_the_hashes_is_read(encoder, images):
    victim = Victim(encoder)
    victim.query(images)
    state = victim.ledger.state_dict()
    assert Record(ledger=state).figures() == {"queries": 12, "distinct": 12, "near_distinct": 12}
    del state["default"]["near"]
    older = Ledger()
    older.load_state_dict(state)
    older.record(image_digests(images[:3]))
    assert older.summary() == {"queries": 15, "distinct": 12, "near_distinct": None, "calls": 2}
    assert older.state_dict()["default"].keys() == {"queries", "calls", "images"}
    assert Record(ledger=state).figures() == {"queries": 12, "distinct": 12, "near_distinct": None}
    assert checked({"ledger": state}, RECORDED, "a file")
    with pytest.raises(UserError, match="near as hashes of 3 bytes"):
        checked({"ledger": {"a": {**state["default"], "near": torch.zeros(4, dtype=torch.uint8)}}}, RECORDED, "a file")


def test_budget_refuses_the_query_that_would_exceed_it(encoder, images):
    watch = Times()
    victim = Victim(encoder, budget=10, defences=[watch])
    victim.query(images[:6])
    with pytest.raises(BudgetExceeded, match=r"5 images.*budget of 10.*6 are spent"):
        victim.query(images[:5])
    assert victim.ledger.summary() == {"queries": 6, "distinct": 6, "near_distinct": 6, "calls": 1}
    assert len(watch.seen) == 6
    victim.query(images[6:10])
    assert victim.ledger.queries == 10
    assert issubclass(BudgetExceeded, UserError)


@pytest.mark.parametrize("account", ["default", "another"])
@pytest.mark.parametrize("budget", [1, 3])
def test_the_same_image_asked_again_is_paid_for_again(budget, account, encoder, images):
    """The budget counts queries, not distinct images: over calls, within a call, and whoever asks."""
    victim = Victim(encoder, budget=budget)
    with pytest.raises(BudgetExceeded, match=f"{budget + 1} images would exceed the budget of {budget}: 0 are spent"):
        victim.query(images[[0] * (budget + 1)])
    for _ in range(budget):
        victim.query(images[:1])
    with pytest.raises(BudgetExceeded, match=f"1 images would exceed the budget of {budget}: {budget} are spent"):
        victim.query(images[:1], account)
    assert victim.ledger.summary() == {"queries": budget, "distinct": 1, "near_distinct": 1, "calls": budget}


def test_queries_change_nothing_in_the_encoder(encoder, images):
    encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    victim = Victim(encoder)
    inside = copy.deepcopy(victim._api.state_dict())
    victim.query(images)
    victim.query(images * 0)
    for state, earlier in ((encoder.state_dict(), before), (victim._api.state_dict(), inside)):
        assert all(torch.equal(value, earlier[key]) for key, value in state.items())
    assert encoder.training
    assert not any(module.training for module in victim._api.modules())
    assert not any(parameter.requires_grad for parameter in victim._api.parameters())


def test_training_the_original_does_not_change_the_answers(encoder, images):
    victim = Victim(encoder)
    before = victim.query(images)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert torch.equal(victim.query(images), before)


def test_version_follows_the_weights(encoder):
    version = Victim(encoder).version
    assert version == Victim(encoder).version == version_of(Api(encoder))
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
        torch.testing.assert_close(last.call.representations, h)
        torch.testing.assert_close(last.call.projections, encoder.backbone.fc(h))


@pytest.mark.parametrize("name", [None, "truncate", "topk", "same"])
def test_answers_never_share_storage_with_what_is_not_sold(encoder, images, name):
    same = Same()
    defences = {
        "truncate": [DEFENCES["truncate"](dimensions=3)],
        "topk": [DEFENCES["topk"](top_k=3)],
        "same": [same],
    }
    answers = Victim(encoder, defences=defences.get(name, [])).query(images)
    assert answers.untyped_storage().nbytes() == 4 * answers.numel()
    if name == "same":
        kept = same.call.representations
        assert torch.equal(answers, kept)
        assert answers.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()


def test_a_victim_without_a_head_cannot_compare_projections(images):
    with pytest.raises(UserError, match="no head"):
        Victim(build_encoder("resnet10w32"), defences=[DEFENCES["poisoning"]()])


def test_width_of_answers_is_that_after_all_defences(encoder, images):
    victim = Victim(encoder, defences=[DEFENCES["truncate"](), DEFENCES["transform"](transform="pad")])
    assert victim.dim == victim.query(images).shape[1] == 256
    with pytest.raises(UserError, match=r"--top-k 200 .* 128 numbers"):
        Victim(encoder, defences=[DEFENCES["truncate"](), DEFENCES["topk"](top_k=200)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images: images.float(), "these are from 0 to 255: divide by 255"),
        (lambda images: images.float() / 255 * torch.nan, "these are from nan to nan"),
        (lambda images: images.float() / 255 - 1, r"these are from -1 to"),
        (lambda images: (images.float() / 255).index_fill(0, torch.tensor([3]), torch.inf), "to inf"),
        (lambda images: (images.double() / 255).index_fill(0, torch.tensor([3]), torch.nan), "nan"),
        (lambda images: images.long(), "not torch.int64"),
        (lambda images: images.bool(), "not torch.bool"),
        (lambda images: images[:, :1], "of shape"),
        (lambda images: images[0], "of shape"),
        (lambda images: images.permute(0, 2, 3, 1), "of shape"),
    ],
)
def test_what_is_no_query_is_refused_and_not_paid(change, said, encoder, images):
    victim = Victim(encoder, budget=100)
    with pytest.raises(ValueError, match=said):
        victim.query(change(images))
    assert victim.ledger.summary() == {"queries": 0, "distinct": 0, "near_distinct": 0, "calls": 0}
