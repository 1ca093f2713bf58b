"""The service: answers as in process over HTTP, terms of accounts, and a ledger that no kill changes."""

import contextlib
import http.client
import importlib.util
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from jobs.early import SAVED

import numpy as np
import pytest
import torch
from PIL import Image

import serve
import service.store
from attacks.defended import owner_images
from data_aug.datasets import to_float
from data_aug.folders import resize
from defenses.buckets import Buckets
from defenses.detection import Detection
from defenses.noise import Noise
from defenses.poisoning import Poisoning
from defenses.rounding import Rounding
from defenses.transform import Transform
from models import load_encoder
from service.answering import Desk
from service.bodies import Preprocessing
from service.refusal import Refusal
from service.running import listen
from service.store import Store
from tests.networks import small_encoder
from tests.service import KNOWN, NPY, as_json, form, npy, picture, serving, serving_app, started
from utils import UserError
from victim import Victim


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A server of a victim without defences."""
    victim = Victim(small_encoder())
    with serving(tmp_path_factory.mktemp("plain"), victim) as server:
        yield server


# ---- answers ---------------------------------------------------------------------------------------------------------

DEFENCES = {
    "none": lambda: [],
    "noise": lambda: [Noise(sigma=0.2, secret=7)],
    "consistent": lambda: [Noise(sigma=0.2, consistent_noise=True, secret=7)],
    "b4b": lambda: [Buckets(bucket_bits=4, bucket_beta=20.0, secret=7), Transform(secret=7)],
    "poisoning": lambda: [Poisoning(poison_threshold=0.9, secret=7), Rounding(secret=7)],
    "detection": lambda: [Detection(secret=7), Transform(transform="affine-pad-shuffle", secret=7)],
}
# Calls: the account, and which images it asks about.
CALLS = [("alice", [0, 1, 2]), ("bob", [1]), ("alice", [3]), ("bob", [4, 5, 6, 7]), ("alice", [0, 8, 9, 10, 11])]


def in_process(name, images, calls=CALLS):
    """The answers to calls of a victim in this process, and the victim."""
    victim = Victim(small_encoder(16), defences=DEFENCES[name]())
    return [victim.query(images[rows], account) for account, rows in calls], victim


@pytest.mark.parametrize("name", DEFENCES)
def test_answers_and_usage_are_those_of_a_victim_in_process(name, images, tmp_path):
    expected, victim = in_process(name, images)
    with serving(tmp_path, Victim(small_encoder(16), defences=DEFENCES[name]())) as server:
        found = [server.query(images[rows], account) for account, rows in CALLS]
        usage = {account: server.usage(account) for account in ("alice", "bob")}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for account, entry in victim.ledger.accounts.items():
        counts = {key: usage[account][key] for key in ("queries", "distinct", "calls")}
        assert counts == {"queries": entry.queries, "distinct": entry.distinct, "calls": entry.calls}


@pytest.mark.parametrize("name", ["noise", "b4b", "poisoning", "detection"])
def test_desks_that_share_a_file_or_are_made_anew_answer_as_one(name, images, tmp_path):
    """Two processes by turns, and a third after both have gone."""
    expected, victim = in_process(name, images, CALLS * 3)
    store = Store(tmp_path / "service.sqlite")
    keys = {account: store.add(account, {}) for account in ("alice", "bob")}

    def new_desk():
        return Desk(Victim(small_encoder(16), defences=DEFENCES[name]()), Store(tmp_path / "service.sqlite"))

    desks = [new_desk(), new_desk()]
    for number, ((account, rows), wanted) in enumerate(zip(CALLS * 3, expected, strict=True)):
        desk = desks[number % 2] if number < 10 else new_desk()
        answered = desk.answer(desk.customer(keys[account]), images[rows])
        assert torch.equal(torch.from_numpy(np.load(io.BytesIO(answered.answers))), wanted)
    assert {c.name: c.queries for c in store.customers()} == {"alice": 27, "bob": 15}
    if name == "detection":  # it changes no answer
        assert desk.victim.defences[0].scores("alice") == victim.defences[0].scores("alice")


@pytest.mark.parametrize("name", ["noise", "b4b", "poisoning"])
def test_a_call_that_cannot_be_written_leaves_no_trace(name, images, tmp_path, monkeypatch):
    expected, _ = in_process(name, images, CALLS[:1] * 2)
    store = Store(tmp_path / "service.sqlite")
    key = store.add("alice", {})
    desk = Desk(Victim(small_encoder(16), defences=DEFENCES[name]()), store)

    def ask(rows=CALLS[0][1]):
        answered = desk.answer(desk.customer(key), images[rows])
        return torch.from_numpy(np.load(io.BytesIO(answered.answers)))

    assert torch.equal(ask(), expected[0])
    with monkeypatch.context() as patch:
        patch.setattr(Store, "charge", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="full"):
            ask([5, 6, 7])
    assert torch.equal(ask(), expected[1])
    assert desk.customer(key).queries == 6


def test_an_account_that_is_made_anew_begins_anew(images, tmp_path):
    store = Store(tmp_path / "service.sqlite")
    desk, answers = Desk(Victim(small_encoder(16), defences=DEFENCES["b4b"]()), store), []
    for _ in range(2):
        key = store.add("alice", {})
        answers.append([desk.answer(desk.customer(key), images[rows]).answers for rows in ([0, 1], [2, 3])])
        store.remove("alice")
        with pytest.raises(Refusal, match="no account has this key"):
            desk.customer(key)
    assert answers[0] == answers[1]


FORMS = {
    "npy of bytes": lambda images: (NPY, npy(images)),
    "npy of floats": lambda images: (NPY, npy(to_float(images))),
    "npy, channels last": lambda images: (NPY, npy(images.permute(0, 2, 3, 1).contiguous())),
    "form of PNGs": lambda images: form(*map(picture, images)),
    "JSON of PNGs": lambda images: ("application/json; charset=utf-8", as_json(*map(picture, images))),
    "JSON of npy": lambda images: ("application/json", as_json(npy(images[:2]), npy(images[2]))),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("accept", [NPY, "application/json"])
def test_all_forms_of_images_get_the_same_answers(name, accept, images, plain):
    kind, body = FORMS[name](images[:3])
    status, headers, answer = plain.ask("POST", "/v1/representations", body, {"Content-Type": kind, "Accept": accept})
    assert (status, headers["Content-Type"]) == (200, accept)
    expected = Victim(small_encoder()).query(images[:3])
    if accept == NPY:
        found = np.load(io.BytesIO(answer), allow_pickle=False)
    else:
        content = json.loads(answer)
        assert content["usage"] == plain.usage()
        found = np.float32(content["representations"])
    assert found.dtype == np.float32
    assert torch.equal(torch.from_numpy(found), expected)
    assert int(headers["X-Queries-Used"]) == plain.usage()["queries"]
    assert len(headers["X-Request-Id"]) == 32


def test_a_picture_alone(images, plain):
    for kind in ("PNG", "JPEG"):
        file = picture(images[0], kind)
        headers = {"Content-Type": f"image/{kind.lower()}"}
        _, _, answer = plain.ask("POST", "/v1/representations", file, headers)
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).permute(2, 0, 1)[None]
        assert torch.equal(torch.from_numpy(np.load(io.BytesIO(answer))), Victim(small_encoder()).query(pixels))


def test_what_is_done_to_images_before_the_encoder(images, tmp_path):
    large = torch.randint(0, 256, (2, 3, 60, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with serving(tmp_path, Victim(small_encoder()), preprocessing=Preprocessing(40, 32, 80)) as server:
        kind, body = form(*map(picture, large))
        _, _, answer = server.ask("POST", "/v1/representations", body, {"Content-Type": kind})
        floats = server.query(to_float(images))
    squares = resize(large[:, :, 5:55], 40)[:, :, 4:36, 4:36]
    seen = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(compressed(image))))) for image in squares])
    expected = Victim(small_encoder()).query(seen.permute(0, 3, 1, 2))
    assert torch.equal(torch.from_numpy(np.load(io.BytesIO(answer))), expected)
    assert floats.shape == (12, 32)
    assert not torch.equal(floats, Victim(small_encoder()).query(images))


def compressed(image, quality=80):
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


# ---- terms -----------------------------------------------------------------------------------------------------------


def test_threads_of_an_account_stay_within_its_budget(images, tmp_path):
    """Of calls at once so many are answered as the budget covers."""
    with serving(tmp_path, Victim(small_encoder()), {"alice": {"budget": 20}}) as server:

        def ask(number):
            return server.ask("POST", "/v1/representations", npy(images[number : number + 3]), KNOWN)[0]

        with ThreadPoolExecutor(8) as pool:
            found = sorted(pool.map(ask, range(8)))
        assert found == [200] * 6 + [402] * 2
        usage = server.usage()
        assert (usage["queries"], usage["left"], usage["calls"]) == (18, 2, 6)


def test_a_request_that_is_repeated_while_it_is_answered_costs_once(images, tmp_path):
    with serving(tmp_path, Victim(small_encoder(16), defences=DEFENCES["b4b"]())) as server:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: server.query(images, Idempotency_Key="a"), range(4)))
        assert all(torch.equal(answers, found[0]) for answers in found)
        assert server.usage()["queries"] == 12


@pytest.fixture
def desk_at(tmp_path):
    """A desk whose clock stands at `desk.now`."""

    def make(**terms):
        store = Store(tmp_path / "service.sqlite")
        desk = Desk(Victim(small_encoder()), store, clock=lambda: desk.now)
        desk.now, desk.key = 1_800_000_000.0, store.add("alice", terms)  # 15 January 2027, 8:00 UTC
        return desk

    return make


def outcome(desk, images):
    """The status of a request, the seconds to wait, and the account's queries after it."""
    try:
        customer = desk.customer(desk.key)
        return 200, None, desk.answer(customer, images).customer.queries
    except Refusal as refusal:
        return refusal.status, refusal.wait, desk.store.customer(desk.key).queries


