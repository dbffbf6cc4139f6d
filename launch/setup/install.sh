#!/usr/bin/env bash
# install.sh FOLDER [PACKAGE ...]: makes an environment in FOLDER, with what
# requirements.txt names and the packages. For rented machines, whose images come with
# Python 3.10 (Ubuntu 22.04): where find_python.sh finds none that will do, uv brings it.
set -eu
folder=$1
shift
cd "$(dirname "$0")/.."
if ! python=$(bash launch/setup/find_python.sh 2>/dev/null); then
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
  python3 -m uv python install 3.12
  python=$(bash launch/setup/find_python.sh)
fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
  -r requirements.txt "$@"
