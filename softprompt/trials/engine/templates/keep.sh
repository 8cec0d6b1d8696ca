# keep "CODES" COMMAND...: runs a command until its exit code is one of CODES, and returns the code.
# Any other end, such as kill -9, starts it again. SIGTERM sets "stopping" and calls "terminate" with
# the process id; then the command does not start again.
keep() {
  local final=" $1 " code pid="" pause=1
  stopping=""
  shift
  trap 'stopping=yes; [ -z "$pid" ] || terminate "$pid"' TERM
  while :; do
    "$@" & pid=$!
    [ -z "$stopping" ] || terminate "$pid"
    code=0; wait "$pid" || code=$?
    # A trapped signal interrupts wait; the second one waits for the command's own exit code.
    [ -z "$stopping" ] || { code=0; wait "$pid" || code=$?; return "$code"; }
    [[ $final != *" $code "* ]] || return "$code"
    echo "softprompt: the worker ended with $code; it starts again in $pause s" >&2
    sleep "$pause" & pid=$!
    wait "$pid" || true
    [ -z "$stopping" ] || return "$code"
    pause=$((pause < 32 ? 2 * pause : 60))
  done
}
