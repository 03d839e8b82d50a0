# shellcheck shell=bash
# Finds or makes the Python environment of this checkout. Sourced by train.sh, test.sh and .ci/run.
# Sets ROOT, and through `ensure_environment` sets python: the interpreter that has fsdp_dp and all that it needs.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '[fsdp_dp] %s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

# The first interpreter that is new enough and can make environments. Each is really run: a version manager's shim may
# exist and yet refuse.
find_python() {
  local candidate candidates=(python3.13 python3.12 python3.11 python3)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  fail "found no Python >= 3.11 with the venv module (tried: ${candidates[*]})." \
    "Install one (on Debian: python3 and python3-venv), name it with PYTHON=/path/to/python, or activate an environment."
}

# Sets python and prefix: the active environment if there is one, else this checkout's .venv, made if need be.
select_environment() {
  prefix="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [[ -n "$prefix" ]]; then
    python="$prefix/bin/python"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
      fail "the active environment $prefix has no Python >= 3.11. Deactivate it (this script then makes .venv) or activate another."
  else
    prefix="$ROOT/.venv"
    python="$prefix/bin/python"
  fi
}

make_venv() {
  local base
  base="$(find_python)"
  say "creating $prefix with $("$base" --version)"
  "$base" -m venv --clear "$prefix"
}

# What the last installation depended on: the two files, the checkout and the interpreter.
installation_key() {
  "$python" - "$ROOT" <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
parts = [sys.version, str(root), (root / "setup.cfg").read_text(), (root / "constraints.txt").read_text()]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

# A test installation serves training too.
is_installed() {
  local stamp
  for stamp in "$prefix/.fsdp_dp-test" "$prefix/.fsdp_dp-$1"; do
    if [[ -x "$python" && -f "$stamp" && "$(<"$stamp")" == "$(installation_key)" ]]; then
      return 0
    fi
  done
  return 1
}

# In an environment that you made, what is there stays (torch above all: it may be built for your cluster); what is
# missing comes at the pinned version. In a new .venv every pin holds.
constraints() {
  "$python" - "$ROOT/constraints.txt" <<'PY'
import importlib.metadata, sys

for pin in open(sys.argv[1]):
    name = pin.split("==")[0]
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(pin, end="")
    else:
        if name == "torch":
            print(f"torch=={installed}")
PY
}

install() {
  local extra="$1" target="$ROOT" pins="$ROOT/constraints.txt" log="$prefix/fsdp_dp-install.log"
  if [[ "$prefix" == "$ROOT/.venv" ]]; then
    "$python" -m pip --version >/dev/null 2>&1 || make_venv
  else
    pins="$prefix/fsdp_dp-constraints.txt"
    constraints >"$pins"
  fi
  [[ "$extra" == runtime ]] || target="${ROOT}[${extra}]"
  say "installing fsdp_dp ($extra) and what it needs into $prefix; the first time takes minutes (log: $log)"
  if ! "$python" -m pip install --disable-pip-version-check --editable "$target" --constraint "$pins" >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "pip could not install into $prefix: the end of $log is above." \
      "If the environment is your own, mend what pip names, or deactivate it and start again: a .venv is then made."
  fi
  installation_key >"$prefix/.fsdp_dp-$extra"
}

# ensure_environment runtime|test|EXTRA,...: installs only what the last start of this checkout did not.
ensure_environment() {
  select_environment
  is_installed "$1" && return
  # Two first starts at once (two jobs, a shared checkout) must not write one environment together.
  if command -v flock >/dev/null; then
    exec 9>"$ROOT/.venv.lock"
    flock --nonblock 9 || { say "waiting for another installation of this checkout"; flock 9; }
  fi
  is_installed "$1" || install "$1"
  exec 9>&-
}
