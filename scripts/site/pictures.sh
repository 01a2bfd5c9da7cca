#!/usr/bin/env bash
# Takes pictures of ten pages of the documentation site, for docs/site/: after make docs, bash scripts/site/pictures.sh.
# Needs Debian's packages chromium and pngquant. docs/looks.md shows the pictures.
set -euo pipefail
cd "$(dirname "$0")/../.."
pages=(
  index glossary how_to second_day untested reference/configuration/bank reference/python/banks reference/methods
  records/demo results
)
[ "$#" -eq 0 ] || pages=("$@") # or the named pages
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
mkdir -p docs/site
for page in "${pages[@]}"; do
  [ -e "build/site/$page.html" ] || { echo "build/site/$page.html is not there: make docs first" >&2; exit 2; }
  picture=docs/site/${page//\//_}.png
  chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" --window-size=1280,1600 \
    --virtual-time-budget=5000 --screenshot="$profile/page.png" "file://$PWD/build/site/$page.html" 2>/dev/null
  pngquant --force --strip --speed 1 --output "$picture" 64 "$profile/page.png"
done
du -ch docs/site/*.png | tail -1