def test_a_budget_covers_all_of_a_request_or_nothing(desk_at, images):
    desk = desk_at(budget=9)
    asked = [outcome(desk, images[:count]) for count in (5, 5, 4, 1)]
    assert asked == [(200, None, 5), (402, None, 5), (200, None, 9), (402, None, 9)]


def test_a_rate_is_of_images_and_grows_back(desk_at, images):
    desk = desk_at(rate="6/minute")
    steps = [(0, 4), (0, 3), (9, 3), (1, 3), (0, 1), (3600, 6), (0, 1), (60, 7)]
    found = []
    for seconds, count in steps:
        desk.now += seconds
        found.append(outcome(desk, images[:count])[:2])
    assert found == [
        *[(200, None), (429, 10), (429, 1), (200, None), (429, 10)],
        *[(200, None), (429, 10), (413, None)],
    ]


def test_a_key_is_valid_on_its_last_day(desk_at, images):
    desk = desk_at(expires="2027-01-15")
    desk.now += 15.9 * 3600
    assert outcome(desk, images)[0] == 200
    desk.now += 0.2 * 3600
    assert outcome(desk, images) == (403, None, 12)


def test_a_repeated_request_costs_nothing(images, tmp_path, monkeypatch):
    monkeypatch.setattr(service.store, "KEPT", 2)
    victim = Victim(small_encoder(16), defences=DEFENCES["noise"]())
    with serving(tmp_path, victim, {"alice": {"budget": 9}}) as server:
        first = server.query(images[:4], Idempotency_Key="a")
        assert not torch.equal(first, server.query(images[:4], Idempotency_Key="b"))
        for body in (npy(images[:4]), npy(images[:4].permute(0, 2, 3, 1).contiguous())):
            headers = {**KNOWN, "Idempotency-Key": "a"}
            status, found, answer = server.ask("POST", "/v1/representations", body, headers)
            assert (status, found["X-Replayed"], found["X-Queries-Left"]) == (200, "true", "1")
            assert torch.equal(torch.from_numpy(np.load(io.BytesIO(answer))), first)
        status, _, answer = server.ask("POST", "/v1/representations", npy(images[1:5]), headers)
        assert (status, json.loads(answer)["error"]["code"]) == (409, "idempotency_mismatch")
        server.query(images[:1], Idempotency_Key="c")
        assert server.usage()["queries"] == 9
        # Two are kept: the first is forgotten, and the budget has no room for it.
        status, _, _ = server.ask("POST", "/v1/representations", npy(images[:4]), headers)
        assert status == 402


