# For scripts that download and install (source it): what takes long says how far it is.
#
#   log=FILE                    must be set: what commands say goes there
#   quietly TITLE COMMAND...    runs it; a line every ten seconds; if it fails, the log's end is shown and the script ends
#   pip_install_once NAME TITLE ARGS...
#                               `pip install ARGS...` into .deps/venv: pip's own bars on a terminal, such lines elsewhere; a
#                               mark there, called NAME, says that all of it arrived, and nothing is done the next time

fail() {
  echo "$(basename "$0" .sh): $*" >&2
  exit 1
}

ticker=
folder_mb() { [ -z "${watched:-}" ] || { du -sm "$watched" 2> /dev/null || true; } | awk '{print $1}'; }
tick() {
  local began=$SECONDS before now
  before=$(folder_mb)
  while sleep 10 > /dev/null 2>&1; do
    now=$(folder_mb)
    echo "$(basename "$0" .sh):   $((SECONDS - began)) s${now:+, $((now - before)) MB on disk so far}: $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-90)"
  done
}
stop_ticker() {
  [ -z "$ticker" ] || kill "$ticker" 2> /dev/null || true
  ticker=
}
trap stop_ticker EXIT

quietly() {
  local rc=0
  echo "$(basename "$0" .sh): $1"
  shift
  echo "+ $*" >> "$log"
  tick 2> /dev/null &
  ticker=$!
  "$@" >> "$log" 2>&1 || rc=$?
  stop_ticker
  [ "$rc" = 0 ] || { tail -n 40 "$log" >&2; fail "failed; all of it is in $log"; }
}

# pip's temporary files lie beside what it installs: there is room, and they can be counted.
pip_install_once() {
  local mark=.deps/venv/.installed-$1 title=$2 pip=(env TMPDIR="$PWD/.deps/tmp" .deps/venv/bin/python -m pip install --disable-pip-version-check --no-input)
  shift 2
  [ -e "$mark" ] && return
  mkdir -p .deps/tmp
  if [ -t 1 ]; then
    echo "$(basename "$0" .sh): $title"
    "${pip[@]}" --log "$log" "$@" || fail "pip failed; all of it is in $log"
  else
    watched=.deps quietly "$title" "${pip[@]}" --progress-bar off "$@"
  fi
  rm -rf .deps/tmp
  touch "$mark"
}
