"""Judging an encoder: other probes, fine-tuning, and how close a copy is to its victim."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import linear_eval
import steal
from data_aug.datasets import load_dataset
from evaluation import compare, knn_accuracy, logistic_regression, released_probe, represent, represent_both
from evaluation.fidelity import untrained_like
from evaluation.probes import Probe
from evaluation.rows import unpacked
from evaluation.test_images import set_digest
from models import build_encoder, load_encoder, read_checkpoint
from tests.conftest import COPY, JUDGE, SMALL, STEAL, VICTIM
from utils import Precision, seeded

STOLEN = (*SMALL, "-n", "40", *VICTIM, *COPY, "--losstype", "mse", "--dataset-test", "mnist")
FP32 = ("--precision", "fp32")
FIGURES = ("l2", "cosine", "centred_cosine", "cka", "overlap", "mutual_information", "agreement")


@pytest.fixture
def judged(call, trained, tmp_path):
    """The row of an evaluation of the copy."""

    def row(*arguments):
        epochs = () if "knn" in arguments else ("--probe-epochs", "3")
        code, _, err = call(linear_eval, *STOLEN, *epochs, *arguments)
        assert code == 0, err
        return json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])

    return row


@pytest.fixture
def victims(trained, tmp_path):
    """The checkpoints of the victims of seeds 0 and 1."""
    return [next(tmp_path.rglob(f"victim-cifar10-*-infonce-*seed{seed}*/checkpoint.pth.tar")) for seed in (0, 1)]


def mnist(data):
    return load_dataset("mnist", data, "train"), load_dataset("mnist", data, "test")


# ---- probes ----


def test_each_probe_reports_what_it_measures(judged):
    rows = {probe: judged("--probe", probe) for probe in ("linear", "mlp", "knn")}
    scores = {probe: {"top1", "top5", "top1_converged", "knn"} & row.keys() for probe, row in rows.items()}
    assert scores == {
        "linear": {"top1", "top5", "top1_converged", "knn"},
        "mlp": {"top1", "top5"},
        "knn": {"knn"},
    }
    assert all(row["probe"] == probe for probe, row in rows.items())
    assert rows["knn"]["knn"] == rows["linear"]["knn"]


def test_the_nearest_neighbours_are_those_of_the_representations(judged, trained, data):
    space = represent_both(load_encoder(trained), *mnist(data), Precision("fp32", torch.device("cpu")))
    assert judged("--probe", "knn", *FP32)["knn"] == pytest.approx(knn_accuracy(*space))


def test_finetuning_trains_the_whole_encoder_and_leaves_the_copy(judged, trained, tmp_path):
    before = read_checkpoint(trained)["state_dict"]
    row = judged("--finetune", "-b", "8")
    assert row["probe"] == "finetune"
    assert {"top1", "top5"} <= row.keys()
    tuned = read_checkpoint(next(tmp_path.rglob("finetuned/checkpoint.pth.tar")))["state_dict"]
    assert tuned["backbone.fc.weight"].shape == (10, 256)
    assert not torch.equal(tuned["backbone.conv1.weight"], before["backbone.conv1.weight"])
    after = read_checkpoint(trained)["state_dict"]
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("flags", "lr"),
    [
        ("--modeltype victim", 1e-3),
        ("--modeltype stolen", 1e-3),
        ("--modeltype random", 1e-3),
        ("--modeltype victim --recipe released", 3e-4),
        ("--modeltype stolen --recipe released", 1e-4),
        ("--modeltype stolen --finetune", 3e-4),
        ("--modeltype stolen --lr 0.02", 0.02),
        ("--modeltype victim --recipe released --lr 0.02", 0.02),
    ],
)
def test_victims_and_copies_are_judged_at_one_learning_rate(flags, lr):
    assert linear_eval.parse(flags.split())[Probe].lr == lr


@pytest.mark.parametrize(("name", "batch", "tested"), [("stl10", 16, 140), ("svhn", 64, 70)])
def test_the_released_protocol_takes_the_first_labels_and_batches_of_2022(
    name, batch, tested, call, write_npz, tmp_path
):
    write_npz(name, 60, 140, folder=tmp_path)
    flags = ("-data", tmp_path, "--dataset-test", name, "-n", "30", "-b", "8", "--recipe", "released", *FP32)
    code, _, err = call(linear_eval, *SMALL, "--modeltype", "random", *flags, "--probe-epochs", "1", "--lr", "0.1")
    assert code == 0, err
    row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    with seeded(0):
        encoder = build_encoder("resnet10w32")
    (images, labels), test = (load_dataset(name, tmp_path, split) for split in ("train", "test"))
    test = [part[-tested:] for part in test]
    settings = {"epochs": 1, "batch_size": 8, "test_batch_size": batch}
    precision = Precision("fp32", torch.device("cpu"))
    scores = released_probe(encoder, (images[:30], labels[:30]), test, 0.1, precision, **settings)
    assert row["top1"] == pytest.approx(scores["top1"], abs=1e-5)
    assert (row["train_images"], row["test_images"]) == (30, tested)
    assert "right" not in row


def test_a_row_has_what_pairs_it_with_another(judged, trained, data):
    row = judged(*FP32)
    train, test = represent_both(load_encoder(trained), *mnist(data), Precision("fp32", torch.device("cpu")))
    right = logistic_regression(train, test).predictions == test[1]
    assert unpacked(row["right"], row["test_images"]).tolist() == right.tolist()
    assert row["test_digest"] == set_digest(mnist(data)[1][0])
    assert row["test_digest"] != set_digest(mnist(data)[1][0].flip(0))
    assert row["knn_k"] == 1
    assert row["top1_converged_sd"] >= 0


# ---- fidelity ----


def test_fidelity_is_measured_on_test_images_beside_the_other_victim(judged, trained, victims, data):
    row = judged("--fidelity", *FP32)
    paths = {"copy": trained, "victim": victims[0], "independent": victims[1]}
    precision = Precision("fp32", torch.device("cpu"))
    spaces = {name: represent_both(load_encoder(path), *mnist(data), precision) for name, path in paths.items()}
    untrained = untrained_like(load_encoder(victims[0]), 0)
    expected = compare(spaces, untrained=represent(untrained, mnist(data)[1][0], precision))
    for name in [*FIGURES, *(f"independent_{name}" for name in FIGURES)]:
        assert row[name] == pytest.approx(expected[name], abs=1e-4), name
    assert row["independent"] == str(victims[1])


def test_an_untrained_encoder_or_a_file_can_be_the_independent_one(judged, victims):
    drawn = judged("--fidelity", "--independent", "random")
    given = judged("--fidelity", "--independent", victims[1])
    assert (drawn["independent"], given["independent"]) == ("random", str(victims[1]))
    assert drawn["independent_cka"] != given["independent_cka"]
    assert drawn["cka"] == given["cka"]


def test_without_another_victim_one_has_to_be_named(refused, victims, tmp_path):
    for other in tmp_path.rglob("victim-*/checkpoint.pth.tar"):
        if other not in (victims[0], *victims[0].parent.glob("*/*")):
            other.unlink()
    text = refused(linear_eval, *STOLEN, "--fidelity")
    assert "give --independent PATH" in text


def test_fidelity_to_another_victim_than_the_copys_is_refused(refused, trained, victims):
    assert "is not the victim that this copy was stolen from" in refused(
        linear_eval, *STOLEN, "--fidelity", "--stolen", trained, "--victim", victims[1]
    )
    other = read_checkpoint(victims[1])
    victims[0].unlink()  # other tests share the file
    torch.save(other, victims[0])  # trained again in its place
    assert "or was trained again" in refused(linear_eval, *STOLEN, "--fidelity")


def test_a_copy_that_does_not_name_its_victim_is_compared_with_the_one_given(call, refused, trained, victims, tmp_path):
    """As those of the 2022 code."""
    state = read_checkpoint(trained)["state_dict"]
    torch.save({"epoch": 100, "arch": "resnet34", "state_dict": state}, tmp_path / "copy.pth.tar")
    line = (*JUDGE, "--stolen", tmp_path / "copy.pth.tar", "--dataset-test", "mnist", "--fidelity")
    assert "does not say which victim it was stolen from: give --victim PATH" in refused(linear_eval, *line)
    code, out, err = call(linear_eval, *line, "--victim", victims[0], "--independent", victims[1])
    assert code == 0, err
    assert "agreement" in out


# ---- which encoder ----


@pytest.mark.parametrize(
    ("flag", "value", "held"),
    [("--losstype", "infonce", "mse"), ("--num_queries", "25", "24"), ("--datasetsteal", "mnist", "svhn")],
)
def test_a_copy_named_by_its_file_has_to_be_what_the_flags_say(flag, value, held, refused, trained):
    text = refused(linear_eval, *SMALL, "--stolen", trained, flag, value, "--dataset-test", "mnist")
    assert f"{held}, not {value}: give {flag} {held}" in text


def test_a_copy_named_by_its_file_needs_no_other_flags(call, trained):
    assert call(linear_eval, *JUDGE, "--stolen", trained, "--dataset-test", "mnist")[0] == 0


@pytest.fixture
def defended(call, trained, tmp_path):
    """Two copies more, stolen against noise of different strength: sigma -> checkpoint."""
    for sigma in ("1", "2"):
        noise = ("--defence", "noise", "--sigma", sigma)
        assert call(steal, *STEAL, "--losstype", "mse", *noise)[0] == 0
    return {sigma: next(tmp_path.rglob(f"stolen-*sigma={sigma}*/checkpoint.pth.tar")) for sigma in ("1.0", "2.0")}


QUICK = (*SMALL, "-n", "40", "--dataset-test", "mnist", "--probe", "knn")


@pytest.fixture
def found(call, tmp_path):
    """The checkpoint that is judged, and what is printed."""

    def path(*arguments):
        code, out, err = call(linear_eval, *QUICK, *arguments)
        assert code == 0, err
        row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
        return Path(row["checkpoint"]), out

    return path


def test_only_flags_that_are_given_decide_and_what_fits_is_named(found, trained):
    path, out = found()
    assert path == trained
    assert f"stolen: {trained.parent}" in out
    assert f"linear_eval.py --stolen {trained.parent} --dataset-test mnist --fidelity" in out.splitlines()[-1]


def test_a_copy_is_found_by_the_settings_of_any_defence(found, defended, trained, refused):
    assert found("--sigma", "1")[0] == defended["1.0"]
    assert found("--defence", "noise", "--sigma", "2")[0] == defended["2.0"]
    assert found("--defence", "True", "--losstype", "mse", "--sigma", "2")[0] == defended["2.0"]
    assert found("--defence", "False")[0] == trained
    text = refused(linear_eval, *QUICK, "--poison-threshold", "0.9")
    assert "no stolen encoder with" in text
    assert "poison_threshold 0.9" in text


def test_where_several_fit_they_are_numbered_with_what_differs(found, defended, refused):
    text = refused(linear_eval, *QUICK, "--defence", "noise")
    assert "2 stolen encoders fit" in text
    assert re.search(r"NUMBER: 1\) sigma.1\.0; 2\) sigma.2\.0$", text.strip())  # nothing that both have
    assert found("--defence", "noise", "--stolen", "2")[0] == defended["2.0"]
    assert "--stolen 3: 2 stolen encoders fit" in refused(linear_eval, *QUICK, "--defence", "noise", "--stolen", "3")


def test_a_copy_is_found_below_the_victim_that_is_named(found, trained, victims, refused):
    assert found("--victim", victims[0].parent.name)[0] == trained
    assert "no stolen encoder" in refused(linear_eval, *QUICK, "--victim", victims[1])


@pytest.mark.parametrize("form", ["file", "folder", "name"])
def test_encoders_are_named_by_file_folder_or_run(form, found, trained, victims):
    def spelled(path):
        return {"file": path, "folder": path.parent, "name": path.parent.name}[form]

    assert found("--stolen", spelled(trained))[0] == trained
    assert found("--modeltype", "victim", "--victim", spelled(victims[1]))[0] == victims[1]


def test_head_and_another_attack_contradict_each_other(refused, trained):
    assert "--head and --attack rda contradict each other" in refused(linear_eval, *QUICK, "--head", "--attack", "rda")
    assert "attack stealhead" in refused(linear_eval, *QUICK, "--head")


def test_a_finished_evaluation_is_shown_and_not_repeated(found, trained, tmp_path, monkeypatch):
    found()
    results = (tmp_path / "checkpoints" / "results.jsonl").read_text()
    monkeypatch.setattr(linear_eval, "judge_encoder", lambda *arguments: pytest.fail("judged again"))
    _, out = found("--resume")
    assert "has its results already" in out
    assert (tmp_path / "checkpoints" / "results.jsonl").read_text() == results


def test_images_without_labels_cannot_judge(refused, trained, tmp_path):
    np.savez(tmp_path / "bare.npz", x_train=np.zeros((40, 32, 32, 3), np.uint8))
    text = refused(linear_eval, *JUDGE, "--stolen", trained, "--dataset-test", f"npz:{tmp_path / 'bare.npz'}")
    assert "images without labels" in text


# ---- files from elsewhere, and files that are not what is asked for ----


@pytest.fixture
def foreign(trained, tmp_path):
    """The copy's weights without a word about their origin, as in a file of the 2022 code."""
    path = tmp_path / "foreign.pth.tar"
    torch.save({"epoch": 100, "arch": "resnet34", "state_dict": read_checkpoint(trained)["state_dict"]}, path)
    return path


