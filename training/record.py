"""What a checkpoint says of where a model comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from data_aug.digests import HASH_BYTES, unpack_digests
from data_aug.sizes import SIZE
from files.reading import checked
from models.files import RECORDED


@dataclass
class Record:
    """What a checkpoint says of where a model comes from: the images, and what a copy's attacker asked of whom.

    images: how many a victim was trained on. query_set: data set, split and number of the images queried, how many
    were available, and their side, where it is not SIZE; query_indices (N,) their positions in that split,
    query_digests (N, 16) those of the pixels sent. ledger: the victim's record. defence_report: the defences' figures.
    stolen_from, victim_version: the weights of the encoder and of its API. drawn_for: the purpose for which the seed
    drew the initial weights, where it is not a victim's; until November 2026 a copy's were a victim's.
    """

    images: int | None = None
    query_set: dict | None = None
    query_indices: Tensor | None = None
    stolen_from: str | None = None
    victim_version: str | None = None
    drawn_for: str | None = None
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
        entries = checked(checkpoint, RECORDED, "the checkpoint")
        earlier = {"defence_report": entries.pop("met")} if "met" in entries else {}
        for name, value in {**earlier, **entries}.items():
            setattr(self, name, value)

    @property
    def size(self) -> int:
        """The side of the images queried, in pixels."""
        return (self.query_set or {}).get("size", SIZE)

    @classmethod
    def of(cls, checkpoint: Mapping) -> "Record":
        record = cls()
        record.load_state_dict(checkpoint)
        return record

    def figures(self) -> dict[str, Any]:
        """Queries, distinct images queried, and the defences' figures, which cannot take the place of these.

        near_distinct is None where an earlier version kept no perceptual hashes.
        """
        accounts = self.ledger.values()
        distinct = {digest for account in accounts for digest in unpack_digests(account["images"])}
        hashes = [unpack_digests(account["near"], HASH_BYTES) for account in accounts if "near" in account]
        near = len(set().union(*hashes)) if len(hashes) == len(accounts) else None
        queries = sum(account["queries"] for account in accounts)
        return {**self.defence_report, "queries": queries, "distinct": len(distinct), "near_distinct": near}


def named_size(size: int) -> dict[str, int]:
    """The entry of a `query_set` for the side of its images: none for the usual one, as before there were others."""
    return {} if size == SIZE else {"size": size}
