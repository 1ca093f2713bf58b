"""Every flag of every script has an effect that is seen here: on weights, on scores, or a refusal that names it."""

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import legitimate
import linear_eval
import linsimsiam
import run
import steal
import stealhead
import steallabels
import stealsimsiam
from models import read_checkpoint
from tests.conftest import COPY, JUDGE, SMALL, STEAL, VICTIM, made

TRAIN = ("--dataset", "cifar10", "--num-train", "32", "--epochs", "1", "-b", "16", *SMALL)
ARCHES = ("--archvic", "resnet10w32", "--archstolen", "resnet10w32", "--device", "cpu")
HEAD = (*ARCHES, *VICTIM, *COPY, "-b", "6", "--epochshead", "1")
LABELS = (*ARCHES, *VICTIM, *COPY, "-b", "8", "--dataset-test", "mnist")
STOLEN = (*JUDGE, *VICTIM, *COPY, "--losstype", "mse", "--dataset-test", "mnist")
SUPERVISED = ("--victimtype", "supervised", "--dataset-test", "cifar10")
# Run in the folder of the data.
LARGE = ("--pretrained", "simsiam.pth.tar", "--size", "32", "-b", "8", "--epochs", "1", "--workers", "0")
LARGE = (*LARGE, "--device", "cpu", "--arch", "resnet10w32")
LARGE_STEAL = (*LARGE, "--datasetsteal", "imagenet", "--num_queries", "16")
WARM = (("--epochs", "2"), "1")
LARGE_SGD = {
    "warmup_epochs": WARM,
    "schedule": (("--epochs", "3", "--flat-epochs", "1"), "constant"),
    **{"optimizer": "adam", "flat_epochs": (("--epochs", "2"), "2")},
    **{"lr": "0.5", "momentum": (("--epochs", "2"), "0.1"), "weight_decay": "0.1", "lars": None},
    **{"epochs": "2", "start_epoch": (("--epochs", "2"), "1"), "batch_size": "4"},
}
HEADED = ("--pretrained", "headed.pth.tar")
STOLEN_LARGE = ("--modeltype", "stolen")
SGD, SYMMETRIZED = ("--optimizer", "sgd"), ("--losstype", "symmetrized", "-b", "6")
MOCO = ("--losstype", "moco", "--bn-groups", "2")

# What leaves the result as it is: seen in the tests of resumption and of Run, in the last one here, and in every test.
ELSEWHERE = {"help", "data", "checkpoint_dir", "device", "gpu_index", "workers", "resume", "clear", "logdir"}
ELSEWHERE |= {"log_every_n_steps", "fp16_precision", "print_freq", "evaluate", "compile", "run_dir"}
# Victims behind an API: seen in test_remote.py.
ELSEWHERE |= {"api_key_file", "max_wait"}
# Several processes: seen in test_stopping.py and test_distributed.py.
ELSEWHERE |= {"world_size", "rank", "dist_url", "dist_backend", "multiprocessing_distributed"}

# For each flag a command line and what is added to it; where a flag is about another, a base of its own.
MACHINE = {"precision": (("--precision", "fp32"), "bf16"), "seed": "1", "size": "48"}
SCHEDULE = (("--epochs", "3", "--flat-epochs", "1"), "constant")
OPTIMISER = {"lr": "0.1", "weight_decay": "0.1", "optimizer": "sgd", "epochs": "2", "batch_size": "4"}
OPTIMISER |= {"schedule": SCHEDULE}
RATE = (("--epochs", "3", "--flat-epochs", "1"), "0")
FOUND_BY = {"dataset": "svhn", "epochstrain": "2", "lossvictim": "softnn", "victim": "none.pth.tar"}
QUERIES = {"num_queries": "16", "query_order": "random", "datasetsteal": "mnist"}
QUERIES |= {"query_space": (("--query-order", "k-centre"), "none.pth.tar")}
FORCE = (("--datasetsteal", "cifar10"), "True")

NOISE, POISONING, DETECTION, MARK = (("--defence", name) for name in ("noise", "poisoning", "detection", "mark"))
BUCKETS = ("--defence", "buckets", "--bucket-bits", "3", "--bucket-alpha", "10", "--bucket-beta", "20")
DEFENDED = {
    "defence": "noise",
    "entropy": "True",
    "mu": (NOISE, "1"),
    "sigma": (NOISE, "2"),
    "consistent_noise": (NOISE, "True"),
    "secret": (NOISE, "7"),
    "poison_threshold": (POISONING, "1"),
    "poison_memory": ((*POISONING, "--poison-threshold", "0.99995"), "1"),
    "decimals": (("--defence", "rounding"), "0"),
    "top_k": (("--defence", "topk"), "8"),
    "dimensions": (("--defence", "truncate"), "8"),
    "transform": (("--defence", "transform"), "binary"),
    "mark_rule": (MARK, "espew"),
    "mark_directions": (MARK, "2"),
    "detection_bits": (DETECTION, "3"),
    "detection_memory": (DETECTION, "1"),
    "bucket_bits": (BUCKETS, "2"),
    "bucket_lambda": (BUCKETS, "0.01"),
    "bucket_alpha": (BUCKETS, "5"),
    "bucket_beta": (BUCKETS, "2"),
    "bucket_cells": (BUCKETS, "centred"),
}