def test_the_file_has_no_key_and_only_its_owner_reads_it(tmp_path, images):
    store = Store(tmp_path / "service.sqlite")
    key = store.add("alice", {})
    desk = Desk(Victim(small_encoder()), store)
    desk.answer(desk.customer(key), images)
    files = sorted(tmp_path.iterdir())
    assert {file.name for file in files} == {"service.sqlite", "service.sqlite-shm", "service.sqlite-wal"}
    content = b"".join(file.read_bytes() for file in files)
    assert b"alice" in content
    assert key.encode() not in content
    assert key.removeprefix("sk-").encode() not in content
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_file_goes_on_with_the_same_service_only(tmp_path, images):
    store = Store(tmp_path / "service.sqlite")
    version = store.settle("one")
    assert len(version) == 16
    assert store.settle("another") != version  # nothing was answered yet
    key = store.add("alice", {})
    version = store.settle("one")
    desk = Desk(Victim(small_encoder()), store)
    desk.answer(desk.customer(key), images)
    assert Store(tmp_path / "service.sqlite").settle("one") == version
    with pytest.raises(UserError, match="start the service as before, or give --database"):
        store.settle("another")
    assert Store(tmp_path / "other.sqlite").settle("one") != version


def test_other_files_are_no_databases(tmp_path):
    (tmp_path / "text").write_text("no database at all, but a text of some length\n" * 20)
    with pytest.raises(UserError, match="cannot be used as a database"):
        Store(tmp_path / "text")
    with contextlib.closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE songs (name)")
    with pytest.raises(UserError, match="of another program"):
        Store(tmp_path / "other")


