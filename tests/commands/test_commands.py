"""train.py and eval.py as users run them: the files they write, and one-line errors for user mistakes."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import eval as evaluation
import reference
import train
from lavin.generation.generate import generate
from lavin.mm_adapter import AdapterConfig
from lavin.runtime.errors import UserError, one_line_errors
from lavin.runtime.packages import installed_versions
from lavin.weights.adapters import adapter_parameters
from lavin.weights.base import open_base
from tiny import ROOT, tiny_model
from tiny_weights import write_hugging_face
from user_errors import error_message
from util.data.datasets import cluster, load_scienceqa
from util.data.images import load_images
from util.data.prompts import answer_text, build_prompt
from util.data.settings import DataSettings
from util.evaluation import answering
from util.evaluation.answers import parse_answer, read_answers
from util.evaluation.scoring import COLUMNS, score
from util.evaluation.settings import Answering
from util.trained_model import load_model

PUBLISHED_TRAIN = """--llm_model 7B --llama_model_path ../data/weights/ --data_path ../data/alpaca_data.json
    --max_seq_len 512 --batch_size 4 --accum_iter 1 --epochs 20 --warmup_epochs 2 --blr 9e-3 --weight_decay 0.02
    --output_dir ./LaVIN-7B/ --adapter_type attn --adapter_dim 8 --adapter_scale 1 --n_prompt 6
    --prompt_format QCM-ALE --temperature 10. --visual_adapter_type router"""
PUBLISHED_EVAL = """--ckpt_dir ../data/weights/ --llm_model 7B --tokenizer_path ../data/weights/tokenizer.model
    --data_root ../data --caption_file ../data/captions.json --adapter_path ./LaVIN-7B/checkpoint-19.pth
    --adapter_type attn --adapter_dim 8 --adapter_scale 1 --prompt_format QCM-ALE --max_batch_size 64 --max_seq_len 512
    --split test --n_prompt 6 --temperature 10. --visual_adapter_type router"""


def run_train(base, data, folder, *flags) -> None:
    train.main(train.get_args_parser().parse_args([
        *base.flags, "--data_root", str(data), "--output_dir", str(folder), "--device", "cpu", "--batch_size", "4",
        "--epochs", "2", "--warmup_epochs", "1", "--max_seq_len", "200", *map(str, flags)]))


def run_eval(*flags) -> None:
    evaluation.main(evaluation.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)]))


def read_json(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(base, scienceqa, tmp_path_factory):
    """A run of two epochs, evaluated on the test split. Read-only."""
    folder = tmp_path_factory.mktemp("run")
    run_train(base, scienceqa, folder, "--lr", "1e-2", "--adapter_dim", "4", "--temperature", "5", "--adapter_scale",
              "0.5", "--adapter_type", "block", "--hidden_proj", "16", "--dropout_var", "1.5")
    run_eval("--adapter_path", folder)
    return folder


@pytest.fixture
def run_copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# --- Files of a run ---

def test_files_of_a_run(finished):
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock", "checkpoint-0.pth", "checkpoint-1.pth", "config.json", "generations.jsonl", "log.txt", "metrics.jsonl",
        "preds.json", "recipe.json", "scores.json"]  # no temporary files


def test_config_holds_every_flag_and_the_versions(finished):
    config = read_json(finished / "config.json")
    flags = vars(train.get_args_parser().parse_args([]))
    assert config["flags"].keys() == flags.keys()
    assert config["flags"]["adapter_dim"] == 4 and config["flags"]["lr"] == 1e-2 and config["flags"]["seed"] == 0
    assert config["world_size"] == 1
    versions = installed_versions()
    assert versions.keys() > {"timm", "transformers"}  # the latter is optional; tests need it
    assert config["versions"] == {**versions, "python": platform.python_version(), "torch": torch.__version__}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert (config["git_commit"] or "").removesuffix("-dirty") == commit and config["device"].startswith("cpu")


def test_log_has_one_line_per_epoch(finished):
    lines = [json.loads(line) for line in (finished / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert {"train_lr", "train_closs", "samples_per_s", "seconds", "peak_memory_gib"} <= line.keys()
        assert line["skipped_steps"] == 0 and line["peak_memory_gib"] > 0
    # Three steps per epoch; the learning rate is set at each: warmup at 0, 1/3, 2/3, then half a cosine.
    assert lines[0]["train_lr"] == pytest.approx(1e-2 / 3)
    assert lines[1]["train_lr"] == pytest.approx(1e-2 * (1 + 0.75 + 0.25) / 3)


def test_checkpoint_contains_its_adapter_config(finished):
    checkpoint = torch.load(finished / "checkpoint-1.pth", weights_only=True)
    assert AdapterConfig(**checkpoint["adapter_config"]) == AdapterConfig(
        adapter_type="block", adapter_dim=4, temperature=5.0, adapter_scale=0.5, hidden_proj=16, dropout_var=1.5)
    assert checkpoint["epoch"] == 1


def test_predictions_generations_and_scores_are_consistent(finished, scienceqa):
    problems = {qid: p for qid, p in read_json(scienceqa / "problems.json").items() if p["split"] == "test"}
    predictions, scores = read_json(finished / "preds.json"), read_json(finished / "scores.json")
    generations = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    assert list(predictions) == [line["qid"] for line in generations] == list(problems)
    for line in generations:
        n = len(problems[line["qid"]]["choices"])
        assert 0 <= line["prediction"] < n and line["prediction"] == predictions[line["qid"]]
        assert line["answer"] == problems[line["qid"]]["answer"]
        assert line["cluster"] == cluster(line["qid"], problems[line["qid"]])
        assert line["parsed"] == (parse_answer(line["text"], n) is not None)
    expected = score(problems, read_answers(finished / "generations.jsonl"))
    assert {key: scores[key] for key in expected} == expected and set(COLUMNS) < set(scores)
    assert scores["questions"] == 6 and scores["bad_pictures"] == 0 and scores["checkpoint"] == "checkpoint-1.pth"
    assert scores["split"] == "test" and scores["parse_failures"] == sum(not line["parsed"] for line in generations)


def test_unparsed_answers_become_the_most_likely_option(finished, scienceqa, base):
    """The tiny model's answers do not parse; the reference computes the likelihood of every option."""
    args = evaluation.get_args_parser().parse_args(["--adapter_path", str(finished), "--device", "cpu"])
    model, tokenizer, _ = load_model(args)
    data = load_scienceqa(str(scienceqa), "test")
    images = load_images(data, model.vision.image_size, 1, False)
    unparsed = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    unparsed = [line for line in unparsed if not line["parsed"]]
    assert unparsed
    for line in unparsed:
        problem = data.problems[line["qid"]]
        prompt, _ = build_prompt(problem, "QCM-ALE")
        losses = []
        for i in range(len(problem["choices"])):
            example = tokenizer.example(prompt, answer_text(i), images.get(line["qid"]))
            at = len(example.ids) - 3  # the letter
            losses.append(-reference.logits(model, [example])[0, at].log_softmax(-1)[example.ids[at]].item())
        assert losses[line["prediction"]] == pytest.approx(min(losses), abs=1e-5)


