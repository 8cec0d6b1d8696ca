#!/bin/bash
# Brings Python, installs softprompt from the sweep's store, and keeps one worker running. With
# arguments it runs them instead of a worker. Needs bash, tar, and curl or pip. Run again at any
# time, as at a reboot: what is there is kept, and an installation that was cut off starts anew.
set -euo pipefail
export HOME="${HOME:-/root}"
root="$HOME/.softprompt"
home="$root/{{ commit }}"
export PATH="$home/venv/bin:$root/bin:$PATH"

bring_uv() {
  ! command -v uv >/dev/null || return 0
  curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$root/bin" UV_NO_MODIFY_PATH=1 sh ||
    { python3 -m pip install --quiet --target "$root/pip" uv && ln -sf "$root/pip/bin/uv" "$root/bin/uv"; }
}

fetch() {  # fetch FROM TO
  case $1 in
    gs://*) uv run --quiet --no-project --python '{{ python }}' --with gcsfs python -c '
import sys, fsspec
files, path = fsspec.url_to_fs(sys.argv[1])
files.get_file(path, sys.argv[2])' "$1" "$2" ;;
    *) cp "$1" "$2" ;;
  esac
}

install() {
  rm -rf "$home" && mkdir -p "$home/code" "$root/bin" &&
    bring_uv &&
    fetch {{ archive }} "$home/code.tar.gz" &&
    tar -xzf "$home/code.tar.gz" -C "$home/code" &&
    uv venv --quiet --python '{{ python }}' "$home/venv" &&
    uv pip install --quiet --python "$home/venv" -c "$home/code/constraints.txt" -e "$home/code[{{ extras }}]" &&
    touch "$home/installed"
}

until [ -e "$home/installed" ] || install; do
  echo "softprompt: the installation failed; it starts again in 10 s" >&2
  sleep 10
done
cd "$home/code"
[ $# -eq 0 ] || exec "$@"

# A virtual machine's startup script becomes a unit of systemd: it is stopped before the network is
# when the machine is preempted, and starts again when this script is killed.
if [ -d /run/systemd/system ] && [ "$(id -u)" = 0 ] && [ -z "${SOFTPROMPT_UNIT:-}" ]; then
  [ "$0" -ef "$root/startup.sh" ] || cp "$0" "$root/startup.sh"
  exec systemd-run --unit=softprompt --setenv=SOFTPROMPT_UNIT=1 --setenv=HOME="$HOME" \
    --property=After=network-online.target --property=Restart=always --property=RestartSec=5 \
    --property=RestartPreventExitStatus="{{ final | join(' ') }}" --property=KillMode=mixed \
    --property=TimeoutStopSec=40 bash "$root/startup.sh"
fi

{% include "keep.sh" %}
terminate() { kill -TERM "$1" 2>/dev/null || true; }

worker=(softprompt work {{ workdir }})
{% if hosts > 1 %}
# The slice's hosts in order, and which of them this is: GKE, SkyPilot, or the TPU VM's metadata.
metadata() {
  curl -sf -m 5 -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
if [ -n "${TPU_WORKER_HOSTNAMES:-}" ]; then
  first=${TPU_WORKER_HOSTNAMES%%,*}; index=$TPU_WORKER_ID
elif [ -n "${SKYPILOT_NODE_IPS:-}" ]; then
  first=$(head -n 1 <<<"$SKYPILOT_NODE_IPS"); index=$SKYPILOT_NODE_RANK
else
  first=$(metadata worker-network-endpoints | cut -d , -f 1 | cut -d : -f 3)
  index=$(metadata agent-worker-number)
fi
worker+=(--distributed "$first:8476,$index,{{ hosts }}")
{% endif %}
keep "{{ final | join(' ') }}" "${worker[@]}"
