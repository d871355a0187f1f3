"""Load and reuse in one unit, tokens; ties by id; every choice with its reason. And what the index is told."""

import pytest

from control_plane.router.dispatch.codec_choice import Wish
from control_plane.router.dispatch.live_request import LiveRequest, Placement
from control_plane.router.dispatch.placement import Candidate, Choice, Placer, choose_decode, choose_prefill
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.dispatch.workers import Backlog, Worker, WorkerPool
from control_plane.router.requests import Submit
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session
from control_plane.wire.translate import offers_to_wire
from engine.base import limits
from engine.types import SamplingParams
from kv_transfer.codecs import RAW_ENCODING, Encoding
from kv_transfer.offers import Offer

BLOCK = 4
PROMPT = tuple(range(16))


def worker(name: str, *, ahead: int = 0, bound: int = 0, columns: int = 100) -> Worker:
    backlog = Backlog({1: ahead}, ahead)
    return Worker(pb.WorkerInfo(worker=name, total_columns=columns), backlog=backlog, bound=bound)


def reason(choice: Choice | None) -> tuple[str, str] | None:
    return None if choice is None else (choice.worker.id, choice.reason)


# -- prefill -----------------------------------------------------------------------------------------------------------
def test_prefill_goes_where_its_last_token_is_computed_first() -> None:
    idle, busy = worker("p1"), worker("p2", ahead=100)
    assert reason(choose_prefill([Candidate(idle, 500), Candidate(busy, 500)])) == ("p1", "least_loaded")
    assert reason(choose_prefill([Candidate(idle, 500), Candidate(busy, 399)])) == ("p2", "prefix")
    assert reason(choose_prefill([Candidate(idle, 500), Candidate(busy, 400)])) == ("p1", "least_loaded")


def test_prefill_where_reuse_and_load_agree_is_not_called_reuse() -> None:
    assert reason(choose_prefill([Candidate(worker("p1"), 10), Candidate(worker("p2"), 500)])) == ("p1", "least_loaded")


def test_a_worker_that_has_just_failed_is_the_last_resort_whatever_it_holds() -> None:
    candidates = [Candidate(worker("p1"), 1), Candidate(worker("p2", ahead=900), 500)]
    assert reason(choose_prefill(candidates, avoid="p1")) == ("p2", "least_loaded")
    assert reason(choose_prefill(candidates[:1], avoid="p1")) == ("p1", "only")
    assert choose_prefill([]) is None


# -- decode ------------------------------------------------------------------------------------------------------------
def test_decode_weighs_kv_to_send_against_sequences() -> None:
    source, load = worker("p1"), limits.DECODE_LOAD_TOKENS
    idle, busy = worker("d1"), worker("d2", bound=1)
    for missing, expected in ((load + 1, ("d2", "prefix")), (load, ("d1", "least_loaded"))):
        choice = choose_decode([Candidate(idle, missing), Candidate(busy, 0)], source=source, refused=())
        assert reason(choice) == expected


def test_a_smaller_worker_is_loaded_sooner() -> None:
    candidates = [Candidate(worker("d1", bound=2, columns=50), 9), Candidate(worker("d2", bound=3), 9)]
    assert reason(choose_decode(candidates, source=worker("p1"), refused=())) == ("d2", "least_loaded")


def test_staying_wins_and_who_refused_is_not_asked() -> None:
    both = Candidate(worker("b1", bound=50), 999)
    other = Candidate(worker("d1"), 0)
    assert reason(choose_decode([both, other], source=both.worker, refused=())) == ("b1", "local")
    assert reason(choose_decode([both, other], source=both.worker, refused={"b1"})) == ("d1", "only")
    assert choose_decode([both], source=both.worker, refused={"b1"}) is None


# -- the index is told -------------------------------------------------------------------------------------------------
class Cluster:
    """p1, p2 prefill; d1, d2 decode; all of one model."""

    def __init__(self, *codecs: str) -> None:
        self.pool = WorkerPool()
        roles = {"p1": "prefill", "p2": "prefill", "d1": "decode", "d2": "decode"}
        infos = [
            pb.WorkerInfo(
                worker=name,
                roles=[role],
                state="SERVING",
                block_size_tokens=BLOCK,
                total_columns=100,
                schema_digest=b"A",
                offers=offers_to_wire([Offer("raw"), *map(Offer, codecs)]),
            )
            for name, role in roles.items()
        ]
        self.pool.adopt(pb.WorkerTable(term=1, workers=infos))
        for name, role in roles.items():
            self[name].session = Session()
            self.pool.on_status_untrusted(self[name], pb.WorkerStatus(worker=name, state="SERVING", roles=[role]))
        self.placer = Placer(self.pool, Wish("raw"))

    def __getitem__(self, name: str) -> Worker:
        found = self.pool.get(name)
        assert found is not None
        return found

    def missing(self, request: LiveRequest) -> tuple[int | None, int | None]:
        """Tokens to be computed, and to be sent, where each is fewest."""
        prefill, decode = self.placer.prefill(request), self.placer.decode(request, self["p1"], ())
        return prefill and prefill.missing_tokens, decode and decode.missing_tokens