@pytest.mark.parametrize("prompt_format, limit", [("QCM-ALE", 64), ("QCM-LEA", 90), ("QCM-A", 64)])
def test_answers_that_come_after_the_solution_have_room_for_it(tokenizer, monkeypatch, prompt_format, limit):
    """64 tokens where the answer comes first, else as many as --max_seq_len allows."""
    limits = []
    monkeypatch.setattr(answering, "generate", lambda model, tokenizer, examples, max_new_tokens, *rest: limits.append(
        max_new_tokens) or ["The answer is A."] * len(examples))
    batch = [answering.EvalQuestion("1", "Which pond?\nResponse:", tokenizer.example("Which pond?\nResponse:"), 3, 0)]
    answering.generate_batch(None, tokenizer, batch, DataSettings(prompt_format=prompt_format, max_seq_len=90),
                             Answering())
    assert limits == [limit]


def test_drafts_are_what_all_answers_begin_with(tokenizer):
    assert tokenizer.decode(answering.first_tokens(tokenizer, "Which pond?\nResponse:")).strip() == "The answer is"


def test_unparsed_answer_in_a_batch_gets_its_own_option_and_keeps_the_session(tokenizer, monkeypatch):
    model, sessions = tiny_model(llama={"vocab_size": tokenizer.n_words}), []

    def generate_with_one_unparsed(*args):
        generate(*args)
        sessions.append(model.session)
        return ["The answer is B.", "no idea", "The answer is A."]
    monkeypatch.setattr(answering, "generate", generate_with_one_unparsed)
    prompts = [f"Which pond is {word}?\nResponse:" for word in ("deep", "old", "new")]
    batch = [answering.EvalQuestion(str(i), prompt, tokenizer.example(prompt), 3, i)
             for i, prompt in enumerate(prompts)]
    for _ in range(2):
        results = answering.generate_batch(model, tokenizer, batch, DataSettings(), Answering())
    new_model = tiny_model(llama={"vocab_size": tokenizer.n_words})
    [[most_likely]] = answering.most_likely_options(new_model, tokenizer, [batch[1:2]])
    assert results == [("The answer is B.", 1, True), ("no idea", most_likely, False), ("The answer is A.", 0, True)]
    assert sessions[0] is sessions[1] is model.session


