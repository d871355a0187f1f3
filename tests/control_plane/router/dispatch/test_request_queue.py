"""Who goes next: within a tenant as it was, across tenants by what each has been served; and nobody waits for ever."""

from random import Random

import pytest

from control_plane.router.dispatch.live_request import LiveRequest
from control_plane.router.dispatch.request_queue import RequestQueue
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.requests import Submit
from control_plane.router.shares import Shares
from engine.base import limits
from engine.types import SamplingParams

PROMPT_MAX = 50


class Line:
    """A queue, and requests numbered as they come."""

    def __init__(self, credit_tokens: int = 100) -> None:
        self.queue = RequestQueue(Shares(1 << 30, tenants=9), credit_tokens=credit_tokens)
        self.came = 0

    def join(self, tenant: str, tokens: int = 10, *, priority: int = 0) -> LiveRequest:
        request = self.request(tenant, tokens, priority=priority)
        self.queue.put(request)
        return request

    def request(self, tenant: str, tokens: int = 10, *, priority: int = 0) -> LiveRequest:
        self.came += 1
        sampling = SamplingParams(max_tokens=4)
        submit = Submit(key=self.came, token_ids=(1,) * tokens, sampling=sampling, tenant=tenant, priority=priority)
        return LiveRequest(self.came, Submission(self.came, submit, 0, 1_000), (0,))

    def next(self, held_back: frozenset[str] = frozenset()) -> LiveRequest | None:
        """Places whoever's turn it is."""
        turns = self.queue.in_turn(lambda request: request.submit.tenant in held_back)
        request = next(iter(turns), None)
        if request is not None:
            self.queue.place(request, len(request.token_ids))
        return request

    def served(self, tenant: str) -> int:
        return self.queue.meter(tenant).tokens


def numbers(line: Line, count: int) -> list[int]:
    placed = [line.next() for _ in range(count)]
    return [request.submit.key for request in placed if request is not None]


def test_one_tenant_goes_by_priority_then_arrival() -> None:
    line = Line()
    for priority in (0, 1, -1, 0, -1):
        line.join("", priority=priority)
    assert numbers(line, 5) == [3, 5, 1, 4, 2]


def test_tenants_take_turns_whatever_their_priorities() -> None:
    line = Line()
    for _ in range(3):
        line.join("red", priority=-9)
    for _ in range(3):
        line.join("blue")
    assert numbers(line, 6) == [1, 4, 2, 5, 3, 6]


def test_who_asks_for_long_prompts_gets_fewer_of_them() -> None:
    line = Line()
    for _ in range(20):
        line.join("long", 40)
        line.join("short", 10)
    placed = [line.next() for _ in range(20)]
    tenants = [request.submit.tenant for request in placed if request is not None]
    assert (tenants.count("long"), tenants.count("short")) == (4, 16)


def test_output_tokens_count_too() -> None:
    line = Line()
    for _ in range(4):
        line.join("talks")
        line.join("listens")
    assert numbers(line, 2) == [1, 2]
    line.queue.meter("talks").tokens += 15
    assert numbers(line, 4) == [4, 6, 3, 8]


def test_who_comes_back_goes_first_for_as_long_as_its_credit_lasts() -> None:
    line = Line(credit_tokens=25)
    for _ in range(30):
        line.join("red")
    numbers(line, 20)
    back = [line.join("blue").submit.key for _ in range(5)]
    assert numbers(line, 7) == [*back[:4], 21, back[4], 22]
    assert not line.queue.is_behind(line.request("red"))


def test_who_was_held_back_by_its_own_share_has_no_claim() -> None:
    line = Line(credit_tokens=1_000)
    for _ in range(10):
        line.join("red")
        line.join("blue")
    for _ in range(6):
        line.next(held_back=frozenset({"blue"}))
    assert line.served("red") - line.served("blue") == 2 * 10