def test_pages_that_need_no_key(plain):
    assert json.loads(plain.ask("GET", "/healthz", account=None)[2]) == {"status": "ok"}
    assert plain.ask("GET", "/docs", account=None)[0] == 200
    paths = json.loads(plain.ask("GET", "/openapi.json", account=None)[2])["paths"]
    assert paths.keys() == {"/v1/representations", "/v1/usage", "/v1/model", "/healthz"}
    assert NPY in paths["/v1/representations"]["post"]["requestBody"]["content"]


# ---- the command -----------------------------------------------------------------------------------------------------


def accounts(capsys, folder, *words):
    """The output of a command about accounts."""
    code, out, err = call_words(capsys, "accounts", *words, "--database", folder / "service.sqlite")
    assert code == 0, err
    return out


def call_words(capsys, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["serve.py", *map(str, words)])
        code = 0
        try:
            serve.main()
        except SystemExit as stop:
            code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_accounts_are_added_listed_renewed_and_removed(capsys, tmp_path):
    terms = ("--budget", "9000", "--rate", "1000/minute", "--expires", "2026-12-31")
    key = accounts(capsys, tmp_path, "add", "alice", *terms).strip()
    store = Store(tmp_path / "service.sqlite")
    assert store.customer(key).usage["rate"] == "1000/minute"
    line = "alice: 0 queries, 0 distinct, 0 calls, budget 9,000, rate 1000/minute, expires 2026-12-31"
    assert accounts(capsys, tmp_path, "list").startswith(line)
    assert accounts(capsys, tmp_path, "renew", "alice", "--budget", "10000", "--keep-key") == ""
    assert (store.customer(key).budget, store.customer(key).expires) == (10000, "2026-12-31")
    new = accounts(capsys, tmp_path, "renew", "alice", "--expires", "2027-12-31").strip()
    assert store.customer(key) is None
    assert (store.customer(new).budget, store.customer(new).expires) == (10000, "2027-12-31")
    accounts(capsys, tmp_path, "remove", "alice")
    assert accounts(capsys, tmp_path, "list").startswith("no accounts in ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("accounts", "give add NAME, list, renew NAME or remove NAME"),
        ("accounts add", "give add NAME"),
        ("accounts list alice", "give add NAME"),
        ("accounts grow alice", "give add NAME"),
        ("accounts add al/ice", "'al/ice' is no name of an account"),
        ("accounts add alice --budget 0", "'0' is not a whole number of at least 1"),
        ("accounts add alice --rate fast", "'fast' is no rate such as 1000/minute"),
        ("accounts add alice --expires never", "'never' is no day such as 2026-12-31"),
        ("accounts add alice --keep-key", "--keep-key has no effect"),
        ("accounts list --budget 5", "--budget has no effect"),
        ("accounts remove bob", "no account bob; there: none"),
        ("--defence True", "name the defences, as --defence buckets,transform"),
        ("--defence noise,detection", "--defence detection changes no answer"),
        ("--sigma 2", "--sigma has no effect without --defence"),
        ("--crop 40 --resize 32", "--crop 40 is more than --resize 32 leaves"),
        ("--port 70000", "not a whole number of at least 0 and of at most 65535"),
        ("--victim none.pth.tar", "none.pth.tar"),
    ],
)
def test_commands_that_cannot_be_are_one_line(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call_words(capsys, *line.split())
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_package_that_is_absent_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else find(name))
    with pytest.raises(UserError, match=r"fastapi not installed: pip install -r requirements-serve\.txt"):
        serve.check_packages()


