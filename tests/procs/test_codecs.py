"""A codec and its level are a request's choice within its budget, through real processes: measurements decide."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from control_plane.options import EngineOptions
from engine.models.info import describe, schema_for
from kv_transfer.profile import Point, Profile, save
from tests.procs.harness import cluster, complete

PROMPT = "The quick brown fox jumps over the lazy dog. " * 20
KL = {"int8": (8.5, 0.0001), "int4": (4.5, 0.05)}


def profile_of(model_dir: Path, path: Path) -> Path:
    """Curves alone: these codecs have no tables."""
    curves = {
        codec: [Point(level=0, bits_per_element=bits, kl=kl, ppl_change=0.0, encode_mb_s=1.0, decode_mb_s=1.0)]
        for codec, (bits, kl) in KL.items()
    }
    save(Profile(model=schema_for(describe(model_dir), "bfloat16").model, curves=curves), path)
    return path


@pytest.mark.procs
@pytest.mark.model
@pytest.mark.timeout(120)
async def test_the_codec_is_what_the_budget_allows(model_dir: Path, tmp_path: Path) -> None:
    profile = profile_of(model_dir, tmp_path / "profile.safetensors")
    engine = EngineOptions(kv_cache_mib=128, profile=profile, kl_budget=0.1, prefix_cache=False)
    async with cluster(engine=engine) as running, httpx.AsyncClient() as client:

        async def ask(**triptych: Any) -> tuple[str, float, str]:
            """The codec that was used, wire bytes as a share of raw ones, and the text."""
            body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "triptych": triptych}
            answer = await complete(client, running, body)
            stats = answer["triptych"]
            assert stats["level"] == 0 and stats["prefill_worker"] != stats["decode_worker"]
            return stats["codec"], stats["kv_bytes_wire"] / stats["kv_bytes_raw"], answer["choices"][0]["text"]

        exact = await ask()
        assert exact[0] == "raw" and 1 < exact[1] < 1.01
        for triptych, codec in (
            ({"codec": "int8"}, "int8"),
            ({"codec": "auto"}, "int4"),  # within the deployment's budget
            ({"codec": "auto", "kl_budget": 0.01}, "int8"),
            ({"codec": "int4", "kl_budget": 0.01}, "raw"),
            ({"codec": "auto", "kl_budget": 0}, "raw"),
        ):
            used, share, text = await ask(**triptych)
            assert used == codec
            assert text == exact[2] or codec == "int4"
            assert share == pytest.approx(KL.get(codec, (16, 0))[0] / 16, rel=0.1)
