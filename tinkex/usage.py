"""The local token meter: what a client has used, what that costs, and the budget it must keep to.

Before a request is sent, it reserves the most that it can cost; its result, or its failure,
replaces that by the true figure.  So concurrent requests cannot exceed the budget together.  Only
requests of this process are counted; the bill follows the server's own figures.  No threads.
"""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import CancelledError, Future
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from tinkex._runtime.numeric import is_finite, to_float
from tinkex.errors import BudgetExceededError, ConfigError, InvalidInputError, a_type
from tinkex.retry import left_undone

#: The key in a table of prices that stands for every model that is not listed.
ANY_MODEL = "*"


class Tokens(NamedTuple):
    """Token counts, by what is done with the tokens."""

    trained: int = 0
    prefilled: int = 0
    sampled: int = 0


@dataclasses.dataclass(frozen=True)
class Price:
    """The prices of a model, in USD per million tokens trained, prefilled and sampled.

    Raises:
        ConfigError: a price is not a number, or is negative.
    """

    train: float
    prefill: float
    sample: float

    def __post_init__(self) -> None:
        for name in ("train", "prefill", "sample"):
            amount = to_float(getattr(self, name), text=False)
            if not (is_finite(amount) and amount >= 0):
                raise ConfigError(
                    f"the price {name} is {amount!r}; it must be a finite number, 0 or more"
                )
            object.__setattr__(self, name, amount)

    def of(self, tokens: Sequence[int]) -> float:
        """Return the price of *tokens*, in USD."""
        per_million = (self.train, self.prefill, self.sample)
        return sum(price * count for price, count in zip(per_million, tokens)) / 1e6


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that one ServiceClient may use, in money, in tokens, or in both.

    Args:
        usd: the limit in USD, at the client's ``prices``; every model used must then have a price.
        tokens: the limit on tokens, of all kinds together.

    Raises:
        ConfigError: neither limit is given, or one is not positive.
    """

    usd: Optional[float] = None
    tokens: Optional[int] = None

    def __post_init__(self) -> None:
        if self.usd is None and self.tokens is None:
            raise ConfigError("a Budget needs usd or tokens")
        for name in ("usd", "tokens"):
            amount = to_float(getattr(self, name), text=False)
            if amount is not None and not (is_finite(amount) and amount > 0):
                raise ConfigError(
                    f"the budget's {name} is {amount!r}; it must be a positive, finite number"
                )
            object.__setattr__(self, name, amount)


class Account(NamedTuple):
    """What tokens are charged to: a client, its ``usage_tag``, and the base model."""

    client: str
    tag: Optional[str]
    model: Optional[str]


@dataclasses.dataclass(frozen=True)
class UsageRow:
    """What one client has used under one tag.

    Attributes:
        client: ``"run <id>"`` or ``"sampler <id>"``.
        tag: the client's ``usage_tag`` at the time, or None.
        model: the base model, or None if it is not known here.
        tokens: token counts, by kind.
        usd: the cost at the client's prices; None if the model has no price.
    """

    client: str
    tag: Optional[str]
    model: Optional[str]
    tokens: Tokens
    usd: Optional[float]


@dataclasses.dataclass(frozen=True)
class Usage:
    """A snapshot of what was used, as far as this process knows.

    Attributes:
        rows: one for each client, tag and model, in the order of first use.
        reserved: the most that unfinished work may still use, over all clients.
    """

    rows: Tuple[UsageRow, ...] = ()
    reserved: Tokens = Tokens()

    @property
    def tokens(self) -> Tokens:
        """The sum over the rows."""
        return Tokens(*map(sum, zip(Tokens(), *(row.tokens for row in self.rows))))

    @property
    def usd(self) -> Optional[float]:
        """The sum over the rows; None if a model that was used has no price."""
        costs = [row.usd for row in self.rows if row.usd is not None]
        return sum(costs) if len(costs) == len(self.rows) else None

    def of_tag(self, tag: Optional[str]) -> Usage:
        """Return the rows of one tag only; ``reserved`` still counts all tags."""
        return Usage(tuple(row for row in self.rows if row.tag == tag), self.reserved)


class Ledger:
    """Keeps the account of one session.  Thread-safe; never blocks."""

    def __init__(
        self, budget: Optional[Budget] = None, prices: Optional[Mapping[str, Price]] = None
    ) -> None:
        self.budget = budget
        self._prices = dict(prices or {})
        # Guards the attributes below.  Besides the rows, sums are kept by model, because every
        # request compares them with the budget, and a client may have any number of tags.
        self._lock = threading.Lock()
        self._rows: Dict[Account, List[int]] = {}
        self._used: Dict[Optional[str], List[int]] = {}  # by model
        self._reserved: Dict[Optional[str], List[int]] = {}  # by model
        self._open: Dict[Reservation, Any] = {}  # with the future of each, once it is known

    @property
    def needs_model(self) -> bool:
        """True if requests of unknown models must be refused."""
        return self.budget is not None and self.budget.usd is not None

    def reserve(self, what: str, account: Account, most: Tokens) -> Reservation:
        """Reserve *most* for a request that is about to be sent; messages call it *what*.

        Raises:
            BudgetExceededError: the request might exceed the budget.
            InvalidInputError: the budget is in USD, and the model has no price.
        """
        try:
            return self._reserve(what, account, most)
        except BudgetExceededError:
            # A caller that has just read a result expects its unused tokens to be free again.
            self._settle_done()
            return self._reserve(what, account, most)

    def _reserve(self, what: str, account: Account, most: Tokens) -> Reservation:
        reservation = Reservation(self, account, most)
        try:
            with self._lock:
                # Atomic with the reservation; otherwise two requests could both take what is left.
                if self.budget is not None:
                    self._check(what, account.model, most, self.budget)
                _add(self._reserved, account.model, most, 1)
                self._open[reservation] = None
        except BaseException:  # Ctrl-C: the caller never gets it, so nothing else would release it
            reservation.release()
            raise
        return reservation

    def _check(self, what: str, model: Optional[str], most: Tokens, budget: Budget) -> None:
        if budget.tokens is not None:
            used = sum(map(sum, self._used.values()))
            reserved = sum(map(sum, self._reserved.values()))
            if used + reserved + sum(most) > budget.tokens:
                raise _exceeded(what, "tokens", used, reserved, sum(most), budget.tokens)
        if budget.usd is not None:
            price = self._price(model)
            if price is None:
                raise InvalidInputError(
                    f"{what}: the budget is in USD, but there is no price for model {model!r}",
                    hint=f"Add one to prices=, or a price for any model, under {ANY_MODEL!r}.",
                )
            # `_cost` skips models without a price, but the check above has never admitted any.
            cost, reserved_usd = self._cost(self._used), self._cost(self._reserved)
            adds = price.of(most)
            if cost + reserved_usd + adds > budget.usd:
                raise _exceeded(what, "USD", cost, reserved_usd, adds, budget.usd)

    def bind(self, reservation: Reservation, future: Any) -> None:
        """Note the future of the request that *reservation* is for."""
        with self._lock:
            if reservation in self._open:
                self._open[reservation] = future

    def settle(self, reservation: Reservation, used: Tokens) -> None:
        """Replace the reserved tokens by *used*; only the first call has an effect."""
        account = reservation.account
        with self._lock:
            # The default cannot be None, which stands for a reservation that has no future yet.
            if self._open.pop(reservation, self) is self:  # settled before
                return
            # Atomic with adding *used*: in between, other requests would find room that is not
            # there.
            _add(self._reserved, account.model, reservation.most, -1)
            if any(used):
                _add(self._used, account.model, used, 1)
                _add(self._rows, account, used, 1)

    def _settle_done(self) -> None:
        """Settle the reservations of futures that are done."""
        # A future wakes its readers before it runs its callbacks, which include `settled`.
        with self._lock:
            bound = [(held, future) for held, future in self._open.items() if future is not None]
        # Outside the lock, which `settled` takes.
        for held, future in bound:
            if future.done():
                held.settled(future)

    def snapshot(self) -> Usage:
        """Return what was used until now."""
        self._settle_done()
        with self._lock:
            rows = [(account, Tokens(*counts)) for account, counts in self._rows.items()]
            reserved = Tokens(*map(sum, zip(Tokens(), *self._reserved.values())))
        found = []
        for account, tokens in rows:
            price = self._price(account.model)
            found.append(UsageRow(*account, tokens, None if price is None else price.of(tokens)))
        return Usage(tuple(found), reserved)

    def _price(self, model: Optional[str]) -> Optional[Price]:
        return self._prices.get(model or ANY_MODEL) or self._prices.get(ANY_MODEL)

    def _cost(self, by_model: Mapping[Optional[str], Sequence[int]]) -> float:
        prices = [(self._price(model), tokens) for model, tokens in by_model.items()]
        return sum(price.of(tokens) for price, tokens in prices if price is not None)


class Reservation:
    """The most that one request may use, reserved until its true use is known.

    Attributes:
        account: what it is charged to.
        most: the reserved tokens.
        used: the tokens used; set before the request's future is settled, if the response reports
            them.
    """

    __slots__ = ("_ledger", "account", "most", "used")

    def __init__(self, ledger: Ledger, account: Account, most: Tokens) -> None:
        self._ledger = ledger
        self.account = account
        self.most = most
        self.used: Optional[Tokens] = None

    def bind(self, future: Any) -> None:
        """Hold the reservation until *future*, an APIFuture, is settled."""
        self._ledger.bind(self, future)
        future.on_settled(self.settled)

    def release(self) -> None:
        """Note that nothing was used, because the request was not sent."""
        self._ledger.settle(self, Tokens())

    def settled(self, future: Any) -> None:
        """Note that the request's *future* is settled.  Idempotent."""
        used = self.used
        if used is None:
            # `most` is exact for a pass that was done, and safe for a sample that was lost.
            used = Tokens() if _costs_nothing(future) else self.most
        self._ledger.settle(self, used)


