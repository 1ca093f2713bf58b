"""Buying answers: where the settings of `Attack` become queries."""

from collections.abc import Callable

import torch
from torch import Tensor

from attacks import CSE, Attack
from attacks.adaptive import ask_as_sybils, ask_within, check_components, restore_answers, without_mark
from attacks.answers import Answers
from attacks.client import Client
from attacks.queries import queries_sent
from data_aug.images import Images, Stored


def buy(
    client: Client,
    images: Images,
    attack: Attack,
    count: int,
    draws: torch.Generator,
    features: Callable[[Images], Tensor] | None = None,
) -> Answers:
    """Ask the client's victim about N images as the attack says.

    With `max_coverage` it asks about `count` of them, chosen by the attacker's own `features` of all images (N, F),
    which cost no queries. CSE compares the answers with those of what was sent. Streamed images are sent unchanged,
    with a single query each.
    """
    if attack.restore == CSE:
        check_components(attack.cse_components, client.victim.dim)
    index = torch.arange(len(images))
    if attack.max_coverage is not None:
        chosen, rows, words = ask_within(client, images, features(images), count, attack.max_coverage, draws)
        part = images[chosen]
        bought = Answers(chosen, part, part, rows, attack, client.sources, [words])
    else:
        sent = queries_sent(images, attack, draws) if isinstance(images, Stored) else images
        sources = index.repeat(attack.n_views)
        if attack.sybils > 1:
            rows, findings = ask_as_sybils(client, sent, sources, attack.sybils, attack.shared)
        else:
            rows, findings = client.ask(sent, sources), []
        bought = Answers(index, images, sent, rows, attack, client.sources, findings)
    bought = bought.without_losses(client.lost) if client.lost else bought
    if attack.restore == CSE:
        return without_mark(bought, features(bought.sent), attack.cse_components)
    return restore_answers(bought) if attack.restore else bought
