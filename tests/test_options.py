"""Flags: presets, 2022 spellings, and the refusal of those that cannot act."""

import sys

import pytest

import legitimate
import linear_eval
import run
import steal
import stealhead
import steallabels
from loss import LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES
from utils import UserError


@pytest.fixture
def parse(monkeypatch):
    """What a script makes of a command line."""

    def parsed(module, line=""):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *line.split()])
        return module.parse()[1]

    return parsed


@pytest.mark.parametrize(
    ("module", "losses"), [(run, TRAIN_LOSSES), (steal, STEAL_LOSSES), (steallabels, LABEL_LOSSES)]
)
def test_presets_apply_only_where_nothing_was_given(parse, module, losses):
    for name, loss in losses.items():
        args = parse(module, f"--losstype {name}")
        expected = (loss.batch_size, loss.lr, loss.weight_decay, loss.optimizer)
        assert (args.batch_size, args.lr, args.weight_decay, args.optimizer) == expected
        args = parse(module, f"--losstype {name} -b 16 --lr 0.5 --wd 0 --optimizer sgd --momentum 0.1")
        assert (args.batch_size, args.lr, args.weight_decay, args.optimizer, args.momentum) == (16, 0.5, 0, "sgd", 0.1)


def test_presets_are_those_of_the_2022_code():
    """Batch size, learning rate, weight decay and optimizer as published, not as the table in loss.py has them."""
    victims = {"infonce": (256, 3e-4, "adam"), "softnn": (256, 1e-3, "adam"), "supcon": (256, 0.05, "sgd")}
    copies = {
        **dict.fromkeys(("mse", "softce", "bce", "wasserstein"), (64, 0.001, "adam")),
        **victims,
        "barlow": (256, 1e-3, "adam"),
        "symmetrized": (256, 0.05, "sgd"),
    }
    for table, expected in ((TRAIN_LOSSES, victims), (STEAL_LOSSES, copies)):
        for name, values in expected.items():
            loss = table[name]
            assert (loss.batch_size, loss.lr, loss.optimizer) == values
            assert (loss.weight_decay, loss.momentum) == (1e-4, 0.9)


def test_the_2022_command_lines_parse(parse):
    lines = {
        run: "-data ./datasets --dataset cifar10 --epochs 200 --arch resnet34",
        steal: "-data ./datasets --dataset cifar10 --datasetsteal svhn --epochs 100 --arch resnet34 --losstype mse "
        "--num_queries 9000",
        linear_eval: "--dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000",
    }
    for module, line in lines.items():
        args = parse(module, line)
        assert args.arch == "resnet34"
        assert str(args.data) == "datasets"
    assert (args.modeltype, args.epochs, args.epochstrain, args.lr, args.num_labeled) == (
        "stolen",
        100,
        200,
        1e-4,
        50000,
    )


def test_data_flag_has_both_spellings_and_switches_take_nothing(parse):
    for flag in ("-data", "--data"):
        args = parse(steal, f"{flag} here --force --useaug False --resume True")
        assert (str(args.data), args.force, args.useaug, args.resume) == ("here", True, False, True)
    assert parse(stealhead, "-dataset svhn --tempsn 5 --losstype softnn").dataset == "svhn"


def test_scripts_have_the_flags_that_one_of_their_losses_takes(parse):
    for module, flag in ((stealhead, "--lambda-aug"), (run, "--distance"), (steallabels, "--temperature")):
        with pytest.raises(SystemExit):
            parse(module, f"{flag} 1")


IDLE = [
    (run, "--temperaturesn 5", "with the loss infonce"),
    (run, "--losstype softnn --temperature 0.1", "with the loss softnn"),
    (run, "--momentum 0.5", "with --optimizer adam"),
    (run, "--losstype supervised --out_dim 64", "with the loss supervised"),
    (steal, "--losstype mse --temperature 0.1", "with the loss mse"),
    (steal, "--losstype mse --lambda-aug 1", "with the loss mse"),
    (steal, "--losstype mse --distance l1", "with the loss mse"),
    (steal, "--losstype stolenencoder --lambda-aug 1", "without --useaug"),
    (steal, "--copy-views 2", "without --useaug"),
    (steal, "--prototype", "with one query for each image"),
    (steal, "--out_dim 64", "with the loss infonce"),
    (steal, "--datasetsteal svhn --force", "on another data set than cifar10"),
    (steal, "--attack cont-steal --losstype mse --temperature 0.1", "with the loss mse"),
    (stealhead, "--losstype mse --losshead mse --temperature 0.1", "with the loss mse"),
    (stealhead, "--losshead msewithhead --victimhead --out_dim 64", "with --losshead msewithhead"),
    (steallabels, "--momentum 0.5", "with --optimizer adam"),
    (steallabels, "--victimtype supervised --lossvictim infonce", "with --victimtype supervised"),
    (linear_eval, "--modeltype random --victim x", "with --modeltype random"),
    (linear_eval, "--modeltype victim --datasetsteal svhn", "with --modeltype victim"),
    (linear_eval, "--modeltype victim --fidelity", "with --modeltype victim"),
    (linear_eval, "--independent random", "without --fidelity"),
    (linear_eval, "--probe knn --lr 0.1", "with --probe knn"),
    (linear_eval, "--probe mlp --save", "with --probe mlp"),
    (linear_eval, "--finetune --probe mlp", "with --finetune"),
    (linear_eval, "--recipe released --fidelity", "with --recipe released"),
]