def request(*token_ids: int, tenant: str = "", codec: str = "") -> LiveRequest:
    submit = Submit(key=1, token_ids=token_ids, sampling=SamplingParams(), tenant=tenant, codec=codec)
    return LiveRequest(1, Submission(1, submit, 0, 0), (0,), context_tokens=len(token_ids))


@pytest.fixture
def cluster() -> Cluster:
    return Cluster("lossy")


def test_a_prompt_is_expected_where_it_was_sent(cluster: Cluster) -> None:
    first = request(*PROMPT)
    assert cluster.missing(first) == (16, 16)
    cluster.placer.prompt_sent(first, cluster["p2"])
    cluster.placer.prompt_received(first, cluster["d2"])
    again = request(*PROMPT, 70, 71)
    assert reason(cluster.placer.prefill(again)) == ("p2", "prefix")
    assert reason(cluster.placer.decode(again, cluster["p1"], ())) == ("d2", "prefix")
    assert cluster.missing(again) == (2, 2)
    assert cluster.missing(request(*PROMPT)) == (1, 1), "one token is always computed"
    assert cluster.missing(request(*PROMPT, tenant="blue")) == (16, 16)


def test_an_answer_is_expected_where_it_was_decoded_but_for_its_last_token(cluster: Cluster) -> None:
    first = request(*PROMPT)
    first.target = Placement("d2", 2)
    first.submission.outputs[0].extend((20, 21, 22, 23, 24))
    cluster.placer.output_ended(first)
    assert cluster.missing(request(*PROMPT, 20, 21, 22, 23, 24, 25)) == (22, 2)
    first.submission.outputs[0].pop()
    cluster.placer.forget_all()
    cluster.placer.output_ended(first)
    assert cluster.missing(request(*PROMPT, 20, 21, 22, 23, 24, 25)) == (22, 6)


def test_lossy_kv_serves_its_own_kind_and_exact_kv_serves_all(cluster: Cluster) -> None:
    first = request(*PROMPT, codec="lossy")
    first.encoding = cluster.placer.encoding(first, cluster["p1"], cluster["d1"])
    cluster.placer.prompt_received(first, cluster["d1"])
    longer = (*PROMPT, 70)
    assert cluster.missing(request(*longer, codec="lossy"))[1] == 1
    assert cluster.missing(request(*longer))[1] == 17
    cluster.placer.prompt_received(request(*PROMPT), cluster["d2"])
    assert cluster.missing(request(*longer))[1] == 1


def test_a_lost_worker_is_forgotten(cluster: Cluster) -> None:
    first = request(*PROMPT)
    cluster.placer.prompt_sent(first, cluster["p1"])
    cluster.placer.forget(cluster["p1"])
    assert cluster.missing(first) == (16, 16)


def test_the_encoding_is_what_both_ends_have_and_stays_with_kv_that_moves_on(cluster: Cluster) -> None:
    asked, lossy = request(*PROMPT, codec="lossy"), Encoding("lossy")
    p1, p2, d1, d2 = (cluster[name] for name in ("p1", "p2", "d1", "d2"))
    assert cluster.placer.encoding(asked, p1, d1) == lossy
    assert cluster.placer.encoding(request(*PROMPT), p1, d1) == RAW_ENCODING
    assert cluster.placer.encoding(request(*PROMPT, codec="unheard of"), p1, d1) == RAW_ENCODING
    p2.offers, d2.offers = {}, {}
    assert cluster.placer.encoding(asked, p1, d2) == cluster.placer.encoding(asked, p2, d1) == RAW_ENCODING
    asked.moving, asked.encoding = True, lossy
    assert cluster.placer.encoding(asked, d1, d2) == lossy


def test_kv_that_never_travelled_may_go_through_a_codec_when_it_moves_on(cluster: Cluster) -> None:
    asked = request(*PROMPT, codec="lossy")
    asked.moving = True
    assert cluster.placer.encoding(asked, cluster["d1"], cluster["d2"]) == Encoding("lossy")


def test_what_a_request_does_not_say_its_deployment_does() -> None:
    cluster = Cluster("lossy", "other")
    placer = Placer(cluster.pool, Wish("lossy"))
    assert placer.encoding(request(*PROMPT), cluster["p1"], cluster["d1"]) == Encoding("lossy")
    assert placer.encoding(request(*PROMPT, codec="other"), cluster["p1"], cluster["d1"]) == Encoding("other")
    strict = Placer(cluster.pool, Wish("lossy", 0.01))
    assert strict.encoding(request(*PROMPT), cluster["p1"], cluster["d1"]) == RAW_ENCODING


def test_offers_that_nobody_can_read_are_none(cluster: Cluster) -> None:
    info = pb.WorkerInfo(worker="d1", epoch=9, offers=[pb.CodecOffer(codec="raw"), pb.CodecOffer(codec="raw")])
    cluster.pool.adopt(pb.WorkerTable(term=1, workers=[info]))
    assert cluster["d1"].offers == {}