@pytest.mark.parametrize(
    ("flags", "images"),
    [
        ((), 1000),
        (("--dataset", "cifar10"), 1000),
        (("--dataset", "npz:{data}/cifar10.npz"), 1000),
        (("--dataset", "svhn"), 1040),
        (("--dataset", "other"), 1040),
        (("--num-test", "1030"), 1030),
        (("--recipe", "released", "--probe-epochs", "1"), 1000),
    ],
)
def test_a_copy_from_elsewhere_is_tested_on_what_2022_never_queries(flags, images, call, data, foreign, tmp_path):
    line = (*SMALL, "-n", "40", "--dataset-test", "cifar10", "--stolen", foreign)
    probe = () if "--recipe" in flags else ("--probe", "knn")
    code, out, err = call(linear_eval, *line, *probe, *(flag.format(data=data) for flag in flags))
    assert code == 0, err
    row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1])
    assert (row["test_images"], row["test_images_queried"]) == (images, 0)
    assert row["queries"] is row["distinct"] is row["losstype"] is None
    assert "--fidelity" not in out  # nobody knows its victim


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--modeltype", "victim", "--victim", "{copy}"), "is a copy, which may have been trained on the test images"),
        (("--stolen", "{victim}"), "is a victim, not a copy: give --modeltype victim --victim"),
        (("--stolen", "{copy}", "--victim", "{other}"), "is not the victim that this copy was stolen from"),
        (("--stolen", "{copy}", "--victim", "{data}/cifar10.npz"), "cifar10.npz"),
        (("--stolen", "{copy}", "--sigma", "0.5"), "was made without sigma 0.5: leave out --sigma"),
        (("--stolen", "{copy}", "--defence", "noise"), "was made without defence noise: leave out --defence"),
        (("--stolen", "{copy}", "--temperature", "0.5"), "was made without temperature 0.5: leave out --temperature"),
        (("--modeltype", "victim", "--victim", "{victim}", "--lossvictim", "supervised"), "give --lossvictim infonce"),
        (("-n", "1"), "'1' is not a whole number of at least 2"),
    ],
)
def test_files_that_are_not_what_the_flags_say_are_refused(flags, message, refused, data, trained, victims, tmp_path):
    names = {"copy": trained, "victim": victims[0], "other": victims[1], "data": data}
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(linear_eval, *QUICK, *(flag.format(**names) for flag in flags))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("probe", [("--probe", "knn"), (), ("--finetune",), ("--recipe", "released")])
def test_an_encoder_whose_answers_are_no_numbers_leaves_nothing(probe, refused, trained, tmp_path):
    content = read_checkpoint(trained)
    content["state_dict"]["backbone.layer4.0.bn2.weight"].fill_(1e30)
    torch.save(content, tmp_path / "huge.pth.tar")
    before = sorted(tmp_path.rglob("*"))
    line = (*SMALL, "-n", "40", "--dataset-test", "mnist", "--stolen", tmp_path / "huge.pth.tar")
    assert "give another checkpoint" in refused(linear_eval, *line, *probe, *FP32)
    assert sorted(tmp_path.rglob("*")) == before


