"""tools/lmms_eval_plugin: lmms-eval scores a run as eval.py does, question by question.

The tests run lmms-eval itself, and are skipped where it is not installed (requirements/lmms-eval.txt).
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as eval_command
from lavin.model import pack
from lavin.tokenizer import Example
from tiny import ROOT
from tiny_runs import train_run
from tools.lmms_eval_plugin import scienceqa as scienceqa_task
from user_errors import error_message
from util.data.datasets import load_scienceqa
from util.data.prompts import fit_prompt, instruction_prompt
from util.evaluation.answering import MAX_ANSWER_TOKENS
from util.evaluation.answers import read_answers
from util.runs import GENERATIONS

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
Instance = pytest.importorskip("lmms_eval.api.instance").Instance
plugin = importlib.import_module("tools.lmms_eval_plugin.model")
LaVINModel = plugin.LaVINModel

PLUGIN = ROOT / "tools" / "lmms_eval_plugin"
OF_LMMS_EVAL = Path(sys.modules["lmms_eval"].__path__[0]) / "tasks" / "scienceqa" / "scienceqa.yaml"
TASKS = {"generated": PLUGIN / "scienceqa_lavin.yaml", "scored": PLUGIN / "scienceqa_lavin_score.yaml",
         "theirs": OF_LMMS_EVAL}
# a torchvision that is made for another torch would stop lmms-eval, as it would the tests (conftest.py)
START = "from lavin.timm_compat import import_timm; import_timm(); from lmms_eval.cli.dispatch import main; main()"


def write_parquet(root: Path, path: Path) -> None:
    """The test split in the form of the hub's copy, derek-thomas/ScienceQA."""
    data = load_scienceqa(str(root), "test")
    texts = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    schema = datasets.Features({
        "image": datasets.Image(), "question": datasets.Value("string"), "choices": datasets.List(
            datasets.Value("string")), "answer": datasets.Value("int8"),
        **{name: datasets.Value("string") for name in texts[1:]}}).arrow_schema
    rows = [{"image": {"bytes": data.picture_path(qid).read_bytes(), "path": problem["image"]} if problem["image"]
             else None, "choices": problem["choices"], "answer": problem["answer"],
             **{name: problem.get(name, "") for name in texts}} for qid, problem in data.problems.items()]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)


def write_tasks(folder: Path, parquet: Path) -> None:
    """Each task as it is, but with the questions of a local file."""
    folder.mkdir()
    for name, path in TASKS.items():
        task = {"include": str(path), "task": name, "dataset_path": "parquet", "dataset_name": None,
                "dataset_kwargs": {"data_files": {"test": str(parquet)}}}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def register(folder: Path) -> Path:
    """A folder for PYTHONPATH with what `pip install -e .` writes there: the entry points of pyproject.toml."""
    [section] = re.findall(r'^\[project\.entry-points\."(lmms_eval\.models)"\]\nlavin = "(.+)"$',
                           (ROOT / "pyproject.toml").read_text(), re.M)
    (folder / "lavin-0.dist-info").mkdir(parents=True)
    (folder / "lavin-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: lavin\nVersion: 0\n")
    (folder / "lavin-0.dist-info" / "entry_points.txt").write_text("[{}]\nlavin = {}\n".format(*section))
    return folder


