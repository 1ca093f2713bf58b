"""Each loss against its formula in formulas.py, in float64: values and gradients; and what it leads to."""

import functools
import inspect
import math

import pytest
import torch

from loss import DISTANCES, HEAD_LOSSES, LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES, nt_xent
from settings import settings_of
from tests.formulas import SLOW, SLOW_TRAINING, slow_labels, slow_mse_between_views, slow_rda, slow_stolenencoder
from utils import UserError

TABLES = {"train": TRAIN_LOSSES, "steal": STEAL_LOSSES, "label": LABEL_LOSSES, "head": HEAD_LOSSES}
SIZES = [(2, 3), (5, 8), (16, 32)]


def features(images, dim, views=1, scale=1.0, seed=0):
    """Non-negative rows, as representations after a ReLU are."""
    draw = torch.Generator().manual_seed(seed)
    copy, victim = (scale * torch.rand(views * images, dim, generator=draw) for _ in range(2))
    return copy, victim


def arguments(loss):
    """The names of a loss's arguments."""
    return inspect.signature(loss.function).parameters


def options_for(loss, images, views, **more):
    """What a loss needs of: labels, the number of views."""
    available = {"labels": torch.arange(images) % max(2, images // 3), "views": views, **more}
    return {argument: value for argument, value in available.items() if argument in arguments(loss)}


def test_every_loss_has_a_slow_formula():
    assert set(SLOW) == set(STEAL_LOSSES)
    assert set(SLOW_TRAINING) == set(TRAIN_LOSSES)


def assert_agree(fast, slow, *features, **options):
    """Value and gradient (by the first argument) of the float32 loss against the formula in float64."""
    first, *others = features
    copy32 = first.clone().requires_grad_()
    copy64 = first.double().requires_grad_()
    value = fast(copy32, *others, **options)
    expected = slow(copy64, *(other.double() for other in others), **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(value, copy32)
    (expected_gradient,) = torch.autograd.grad(expected, copy64)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", SLOW)
def test_matches_the_formula(name, scale, size):
    views, (images, dim) = STEAL_LOSSES[name].min_views, size
    images += name == "barlow"  # standardised, two rows are 1 and -1, whatever they were: there is no gradient
    copy, victim = features(images, dim, views, scale=scale)
    assert_agree(STEAL_LOSSES[name], SLOW[name], copy, victim, **options_for(STEAL_LOSSES[name], images, views))


@pytest.mark.parametrize("name", [name for name, loss in STEAL_LOSSES.items() if "views" in arguments(loss)])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_several_views_match_the_formula(name, views):
    copy, victim = features(6, 8, views)
    assert_agree(STEAL_LOSSES[name], SLOW[name], copy, victim, views=views)


@pytest.mark.parametrize("views", [2, 4, 5])
def test_rda_compares_rows_of_each_view_by_itself(views):
    """As many rows as views times images, each with its image's prototype: by the formula, and not as other views."""
    copy, prototypes = features(6, 8, views)
    victim = prototypes[:6].repeat(views, 1)
    loss = STEAL_LOSSES["rda"].bind({"temperature": 0.3})
    value = loss.of_batch(views)(torch.arange(6), copy, victim)
    expected = slow_rda(copy.double(), victim.double(), temperature=0.3, views=views)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    for others in {1, 2, 3, 6} - {views}:
        assert not torch.isclose(value, loss(copy[: 6 * others], victim[: 6 * others], views=others), rtol=1e-3)
    assert_agree(loss, functools.partial(slow_rda, temperature=0.3), copy, victim, views=views)


@pytest.mark.parametrize("name", [name for name, loss in STEAL_LOSSES.items() if "temperature" in arguments(loss)])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 10.0])
def test_temperature_matches_the_formula(name, temperature):
    loss = STEAL_LOSSES[name]
    copy, victim = features(6, 8, views=2)
    assert_agree(loss, SLOW[name], copy, victim, temperature=temperature, **options_for(loss, 6, 2))


BOUND = {"temperature": 0.4, "temperaturesn": 0.7, "lambda_aug": 2.5, "distance": "cosine"}


@pytest.mark.parametrize("name", [name for name, loss in STEAL_LOSSES.items() if loss.settings])
def test_bound_hyper_parameters_are_those_that_the_loss_is_computed_with(name):
    """By `of_batch` as the trainer calls it, against the formula; an argument of the call has the last word."""
    loss = STEAL_LOSSES[name]
    values = {key: BOUND[key] for key in loss.settings}
    copy, victim = features(6, 8, views=2)
    options = {settings_of(loss)[key].argument or key: value for key, value in values.items()}
    expected = SLOW[name](copy.double(), victim.double(), **options_for(loss, 6, 2), **options)
    labels = torch.arange(20) % 2
    index = torch.arange(12, 18)  # of whose images the labels are those of `options_for`
    value = loss.bind(values).of_batch(2, labels if loss.needs_labels else None)(index, copy, victim)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(value, loss(copy, victim, **options_for(loss, 6, 2)), rtol=1e-3)
    defaults = {argument: arguments(loss)[argument].default for argument in options}
    again = loss.bind(values)(copy, victim, **options_for(loss, 6, 2), **defaults)
    torch.testing.assert_close(again, loss(copy, victim, **options_for(loss, 6, 2)))
    assert loss.values == {}  # binding makes another loss


@pytest.mark.parametrize("table", TABLES, ids=TABLES)
def test_declared_defaults_are_those_of_the_function(table):
    """`loss(copy, victim)` by itself and a script without flags compute the same; so does a companion."""
    for loss in TABLES[table].values():
        known = {**(inspect.signature(loss.companion).parameters if loss.companion else {}), **arguments(loss)}
        for key, declared in settings_of(loss).items():
            assert declared.default == known[declared.argument or key].default


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("infonce", {"temperature": 0.0}),
        ("infonce", {"temperature": math.nan}),
        ("softnn", {"temperaturesn": -1.0}),
        ("stolenencoder", {"distance": "l3"}),
        ("stolenencoder", {"lambda_aug": -0.5}),
    ],
    ids=str,
)
def test_hyper_parameters_out_of_range_are_refused(name, values):
    ((key, value),) = values.items()
    with pytest.raises(UserError, match=f"--{key.replace('_', '-')} {value} ") as caught:
        STEAL_LOSSES[name].bind(values)
    assert "\n" not in str(caught.value)


