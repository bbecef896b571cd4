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
[ $# -gt 0 ] && exec "$PYTHON" -m pytest -m "$marks" "$@"
# In two processes, as most of a test is an import of NeMo, which uses one core; first what does without NeMo.
two=""
"$PYTHON" -c "import xdist" 2>/dev/null && two="-n 2 --dist loadfile"
# shellcheck disable=SC2086
"$PYTHON" -m pytest -q -m "($marks) and not nemo" $two
# shellcheck disable=SC2086
exec "$PYTHON" -m pytest -m "($marks) and nemo" $two --durations=10