def run_lmms_eval(tmp_path: Path, run: Path, base, scienceqa: Path, *flags: str) -> dict[str, list[dict]]:
    """The logged samples of each task, in the order of the questions."""
    write_parquet(scienceqa, tmp_path / "test.parquet")
    write_tasks(tmp_path / "tasks", tmp_path / "test.parquet")
    model_args = f"adapter_path={run},device=cpu," + ",".join(
        f"{name.removeprefix('--')}={value}" for name, value in zip(base.flags[::2], base.flags[1::2], strict=True))
    path = os.pathsep.join([str(ROOT), str(register(tmp_path / "site")), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", START, "--model", "lavin", "--model_args", model_args, "--tasks", ",".join(TASKS),
         "--include_path", str(tmp_path / "tasks"), "--batch_size", "4", "--log_samples", "--output_path",
         str(tmp_path / "out"), "--verbosity", "DEBUG", *flags],
        cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1",
                                                       "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    samples = {}
    for name in TASKS:
        [file] = (tmp_path / "out").rglob(f"*samples_{name}.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[name] = sorted(lines, key=lambda line: line["doc_id"])
    return samples


@pytest.fixture(scope="module")
def run(base, scienceqa, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_run(base, scienceqa, folder, "--adapter_dim", "4")
    return folder


def answers_of_eval(run, base, scienceqa, out: Path, decode: str):
    args = ["--adapter_path", str(run), "--data_root", str(scienceqa), "--device", "cpu", "--output_dir", str(out),
            "--decode", decode, *base.flags]
    eval_command.main(eval_command.get_args_parser().parse_args(args))
    return read_answers(out / GENERATIONS)


def test_scores_are_those_of_eval(run, base, scienceqa, tmp_path):
    samples = run_lmms_eval(tmp_path, run, base, scienceqa)
    generated = answers_of_eval(run, base, scienceqa, tmp_path / "generate", "generate")
    assert [sample["filtered_resps"] for sample in samples["generated"]] == [answer.text for answer in generated]
    assert [sample["exact_match"] for sample in samples["generated"]] == [
        float(answer.parsed and answer.correct) for answer in generated]
    scored = answers_of_eval(run, base, scienceqa, tmp_path / "score", "score")
    assert [sample["acc"] for sample in samples["scored"]] == [float(answer.correct) for answer in scored]
    losses = [[float(loss) for loss, _ in sample["filtered_resps"]] for sample in samples["scored"]]
    assert [row.index(min(row)) for row in losses] == [answer.prediction for answer in scored]
    theirs = samples["theirs"]
    assert len(theirs) == len(generated) and all(sample["input"].endswith("directly.") for sample in theirs)


# --- The model, asked as lmms-eval asks ---

def load(run, base, **flags) -> LaVINModel:
    named = dict(zip((name.removeprefix("--") for name in base.flags[::2]), base.flags[1::2], strict=True))
    return LaVINModel(**{"adapter_path": str(run), "device": "cpu", "batch_size": 2, **named, **flags})


@pytest.fixture(scope="module")
def model(run, base) -> LaVINModel:
    return load(run, base)


def request(kind: str, *arguments, number: int = 0):
    return Instance(kind, (*arguments, number, "ponds", "test"), 0, {"task": "ponds", "doc_id": number, "repeats": 1})


def ask(model, contexts: list[str], visuals=(), **options) -> list[str]:
    """The texts for some contexts, whose documents have the same pictures."""
    model.task_dict = {"ponds": {"test": [{}] * len(contexts)}}
    return model.generate_until([request("generate_until", context, options, lambda doc: list(visuals), number=i)
                                 for i, context in enumerate(contexts)])


def test_other_contexts_are_instructions_and_a_named_option_becomes_its_letter(model, monkeypatch):
    asked = []

    def answer(_model, _tokenizer, examples, *_):
        asked.extend(examples)
        return ["The answer is B. BECAUSE: it is.", "It is\n\nThe answer is C."][:len(examples)]

    monkeypatch.setattr(plugin, "generate", answer)
    contexts = ["Which pond?\nA. one\nB. two", "Question: Which pond?\nOptions: (A) one (B) two\nResponse:"]
    assert ask(model, contexts) == ["B", "It is\n\nThe answer is C."]
    assert ask(model, contexts[::-1], until=["\n\n"]) == ["The answer is B. BECAUSE: it is.", "It is"]
    instruction, whole = asked[:2]
    assert instruction.ids == model.tokenizer.example(instruction_prompt(contexts[0])).ids
    assert whole.ids == model.tokenizer.example(contexts[1]).ids


def test_questions_keep_their_order_whatever_their_batches_and_options(model, run, base):
    contexts = [f"Question: Which pond is number {i}?\nResponse:" for i in range(5)]
    assert ask(model, contexts, max_new_tokens=4) == [ask(model, [context], max_new_tokens=4)[0]
                                                      for context in contexts]
    picture = Image.new("RGB", (9, 7), "red")
    assert ask(model, contexts, [picture], max_new_tokens=4) != ask(model, contexts, max_new_tokens=4)


def test_a_question_that_is_asked_again_draws_anew(model):
    model.task_dict = {"ponds": {"test": [{}]}}
    asked = [request("generate_until", "Which pond?", {"temperature": 1.0, "max_new_tokens": 8}, lambda doc: [])] * 2
    texts = model.generate_until(asked)
    assert texts[0] != texts[1] and model.generate_until(asked) == texts


def test_a_long_context_is_cut_as_eval_cuts_it(run, base):
    short = load(run, base, max_seq_len=60)
    short.task_dict = {"ponds": {"test": [{}]}}
    context = "Question: " + "pond " * 99 + "\nResponse:"
    question = short.question(context, lambda doc: [], 0, "ponds", "test")
    assert question.prompt == fit_prompt(short.tokenizer, context, None, 6, 60) != context


def test_likelihoods_are_losses_of_what_follows_the_prompt(model):
    model.task_dict = {"ponds": {"test": [{"answer": " north"}]}}
    requests = [request("loglikelihood", "Which pond?\nResponse:", text, lambda doc: [])
                for text in (" north", "north", "south", lambda doc: doc["answer"])]
    losses = [result.text[0] for result in model.loglikelihood(requests)]
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[3]) != pytest.approx(losses[2])
    whole = model.tokenizer.example("Which pond?\nResponse:", "north")
    example = Example(whole.ids[:-1], whole.answer_start)  # without EOS
    with torch.no_grad():
        expected = model.model(pack([example])).item() / (len(example.ids) - example.answer_start)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options, expected", [
    ({}, (0, 1)), ({"temperature": 0, "do_sample": False}, (0, 1)), ({"temperature": 0.7, "top_p": 0.9}, (0.7, 0.9)),
    ({"temperature": 0.7, "do_sample": False, "top_p": None}, (0, 1)),
    ({"temperature": 0.5, "do_sample": True}, (0.5, 1)),
])
def test_sampling(options, expected):
    assert plugin.sampling_of(options) == expected


