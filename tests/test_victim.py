"""The black box: what it answers, counts, refuses and never changes."""

import copy

import pytest
import torch

from utils import UserError
from victim import BudgetExceeded, Ledger, Victim, ask_once


def test_answers_are_the_representations(encoder, images):
    answers = Victim(encoder).query(images)
    assert answers.shape == (12, 256)
    assert answers.dtype == torch.float32
    assert not answers.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(answers, encoder.eval()(images.float() / 255))


def test_uint8_and_float_are_the_same_query(encoder, images):
    victim = Victim(encoder)
    assert torch.equal(victim.query(images), victim.query(images.float() / 255))
    assert victim.ledger.summary() == {"queries": 24, "distinct": 12, "calls": 2}


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
    victim = Victim(encoder, budget=10)
    victim.query(images[:6])
    with pytest.raises(BudgetExceeded, match=r"5 images.*budget of 10.*6 are spent"):
        victim.query(images[:5])
    assert victim.ledger.summary() == {"queries": 6, "distinct": 6, "calls": 1}
    victim.query(images[6:10])
    assert victim.ledger.queries == 10
    assert issubclass(BudgetExceeded, UserError)


def test_queries_change_nothing_in_the_encoder(encoder, images):
    encoder.train()
    before = copy.deepcopy(encoder.state_dict())
    victim = Victim(encoder)
    inside = copy.deepcopy(victim._encoder.state_dict())
    victim.query(images)
    victim.query(images * 0)
    for state, earlier in ((encoder.state_dict(), before), (victim._encoder.state_dict(), inside)):
        assert all(torch.equal(value, earlier[key]) for key, value in state.items())
    assert encoder.training
    assert not victim._encoder.training
    assert not any(parameter.requires_grad for parameter in victim._encoder.parameters())


def test_training_the_original_does_not_change_the_answers(encoder, images):
    victim = Victim(encoder)
    before = victim.query(images)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1)
    assert torch.equal(victim.query(images), before)


def test_defences_change_answers_in_order(encoder, images):
    seen = []

    def double(answers, images, account):
        seen.append(account)
        return 2 * answers

    def add_one(answers, images, account):
        return answers + 1

    plain = Victim(encoder).query(images)
    assert torch.equal(Victim(encoder, defences=[double, add_one]).query(images, account="x"), 2 * plain + 1)
    assert torch.equal(Victim(encoder, defences=[add_one, double]).query(images), 2 * (plain + 1))
    assert seen == ["x", "default"]


def test_version_follows_the_weights(encoder):
    version = Victim(encoder).version
    assert version == Victim(encoder).version
    with torch.no_grad():
        encoder.backbone.conv1.weight[0, 0, 0, 0] += 1
    assert version != Victim(encoder).version


def test_a_killed_attack_pays_for_no_answer_twice(encoder, images, tmp_path):
    whole = ask_once(Victim(encoder), images, tmp_path / "whole", batch_size=4)
    kept = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(kept[: 7 * 256 * 4 + 100])  # seven answers and a part of the eighth
    victim = Victim(encoder, budget=12)
    asked = []
    victim.defences.append(lambda answers, images, account: (asked.append(len(images)), answers)[1])
    answers = ask_once(victim, images, tmp_path / "cut", batch_size=4)
    assert sum(asked) == 5
    torch.testing.assert_close(answers, whole)
    assert (tmp_path / "cut").stat().st_size == len(kept)
    assert victim.ledger.queries == 12
    assert victim.ledger.distinct == 12
