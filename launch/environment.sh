# To be sourced: makes this checkout's .venv from the lock files if it is missing or stale.
#
#   . launch/environment.sh
#   set_up_environment run      what training needs: requirements.lock
#   set_up_environment test     and the test tools: requirements-test.lock
#   set_up_peers                .venv-bench, with the references of `actorlearner bench`: requirements-bench.lock
#
# `set_up_environment` returns when .venv is ready, within some tens of milliseconds if it already was; otherwise it prints
# each step in one line on stderr. On an error it prints the cause and the remedy and exits the shell.
#
# .venv/setup-stamp records what .venv was made from. It says "incomplete" while .venv is being made, so an interrupted
# set-up is repeated. There are two locks in .setup/: `making` is held while .venv is made; `in-use` is shared by all
# processes that run from .venv (it stays open across exec, as file descriptor 8), so that none replaces .venv under them.
#
# PYTHON=/path/to/python chooses the interpreter, if it is a CPython 3.9-3.11.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$checkout/.venv
stamp=$venv/setup-stamp
torch_index=https://download.pytorch.org/whl/cpu # PyPI's torch wants 3 GB of CUDA

say() { printf 'setup: %s\n' "$*" >&2; }

fail() {
  printf 'setup: error: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf 'setup:        %s\n' "$@" >&2
  exit 1
}

set_up_environment() { # run|test
  local level=$1 stale
  [ "$(uname -s) $(uname -m)" = "Linux x86_64" ] || fail \
    "actorlearner does not run on $(uname -s) $(uname -m), only on Linux x86_64: Reverb has builds for nothing else." \
    "Use Docker, on an x86_64 machine: see docker/ in the repository."
  command -v flock >/dev/null || fail "there is no flock command here." "Install util-linux."
  mkdir -p "$checkout/.setup" 2>/dev/null && { exec 8>>"$checkout/.setup/in-use" 9>>"$checkout/.setup/making"; } 2>/dev/null ||
    fail "cannot write to $checkout." "Use a checkout that you may write to; .venv is made there."

  flock -s -n 8 || { say "waiting for another start, which is making .venv"; flock -s 8; }
  find_staleness "$level"
  if [ -n "$stale" ]; then
    flock -u 8
    flock -n 9 || { say "waiting for another start, which is making .venv"; flock 9; }
    find_staleness "$level"
    case $stale in
      "") ;;
      "no test tools") add_test_tools ;;
      *) make_environment "$level" ;;
    esac
    flock -s 8
  fi
  exec 9>&-
}

# Sets `stale` to why .venv cannot be used as it is, or to the empty string.
find_staleness() { # run|test
  local made_in="" made_with="" made_from="" tested_with="" wanted
  stale=""
  if [ ! -e "$venv" ]; then stale="there is none"; return; fi
  [ -r "$stamp" ] || fail "$venv was not made by this script, so it is not touched." "Move it away or delete it, then start again."
  if [ "$(wc -l <"$stamp")" -ne 4 ]; then stale="an earlier set-up was interrupted"; return; fi
  { read -r made_in; read -r made_with; read -r made_from; read -r tested_with; } <"$stamp"
  if [ "$made_in" != "$checkout" ]; then stale="the checkout has moved"
  elif [ "$(python_version "$venv/bin/python")" != "$made_with" ]; then stale="its Python $made_with is gone or has changed"
  elif [ "$made_from" != "$(fingerprint requirements.lock setup.py)" ]; then stale="requirements.lock or setup.py has changed"
  elif [ -n "${PYTHON:-}" ] && wanted=$(supported_python "$PYTHON") && [ "$wanted" != "$made_with" ]; then
    stale="PYTHON=$PYTHON is $wanted, not $made_with"
  elif [ "$1" = test ] && [ "$tested_with" != "$(fingerprint requirements-test.lock)" ]; then stale="no test tools"
  fi
}

fingerprint() { # FILE...
  (cd "$checkout" && cat -- "$@" | sha256sum | cut -c 1-64)
}

write_stamp() { # run|test
  {
    printf '%s\n' "$checkout" "$(python_version "$venv/bin/python")" "$(fingerprint requirements.lock setup.py)"
    if [ "$1" = test ]; then fingerprint requirements-test.lock; else echo "no test tools"; fi
  } >"$stamp.new" && mv "$stamp.new" "$stamp"
}