def test_a_port_that_is_taken_is_one_line():
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="give another --port"):
        listen("127.0.0.1", taken.getsockname()[1])


# ---- processes that are killed ---------------------------------------------------------------------------------------


def cut_off(folder, new_desk, images, statements):
    """A process that is killed before so many statements of its call were executed; whether that came to an end."""
    child = os.fork()
    if not child:
        try:
            _ask_and_die(new_desk(folder), folder, images, statements)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def _ask_and_die(desk, folder, images, statements):
    torch.set_num_threads(1)  # the threads of the parent are not in its child
    left = [statements]

    def count(statement):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    key = desk.store.add("alice", {})
    (folder / "key").write_text(key)
    desk.answer(desk.customer(key), images[:2], "first")
    desk._order.submit(lambda: desk.store._db.set_trace_callback(count)).result()
    desk.answer(desk.customer(key), images[2:5], "second")


@pytest.mark.parametrize("name", ["b4b", pytest.param("noise", marks=pytest.mark.slow)])
def test_a_kill_between_any_two_writes_leaves_all_of_a_call_or_nothing(name, images, tmp_path):
    expected, _ = in_process(name, images, [("alice", [0, 1]), ("alice", [2, 3, 4])])

    def new_desk(folder):
        return Desk(Victim(small_encoder(16), defences=DEFENCES[name]()), Store(folder / "service.sqlite"))

    charged = []
    for statements in range(100):
        (folder := tmp_path / f"{statements}").mkdir()
        ended = cut_off(folder, new_desk, images, statements)
        desk, key = new_desk(folder), (folder / "key").read_text()
        charged.append(desk.customer(key).queries)
        answered = desk.answer(desk.customer(key), images[2:5], "second")
        assert torch.equal(torch.from_numpy(np.load(io.BytesIO(answered.answers))), expected[1])
        assert answered.customer.usage["queries"] == answered.customer.usage["distinct"] == 5
        assert answered.replayed == (charged[-1] == 5)
        if ended:
            break
    assert ended
    assert len(charged) > 10
    assert charged == sorted(charged)
    assert set(charged) == {2, 5}


@pytest.fixture
def victim_file(encoder, write_npz, tmp_path):
    """A finished victim of a small network, and its folder."""
    settings = {"dataset": f"npz:{write_npz()}", "epochs": 1, "losstype": "infonce"}
    state = {"epoch": 1, "arch": "resnet10w32", "settings": settings}
    torch.save({**state, "state_dict": encoder.state_dict()}, tmp_path / "victim.pth.tar")
    return tmp_path / "victim.pth.tar"


def test_the_command_opens_what_its_flags_say(victim_file, images, tmp_path, monkeypatch):
    """Cells by k-means of the victim's own images, preprocessing, and the card; and all that again after a restart."""
    monkeypatch.chdir(tmp_path)
    key = Store(tmp_path / "service.sqlite").add("alice", {})
    words = ["--victim", "victim.pth.tar", "--database", "service.sqlite", "--device", "cpu", "--precision", "fp32"]
    words += ["--defence", "buckets", "--bucket-cells", "kmeans", "--bucket-bits", "3", "--bucket-beta", "20"]
    words += ["--secret", "7", "--resize", "32", "--max-batch", "9", "--price", "1.5"]
    defence = Buckets(bucket_bits=3, bucket_cells="kmeans", bucket_beta=20.0, secret=7)
    local, cards = Victim(load_encoder(victim_file), defences=[defence]), []
    local.prepare(owner_images(victim_file, tmp_path, defence.owner_images, 7))
    for rows in (slice(0, 4), slice(4, 12)):
        with serving_app(serve.open_app(words), {"alice": key}) as server:
            assert torch.equal(server.query(images[rows]), local.query(images[rows], "alice"))
            cards.append(json.loads(server.ask("GET", "/v1/model")[2]))
    assert cards[0] == cards[1]
    assert len(cards[0].pop("version")) == 16
    shown = {"resize": 32, "crop": None, "jpeg_quality": None, "normalisation": "unknown"}
    told = {"input": [32, 32], "dim": 256, "max_batch": 9, "price_per_1000": 1.5}
    assert cards[0] == {**told, "preprocessing": shown}
    with pytest.raises(UserError, match="start the service as before"):
        serve.open_app([*words, "--crop", "30"])