def test_an_option_that_a_question_does_not_have_is_never_the_likeliest(tokenizer, monkeypatch):
    """The last option is always the likeliest, also where another question of the batch has more of them."""
    monkeypatch.setattr(answering, "score_options", lambda model, batches: (
        [list(range(len(tokens))) for _, tokens in batch] for batch in batches))
    example = tokenizer.example("Which pond?\nResponse:")
    batch = [answering.EvalQuestion(str(n), "Which pond?\nResponse:", example, n, 0) for n in (2, 5, 3)]
    assert list(answering.most_likely_options(tiny_model(), tokenizer, [batch])) == [[1, 4, 2]]


def test_decode_score_gives_the_most_likely_options(finished, tmp_path):
    """Generation falls back to the same options, since the tiny model's answers do not parse."""
    run_eval("--adapter_path", finished, "--output_dir", tmp_path, "--decode", "score")
    assert read_json(tmp_path / "preds.json") == read_json(finished / "preds.json")
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [f"The answer is {'ABCDE'[line['prediction']]}." for line in lines]
    assert read_json(tmp_path / "scores.json")["parse_failures"] == 0
    assert read_json(finished / "scores.json")["parse_failures"] > 0


@pytest.mark.parametrize("sampling", [[], ["--generation_temperature", "2"]])
def test_answers_do_not_depend_on_the_batch_size(finished, tmp_path, sampling):
    for size in (1, 4, 64):
        run_eval("--adapter_path", finished / "checkpoint-1.pth", "--max_batch_size", size, *sampling,
                 "--output_dir", tmp_path / str(size))
    texts = {(tmp_path / str(size) / "generations.jsonl").read_text() for size in (1, 4, 64)}
    assert len(texts) == 1
    assert (texts == {(finished / "generations.jsonl").read_text()}) == (not sampling)


def test_untuned_base_is_evaluated_into_output_dir(base, scienceqa, tmp_path):
    run_eval(*base.flags, "--data_root", scienceqa, "--split", "train", "--output_dir", tmp_path)
    scores = read_json(tmp_path / "scores.json")
    assert scores["questions"] == 12 and scores["checkpoint"] is None and scores["split"] == "train"


