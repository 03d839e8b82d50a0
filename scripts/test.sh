#!/usr/bin/env bash
# Runs the tests: ./scripts/test.sh [pytest arguments]. Without arguments the whole suite except the slow tests;
# `-m slow` runs those, `-m ""` all. Paths are relative to the checkout.
set -euo pipefail
# shellcheck source=scripts/_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

ensure_environment test
cd "$ROOT"
say "testing: pytest $*"
exec "$python" -m pytest "$@"
