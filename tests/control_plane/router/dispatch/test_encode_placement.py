"""Where an image is done first: in microseconds, encode workers before others, and all images of a request or none."""

from dataclasses import replace

import pytest

from control_plane.router.dispatch.embedding_index import EmbeddingIndex
from control_plane.router.dispatch.encode_placement import EncodeCandidate, EncodePlacer, choose_encode
from control_plane.router.dispatch.live_image import LiveImage
from control_plane.router.dispatch.live_request import LiveRequest, Stage
from control_plane.router.dispatch.submissions import Submission
from control_plane.router.dispatch.workers import Worker, WorkerPool
from control_plane.router.requests import Submit, SubmittedImage
from control_plane.wire import session_pb2 as pb
from control_plane.wire.session import Session
from engine.base import limits
from engine.images import Picture, PromptImage, Run
from engine.types import SamplingParams

BLOCK = 16
FRACTION = limits.ENCODE_AT_PREFILL_FRACTION


def worker(name: str, *, loaded: bool = False) -> Worker:
    role = {"e": "encode", "p": "prefill", "m": "encode"}[name[0]]
    roles = [role, "prefill"] if name[0] == "m" else [role]
    return Worker(pb.WorkerInfo(worker=name, roles=roles), status=pb.WorkerStatus(tower_loaded=loaded))


def candidate(
    name: str, ahead_us: int, own_us: int = 100, *, room: bool = True, loaded: bool = False
) -> EncodeCandidate:
    return EncodeCandidate(worker(name, loaded=loaded), ahead_us, own_us, room)


def chosen(*candidates: EncodeCandidate, avoid: str = "") -> tuple[str, str] | None:
    found, reason = choose_encode(candidates, avoid=avoid)
    return None if found is None else (found.worker.id, reason)


# -- the rule ----------------------------------------------------------------------------------------------------------
def test_an_image_goes_where_it_is_done_first() -> None:
    assert chosen(candidate("e1", 50), candidate("e2", 40)) == ("e2", "least_work")
    assert chosen(candidate("e1", 40), candidate("e2", 40)) == ("e1", "least_work")
    assert chosen(candidate("e1", 50)) == ("e1", "only")
    assert chosen() is None


def test_one_that_has_it_wins_until_its_line_is_longer_than_an_encode() -> None:
    assert chosen(candidate("e1", 0), candidate("e2", 99, own_us=0)) == ("e2", "cached")
    assert chosen(candidate("e1", 0), candidate("e2", 101, own_us=0)) == ("e1", "least_work")


def test_without_room_it_waits_and_the_next_best_with_room_goes_first() -> None:
    assert chosen(candidate("e1", 0, room=False), candidate("e2", 500)) == ("e2", "least_work")
    assert chosen(candidate("e1", 0, room=False), candidate("e2", 500, room=False)) is None


def test_one_that_has_just_failed_is_the_last_resort() -> None:
    assert chosen(candidate("e1", 0), candidate("e2", 500), avoid="e1") == ("e2", "least_work")
    assert chosen(candidate("e1", 0), avoid="e1") == ("e1", "only")


def test_prefill_workers_encode_where_no_encode_worker_is() -> None:
    assert chosen(candidate("p1", 50), candidate("p2", 40)) == ("p2", "no_encoder")
    assert chosen(candidate("p1", 0), candidate("e1", 10_000)) == ("e1", "only")  # its tower is not loaded
    assert chosen(candidate("p1", 0), candidate("m1", 10_000)) == ("m1", "only")  # holds both roles: it is there for it


def test_a_loaded_tower_beside_encode_workers_helps_when_done_in_a_fraction_of_their_time() -> None:
    at_e = 900  # and 100 of its own: done at 1_000
    below = round(FRACTION * 1_000) - 101
    assert chosen(candidate("e1", at_e), candidate("p1", below, loaded=True)) == ("p1", "prefill_idle")
    assert chosen(candidate("e1", at_e), candidate("p1", below + 1, loaded=True)) == ("e1", "only")
    assert chosen(candidate("e1", at_e), candidate("p1", below)) == ("e1", "only")
    assert chosen(candidate("e1", at_e, room=False), candidate("p1", below, loaded=True)) == ("p1", "prefill_idle")
    assert chosen(candidate("e1", at_e), candidate("p1", below, loaded=True, room=False)) == ("e1", "only")


