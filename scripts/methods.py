"""Write METHODS.md: what each published method here is, loses and costs. From the plug-ins' own data, never typed.

python scripts/methods.py           rewrite it
python scripts/methods.py --check   fail if it is not current
"""

import argparse
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.batching import batchings  # noqa: E402
from kv_transfer.codecs import codecs  # noqa: E402
from kv_transfer.profile import Point, Profile, load  # noqa: E402
from kv_transfer.profiles import FOLDER  # noqa: E402

METHODS = ROOT / "METHODS.md"
QUALITY_PLOT = Path("bench/figures/codecs.svg")
HEAD = """\
# Methods

Every method here is a plug-in: one file that states its paper, what it loses, what it needs and what it composes with.
This page is written from that and from measured figures by `python scripts/methods.py`; `make check` fails when it is
not current. How the figures are made: `triptych profile --help`, and `bench/quality.py` for text that no codec was
calibrated on.
"""


class Method(Protocol):
    """What every plug-in class says of itself."""

    paper: str
    loses: str
    needs: tuple[str, ...]
    composes_with: str


def document(profiles: Mapping[str, Profile]) -> str:
    parts = [HEAD, "## Codecs\n", _codecs_text()]
    if (ROOT / QUALITY_PLOT).exists():
        parts.append(f"![Bits against KL for every codec, on text that none was calibrated on]({QUALITY_PLOT})\n")
    for name in codecs.names():
        parts += _codec(name, profiles)
    parts.append("## Batching\n")
    for name in batchings.names():
        parts += [_title(name, batchings.get(name)), _facts(_common(batchings.get(name)))]
    return "\n".join(parts)


def _codecs_text() -> str:
    return (
        "Bits are of all that is sent, frame headers included, for each number of K and V; profiles are not sent.\n"
        "KL is nats per token against KV as it was computed. Rates are MB of raw KV per second of one core, measured\n"
        "where the profile was made.\n"
    )


def _codec(name: str, profiles: Mapping[str, Profile]) -> Iterator[str]:
    kind = codecs.get(name)
    yield _title(name, kind)
    levels = f"{len(kind.levels)} ({kind.levels[0]} to {kind.levels[-1]})" if len(kind.levels) > 1 else "one"
    atoms = [f"multiples of {kind.token_multiple} tokens"] if kind.token_multiple > 1 else ["any number of tokens"]
    atoms += [what for what, can in (("some layers", kind.cuts_layers), ("some heads", kind.cuts_heads)) if can]
    facts = _common(kind) | {
        "tables": "calibrated for one model" if kind.profiled else "none",
        "levels": levels,
        "dtypes": ", ".join(sorted(kind.dtypes)),
        "atoms that decode alike, cut or whole": ", ".join(atoms) if kind.block_local else "none",
    }
    yield _facts(facts)
    for model, profile in profiles.items():
        if points := profile.curves.get(name):
            yield _curve(model, points)


def _title(name: str, kind: Any) -> str:
    module = inspect.getmodule(kind)
    assert module is not None and module.__file__ is not None
    file = Path(module.__file__).relative_to(ROOT)
    first = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    return f"### `{name}`\n\n{first} ([{file.name}]({file}))\n"


def _common(kind: Method) -> dict[str, str]:
    return {
        "paper": kind.paper,
        "loses": kind.loses,
        "needs": ", ".join(kind.needs) or "nothing beyond the KV" * hasattr(kind, "lossless") or "nothing",
        "composes with": kind.composes_with,
    }


def _facts(facts: Mapping[str, str]) -> str:
    return _table(("", ""), facts.items())


def _curve(model: str, points: Sequence[Point]) -> str:
    """Worst kinds first, then each kind: how much worse the worst is than the rest is the price of caution."""
    kinds = sorted(points[0].kinds)
    header = ("level", "bits", "KL", "perplexity", "encode MB/s", "decode MB/s", *kinds)
    rows = [
        (
            f"{point.level}",
            f"{point.bits_per_element:.2f}",
            f"{point.kl:.4f}",
            f"{point.ppl_change:+.2%}",
            f"{point.encode_mb_s:,.0f}",
            f"{point.decode_mb_s:,.0f}",
            *(f"{point.kinds[kind].bits_per_element:.2f} / {point.kinds[kind].kl:.4f}" for kind in kinds),
        )
        for point in points
    ]
    return f"{model}; the worst kind of text, then bits / KL of each:\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def packaged_profiles() -> dict[str, Profile]:
    return {path.stem: load(path) for path in sorted(FOLDER.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if METHODS.md is not current")
    fresh = document(packaged_profiles())
    if not parser.parse_args().check:
        METHODS.write_text(fresh)
    elif not METHODS.exists() or METHODS.read_text() != fresh:
        sys.exit("METHODS.md is not current: run `make generate`.")


if __name__ == "__main__":
    main()
