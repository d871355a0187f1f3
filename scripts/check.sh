#!/usr/bin/env bash
# Everything that can be known about the code without running it. Stops at the first finding. Run by `make check`.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin

check() {
    local started=$SECONDS title=$1 output
    shift
    if ! output=$("$@" 2>&1); then
        printf '%-10s FAILED\n%s\n' "$title" "$output" >&2
        exit 1
    fi
    printf '%-10s ok  %3d s\n' "$title" $((SECONDS - started))
}

check format "$bin/ruff" format --check
check lint "$bin/ruff" check
check types "$bin/mypy"
check floors "$bin/lint-imports" --no-logo
check generated "$bin/python" scripts/proto.py --check
check methods "$bin/python" scripts/methods.py --check
