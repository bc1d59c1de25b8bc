# Sourced: makes .venv with the packages of a requirements file, once, and puts it first on PATH.
#   source scripts/environment.sh requirements.txt
install_environment() {
    local requirements=$1 stamp
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 10) else None'
        echo "making .venv"
        "${PYTHON:-python3}" -m venv .venv || { echo "venv is missing: install it (Debian: apt install python3-venv)" >&2; exit 1; }
    fi
    stamp=.venv/$requirements.installed
    if ! cmp -s <(cat requirements*.txt) "$stamp"; then
        echo "installing $requirements into .venv (PyTorch is large; once)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
        cat requirements*.txt > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
install_environment "$1"
