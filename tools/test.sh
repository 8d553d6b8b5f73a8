#!/usr/bin/env bash
# The tests, from a fresh clone on a machine that has only Python and pip. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/env.sh "[test]"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
