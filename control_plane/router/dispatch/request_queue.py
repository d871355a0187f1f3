"""RequestQueue: requests that wait for a prefill worker. Tenants take turns by what they were served; within a tenant
the most urgent goes first, then in order of submission.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): a tenant's counter grows
by the tokens it is served, prompt tokens when they are placed and output tokens as they come; the least counter goes
first. So what two tenants are served while both wait differs by a bounded amount, whatever they ask for.

    counter                                       one that comes back after a time without requests is lifted to
    A ---------------+                            (clock - credit): it goes first, and idleness is not saved up
    B --------------+                             beyond the credit
    C ------+.......|.....>+
            |       |      clock - credit         clock: the counter of whoever was placed last; nobody who waits and
            left    clock                         may be placed is behind it

One that comes back after a loss finds its old place in its tenant's line (reliability A3). Whether there is room for
one more is the caller's decision.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.submissions import Meter
from control_plane.router.shares import Shares
from engine.base import limits


@dataclass(slots=True)
class Account:
    """One tenant's."""

    tenant: str
    meter: Meter = field(default_factory=Meter)
    line: list[LiveRequest] = field(default_factory=list)  # by `order`, which no two share

    @property
    def turn(self) -> tuple[int, int]:
        """The least first; of equals, whoever came first."""
        return self.meter.tokens, self.line[0].submission.number


class RequestQueue:
    """`shares`: of the prompt tokens that wait. The queue keeps them; whether they allow one more it does not ask."""

    def __init__(self, shares: Shares, *, credit_tokens: int = limits.FAIR_CREDIT_TOKENS) -> None:
        self.shares = shares
        self._credit_tokens = credit_tokens
        self._accounts: dict[str, Account] = {}  # of every tenant that ever came: no more than there are keys
        self._waiting: dict[str, Account] = {}  # those with a line
        self._clock = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def meter(self, tenant: str) -> Meter:
        """Of what the tenant is served. Output tokens are added to it by whoever forwards them."""
        return self._account(tenant).meter

    def is_behind(self, request: LiveRequest) -> bool:
        """Its tenant has been served less than those whose turn it was last: it came back after a while."""
        return self._account(request.submit.tenant).meter.tokens < self._clock

    # -- in and out ----------------------------------------------------------------------------------------------------
    def put(self, request: LiveRequest) -> None:
        account = self._account(request.submit.tenant)
        if not account.line:
            account.meter.tokens = self._lifted(account)
            self._waiting[account.tenant] = account
        insort(account.line, request, key=_order)
        self._length += 1
        self.shares.take(account.tenant, len(request.token_ids))

    def remove(self, request: LiveRequest) -> None:
        account = self._account(request.submit.tenant)
        index = bisect_left(account.line, request.order, key=_order)
        assert account.line[index] is request
        del account.line[index]
        if not account.line:
            del self._waiting[account.tenant]
        self._length -= 1
        self.shares.give(account.tenant, len(request.token_ids))

    def place(self, request: LiveRequest, tokens: int) -> None:
        """It leaves, to have so many tokens computed."""
        self.remove(request)
        meter = self.meter(request.submit.tenant)
        self._clock = max(self._clock, meter.tokens)
        meter.tokens += tokens

    # -- turns ---------------------------------------------------------------------------------------------------------
    def in_turn(self, held_back: Callable[[LiveRequest], bool]) -> Iterator[LiveRequest]:
        """Those who wait, the one whose turn it is first. A tenant whose first one is held back for its own share's
        sake has no claim to what others are served meanwhile."""
        for account in sorted(self._waiting.values(), key=lambda account: account.turn):
            if held_back(account.line[0]):
                account.meter.tokens = max(account.meter.tokens, self._clock)
            else:
                yield from account.line

    def tokens_before(self, request: LiveRequest) -> int:
        """Prompt tokens that would be placed before a request that joined now, if nobody else came.

        Its own tenant's that are more urgent or older; and of each other tenant as many as bring its counter to where
        this one's will be by then.
        """
        account = self._account(request.submit.tenant)
        behind = account.line[bisect_left(account.line, request.order, key=_order) :]
        own_tokens = self.shares.held(account.tenant) - sum(len(each.token_ids) for each in behind)
        level = self._lifted(account) + own_tokens
        others = (each for each in self._waiting.values() if each is not account)
        return own_tokens + sum(
            min(self.shares.held(each.tenant), max(0, level - each.meter.tokens)) for each in others
        )

    def _account(self, tenant: str) -> Account:
        return self._accounts.setdefault(tenant, Account(tenant))

    def _lifted(self, account: Account) -> int:
        """Its counter, once it waits."""
        return account.meter.tokens if account.line else max(account.meter.tokens, self._clock - self._credit_tokens)


def _order(request: LiveRequest) -> tuple[int, int, int]:
    return request.order
