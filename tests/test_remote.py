"""Victims that are elsewhere: behind an API over HTTP that fails, is killed and refuses, or behind a function."""

import io
import json
import os
import signal
import subprocess
import sys

from jobs.early import SAVED

import numpy as np
import pytest
import torch
import trustme

import detect
import legitimate
import linear_eval
import linsimsiam
import run
import steal
import stealhead
import steallabels
import stealsimsiam
import verify
from attacks import client as client_module
from attacks.client import Client
from attacks.elsewhere import FunctionVictim
from attacks.records import QueryFile
from attacks.remote import RemoteVictim
from data_aug.images import Stored
from defenses import DEFENCES
from files.writing import save_checkpoint
from models import build_encoder, load_encoder, read_checkpoint
from simclr import SimCLR
from tests.apis import Course, Relay, Service, ask_in_a_job, killing
from tests.conftest import ATTACK as ATTACK_HERE
from tests.conftest import ROOT, call_main, made
from tests.jobs import run_job
from tests.networks import same
from utils import UserError, seeded
from victim import Ledger, Victim, image_digests

FP32 = ("--precision", "fp32")
ATTACK = (*ATTACK_HERE, *FP32)

# An untrained network's representations are close to each other: few buckets, and penalties that are seen.
DEFENCE = ("--defence", "buckets,noise", "--bucket-bits", "3", "--bucket-alpha", "5", "--bucket-beta", "20")
DEFENCE = (*DEFENCE, "--bucket-cells", "hyperplanes", "--sigma", "0.1")
BATCH = 8  # images of a request, and of a call of victims in this process


