#!/usr/bin/env bash
# Checks types and the import contract on an installed copy: packages lie
# elsewhere when installed (ipc/ becomes albireo.ipc), and checkers that read
# the tree would not see that.
set -euo pipefail
bin="$(cd "$1" && pwd)"
root="$PWD"
copy="$(mktemp -d)"
trap 'rm -rf "$copy"' EXIT
mkdir "$copy/source"
cp -r pyproject.toml README.md LICENSE albireo ipc workers "$copy/source"
"$bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --no-build-isolation --target "$copy/site" "$copy/source"
cd "$copy/site"
"$bin/python" -m mypy --config-file "$root/pyproject.toml" \
  --cache-dir "$root/.mypy_cache" --python-executable "$bin/python" -p albireo
PYTHONPATH="$copy/site" "$bin/lint-imports" --config "$root/pyproject.toml" --no-cache
