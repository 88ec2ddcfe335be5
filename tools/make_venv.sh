#!/usr/bin/env bash
# Makes the virtual environment from the pinned requirements.  Works where the
# distribution's Python lacks venv or pip: says what to install.
set -euo pipefail
python="$1"
venv="$2"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
  echo "Albireo needs Python 3.11 or newer; $python is $("$python" --version 2>&1 || true)." >&2
  echo "Name another one: make venv PYTHON=/path/to/python3" >&2
  exit 1
}
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || {
    echo "python3 -m venv failed; on Debian or Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --no-build-isolation --editable .
