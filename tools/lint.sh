#!/usr/bin/env bash
# All that a machine can say about the code, for people and for CI alike. Changes nothing; runs every check, then fails
# if one did. `make lint` installs the tools; what it finds is mended by hand, or with `ruff check --fix`, `ruff format`
# and `clang-format -i`.
set -uo pipefail
cd "$(dirname "$0")/.."
command -v ruff > /dev/null || PATH="$PWD/.venv/bin:$PATH"

failed=()
check() { # name, command...
  local name=$1
  shift
  echo "== $name"
  "$@" || failed+=("$name")
}

native=$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | sort)
short_lines() { ! LC_ALL=C.UTF-8 grep -nE '^.{121,}$' $native; } # clang-format leaves comments alone

check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy --strict hvd_backup
check "clang-format" clang-format --dry-run -Werror $native
check "lines of at most 120 characters" short_lines
check "codespell" codespell

if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "all clean"
