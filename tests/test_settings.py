"""Settings: what a declaration gives to flags, ranges, refusals, the line `in force` and config.yml."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

import detect
import legitimate
import linear_eval
import linsimsiam
import run
import serve
import steal
import stealhead
import steallabels
import stealsimsiam
import verify
from attacks import ATTACKS
from defenses import DEFENCES
from loss import HEAD_LOSSES, LABEL_LOSSES, STEAL_LOSSES, TRAIN_LOSSES
from settings import Parser, Settings, setting, settings_of
from training.objective import Loss
from training.recipe import PRESETS, Recipe
from utils import UserError

SCRIPTS = {
    run: "",
    steal: "",
    stealhead: "",
    steallabels: "",
    stealsimsiam: "",
    linear_eval: "",
    linsimsiam: "",
    legitimate: "",
    verify: "--method watermark --victim v --suspect s",
    detect: "--victim v",
    serve: "--victim v",
}


def parse(module, line=""):
    return module.parse(line.split())


# ---- a declaration ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toaster(Settings):
    heat: float = setting(0.5, "heat", above=0, at_most=1)
    slices: int = setting(2, "slices", at_least=1, below=5, flags=("-s", "--slices"))
    bread: str = setting("rye", "bread", choices=("rye", "white"))
    crumbs: bool = setting(False, "leave crumbs", acts=lambda command: None if command.heat > 0.2 else "without heat")
    shelf: Path | None = setting(None, "where it stands", named=False)
    plug: str = "E"

    @classmethod
    def absent(cls, command):
        return "without a toaster"


@dataclass(frozen=True)
class Kettle(Settings):
    litres: float = setting(1.0, "litres", at_least=0)


def toaster(line="", **options):
    return Parser("Breakfast", [Toaster, Kettle], kind="toast", core=("bread",), **options).parse(line.split())


def test_values_are_the_given_ones_then_the_layers_then_the_defaults():
    command = toaster("--heat 0.3")
    made = command.use(Toaster, {"heat": 0.9, "slices": 3}, {"slices": 4}, plug="G")
    assert made == Toaster(heat=0.3, slices=3, plug="G")
    assert (command.heat, command.slices, command.bread) == (0.3, 3, "rye")
    assert command[Toaster] is made
    assert command.given == {"heat": 0.3}


@pytest.mark.parametrize("value", ["0", "1.01", "-1", "nan", "inf", "much"])
def test_a_number_out_of_range_is_a_line_and_exit_code_2(value, capsys):
    with pytest.raises(SystemExit) as stop:
        toaster(f"--heat={value}")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"--heat: '{value}' is not a number above 0 and of at most 1" in err
    assert err.count("\n") == 1


def test_ranges_and_choices_hold_in_python_too():
    for bad in ({"heat": 0.0}, {"heat": math.nan}, {"slices": 5}, {"slices": 0}, {"bread": "cake"}):
        with pytest.raises(UserError, match=next(iter(bad))):
            Toaster(**bad)
    Toaster(heat=1.0, slices=4, bread="white", shelf=Path())


@pytest.mark.parametrize("line", ["--crumbs", "--crumbs True", "--crumbs=true", "--crumbs TRUE -s 1"])
def test_switches_take_nothing_or_a_word(line):
    assert toaster(line).crumbs is True
    assert toaster("--crumbs False").crumbs is False


def test_idle_flags_are_refused_unless_they_say_what_holds_anyway():
    command = toaster("--litres 2 --heat 0.1")
    command.use(Toaster)
    with pytest.raises(UserError, match=r"^--litres has no effect here: leave it out$"):
        command.refuse_idle()
    command = toaster("--heat 0.1 --crumbs")
    command.use(Toaster)
    with pytest.raises(UserError, match=r"^--crumbs has no effect without heat: leave it out$"):
        command.refuse_idle()
    command = toaster("--heat 0.3 --litres 1")
    command.use(Kettle)
    with pytest.raises(UserError, match="--heat has no effect without a toaster"):
        command.refuse_idle()
    for line in ("--heat 0.1 --crumbs False --litres 1.0", "--heat 0.3 --crumbs"):
        command = toaster(line)
        command.use(Toaster)
        command.refuse_idle()


def test_what_acts_is_in_the_line_and_in_the_config():
    command = toaster("--heat 0.1 --shelf here")
    command.use(Toaster)
    assert command.line() == "in force: heat 0.1, slices 2, bread rye"
    assert command.config() == {"heat": 0.1, "slices": 2, "bread": "rye", "shelf": Path("here")}


def test_a_script_may_have_other_defaults_and_spellings_and_fewer_flags():
    options = {"defaults": {"slices": 3}, "flags": {"heat": ("--fire",)}, "without": ("crumbs",), "fixed": {"toast": 1}}
    command = toaster("--fire 0.7", **options)
    assert command.use(Toaster) == Toaster(heat=0.7, slices=3)
    assert command.toast == 1
    assert command.config() == {"toast": 1, "heat": 0.7, "slices": 3, "bread": "rye", "shelf": None}
    with pytest.raises(SystemExit):
        toaster("--crumbs", **options)


# ---- the scripts' declarations ---------------------------------------------------------------------------------------

NUMBERS = [
    (module, name)
    for module in SCRIPTS
    for name, declared in sorted(module.make_parser().settings.items())
    if declared.kind in (int, float)
]
UNBOUNDED = {"seed", "secret", "mu"}  # any finite number


@pytest.mark.parametrize(("module", "name"), NUMBERS, ids=[f"{module.__name__}-{name}" for module, name in NUMBERS])
def test_every_number_has_a_range_that_is_checked(module, name, capsys):
    declared = module.make_parser().settings[name]
    limits = (declared.above, declared.at_least, declared.below, declared.at_most)
    assert any(limit is not None for limit in limits) or name in UNBOUNDED
    bad = ["nan", "inf", "x"] if name in UNBOUNDED else ["nan", "-2", "x", "-inf"]
    for value in bad:
        with pytest.raises(SystemExit) as stop:
            parse(module, f"{SCRIPTS[module]} {declared.flag}={value}")
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert f"{value!r} is not" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__)
def test_both_spellings_of_every_flag_work(module):
    for declared in module.make_parser().settings.values():
        for flag in (declared.flag, *declared.flags):
            if not flag.startswith("--") or declared.kind not in (int, bool) or declared.read:
                continue
            value = "False" if declared.kind is bool else str(declared.default or max(3, declared.at_least or 0))
            for spelled in (flag, "--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")):
                words = [*SCRIPTS[module].split(), f"{spelled}={value}"]
                assert declared.name in module.make_parser().parse(words).given, spelled


def test_every_setting_has_a_help_text_that_can_be_read_alone():
    for module in SCRIPTS:
        for name, declared in module.make_parser().settings.items():
            assert declared.text, name
            assert not declared.text.startswith(("of ", "that ", "for ")), (name, declared.text)


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "losses"), [(run, TRAIN_LOSSES), (steal, STEAL_LOSSES), (steallabels, LABEL_LOSSES)]
)
def test_presets_apply_only_where_nothing_was_given(module, losses):
    for name, loss in losses.items():
        recipe = parse(module, f"--losstype {name}")[Recipe]
        expected = (loss.batch_size, loss.lr, loss.weight_decay, loss.optimizer)
        assert (recipe.batch_size, recipe.lr, recipe.weight_decay, recipe.optimizer) == expected
        recipe = parse(module, f"--losstype {name} -b 16 --lr 0.5 --wd 0 --optimizer sgd --momentum 0.1")[Recipe]
        given = (recipe.batch_size, recipe.lr, recipe.weight_decay, recipe.optimizer, recipe.momentum)
        assert given == (16, 0.5, 0, "sgd", 0.1)


def test_an_attacks_values_come_before_the_losss_and_after_what_was_given():
    recipe = parse(steal, "--attack conventional")[Recipe]
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size) == (3e-4, 0.0, 32)
    assert parse(steal, "--attack conventional --lr 0.1 --wd 0.5")[Recipe].weight_decay == 0.5
    assert parse(steal, "--attack rda --wd 0.5")[Recipe].weight_decay == 0.5


# Batch size, learning rate, weight decay, optimizer and momentum as published, not as the tables in loss.py have them.
ADAM, SGD = ("adam", 0.9), ("sgd", 0.9)
CONTRASTIVE = {
    "infonce": (256, 3e-4, 1e-4, *ADAM),
    "softnn": (256, 1e-3, 1e-4, *ADAM),
    "supcon": (256, 0.05, 1e-4, *SGD),
}
PUBLISHED = [
    (
        TRAIN_LOSSES,
        {
            **CONTRASTIVE,
            "barlow": (256, 3e-4, 1e-4, *ADAM),
            # Besides these the epochs before the cosine, those of the warm-up, the width of the projections.
            "simsiam": (512, 0.06, 5e-4, *SGD, 0, 2048),
            "byol": (512, 0.4, 1.5e-6, "lars", 0.9, 0, 10, 256),
            "moco": (512, 0.06, 5e-4, *SGD, 0),
            "supervised": (128, 0.1, 5e-4, *SGD),
        },
    ),
    (
        STEAL_LOSSES,
        {
            **CONTRASTIVE,
            **dict.fromkeys(("mse", "cosine", "softce", "bce", "wasserstein"), (64, 0.001, 1e-4, *ADAM)),
            "barlow": (256, 1e-3, 1e-4, *ADAM),
            "symmetrized": (256, 0.05, 1e-4, *SGD),
            **dict.fromkeys(("contsteal", "contsteal-paper"), (32, 3e-4, 0.0, *ADAM)),
            "contsteal-rda": (100, 1e-3, 1e-4, *ADAM),
            "stolenencoder": (64, 1e-3, 5e-4, *SGD),
            "rda": (100, 1e-3, 1e-4, *ADAM),
        },
    ),
    (LABEL_LOSSES, {"direct": (64, 3e-4, 8e-4, *ADAM), "knockoff": (64, 0.01, 5e-4, "sgd", 0.5)}),
    (HEAD_LOSSES, dict.fromkeys(("infonce", "softnn", "mse", "msewithhead"), (256, 1e-3, 1e-4, *ADAM))),
]


@pytest.mark.parametrize(("table", "expected"), PUBLISHED)
def test_presets_are_the_published_ones(table, expected):
    assert table.keys() == expected.keys()
    for name, values in expected.items():
        assert tuple(table[name].presets.values()) == values, name


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_its_preset(name):
    command = parse(steal, f"--attack {name}")
    for setting_name, value in ATTACKS[name].items():
        assert getattr(command, setting_name) == value


@pytest.mark.parametrize("name", PRESETS)
def test_a_victims_preset_is_in_force(name):
    command = parse(run, f"--preset {name}")
    for setting_name, value in {**PRESETS[name], "preset": name}.items():
        assert getattr(command, setting_name) == command.config()[setting_name] == value
        assert f"{setting_name} {value}" in command.line()
    loss = command[Loss]
    assert loss.augment == PRESETS[name].get("views", "simclr")
    assert loss.values["temperature"] == PRESETS[name].get("temperature", 0.07)
    assert command[Recipe].batch_size == PRESETS[name].get("batch_size", 256)


def test_the_preset_of_2022_is_what_holds_without_a_preset():
    for losstype in TRAIN_LOSSES:
        line = f"--losstype {losstype}"
        assert parse(run, line).config() == parse(run, f"{line} --preset 2022").config()
    assert "views" in parse(run).config()
    assert "simclr" not in parse(run).line()  # the loss's own views, as before there was a preset


def test_a_flag_comes_before_a_victims_preset():
    command = parse(
        run, "--preset modern -b 64 --temperature 0.1 --views mild --flat-epochs 3 --optimizer sgd --lr 0.2"
    )
    recipe, loss = command[Recipe], command[Loss]
    assert (recipe.batch_size, recipe.flat_epochs, recipe.optimizer, recipe.lr) == (64, 3, "sgd", 0.2)
    assert (loss.values["temperature"], loss.augment) == (0.1, "mild")


def test_a_loss_has_of_a_preset_what_is_a_setting_of_its_own():
    assert parse(run, "--preset modern --losstype softnn")[Loss].values == {"temperaturesn": 100.0}
    assert parse(run, "--preset modern --losstype barlow")[Loss].values == {}
    assert parse(run, "--preset modern --losstype moco")[Loss].values["temperature"] == 0.2
    assert parse(run, "--preset modern --losstype byol")[Recipe].warmup_epochs == 10
    assert parse(run, "--losstype supervised --views mild")[Loss].augment == "mild"
    assert parse(run, "--losstype supervised")[Loss].augment == "crop-flip"


def test_a_loss_sets_what_its_authors_set_besides_the_recipe():
    """Where nothing else is given: width of the projections, schedule, hyper-parameters of what it trains beside."""
    expected = {
        "simsiam": {"out_dim": 2048, "flat_epochs": 0, "warmup_epochs": 0},
        "byol": {"out_dim": 256, "flat_epochs": 0, "warmup_epochs": 10, "ema": 0.996},
        "moco": {"out_dim": 128, "flat_epochs": 0, "ema": 0.99, "queue": 4096, "bn_groups": 8, "temperature": 0.1},
    }
    for name, values in expected.items():
        config = parse(run, f"--losstype {name}").config()
        assert {key: config[key] for key in values} == values
    command = parse(run, "--losstype byol --out_dim 64 --ema 0.9 --flat-epochs 3")
    assert (command.out_dim, command[Loss].values, command[Recipe].flat_epochs) == (64, {"ema": 0.9}, 3)


def test_the_2022_command_lines_parse():
    lines = {
        run: "-data ./datasets --dataset cifar10 --epochs 200 --arch resnet34",
        steal: "-data ./datasets --dataset cifar10 --datasetsteal svhn --epochs 100 --arch resnet34 --losstype mse "
        "--num_queries 9000",
        linear_eval: "--dataset cifar10 --datasetsteal svhn --dataset-test stl10 --losstype mse --num_queries 9000",
    }
    for module, line in lines.items():
        command = parse(module, line)
        assert command.arch == "resnet34"
        assert str(command.data) == "datasets"
    assert (command.modeltype, command.epochs, command.lr, command.num_labeled) == ("stolen", 100, 1e-3, 50000)


def test_batch_files_of_2022_that_say_what_holds_anyway_are_accepted():
    parse(steal, "--losstype mse --force False --temperature 0.07 --momentum 0.9 --datasetsteal svhn --sigma 0.5")
    parse(run, "--losstype infonce --temperaturesn 100 --momentum 0.9")


def test_data_flag_has_both_spellings_and_switches_take_nothing():
    for flag in ("-data", "--data"):
        command = parse(steal, f"{flag} here --force --useaug False --resume True")
        assert (str(command.data), command.force, command.useaug, command.resume) == ("here", True, False, True)
    assert parse(stealhead, "-dataset svhn --tempsn 5 --losstype softnn").dataset == "svhn"


def test_scripts_have_the_flags_that_one_of_their_losses_takes():
    for module, flag in ((stealhead, "--lambda-aug"), (run, "--distance"), (steallabels, "--temperature")):
        with pytest.raises(SystemExit):
            parse(module, f"{flag} 1")


# ---- refusals --------------------------------------------------------------------------------------------------------

IDLE = [
    (run, "--temperaturesn 5", "with the loss infonce"),
    (run, "--losstype softnn --temperature 0.1", "with the loss softnn"),
    (run, "--momentum 0.5", "with --optimizer adam"),
    (run, "--losstype supervised --out_dim 64", "with the loss supervised"),
    (run, "--ema 0.9", "with the loss infonce"),
    (run, "--losstype simsiam --ema 0.9", "with the loss simsiam"),
    (run, "--losstype byol --queue 9", "with the loss byol"),
    (run, "--losstype barlow --bn-groups 2", "with the loss barlow"),
    (run, "--losstype moco --watermark True", "with the loss moco"),
    (run, "--losstype byol --recipe released", "with the loss byol"),
    (run, "--losstype supervised --preset modern", "with the loss supervised"),
    (run, "--recipe released --preset modern", "with --recipe released"),
    (run, "--sslguard v --preset modern", "with --sslguard"),
    (run, "--sslguard v --views mild", "with --sslguard"),
    (steal, "--losstype mse --temperature 0.1", "with the loss mse"),
    (steal, "--losstype mse --lambda-aug 1", "with the loss mse"),
    (steal, "--losstype mse --distance l1", "with the loss mse"),
    (steal, "--losstype stolenencoder --lambda-aug 1", "without --useaug"),
    (steal, "--copy-views 2", "without --useaug"),
    (steal, "--prototype", "with one query per image"),
    (steal, "--out_dim 64", "with the loss infonce"),
    (steal, "--dataset cifar10 --datasetsteal svhn --force", "on another data set than cifar10"),
    (steal, "--attack cont-steal --losstype mse --temperature 0.1", "with the loss mse"),
    (steal, "--shared 9", "without --sybils"),
    (steal, "--sigma 1", "without --defence"),
    (steal, "--defence rounding --sigma 1", "with --defence rounding"),
    (steal, "--defence noise --poison-memory 3", "with --defence noise"),
    (steal, "--secret 1", "without --defence"),
    (steal, "--defence True --losstype mse --poison-threshold 0.9", "with --defence noise"),
    (stealhead, "--losstype mse --losshead mse --temperature 0.1", "with the loss mse"),
    (stealhead, "--losshead msewithhead --victimhead --out_dim 64", "with --losshead msewithhead"),
    (steallabels, "--momentum 0.5", "with --optimizer adam"),
    (steallabels, "--victimtype supervised --lossvictim softnn", "with --victimtype supervised"),
    (stealsimsiam, "--evaluate", "here"),
    (stealsimsiam, "--useaug False --copy-views 2", "without --useaug"),
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
def test_a_flag_that_cannot_act_is_refused(module, line, reason):
    with pytest.raises(UserError, match=rf"^--\S+ has no effect {reason}.*: leave it out$"):
        parse(module, line)


def test_the_same_flags_are_taken_where_they_act():
    taken = [
        (run, "--losstype softnn --temperaturesn 5"),
        (run, "--losstype supcon --momentum 0.5"),
        (steal, "--losstype stolenencoder --useaug --lambda-aug 1 --distance l1"),
        (steal, "--useaug --copy-views 1"),
        (steal, "--n-views 2 --prototype"),
        (steal, "--losstype symmetrized --out_dim 64"),
        (steal, "--dataset cifar10 --force"),
        (steal, "--sybils 2 --shared 9"),
        (stealhead, "--losstype mse --losshead infonce --temperature 0.1"),
        (linear_eval, "--fidelity --independent random"),
        (linear_eval, "--modeltype victim --save"),
    ]
    for module, line in taken:
        parse(module, line)


def test_modes_of_label_stealing_and_their_2022_names():
    assert parse(steallabels).losstype == "direct"
    assert parse(steallabels).modeloutput == "labels"
    assert parse(steallabels, "--mode standard --modeloutput logits").losstype == "direct"
    command = parse(steallabels, "--mode knockoff")
    recipe = command[Recipe]
    chosen = (command.losstype, command.modeloutput, recipe.optimizer, recipe.momentum)
    assert chosen == ("knockoff", "logits", "sgd", 0.5)
    with pytest.raises(UserError, match="contradict"):
        parse(steallabels, "--mode knockoff --losstype direct")


# ---- defences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["foo", "noise,foo", "noise,,topk", "noise,noise", ""])
def test_defences_that_do_not_exist_are_refused(capsys, text):
    with pytest.raises(SystemExit) as stop:
        steal.parse([f"--defence={text}"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--defence" in err
    assert err.count("\n") == 1


DEFAULTS = {
    "noise": {"mu": 5.0, "sigma": 0.5},
    "poisoning": {"sigma": 0.5, "poison_threshold": 0.8, "poison_memory": 10000},
    "buckets": {"bucket_lambda": 1e-6, "bucket_alpha": 0.8, "bucket_beta": 80.0},
}


@pytest.mark.parametrize("name", DEFENCES)
def test_settings_of_a_defence_are_in_force_with_it(name):
    command = parse(steal, f"--losstype mse --defence {name}")
    (defence,) = command.all(DEFENCES[name])
    for setting_name in settings_of(defence):
        assert command.config()[setting_name] == getattr(defence, setting_name)
    for setting_name, value in DEFAULTS.get(name, {}).items():
        assert getattr(defence, setting_name) == value


@pytest.mark.parametrize("module", [steal, stealhead, legitimate, stealsimsiam])
def test_defences_are_true_false_or_a_list(module):
    assert parse(module).defence is None
    assert parse(module, "--defence False").defence is None
    assert parse(module, "--defence noise").defence == "noise"
    assert parse(module, "--defence buckets,transform,rounding").defence == "buckets,transform,rounding"
    assert parse(module, "--entropy True").defence == "entropy"
    assert parse(module, "--defence noise --entropy").defence == "noise,entropy"
    assert parse(module, "--defence entropy,noise --entropy").defence == "entropy,noise"


def test_defence_true_follows_the_loss_as_in_2022():
    for losstype in STEAL_LOSSES:
        poisoned = losstype in ("infonce", "softnn", "rda") or losstype.startswith("contsteal")
        expected = "poisoning" if poisoned else "noise"
        assert parse(steal, f"--defence True --losstype {losstype}").defence == expected
        assert parse(legitimate, f"--defence --losstype {losstype}").defence == expected
    assert parse(stealhead, "--defence True --losshead mse").defence == "noise"
    assert parse(stealhead, "--defence True --losshead infonce").defence == "poisoning"
