#!/usr/bin/env bash
# From videos to a table of frozen-probe accuracies. Without an argument on a small corpus rendered here:
#   bash tools/quickstart.sh            or, on your own videos (FOLDER/<class>/<file>, or FOLDER/labels.csv):
#   bash tools/quickstart.sh FOLDER
set -euo pipefail
[ -d "${1:-}" ] && set -- "$(cd "$1" && pwd)" "${@:2}"  # a folder is meant from where you are
cd "$(dirname "$0")/.."
. tools/env.sh ""
exec python tools/quickstart.py "$@"
