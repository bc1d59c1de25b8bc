"""The command search.py checks a study's flags, works on its trials, and runs the best ones again with fresh seeds."""

import math
import os
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

from lavin.runtime.console import counted, print_rank0
from lavin.runtime.errors import UserError
from lavin.runtime.flags import CHANGES_RESULTS, Flags, Role, command_line, flags_of
from lavin.weights.base import require_base
from util.data.batches import steps_per_epoch
from util.data.datasets import DISJOINT_SPLITS, load_scienceqa
from util.evaluation.answering import answers_first
from util.flags import Execution
from util.search import confirm
from util.search.folder import LOG, RUNGS, STATES, add_rung, all_records, gpu_seconds, longest_unended
from util.search.identity import study_identity
from util.search.locks import WAIT_SECONDS
from util.search.machine import is_cpu, resolve_precision
from util.search.processes import starting
from util.search.progress import cost_lines, progress_line, unit_of_hours
from util.search.runner import HoursSpent, Runner
from util.search.settings import Search
from util.search.space import Space, Values, flag_of, read_space
from util.training.recipe import TRAIN_FLAGS
from util.training.settings import EFFECTIVE_BATCH, Optimization, TrainingData, TrainSettings
from util.training.settings import get_args_parser as train_parser

MAX_FAILURES = 3  # if so many of a study's first trials fail, something is wrong with all of them


# --- What is searched ---

def check_trial(words: list[str], gpus: int, values: Values) -> TrainSettings:
    """Returns the settings of a trial with these values. `words` are the flags of all trials.

    Raises UserError if train.py refuses the flags, or if a search cannot score such a trial.
    """
    settings = TrainSettings.of(train_parser().parse_args([*words, *command_line(values)]), gpus)
    prompt_format = settings.data.prompt_format
    if not answers_first(prompt_format):
        raise UserError("a search scores its trials by the likeliest answer, but with --prompt_format "
                        f"{prompt_format} the solution comes first: name one whose answer does, such as QCM-ALE")
    return settings


def refuse_flags_of_one_run(trained: Flags) -> None:
    """Raises UserError if the command gives a flag that the search sets for each run, such as --output_dir."""
    of_run = [name for name, declared in TRAIN_FLAGS.items() if declared.role is Role.RUN]
    refused = [name for name in (*of_run, "do_pretrain") if name in trained.given]
    if refused:
        raise UserError(f"--{refused[0]} does not go with a search, which names the folders of its runs of ScienceQA: "
                        "leave it out")


def fixed_values(trained: Flags) -> Values:
    """Returns the flags that the command gives, which are therefore not searched. If --lr is given, --blr has no effect
    and is among them."""
    names = trained.given | {name for name, declared in TRAIN_FLAGS.items() if declared.stated_as in trained.given}
    return {name: getattr(trained, name) for name in names}


def print_fixed_flags(whole: Space, space: Space) -> None:
    """Prints which flags of the whole space are not in `space`, since the command gives them."""
    fixed = sorted({flag_of(name, whole.parameters[name]) for name in whole.parameters.keys() - space.parameters})
    if fixed:
        print_rank0(f"not searched, since the command gives them: {', '.join(f'--{flag}' for flag in fixed)}")


def describe_study(search: Search, space: Space, trained: Flags) -> dict:
    """Returns the content of study.json: the settings that all workers share. Its precision is the one that --precision
    means on this machine."""
    of_batch, files = Optimization.of(trained).entries(search.gpus), TrainingData.of(trained)
    data = {split: load_scienceqa(files.data_root, split, files.captions) for split in DISJOINT_SPLITS}
    searched = data["val"].sample(search.questions).problems
    if search.confirm and not confirm.fresh_questions(data["val"].clusters, searched):
        print_rank0(f"warning: the trials' {counted(len(searched), 'question')} are from all lectures of val, so no "
                    "other question is left on which a winner could be named: give fewer with --questions")
    flags = {name: value for name, value in vars(trained).items()
             if TRAIN_FLAGS[name].role in CHANGES_RESULTS and TRAIN_FLAGS[name].stated_as != EFFECTIVE_BATCH}
    return {**{name: getattr(search, name) for name in ("trials", "pruner", "questions", "confirm", "seeds")},
            "precision": resolve_precision(trained.precision, trained.device, trained.bits, search.gpus),
            "identity": study_identity(check_trial(search.train or [], search.gpus, space.first_sets()[0]), data,
                                       search.questions),
            "steps_per_epoch": steps_per_epoch(len(data["train"].problems), of_batch[EFFECTIVE_BATCH]),
            "space": {"parameters": space.parameters, "enqueue": space.enqueue},
            "flags": {**flags, **of_batch}}


def machine_flags(trained: Flags) -> list[str]:
    """Returns those of the given flags that eval.py does not take from the run, as words of a command line."""
    return command_line({name: getattr(trained, name) for name in flags_of(Execution) if name in trained.given})


def check_precision(study: Path, precision: str, trained: Flags, here: str) -> None:
    """Raises UserError if this worker cannot join a study in this precision. `here` is the precision in which the same
    command would begin a study on this machine."""
    if trained.precision not in ("auto", precision):
        raise UserError(f"{study} is a study in {precision}: leave --precision {trained.precision} out, or name "
                        "another folder with --study")
    try:
        if precision != here:
            resolve_precision(precision, trained.device, trained.bits)
    except UserError as error:
        raise UserError(f"{study} is a study in {precision}, which this machine cannot do: start this worker on "
                        "another one, or name another folder with --study") from error