# Flags of linear_eval.py by which a copy is looked for: with another value than its own none is found.
FOUND = {
    **{"archstolen": "resnet18", "lossvictim": "softnn", "force": "True", "query_order": "random", "n_views": "2"},
    **{"queryaug": "True", "useaug": "True", "copy_views": "2", "prototype": "True", "repeat": "2", "restore": "True"},
    **{"max_coverage": "5", "sybils": "2", "shared": "9", "secret": "7", "consistent_noise": "True", "decimals": "0"},
    **{"poison_threshold": "0.5", "poison_memory": "7", "top_k": "8", "dimensions": "8", "transform": "binary"},
    **{"bucket_bits": "3", "bucket_lambda": "0.1", "bucket_alpha": "5", "bucket_beta": "2", "detection_bits": "3"},
    **{"bucket_cells": "kmeans", "jitter": "3", "copy_normalize": "none", "query_space": "own.pth.tar"},
    **{"query_views": "mild", "views": "mild", "ema": "0.5", "queue": "9", "bn_groups": "2"},
    **{"mark_rule": "espew", "mark_directions": "2", "cse_components": "9"},
    **{"detection_memory": "7", "temperature": "0.5", "temperaturesn": "5", "distance": "l1", "lambda_aug": "2"},
}

EFFECTS = {
    run: (
        TRAIN,
        {
            **MACHINE,
            **OPTIMISER,
            "flat_epochs": RATE,
            "warmup_epochs": WARM,
            "momentum": (SGD, "0.1"),
            "losstype": "barlow",
            "dataset": "svhn",
            "num_train": "48",
            "normalize": "True",
            "watermark": "True",
            "arch": "resnet18",
            "out_dim": "64",
            "temperature": "0.5",
            "temperaturesn": (("--losstype", "softnn"), "1"),
            "ema": (("--losstype", "byol", "--epochs", "2"), "0.5"),
            "queue": (MOCO, "8"),
            "bn_groups": (MOCO, "4"),
            "n_views": "3",
            "preset": "modern",
            "views": "mild",
            "recipe": (("--epochs", "3", "--flat-epochs", "0"), "released"),
            # With a victim to mark: in test_sslguard.py.
            **{"victim": "none.pth.tar", "lr_shadow": "1", "lr_decoder": "1", "lr_trigger": "1"},
        },
    ),
    steal: (
        STEAL,
        {
            **MACHINE,
            **OPTIMISER,
            **FOUND_BY,
            **QUERIES,
            "arch": "resnet18",
            "flat_epochs": RATE,
            "warmup_epochs": WARM,
            "momentum": (SGD, "0.1"),
            "force": FORCE,
            "attack": "cont-steal",
            "losstype": "mse",
            "archstolen": "resnet18",
            "victimhead": "True",
            "watermark": "True",
            **DEFENDED,
            "repeat": "2",
            "jitter": (("--repeat", "2"), "9"),
            "restore": (("--defence", "topk"), "True"),
            "cse_components": (("--restore", "cse"), "1"),
            "max_coverage": "0.1",
            "sybils": "2",
            "shared": (("--sybils", "2"), "4"),
            "stolenhead": "True",
            "n_views": "2",
            "queryaug": "True",
            "copy_normalize": "none",
            "query_views": (("--queryaug",), "none"),
            "views": (("--useaug",), "mild"),
            "prototype": (("--n-views", "2"), "True"),
            "useaug": "True",
            "copy_views": (("--useaug",), "2"),
            "temperature": "0.5",
            "temperaturesn": (("--losstype", "softnn"), "0.1"),
            "lambda_aug": (("--losstype", "stolenencoder", "--useaug"), "1"),
            "distance": (("--losstype", "stolenencoder"), "cosine"),
            "out_dim": (SYMMETRIZED, "64"),
            "recipe": (("--epochs", "3", "--flat-epochs", "1"), "released"),
        },
    ),
    stealhead: (
        HEAD,
        {
            **MACHINE,
            **OPTIMISER,
            **FOUND_BY,
            **QUERIES,
            **DEFENDED,
            "arch": "resnet18",
            "archstolen": "resnet18",
            "flat_epochs": RATE,
            "warmup_epochs": WARM,
            "momentum": (SGD, "0.1"),
            "force": FORCE,
            "copy_normalize": "none",
            "query_views": "crop-flip",
            "losstype": "mse",
            "losshead": "softnn",
            "victimhead": (("--losshead", "msewithhead"), "True"),
            "n_views": "3",
            "head_queries": "16",
            "lrhead": "0.1",
            "epochshead": "2",
            "out_dim": "64",
            "temperature": (("--losstype", "mse"), "0.5"),  # the head's
            "temperaturesn": (("--losshead", "softnn"), "0.1"),
        },
    ),
    steallabels: (
        LABELS,
        {
            **MACHINE,
            **OPTIMISER,
            **FOUND_BY,
            **QUERIES,
            "seed": (SUPERVISED, "1"),
            "arch": "resnet18",
            "archstolen": "resnet18",
            "flat_epochs": RATE,
            "warmup_epochs": WARM,
            "momentum": (SGD, "0.1"),
            "force": FORCE,
            "copy_normalize": "none",
            "losstype": "knockoff",
            "mode": "knockoff",
            "modeloutput": "logits",
            "victimtype": (SUPERVISED[2:], "supervised"),
            "classifier": "none.pth.tar",
            "dataset_test": "svhn",
            "num_test": "8",
        },
    ),
    legitimate: (
        (*SMALL, *VICTIM, "--num_queries", "40", "--num-test", "20", "--epochs", "2"),
        {
            **MACHINE,
            **DEFENDED,
            **FOUND_BY,
            "arch": "resnet18",
            "dataset": (("--dataset-test", "mnist"), "svhn"),
            "dataset_test": "mnist",
            "losstype": (("--defence", "True"), "mse"),
            "num_queries": "30",
            "num_test": "10",
            "user_classes": (("--num_queries", "8"), "2"),
            "epochs": "1",
            "batch_size": "8",
            "lrhead": "0.1",
            "weight_decay": "1",
        },
    ),
    linear_eval: (
        STOLEN,
        {
            **MACHINE,
            "dataset": "svhn",
            "datasetsteal": "mnist",
            "losstype": "infonce",
            "epochstrain": "2",
            "epochs": "2",
            "num_queries": "16",
            "attack": "stealhead",
            "head": "True",
            "victimhead": "True",
            "stolenhead": "True",
            "victim": "none.pth.tar",
            "watermark": "True",
            "defence": "noise",
            "entropy": "True",
            "sigma": "2",
            "mu": "1",
            "stolen": "none.pth.tar",
            "arch": "resnet18",
            "modeltype": (JUDGE, "random"),
            "dataset_test": "svhn",
            "num_labeled": "30",
            "num_test": "8",
            "probe": "mlp",
            "finetune": (("-b", "8"), "True"),
            "probe_epochs": "1",
            "batch_size": "8",
            "lr": "0.1",
            "save": "False",
            "fidelity": "True",
            "independent": (("--fidelity",), "random"),
            "map_images": "12",
            "recipe": (("--num-test", "24"), "released"),
            **FOUND,
        },
    ),
    stealsimsiam: (
        LARGE_STEAL,
        {
            **MACHINE,
            **LARGE_SGD,
            **DEFENDED,
            "poison_threshold": ((*POISONING, *HEADED), "1"),
            "poison_memory": ((*POISONING, *HEADED, "--poison-threshold", "0.999"), "1"),
            "dataset": "svhn",
            "datasetsteal": "svhn",
            "useval": "True",
            "num_queries": "24",
            "query_order": "first",
            "query_view": "center",
            "victim": "none.pth.tar",
            "epochstrain": "200",
            "arch": "resnet34",
            "archstolen": "resnet34",
            "losstype": "cosine",
            "temperature": (("--losstype", "infonce"), "0.5"),
            "temperaturesn": (("--losstype", "softnn"), "5"),
            "distance": (("--losstype", "stolenencoder"), "l1"),
            "lambda_aug": (("--losstype", "stolenencoder"), "0"),
            "out_dim": (("--losstype", "symmetrized"), "64"),
            "useaug": "False",
            "views": "crop-flip",
            "copy_views": "2",
        },
    ),
    linsimsiam: (
        (*LARGE, "--dataset", "imagenet"),
        {
            **MACHINE,
            **LARGE_SGD,
            "dataset": "svhn",
            "modeltype": "stolen",
            "victim": "none.pth.tar",
            "stolen": (STOLEN_LARGE, "none.pth.tar"),
            "epochstrain": "200",
            "arch": "resnet34",
            "datasetsteal": (STOLEN_LARGE, "svhn"),
            "losstype": (STOLEN_LARGE, "softnn"),
            "num_queries": (STOLEN_LARGE, "77"),
            "epochssteal": (STOLEN_LARGE, "9"),
            "augment": "True",
        },
    ),
}
# Settings of defences act in the black box, those of training in the one loop, the same for all scripts: steal.py and
# run.py stand for them.
ELSEWHERE_TOO = {(module, name) for module in (stealhead, stealsimsiam, legitimate) for name in DEFENDED}
OF_TRAINING = (*OPTIMISER, "momentum", "precision", "warmup_epochs")
ELSEWHERE_TOO |= {(module, name) for module in (stealhead, steallabels) for name in OF_TRAINING}
SCHEDULED = ("schedule", "flat_epochs", "warmup_epochs")
ELSEWHERE_TOO |= {(module, name) for module in (stealsimsiam, linsimsiam) for name in SCHEDULED}
CASES = [
    pytest.param(module, name, marks=[pytest.mark.slow] if (module, name) in ELSEWHERE_TOO else [])
    for module, (_, flags) in EFFECTS.items()
    for name in flags
]
IDS = [f"{case.values[0].__name__}-{case.values[1]}" for case in CASES]


