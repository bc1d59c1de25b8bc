# Sourced: makes .venv with the packages of a requirements file, once, and puts it first on PATH.
#   source scripts/environment.sh requirements.txt
has_pip() { .venv/bin/python -c 'import pip._internal.cli.main' 2> /dev/null; }

install_environment() {
    local requirements=$1 stamp
    # not there, left by a Python that is gone, or without pyvenv.cfg: then pip would install into the system
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2> /dev/null; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 10) else None'
        echo "making .venv"
        "${PYTHON:-python3}" -m venv --clear .venv || {
            echo "venv is missing: install it (Debian: apt install python3-venv)" >&2
            exit 1
        }
    elif ! has_pip; then
        echo "finishing .venv, which was interrupted"
        .venv/bin/python -m ensurepip &> /dev/null || true
        has_pip || {
            echo ".venv is half made: remove it (rm -r .venv), and start again" >&2
            exit 1
        }
    fi
    stamp=.venv/$requirements.installed
    if ! cmp -s <(cat requirements*.txt) "$stamp"; then
        echo "installing $requirements into .venv (PyTorch is large; once)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" || {
            echo "pip could not install $requirements (above: why): the same command goes on once that is solved" >&2
            exit 1
        }
        cat requirements*.txt > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
install_environment "$1"
