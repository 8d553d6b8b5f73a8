#!/usr/bin/env bash
# Installs vidssl where it is not yet, and runs `vidssl quickstart`: from videos to a table of frozen-probe accuracies and
# a report. Without an argument on a small corpus rendered here; or on your own videos (FOLDER/<class>/<file>, or
# FOLDER/labels.csv): bash tools/quickstart.sh FOLDER
set -euo pipefail
[ -d "${1:-}" ] && set -- "$(cd "$1" && pwd)" "${@:2}"  # a folder is meant from where you are
cd "$(dirname "$0")/.."
. tools/env.sh ""
exec python -m vidssl.cli quickstart "$@"