make_environment() { # run|test
  local python="" lock=requirements.lock started=$SECONDS
  [ "$1" = run ] || lock=requirements-test.lock
  flock -x -w 2 8 || fail "$venv must be made anew ($stale), but something runs out of it." \
    "Wait until it has ended or stop it, then start again; or use another checkout."
  say "making $venv, as $stale"
  find_python
  if command -v uv >/dev/null; then
    say "installing $lock with uv ($(command -v uv))"
    if clear_environment "$venv" && uv venv --quiet --allow-existing --python "$python" "$venv" && install_locked uv "$lock" && install_package uv; then
      write_stamp "$1"
      say "done in $((SECONDS - started)) s"
      return
    fi
    say "uv failed, for the reason above; trying pip, whose settings (mirror, proxy, certificates) may be others"
  fi
  say "installing $lock with pip; this takes a few minutes"
  if clear_environment "$venv" && "$python" -m venv "$venv" && install_locked pip "$lock" && install_package pip; then
    write_stamp "$1"
    say "done in $((SECONDS - started)) s"
  else
    fail_to_install "$lock"
  fi
}

# The test lock has the versions of the run lock and more, so it can be added while a training runs.
add_test_tools() {
  say "adding the test tools to $venv"
  { command -v uv >/dev/null && install_locked uv requirements-test.lock; } || install_locked pip requirements-test.lock ||
    fail_to_install requirements-test.lock
  write_stamp test
}

fail_to_install() { # LOCKFILE
  fail "could not install what $1 names; the reason is above." \
    "No network: the packages come from PyPI; behind a proxy set HTTPS_PROXY, for a mirror PIP_INDEX_URL." \
    "Certificate errors: set SSL_CERT_FILE and PIP_CERT to your authority's certificates." \
    "Disk: .venv takes 2.5 GB. Then start again; what was downloaded is kept."
}

# Empties the directory except for a stamp, written first: a directory without one would be taken for someone else's.
clear_environment() { # DIRECTORY
  local entry
  mkdir -p "$1" && echo incomplete >"$1/setup-stamp" || return
  for entry in "$1"/* "$1"/.[!.]*; do
    [ "$entry" = "$1/setup-stamp" ] || rm -rf "$entry" || return
  done
}

# Installs exactly what the lock file says. The build tools come first and from the lock file too, so that what has to be
# built (gym) is built with pinned tools.
install_locked() { # uv|pip LOCKFILE
  local lock=$checkout/$2 tools
  tools=$(grep -oE '^(packaging|setuptools|wheel)==[^ ;]+' "$lock")
  install "$1" $tools && install "$1" --no-build-isolation --no-deps -r "$lock" && compile_bytecode
}

# Compiles on every core, in half the time of pip on one; files that do not compile are never imported.
compile_bytecode() {
  "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null 2>&1 || true
}

install_package() { # uv|pip
  install "$1" --no-build-isolation --no-deps -e "$checkout"
}

install() { # uv|pip ARGUMENT...
  local with=$1
  shift
  if [ "$with" = uv ]; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null || return
    env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
  fi
}

# Sets `python` to a CPython 3.9-3.11 with venv and ensurepip; fetches one if there is none. 3.11 comes first: it is the
# fastest of them, and the only one that still gets security fixes.
find_python() {
  local candidate version
  if [ -n "${PYTHON:-}" ] && ! supported_python "$PYTHON" >/dev/null; then
    say "PYTHON=$PYTHON is not a CPython 3.9-3.11 with venv; looking for another"
  fi
  for candidate in "${PYTHON:-}" python3.11 python3.10 python3.9 python3 python "$checkout"/.setup/python/cpython-3.11*/bin/python3.11; do
    [ -n "$candidate" ] && version=$(supported_python "$candidate") || continue
    python=$(command -v "$candidate")
    say "using Python $version: $python"
    return
  done
  say "found no CPython 3.9-3.11 with venv"
  fetch_python 3.11
}

supported_python() { # PYTHON; prints its version, e.g. 3.11, or fails
  "$1" -I -c 'import runpy, sys
runpy.run_path(sys.argv[1])["check_platform"]()
import ensurepip, venv
print("%d.%d" % sys.version_info[:2])' "$checkout/distributed/actorlearner/supported_platform.py" 2>/dev/null
}