def test_images_of_one_class_judge_nothing(refused, trained, write_npz):
    name = f"npz:{write_npz(classes=1)}"
    assert "are all of one class" in refused(linear_eval, *JUDGE, "--stolen", trained, "--dataset-test", name)


def test_what_the_victim_was_trained_on_judges_nothing(refused, trained, tmp_path):
    """The test split of svhn has images of the training split of svhn-merged."""
    content = read_checkpoint(trained)
    content["settings"]["dataset"] = "svhn-merged"
    torch.save(content, tmp_path / "merged.pth.tar")
    line = (*SMALL, "-n", "40", "--dataset-test", "svhn", "--stolen", tmp_path / "merged.pth.tar")
    assert "take svhn-merged instead" in refused(linear_eval, *line)


def test_a_checkpoint_cannot_forge_its_row(found, trained, tmp_path):
    content = read_checkpoint(trained)
    forged = {"knn": 99.0, "queries": 1.0, "test_images": 9.0, "model": 1.0, "poisoning_auc": 0.5}
    torch.save({**content, "met": forged, "defence_report": forged}, tmp_path / "forged.pth.tar")
    rows = []
    for path in (trained, tmp_path / "forged.pth.tar"):
        found("--stolen", path)
        rows.append(json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1]))
    assert all(rows[0][name] == rows[1][name] for name in ("knn", "queries", "test_images", "model"))
    assert rows[1]["poisoning_auc"] == 0.5