IMAGES = torch.randint(0, 256, (24, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def defences():
    """Those of DEFENCE."""
    buckets = DEFENCES["buckets"](bucket_bits=3, bucket_alpha=5.0, bucket_beta=20.0, bucket_cells="hyperplanes")
    return [buckets, DEFENCES["noise"](sigma=0.1)]


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """The checkpoint of a small untrained encoder."""
    path = tmp_path_factory.mktemp("victim") / "victim.pth.tar"
    with seeded(0):
        save_checkpoint({"state_dict": build_encoder("resnet10w32", 16).state_dict(), "arch": "resnet10w32"}, path)
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory, victim):
    """serve.py with defences, one of which remembers all queries."""
    line = (*DEFENCE, "--secret", "0", "--max-batch", BATCH, *FP32)
    service = Service(tmp_path_factory.mktemp("service"), victim, *line)
    yield service
    service.kill()


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    monkeypatch.setattr(client_module, "BATCH", BATCH)


@pytest.fixture
def key(service, tmp_path):
    """The file with the key of a new account."""
    return service.add(tmp_path / "key", "default")


@pytest.fixture
def remote(service, key):
    """A victim behind the service, or a relay in front of it."""

    def make(url=service.url, **options):
        return RemoteVictim(url, [key.read_text().strip()], **options)

    return make


# ---- the whole way ---------------------------------------------------------------------------------------------------

LARGE = ("--datasetsteal", "imagenet", "--num_queries", "24", "--epochs", "1", "--workers", "0", "-b", "8")
LARGE = (*LARGE, "--archstolen", "resnet10w32", "--device", "cpu", *FP32)
ATTACKS = {
    "plain": (steal, ATTACK),
    "sybils": (steal, (*ATTACK, "--sybils", "2", "--shared", "4")),
    "head": (stealhead, (*ATTACK, "-b", "6", "--epochshead", "1")),
    "large": (stealsimsiam, LARGE),
    "released": (steal, (*ATTACK, "--recipe", "released", "--epochs", "2")),
}


@pytest.fixture
def stolen(call):
    """What the checkpoint of a script's copy holds, and its output."""

    def run_script(module, *arguments):
        code, out, err = call(module, *arguments)
        assert code == 0, err
        return read_checkpoint(made(out)), out

    return run_script


@pytest.mark.parametrize("name", ATTACKS)
def test_over_http_the_copy_is_that_of_a_victim_in_this_process(name, stolen, service, victim, tmp_path):
    module, line = ATTACKS[name]
    accounts = ("sybil-1", "sybil-2") if name == "sybils" else ("default",)
    keys = service.add(tmp_path / "keys", *accounts)
    size = ("--size", "32") if module is stealsimsiam else ()  # the API says it itself
    expected, _ = stolen(module, "--victim", victim, *line, *DEFENCE, *size)
    found, out = stolen(module, "--victim", service.url, "--api-key-file", keys, *line)
    assert same(expected["state_dict"], found["state_dict"])
    for entry in ("ledger", "query_digests", "query_indices", "query_set"):
        assert str(expected[entry]) == str(found[entry])
    asked = {name: account["queries"] for name, account in found["ledger"].items()}
    assert asked == {name: service.queries(name) for name in accounts}
    assert f"counted: {sum(asked.values())}, as many as here" in out
    assert found["defence_report"] == {"api_queries": sum(asked.values())}
    assert {"arch", "epochstrain", "lossvictim", "defence", "watermark"}.isdisjoint(found["settings"])
    assert found["settings"]["victim"] == service.url
    assert keys.read_text().split()[0] not in (tmp_path / "checkpoints" / made(out)).with_name("config.yml").read_text()


def test_only_the_owner_compares_the_copy_with_the_victim(stolen, call, refused, service, key, victim, tmp_path):
    _, out = stolen(steal, "--victim", service.url, "--api-key-file", key, *ATTACK)
    judge = ("--stolen", made(out), "--dataset-test", "mnist", "-n", "40", "--probe-epochs", "2", "--device", "cpu")
    code, out, err = call(linear_eval, *judge)
    assert code == 0, err
    assert "--fidelity" not in out
    for flags in ("--fidelity", f"--victim {victim}"):
        said = refused(linear_eval, *judge, *flags.split())
        assert f"was stolen from {service.url}: its owner gives --fidelity --victim PATH, others neither" in said
    code, _, err = call(linear_eval, *judge, "--fidelity", "--victim", victim, "--independent", "random")
    assert code == 0, err
    alone, compared = map(json.loads, (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-2:])
    assert (alone["queries"], alone["api_queries"], alone["defence"]) == (24, 24, None)
    assert "l2" not in alone
    assert compared["l2"] > 0


WATCH = ("--dataset", "shapes", "--streams", "2", "--stream-length", "20", "--device", "cpu", *FP32)


def test_a_detector_over_http_pays_for_each_image_and_view_once(call, refused, service, key, write_npz, tmp_path):
    relay = Relay(service.port, {3: refusing(403, "expired")})
    watch = (*WATCH, "--dataset", f"npz:{write_npz(test=80)}", "--dataset-users", "mnist")  # of 24 images here
    watch = (*watch, "--victim", relay.url, "--api-key-file", key)
    assert "expired" in refused(detect, *watch)
    assert service.queries() == 16
    relay.troubles.clear()
    code, out, err = call(detect, *watch, "--resume")
    assert code == 0, err
    assert "queries: 144, 104 images and 40 random views" in out
    assert "by the answers, which defences may have changed; without PRADA" in out
    row = json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text())
    assert (row["queries"], row["api_queries"], row["arch"]) == (144, 144, None)
    assert row["auc_task_repeat_nearest"] >= 0
    assert service.queries() == 144
    assert not list((tmp_path / "checkpoints").rglob("queries-*"))


