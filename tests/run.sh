#!/usr/bin/env bash
# Runs the checks and the tests, after making .venv with the test tools if it is missing or stale.
#
#   tests/run.sh                               ruff, mypy, then every test
#   tests/run.sh deploy                        the tests on real infrastructure (tests/deploy/infrastructure.py)
#   tests/run.sh tests/test_x.py -k foo        pytest alone, with these arguments; paths are below the checkout
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up_environment test
cd "$checkout"
[ $# -gt 0 ] || tests/lint.sh
[ "${1:-}" != deploy ] || { shift; set -- -m deploy "$@"; }
exec "$venv/bin/python" -m pytest "$@"