@pytest.mark.parametrize(("module", "line", "reason"), IDLE)
def test_a_flag_that_cannot_act_is_refused(parse, module, line, reason):
    with pytest.raises(UserError, match=rf"^--\S+ has no effect {reason}.*: leave it out$"):
        parse(module, line)


def test_the_same_flags_are_taken_where_they_act(parse):
    taken = [
        (run, "--losstype softnn --temperaturesn 5"),
        (run, "--losstype supcon --momentum 0.5"),
        (steal, "--losstype stolenencoder --useaug --lambda-aug 1 --distance l1"),
        (steal, "--useaug --copy-views 1"),
        (steal, "--n-views 2 --prototype"),
        (steal, "--losstype symmetrized --out_dim 64"),
        (steal, "--force"),
        (stealhead, "--losstype mse --losshead infonce --temperature 0.1"),
        (linear_eval, "--fidelity --independent random"),
        (linear_eval, "--modeltype victim --save"),
    ]
    for module, line in taken:
        parse(module, line)


def test_modes_of_label_stealing_and_their_2022_names(parse):
    assert parse(steallabels).losstype == "direct"
    assert parse(steallabels).modeloutput == "labels"
    assert parse(steallabels, "--mode standard --modeloutput logits").losstype == "direct"
    args = parse(steallabels, "--mode knockoff")
    assert (args.losstype, args.modeloutput, args.optimizer, args.momentum) == ("knockoff", "logits", "sgd", 0.5)
    with pytest.raises(UserError, match="contradict"):
        parse(steallabels, "--mode knockoff --losstype direct")


def test_linear_evaluation_knows_an_attack_by_its_defaults(parse):
    args = parse(linear_eval, "--attack rda")
    assert (args.losstype, args.num_queries, args.arch) == ("rda", 25000, "resnet18")
    assert parse(linear_eval, "--attack conventional").lr == 1e-4  # the probe's, not the attack's
    args = parse(linear_eval, "--attack steallabels --arch resnet50")
    assert (args.losstype, args.num_queries, args.arch) == ("direct", 9000, "resnet50")
    assert parse(linear_eval, "--head").attack == "stealhead"
    assert (parse(linear_eval).losstype, parse(linear_eval).arch) == ("infonce", "resnet34")
    assert parse(linear_eval, "--modeltype victim --losstype softnn").arch == "resnet34"


# ---- defences ----


@pytest.mark.parametrize("module", [steal, stealhead, legitimate])
def test_defences_are_true_false_or_a_list(parse, module):
    assert parse(module).defence is None
    assert parse(module, "--defence False").defence is None
    assert parse(module, "--defence noise").defence == "noise"
    assert parse(module, "--defence buckets,transform,rounding").defence == "buckets,transform,rounding"
    assert parse(module, "--entropy True").defence == "entropy"
    assert parse(module, "--defence noise --entropy").defence == "noise,entropy"
    assert parse(module, "--defence entropy,noise --entropy").defence == "entropy,noise"


def test_defence_true_follows_the_loss_as_in_2022(parse):
    for losstype in STEAL_LOSSES:
        expected = "poisoning" if losstype in ("infonce", "softnn", "contsteal", "rda") else "noise"
        assert parse(steal, f"--defence True --losstype {losstype}").defence == expected
        assert parse(legitimate, f"--defence --losstype {losstype}").defence == expected
    assert parse(stealhead, "--defence True --losshead mse").defence == "noise"
    assert parse(stealhead, "--defence True --losshead infonce").defence == "poisoning"


def test_the_settings_of_defences_have_the_2022_defaults_and_the_papers(parse):
    args = parse(steal, "--defence noise,poisoning,buckets")
    assert (args.mu, args.sigma, args.poison_threshold, args.poison_memory) == (5.0, 0.5, 0.8, 10000)
    assert (args.bucket_lambda, args.bucket_alpha, args.bucket_beta) == (1e-6, 0.8, 80.0)


@pytest.mark.parametrize("text", ["foo", "noise,foo", "noise,,topk", "noise,noise", ""])
def test_defences_that_do_not_exist_are_refused(parse, capsys, text):
    with pytest.raises(SystemExit) as stop:
        parse(steal, f"--defence={text}")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--defence" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("--sigma 1", "--sigma"),
        ("--defence rounding --sigma 1", "--sigma"),
        ("--defence noise --poison-memory 3", "--poison-memory"),
        ("--secret 1", "--secret"),
        ("--defence True --losstype mse --poison-threshold 0.9", "--poison-threshold"),
    ],
)
def test_settings_of_a_defence_that_is_not_in_force_are_refused(parse, line, flag):
    with pytest.raises(UserError, match=f"{flag} has no effect with"):
        parse(steal, line)