def test_without_a_defence_a_detector_by_answers_is_the_owners(call, victim, write_npz, tmp_path):
    text = "import torch\nfrom models import load_encoder\nfrom victim import Victim\n"
    text += f"victim = Victim(load_encoder({str(victim)!r}))\ndef ask(images):\n    return victim.query(images)\n"
    address = write_function(tmp_path, text + "ask.dim = 256")
    few = f"npz:{write_npz(test=80)}"
    for source in (victim, address):
        code, _, err = call(detect, *WATCH, "--dataset", few, "--victim", source)
        assert code == 0, err
    owner, attacker = map(json.loads, (tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines())
    # The attacker who stays in few buckets chooses by an untrained copy, whose architecture may be another here.
    same_streams = [name for name in owner if name.startswith("auc_") and "few-buckets" not in name]
    assert len(same_streams) > 20
    assert {name: attacker[name] for name in same_streams} == {name: owner[name] for name in same_streams}


def test_a_user_of_the_api_gets_what_a_user_of_the_victim_gets(call, service, key, victim, tmp_path):
    line = (
        "--dataset",
        "cifar10",
        "--num_queries",
        "40",
        "--num-test",
        "20",
        "--epochs",
        "2",
        "--device",
        "cpu",
        *FP32,
    )
    over = ("--victim", service.url, "--api-key-file", key)
    service.add(key, "user")
    rows = []
    for which in (("--victim", victim, *DEFENCE), over):
        code, out, err = call(legitimate, *which, *line)
        assert code == 0, err
        rows.append(json.loads((tmp_path / "checkpoints" / "results.jsonl").read_text().splitlines()[-1]))
    here, there = rows
    scores = ("top1", "top1_converged", "loss", "right", "queries", "distinct", "calls")
    assert [here[name] for name in scores] == [there[name] for name in scores]
    assert (there["arch"], there["queries"], service.queries("user")) == (None, 60, 60)
    assert "clean_top1" in here
    assert "clean_top1" not in there
    assert f"steal.py --victim {service.url} --api-key-file {key}" in out
    assert not [*tmp_path.rglob("queries-*")]


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


def give(status, content, **headers):
    """A trouble: this is answered instead."""
    return lambda handler: handler.give(status, headers, content) or True


def refusing(status, code, wait=None):
    content = json.dumps({"error": {"code": code, "message": "not now", "remedy": "wait"}}).encode()
    return give(status, content, **({} if wait is None else {"Retry-After": wait}))


def lose(handler):
    """The API answers, and counts; the answer is lost."""
    handler.passed_on()
    return handler.hang_up()


def cut(handler):
    answer = handler.passed_on()
    handler.give(*answer, cut=len(answer[2]) - 1000)
    return True


def killed(service):
    """A trouble: the API answers, is killed, and is started again on its port."""

    def trouble(handler):
        handler.passed_on()
        service.again()
        return handler.hang_up()

    return trouble


TROUBLES = {
    "not-passed-on": lambda service: lambda handler: handler.hang_up(),
    "answer-lost": lambda service: lose,
    "answer-cut": lambda service: cut,
    "busy": lambda service: refusing(503, "busy", "0"),
    "too-fast": lambda service: refusing(429, "rate_limited", "1"),
    "gateway": lambda service: give(502, b"<html>bad gateway</html>"),
    "internal": lambda service: refusing(500, "internal"),
    "killed": killed,
}


@pytest.fixture(scope="module")
def expected(victim):
    """The answers of a victim in this process to the `images` of tests, in calls as over HTTP."""
    made = Victim(load_encoder(victim), defences=defences())
    return torch.cat([made.query(part) for part in IMAGES.split(BATCH)]), made.ledger


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_request_is_repeated_and_paid_once(trouble, service, remote, expected, tmp_path):
    relay = Relay(service.port, {2: TROUBLES[trouble](service)})
    asked = remote(relay.url)
    answers = Client(asked, tmp_path / "kept").ask(Stored(IMAGES), torch.arange(24))
    assert torch.equal(answers, expected[0])
    assert asked.ledger.accounts == expected[1].accounts
    assert service.queries() == 24
    assert relay.posts == 4
    assert asked.report({}) == {"api_queries": 24}


def test_the_same_request_made_on_purpose_is_another(service, remote, expected, tmp_path):
    """Each is paid, and has noise of its own: none is taken for a repetition of one that was lost."""
    asked = remote(Relay(service.port, {2: lose}).url)
    Client(asked, tmp_path / "kept", repeat=3).ask(Stored(IMAGES[:8]), torch.arange(8))
    kept = QueryFile(tmp_path / "kept", 256, np.float32).earlier["answer"].reshape(3, 8, 256)
    assert asked.ledger.queries == service.queries() == 24
    assert np.array_equal(kept[0], expected[0][:8])
    assert not np.array_equal(kept[0], kept[1])
    assert not np.array_equal(kept[1], kept[2])


def test_a_request_is_no_larger_than_the_rate_lets_pass(service, key):
    service.add(key, "default", rate="5/day")
    victim = RemoteVictim(service.url, key.read_text().split())
    assert Client(victim).ask(Stored(IMAGES[:5]), torch.arange(5)).isfinite().all()
    assert (victim.batch_size, victim.ledger.calls, service.queries()) == (5, 1, 5)


@pytest.fixture(scope="module")
def weights(victim, data, tmp_path_factory):
    """Those of the copy of the victim in this process."""
    folder = tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client_module, "BATCH", BATCH)
        assert call_main(steal, data, folder, "--victim", victim, *ATTACK, *DEFENCE) == 0
    (path,) = folder.rglob("stolen-*/checkpoint.pth.tar")
    return read_checkpoint(path)["state_dict"]


