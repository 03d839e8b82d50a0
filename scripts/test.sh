#!/usr/bin/env bash
# Runs the tests: ./scripts/test.sh [pytest arguments]. Without arguments the whole suite except the slow tests;
# `-m slow` runs those, `-m ""` all. Paths are relative to the checkout.
# A worker for each core takes a file at a time, at most four, since distributed tests start up to four ranks each; `-n 0`
# stays in this process, as --pdb needs.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

ensure_environment test
cd "$ROOT"
say "testing: pytest $*"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
