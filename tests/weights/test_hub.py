"""Models of the Hugging Face hub, from a local server that its real client asks."""

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from hub_server import COMMIT, serving, use
from lavin.tokenizer import Tokenizer
from lavin.weights import hub
from lavin.weights.base import base_path, find_tokenizer, require_base
from lavin.weights.hub import Repository
from lavin.weights.vision import vit_files
from tiny_runs import load_checkpoint, run_flags
from tiny_tokenizers import byte_level, write_json
from tiny_weights import write_hugging_face
from user_errors import error_message
from util.fingerprint import fingerprints
from util.flags import BaseSettings


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer_file, base):
    folder = tmp_path_factory.mktemp("models")
    write_hugging_face(folder / "lab" / "tiny-llama", tokenizer_file, max_shard_size="50KB")
    for name in ("README.md", "pytorch_model.bin", "flax_model.msgpack", "onnx/model.onnx"):
        (folder / "lab" / "tiny-llama" / name).parent.mkdir(exist_ok=True)
        (folder / "lab" / "tiny-llama" / name).write_bytes(b"not read")
    shutil.copytree(base.weights / "tiny", folder / "lab" / "meta")
    shutil.copy(tokenizer_file, folder / "lab" / "meta")
    shutil.copytree(base.vision, folder / "lab" / "vit")
    return folder


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    hub.cached_or_fetched.cache_clear()
    with serving(models) as server:
        use(server.url, tmp_path / "hub", monkeypatch)
        yield server
    hub.cached_or_fetched.cache_clear()


@pytest.mark.parametrize("name, parsed", [
    ("lab/tiny-llama", ("lab/tiny-llama", None)), ("lab/v1.5@main", ("lab/v1.5", "main")),
    ("a/b@refs/pr/1", ("a/b", "refs/pr/1")), ("7B", None), ("../data/7B", None), ("/models/7B", None), ("a/b/c", None),
    ("./a/b", None), ("a/", None), ("a/b@", None), ("a b/c", None), ("ViT-L-14.pt", None), ("no/ViT-L-14.pt", None)])
def test_names_of_the_hub(name, parsed):
    assert Repository.parse(name) == (parsed and Repository(*parsed))


def test_a_path_that_exists_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Repository.parse("lab/tiny-llama")
    (tmp_path / "lab" / "tiny-llama").mkdir(parents=True)
    assert Repository.parse("lab/tiny-llama") is None


def test_only_what_is_read_is_fetched_and_once(server, models):
    path = base_path("none", "lab/tiny-llama")
    fetched = sorted(file.name for file in path.iterdir())
    assert len([name for name in fetched if name.endswith(".safetensors")]) > 1
    assert fetched == sorted(["config.json", "tokenizer.model", "model.safetensors.index.json",
                              *(file.name for file in (models / "lab" / "tiny-llama").glob("model-*"))])
    hub.cached_or_fetched.cache_clear()
    assert base_path("none", "lab/tiny-llama") == path
    assert {server.fetched[name] for name in fetched} == {1}


def test_the_commit_is_that_of_the_files_that_are_read(server, tmp_path, monkeypatch):
    """Another program may fetch a newer commit meanwhile, and a folder may have the name of a model on the hub."""
    paths = {"lab/tiny-llama": base_path("none", "lab/tiny-llama"), "7B": base_path("none", "7B")}
    main, = (tmp_path / "hub").rglob("models--lab--tiny-llama/refs/main")
    newer = main.parents[1] / "snapshots" / "f00"
    shutil.copytree(paths["lab/tiny-llama"], newer)
    main.write_text(newer.name)
    assert base_path("none", "lab/tiny-llama") == paths["lab/tiny-llama"]
    assert hub.commits(paths) == {"lab/tiny-llama": COMMIT}
    (tmp_path / "weights" / "lab" / "tiny-llama").mkdir(parents=True)
    assert hub.commits({"lab/tiny-llama": base_path(str(tmp_path / "weights"), "lab/tiny-llama")}) == {}


def test_a_run_is_that_of_the_same_files_in_a_folder(server, models, scienceqa, base, tmp_path):
    runs = {}
    for name, model, vit in (("hub", f"lab/tiny-llama@{COMMIT}", "lab/vit"),
                             ("path", str(models / "lab" / "tiny-llama"), str(base.vision))):
        train.main(train.get_args_parser().parse_args(run_flags(
            base, scienceqa, tmp_path / name, "--llm_model", model, "--vision_model", vit, "--epochs", "1",
            "--warmup_epochs", "0")))
        runs[name] = load_checkpoint(tmp_path / name / "checkpoint-0.pth")
    torch.testing.assert_close(runs["hub"]["model"], runs["path"]["model"], rtol=0, atol=0)
    recipes = [json.loads((tmp_path / name / "recipe.json").read_text())["recipe"] for name in runs]
    assert recipes[0]["vision_sha256"] == recipes[1]["vision_sha256"] and recipes[0]["vision_sha256"]
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["hub_commits"] == {f"lab/tiny-llama@{COMMIT}": COMMIT, "lab/vit": COMMIT}
    assert "hub_commits" not in json.loads((tmp_path / "path" / "config.json").read_text())


def test_a_tokenizer_is_that_of_the_same_files_in_a_folder(server, models):
    """BOS and EOS may stand in a file of their own: here config.json names a BOS that is not to be used."""
    folder = models / "lab" / "fast"
    shutil.copytree(models / "lab" / "meta", folder, ignore=shutil.ignore_patterns("tokenizer.model"))
    write_json(folder, byte_level())
    (folder / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 1}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    fetched, local = Tokenizer(find_tokenizer("none", "lab/fast")), Tokenizer(find_tokenizer("none", str(folder)))
    assert (fetched.bos_id, fetched.eos_id) == (local.bos_id, local.eos_id) == (None, 2)
    settings = [BaseSettings(llm_model=name, llama_model_path="none", vision_model="lab/vit") for name in (
        "lab/fast", str(folder))]
    assert fingerprints(settings[0]) == fingerprints(settings[1])