def test_what_the_model_cannot_do_is_refused_in_one_line(model, run, base):
    red = Image.new("RGB", (9, 7), "red")
    message = error_message(ask, model, ["Which pond?"], [red, red])
    assert message == "question ponds 0 has 2 inputs of type Image, and LaVIN sees one picture: choose other tasks"
    assert "has 1 input of type str" in error_message(ask, model, ["Which pond?"], ["film.mp4"])
    assert "in several rounds" in error_message(model.generate_until_multi_round, [])
    assert "--model_parallel_size is for eval.py" in error_message(load, run, base, model_parallel_size=2)
    assert "--batch_size auto is no number" in error_message(load, run, base, batch_size="auto")
    assert "unrecognized arguments: --lerning_rate 1" in error_message(load, run, base, lerning_rate=1)


def test_the_task_reads_answers_as_eval_does():
    doc = {"choices": ["one", "two"], "answer": 1}
    assert scienceqa_task.options(doc) == ["The answer is A", "The answer is B"]
    assert scienceqa_task.target(doc) == "The answer is B."
    for text, right in (("The answer is B. BECAUSE: x", 1), ("The answer is A.", 0), ("The answer is E.", 0), ("B", 0)):
        assert scienceqa_task.is_right(doc, [text]) == {"exact_match": right}


def test_texts_are_as_long_as_those_of_eval():
    [tokens] = re.findall(r"max_new_tokens: (\d+)", TASKS["generated"].read_text())
    assert int(tokens) == MAX_ANSWER_TOKENS
