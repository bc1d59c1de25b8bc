"""Content decides what a run, its scores and its checkpoints are of: pictures and models of one size and one time of
change are told apart, and records of earlier versions are compared in what they hold."""

import json
import os
import shutil

import pytest
import torch
from PIL import Image

import eval as evaluation
import eval_mme
import train
from lavin.runtime.files import SAMPLE_BYTES, write_json_lines
from lavin.weights import hub
from tiny_runs import forget_in_checkpoint, load_checkpoint, run_flags, write_run
from user_errors import error_message
from util import fingerprint, shared_base, trained_model
from util.data.datasets import ScienceQA, load_scienceqa
from util.data.instructions import Instructions, LazyImage
from util.evaluation import evaluate, mme
from util.evaluation.partial_answers import partial_path, recover
from util.evaluation.scienceqa import summarize
from util.fingerprint import FROZEN_SHA256, RECENT, fingerprints, report_unrecorded
from util.flags import BaseSettings
from util.runs import GENERATIONS
from util.training import command

SCORES = "checkpoint-0/scores.json"  # of the run's first epoch


def run_train(*flags) -> None:
    train.main(train.get_args_parser().parse_args([str(flag) for flag in flags]))


def run_eval(*flags) -> None:
    evaluation.main(evaluation.get_args_parser().parse_args(["--device", "cpu", *map(str, flags)]))


def change_content(path, change) -> None:
    """Size and time of change stay."""
    found, content = path.stat(), bytearray(path.read_bytes())
    change(content)
    assert len(content) == found.st_size and content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def change_pixels(path) -> None:
    """Changes the pixels of a bitmap."""
    change_content(path, lambda content: content.__setitem__(slice(-9, None), bytes(9)))


@pytest.fixture
def data(scienceqa_copy):
    """The problems, with pictures as bitmaps."""
    for path in scienceqa_copy.glob("images/*/*/image.png"):
        Image.open(path).save(path, "BMP")
    return scienceqa_copy