@pytest.mark.parametrize("module", EFFECTS, ids=lambda module: module.__name__)
def test_every_flag_is_here(module):
    assert module.make_parser().settings.keys() - ELSEWHERE == EFFECTS[module][1].keys()


@pytest.fixture
def outcome(call, trained, tmp_path, data, monkeypatch):
    """What a command line leads to: the weights it writes and the scores it reports, or its refusal."""
    monkeypatch.chdir(data)
    results = tmp_path / "checkpoints" / "results.jsonl"
    timing = {"seconds", "command", "checkpoint", "seed", "precision"}

    def of(module, line):
        code, out, err = call(module, *line)
        if code:
            assert code == 2
            return err
        if module in (legitimate, linear_eval, linsimsiam, steallabels):
            row = json.loads(results.read_text().splitlines()[-1])
            scores = {key: value for key, value in row.items() if key not in timing}
            if module is legitimate:
                return {}, scores
        else:
            scores = None
        if module in (linear_eval, linsimsiam):
            newest = max(
                (tmp_path / "checkpoints").rglob("linear*/checkpoint.pth.tar"), key=lambda path: path.stat().st_mtime
            )
        else:
            newest = made(out)
        checkpoint = read_checkpoint(newest)
        return checkpoint["state_dict"], scores or checkpoint.get("defence_report")

    return of


