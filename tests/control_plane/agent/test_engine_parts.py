"""control_plane.agent.engine_parts: a worker has what its roles need, and nothing else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from control_plane.agent import engine_parts
from control_plane.agent.engine_parts import Memory, build_engine, build_executor, build_memory, check_roles
from control_plane.model_choice import ModelChoice, choose_model
from control_plane.options import EngineOptions, ExecutorKind, OptionError, WorkerOptions
from engine.base import limits
from engine.commands import EncodeItem, EncodePlan, EngineLoad
from engine.executors.oracle import OracleExecutor, oracle_embedding_schema, oracle_schema
from engine.images import Picture
from engine.types import Role
from engine.vision.info import VisionInfo
from engine.vision.layout import ImageLayout
from tests.engine.vision.tiny_vlms import make_tiny_vlm

MIB = 1 << 20
PREFILL, DECODE, ENCODE = Role.PREFILL, Role.DECODE, Role.ENCODE
TEXT = ModelChoice(
    name="oracle",
    path=None,
    dtype="uint8",
    schema=oracle_schema(),
    vocab_size=1_000,
    max_model_len=256,
    eos_token_ids=(),
)


class Square:
    """Every image is four placeholders."""

    def layout(self, width: int, height: int) -> ImageLayout:
        return ImageLayout("", 4)


SEEING = replace(
    TEXT,
    vision=VisionInfo(
        family="llava", image_token="<image>", image_token_id=9, hidden_size=16, settings_digest=b"s", rule=Square()
    ),
    embedding_schema=oracle_embedding_schema(),
)


def worker(*roles: Role, **engine: Any) -> WorkerOptions:
    given: dict[str, Any] = {"model": "oracle", "executor": ExecutorKind.ORACLE, "kv_cache_mib": 1} | engine
    return WorkerOptions(name="w", roles=frozenset(roles), controller="h:1", engine=EngineOptions(**given))


# -- memory ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("roles", "model", "kv", "embeddings"),
    [
        ((PREFILL,), TEXT, True, False),
        ((PREFILL, DECODE), TEXT, True, False),
        ((PREFILL,), SEEING, True, True),
        ((DECODE,), SEEING, True, False),
        ((PREFILL, DECODE), SEEING, True, True),
        ((ENCODE,), SEEING, False, True),
        ((ENCODE, DECODE), SEEING, True, True),
    ],
)
def test_memory_is_there_for_what_the_roles_do(
    roles: tuple[Role, ...], model: ModelChoice, kv: bool, embeddings: bool
) -> None:
    memory = build_memory(worker(*roles), model)
    assert (memory.kv is not None, memory.embeddings is not None) == (kv, embeddings)
    assert (memory.kv_columns > 0, memory.embedding_columns > 0) == (kv, embeddings)
    assert memory.embedding_schema == (model.embedding_schema if embeddings else None)


def test_a_job_finds_the_memory_of_what_it_carries() -> None:
    memory = build_memory(worker(PREFILL), SEEING)
    assert SEEING.embedding_schema is not None
    assert memory.arenas.of(SEEING.schema.digest) is memory.kv
    assert memory.arenas.of(SEEING.embedding_schema.digest) is memory.embeddings
    with pytest.raises(KeyError):
        build_memory(worker(DECODE), SEEING).arenas.of(SEEING.embedding_schema.digest)


def test_embedding_memory_is_as_large_as_was_asked_for() -> None:
    memory = build_memory(worker(ENCODE, embedding_cache_mib=3), SEEING)
    assert SEEING.embedding_schema is not None
    assert memory.embedding_columns == 3 * MIB // (SEEING.embedding_schema.token_bytes * limits.BLOCK_SIZE_TOKENS)


WIDE = replace(SEEING, embedding_schema=oracle_embedding_schema(hidden=8_192))  # 128 KiB a column


@pytest.mark.parametrize(
    ("role", "max_model_len", "free_mib", "columns"),
    [
        (ENCODE, 1_024, 64_000, 256 * 8),
        (PREFILL, 1_024, 64_000, 64 * 8),
        (ENCODE, 32_768, 64_000, 2_048 + limits.IMAGES_MAX),  # as many as one prompt can hold
        (PREFILL, 32_768, 64_000, 2 * (2_048 + limits.IMAGES_MAX)),  # and as many again, for what it encodes
        (PREFILL, 32_768, 160, 10 * 8),  # no more than is there
    ],
)
def test_embeddings_get_a_small_share(
    role: Role, max_model_len: int, free_mib: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_parts, "free_bytes", lambda: free_mib * MIB)
    model = replace(WIDE, max_model_len=max_model_len)
    assert build_memory(worker(role), model).embedding_columns == columns


def test_too_little_memory_for_the_longest_prompt_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for free_mib, told in ((64_000, False), (160, True)):
        monkeypatch.setattr(engine_parts, "free_bytes", lambda free_mib=free_mib: free_mib * MIB)
        caplog.clear()
        build_memory(worker(PREFILL), replace(WIDE, max_model_len=32_768))
        assert ("no room for all images of the longest request" in caplog.messages) == told


def test_a_request_that_no_memory_holds_is_refused_at_the_door() -> None:
    small = worker(PREFILL, kv_cache_mib=1)
    longest = replace(TEXT, max_model_len=1 << 30)
    memory = build_memory(small, longest)
    assert memory.kv is not None
    assert engine_parts.max_model_len(longest, memory) == memory.kv.columns * memory.kv.block_size
    assert engine_parts.max_model_len(TEXT, memory) == TEXT.max_model_len
    assert engine_parts.max_model_len(longest, Memory(None, memory.kv)) == longest.max_model_len


def test_roles_must_be_for_the_model() -> None:
    check_roles({ENCODE, PREFILL}, SEEING)
    check_roles({PREFILL, DECODE}, TEXT)
    with pytest.raises(OptionError) as caught:
        check_roles({PREFILL, ENCODE}, TEXT)
    assert caught.value.option == "role"


# -- engines -----------------------------------------------------------------------------------------------------------
def load(*roles: Role, model: ModelChoice = SEEING) -> EngineLoad:
    options = worker(*roles)
    return build_engine(options, model, build_memory(options, model)).load()


def test_an_encode_worker_has_its_tower_and_no_kv() -> None:
    seen = load(ENCODE)
    assert (seen.total_columns, seen.embedding_columns > 0, seen.tower_loaded) == (0, True, True)


def test_a_prefill_worker_has_no_tower_until_it_must() -> None:
    seen = load(PREFILL)
    assert (seen.total_columns > 0, seen.embedding_columns > 0, seen.tower_loaded) == (True, True, False)


@pytest.mark.parametrize(("roles", "model"), [((DECODE,), SEEING), ((PREFILL, DECODE), TEXT)])
def test_who_meets_no_image_has_nothing_for_them(roles: tuple[Role, ...], model: ModelChoice) -> None:
    seen = load(*roles, model=model)
    assert (seen.total_columns > 0, seen.embedding_columns, seen.tower_loaded) == (True, 0, False)


# -- executors ---------------------------------------------------------------------------------------------------------
def encoded(options: WorkerOptions, model: ModelChoice, images: int, sleep: Callable[[float], None]) -> Memory:
    memory = build_memory(options, model)
    executor = build_executor(options, model, memory, sleep)
    picture = Picture(48, 48, bytes(range(256)) * 27)
    items = tuple(EncodeItem(n, picture, 9, (n,), bytes([n] * 16)) for n in range(images))
    output = executor.execute(EncodePlan(1, items), lambda start, end: None)
    assert not output.failed
    return memory


def never(seconds: float) -> None:
    raise AssertionError("nobody sleeps here")


def test_the_oracle_encodes_without_a_tower() -> None:
    memory = encoded(worker(ENCODE), SEEING, 2, never)
    assert memory.embeddings is not None
    assert memory.embeddings.array[:2].any(axis=(1, 2, 3, 4, 5)).all()


@pytest.mark.parametrize(("asked_ms", "image_s"), [(None, 0.3), (450.0, 0.45)])
def test_a_paced_tower_takes_its_time(asked_ms: float | None, image_s: float) -> None:
    slept: list[float] = []
    encoded(worker(ENCODE, executor=ExecutorKind.PACED, encode_image_ms=asked_ms), SEEING, 2, slept.append)
    assert sum(slept) == pytest.approx(2 * image_s)


def test_the_oracle_reads_embeddings_of_the_models_own_shape() -> None:
    """Also of a checkpoint whose rows are not the oracle's usual ones."""
    options = worker(PREFILL)
    memory = build_memory(options, WIDE)
    build_executor(options, WIDE, memory, never)
    with pytest.raises(ValueError, match="another schema"):
        OracleExecutor(
            build_memory(options, TEXT).arenas.of(TEXT.schema.digest), OracleExecutor.Config(), memory.embeddings
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm("llava", tmp_path_factory.mktemp("vlm") / "llava")


@pytest.mark.parametrize(
    ("roles", "halves"),
    [
        ((ENCODE,), ["tower"]),
        ((PREFILL,), ["language"]),
        ((DECODE,), ["language"]),
        ((ENCODE, PREFILL), ["language", "tower"]),
    ],
)
def test_only_the_halves_that_the_roles_need_are_loaded(
    roles: tuple[Role, ...], halves: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from encode_worker.encoders import tower
    from engine.executors import torch

    loaded: list[str] = []
    for name, module, function in (("language", torch, "load_model"), ("tower", tower, "load_tower")):
        monkeypatch.setattr(module, function, _noting(loaded, name, getattr(module, function)))
    options = worker(*roles, model=str(folder), executor=ExecutorKind.TORCH)
    model = choose_model(options.engine)
    build_executor(options, model, build_memory(options, model), never)
    assert loaded == halves


def test_a_prefill_worker_that_has_to_encode_loads_the_tower_then(folder: Path) -> None:
    options = worker(PREFILL, model=str(folder), executor=ExecutorKind.TORCH)
    memory = encoded(options, choose_model(options.engine), 1, never)
    assert memory.embeddings is not None
    assert memory.embeddings.array[0].any()


def _noting(noted: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        noted.append(name)
        return function(*args, **kwargs)

    return call