# -- what a worker would have to do ------------------------------------------------------------------------------------
class Cluster:
    """e1, e2 encode, p1 computes prompts; all of one model that sees."""

    def __init__(self, *names: str, columns: int = 100) -> None:
        self.pool = WorkerPool()
        infos = [
            pb.WorkerInfo(
                worker=name,
                roles=["encode" if name.startswith("e") else "prefill"],
                block_size_tokens=BLOCK,
                embedding_digest=b"E",
                embedding_columns=columns,
            )
            for name in names or ("e1", "e2", "p1")
        ]
        self.pool.adopt(pb.WorkerTable(term=1, workers=infos))
        for each in self.pool:
            each.session, each.status = Session(), pb.WorkerStatus(state="SERVING")
        self.index = EmbeddingIndex()
        self.placer = EncodePlacer(self.pool, self.index)

    def __getitem__(self, name: str) -> Worker:
        found = self.pool.get(name)
        assert found is not None
        return found

    def places(self, *images: tuple[bytes, int]) -> list[str] | None:
        choices = self.placer.choices(request(*images))
        return None if choices is None else [choice.worker.id for choice in choices]


def request(*images: tuple[bytes, int]) -> LiveRequest:
    prompt_images = (PromptImage(key=key, runs=(Run(0, features),)) for key, features in images)
    submitted = tuple(SubmittedImage(image, Picture(1, 1, b"rgb")) for image in prompt_images)
    submit = Submit(key=1, token_ids=(1, 2), sampling=SamplingParams(), images=submitted)
    live = LiveRequest(1, Submission(1, submit, 0, 1), (0,), Stage.ENCODING)
    live.images = tuple(LiveImage(index + 2, index, live) for index in range(len(images)))
    return live


def test_images_of_one_request_are_spread_and_equal_ones_stay_together() -> None:
    assert Cluster().places((b"a", 100), (b"b", 100), (b"c", 100), (b"d", 100)) == ["e1", "e2", "e1", "e2"]
    assert Cluster().places((b"a", 100), (b"a", 100), (b"b", 100)) == ["e1", "e1", "e2"]


def test_tokens_ahead_are_weighed_by_what_an_image_takes_there() -> None:
    cluster = Cluster()
    cluster["e1"].status.encode_us = 3 * limits.ENCODE_IMAGE_US
    cluster["e2"].images.add(9, 150, 1)
    assert cluster.places((b"a", 100)) == ["e2"]  # 250 tokens there are done before 100 here
    cluster["e2"].images.add(10, 60, 1)
    assert cluster.places((b"a", 100)) == ["e1"]
    cluster["e2"].images.encoded(9)
    assert cluster.places((b"a", 100)) == ["e2"]


def test_prompts_ahead_count_where_prompts_are_computed() -> None:
    cluster = Cluster("p1", "p2")
    for each in cluster.pool:
        each.status.tower_loaded = True
    cluster["p1"].backlog.add(9, 600)
    assert cluster.places((b"a", 100)) == ["p2"]
    cluster["p2"].status.tower_loaded = False  # it would have to load it: worth a few prompts
    assert cluster.places((b"a", 100)) == ["p1"]


def test_what_was_encoded_somewhere_is_found_there_until_it_is_forgotten() -> None:
    cluster = Cluster()
    a = PromptImage(key=b"a", runs=(Run(0, 100),))
    cluster.index.note(cluster["e2"], a)
    assert cluster.places((b"a", 100)) == ["e2"]
    assert cluster.places((b"b", 100)) == ["e1"]
    for number in range(14):  # 7 columns each: 100 hold 14
        cluster.index.note(cluster["e2"], replace(a, key=bytes([number])))
    assert cluster.places((b"a", 100)) == ["e1"]


@pytest.mark.parametrize(("columns", "placed"), [(20, True), (19, False)])
def test_all_images_have_memory_or_none_is_placed(columns: int, placed: bool) -> None:
    """Ten blocks each, at one worker; and at the prefill worker, half of whose memory is for prompts."""
    cluster = Cluster("e1", "p1", columns=columns)
    cluster["p1"].info.embedding_columns = 2 * columns
    assert (cluster.places((b"a", 160), (b"b", 160)) is not None) is placed
    assert cluster.pool.fits_images([160, 160]) is placed


def test_images_wait_while_there_is_enough_ahead_and_a_large_request_does_not_wait_for_itself() -> None:
    cluster = Cluster("e1", "p1", columns=4_000)
    large = [(bytes([number]), limits.ENCODE_AHEAD_TOKENS) for number in range(3)]
    assert cluster.places(*large) == ["e1"] * 3
    cluster["e1"].images.add(9, limits.ENCODE_AHEAD_TOKENS - 1, 1)
    assert cluster.places((b"a", 1)) == ["e1"] and cluster.placer.has_room_anywhere
    cluster["e1"].images.add(10, 1, 1)
    assert cluster.places((b"a", 1)) is None and cluster.placer.has_room_anywhere  # at p1, which is not asked
    cluster["e1"].images.remove(10)
    cluster["e1"].images.full = True
    assert cluster.places((b"a", 1)) is None


def test_embeddings_that_no_prefill_worker_reads_are_not_made() -> None:
    cluster = Cluster()
    cluster["p1"].info.embedding_digest = b"other"
    assert cluster.places((b"a", 1)) == ["p1"]
    del cluster["p1"].info.roles[:]
    assert cluster.places((b"a", 1)) is None