def differ(a, b):
    if isinstance(a, str) or isinstance(b, str):
        return a != b
    return a[1] != b[1] or a[0].keys() != b[0].keys() or not all(torch.equal(a[0][key], b[0][key]) for key in a[0])


# What command lines lead to without the flag in question: many flags have the same.
BEFORE = {}


@pytest.mark.parametrize(("module", "name"), CASES, ids=IDS)
def test_flag_has_an_effect(module, name, outcome):
    line, flags = EFFECTS[module]
    base, value = flags[name] if isinstance(flags[name], tuple) else ((), flags[name])
    if module is linear_eval and name not in ("probe", "finetune", "modeltype", "recipe"):
        base = ("--save", *base)
    flag = module.make_parser().settings[name].flag
    if (module, *line, *base) not in BEFORE:
        BEFORE[module, *line, *base] = outcome(module, [*line, *base])
    before = BEFORE[module, *line, *base]
    after = outcome(module, [*line, *base, flag, *([value] if value else [])])
    assert differ(before, after)
    if isinstance(after, str):  # a refusal has to be about this flag
        assert (value and value in after) or flag.strip("-") in after, after


def test_flags_about_the_run_act(call, refused, tmp_path):
    threads = torch.get_num_threads()
    line = (*TRAIN, "--logdir", tmp_path / "events", "--log-every-n-steps")
    points = {}
    try:
        for every in ("1", "2"):
            assert call(run, *line, every, "--workers", "1")[0] == 0
            assert torch.get_num_threads() == 1
            (folder,) = (tmp_path / "events").iterdir()
            events = EventAccumulator(str(folder))
            events.Reload()
            points[every] = len(events.Scalars("step/loss"))
    finally:
        torch.set_num_threads(threads)
    assert points == {"1": 2, "2": 1}
    assert "--gpu-index has no effect with --device cpu" in refused(run, *TRAIN, "--gpu-index", "1")
    assert "fp16 needs a CUDA device" in refused(run, *TRAIN, "--fp16-precision")
    assert "tpu" in refused(run, *TRAIN, "--device", "tpu")
    job = ("--world-size", "2", "--rank", "0", "--dist-url", "tcp://127.0.0.1:1")
    assert "--dist-backend nccl needs GPUs" in refused(run, *TRAIN, *job, "--dist-backend", "nccl")
