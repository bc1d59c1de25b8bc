# Makes .venv with the packages of a requirements file (requirements.txt, unless
# another is named), once. Scripts source it, which also puts .venv first on PATH.
#   PYTHON=python3            the Python that .venv is made with, 3.10 or newer
#   TORCH_CONSTRAINTS         the PyTorch to install: a file of
#                             requirements/constraints (each says what for), or
#                             nothing (TORCH_CONSTRAINTS=) for the newest of all.
#                             Where it is not set, the newest that this machine's
#                             GPUs and driver can run; a login node cannot tell
# Examples:
#   bash scripts/environment.sh requirements.txt
#   TORCH_CONSTRAINTS=requirements/constraints/v100.txt \
#       bash scripts/environment.sh requirements/demo.txt
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY=passive # else threads spin while they wait: two trainings on two cores take 2.6 times as long
has_pip() { .venv/bin/python -c 'import pip._internal.cli.main' 2> /dev/null; }

give_up() {
    echo "$1" >&2
    exit 1
}

# list_gpus: a line "7.0, 535.54.03" (compute capability, driver) for each, oldest first; none where nvidia-smi fails
list_gpus() {
    local gpus ask=(timeout 30 nvidia-smi "--format=csv,noheader")
    # old drivers do not tell the capability; the file for them serves all GPUs from 5.0 on
    gpus=$("${ask[@]}" --query-gpu=compute_cap,driver_version 2> /dev/null) ||
        gpus=$("${ask[@]}" --query-gpu=driver_version 2> /dev/null | sed 's/^/5.0, /') || return 0
    grep -E '^[0-9]+\.[0-9]+, [0-9]+\.' <<< "$gpus" | sort -V || true
}

# constraints_for CAPABILITY DRIVER: 70 535 for a V100 with driver 535
constraints_for() {
    if (($2 < 525)); then
        echo requirements/constraints/cuda11.txt
    elif (($1 < 75)); then
        echo requirements/constraints/v100.txt
    elif (($2 < 580)); then
        echo requirements/constraints/cuda12.txt
    fi
}

refuse_constraints() {
    local folder=requirements/constraints
    local moved=$folder/${constraints#requirements-} # where earlier versions had requirements-v100.txt
    [ ! -f "$moved" ] || give_up "TORCH_CONSTRAINTS=$constraints is no file: it is now $moved"
    give_up "TORCH_CONSTRAINTS=$constraints is no file: take $folder/v100.txt, or cuda12.txt or cuda11.txt of that folder"
}

# sets $constraints, a file of pip constraints or none, and $why
choose_torch() {
    local gpus major minor driver
    constraints=${TORCH_CONSTRAINTS-} why="named by TORCH_CONSTRAINTS"
    if [ -n "${TORCH_CONSTRAINTS+given}" ]; then
        [ -z "$constraints" ] || [ -f "$constraints" ] || refuse_constraints
        return
    fi
    gpus=$(list_gpus)
    [ -n "$gpus" ] || return 0
    IFS='., ' read -r major minor driver _ <<< "$gpus"
    why="GPU of compute capability $major.$minor, driver $driver"
    if ((major < 5 || driver < 450)); then
        give_up "$why: PyTorch needs 5.0 and driver 450 or newer; for runs on the CPU, set TORCH_CONSTRAINTS= (empty)"
    fi
    constraints=$(constraints_for "$major$minor" "$driver")
}

install_environment() {
    local requirements=$1 stamp wanted constraints why
    choose_torch
    # not there, left by a Python that is gone, or without pyvenv.cfg: then pip would install into the system
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2> /dev/null; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit("Python 3.10 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 10) else None'
        echo "making .venv"
        "${PYTHON:-python3}" -m venv --clear .venv ||
            give_up "venv is missing: install it (Debian: apt install python3-venv)"
    elif ! has_pip; then
        echo "finishing .venv, which was interrupted"
        .venv/bin/python -m ensurepip &> /dev/null || true
        has_pip || give_up ".venv is half made: remove it (rm -r .venv), and start again"
    fi
    stamp=.venv/${requirements//\//-}.installed # of requirements/demo.txt: .venv/requirements-demo.txt.installed
    wanted=$(cat requirements.txt requirements/*.txt ${constraints:+"$constraints"})
    # The stamp ends with the constraints: those of a login node are corrected on a node with older GPUs. Without any,
    # all of them will do, since pip does not replace what it finds.
    if [[ ! -f $stamp || $(< "$stamp") != "$wanted"* ]]; then
        [ -z "$constraints" ] || echo "$why: PyTorch by $constraints"
        echo "installing $requirements into .venv (PyTorch is large; once)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements" \
            ${constraints:+-c "$constraints"} || {
            echo "pip could not install $requirements (above: why): the same command goes on once that is solved" >&2
            [ -z "$constraints" ] ||
                echo "no network here? Start it where there is one, with TORCH_CONSTRAINTS=$constraints" >&2
            exit 1
        }
        echo "$wanted" > "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
install_environment "${1:-requirements.txt}"