def test_the_untuned_base_has_the_same_fresh_adapters_whatever_the_seed(base, scienceqa, tmp_path):
    """Its scores name no seed, and those that are there count for each. Pictures reach it through random weights."""
    texts = set()
    for seed in ("0", "5"):
        run_eval(*base.flags, "--data_root", scienceqa, "--output_dir", tmp_path / seed, "--seed", seed)
        texts.add((tmp_path / seed / "generations.jsonl").read_text())
    assert len(texts) == 1


def test_every_program_gives_the_untuned_base_the_same_adapters(base):
    """Whatever random numbers it has drawn before; and loading a model leaves these as they were."""
    args, loaded, drawn = evaluation.get_args_parser().parse_args(base.flags), [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded.append(adapter_parameters(load_model(args)[0]))
        drawn.append((torch.initial_seed(), torch.rand(1)))
    torch.testing.assert_close(*loaded, rtol=0, atol=0)
    assert drawn == [(seed, torch.rand(1, generator=torch.Generator().manual_seed(seed))) for seed in (0, 1)]


def test_captions(base, scienceqa, tmp_path, monkeypatch):
    """A run trained with captions is evaluated with them; they come from --data_root or from --caption_file."""
    prompts = []
    monkeypatch.setattr(answering, "build_prompt", lambda *args: prompts.append(build_prompt(*args)) or prompts[-1])
    run_train(base, scienceqa, tmp_path, "--use_caption", "--epochs", "1", "--warmup_epochs", "0")
    run_eval("--adapter_path", tmp_path)
    assert len(prompts) == 6 and all("A pond seen from above." in prompt for prompt, _ in prompts)
    captions = tmp_path / "other.json"
    captions.write_text(json.dumps({"captions": {"112": "A dry pond."}}))
    prompts.clear()
    run_eval("--adapter_path", tmp_path, "--caption_file", captions)
    assert ["A dry pond." in prompt for prompt, _ in prompts] == [True] + [False] * 5


def test_new_run_replaces_the_old_results(base, scienceqa, run_copy):
    run_train(base, scienceqa, run_copy, "--epochs", "1", "--warmup_epochs", "0", "--overwrite")
    assert sorted(path.name for path in run_copy.iterdir()) == [".lock", "checkpoint-0.pth", "config.json", "log.txt",
                                                                "metrics.jsonl", "recipe.json"]
    assert len((run_copy / "log.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
def test_lower_precision_gives_similar_losses(base, scienceqa, tmp_path, precision):
    """Each epoch's loss is within one percent of float32's, and no step is skipped."""
    losses = {}
    for name in ("fp32", precision):
        flags = ["--bits", "fp8"] if name == "fp8" else ["--precision", name]
        run_train(base, scienceqa, tmp_path / name, *flags, "--lr", "1e-2", "--dropout_prob", "0")
        lines = [json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
        losses[name] = [line["train_closs"] for line in lines]
        assert [line["skipped_steps"] for line in lines] == [0, 0]
        run_eval("--adapter_path", tmp_path / name)
        assert read_json(tmp_path / name / "scores.json")["questions"] == 6
    assert losses[precision] == pytest.approx(losses["fp32"], rel=1e-2) and losses[precision] != losses["fp32"]


def test_one_epoch_needs_no_other_warmup(base, scienceqa, tmp_path, capsys):
    """The warm-up that is taken is recorded, and the same command, or --resume, finds its run again."""
    command = [*base.flags, "--data_root", str(scienceqa), "--output_dir", str(tmp_path / "run"), "--device", "cpu",
               "--max_seq_len", "200", "--epochs", "1"]
    for flags in (command, command, ["--resume", str(tmp_path / "run")]):
        train.main(train.get_args_parser().parse_args(flags))
    assert read_json(tmp_path / "run" / "config.json")["flags"]["warmup_epochs"] == 0.1
    assert capsys.readouterr().out.count("which is finished") == 2


def test_lr_scales_with_the_effective_batch_size(base, scienceqa, tmp_path):
    run_train(base, scienceqa, tmp_path, "--blr", "0.1", "--accum_iter", "2", "--epochs", "1", "--warmup_epochs", "0")
    assert read_json(tmp_path / "config.json")["flags"]["lr"] == pytest.approx(0.1 * 8 / 256)


def test_vicuna_end_to_end(base, scienceqa, tokenizer_file, tmp_path, monkeypatch):
    """A base given by its path, with its delta; eval.py reads both paths from the run."""
    opened = []
    monkeypatch.setattr("lavin.weights.load.open_base", lambda *args: opened.append(open_base(*args)) or opened[-1])
    write_hugging_face(tmp_path / "llama", tokenizer_file, seed=1)
    delta = write_hugging_face(tmp_path / "vicuna_llama", tokenizer_file, seed=2)
    delta.model.norm.weight.data.zero_()
    delta.save_pretrained(tmp_path / "vicuna_llama")
    run_train(base, scienceqa, tmp_path / "run", "--llm_model", tmp_path / "llama", "--use_vicuna", "--epochs", "1",
              "--warmup_epochs", "0")
    run_eval("--adapter_path", tmp_path / "run")
    assert [base.source for base in opened] == [f"{tmp_path / 'llama'} + {tmp_path / 'vicuna_llama'}"] * 2
    assert read_json(tmp_path / "run" / "scores.json")["questions"] == 6


# --- The published commands ---

def test_published_flags_are_accepted():
    args = train.get_args_parser().parse_args(shlex.split(PUBLISHED_TRAIN))
    assert (args.llm_model, args.temperature, args.n_prompt, args.warmup_epochs) == ("7B", 10, 6, 2)
    assert args.clip_grad is None
    assert AdapterConfig.of(args) == AdapterConfig()
    flags = """--llama_model_path --data_path --data_root --caption_file --use_caption --max_seq_len --batch_size
        --accum_iter --epochs --warmup_epochs --blr --lr --min_lr --weight_decay --clip_grad --output_dir --log_dir
        --adapter_type --adapter_dim --adapter_scale --hidden_proj --n_prompt --prompt_format --temperature
        --visual_adapter_type --drop_path --dropout_prob --dropout_var --dropout_lim --gradient_checkpointing --bits
        --cpu_load --use_vicuna --do_pretrain --resume --seed --num_workers --lr_schedule --precision --device
        --vision_model --loss_norm""".split()
    assert set(flags) <= set(train.get_args_parser()._option_string_actions)
    args = evaluation.get_args_parser().parse_args(shlex.split(PUBLISHED_EVAL))
    assert (args.llama_model_path, args.max_batch_size, args.split) == ("../data/weights/", 64, "test")
    assert {"--generation_temperature", "--top_p"} <= set(evaluation.get_args_parser()._option_string_actions)


@pytest.mark.parametrize("command", [f"train.py {PUBLISHED_TRAIN}", f"eval.py {PUBLISHED_EVAL}"])
def test_published_commands_name_the_missing_weights_in_one_line(command, tmp_path):
    """Each runs in a subprocess, which ends with exit status 1 and a single line on stderr."""
    script, *flags = shlex.split(command)
    (tmp_path / "code").mkdir()
    result = subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=tmp_path / "code", capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"{script}: error: missing ../data/weights/7B/params.json: put ")
    assert os.listdir(tmp_path / "code") == []


def test_published_eval_command_names_the_missing_adapters(base, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = [flag.replace("../data/weights", str(base.weights)).replace("7B", "tiny")
             for flag in shlex.split(PUBLISHED_EVAL)]
    assert "no checkpoint ./LaVIN-tiny/checkpoint-19.pth" in error_message(run_eval, *flags)


def test_user_errors_exit_with_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    for name in ("install", "finish"):
        monkeypatch.setattr(f"lavin.runtime.signals.{name}", lambda *action: None)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise UserError("no file x: put it there")
    assert caught.value.code == 1 and capsys.readouterr().err == "train.py: error: no file x: put it there\n"
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("other exceptions keep their traceback")


# --- User errors ---

@pytest.mark.parametrize("flags, words", [
    (["--epochs", "0"], "--epochs 0"), (["--warmup_epochs", "2"], "--warmup_epochs 2.0"),
    (["--lr", "-1"], "--lr -1 does not lie in (0, inf)"),
    (["--min_lr", "1"], "--min_lr 1.0"), (["--dropout_var", "0"], "--dropout_var 0 "),
    (["--dropout_var", "2", "--dropout_lim", "0.05"], "--dropout_lim 0.05 must lie at or above --dropout_prob 0.1"),
    (["--drop_path", "1"], "--drop_path 1 "), (["--cuda_graphs", "on"], "--cuda_graphs on needs a GPU"),
    (["--compile", "on", "--bits", "8bit"], "--compile and --cuda_graphs do nothing with --bits 8bit"),
    (["--batch_size", "0"], "--batch_size 0"), (["--accum_iter", "0"], "--accum_iter 0"),
    (["--adapter_dim", "3"], "--adapter_dim 3"), (["--n_prompt", "4"], "--n_prompt 4"),
    (["--temperature", "0"], "--temperature 0 "), (["--max_seq_len", "12"], "--max_seq_len 12 leaves no answer"),
    (["--max_seq_len", "10"], "--max_seq_len 10 leaves no room"),
    (["--device", "cuda:77"], "--device cuda:77"), (["--device", "tpu9"], "--device tpu9"),
    (["--vision_model", "no/where"], "--vision_model no/where"), (["--llm_model", "70B"], "70B/params.json"),
    (["--resume", "nowhere.pth"], "nowhere.pth")])
def test_invalid_train_flags(base, scienceqa, tmp_path, flags, words):
    if "cuda:77" in flags and torch.cuda.is_available():
        pytest.skip("the message differs on machines with a GPU")
    assert words in error_message(run_train, base, scienceqa, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--split", "dev"], "--split dev"), (["--data_root", "nowhere"], "nowhere/problems.json"),
    (["--use_caption", "--caption_file", "nowhere.json"], "nowhere.json"),
    (["--tokenizer_path", "nowhere.model"], "nowhere.model"), (["--n_prompt", "3"], "--n_prompt 6"),
    (["--adapter_dim", "8"], "--adapter_dim 8"), (["--temperature", "10"], "--temperature 10.0"),
    (["--adapter_type", "attn"], "--adapter_type attn"), (["--hidden_proj", "128"], "--hidden_proj 128"),
    (["--max_batch_size", "0"], "--max_batch_size 0"),
    (["--decode", "score", "--prompt_format", "QCM-LEA"], "leave --decode out")])
def test_invalid_eval_flags(run_copy, flags, words):
    message = error_message(run_eval, "--adapter_path", run_copy / "checkpoint-1.pth", *flags)
    assert words in message


def test_contradicting_flag_names_both_values(run_copy):
    message = error_message(run_eval, "--adapter_path", run_copy, "--adapter_scale", "1")
    assert "--adapter_scale 1.0" in message and "--adapter_scale 0.5" in message and str(run_copy) in message
    run_eval("--adapter_path", run_copy, "--adapter_scale", "0.5", "--temperature", "5.")  # these agree


def test_tokenizer_path(base, finished, tmp_path):
    shutil.copytree(base.weights, tmp_path / "weights")
    (tmp_path / "weights" / "tokenizer.model").rename(tmp_path / "other.model")
    flags = ["--adapter_path", finished, "--ckpt_dir", tmp_path / "weights", "--output_dir", tmp_path / "scores"]
    assert str(tmp_path / "weights" / "tokenizer.model") in error_message(run_eval, *flags)
    run_eval(*flags, "--tokenizer_path", tmp_path / "other.model")
    assert read_json(tmp_path / "scores" / "preds.json") == read_json(finished / "preds.json")


def test_published_checkpoint_of_another_shape(base, finished, scienceqa, tmp_path):
    """It contains no adapter config, so its shapes are checked against the flags."""
    tensors = torch.load(finished / "checkpoint-1.pth", weights_only=True)["model"]
    torch.save({"model": tensors}, tmp_path / "published.pth")
    shape = ["--adapter_type", "block", "--hidden_proj", "16", "--adapter_scale", "0.5", "--temperature", "5"]
    paths = [*base.flags, "--data_root", scienceqa, "--adapter_path", tmp_path / "published.pth"]
    message = error_message(run_eval, *paths, *shape)
    assert "published.pth" in message and "[8, " in message and "[4, " in message
    run_eval(*paths, *shape, "--adapter_dim", "4")
    assert read_json(tmp_path / "preds.json") == read_json(finished / "preds.json")


def test_checkpoint_that_runs_code_is_refused(base, run_copy):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(run_copy / "ran"),)

    torch.save({"model": Malicious()}, run_copy / "checkpoint-1.pth")
    assert "checkpoint-1.pth" in error_message(run_eval, "--adapter_path", run_copy)
    assert not (run_copy / "ran").exists()


def test_resume_from_adapters_only_is_refused(base, scienceqa, finished, tmp_path):
    tensors = torch.load(finished / "checkpoint-1.pth", weights_only=True)["model"]
    path = tmp_path / "published.pth"
    torch.save({"model": tensors}, path)
    assert "no recipe.json" in error_message(run_train, base, scienceqa, tmp_path, "--resume", path)


def test_eval_without_adapters_needs_output_dir(base, scienceqa):
    assert "--output_dir" in error_message(run_eval, *base.flags, "--data_root", scienceqa)


def test_broken_problems_file(base, scienceqa_copy, tmp_path):
    (scienceqa_copy / "problems.json").write_text('{"1": ')
    assert str(scienceqa_copy / "problems.json") in error_message(run_train, base, scienceqa_copy, tmp_path / "run")


def test_problem_json_and_bad_images_end_to_end(base, scienceqa_copy, tmp_path):
    (scienceqa_copy / "problems.json").rename(scienceqa_copy / "problem.json")
    for split, qid in (("train", "101"), ("train", "103"), ("test", "113")):
        (scienceqa_copy / "images" / split / qid / "image.png").write_bytes(b"no picture")
    message = error_message(run_train, base, scienceqa_copy, tmp_path / "run")
    assert "101/image.png" in message and "--skip_bad" in message and not (tmp_path / "run").exists()
    run_train(base, scienceqa_copy, tmp_path / "run", "--skip_bad", "--epochs", "1", "--warmup_epochs", "0")
    run_eval("--adapter_path", tmp_path / "run")  # reads --skip_bad from the run
    scores = read_json(tmp_path / "run" / "scores.json")
    assert scores["questions"] == 5 and scores["bad_pictures"] == 1
    assert "113" not in read_json(tmp_path / "run" / "preds.json")


def test_real_problems_from_loading_to_scores(base, real_scienceqa, tmp_path):
    """The images of the real problems are not available, so those are skipped."""
    problems = read_json(real_scienceqa / "problems.json")
    tests = [problems[qid] for qid in read_json(real_scienceqa / "pid_splits.json")["test"]]
    assert "image.png is missing" in error_message(run_train, base, real_scienceqa, tmp_path / "run")
    run_train(base, real_scienceqa, tmp_path / "run", "--skip_bad", "--epochs", "1", "--warmup_epochs", "0",
              "--max_seq_len", "512")
    run_eval("--adapter_path", tmp_path / "run")
    scores = read_json(tmp_path / "run" / "scores.json")
    text_only = sum(not p["image"] for p in tests)
    assert scores["questions"] == scores["counts"]["Avg"] == text_only
    assert scores["bad_pictures"] == len(tests) - text_only
    assert scores["IMG"] is None and scores["counts"]["IMG"] == 0 and scores["Avg"] is not None