# --- A worker ---

def work(study, runner: Runner, questions: int, check_values) -> None:
    """Works on trials until all have ended, including those of other workers. Raises UserError if all of them fail."""
    from util.search.study import FAIL, run_trial

    def reach(trial, epochs: int) -> float:
        check_values(trial.values)
        more = ("--stop_after_epoch", str(epochs)) if epochs < study.rungs[-1] else ()
        runner.train(trial.folder, trial.values, epochs, trial.lock, *more)
        scores = runner.score(trial.folder, epochs, trial.folder / RUNGS / str(epochs), "trials", trial.lock,
                              "--questions", str(questions))
        return add_rung(trial.folder, epochs, scores)

    waits = False
    while not study.all_ended():
        if runner.seconds_left() <= 0:
            raise HoursSpent
        trial = study.take()
        if trial is None:
            if not waits:
                print_rank0("no trial is left to begin, so this worker waits for those of the others")
            waits = True
            time.sleep(WAIT_SECONDS)
            continue
        print_rank0(f"trial {trial.number:03d}{' goes on' * trial.resumed}: {' '.join(command_line(trial.values))}")
        state, message = run_trial(study, trial, reach)
        print_rank0(f"trial {trial.number:03d} {STATES[state.name]}{message and f': {message}'} | "
                    + progress_line(study.folder, study.n_trials, study.left_out))
        ended = [each.state for each in study.trials() if each.state.is_finished()]  # of all workers
        if set(ended) == {FAIL} and len(ended) >= min(MAX_FAILURES, study.n_trials):
            raise UserError(f"{counted(len(ended), 'trial')} failed and none succeeded; the last one: {message}")


def confirm_best(search: Search, runner: Runner, epochs: int, seed: int, left_out: Collection[str]) -> None:
    """Runs the best configurations and the base again with fresh seeds, and prints which one is the winner."""
    runs = confirm.plan(search.study, search.confirm, search.seeds, seed + 1, left_out)
    if not runs:
        print_rank0("all trials beside the base have failed: there is nothing to confirm")
        return
    print_rank0(f"{counted(len(runs), 'run')} with fresh seeds: trials "
                f"{', '.join(sorted({run.configuration for run in runs}))}")
    confirm.run_all(search.study, runs, partial(confirm.train_and_score, runner, epochs))
    print_rank0(confirm.sentence(confirm.finish(search.study, runner, runs, epochs)))


def seconds_left(search: Search) -> float:
    """Returns how many seconds the next command of this worker may take. All trials that run now share evenly what is
    left of --gpu_hours."""
    if search.gpu_hours is None:
        return math.inf
    records = all_records(search.study)
    n_running = sum(record["state"] == "RUNNING" for record in records)
    return (3600 * search.gpu_hours - gpu_seconds(records)) / search.gpus / max(1, n_running)


def hours_spent(study: Path, gpu_hours: float, on_cpu: bool) -> str:
    """Returns a clause that says that the hours of --gpu_hours are spent.

    If a single command that was killed seems to have taken more than all of them, the clause names its log: a worker
    stops a command earlier than that, so a clock was wrong.
    """
    folder, seconds = longest_unended(study)
    where = (f" ({seconds / 3600:,.0f} of them by a command in {folder} that was killed: if a clock was wrong, remove "
             f"{folder / LOG})") if seconds > 3600 * gpu_hours else ""
    return f"the {unit_of_hours(on_cpu)} of --gpu_hours {gpu_hours:g} are spent{where}"


def main(args: Flags) -> None:
    """Works on the study that the flags of search.py describe, until it has ended or its hours are spent."""
    try:
        from util.search.storage import storage_errors
        from util.search.study import Study
    except ModuleNotFoundError as error:
        raise UserError(f"{error}: pip install -r requirements/search.txt") from error
    search = Search.of(args)
    given = search.train or []
    trained = train_parser().parse_args(given)
    refuse_flags_of_one_run(trained)
    require_base(trained.llama_model_path, trained.llm_model, use_vicuna=trained.use_vicuna)
    whole = read_space(search.space)
    space = whole.fix(fixed_values(trained))
    check_values = partial(check_trial, given, search.gpus)
    space.check(check_values)
    settings = describe_study(search, space, trained)
    study = Study(search.study, space, settings, search.storage, search.gpus)
    for name, reason in study.left_out.items():
        print_rank0(f"trial {name} is not ranked with the others, since it has {reason}")
    check_precision(search.study, study.precision, trained, here=settings["precision"])
    if os.environ.get("LAVIN_WORKER", "0") == "0":  # the first worker of a node speaks for all (search_sqa_7b.sh)
        print_rank0("\n".join(cost_lines(search.study, settings, study.rungs, is_cpu(trained.device))))
        print_fixed_flags(whole, space)
    words = [*given, "--precision", study.precision]
    try:
        with starting(search.study, search.gpus) as start:
            runner = Runner(words, machine_flags(train_parser().parse_args(words)), search.gpus,
                            partial(seconds_left, search), start, settings["identity"])
            with storage_errors():
                work(study, runner, search.questions, check_values)
            if search.confirm:
                confirm_best(search, runner, trained.epochs, trained.seed, study.left_out)
    except HoursSpent:
        spent = hours_spent(search.study, search.gpu_hours or 0, is_cpu(trained.device))
        print_rank0(f"stopped: {spent}; the same command with more goes on")
    print_rank0(f"report: python plot_results.py {search.study}")
