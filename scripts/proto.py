"""Generate wire code: proto/<package path>/x.proto -> <package path>/x_pb2.py, .pyi and, for services, x_pb2_grpc.py.

A proto's folder mirrors the package that owns its code, so imports come out right without path tricks. `--check` says
whether the code in the tree is what the protos give, and changes nothing.
"""

import argparse
import sys
import tempfile
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(out: Path) -> None:
    """Run protoc over every proto file; keep a `_grpc` file only where there is a service in it."""
    from grpc_tools import protoc

    protos = sorted(PROTO.rglob("*.proto"))
    includes = [f"--proto_path={PROTO}", f"--proto_path={resources.files('grpc_tools') / '_proto'}"]
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", *includes, *outputs, *map(str, protos)]) != 0:
        sys.exit("protoc failed")
    for path in out.rglob("*_pb2_grpc.py"):
        if "_registered_method=True" not in path.read_text():
            path.unlink()


def generated_files(root: Path) -> dict[Path, str]:
    """Generated code under `root`, in the folders that proto/ names, by path relative to `root`."""
    folders = sorted({path.parent.relative_to(PROTO) for path in PROTO.rglob("*.proto")})
    paths = (path for folder in folders for pattern in GENERATED for path in (root / folder).glob(pattern))
    return {path.relative_to(root): path.read_text() for path in paths}


def stale(fresh: dict[Path, str]) -> list[Path]:
    """Files that differ, are missing, or have no proto any more."""
    present = generated_files(ROOT)
    return sorted(path for path in fresh.keys() | present.keys() if fresh.get(path) != present.get(path))


def update(fresh: dict[Path, str]) -> list[Path]:
    """Bring the tree up to date; returns what changed."""
    changed = stale(fresh)
    for path in changed:
        if path in fresh:
            (ROOT / path).write_text(fresh[path])
        else:
            (ROOT / path).unlink()
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail if the tree is not current")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = generated_files(Path(scratch))
    changed = stale(fresh) if check else update(fresh)
    for path in changed:
        print(f"{'stale' if check else 'wrote'}: {path}")
    if check and changed:
        sys.exit("Generated code is not current: run `make generate`.")


if __name__ == "__main__":
    main()
