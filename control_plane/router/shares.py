"""Shares: how much of something that all tenants use one of them may hold. Whoever floods cannot take it all.

    a tenant may hold  alpha * (capacity - what all hold)

Dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", IEEE/ACM
Transactions on Networking 6(2), 1998). With n tenants at their thresholds 1 / (1 + n * alpha) of the capacity is free,
for the next one to come. What a tenant holds over its threshold (it fell when others came) is not taken away; it only
gets no more. One tenant may hold everything: there is nobody to keep it from.

What is shared out, and what becomes of a request that finds no room, is the caller's business.
"""

from collections import Counter

from engine.base import limits


class Shares:
    """Amounts are whole numbers of one unit: choices, tokens."""

    def __init__(self, capacity: int, *, tenants: int, alpha: int = limits.SHARE_ALPHA) -> None:
        self.capacity = capacity  # may change: what is held stays held
        self._alone = tenants <= 1
        self._alpha = alpha
        self._held: Counter[str] = Counter()  # no zeros: it is as long as there are tenants that hold something
        self.total = 0

    def held(self, tenant: str) -> int:
        return self._held[tenant]

    def fits(self, amount: int) -> bool:
        """Whether there is so much left, for whomever."""
        return self.total + amount <= self.capacity

    def allows(self, tenant: str, amount: int) -> bool:
        """Whether the tenant's threshold does. One that holds nothing is always allowed one thing, however large."""
        held = self._held[tenant]
        return self._alone or not held or held + amount <= self._alpha * (self.capacity - self.total)

    def take(self, tenant: str, amount: int) -> None:
        """Unasked: what was accepted before, and comes back, is counted and not refused."""
        self._add(tenant, amount)

    def give(self, tenant: str, amount: int) -> None:
        assert amount <= self._held[tenant]
        self._add(tenant, -amount)

    def _add(self, tenant: str, amount: int) -> None:
        self.total += amount
        self._held[tenant] += amount
        if not self._held[tenant]:
            del self._held[tenant]
