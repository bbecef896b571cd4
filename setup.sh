# Sourced by quickstart.sh and run_tests.sh: sets PYTHON, installing what is missing into .venv the first time.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

has_nemo() {
    "$1" - 2>/dev/null <<'PY'
import importlib.util as u, sys
sys.exit(not all(u.find_spec(name) for name in ("nemo", "megatron", "nemo_run", "torch")))
PY
}

if command -v python3 >/dev/null && has_nemo python3 && [ ! -e "$root/.venv" ]; then
    PYTHON=$(command -v python3) # the NeMo container, or an environment of the user's
else
    PYTHON=$root/.venv/bin/python
    stamp=$root/.venv/installed-$(cat "$root/requirements.txt" "$root/requirements.lock" | cksum | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        base=$(command -v python3.11 || command -v python3.12 || true)
        [ -n "$base" ] || { echo "error: Python 3.11 or 3.12 is needed; install it, or use the NeMo container" >&2; exit 2; }
        echo "installing into .venv, once: about a minute, and 4 GB of disk without a GPU"
        SECONDS=0
        "$base" -m venv --clear "$root/.venv"
        "$PYTHON" -m pip install -q --disable-pip-version-check uv==0.13.9 2>&1 | grep -v WARNING || true
        # uv is ten times faster than pip; it does not read pip's settings, so the place of local wheels is passed on,
        # and it leaves the compiling to the first import, or to each one where Python may not write: half of NeMo's.
        links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$("$PYTHON" -m pip config get global.find-links 2>/dev/null || true)}}
        UV_FIND_LINKS=$links "$root/.venv/bin/uv" pip install -q --compile-bytecode --python "$PYTHON" \
            -r "$root/requirements.txt" -c "$root/requirements.lock" ||
            "$PYTHON" -m pip install -q -r "$root/requirements.txt" -c "$root/requirements.lock"
        touch "$stamp"
        echo "installed in $SECONDS s"
    fi
fi
export PYTHON
