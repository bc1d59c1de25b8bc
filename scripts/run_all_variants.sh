#!/usr/bin/env bash
# Trains and scores all methods of scripts/methods.json, and draws the comparison.
# Goes on past a failed run and names it at the end; finished runs take a moment.
# Arguments go to every method. The runs of a slot (one of JOBS) share a process
# and its base (util/series); after a failed run, the others get a new process.
#   METHODS                   the methods, by default all: "base step" runs only
#                             these; "step+drop_dec base+dropout_prob=0.05" the
#                             script of the first with the flags of the second
#                             method, or with this flag
#   SEEDS=0                   the seeds of each, as in "0 1 2"
#   JOBS=1                    runs at once, which share the GPUs and need no
#                             communication among them (1: each on all GPUs;
#                             auto: one a GPU, and more where the base is small;
#                             on several nodes: 1)
#   PLOTS=OUTPUT_ROOT/plots   where the table and the figures go
# Example:
#   SEEDS="0 1 2" METHODS="base step" JOBS=4 bash scripts/run_all_variants.sh
source "$(dirname "$0")/common.sh"
JOBS=${JOBS:-1}
SEEDS=${SEEDS:-0}
PLOTS=${PLOTS:-$OUTPUT_ROOT/plots}
KNOWN=$(python -c 'import json; print(*json.load(open("scripts/methods.json")))')
METHODS=${METHODS:-$KNOWN}

check_jobs
[[ " $SEEDS" =~ ^([[:space:]]+(0|[1-9][0-9]*))+[[:space:]]*$ ]] ||
    fail "SEEDS=\"$SEEDS\": give whole numbers from 0, as in SEEDS=\"0 1 2\""

# script_of METHOD: of a+b, that of a
script_of() {
    local script="scripts/finetuning_sqa_7b_${1%%+*}.sh"
    echo "${script/_base/}"
}
for method in $METHODS; do
    [ -f "$(script_of "$method")" ] ||
        fail "METHODS=\"$METHODS\": there is no $(script_of "$method"): give names as in METHODS=\"$KNOWN\""
done

# wrong flags are wrong for all methods: said once
[ $# -eq 0 ] || python - "$@" << 'END'
import sys
from lavin.runtime.errors import one_line_errors
from train import get_args_parser
sys.argv[0] = "train.py"
with one_line_errors():
    get_args_parser().parse_args()
END

# added_flags METHOD: the flags after the first +, of methods or as they stand
added_flags() {
    python -c 'import json, sys
methods = json.load(open("scripts/methods.json"))
for part in sys.argv[1].split("+")[1:]:
    if part not in methods and part.count("=") != 1:
        sys.exit(f"run_all_variants.sh: METHODS={sys.argv[1]}: {part!r} is neither a method nor a flag=value")
    flags = methods[part]["flags"] if part in methods else dict([part.split("=")])
    print(*(f"--{flag} {value}" for flag, value in flags.items()))' "$1"
}
for method in $METHODS; do [[ $method != *+* ]] || added_flags "$method" > /dev/null; done

folder_of() { echo "$OUTPUT_ROOT/LaVIN-$MODEL-$1-seed$2"; }

# name_of METHOD SEED: base+drop_inc is drop_inc, and one run; where an earlier version has made it, it keeps its name
name_of() {
    local name=${1#base+}
    if [[ " $KNOWN " != *" $name "* ]] || [ -d "$(folder_of "$1" "$2")" ]; then name=$1; fi
    echo "$name"
}

runs=() # "METHOD SEED", each once
for seed in $SEEDS; do
    for method in $METHODS; do
        name=$(name_of "$method" "$seed")
        [[ " ${runs[*]/%/,} " == *" $name $seed, "* ]] || runs+=("$name $seed")
    done
done

# its files: stopped, as soon as any run was stopped; failed, the folders of those that failed; SLOT-NUMBER: the commands
# of a run that is not done. All nodes of a job see the project's folder.
if [ "$NODES" -gt 1 ]; then state=$(mktemp -d "$PWD/.runs.XXXXXX"); else state=$(mktemp -d); fi
trap 'rm -r "$state"' EXIT
touch "$state/failed"

# list_runs SLOT FLAG...: writes the commands of every JOBS-th run, from number SLOT on.
list_runs() {
    local i method seed added folder commands
    for ((i = $1; i < ${#runs[@]}; i += JOBS)); do
        read -r method seed <<< "${runs[i]}"
        folder=$(folder_of "$method" "$seed")
        added=()
        if [[ $method == *+* ]]; then read -r -d "" -a added <<< "$(added_flags "$method")" || true; fi
        commands=$(printf '%s/%s-%04d' "$state" "$1" "$i")
        echo "# $method, seed $seed" > "$commands"
        LISTED=$commands bash "$(script_of "$method")" "${added[@]}" --seed "$seed" --output_dir "$folder" "${@:2}" ||
            give_up "$commands"
    done
}

# give_up FILE: the run of this file has failed
give_up() {
    local method seed
    read -r method seed <<< "${runs[10#${1##*-}]}"
    folder_of "$method" "$seed" >> "$state/failed"
    rm "$1"
}

# work SLOT FLAG...: a process makes the slot's runs; where it ends before, the first one that is left has failed.
work() {
    local left status
    forward_signals
    take_share "$1"
    export TQDM_POSITION=$1 # each slot's progress bar has a line of its own
    list_runs "$@"
    while left=("$state/$1"-*) && [ -e "${left[0]}" ] && [ ! -e "$state/stopped" ]; do
        status=0
        launch -m util.series "${left[@]}" || status=$?
        if [ -n "$stopped" ] || [ "$status" -eq "$UNFINISHED" ]; then
            touch "$state/stopped"
            return
        fi
        left=("$state/$1"-*)
        [ ! -e "${left[0]}" ] || give_up "${left[0]}"
    done
}

in_parallel "$@" || true # $state says what failed
if [ -n "$stopped" ] || [ -e "$state/stopped" ]; then
    echo "stopped: the same command goes on" >&2
    exit "$UNFINISHED"
fi

untuned=() # the base's scores without adapters, where eval.py --output_dir has put them there
[ ! -f "$OUTPUT_ROOT/untuned/scores.json" ] || untuned=("$OUTPUT_ROOT/untuned")
done_runs=()
for name in "${runs[@]}"; do
    read -r method seed <<< "$name"
    folder=$(folder_of "$method" "$seed")
    grep -qxF "$folder" "$state/failed" || done_runs+=("$folder")
done
[ ${#done_runs[@]} -eq 0 ] || run python plot_results.py "${done_runs[@]}" "${untuned[@]}" --out "$PLOTS" ||
    echo plot_results.py >> "$state/failed"
if [ -s "$state/failed" ]; then
    echo "failed: $(paste -sd " " "$state/failed")" >&2
    exit 1
fi
