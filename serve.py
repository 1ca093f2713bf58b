"""Serves a victim over HTTP: accounts with keys, budgets and rates; defences per account; see docs/service.md.

python serve.py accounts add alice --budget 9000 --rate 1000/minute     # prints the key, once
python serve.py --victim VICTIM --defence buckets,transform --port 8000
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs.early  # noqa: F401

from attacks.defended import defend
from data_aug.sizes import SIZE, Data
from defenses import DEFENCES, Defence, DefenceChoice, use_defences
from evaluation.encoders import open_owner
from jobs.ending import script
from jobs.machine import Machine, set_up
from service.answering import Desk
from service.bodies import Limits, Preprocessing, Reader
from service.managing import change_accounts, parse_accounts
from service.running import Database, Serving, check_packages, run_server
from service.store import Store
from settings import Command, Parser, Settings, setting, settings_of
from training import finding
from utils import UserError


@dataclass(frozen=True)
class Offer(Settings):
    """What is sold, and what the buyer is told."""

    victim: Path | None = setting(None, "the checkpoint, run folder or run name", otherwise="the only victim")
    secret: int | None = setting(
        None, "seed of the defences' random draws", otherwise="drawn once and kept in --database", title="defence"
    )
    price: float | None = setting(None, "the price of 1,000 queries, which the service only tells", at_least=0)
    disclose: bool = setting(True, "tell accounts what is done to images before the encoder")
    title = "victim"


def make_parser() -> Parser:
    owners = (Data, Offer, DefenceChoice, *DEFENCES.values(), Preprocessing, Limits, Serving, Database, Machine)
    without = ("entropy", "run_dir", "seed", "resume", "clear", "fp16_precision")
    return Parser(__doc__, owners, kind="service", without=without)


def parse(line: Sequence[str] | None = None) -> Command:
    words = [*map(str, sys.argv[1:] if line is None else line)]
    if words[:1] == ["accounts"]:
        return parse_accounts(words[1:])
    command = make_parser().parse(words)
    if command.defence is True:
        raise UserError("--defence True depends on an attack's loss: name the defences, as --defence buckets,transform")
    command.use_all(Data, Offer, Preprocessing, Limits, Serving, Database, Machine)
    if use_defences(command, "", 0) and "detection" in command.defence.split(","):
        raise UserError("--defence detection changes no answer, and a service shows its scores nowhere: leave it out")
    command.refuse_idle()
    return command


def open_app(words: Sequence[str]) -> Callable[..., Any]:
    """The ASGI application of a command line, in this process."""
    from service.web import Front  # here: accounts need no FastAPI

    command = parse(words)
    _, precision = set_up(command)
    command[Serving].use_threads()
    path = finding.find(command, "victim", "victim", {})
    encoder, _ = open_owner(command, path)
    store, defences, preprocessing = Store(command.database), command.all(Defence), command[Preprocessing]
    for defence in defences:
        defence.secret = int.from_bytes(store.derive("defences")) if command.secret is None else command.secret
    victim = defend(command, path, encoder, precision, None)
    settings = [{name: getattr(one, name) for name in settings_of(one)} for one in (*defences, preprocessing)]
    secrets = [(type(defence).__name__, defence.secret) for defence in defences]
    reader = Reader(preprocessing, command.given.get("size") or encoder.input_size or SIZE, command[Limits])
    card = {
        "input": 2 * [preprocessing.resize or reader.size],
        "dim": victim.dim,
        "version": store.settle(repr((victim.version, precision.name, reader.size, settings, secrets))),
        "max_batch": command.max_batch,
        "price_per_1000": command.price,
        "preprocessing": preprocessing.shown if command.disclose else None,
    }
    return Front(Desk(victim, store), reader, card).app()


@script
def main() -> None:
    command = parse()
    if "verb" in command.values:
        change_accounts(command)
        return
    check_packages()
    run_server(command[Serving], functools.partial(open_app, sys.argv[1:]))


if __name__ == "__main__":
    main()
