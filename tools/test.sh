#!/usr/bin/env bash
# The tests, from a fresh clone on a machine that has only Python and pip.
#   tools/test.sh             lint, types and all tests (this is CI)
#   tools/test.sh --fast      the unit tests without slow ones, one process a core
#   tools/test.sh ARGUMENTS   lint and types, then pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/env.sh "[test]"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # a test process a core, and more that some tests start
if [ "${1:-}" = "--fast" ]; then
  shift
  exec python -m pytest tests/unit -m "not slow" -n auto "$@"
fi
# tests/integration/test_report_page.py is skipped without a browser
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && ! command -v chromedriver > /dev/null && command -v apt-get > /dev/null; then
  echo "installing Chromium for the tests of pages ..."
  log="$(mktemp)"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver; } \
    > "$log" 2>&1 || { tail -3 "$log" >&2; echo "warning: apt-get has no Chromium: the tests of pages are skipped" >&2; }
fi
ruff check .
ruff format --check .
python tools/check_architecture.py
if [ $# -gt 0 ]; then
  mypy
  exec python -m pytest "$@"
fi
# Types are checked beside the tests.
types="$(mktemp)"
mypy > "$types" 2>&1 &
failed=0
python -m pytest -n auto --dist loadfile || failed=$?
wait $! || failed=1
cat "$types"
exit $failed
