"""What a checkpoint says of where a model comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from files.reading import checked, number, record, table, tensor, text


def _digests(value: Any) -> str | None:
    """The check of digests, uint8 (N, 16) or flattened."""
    fits = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.numel() % 16 == 0
    return None if fits else "digests of 16 bytes"


# What a checkpoint may have of a `Record`.
_ACCOUNT = {"queries": number(whole=True, at_least=0), "calls": number(whole=True, at_least=0)}
_RECORDED = {
    "images": number(whole=True, at_least=0),
    "query_set": table(),
    "query_indices": tensor(torch.int64, (None,)),
    "stolen_from": text(),
    "victim_version": text(),
    "ledger": table(record(**_ACCOUNT, images=_digests)),
    "query_digests": tensor(torch.uint8, (None, 16)),
    "defence_report": table(number(finite=False)),
}


@dataclass
class Record:
    """What a checkpoint says of where a model comes from: the images, and what a copy's attacker asked of whom.

    images: how many a victim was trained on. query_set: data set, split and number of the images queried, query_indices
    (N,) their positions in that split, query_digests (N, 16) those of the pixels sent. ledger: the victim's record.
    defence_report: the defences' figures. stolen_from, victim_version: the weights of the encoder and of its API.
    """

    images: int | None = None
    query_set: dict | None = None
    query_indices: Tensor | None = None
    stolen_from: str | None = None
    victim_version: str | None = None
    ledger: dict = field(default_factory=dict)
    query_digests: Tensor | None = None
    defence_report: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict:
        """The entries of a checkpoint; those without a value are left out."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    def load_state_dict(self, checkpoint: Mapping) -> None:
        """Take the entries that a checkpoint has. UserError for values of another type.

        Until 2026 `defence_report` was called `met`.
        """
        earlier = {"defence_report": checkpoint["met"]} if "met" in checkpoint else {}
        for name, value in checked({**earlier, **checkpoint}, _RECORDED, "the checkpoint").items():
            setattr(self, name, value)

    @classmethod
    def of(cls, checkpoint: Mapping) -> "Record":
        record = cls()
        record.load_state_dict(checkpoint)
        return record

    def figures(self) -> dict[str, Any]:
        """Queries, distinct images queried, and the defences' figures, for a row."""
        accounts = self.ledger.values()
        distinct = {bytes(row) for account in accounts for row in account["images"].view(-1, 16).numpy()}
        queries = sum(account["queries"] for account in accounts)
        return {"queries": queries, "distinct": len(distinct), **self.defence_report}