def test_an_api_that_is_gone_for_good_costs_no_answer(refused, stolen, service, key, weights):
    line = (*ATTACK, "--api-key-file", key, "--max-wait", "1")
    relay = Relay(service.port, {0: lambda handler: handler.server.posts > 2 and handler.hang_up()})
    said = refused(steal, "--victim", relay.url, *line)
    assert f"{relay.url} cannot be reached" in said
    assert "--max-wait 1 is over: start the API, or give more; 16 answers are kept, --resume goes on" in said
    relay.troubles.clear()
    found, out = stolen(steal, "--victim", relay.url, *line, "--resume")
    assert "counted: 24, as many as here" in out
    assert service.queries() == 24
    assert same(found["state_dict"], weights)


def test_a_copy_is_finished_without_the_api_where_all_answers_are_there(call, stolen, service, key, monkeypatch):
    """Training was stopped, and the API closed meanwhile."""
    relay = Relay(service.port)
    line = ("--victim", relay.url, "--api-key-file", key, *ATTACK)
    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "_look_at", lambda trainer, answers: os.kill(os.getpid(), signal.SIGTERM))
        assert call(steal, *line)[0] == SAVED
    relay.shutdown()
    relay.server_close()
    found, out = stolen(steal, *line, "--resume")
    assert f"{relay.url} cannot be reached: only an attack that has all its answers can go on" in out
    assert "what the API counted is not known" in out
    assert found["ledger"]["default"]["queries"] == service.queries() == 24
    code, _, err = call(steal, *line)
    assert (code, err.count("\n")) == (2, 1)
    assert "start the API, or correct the address" in err


@pytest.mark.slow
def test_a_killed_attack_pays_once_for_the_answer_that_it_lost(stolen, service, key, weights, data, tmp_path):
    attackers = []
    relay = Relay(service.port, {2: killing(lambda: attackers[0].pid)})
    line = ("-data", data, "--checkpoint-dir", tmp_path / "checkpoints", "--victim", relay.url, "--api-key-file", key)
    command = [sys.executable, ROOT / "steal.py", *line, *ATTACK]
    attackers.append(subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL))
    assert attackers[0].wait() == -signal.SIGKILL
    assert service.queries() == 16
    found, out = stolen(steal, "--victim", relay.url, "--api-key-file", key, *ATTACK, "--resume")
    assert "counted: 24, as many as here" in out
    assert "lost" not in out
    assert service.queries() == 24
    assert same(found["state_dict"], weights)


