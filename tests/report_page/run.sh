#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Opens the HTML report in a browser, from disk: it runs its script without an error and others' none, says the same without
# scripts, and draws something on wide screens, narrow ones and dark ones.
# usage: run.sh INCLUDE COMPILER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || { echo "skipped: there is no Chromium to open pages with (apt install chromium)"; exit 77; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failures=0
fail() { echo "$*"; failures=$((failures + 1)); }

"$2" -std=c++20 -O1 -I"$1" "$here/pages.cpp" -o "$folder/pages"
"$folder/pages" "$folder"

# browse PAGE ARGUMENT...: what the browser prints. Each has a profile of its own, which goes with the folder.
browse() {
  local page=$1
  shift
  timeout --kill-after=5 60 "$browser" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars --user-data-dir="$folder/profile" "$@" "file://$folder/$page.html" 2>"$folder/log" ||
    { fail "$page: the browser failed with $?:"; tail -n 5 "$folder/log"; }
}
# open PAGE: what it became goes to PAGE.dom, which the next two look into.
open() { browse "$1" --dump-dom >"$folder/$1.dom"; }
shows() { grep -qF -- "$2" "$folder/$1.dom" || fail "$1 does not show: $2"; }
lacks() { ! grep -qF -- "$2" "$folder/$1.dom" || fail "$1 has: $2"; }

open empty
((failures == 0)) || { echo "skipped: $browser does not run here"; exit 77; }
for page in empty sample unknown large hostile; do
  [[ $page == empty ]] || open "$page"
  shows "$page" 'data-js="ok"'
  lacks "$page" 'data-error'
  lacks "$page" 'data-pwned'
  lacks "$page" '<img'
done
shows hostile '&lt;script&gt;document.documentElement.dataset.pwned=1&lt;/script&gt;'
shows sample '<p class="headline">Rank 5 slows this job.</p>'
shows sample 'data-finding="one_rank" data-ranks="5"'
shows sample '<button type="button">operation</button>'
shows unknown 'What that cost in joules is not known: no meter.'
shows large '<p class="headline">Rank 300 slows this job.</p>'
shows large '512 ranks are too many to draw each'

sed '/^<script>/,/^<\/script>/d' "$folder/sample.html" >"$folder/without_script.html"
open without_script
lacks without_script 'data-js'
shows without_script '<p class="headline">Rank 5 slows this job.</p>'
shows without_script '<tr data-rank="7"'

# The two numbers after "IHDR" in a PNG.
size_of() { od -An -tu1 -j16 -N8 "$1" | awk '{print $1 * 16777216 + $2 * 65536 + $3 * 256 + $4 "x" $5 * 16777216 + $6 * 65536 + $7 * 256 + $8}'; }
# draws PAGE WIDTH HEIGHT ARGUMENT...: a picture of that size with far more in it than in one of nothing.
draws() {
  local page=$1 width=$2 height=$3
  shift 3
  rm -f "$folder/page.png"
  browse "$page" --screenshot="$folder/page.png" --window-size="$width,$height" "$@" >/dev/null
  [[ -s $folder/page.png ]] || { fail "$page: no screenshot"; return; }
  [[ $(size_of "$folder/page.png") == "${width}x$height" ]] || fail "$page: the screenshot is $(size_of "$folder/page.png"), not ${width}x$height"
  (($(stat -c %s "$folder/page.png") > 5 * $(stat -c %s "$folder/blank.png"))) || fail "$page at $width x $height $*: the screenshot is blank"
}
echo '<!DOCTYPE html><title>nothing</title>' >"$folder/blank.html"
browse blank --screenshot="$folder/blank.png" --window-size=1400,2000 >/dev/null
draws sample 1400 2000
draws sample 500 2000 --blink-settings=preferredColorScheme=0
draws large 1400 2000

((failures == 0)) || { echo "$failures failures"; exit 1; }
echo "opened in $("$browser" --version 2>/dev/null)"
