# Sourced by the other scripts here: makes .venv in the repository and installs keyreid into it, with the versions of
# constraints.txt, and again whenever they change. Usage: make_environment EXTRA[,EXTRA...]; afterwards
# $python and the PATH are set.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$repository/.venv/bin/python

make_environment() {
    local extras=$1 wanted stamp=$repository/.venv/.installed
    wanted="$(cd "$repository" && cat pyproject.toml setup.py constraints.txt | sha256sum | cut -d' ' -f1) $extras"
    if [ ! -x "$python" ]; then
        local base
        base=$(find_python) || return 1
        echo "making $repository/.venv"
        "$base" -m venv "$repository/.venv"
    fi
    if [ ! -f "$stamp" ] || ! grep -qxF "$wanted" "$stamp"; then
        echo "installing keyreid[$extras] (some 7 GB, a few minutes the first time)"
        "$python" -m pip install --quiet --disable-pip-version-check --constraint "$repository/constraints.txt" \
            --editable "$repository[$extras]"
        echo "$wanted" >>"$stamp"
    fi
    export PATH=$repository/.venv/bin:$PATH
}

find_python() {
    local candidate
    for candidate in python3.11 python3.12 python3.13 python3; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 to 3.13 with venv found; on Debian: apt-get install python3 python3-venv" >&2
    return 1
}
