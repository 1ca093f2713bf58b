"""The command line that adds, lists, renews and removes accounts."""

import sys
from dataclasses import dataclass

from service.accounts import Terms, as_line
from service.running import Database
from service.store import Store
from settings import Command, Parser, Settings, setting, settings_of

VERBS = {"add": 1, "list": 0, "renew": 1, "remove": 1}  # with the number of names that follow


@dataclass(frozen=True)
class Renewal(Settings):
    """What is renewed."""

    keep_key: bool = setting(False, "change the terms only: the account's key stays")
    title = "account"


def parse_accounts(words: list[str]) -> Command:
    """The command `VERB [NAME] [flags]`, with the values `verb` and `names`."""
    parser = Parser("Adds, lists, renews and removes accounts.", (Database, Terms, Renewal))
    parser.prog, forms = "serve.py accounts", "add NAME, list, renew NAME or remove NAME"
    parser.usage = f"serve.py accounts VERB [flags], where VERB is {forms}"
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    command, (verb, *names) = parser.parse(words[first:]), words[:first] or [""]
    if VERBS.get(verb) != len(names):
        parser.error(f"give {forms}, then flags")
    command.use_all(Database, *{"add": [Terms], "renew": [Terms, Renewal]}.get(verb, []))
    command.refuse_idle()
    command.set(verb=verb, names=names)
    return command


def change_accounts(command: Command) -> None:
    """Do to accounts what the command says. A key is printed alone on standard output.

    UserError for a name that is taken, or unknown.
    """
    store, terms = Store(command.database), {name: command.given.get(name) for name in settings_of(Terms)}
    if command.verb == "list":
        print("\n".join(map(as_line, store.customers())) or f"no accounts in {command.database}")
        return
    (name,), key = command.names, None
    if command.verb == "add":
        key = store.add(name, terms)
    elif command.verb == "renew":
        given = {term: value for term, value in terms.items() if value is not None}
        key = store.renew(name, given, command.keep_key)
    else:
        store.remove(name)
    if key:
        print(f"the key of {name}, shown this once (of it only a hash is kept):", file=sys.stderr)
        print(key)
