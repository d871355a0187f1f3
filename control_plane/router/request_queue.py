"""RequestQueue: requests that wait for a prefill worker, the most urgent first, then in order of submission.

One that comes back after a loss finds its old place in line (reliability A3). What is waiting is counted in requests
and in tokens; whether there is room for more is the core's decision.
"""

from bisect import bisect_left, insort

from control_plane.router.live_request import LiveRequest


class RequestQueue:
    def __init__(self) -> None:
        self._requests: list[LiveRequest] = []  # by `order`, which no two share
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def head(self) -> LiveRequest:
        return self._requests[0]

    def put(self, request: LiveRequest) -> None:
        insort(self._requests, request, key=_order)
        self.tokens += len(request.token_ids)

    def remove(self, request: LiveRequest) -> None:
        index = bisect_left(self._requests, request.order, key=_order)
        assert self._requests[index] is request
        del self._requests[index]
        self.tokens -= len(request.token_ids)


def _order(request: LiveRequest) -> tuple[int, int, int]:
    return request.order
