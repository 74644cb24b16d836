#!/usr/bin/env bash
# Makes .venv from requirements.lock and installs sheaf into it in editable form. `make setup` runs it when needed.
# PYTHON names another interpreter; PIP_FLAGS goes to every pip install, for an index or a wheel folder of your own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-}"
if [[ -z $python ]]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [[ -z $python ]]; then
    echo "Sheaf needs Python 3.11, 3.12 or 3.13 and finds none of them; python3 here is:" \
        "$(python3 --version 2>&1 || true). Install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; then
    echo "Sheaf needs Python 3.11, 3.12 or 3.13; $python is $("$python" --version 2>&1)" >&2
    exit 1
fi

if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear .venv
    elif "$python" -m pip --version >/dev/null 2>&1; then
        # Debian and Ubuntu keep ensurepip in a package of its own; a pip outside the environment can fill it as well.
        "$python" -m venv --clear --without-pip .venv
        # shellcheck disable=SC2086
        "$python" -m pip --python .venv/bin/python install --quiet ${PIP_FLAGS:-} "$(grep '^pip==' requirements.lock)"
    else
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "$python cannot make a virtual environment with pip in it. On Debian or Ubuntu:" \
            "apt install python$version-venv, then make setup again" >&2
        exit 1
    fi
fi

# The lock pins the build backend too, so nothing is looked up outside it.
# shellcheck disable=SC2086
.venv/bin/python -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} --requirement requirements.lock
# shellcheck disable=SC2086
.venv/bin/python -m pip install --quiet --disable-pip-version-check ${PIP_FLAGS:-} \
    --no-build-isolation --no-deps --editable .
