#!/usr/bin/env bash
# Makes the virtual environment VENV: the pinned packages of this folder, then this checkout in editable form.
#
#   requirements/install.sh VENV cpu|cuda
#
# VENV/.installed-<build> is written last and names what was installed. Where it is absent, an earlier run was cut short, and
# nothing that it left is trusted: pip takes a half-unpacked package for an installed one. A lock keeps two runs apart, also
# from the pip of a run that was killed and still writes. The output of pip is in VENV/install.log.
set -euo pipefail

venv=$1
build=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
here=$root/requirements
stamp=$venv/.installed-$build
log=$venv/install.log
step=0

fail() {
    printf '\nset-up failed: %s\n' "$1" >&2
    shift
    if [ $# -gt 0 ]; then printf '%s\n' "$@" >&2; fi
    exit 1
}

say() {
    step=$((step + 1))
    printf '[%d/%d] %-62s %4ds\n' "$step" "$steps" "$1" "$SECONDS"
}

# One line that a terminal sees changing; where there is no terminal, a line every 25 packages.
progress() {
    local line note count=0 begin='      ' end=$'\n' every=25
    if [ -t 1 ]; then begin=$'\r\033[K      ' end='' every=1; fi
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$log"
        case $line in
            Collecting\ * | Processing\ *)
                count=$((count + 1))
                note="$count packages read"
                if [ $((count % every)) -ne 0 ]; then continue; fi
                ;;
            Installing\ collected*)
                if [ "$count" -eq 0 ]; then continue; fi
                note="unpacking $count packages"
                ;;
            *) continue ;;
        esac
        printf '%s%s%s' "$begin" "$note" "$end"
    done
    if [ -t 1 ]; then printf '\r\033[K'; fi
}

run_pip() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off "$@" 2>&1 |
        progress || fail "pip could not install the packages; its last lines were:" "$(tail -n 15 "$log")" "" \
        "The whole log is $log. Once the cause is gone, run it again: it starts afresh."
}

# compile_packages PROCESSES: done here, because a user may have told Python to write no bytecode itself. Some packages carry
# templates that are no Python: they are not compiled, and that is no error.
compile_packages() {
    nice "$venv/bin/python" -m compileall -q -j "$1" -x '/(tests?|rllib)/' "$venv/lib" >/dev/null 2>&1 || true
}

install_checkout() {
    run_pip --no-deps --no-build-isolation --editable "$root"
}

find_python() {
    local candidate found=
    for candidate in ${PYTHON:-python3.11 python3 /usr/bin/python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            found=$candidate
            if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
                printf '%s\n' "$candidate"
                return
            fi
        fi
    done
    if [ -n "$found" ]; then
        fail "$found cannot make virtual environments (its ensurepip or venv module is missing)." \
            "On Debian: apt-get install python3.11-venv"
    fi
    fail "Python 3.11 was not found (tried: ${PYTHON:-python3.11, python3, /usr/bin/python3.11})." \
        "The pinned packages are built for 3.11. On Debian: apt-get install python3.11 python3.11-venv" \
        "Elsewhere, name it: make setup PYTHON=/path/to/python3.11"
}

case $build in
    cpu | cuda) ;;
    *) fail "the build of torch must be cpu or cuda, got '$build'" ;;
esac
if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && ls -A "$venv" | grep -qvxE 'bin|include|lib|lib64'; then
    fail "$venv exists and is not a virtual environment. Move it away, or name another: make setup VENV=..."
fi
# Settings of the user that would send packages elsewhere than into VENV.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_EDITABLE PIP_REQUIREMENT
export PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-60}

if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    if ! flock --nonblock 9; then
        echo "another set-up of $venv is still running: waiting for it"
        flock 9
    fi
fi

python=$(find_python)
# What decides the content of the environment; its place too, because its scripts hold their path.
wanted=$(cd "$here" && { cat install.sh ./*.txt; echo "$build $venv $root"; "$python" --version; } | sha256sum | cut -d' ' -f1)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    steps=1
    rm -f "$venv"/.installed-*
    say "the packages are installed; installing this checkout again"
    install_checkout
else
    steps=6
    if [ -e "$venv" ]; then echo "$venv is unfinished, or made from other requirement files: making it anew"; fi
    rm -f "$venv"/.installed-*
    say "virtual environment $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv" || fail "$python could not make $venv"
    # Downloads of a run that is cut short lie here, and go with the environment.
    mkdir "$venv/tmp"
    TMPDIR=$(cd "$venv/tmp" && pwd)
    export TMPDIR
    say "torch, $build build"
    run_pip --only-binary :all: -r "$here/torch-$build.txt"
    compile_packages 1 & # torch is a third of it, and the other core is idle while pip reads
    say "everything else"
    run_pip --only-binary :all: --no-deps -r "$here/base-$build.txt" -r "$here/dev.txt"
    say "this checkout"
    install_checkout
    say "compiling, so that the first run is as fast as the second"
    wait
    compile_packages 0
    say "checking that torch, FBGEMM and torchrec load together"
    "$venv/bin/python" -W ignore -c 'import torch, fbgemm_gpu, torchrec' >>"$log" 2>&1 ||
        fail "they do not; the last lines were:" "$(tail -n 5 "$log")"
fi

rm -rf "$venv/tmp"
printf '%s\n' "$wanted" >"$stamp.tmp"
mv "$stamp.tmp" "$stamp"
printf '%s is ready (%d s). Next: make demo\n' "$venv" "$SECONDS"
