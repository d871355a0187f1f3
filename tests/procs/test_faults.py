"""A worker dies or freezes in each stage of a request, for real. With a survivor nobody notices; without one everybody
is told (reliability A3-A9, A16; scorecard 4 and 5)."""

import signal
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.procs.harness import CLIENTS, ask_all, busy, cluster, oracle_prompt, verdict, wait_quiet

REQUESTS_PER_CLIENT = 12  # 9 stages x 2 signals x 96 = 1,728 requests
STAGES = {
    "prefill-0": ("prefill.queued", "prefill.near_turn", "prefill.computing", "prefill.streaming", "prefill.end_sent"),
    "decode-0": ("decode.reserved", "decode.receiving", "decode.committed", "decode.decoding"),
}
FAULTS = [(victim, stage, fault) for victim in STAGES for stage in STAGES[victim] for fault in ("kill", "stop")]


def has_fallen(pid: int, fault: str) -> bool:
    """The process is gone (killed, and reaped or not), or stopped."""
    stat = Path(f"/proc/{pid}/stat")
    state = stat.read_text().rpartition(")")[2].split()[0] if stat.exists() else "gone"
    return state == "T" if fault == "stop" else state in ("gone", "Z")


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize(("victim", "stage", "fault"), FAULTS)
async def test_with_a_survivor_no_request_is_lost_or_wrong(victim: str, stage: str, fault: str) -> None:
    armed = {victim: {"TRIPTYCH_FAILPOINTS": f"{stage}={fault}@7"}}
    prompts = [oracle_prompt(seed) for seed in range(CLIENTS * REQUESTS_PER_CLIENT)]
    async with cluster(prefill=2, decode=2, environments=armed) as running:
        answers = await ask_all(running, prompts)
        verdicts = Counter(verdict(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
        moved = sum(answer.triptych.get("attempts", 0) > 1 for answer in answers)
        hit = has_fallen(running.child(victim).pid, fault)
        print(f"{victim} {stage}={fault}: {dict(verdicts)}, {moved} requests placed more than once")
        assert verdicts == {"right": len(prompts)}
        assert hit, "the failpoint was not reached"
        async with httpx.AsyncClient() as client:
            survivors = await wait_quiet(client, running)
        assert victim not in survivors
        assert busy(survivors) == {}


@pytest.mark.procs
@pytest.mark.timeout(60)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("fault", ["kill", pytest.param("stop", marks=pytest.mark.slow)])
async def test_without_a_survivor_everybody_gets_a_typed_error(victim: str, fault: str) -> None:
    stage = STAGES[victim][-1]
    prompts = [oracle_prompt(seed, max_tokens=(8, 40)) for seed in range(CLIENTS * 2)]
    armed = {victim: {"TRIPTYCH_FAILPOINTS": f"{stage}={fault}@4"}}
    async with cluster(environments=armed) as running:
        answers = await ask_all(running, prompts)
        verdicts = Counter(verdict(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True))
        hit = has_fallen(running.child(victim).pid, fault)
        print(f"{victim} {fault}, alone: {dict(verdicts)}")
        assert hit, "the failpoint was not reached"
        assert set(verdicts) <= {"right", "error 503 ServiceUnavailableError", "error 200 ServiceUnavailableError"}
        assert verdicts["right"] < len(prompts)


@pytest.mark.procs
@pytest.mark.slow
@pytest.mark.timeout(60)
async def test_a_killed_worker_is_started_again_and_used() -> None:
    async with cluster(restart=True) as running:
        old_pid = running.child("decode-0").pid
        running.child("decode-0").process.send_signal(signal.SIGKILL)  # type: ignore[union-attr]
        prompts = [oracle_prompt(seed) for seed in range(CLIENTS)]
        answers = await ask_all(running, prompts)
        assert [verdict(*pair) for pair in zip(prompts, answers, strict=True)] == ["right"] * len(prompts)
        assert running.child("decode-0").pid != old_pid