python_version() { # PYTHON; prints e.g. 3.11
  "$1" -I -S -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Sets `python` to a CPython of this version, fetched into .setup/python.
fetch_python() { # VERSION [VARIABLE]
  local directory=$checkout/.setup/python named=${2:-PYTHON} uv
  say "fetching CPython $1 into $directory with uv"
  find_uv
  UV_PYTHON_INSTALL_DIR=$directory UV_PYTHON_INSTALL_BIN=0 "$uv" python install --no-progress "$1" || fail \
    "could not fetch a CPython $1; the reason is above." \
    "Install one (Debian 12: apt install python3-venv; elsewhere pyenv or conda) and start again, with $named=/path/to/python" \
    "if it is not on PATH; or use Docker: see docker/ in the repository."
  for python in "$directory"/cpython-"$1"*/bin/python"$1"; do
    supported_python "$python" >/dev/null && return
  done
  fail "uv fetched no usable CPython $1 into $directory." "Install one yourself and start again with $named=/path/to/python."
}

# Sets `uv` to the uv on PATH, or to one installed from PyPI into .setup/uv.
find_uv() {
  local any
  uv=$(command -v uv) && return
  uv=$checkout/.setup/uv/bin/uv
  "$uv" --version >/dev/null 2>&1 && return
  for any in python3 python3.13 python3.12 python3.11 python3.10 python3.9 python; do
    "$any" -I -c 'import ensurepip, venv' 2>/dev/null || continue
    say "installing uv into $checkout/.setup/uv with $(command -v "$any")"
    rm -rf "$checkout/.setup/uv"
    "$any" -m venv "$checkout/.setup/uv" && "$checkout/.setup/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv && return
    fail "could not install uv; the reason is above." "Install it yourself (https://docs.astral.sh/uv) and start again."
  done
  fail "there is no Python 3 with venv here, and no uv." \
    "Install one of them (Debian and Ubuntu: apt install python3-venv), then start again; or use Docker: see docker/."
}

# Makes .venv-bench with Python 3.11 when it is missing or stale; PEERS_PYTHON=/path/to/python3.11 says which.
set_up_peers() {
  local venv=$checkout/.venv-bench lock=$checkout/requirements-bench.lock python="" started=$SECONDS torch with
  [ "$(cat "$venv/setup-stamp" 2>/dev/null)" != "$(fingerprint requirements-bench.lock)" ] || return 0
  [ ! -e "$venv" ] || [ -e "$venv/setup-stamp" ] ||
    fail "$venv was not made by this script, so it is not touched." "Move it away or delete it, then start again."
  say "making $venv from requirements-bench.lock; this takes a few minutes"
  clear_environment "$venv" || fail "could not clear $venv; the reason is above."
  find_python_of_peers
  torch=$(grep -oE '^torch==[^ ;]+' "$lock") || fail "$lock names no torch." "Write it anew: make lock."
  for with in uv pip; do
    [ "$with" = pip ] || command -v uv >/dev/null || continue
    if clear_environment "$venv" && "$python" -m venv "$venv" &&
      install "$with" --no-deps --extra-index-url "$torch_index" "$torch" && install "$with" --no-deps -r "$lock" &&
      fingerprint requirements-bench.lock >"$venv/setup-stamp"; then
      say "done in $((SECONDS - started)) s"
      return
    fi
    say "$with failed, for the reason above"
  done
  fail "could not install what requirements-bench.lock names." \
    "No network: the packages come from PyPI, torch from $torch_index (or from where PIP_FIND_LINKS says)."
}

# Sets `python` to a CPython 3.11 with venv: requirements-bench.lock is for that one.
find_python_of_peers() {
  local candidate
  for candidate in "${PEERS_PYTHON:-}" "$checkout/.venv/bin/python" python3.11 "$checkout"/.setup/python/cpython-3.11*/bin/python3.11; do
    [ "$(supported_python "$candidate")" = 3.11 ] || continue
    python=$(command -v "$candidate")
    return
  done
  say "found no CPython 3.11 with venv, which the benchmarks' peers need (PEERS_PYTHON=/path/to/python3.11)"
  fetch_python 3.11 PEERS_PYTHON
}

# Writes the lock files from setup.py and benchmarks/requirements.in. Pins that still fit are kept; `lock_versions --upgrade` takes the newest.
lock_versions() { # [UV ARGUMENT...]
  local uv extra
  find_uv
  for extra in "" test; do
    (
      cd "$checkout" || exit
      "$uv" pip compile --quiet --universal --python-version 3.9 --custom-compile-command "make lock" "$@" \
        ${extra:+--extra "$extra" --constraint requirements.lock} setup.py -o "requirements${extra:+-$extra}.lock"
    ) || fail "could not resolve the versions; the reason is above." "Change install_requires in setup.py, then again: make lock"
    say "wrote requirements${extra:+-$extra}.lock"
  done
  (
    cd "$checkout" || exit
    set -o pipefail
    {
      echo "# CUDA's libraries as wheels, for the GPU image: what tensorflow[and-cuda] names. \`make lock\` writes it."
      "$uv" pip compile --quiet --no-header --no-annotate --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --constraint requirements.lock - <<<"tensorflow[and-cuda]" | grep '^nvidia-'
    } >requirements-gpu.lock.new && mv requirements-gpu.lock.new requirements-gpu.lock
  ) || fail "could not resolve the versions of CUDA's libraries; the reason is above."
  say "wrote requirements-gpu.lock"
  (
    cd "$checkout" || exit
    "$uv" pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --extra-index-url "$torch_index" \
      --no-emit-index-url --custom-compile-command "make lock" "$@" benchmarks/requirements.in -o requirements-bench.lock
  ) || fail "could not resolve the versions of the benchmarks' peers; the reason is above."
  say "wrote requirements-bench.lock"
}
