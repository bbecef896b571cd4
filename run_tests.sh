#!/usr/bin/env bash
# Runs the tests; sets itself up the first time. Arguments go to pytest; --full adds the long campaigns.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
cd "$root"
marks="not full"
if [ "${1:-}" = --full ]; then
    shift
    marks="full or not full"
fi
command -v nvidia-smi >/dev/null || marks="($marks) and not gpu"
"$PYTHON" -m ruff --version >/dev/null 2>&1 && "$PYTHON" -m ruff check .
exec "$PYTHON" -m pytest -m "$marks" "$@"