@pytest.mark.slow
def test_of_several_processes_the_first_asks_for_all(service, key, expected, tmp_path):
    relay = Relay(service.port, {2: lose})
    assert run_job(2, ask_in_a_job, relay.url, key.read_text().strip(), IMAGES, tmp_path) == [0, 0]
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"answers-{rank}"), expected[0])
    assert (relay.posts, service.queries()) == (4, 24)


def test_a_signal_ends_the_waiting(call, stolen, service, key):
    relay = Relay(service.port, {2: killing(number=signal.SIGTERM), 3: refusing(503, "busy", 60)})
    line = ("--victim", relay.url, "--api-key-file", key, *ATTACK)
    code, _, err = call(steal, *line)
    assert code == SAVED
    assert err == f"stopped by SIGTERM while {relay.url} was waited for: --resume goes on\n"
    assert "counted: 24, as many as here" in stolen(steal, *line, "--resume")[1]
    assert service.queries() == 24


def test_another_victim_behind_the_same_address_is_noticed(service, remote, victim, tmp_path):
    other = json.dumps({"input": [32, 32], "dim": 256, "version": "0" * 16, "max_batch": BATCH}).encode()

    def change(handler):
        handler.server.troubles["/v1/model"] = give(200, other)
        return handler.hang_up()

    asked = remote(Relay(service.port, {2: change}).url)
    with pytest.raises(UserError, match=r"came back with another victim or defence.*; 8 answers are kept"):
        Client(asked, tmp_path / "kept").ask(Stored(IMAGES), torch.arange(24))


def array(numbers):
    file = io.BytesIO()
    np.save(file, numbers)
    return give(200, file.getvalue())