@pytest.fixture
def models(base, tmp_path):
    """A copy of the base, whose weights are larger than what a sampled checksum reads of them, and have none of their
    own, as safetensors."""
    shutil.copytree(base.weights, tmp_path / "weights")
    shutil.copytree(base.vision, tmp_path / "vit")
    path = tmp_path / "weights" / "tiny" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    torch.serialization.set_crc32_options(False)
    torch.save({**tensors, "rope.freqs": torch.zeros(6 * SAMPLE_BYTES // 4)}, path)  # a buffer that is not used
    torch.serialization.set_crc32_options(True)
    return type(base)(tmp_path / "weights", tmp_path / "vit")


def change_weights(models) -> None:
    """Outside the first, middle and last MiB."""
    def change(content) -> None:
        content[SAMPLE_BYTES + 9] ^= 1

    change_content(models.weights / "tiny" / "consolidated.00.pth", change)


@pytest.fixture
def flags(models, data, tmp_path):
    return run_flags(models, data, tmp_path / "run", "--epochs", "2", "--warmup_epochs", "0")


@pytest.fixture
def run(flags, tmp_path):
    """A run that has stopped after its first epoch, and is scored."""
    run_train(*flags, "--stop_after_epoch", "1")
    run_eval("--adapter_path", tmp_path / "run", "--decode", "score")
    return tmp_path / "run"


def refusal(*flags) -> str:
    return error_message(run_train, *flags)


def forget(path, *names) -> None:
    """Makes a record as an earlier version has written it."""
    content = json.loads(path.read_text())
    entries = content["recipe"] if path.name == "recipe.json" else content
    for name in names:
        del entries[name]
    path.write_text(json.dumps(content))


def scored_again(run, capsys) -> str | None:
    """Returns the line that eval.py prints on the scores that are there; None where it prints none, and scores."""
    capsys.readouterr()
    run_eval("--adapter_path", run, "--decode", "score")
    lines = capsys.readouterr().out.splitlines()
    return next((line for line in lines if "scored before" in line or "will be replaced" in line), None)


# --- Pictures ---

def test_training_does_not_go_on_with_other_pictures(run, flags, data):
    before = {path.name: path.read_bytes() for path in run.glob("*.*")}
    change_pixels(data / "images" / "train" / "101" / "image.png")
    for message in (refusal(*flags), refusal("--resume", run)):
        assert f"{run} belongs to another recipe (other pictures of --data_root): name another --output_dir" in message
    assert {path.name: path.read_bytes() for path in run.glob("*.*")} == before
    run_train(*flags, "--overwrite")
    assert sorted(path.name for path in run.glob("*.pth")) == ["checkpoint-0.pth", "checkpoint-1.pth"]


def test_a_finished_run_is_not_finished_with_other_pictures(run, flags, data, capsys):
    run_train(*flags)
    change_pixels(data / "images" / "train" / "101" / "image.png")
    assert "other pictures of --data_root" in refusal(*flags)


def test_pictures_that_are_not_trained_on_may_change(run, flags, data, tmp_path):
    change_pixels(data / "images" / "test" / "113" / "image.png")
    (data / "images" / "train" / "101" / "another.png").write_bytes(b"")
    shutil.copytree(data, tmp_path / "elsewhere")
    run_train(*flags, "--data_root", tmp_path / "elsewhere")
    assert (run / "checkpoint-1.pth").is_file()


def test_scores_of_other_pictures_are_replaced(run, data, capsys):
    assert "scored before" in scored_again(run, capsys)
    change_pixels(data / "images" / "test" / "113" / "image.png")
    before = json.loads((run / SCORES).read_text())
    assert "holds scores of another pictures: they will be replaced" in scored_again(run, capsys)
    after = json.loads((run / SCORES).read_text())
    assert before["pictures"] != after["pictures"] and before["data"] == after["data"]
    assert "scored before" in scored_again(run, capsys)


def test_scores_of_mme_name_its_pictures(models, tmp_path, capsys):
    write_run(tmp_path / "run", models, 0)
    folder = tmp_path / "mme" / "color"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    Image.new("RGB", (9, 9), (200, 0, 0)).save(folder / "a.png", "BMP")
    command = ["--adapter_path", tmp_path / "run", "--device", "cpu", "--mme_root", tmp_path / "mme"]
    said = []
    for i in range(4):
        if i == 2:
            change_pixels(folder / "a.png")
        capsys.readouterr()
        eval_mme.main(eval_mme.get_args_parser().parse_args([str(word) for word in command]))
        said.append(capsys.readouterr().out)
    assert ["scored before" in text for text in said] == [False, True, False, True]
    assert "scores of another pictures" in said[2]


def test_pictures_are_known_by_content_and_by_what_shows_them(data, tmp_path):
    def checksum(root):
        return load_scienceqa(str(root), "train").pictures_sha256

    first, paths = checksum(data), [data / "images" / "train" / qid / "image.png" for qid in ("101", "103")]
    shutil.copytree(data, tmp_path / "copy")
    assert checksum(tmp_path / "copy") == first
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    exchanged = checksum(data)
    paths[0].unlink()
    assert len({first, exchanged, checksum(data)}) == 3


def test_pictures_of_instructions_are_known_by_content(tmp_path):
    folder = tmp_path / "images" / "train2014"
    folder.mkdir(parents=True)
    records = [{"instruction": "a", "answer": "b", "image": name} for name in ("1.png", "2.png", None, "1.png")]
    data, seen = Instructions(tmp_path, records), set()
    for contents in ((b"one", b"two"), (b"two", b"one"), (b"one", b"2wo")):
        for name, content in zip(("1.png", "2.png"), contents, strict=True):
            (folder / f"COCO_train2014_{name}").write_bytes(content)
        seen.add(data.pictures_sha256)
    assert len(seen) == 3


# --- Models ---

def test_training_does_not_go_on_with_a_base_that_differs_anywhere(run, flags, models):
    change_weights(models)
    message = refusal(*flags)
    assert "belongs to another recipe (other files of --llm_model):" in message


def test_a_base_that_differs_anywhere_is_told_and_scored_anew(run, models, capsys):
    change_weights(models)
    assert "scores of another base:" in scored_again(run, capsys)
    run_eval("--adapter_path", run, "--decode", "score")
    said = capsys.readouterr().out
    assert "was trained on other files of --llm_model" in said and "scored before" in said


def test_a_vit_that_differs_anywhere_is_another(run, flags, models):
    change_content(models.vision / "model.safetensors", lambda content: content.__setitem__(-1, content[-1] ^ 1))
    assert "other files of --vision_model" in refusal(*flags)


def test_checkpoints_and_recipe_name_the_same_content(run):
    recipe, checkpoint = json.loads((run / "recipe.json").read_text())["recipe"], load_checkpoint(
        run / "checkpoint-0.pth")
    assert {name: checkpoint[name] for name in FROZEN_SHA256} == {name: recipe[name] for name in FROZEN_SHA256}
    assert all(len(recipe[name]) == 64 for name in RECENT)


def test_a_model_of_timms_hub_is_known_by_the_file_in_the_cache(base, tmp_path, monkeypatch):
    """Before timm has fetched the file, the model is known by its name alone."""
    name = "vit_base_patch16_224.augreg_in21k"
    settings = BaseSettings(llm_model="tiny", llama_model_path=str(base.weights), vision_model=name)
    folder = tmp_path / "snapshot"

    def snapshot(repository, local_files_only):
        assert local_files_only and repository == f"timm/{name}"
        if not folder.exists():
            raise FileNotFoundError
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    seen = [fingerprints(settings)]
    folder.mkdir()
    for file, content in (("README.md", b"0"), ("pytorch_model.bin", b"1"), ("model.safetensors", b"2"),
                          ("model.safetensors", b"3"), ("pytorch_model.bin", b"4")):
        (folder / file).write_bytes(content)
        seen.append(fingerprints(settings))
    assert {entry["vision"] for entry in seen} == {name}
    contents = [entry["vision_sha256"] for entry in seen]
    assert contents[0] is contents[1] is None and contents[4] == contents[5] and len(set(contents)) == 4
    assert fingerprints(BaseSettings(llm_model="tiny", llama_model_path=str(base.weights), vision_model="no_model")
                        )["vision_sha256"] is None


def test_the_description_beside_a_weight_file_belongs_to_the_vit(base, tmp_path):
    shutil.copytree(base.vision, tmp_path / "vit")
    settings = BaseSettings(llm_model="tiny", llama_model_path=str(base.weights),
                            vision_model=str(tmp_path / "vit" / "model.safetensors"))
    before = fingerprints(settings)["vision_sha256"]
    (tmp_path / "vit" / "config.json").write_text("{}")
    assert fingerprints(settings)["vision_sha256"] != before


# --- Files that are exchanged between their checksum and their reading ---

@pytest.fixture(params=["picture", "base", "tokenizer", "vit"])
def exchanged(request, models, data):
    """Functions that give the file that a command on a split reads, and exchange its content."""
    change_a_bit = {"base": models.weights / "tiny" / "consolidated.00.pth", "vit": models.vision / "model.safetensors",
                    "tokenizer": models.weights / "tokenizer.model"}
    if request.param == "picture":
        pictures = {split: data / "images" / split / qid / "image.png" for split, qid in (("train", "101"),
                                                                                          ("test", "113"))}
        return pictures.get, change_pixels
    return lambda split: change_a_bit[request.param], lambda path: change_content(
        path, lambda content: content.__setitem__(-1, content[-1] ^ 1))


def exchanging(load, exchange):
    def load_and_exchange(*args):
        loaded = load(*args)
        exchange()
        return loaded
    return load_and_exchange


def test_training_does_not_begin_on_other_files_than_its_recipe_names(flags, exchanged, tmp_path, monkeypatch):
    path, exchange = exchanged[0]("train"), exchanged[1]
    monkeypatch.setattr(command, "load_model", exchanging(command.load_model, lambda: exchange(path)))
    assert refusal(*flags).startswith(f"{path} changes while it is read")
    assert not (tmp_path / "run").exists()


def test_scores_are_not_of_other_files_than_they_name(run, exchanged, tmp_path, monkeypatch):
    path, exchange = exchanged[0]("test"), exchanged[1]
    load = shared_base.load_base
    monkeypatch.setattr(shared_base, "load_base",
                        lambda *args, **more: exchanging(lambda: load(*args, **more), lambda: exchange(path))())
    message = error_message(run_eval, "--adapter_path", run, "--output_dir", tmp_path / "scores")
    assert message.startswith(f"{path} changes while it is read") and not (tmp_path / "scores").exists()


def test_scores_are_not_of_other_adapters_than_they_name(run, tmp_path, monkeypatch):
    """They are read before the base's checksum is taken."""
    path, warn = run / "checkpoint-0.pth", trained_model.warn_of_other_base
    monkeypatch.setattr(trained_model, "warn_of_other_base",
                        exchanging(warn, lambda: path.write_bytes(path.read_bytes() + b" ")))
    message = error_message(run_eval, "--adapter_path", run, "--output_dir", tmp_path / "scores")
    assert message.startswith(f"{path} changes while it is read") and not (tmp_path / "scores").exists()


def test_answers_of_mme_are_not_on_other_pictures_than_the_scores_name(models, tmp_path, monkeypatch):
    """Its pictures are read when they are asked about."""
    write_run(tmp_path / "run", models, 0)
    folder = tmp_path / "mme" / "color"
    folder.mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
        Image.new("RGB", (9, 9), (200, 0, 0)).save(folder / f"{name}.png", "BMP")
    load = mme.load_pair_images

    def exchange_and_load(pairs, *args):
        if pairs[0].picture.name == "b.png":
            change_pixels(folder / "b.png")
        return load(pairs, *args)

    monkeypatch.setattr(mme, "load_pair_images", exchange_and_load)
    words = ["--adapter_path", tmp_path / "run", "--device", "cpu", "--mme_root", tmp_path / "mme",
             "--max_batch_size", "2"]
    message = error_message(eval_mme.main, eval_mme.get_args_parser().parse_args([str(word) for word in words]))
    assert message.startswith(f"{folder / 'b.png'} changes while it is read")
    written, = (tmp_path / "run").glob("*.partial.jsonl")
    assert [json.loads(line)[0] for line in written.read_text().splitlines()[1:]] == ["color/a.png"]


def test_instructions_are_trained_with_the_pictures_that_were_there_when_the_run_was_started(tmp_path):
    """Whatever the times of the files say: a copy of the same content is the same."""
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9), (200, 0, 0)).save(path, "BMP")
    image = LazyImage(path, 8)
    assert image.problem() is None
    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    assert torch.equal(image.decode(), LazyImage(path, 8).decode())
    change_pixels(path)
    assert error_message(image.decode).startswith(f"{path} has changed since the run was started")


def test_a_vit_that_timm_fetches_now_is_recorded(run, flags, tmp_path, monkeypatch):
    """The record of it holds what the next command finds."""
    fetched, of_vit = [], fingerprint.vit_files
    monkeypatch.setattr(fingerprint, "vit_files", lambda name: of_vit(name) if fetched else [])
    monkeypatch.setattr(command, "load_model", exchanging(command.load_model, lambda: fetched.append(1)))
    run_train(*flags, "--output_dir", tmp_path / "other")
    recipes = [json.loads((folder / "recipe.json").read_text())["recipe"] for folder in (run, tmp_path / "other")]
    assert recipes[0] == recipes[1]
    assert load_checkpoint(tmp_path / "other" / "checkpoint-1.pth")["vision_sha256"] == recipes[0]["vision_sha256"]
    fetched.clear()
    load = evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", exchanging(load, lambda: fetched.append(1)))
    run_eval("--adapter_path", tmp_path / "other", "--decode", "score")
    assert json.loads((tmp_path / "other" / "scores.json").read_text())["vision_sha256"] == recipes[0]["vision_sha256"]


# --- Records of earlier versions ---

def test_a_run_of_an_earlier_version_goes_on(run, flags, data, models, capsys):
    """It has a sampled checksum of the models, and none of the pictures."""
    forget(run / "recipe.json", *RECENT)
    forget_in_checkpoint(run / "checkpoint-0.pth", "data", *RECENT)
    capsys.readouterr()
    change_pixels(data / "images" / "train" / "101" / "image.png")
    change_weights(models)
    run_train(*flags)
    line, = [line for line in capsys.readouterr().out.splitlines() if "earlier version" in line]
    assert str(run / "recipe.json") in line and (run / "checkpoint-1.pth").is_file()


def test_only_a_record_of_an_earlier_version_is_called_so(tmp_path, capsys):
    """A ViT that timm had not fetched yet has no checksum."""
    record = {**dict.fromkeys(RECENT, "a"), "vision_sha256": None, "base": "b"}
    report_unrecorded(tmp_path, record)
    assert not capsys.readouterr().out
    for name in RECENT:
        report_unrecorded(tmp_path, {key: value for key, value in record.items() if key != name})
        assert "earlier version" in capsys.readouterr().out


def test_a_run_of_an_earlier_version_is_refused_where_its_record_tells_another_base(run, flags, models):
    forget(run / "recipe.json", *RECENT)
    change_content(models.weights / "tiny" / "params.json", lambda content: content.__setitem__(0, ord(" ")))
    assert "other files of --llm_model" in refusal(*flags)


def test_scores_of_an_earlier_version_stay(run, monkeypatch, capsys):
    forget(run / SCORES, *RECENT)
    before = (run / SCORES).read_bytes()
    monkeypatch.setattr(evaluate, "load_model", None)
    assert "scored before" in scored_again(run, capsys)
    capsys.readouterr()
    run_eval("--adapter_path", run, "--decode", "score")
    assert "earlier version" in capsys.readouterr().out and (run / SCORES).read_bytes() == before


def test_answers_of_an_earlier_version_are_kept(tmp_path):
    identity = {"data": "a", "base": "b", "base_sha256": "c", "pictures": "d", "vision_sha256": None}
    for changes, is_kept in (({}, True), ({"pictures": None}, True), ({"vision_sha256": "x"}, True),
                             ({"base": "x"}, False), ({"base_sha256": "x"}, False), ({"pictures": "x"}, False),
                             ({"split": "val"}, False)):
        first = {name: value for name, value in (identity | changes).items() if value is not None}
        write_json_lines(partial_path(tmp_path, "answers", 0), [first, ["1", {"answer": 2}]])
        answers, known = recover(tmp_path, "answers", identity)
        assert answers == ({"1": {"answer": 2}} if is_kept else {}), changes
        assert known == ({name: identity[name] for name in first} if is_kept else identity)


def test_scores_tell_no_more_than_the_answers_of_an_earlier_version(run, tmp_path, capsys):
    """One of the answers is such."""
    expected, folder = json.loads((run / SCORES).read_text()), tmp_path / "scores"
    results = summarize([], ScienceQA(tmp_path, {}, {}), 0)
    first = {name: value for name, value in expected.items() if name not in {*results, *RECENT, "git_commit"}}
    answers = [json.loads(line) for line in (run / SCORES).with_name(GENERATIONS).read_text().splitlines()]
    write_json_lines(partial_path(folder, "answers", 3), [first, [answers[0]["qid"], answers[0]]])
    capsys.readouterr()
    run_eval("--adapter_path", run, "--decode", "score", "--output_dir", folder)
    said = capsys.readouterr().out
    assert "answers.3.partial.jsonl is of an earlier version" in said
    assert f"answered before: 1 of {len(answers)};" in said
    found = json.loads((folder / "scores.json").read_text())
    assert not found.keys() & set(RECENT) and found == {name: expected[name] for name in found}
