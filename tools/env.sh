# Sourced by quickstart.sh and test.sh: an environment with the project and the extras named in $1 ("" or "[test]").
# Uses the active virtual environment, or makes and reuses .venv; installs only when pyproject.toml or the extras change.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2; exit 2; }
    "${PYTHON:-python3}" -m venv .venv ||
      { echo "error: cannot make .venv (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
  fi
  . .venv/bin/activate
fi
stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.vidssl-$(printf '%s' "$PWD $1" | cat - pyproject.toml | cksum | cut -d' ' -f1)"
if [ ! -f "$stamp" ]; then
  echo "installing vidssl$1 (the first time: several minutes and, on Linux, some GB of torch) ..."
  python -m pip install --quiet --disable-pip-version-check -e ".$1"
  touch "$stamp"
fi