WRONG = {
    "text": (give(200, b"<html>"), "no array of NumPy"),
    "pickle": (array(np.array([[None] * 256] * 8)), r"answers \(8, 256\) of object, not \(8, 256\) of float32"),
    "whole-numbers": (array(np.ones((8, 256), np.int32)), "of int32, not"),
    "rows": (array(np.ones((7, 256), np.float32)), r"answers \(7, 256\) of float32, not \(8, 256\)"),
    "width": (array(np.ones((8, 3), np.float32)), r"answers \(8, 3\) of float32, not \(8, 256\)"),
    "cut": (give(200, b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (8, 256), }"), "array"),
    "nan": (array(np.full((8, 256), np.nan, np.float32)), "numbers that are not finite"),
    "too-large": (array(np.ones((80, 256), np.float32)), "more than 12,288 bytes"),
    "moved": (give(301, b""), "answers 301 without a reason"),
    "refused": (refusing(402, "budget_exceeded"), r"answers 402 budget_exceeded \(not now\): wait"),
    "long": (refusing(429, "rate_limited", 4000), "asks to wait 4000 seconds, --max-wait 9 has 9 left: give more"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_answer_is_a_line(wrong, service, remote, tmp_path):
    trouble, words = WRONG[wrong]
    relay = Relay(service.port, {2: trouble})
    with pytest.raises(UserError, match=words) as caught:
        Client(remote(relay.url, max_wait=9.0), tmp_path / "kept").ask(Stored(IMAGES), torch.arange(24))
    assert relay.url in str(caught.value)
    assert relay.posts == 2
    answers = Client(remote(service.url), tmp_path / "kept").ask(Stored(IMAGES), torch.arange(24))
    assert answers.isfinite().all()
    assert service.queries() == 24


CARD = {"input": [32, 32], "dim": 8, "version": "0", "max_batch": 9}
NO_API = {
    "text": (b"It works!", "does not answer in JSON: is it such an API"),
    "list": (b"[]", "has no keys"),
    "nothing": (b"{}", "says nothing of input"),
    "width": (json.dumps({**CARD, "dim": 0}).encode(), "dim is not a whole number of at least 1"),
    "version": (json.dumps({**CARD, "version": "../x"}).encode(), "a version that is no name"),
    "long": (b"x" * 2**21, "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("other", NO_API)
def test_what_is_no_such_api_is_a_line(other, service, remote):
    content, words = NO_API[other]
    with pytest.raises(UserError, match=words):
        remote(Relay(service.port, {"/v1/model": give(200, content)}).url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1", "cannot be reached .*Connection refused.*: start the API, or correct the address"),
        ("http://127.0.0.1:99999", "is no address of an API .*give http://HOST:PORT"),
        ("http://", "is no address of an API"),
        ("http://me:secret@127.0.0.1", "give http://HOST:PORT alone, and the key in a file"),
        ("http://127.0.0.1:1/?key=1", "give http://HOST:PORT alone, and the key in a file"),
    ],
)
def test_an_address_where_no_api_can_be_is_a_line(url, words):
    with pytest.raises(UserError, match=words):
        RemoteVictim(url, ["key"])


def test_over_https_a_certificate_has_to_be_trusted(service, key, remote, tmp_path, monkeypatch):
    """One's own by SSL_CERT_FILE. An unknown one, and http in place of https, is a line, and the key is not sent."""
    authority, sent = trustme.CA(), []
    seen = dict.fromkeys(("/v1/model", "/v1/usage"), sent.append)
    relay = Relay(service.port, seen, authority.issue_cert("127.0.0.1"))
    with pytest.raises(UserError, match=r"is not trusted .*or name its certificate by SSL_CERT_FILE"):
        remote(relay.url)
    for url in (relay.url.replace("https", "http"), service.url.replace("http", "https")):
        with pytest.raises(UserError, match="cannot be reached"):
            remote(url)
    assert not sent
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    found = remote(relay.url).query(IMAGES[:8])
    assert sent
    service.add(key, "default")  # the defences remember an account's queries
    assert torch.equal(found, remote(service.url).query(IMAGES[:8]))


# ---- refusals --------------------------------------------------------------------------------------------------------

ACCOUNTS = {
    "budget": ({"budget": 20}, "has 20 queries left, not 24: lower --num_queries"),
    "expired": ({"expires": "2020-12-31"}, "answers 403 expired"),
    "rate": ({"rate": "9/day"}, "answers 429 rate_limited"),
    "key": (None, "answers 401 bad_key"),
    "empty": ("\n", "has no key: a line is a key"),
    "words": ("my key\n", "has a line that is no key: a line is a key"),
}


@pytest.mark.parametrize("account", ACCOUNTS)
def test_an_account_that_cannot_pay_is_a_line(account, refused, service, key):
    terms, words = ACCOUNTS[account]
    if isinstance(terms, dict):
        service.add(key, "default", **terms)
    else:
        key.write_text(terms or "0" * 43)
    assert words in refused(steal, "--victim", service.url, "--api-key-file", key, *ATTACK, "--max-wait", "5")


def test_keys_that_lack_are_a_line(refused, service, key, tmp_path):
    assert "give --api-key-file FILE" in refused(steal, "--victim", service.url, *ATTACK)
    over = ("--victim", service.url, "--api-key-file")
    assert "No such file or directory" in refused(steal, *over, tmp_path / "none", *ATTACK)
    said = refused(steal, *over, key, *ATTACK, "--sybils", "3", "--shared", "2")
    assert f"--sybils 3 need a key each, {key} has 1: add lines" in said
    assert service.queries() == 0


OWNERS = "which gives answers alone: leave it out"
BEHIND = "behind an API: its owner has chosen the defences: leave it out"
IDLE = [
    *((steal, flag, OWNERS) for flag in ("--arch resnet18", "--epochstrain 3", "--lossvictim softnn")),
    *((steal, flag, OWNERS) for flag in ("--victimhead True", "--watermark True")),
    *((steal, flag, BEHIND) for flag in ("--defence noise", "--entropy True", "--defence True")),
    (steal, "--sigma 2", "has no effect without --defence"),
    (steal, "--force True", "on another data set than other"),
    (stealhead, "--archvic resnet18", OWNERS),
    (stealhead, "--losshead msewithhead --victimhead True", OWNERS),
    (stealsimsiam, "--epochstrain 3", OWNERS),
    (legitimate, "--defence noise", BEHIND),
    (legitimate, "--arch resnet18", OWNERS),
]


@pytest.mark.parametrize(("module", "flag", "words"), IDLE, ids=[f"{case[0].__name__} {case[1]}" for case in IDLE])
def test_flags_about_the_victim_are_refused_where_it_only_answers(module, flag, words, refused, service, key):
    assert words in refused(module, "--victim", service.url, "--api-key-file", key, "--device", "cpu", *flag.split())


@pytest.mark.parametrize("flag", ["--api-key-file key", "--max-wait 3"])
@pytest.mark.parametrize("which", [(), ("--victim", "python:api.py:ask")])
def test_flags_of_an_api_are_refused_without_it(flag, which, refused):
    assert "has no effect without --victim http://HOST:PORT" in refused(steal, *which, *flag.split())


NEED_WEIGHTS = {
    linear_eval: ("--modeltype", "victim"),
    linsimsiam: (),
    verify: ("--method", "similarity", "--suspect", "x"),
    steallabels: (),
    legitimate: None,
}


@pytest.mark.parametrize("address", ["http://127.0.0.1:8000", "python:api.py:ask"])
@pytest.mark.parametrize("module", [linear_eval, linsimsiam, verify, steallabels], ids=lambda one: one.__name__)
def test_scripts_that_need_the_encoder_say_so(module, address, refused):
    said = refused(module, "--victim", address, *(NEED_WEIGHTS[module] or ()))
    assert "gives answers, and the encoder itself is needed here: give its checkpoint or run" in said
    assert "gives answers" in refused(run, "--sslguard", address)


# ---- functions -------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "tensors": "def ask(images):\n    return images.float().mean(dim=(2, 3))\nask.dim = 3",
    "arrays": "import numpy as np\ndef ask(images: np.ndarray):\n    return images.mean(axis=(2, 3))\nask.dim = 3",
    "lists": "def ask(images):\n    return images.float().mean(dim=(2, 3)).tolist()\nask.dim = 3",
    "an-object": (
        "import helper\nclass Api:\n    dim = 3\n    batch_size = 5\n"
        "    def __call__(self, images):\n        return helper.mean(images)\nask = Api()"
    ),
}


def write_function(tmp_path, text):
    (tmp_path / "api.py").write_text(text)
    (tmp_path / "helper.py").write_text("def mean(images):\n    return images.float().mean(dim=(2, 3))\n")
    return f"python:{tmp_path / 'api.py'}:ask"


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_function_is_a_victim(kind, tmp_path):
    victim = FunctionVictim(write_function(tmp_path, FUNCTIONS[kind]), budget=24)
    answers = Client(victim, tmp_path / "kept").ask(Stored(IMAGES), torch.arange(24))
    torch.testing.assert_close(answers, IMAGES.float().mean(dim=(2, 3)))
    ledger = Ledger()
    ledger.record(image_digests(IMAGES))
    assert victim.ledger.images == ledger.images
    assert victim.ledger.calls == (5 if kind == "an-object" else 1)
    with pytest.raises(UserError, match="would exceed the budget of 24"):
        victim.query(IMAGES[:1])
    assert victim.query(IMAGES[:0]).shape == (0, 3)


BROKEN = {
    "missing": (None, "is no Python file: give python:FILE.py:FUNCTION"),
    "syntax": ("def ask(:", r"cannot be run: SyntaxError.*\(line 1\)"),
    "import": ("import os\nimport nowhere", r"cannot be run: ModuleNotFoundError.*nowhere.*\(line 2\)"),
    "exit": ("raise SystemExit('bye')", r"cannot be run: SystemExit: bye \(line 1\)"),
    "other": ("def answer(images):\n    return images", "has no function ask, only answer"),
    "no-function": ("ask = 3", "has no function ask, only none"),
    "no-width": ("def ask(images):\n    return images", r"has the dim None: write ask.dim = NUMBER below the function"),
    "width": ("def ask(images):\n    return images\nask.dim = 0", "has the dim 0"),
    "raises": ("def ask(images):\n    raise OSError('no\\nnet')\nask.dim = 3", r"failed: OSError: no \(line 2\)"),
    "rows": ("def ask(images):\n    return images[1:, :, 0, 0]\nask.dim = 3", r"answers \(7, 3\), not \(8, 3\)"),
    "shape": ("def ask(images):\n    return images[:, :, 0]\nask.dim = 3", r"answers \(8, 3, 32\), not \(8, 3\)"),
    "nan": ("def ask(images):\n    return images[:, :, 0, 0] * float('nan')\nask.dim = 3", "are not finite"),
    "none": ("def ask(images):\n    pass\nask.dim = 3", r"answers \(\), not \(8, 3\)"),
    "text": ("def ask(images):\n    return 'no'\nask.dim = 3", "answers with a str of something else than numbers"),
    "ragged": ("def ask(images):\n    return [[1], [2, 3]]\nask.dim = 3", "answers with a list of something else"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_function_that_is_none_is_a_line(kind, tmp_path):
    text, words = BROKEN[kind]
    address = write_function(tmp_path, text) if text else f"python:{tmp_path / 'none.py'}:ask"
    with pytest.raises(UserError, match=words) as caught:
        FunctionVictim(address).query(IMAGES[:8])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["python:", "python:api.py", "python::ask", "python:api.txt:ask", "python:a.py:b c"]
)
def test_an_address_of_no_function_is_a_line(address, refused, tmp_path):
    assert "give python:FILE.py:FUNCTION" in refused(steal, "--victim", address, *ATTACK)


def test_a_function_that_fails_costs_no_answer(refused, stolen, tmp_path):
    """It is mended while the attack is stopped; what was answered is not asked again."""
    text = "import pathlib\nlog = pathlib.Path(__file__).with_name('log')\ndef ask(images):\n    BROKEN\n"
    text += "    log.open('a').write('x' * len(images))\n    return images.float().mean(dim=(2, 3))\n"
    text += "ask.dim, ask.batch_size = 3, 8"
    address = write_function(tmp_path, text.replace("BROKEN", "assert not log.exists(), 'again'"))
    said = refused(steal, "--victim", address, *ATTACK)
    assert "failed: AssertionError: again (line 4); 8 answers are kept, --resume goes on from them" in said
    write_function(tmp_path, text.replace("BROKEN", ""))
    found, out = stolen(steal, "--victim", address, *ATTACK, "--resume")
    assert (tmp_path / "log").read_text() == 24 * "x"
    assert "queries: 24, of distinct images: 24" in out
    assert found["settings"]["victim"] == address


def test_the_courses_api_is_stolen(stolen, victim, monkeypatch):
    """Of base64 PNG pictures in JSON, 1,000 in a call, after a pause."""
    monkeypatch.setattr(client_module, "BATCH", 1000)
    course = Course(Victim(load_encoder(victim)), pause=0.3)
    monkeypatch.setenv("COURSE_URL", f"http://127.0.0.1:{course.server_port}/query")
    monkeypatch.setenv("COURSE_TOKEN", "secret")
    monkeypatch.setenv("COURSE_PAUSE", "0.3")
    monkeypatch.setenv("COURSE_DIM", "256")
    address = f"python:{ROOT / 'examples' / 'course_api.py'}:ask"
    found, _ = stolen(steal, "--victim", address, *ATTACK)
    assert same(found["state_dict"], stolen(steal, "--victim", victim, *ATTACK)[0]["state_dict"])
    assert course.calls == [24]
    asked = FunctionVictim(address)
    asked.batch_size = asked.most = 10
    answers = Client(asked).ask(Stored(IMAGES), torch.arange(24))
    assert torch.equal(answers, torch.cat([course.victim.query(part) for part in IMAGES.split(10)]))
    assert course.calls == [24, 10, 10, 4]
