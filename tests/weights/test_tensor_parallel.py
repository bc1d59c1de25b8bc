"""One model on two processes: loss, gradients, runs and answers as on one, and each reads its part of the weights."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import demo
import eval as evaluation
import train
from conftest import write_base
from lavin.fast.speed_up import speed_up
from lavin.generation.generate import decode
from lavin.generation.kv_cache import KVCache
from lavin.generation.sampling import sampler
from lavin.mm_adapter import AdapterConfig
from lavin.model import LaVIN, pack
from lavin.runtime import distributed
from lavin.runtime.errors import UserError
from lavin.weights.base import open_base
from lavin.weights.load import load_base
from lavin.weights.meta import MetaShards
from tiny import mixed_examples, randomise_adapters, tiny_config, tiny_vit
from tiny_runs import NO_SCALING, load, log, run, run_flags, write_run
from tiny_weights import write_shards
from util.flags import check_shared
from util.training.accumulation import accumulate_with_oom_retry

tensor_parallel = pytest.importorskip("lavin.weights.tensor_parallel")
DROPOUT = 0.3


def losses_gradients_answers(base, llm_model: str) -> dict:
    """Of trained adapters on a base from its files, dropout on; as many processes as started this together."""
    model, _ = load_base(str(base.weights), llm_model, str(base.vision), AdapterConfig(dropout_prob=DROPOUT,
                         dropout_lim=DROPOUT, adapter_type="block"), torch.device("cpu"), torch.float32)
    torch.manual_seed(5)
    randomise_adapters(model)
    loss = model.train()(pack(mixed_examples()))
    loss.backward()
    answers = list(decode(model.eval(), mixed_examples(0), 8, sampler(0, 1, [])))
    return {"loss": loss.detach(), "answers": torch.stack(answers),
            "gradients": {name: p.grad for name, p in model.named_parameters() if p.requires_grad},
            "cache": KVCache(model.llama.config, 1, 64, "cpu", torch.float32).keys.numel(),
            "held": {name: list(p.shape) for name, p in model.llama.named_parameters() if "adapter" not in name}}


WORKER = """
import sys, torch
sys.path[:0] = {path!r}
import eval, train
from conftest import Base
from lavin.runtime import distributed
from pathlib import Path
from test_tensor_parallel import losses_gradients_answers
torch.set_num_threads(1)
distributed.init(2)
base = Base(Path({weights!r}), Path({vision!r}))
rank = torch.distributed.get_rank()
results = [losses_gradients_answers(base, name) for name in {models!r}]
torch.save([*results, distributed.gather_data_parallel(rank), distributed.all_min(rank + 3)], "{out}/" + str(rank) + ".pt")
close, distributed.close = distributed.close, lambda: None  # one group for both commands
train.main(train.get_args_parser().parse_args({flags!r}))
torch.distributed.barrier()  # the first process writes the checkpoint
eval.main(eval.get_args_parser().parse_args(["--adapter_path", {folder!r}, "--device", "cpu", "--model_parallel_size",
                                             "2"]))
