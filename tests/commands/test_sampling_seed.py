"""--seed of eval.py and eval_mme.py, and the chat's seed, decide what is drawn at a temperature, and nothing else."""

import json

import pytest
import torch

import eval as evaluation
import eval_mme
from tiny import IMAGE_SIZE, problem
from tiny_runs import write_run
from util.chat.chatbot import Chatbot, Question, Settings, find_runs
from util.evaluation import mme as mme_evaluation
from util.trained_model import load_model

QUESTIONS = 6


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled") / "run"
    write_run(folder, base, seed=1)
    return folder


@pytest.fixture(scope="module")
def equal_questions(tmp_path_factory):
    """ScienceQA whose six test questions are the same but for their ids."""
    root = tmp_path_factory.mktemp("equal")
    qids = [str(i) for i in range(QUESTIONS)]
    (root / "problems.json").write_text(json.dumps({qid: problem(split="test") for qid in qids}))
    (root / "pid_splits.json").write_text(json.dumps({"test": qids}))
    return root


ONE_TOKEN = ("--generation_temperature", "3", "--top_p", "1e-9")  # which is the likeliest, as of a greedy answer


@pytest.fixture
def answer(run, equal_questions, tmp_path):
    """A function that evaluates with some flags into a new folder, and returns the texts by question."""
    def evaluate(*flags) -> dict[str, str]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        evaluation.main(evaluation.get_args_parser().parse_args([
            "--adapter_path", str(run), "--data_root", str(equal_questions), "--device", "cpu", "--output_dir",
            str(folder), *map(str, flags)]))
        lines = map(json.loads, (folder / "generations.jsonl").read_text().splitlines())
        return {line["qid"]: line["text"] for line in lines}
    return evaluate


def test_the_seed_decides_what_is_sampled(answer):
    sampled = [answer("--generation_temperature", "3", "--top_p", "1", "--seed", seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1]
    assert all(sampled[0][qid] != sampled[2][qid] for qid in sampled[0])


def test_a_nucleus_of_one_token_leaves_nothing_to_draw(answer):
    assert answer(*ONE_TOKEN) == answer()


def test_each_question_draws_by_itself(answer):
    """Equal questions get answers of their own, and each its answer in whatever batch it is asked."""
    flags = ("--generation_temperature", "3", "--top_p", "1")
    texts = answer(*flags, "--max_batch_size", QUESTIONS)
    assert len(set(texts.values())) == QUESTIONS
    assert answer(*flags, "--max_batch_size", 1) == texts
    assert answer(*flags, "--questions", 3).items() <= texts.items()


def test_greedy_answers_do_not_depend_on_the_seed(answer):
    greedy, other = answer("--seed", 0), answer("--seed", 1)
    assert greedy == other and len(set(greedy.values())) == 1


def test_scores_of_another_seed_are_not_taken_for_those_of_this_one(run, equal_questions, tmp_path, capsys):
    def evaluate(*flags) -> str:
        evaluation.main(evaluation.get_args_parser().parse_args([
            "--adapter_path", str(run), "--data_root", str(equal_questions), "--device", "cpu", "--output_dir",
            str(tmp_path / "scores"), *flags]))
        return capsys.readouterr().out
    sampling = ("--generation_temperature", "3")
    evaluate(*sampling, "--seed", "0")
    assert "scored before" in evaluate(*sampling, "--seed", "0")
    assert "scored before" not in evaluate(*sampling, "--seed", "1")
    assert "scored before" not in evaluate("--generation_temperature", "2", "--seed", "1")
    assert "scored before" not in evaluate("--seed", "1")
    assert "scored before" in evaluate("--seed", "2")  # greedy: the seed changes nothing


@pytest.fixture(scope="module")
def mme(tmp_path_factory):
    """Two pictures of one colour with the same two questions."""
    from PIL import Image
    folder = tmp_path_factory.mktemp("mme") / "existence"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (200, 30, 30)).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text("Is there a pond?\tYes\nIs there a pond?\tNo\n")
    return folder.parent


def test_mme_draws_for_each_question_and_seed_by_itself(run, mme, tmp_path, monkeypatch):
    """No question gets with one seed what another question gets with another seed."""
    monkeypatch.setattr(mme_evaluation, "is_decided", lambda text: False)  # longer texts, which tell draws apart
    texts = []
    for name, seed, batch_size in (("0", 0, 64), ("again", 0, 2), ("1", 1, 64), ("2", 2, 64)):
        eval_mme.main(eval_mme.get_args_parser().parse_args([
            "--adapter_path", str(run), "--mme_root", str(mme), "--device", "cpu", "--generation_temperature", "3",
            "--top_p", "1", "--seed", str(seed), "--max_batch_size", str(batch_size), "--output_dir",
            str(tmp_path / name)]))
        lines = map(json.loads, (tmp_path / name / "mme_answers.jsonl").read_text().splitlines())
        texts.append([line["text"] for line in lines])
    assert texts[0] == texts[1]
    drawn = [text for of_seed in (texts[0], *texts[2:]) for text in of_seed]
    assert len(set(drawn)) == len(drawn) == 12


def test_a_nucleus_of_one_token_leaves_nothing_to_draw_in_mme(run, mme, tmp_path):
    for name, flags in (("sampled", ONE_TOKEN), ("greedy", ())):
        eval_mme.main(eval_mme.get_args_parser().parse_args([
            "--adapter_path", str(run), "--mme_root", str(mme), "--device", "cpu", "--output_dir",
            str(tmp_path / name), *flags]))
    sampled, greedy = ((tmp_path / name / "mme_answers.jsonl").read_text() for name in ("sampled", "greedy"))
    assert sampled == greedy


def test_the_seed_of_a_chat_decides_its_answer(run):
    args = evaluation.get_args_parser().parse_args(["--adapter_path", str(run), "--device", "cpu"])
    bot = Chatbot(*load_model(args)[:2], find_runs(str(run))[0], max_seq_len=200)

    def text(seed: int, temperature: float) -> str:
        settings = Settings(max_new_tokens=12, temperature=temperature, top_p=1.0, seed=seed)
        *_, answer = bot.answer("run", [], Question("Which pond is deeper?"), settings)
        return answer.text
    torch.manual_seed(5)
    first = text(1, 3.0)
    assert first == text(1, 3.0) != text(2, 3.0)
    assert text(1, 0.0) == text(2, 0.0)