def test_presets_of_published_recipes():
    """A weight decay that is another one than the default is easily lost."""
    decays = {name: loss.presets["weight_decay"] for name, loss in STEAL_LOSSES.items()}
    assert decays == {
        **dict.fromkeys(STEAL_LOSSES, 1e-4),
        **{"contsteal": 0.0, "contsteal-paper": 0.0, "stolenencoder": 5e-4},
    }
    assert TRAIN_LOSSES["supervised"].presets == {
        **{"batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "optimizer": "sgd", "momentum": 0.9}
    }
    assert LABEL_LOSSES["direct"].presets["weight_decay"] == 8e-4
    assert LABEL_LOSSES["knockoff"].presets == {
        **{"batch_size": 64, "lr": 0.01, "weight_decay": 5e-4, "optimizer": "sgd", "momentum": 0.5}
    }


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("lambda_aug", [0.0, 2.5])
def test_stolenencoder_distances_and_lambda(distance, lambda_aug):
    copy, victim = features(6, 8, views=3)
    options = {"views": 3, "distance": distance, "lambda_aug": lambda_aug}
    assert_agree(STEAL_LOSSES["stolenencoder"], slow_stolenencoder, copy, victim, **options)


@pytest.mark.parametrize("images", [2, 7])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("name", SLOW_TRAINING)
def test_training_losses_match_the_formula(name, views, images):
    loss, draws = TRAIN_LOSSES[name], torch.Generator().manual_seed(1)
    rows = torch.randn(images * views, 5, generator=draws)
    compared = [torch.randn(images * views, 5, generator=draws)] if loss.companion else []
    if name == "moco":  # the first view's queries; the others' keys, and a queue
        rows, compared = rows[:images], [torch.randn((views - 1) * images + 9, 5, generator=draws)]
    assert_agree(loss, SLOW_TRAINING[name], rows, *compared, **options_for(loss, images, views))


def test_mse_between_views_matches_the_formula():
    rows, _ = features(5, 4, views=3)
    assert_agree(HEAD_LOSSES["mse"], slow_mse_between_views, rows, views=3)


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_label_losses_match_the_formula(name):
    logits, answers = features(7, 4)
    for target in (answers.softmax(dim=1), torch.eye(4)[answers.argmax(dim=1)]):
        assert_agree(LABEL_LOSSES[name], slow_labels, logits, target)


def test_training_infonce_is_lowest_for_equal_views():
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    assert nt_xent(torch.cat([rows, rows])) < nt_xent(torch.cat([rows, rows.roll(1, 0)]))


def test_nt_xent_against_pytorch_cross_entropy():
    """An independent route to NT-Xent: rows of logits without the diagonal, the positive as the class."""
    rows = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
    unit = torch.nn.functional.normalize(rows, dim=1)
    logits = (unit @ unit.T / 0.07)[~torch.eye(10, dtype=torch.bool)].view(10, 9)
    positive = torch.tensor([4, 5, 6, 7, 8, 0, 1, 2, 3, 4])
    torch.testing.assert_close(nt_xent(rows), torch.nn.functional.cross_entropy(logits, positive))


@pytest.mark.parametrize("name", SLOW)
def test_shuffled_answers_change_the_loss(name):
    loss = STEAL_LOSSES[name]
    copy, victim = features(16, 32, loss.min_views)
    victim = (victim - 0.5).clamp_min(0)  # with units that are not active, for bce
    shuffled = torch.cat([rows.roll(1, 0) for rows in victim.chunk(loss.min_views)])
    options = options_for(loss, 16, loss.min_views)
    assert not torch.isclose(loss(copy, victim, **options), loss(copy, shuffled, **options), rtol=1e-4)


def correlation(copy, victim):
    """Mean correlation over the images of a copy's dimension with the victim's."""
    copy, victim = copy - copy.mean(0), victim - victim.mean(0)
    return torch.nn.functional.cosine_similarity(copy, victim, dim=0).mean()


def cosine_of(copy, victim):
    return torch.nn.functional.cosine_similarity(copy, victim).mean()


def same_label_cosine(copy, victim):
    """Cosine to the answers of the label less that to the others'."""
    labels = torch.arange(len(copy)) % 5
    unit_copy, unit_victim = (torch.nn.functional.normalize(rows, dim=1) for rows in (copy, victim))
    similarity, same = unit_copy @ unit_victim.T, labels[:, None] == labels[None, :]
    return similarity[same].mean() - similarity[~same].mean()


def rank_of_match(copy, victim):
    """Share of the copy's rows whose nearest answer by cosine is that of their own image."""
    unit_copy, unit_victim = (torch.nn.functional.normalize(rows, dim=1) for rows in (copy, victim))
    return ((unit_copy @ unit_victim.T).argmax(dim=1) == torch.arange(len(copy))).float().mean()


# What a loss is about: larger is closer to the victim, and where a copy that learnt it should end at least.
ABOUT = {
    "infonce": (rank_of_match, 0.99),
    **dict.fromkeys(("contsteal", "contsteal-paper", "contsteal-rda", "rda"), (rank_of_match, 0.99)),
    "softnn": (lambda a, b: -torch.cdist(a, b).diagonal().mean(), -0.3),
    "supcon": (same_label_cosine, 0.1),
    "symmetrized": (cosine_of, 0.98),
    "barlow": (correlation, 0.95),
    "mse": (lambda a, b: -(a - b).square().mean(), -1e-3),
    "cosine": (cosine_of, 0.99),
    "softce": (lambda a, b: -(a.softmax(1) - b.softmax(1)).abs().sum(1).mean(), -0.05),
    "bce": (lambda a, b: ((a > 0) == (b > 0)).float().mean(), 0.99),
    "wasserstein": (lambda a, b: -STEAL_LOSSES["wasserstein"](a, b), -0.1),
    "stolenencoder": (cosine_of, 0.99),
}


@pytest.mark.parametrize("name", STEAL_LOSSES)
def test_minimising_on_free_vectors_approaches_the_victim(name):
    loss = STEAL_LOSSES[name]
    copy, victim = features(20, 8, loss.min_views)
    if name == "bce":
        victim = (victim - 0.5).clamp_min(0)
    if name == "symmetrized":  # the two views of an image have one answer, as an invariant victim's would
        victim = victim[:20].repeat(2, 1)
    options = options_for(loss, 20, loss.min_views) | ({"labels": torch.arange(20) % 5} if loss.needs_labels else {})
    if name == "softnn":
        options["temperature"] = 0.1
    measure, goal = ABOUT[name]
    copy.requires_grad_()
    optimizer = torch.optim.Adam([copy], lr=0.02)
    before = measure(copy.detach(), victim)
    for _ in range(400):
        optimizer.zero_grad()
        loss(copy, victim, **options).backward()
        optimizer.step()
        if name == "wasserstein":
            copy.data.clamp_min_(0)  # the loss is about rows like those after a ReLU
    after = measure(copy.detach(), victim)
    assert before < goal < after


@functools.cache
def positives_first(rows, images):
    """The other rows of each row, (rows, rows - 1): those of its image, then all others, each in their order."""
    others = [[j for j in range(rows) if j != i] for i in range(rows)]
    return torch.tensor([sorted(row, key=lambda j: j % images != i % images) for i, row in enumerate(others)])


def infonce_of_2022(copy, victim, temperature=0.07, views=2):
    """As the 2022 code computes it: a row's logits are its positives, then its negatives, and the class is the first.

    The rows are the copy's of the first view and of the second, then the victim's: the copy's two views have each other
    as the class, both of the victim's the copy's first view.
    """
    rows = torch.nn.functional.normalize(torch.cat([copy, victim]), dim=1)
    logits = (rows @ rows.T / temperature).gather(1, positives_first(len(rows), len(copy) // views))
    return torch.nn.functional.cross_entropy(logits, torch.zeros(len(rows), dtype=torch.int64))


def cosines_of_two_views(loss, seed):
    """How close a copy's free rows of 20 images get to the victim's: the mean cosine of each of two views, (2,)."""
    draw = torch.Generator().manual_seed(seed)
    image = torch.rand(20, 32, generator=draw)
    victim = torch.cat([image + 0.5 * torch.rand(20, 32, generator=draw) for _ in range(2)])
    copy = torch.rand(40, 32, generator=draw).requires_grad_()
    optimizer = torch.optim.Adam([copy], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss(copy, victim, views=2).backward()
        optimizer.step()
    return torch.nn.functional.cosine_similarity(copy, victim).detach().view(2, -1).mean(dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_infonce_aligns_both_views_where_that_of_2022_favours_the_first(seed):
    of_2022, here = (cosines_of_two_views(loss, seed) for loss in (infonce_of_2022, STEAL_LOSSES["infonce"]))
    assert of_2022.tolist() == pytest.approx([0.94, 0.85], abs=0.01)
    assert here.tolist() == pytest.approx([0.95, 0.95], abs=0.01)
    assert abs(here[0] - here[1]) < 0.005


def test_infonce_of_a_single_view_is_that_of_2022():
    copy, victim = features(6, 8)
    expected = infonce_of_2022(copy, victim, views=1)
    torch.testing.assert_close(STEAL_LOSSES["infonce"](copy, victim), expected)


def test_no_gradient_reaches_the_symmetrized_target():
    copy, victim = features(4, 6, views=2)
    victim.requires_grad_()
    value = STEAL_LOSSES["symmetrized"](copy.requires_grad_(), victim)
    assert torch.autograd.grad(value, victim, allow_unused=True) == (None,)


@pytest.mark.parametrize("name", ["rda", "stolenencoder", "cosine", "mse", "contsteal"])
def test_a_perfect_copy_gives_finite_values_and_gradients(name):
    copy, victim = features(5, 6)
    copy = victim.clone().requires_grad_()
    value = STEAL_LOSSES[name](copy, victim)
    (gradient,) = torch.autograd.grad(value, copy)
    assert value.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("distance", [1e3, 1e6])
def test_softnn_survives_distances_whose_exponential_underflows(distance):
    """The formula itself divides 0 by 0 here; its limit is the nearest row's share."""
    copy = distance * torch.eye(4)
    copy.requires_grad_()
    value = STEAL_LOSSES["softnn"](copy, copy.detach() * 1.0001)
    (gradient,) = torch.autograd.grad(value, copy)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert value.item() == pytest.approx(0, abs=1e-3)
    # Every row nearest to another image's row: the loss is how much farther the image's own row is.
    wrong = STEAL_LOSSES["softnn"](copy.detach(), copy.detach().roll(1, 0))
    assert wrong.item() == pytest.approx(2 * distance**2 / 100, rel=1e-3)


@pytest.mark.parametrize("defence", ["noise", "poisoning"])
def test_softnn_has_a_gradient_under_the_default_defences(defence):
    """The floor of the 2022 formula, 1e-9, made it exactly 0: the attack trained on nothing, without a word."""
    copy, victim = features(32, 64, scale=2.0)
    answers = victim + 5 + 0.5 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    if defence == "poisoning":
        answers = 1000 + 0.5 * torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    copy.requires_grad_()
    (gradient,) = torch.autograd.grad(STEAL_LOSSES["softnn"](copy, answers), copy)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax(dim=1) > 0).all()


def test_wasserstein_refuses_rows_that_are_no_histograms():
    copy, victim = features(5, 6)
    for rows in ((copy - 0.5, victim), (copy, victim - 0.5)):
        with pytest.raises(UserError, match=r"a row has a negative number: give another --losstype$"):
            STEAL_LOSSES["wasserstein"](*rows)


def test_cont_steal_as_released_is_infonce_at_its_temperature():
    copy, victim = features(6, 8)
    released, paper, rda = (STEAL_LOSSES[name] for name in ("contsteal", "contsteal-paper", "contsteal-rda"))
    torch.testing.assert_close(released(copy, victim), STEAL_LOSSES["infonce"](copy, victim, temperature=0.5))
    torch.testing.assert_close(released(copy, victim), released(victim, copy))  # both ways
    assert not torch.isclose(paper(copy, victim), paper(victim, copy), rtol=1e-4)
    assert not torch.isclose(rda(copy, victim, temperature=0.5), paper(copy, victim), rtol=1e-4)


@pytest.mark.parametrize("name", ["stolenencoder", "rda", "contsteal", "contsteal-paper", "contsteal-rda"])
def test_the_scale_of_the_copys_rows_does_not_matter_to_losses_of_unit_rows(name):
    copy, victim = features(6, 8, views=2)
    loss = functools.partial(STEAL_LOSSES[name], views=2)
    torch.testing.assert_close(loss(3 * copy, victim), loss(copy, victim))


def test_stolenencoder_sums_over_the_batch():
    copy, victim = features(6, 8)
    halves = [STEAL_LOSSES["stolenencoder"](copy[part], victim[part]) for part in (slice(2), slice(2, 6))]
    torch.testing.assert_close(STEAL_LOSSES["stolenencoder"](copy, victim), sum(halves))


def test_softnn_far_from_the_origin_keeps_its_precision():
    copy, victim = features(8, 16)
    options = {"temperature": 1.0}
    assert_agree(STEAL_LOSSES["softnn"], SLOW["softnn"], copy + 100, victim + 100, **options)


def test_softnn_makes_no_float64():
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (_assert_single(t), t)[1], lambda t: t):
        copy, victim = features(8, 16)
        STEAL_LOSSES["softnn"](copy.requires_grad_(), victim)


def _assert_single(tensor):
    assert tensor.dtype != torch.float64