close()
"""


def start(n: int, out: Path, base, models: list[str], flags: list[str]) -> list:
    """n processes, two of which share a model: what each returned; and a run, trained and scored, in out/run."""
    (out / "worker.py").write_text(WORKER.format(
        path=sys.path, weights=str(base.weights), vision=str(base.vision), models=models,
        out=out, flags=[*flags, "--model_parallel_size", "2"], folder=str(out / "run")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    with subprocess.Popen([*command, str(out / "worker.py")], env={**os.environ, "OMP_NUM_THREADS": "1"},
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as workers:
        try:
            errors = workers.communicate(timeout=180)[1]
        except subprocess.TimeoutExpired:
            workers.terminate()  # torchrun ends its processes; killed, it would leave them behind
            raise
    assert workers.returncode == 0, errors
    return [torch.load(out / f"{rank}.pt") for rank in range(n)]


def add_shards(base, counts) -> list[str]:
    """Beside the tiny base, the same in several shards, as Meta writes 13B. Returns all their names."""
    whole = load(base.weights / "tiny" / "consolidated.00.pth")
    names = ["tiny"]
    for count in counts:
        names.append(f"tiny{count}")
        folder = base.weights / names[-1]
        folder.mkdir(exist_ok=True)
        shutil.copy(base.weights / "tiny" / "params.json", folder)
        write_shards(whole, folder, count, embedding_dim=1)
    return names


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_file):
    """One of our own, beside which there will be others."""
    return write_base(tmp_path_factory.mktemp("base"), tokenizer_file)


@pytest.fixture(scope="module")
def two(base, scienceqa, tmp_path_factory):
    """One model on two processes, from one file, two, and four."""
    out = tmp_path_factory.mktemp("two")
    flags = run_flags(base, scienceqa, out / "run", "--dropout_prob", str(DROPOUT), "--dropout_lim", str(DROPOUT))
    return start(2, out, base, add_shards(base, (2, 4)), flags), out / "run"


@pytest.fixture(scope="module")
def alone(base, two):
    return losses_gradients_answers(base, "tiny")


@pytest.mark.parametrize("files", [0, 1, 2], ids=["one file", "a file a process", "two files a process"])
def test_loss_and_gradients_are_those_of_one_process(two, alone, files):
    """On both processes; dropout draws alike in both."""
    for process in two[0]:
        torch.testing.assert_close(process[files]["loss"], alone["loss"])
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(process[files]["gradients"][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_answers_are_those_of_one_process(two, alone):
    for process in two[0]:
        for result in process[:3]:
            assert torch.equal(result["answers"], alone["answers"])


def test_each_process_holds_half_of_every_matrix_and_cache(two, alone):
    for process in two[0]:
        assert 2 * process[0]["cache"] == alone["cache"]
        for name, shape in process[0]["held"].items():
            whole = alone["held"][name]
            share = 1 if len(whole) == 1 else 2  # norms are whole
            assert share * math.prod(shape) == math.prod(whole), name


def assert_same_run(folder: Path, alone: Path) -> None:
    """Losses, adapters, and what eval.py makes of the same checkpoint."""
    assert [line["train_closs"] for line in log(folder)] == pytest.approx(
        [line["train_closs"] for line in log(alone)], rel=1e-4)
    trained = load(alone / "checkpoint-2.pth")["model"]
    for name, tensor in load(folder / "checkpoint-2.pth")["model"].items():
        torch.testing.assert_close(tensor, trained[name], atol=2e-3, rtol=0, msg=name)
    shutil.copy(folder / "checkpoint-2.pth", alone)
    evaluation.main(evaluation.get_args_parser().parse_args(["--adapter_path", str(alone), "--device", "cpu"]))
    for name in ("preds.json", "generations.jsonl", "scores.json"):
        assert (folder / name).read_text() == (alone / name).read_text()


def test_run_is_that_of_one_process(two, base, scienceqa, tmp_path):
    """With dropout: processes that share a model draw alike, and as one that has it to itself."""
    run(base, scienceqa, tmp_path, "--dropout_prob", str(DROPOUT), "--dropout_lim", str(DROPOUT))
    assert_same_run(two[1], tmp_path)


def test_two_models_on_two_processes_each(base, scienceqa, tmp_path):
    """Together with data distributed: each model sees half of the samples."""
    still = ("--dropout_prob", "0")
    flags = run_flags(base, scienceqa, tmp_path / "run", *still)
    for gathered, least in start(4, tmp_path, base, [], [*flags, "--batch_size", "2"]):
        assert gathered == [0, 2] and least == 3  # one of each model; processes that share one agree
    run(base, scienceqa, tmp_path / "alone", *still)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_a_conversation_is_that_of_one_process(base, tmp_path):
    """Runs switched and compared, and a question that is refused, after which the processes still go together."""
    for seed, name in enumerate(("one", "other")):
        write_run(tmp_path / name, base, seed)
    lines = ["Which pond is warm?", "why " * 300, "And the river?", "/options north | south", "Which pond?",
             "/compare 1 2", "/run 2", "Which lizard?"]
    ours = [str(Path(demo.__file__)), "--runs", str(tmp_path), "--cli", "--device", "cpu", "--max_new_tokens", "9",
            "--max_seq_len", "120"]
    shared = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *ours, "--model_parallel_size", "2"]
    alone, both = (subprocess.run([sys.executable, *command], input="\n".join(lines), capture_output=True, text=True,
                                  timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}) for command in (ours, shared))
    assert both.returncode == 0, both.stderr
    assert both.stdout == alone.stdout and "tokens too many" in alone.stdout and alone.stdout.count("(A) north") == 3


# --- in this process, as if it were one of several ---

@pytest.fixture
def second_of(monkeypatch):
    def become(size: int) -> None:
        monkeypatch.setattr(distributed, "model_parallel_size", size)
        monkeypatch.setattr(tensor_parallel, "get_model_parallel_rank", lambda: 1)
    return become


def test_a_process_reads_its_own_file_alone(base, tmp_path, second_of):
    add_shards(base, [2])
    tensors = open_base(base.weights / "tiny2", 480).tensors
    own = tensors.shards[1]
    tensors.shards[0] = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}  # unreadable
    second_of(2)
    parts = tensor_parallel.ShardedTensors(tensors)
    assert len(parts) == len(own) - 1 and all(parts[name] is own[name] for name in parts)  # rope.freqs is computed


@pytest.mark.parametrize("shards", [1, 4])
def test_other_files_are_divided_as_meta_divides(base, shards, second_of):
    name, = add_shards(base, [shards])[1:]
    add_shards(base, [2])
    expected = load(base.weights / "tiny2" / "consolidated.01.pth")
    second_of(2)
    parts = tensor_parallel.ShardedTensors(open_base(base.weights / name, 480).tensors)
    assert all(torch.equal(parts[name], expected[name]) for name in parts)


def test_a_vocabulary_that_files_divide_is_divided_by_dimensions(second_of):
    """Llama 3."""
    whole = torch.randn(6, 8)
    second_of(2)
    parts = tensor_parallel.ShardedTensors(MetaShards([{"tok_embeddings.weight": half} for half in whole.chunk(2)], dim=8))
    assert torch.equal(parts["tok_embeddings.weight"], whole[:, 4:])


def described(**llama) -> LaVIN:
    with torch.device("meta"):
        return LaVIN(tiny_config(**llama), tiny_vit(), AdapterConfig())


@pytest.mark.parametrize("size, llama, what", [
    (4, {}, "2 key and value heads"), (3, {}, "4 heads"), (2, {"vocab_size": 51}, "51 pieces"),
    (2, {"d_ff": 45}, "45 hidden units")])
def test_what_cannot_be_divided_is_named(second_of, size, llama, what):
    second_of(size)
    with pytest.raises(UserError, match=f"--model_parallel_size {size} does not divide this model's {what}"):
        tensor_parallel.shard_model(described(**llama))


def test_the_fast_path_is_not_for_divided_models(second_of):
    second_of(2)
    model = described()
    tensor_parallel.shard_model(model)
    assert isinstance(speed_up(model, "fp8").llama.layers[0].attention.wq, tensor_parallel.ColumnParallelLinear)


def test_lack_of_memory_ends_a_shared_model(monkeypatch):
    """Half a pass later, the others would wait for ever."""
    monkeypatch.setattr(distributed, "model_parallel_size", 2)
    calls = []

    def model(batch):
        calls.append(batch)
        raise torch.OutOfMemoryError
    model.device = "cpu"
    with pytest.raises(torch.OutOfMemoryError):
        accumulate_with_oom_retry(model, [(example, 1.0) for example in mixed_examples()], 1e9, NO_SCALING)
    assert len(calls) == 1


def test_processes_and_flags_that_do_not_fit():
    for size in (0, 2):
        with pytest.raises(UserError, match=f"--model_parallel_size {size} does not divide the number of processes, 1"):
            distributed.init(size)
    with pytest.raises(UserError, match="--bits 16bit in place of fp8"):
        check_shared(train.get_args_parser().parse_args(["--model_parallel_size", "2", "--bits", "fp8"]))