def test_an_api_takes_the_size_that_its_victims_file_says_or_the_command(victim_file, tmp_path):
    torch.save({**torch.load(victim_file), "input_size": 48}, victim_file)
    for more, side in (((), 48), (("--size", "64"), 64), (("--resize", "80"), 80)):
        database = tmp_path / f"{side}.sqlite"
        key = Store(database).add("alice", {})
        words = ["--victim", str(victim_file), "--database", str(database), "--device", "cpu", *more]
        with serving_app(serve.open_app(words), {"alice": key}) as server:
            assert json.loads(server.ask("GET", "/v1/model")[2])["input"] == [side, side]
            assert server.query(torch.zeros(2, 3, side, side, dtype=torch.uint8)).shape == (2, 256)


DEFENDED = ("--defence", "buckets,transform,noise", "--bucket-bits", "4", "--bucket-beta", "20", "--secret", "7")


def defended_victim(path):
    defences = [Buckets(bucket_bits=4, bucket_beta=20.0, secret=7), Transform(secret=7), Noise(secret=7)]
    return Victim(load_encoder(path), defences=defences)


def test_a_killed_server_goes_on_as_if_nothing_had_happened(victim_file, images, tmp_path):
    """SIGKILL while calls are answered: those that were charged are repeated by their keys, and cost nothing."""
    store = Store(tmp_path / "service.sqlite")
    keys = {name: store.add(name, {"budget": 1000} if name == "alice" else {}) for name in ("alice", "bob")}
    local, found = defended_victim(victim_file), []
    calls = [("alice" if number % 3 else "bob", images[number % 5 : number % 5 + 4]) for number in range(12)]
    with started(tmp_path, *DEFENDED) as (process, server):
        server.keys = keys
        for number, (account, asked) in enumerate(calls[:6]):
            found.append(server.query(asked, account, Idempotency_Key=f"{number}"))
        killer = threading.Timer(0.02, process.kill)
        killer.start()
        answered = 6
        with contextlib.suppress(OSError, http.client.HTTPException):
            while answered < len(calls):
                account, asked = calls[answered]
                found.append(server.query(asked, account, Idempotency_Key=f"{answered}"))
                answered += 1
        killer.join()
    charged = {customer.name: customer.queries for customer in Store(tmp_path / "service.sqlite").customers()}
    sent = [account for account, _ in calls[: answered + 1]]
    for name, queries in charged.items():  # what was answered was charged, and nothing that was not asked
        assert 4 * sum(account == name for account, _ in calls[:answered]) <= queries <= 4 * sent.count(name)
    with started(tmp_path, *DEFENDED) as (process, server):
        server.keys = keys
        for number, (account, asked) in list(enumerate(calls))[answered:]:
            found.append(server.query(asked, account, Idempotency_Key=f"{number}"))
        usage = {name: server.usage(name) for name in keys}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == SAVED
    for (account, asked), answers in zip(calls, found, strict=True):
        assert torch.equal(answers, local.query(asked, account))
    for name, entry in local.ledger.accounts.items():
        counts = {key: usage[name][key] for key in ("queries", "distinct", "calls")}
        assert counts == {"queries": entry.queries, "distinct": entry.distinct, "calls": entry.calls}
    assert usage["alice"]["left"] == 1000 - usage["alice"]["queries"]


@pytest.mark.slow
def test_two_processes_answer_as_one(victim_file, images, tmp_path):
    """Clients at once; then one process is killed, and another takes its place."""
    store = Store(tmp_path / "service.sqlite")
    names = ("alice", "bob", "carol", "dave")
    keys, found = {name: store.add(name, {}) for name in names}, {}
    local = defended_victim(victim_file)
    with started(tmp_path, "--workers", "2", *DEFENDED) as (process, server):
        server.keys = keys

        def stream(name):
            first = names.index(name)
            found[name] = [server.query(images[(first + n) % 8 : (first + n) % 8 + 4], name) for n in range(12)]

        def ask_all():
            threads = [threading.Thread(target=stream, args=(name,)) for name in names]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]

        for turn in range(2):
            ask_all()
            for first, name in enumerate(names):
                expected = [local.query(images[(first + n) % 8 : (first + n) % 8 + 4], name) for n in range(12)]
                assert all(torch.equal(a, b) for a, b in zip(found[name], expected, strict=True)), (turn, name)
            children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
            os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
            time.sleep(1)
        assert all(server.usage(name)["queries"] == 96 for name in names)