def _add(where: Dict[Any, List[int]], key: object, tokens: Tokens, sign: int) -> None:
    """Add *tokens*, or subtract them if *sign* is -1, kind by kind."""
    counts = where.get(key)
    if counts is None:
        counts = where[key] = [0, 0, 0]
    counts[0] += sign * tokens[0]
    counts[1] += sign * tokens[1]
    counts[2] += sign * tokens[2]


def _costs_nothing(future: Any) -> bool:
    """Return whether the server has certainly done nothing for *future*, an APIFuture."""
    # The method of the base class: APIFuture's own would count as reading the outcome.
    error = CancelledError() if future.cancelled() else Future.exception(future, 0)
    if error is None:
        return False
    was_accepted = future.request_id is not None
    return left_undone(error, was_sent=future.was_sent, was_accepted=was_accepted)


def _exceeded(
    what: str, unit: str, used: float, reserved: float, adds: float, limit: float
) -> BudgetExceededError:
    def shown(amount: float) -> str:
        return f"{amount:.6g} USD" if unit == "USD" else f"{amount} tokens"

    error = BudgetExceededError(
        f"{what} may use {shown(adds)}: with {shown(used)} used and {shown(reserved)} reserved "
        f"for work under way, the budget of {shown(limit)} might be exceeded",
        hint="When results arrive, reserved but unused amounts become free again. A smaller "
        "max_tokens reserves less.",
    )
    error.unit, error.limit = unit, limit
    error.used, error.reserved, error.adds = used, reserved, adds
    return error


def check_prices(prices: object) -> Dict[str, Price]:
    """Return a copy of a table of prices by model; raise ConfigError if it is something else."""
    if not isinstance(prices, Mapping):
        raise ConfigError(f"prices is {a_type(prices)}, not a mapping of Price by model")
    for model, price in prices.items():
        if not (isinstance(model, str) and isinstance(price, Price)):
            raise ConfigError(
                f"prices[{model!r}] is {price!r}; it must be a Price, under a model's name"
            )
    return dict(prices)
