#!/usr/bin/env bash
# The whole tutorial on this machine with a tiny model; sets itself up the first time. See quickstart.py --help.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
exec "$PYTHON" "$root/quickstart.py" "$@"
