#!/usr/bin/env bash
# Checks the whole tree with ruff and mypy.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"
set_up_environment test
cd "$checkout"
"$venv/bin/ruff" check .
"$venv/bin/mypy"