def test_metas_layout(server, base):
    require_base("none", "lab/meta")
    settings = BaseSettings(llm_model="lab/meta", llama_model_path="none", vision_model=str(base.vision))
    local = BaseSettings(llm_model="tiny", llama_model_path=str(base.weights), vision_model=str(base.vision))
    assert fingerprints(settings) == fingerprints(local)


def test_without_network_the_cache_serves(server, tmp_path, monkeypatch):
    path = base_path("none", "lab/tiny-llama")
    use("http://127.0.0.1:9", tmp_path / "hub", monkeypatch)  # nothing listens
    hub.cached_or_fetched.cache_clear()
    assert base_path("none", "lab/tiny-llama") == path
    message = error_message(vit_files, "lab/vit")
    assert message.startswith("--vision_model lab/vit: there is no such path, and lab/vit is not in the hub's cache, "
                              "and there is no network to http://127.0.0.1:9: ")
    assert "python -m tools.download lab/vit" in message and message.endswith("or correct the path")


@pytest.fixture
def changing(server, models):
    """A model that has another commit, and other files, each time when this is called. Returns what a process that
    starts then reads it from."""
    folder = models / "lab" / "changing"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(models / "lab" / "tiny-llama", folder)

    def start(commit: str) -> Path:
        if server.commit != commit:
            server.commit = commit
            for path in folder.iterdir():
                if path.is_file():
                    path.write_bytes(path.read_bytes() + b" ")
        hub.cached_or_fetched.cache_clear()
        return base_path("none", "lab/changing")
    return start


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("broken", ["^api/models", "/tree/", "model-00002"])
def test_a_model_in_the_cache_serves_where_fetching_a_newer_one_breaks_off(server, changing, tmp_path, monkeypatch,
                                                                          capsys, broken, closes):
    """It does so as long as the newer one is not whole, and also without a network."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # before the hub's client tries again
    path, newer = changing(COMMIT), "f00" + 37 * "0"
    server.broken, server.closes = broken, closes
    for _ in range(2):
        capsys.readouterr()
        assert changing(newer) == path
        *_, line = capsys.readouterr().out.splitlines()
        assert line.startswith("lab/changing cannot be fetched (") and line.endswith(
            f"): the files in the hub's cache are used, of commit {COMMIT}")
    with monkeypatch.context() as patched:
        use("http://127.0.0.1:9", tmp_path / "hub", patched)
        assert changing(newer) == path
    server.broken = None
    assert changing(newer).name == newer


def test_a_part_of_a_model_in_the_cache_is_no_model(server, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    next(base_path("none", "lab/tiny-llama").glob("model-00002*")).unlink()
    hub.cached_or_fetched.cache_clear()
    server.broken = "/resolve/"
    assert "lab/tiny-llama cannot be fetched" in error_message(base_path, "none", "lab/tiny-llama")
    use("http://127.0.0.1:9", tmp_path / "hub", monkeypatch)
    assert "lab/tiny-llama is not in the hub's cache" in error_message(base_path, "none", "lab/tiny-llama")


def test_a_newer_commit_is_told_before_it_is_fetched(server, changing, monkeypatch, capsys):
    changing(COMMIT)
    assert "fetching lab/changing" in capsys.readouterr().out
    changing(COMMIT)
    assert "fetching" not in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "lab/changing needs 0.00 GB" in error_message(changing, "f00" + 37 * "0")


def test_a_cache_behind_a_link_has_commits_too(server, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    use(server.url, tmp_path / "link", monkeypatch)
    for _ in range(2):
        hub.cached_or_fetched.cache_clear()
        assert hub.commits({"lab/vit": hub.model_path("lab/vit", "--vision_model")}) == {"lab/vit": COMMIT}


@pytest.mark.parametrize("name, words", [
    ("lab/unknown", "lab/unknown is no model at http"),
    ("lab/tiny-llama@v9", "lab/tiny-llama has no revision v9"),
    ("lab/empty", "lab/empty has no weights in a format"),
    ("lab/gated", "lab/gated asks for a consent: give it at http"),
    ("lab/down", "lab/down cannot be fetched (Server error '500")])
def test_errors_name_both_readings_and_say_what_to_do(server, models, name, words):
    """The name may be that of a folder that is mistyped, or that lies elsewhere."""
    for folder in ("empty", "gated"):
        (models / "lab" / folder).mkdir(exist_ok=True)
        (models / "lab" / folder / "config.json").write_text("{}")
    (models / "lab" / "gated" / "model.safetensors").write_text("")
    server.gated, server.broken = {"lab/gated"}, "lab/down"
    message = error_message(base_path, "none", name)
    assert message.startswith(f"--llm_model {name}: there is no such path, and {words}")


def test_a_full_disk_is_told_before_anything_is_fetched(server, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "lab/tiny-llama needs 0.00 GB, and only 0.00 GB are free" in error_message(base_path, "none",
                                                                                    "lab/tiny-llama")
    assert not any(name.endswith(".safetensors") for name in server.fetched)


def test_a_connection_that_ends_is_gone_on_with(server, models):
    server.cut = [100]
    path = base_path("none", "lab/tiny-llama")
    for file in path.iterdir():
        assert file.read_bytes() == (models / "lab" / "tiny-llama" / file.name).read_bytes()
