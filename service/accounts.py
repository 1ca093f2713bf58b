"""Accounts of the service: their terms, and whether these cover a request."""

import math
import re
import sqlite3
import time
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta

from service.refusal import Refusal
from settings import Settings, setting
from utils import UserError

SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}


def read_rate(text: str) -> str:
    """A rate such as 1000/minute, as it is. UserError for another text."""
    if not re.fullmatch(rf"[1-9][0-9]{{0,8}}/({'|'.join(SECONDS)})", text):
        raise UserError(f"{text!r} is no rate such as 1000/minute: a number of queries / {', '.join(SECONDS)}")
    return text


def read_day(text: str) -> str:
    """A day such as 2026-12-31, as it is. UserError for another text."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise UserError(f"{text!r} is no day such as 2026-12-31") from None


def check_account_name(text: str) -> str:
    """The name as it is. UserError where it has other characters than A-Z, a-z, 0-9, dot, dash and underscore."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise UserError(f"{text!r} is no name of an account: use up to 64 letters, digits, dots, dashes, underscores")
    return text


@dataclass(frozen=True)
class Terms(Settings):
    """What an account may ask."""

    budget: int | None = setting(
        None, "the most queries of the account, over its whole life", at_least=1, otherwise="no limit"
    )
    rate: str | None = setting(
        None, "the most queries of the account in a time, such as 1000/minute", read=read_rate, otherwise="no limit"
    )
    expires: str | None = setting(
        None, "the last day of the account's key, such as 2026-12-31 (UTC)", read=read_day, otherwise="none"
    )
    title = "account"


@dataclass(frozen=True)
class Customer:
    """An account as the ledger has it. tokens: the queries that its rate allowed at the time `filled`."""

    id: int
    name: str
    budget: int | None
    rate: str | None
    expires: str | None
    queries: int
    distinct_images: int
    calls: int
    tokens: float | None
    filled: float | None

    @classmethod
    def of(cls, row: sqlite3.Row) -> "Customer":
        return cls(**{field.name: row[field.name] for field in fields(cls)})

    @property
    def left(self) -> int | None:
        """The queries that the budget has left; None without a budget."""
        return None if self.budget is None else max(0, self.budget - self.queries)

    @property
    def usage(self) -> dict[str, object]:
        """What the account is told of its usage and terms."""
        counts = {"queries": self.queries, "distinct": self.distinct_images, "calls": self.calls}
        terms = {"budget": self.budget, "left": self.left, "expires": self.expires, "rate": self.rate}
        return {"account": self.name, **counts, **terms}

    def check_day(self, now: float) -> None:
        """Refusal after the account's last day; now: seconds since 1970."""
        if self.expires is None:
            return
        end = datetime.combine(date.fromisoformat(self.expires) + timedelta(days=1), datetime.min.time(), UTC)
        if now >= end.timestamp():
            message = f"the key of {self.name} was valid until {self.expires}"
            raise Refusal(403, "expired", message, "ask the owner of the service to renew it")

    def admit(self, count: int, now: float) -> float | None:
        """The tokens that are left after a request of `count` queries; None without a rate.

        Refusal where the budget or the rate does not cover all of them.
        """
        if self.left is not None and count > self.left:
            message = f"{count} queries would exceed the budget of {self.budget}: {self.queries} are spent"
            raise Refusal(402, "budget_exceeded", message, f"send at most {self.left} images")
        if self.rate is None:
            return None
        number, _, unit = self.rate.partition("/")
        size, a_second = int(number), int(number) / SECONDS[unit]
        if count > size:
            message = f"{count} queries are more than the rate of {self.rate} ever allows at once"
            raise Refusal(413, "too_large", message, f"send at most {size} images in a request")
        there = size if self.tokens is None else self.tokens + max(0.0, now - self.filled) * a_second
        there = round(min(float(size), there), 6)
        if count > there:
            wait = max(1, math.ceil(round((count - there) / a_second, 6)))
            message = f"the rate is {self.rate}, and {int(there)} queries are allowed now"
            raise Refusal(429, "rate_limited", message, f"send it again in {wait} seconds", wait)
        return there - count


def as_line(customer: Customer) -> str:
    """An account in a list, on one line."""
    words = [f"{customer.queries:,} queries, {customer.distinct_images:,} distinct, {customer.calls:,} calls"]
    words += [f"budget {customer.budget:,}"] if customer.budget is not None else []
    words += [f"rate {customer.rate}"] if customer.rate else []
    words += [f"expires {customer.expires}"] if customer.expires else []
    try:
        customer.check_day(time.time())
    except Refusal:
        words[-1] += " (over)"
    return f"{customer.name}: {', '.join(words)}"