def test_one_that_comes_back_after_a_loss_has_its_old_place() -> None:
    line = Line()
    first, _, _ = (line.join("") for _ in range(3))
    line.next()
    line.queue.put(first)
    assert numbers(line, 3) == [1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_sums_are_right_after_anything(seed: int) -> None:
    random, line = Random(seed), Line()
    waiting: list[LiveRequest] = []
    for _ in range(300):
        if waiting and random.random() < 0.5:
            if random.random() < 0.5:
                waiting.remove(gone := random.choice(waiting))
                line.queue.remove(gone)
            else:
                placed = line.next()
                assert placed is not None
                waiting.remove(placed)
        else:
            waiting.append(
                line.join(random.choice("abc"), random.randint(1, PROMPT_MAX), priority=random.choice((0, 1)))
            )
        assert len(line.queue) == len(waiting)
        for tenant in "abc":
            tokens = sum(len(each.token_ids) for each in waiting if each.submit.tenant == tenant)
            assert line.queue.shares.held(tenant) == tokens
    assert sorted(numbers(line, len(waiting))) == sorted(each.submit.key for each in waiting)
    assert (len(line.queue), line.queue.shares.total) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_what_two_who_wait_are_served_differs_by_a_prompt_each_and_what_is_decoded(seed: int) -> None:
    """VTC's bound, for our cost: what two tenants that both wait are served differs by at most what one placement and
    the outputs in flight add to either: here a prompt and its outputs. So nobody starves."""
    random, line = Random(seed), Line(credit_tokens=0)
    lengths = {"a": (1, 5), "b": (40, PROMPT_MAX), "c": (1, PROMPT_MAX)}
    outputs_max = 8 * limits.OUTPUT_TOKEN_WEIGHT
    bound = 2 * (PROMPT_MAX + outputs_max)
    for tenant, (shortest, longest) in lengths.items():
        for _ in range(400):
            line.join(tenant, random.randint(shortest, longest))
    base = {tenant: line.served(tenant) for tenant in lengths}
    for _ in range(300):
        request = line.next()
        assert request is not None
        line.queue.meter(request.submit.tenant).tokens += random.randrange(8) * limits.OUTPUT_TOKEN_WEIGHT
        served = [line.served(tenant) - base[tenant] for tenant in lengths]
        assert max(served) - min(served) <= bound


@pytest.mark.parametrize("seed", range(20))
def test_a_tenant_that_asks_for_little_waits_for_one_prompt(seed: int) -> None:
    """However long the others' lines are, and however many others there are."""
    random, line = Random(seed), Line()
    for _ in range(200):
        line.join(random.choice("abcdefgh"), random.randint(1, PROMPT_MAX))
    numbers(line, 100)
    quiet = line.join("quiet", PROMPT_MAX)
    assert line.queue.is_behind(quiet)
    assert numbers(line, 1) == [quiet.submit.key]


def test_tokens_before_are_ones_own_and_as_many_of_others() -> None:
    line = Line(credit_tokens=0)
    for _ in range(3):
        line.join("red", 30)
    assert line.queue.tokens_before(line.request("red")) == 90
    assert line.queue.tokens_before(line.request("red", priority=-1)) == 0
    assert line.queue.tokens_before(line.request("blue")) == 0
    line.join("blue", 20)
    assert line.queue.tokens_before(line.request("blue")) == 40
    assert line.queue.tokens_before(line.request("red")) == 90 + 20


@pytest.mark.parametrize("seed", range(20))
def test_the_prediction_is_what_happens_within_a_prompt_of_each_tenant(seed: int) -> None:
    random, line = Random(seed), Line()
    for _ in range(60):
        line.join(random.choice("abc"), random.randint(1, PROMPT_MAX))
    numbers(line, 20)
    expected = line.queue.tokens_before(line.request(tenant := random.choice("abc")))
    last, before = line.join(tenant), 0
    while (request := line.next()) is not last:
        assert request is not None
        before += len(request.token_ids)
    assert abs(before - expected) <= 3 * PROMPT_MAX
