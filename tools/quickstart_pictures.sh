#!/usr/bin/env bash
# Draws the pictures of README.md and docs/quickstart.md from the folder of a finished quickstart on the rendered corpus:
#   bash tools/quickstart_pictures.sh [runs/quickstart]
set -euo pipefail
run="$(cd "${1:-runs/quickstart}" && pwd)"
cd "$(dirname "$0")/.."
. tools/env.sh ""
out=docs/pictures
videos=("$run"/corpus/videos/test_000{60,51,62,13}.mp4)
python -m vidssl.cli show features "$run/videomae" "${videos[@]}" $out/quickstart_features.webp
python -m vidssl.cli show masks "$run/videomae" $out/quickstart_masks.webp --clips 2
python -m vidssl.cli decode "$run/videomae" --data "$run/shards/test" --out "$run/decoded" --steps 1500 --clips 16 --shown 4
cp "$run/decoded/decoded.webp" $out/quickstart_decoded.webp
cp "$run/accuracy.png" $out/quickstart_accuracy.png
cp "$run/curves.png" $out/quickstart_curves.png
ls -l $out/quickstart_*
