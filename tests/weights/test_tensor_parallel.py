"""Tensor parallelism: loss, gradients, runs and answers equal those of one process; each rank loads its shard."""

import io
import json
import math
import shutil
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch

import demo
import eval as evaluation
import train
from forked import in_processes, joined
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
from tiny_base import write_base
from tiny_runs import NO_SCALING, load_checkpoint, read_log, run_flags, train_run, write_run
from tiny_weights import write_shards
from util.flags import check_shared
from util.training.accumulation import accumulate_with_oom_retry

tensor_parallel = pytest.importorskip("lavin.weights.tensor_parallel")
DROPOUT = 0.3


def losses_gradients_answers(base, llm_model: str) -> dict:
    """Results with random adapters and dropout on base weights loaded from files, in any number of processes."""
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
            "shapes": {name: list(p.shape) for name, p in model.llama.named_parameters() if "adapter" not in name}}


def run_two_per_model(n: int, out: Path, base, models: list[str], flags: list[str]) -> list:
    """Results of each of n processes, two of which share a model: those of each base, then what they have gathered.
    They train the run in out/run."""
    def work():
        with joined(2) as (rank, _):
            results = [losses_gradients_answers(base, name) for name in models]
            results += [distributed.gather_data_parallel(rank), distributed.all_min(rank + 3)]
            train.main(train.get_args_parser().parse_args([*flags, "--model_parallel_size", "2"]))
            torch.distributed.barrier()  # rank 0 writes the checkpoint
            evaluation.main(evaluation.get_args_parser().parse_args([
                "--adapter_path", str(out / "run"), "--device", "cpu", "--model_parallel_size", "2"]))
        return results
    return in_processes(work, n)


def add_shards(base, counts) -> list[str]:
    """Add copies of the tiny base in several shards, the format of Meta's 13B; returns the names of all bases."""
    tensors = load_checkpoint(base.weights / "tiny" / "consolidated.00.pth")
    names = ["tiny"]
    for count in counts:
        names.append(f"tiny{count}")
        folder = base.weights / names[-1]
        folder.mkdir(exist_ok=True)
        shutil.copy(base.weights / "tiny" / "params.json", folder)
        write_shards(tensors, folder, count, embedding_dim=1)
    return names


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_file):
    """A base of this module, to which tests add sharded copies."""
    return write_base(tmp_path_factory.mktemp("base"), tokenizer_file)


@pytest.fixture(scope="module")
def two_processes(base, scienceqa, tmp_path_factory):
    """Results of one model on two processes, loaded from one, two and four files; and the folder of their run."""
    out = tmp_path_factory.mktemp("two")
    flags = run_flags(base, scienceqa, out / "run", "--dropout_prob", str(DROPOUT), "--dropout_lim", str(DROPOUT))
    return run_two_per_model(2, out, base, add_shards(base, (2, 4)), flags), out / "run"


@pytest.fixture(scope="module")
def one_process(base, two_processes):
    return losses_gradients_answers(base, "tiny")


@pytest.mark.parametrize("base_index", [0, 1, 2], ids=["one file", "one file per process", "two files per process"])
def test_loss_and_gradients_equal_those_of_one_process(two_processes, one_process, base_index):
    """Both ranks are compared, which must draw the same dropout masks."""
    for results in two_processes[0]:
        torch.testing.assert_close(results[base_index]["loss"], one_process["loss"])
        for name, gradient in one_process["gradients"].items():
            torch.testing.assert_close(results[base_index]["gradients"][name], gradient, atol=1e-5, rtol=1e-4,
                                       msg=name)


def test_answers_equal_those_of_one_process(two_processes, one_process):
    for results in two_processes[0]:
        for result in results[:3]:
            assert torch.equal(result["answers"], one_process["answers"])


def test_each_process_holds_half_of_every_matrix_and_of_the_kv_cache(two_processes, one_process):
    for results in two_processes[0]:
        assert 2 * results[0]["cache"] == one_process["cache"]
        for name, shape in results[0]["shapes"].items():
            full_shape = one_process["shapes"][name]
            num_shards = 1 if len(full_shape) == 1 else 2  # norms are replicated
            assert num_shards * math.prod(shape) == math.prod(full_shape), name


def assert_same_run(folder: Path, one_process: Path) -> None:
    """Asserts that losses and adapters are the same, and the evaluation of one checkpoint, too."""
    assert [line["train_closs"] for line in read_log(folder)] == pytest.approx(
        [line["train_closs"] for line in read_log(one_process)], rel=1e-4)
    trained = load_checkpoint(one_process / "checkpoint-2.pth")["model"]
    for name, tensor in load_checkpoint(folder / "checkpoint-2.pth")["model"].items():
        torch.testing.assert_close(tensor, trained[name], atol=2e-3, rtol=0, msg=name)
    shutil.copy(folder / "checkpoint-2.pth", one_process)
    evaluation.main(evaluation.get_args_parser().parse_args(["--adapter_path", str(one_process), "--device", "cpu"]))
    for name in ("preds.json", "generations.jsonl", "scores.json"):
        assert (folder / name).read_text() == (one_process / name).read_text()


def test_run_equals_that_of_one_process(two_processes, base, scienceqa, tmp_path):
    """The run has dropout: all ranks of a model draw the same masks as a single process."""
    train_run(base, scienceqa, tmp_path, "--dropout_prob", str(DROPOUT), "--dropout_lim", str(DROPOUT))
    assert_same_run(two_processes[1], tmp_path)


def test_two_models_on_two_processes_each(base, scienceqa, tmp_path):
    """Combined with data parallelism: each model sees half of the samples."""
    no_dropout = ("--dropout_prob", "0")
    flags = run_flags(base, scienceqa, tmp_path / "run", *no_dropout)
    for gathered, minimum in run_two_per_model(4, tmp_path, base, [], [*flags, "--batch_size", "2"]):
        assert gathered == [0, 2] and minimum == 3  # one rank of each model; the minimum is over all ranks
    train_run(base, scienceqa, tmp_path / "one_process", *no_dropout)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    assert_same_run(tmp_path / "run", tmp_path / "one_process")


def test_a_conversation_equals_that_of_one_process(base, tmp_path):
    """Switches and compares runs, and asks a question that is refused, after which the ranks must stay in sync."""
    for seed, name in enumerate(("one", "other")):
        write_run(tmp_path / name, base, seed)
    lines = ["Which pond is warm?", "why " * 300, "And the river?", "/options north | south", "Which pond?",
             "/compare 1 2", "/run 2", "Which lizard?"]

    def chat(n: int) -> str:
        sys.stdin = io.StringIO("\n".join(lines))
        with redirect_stdout(io.StringIO()) as said:
            demo.main(demo.get_args_parser().parse_args([
                "--runs", str(tmp_path), "--cli", "--device", "cpu", "--max_new_tokens", "9", "--max_seq_len", "120",
                "--model_parallel_size", str(n)]))
        return said.getvalue()
    one_process, = in_processes(partial(chat, 1), 1)
    assert in_processes(partial(chat, 2), 2) == [one_process, ""]
    assert "tokens too many" in one_process and one_process.count("(A) north") == 3


# --- In this process, with a mocked rank ---

@pytest.fixture
def become_rank_one_of(monkeypatch):
    def become(size: int) -> None:
        monkeypatch.setattr(distributed, "model_parallel_size", size)
        monkeypatch.setattr(tensor_parallel, "get_model_parallel_rank", lambda: 1)
    return become


def test_a_rank_reads_only_its_own_shard(base, tmp_path, become_rank_one_of):
    add_shards(base, [2])
    tensors = open_base(base.weights / "tiny2", 480).tensors
    own_shard = tensors.shards[1]
    tensors.shards[0] = {name: torch.empty_like(tensor, device="meta") for name, tensor in own_shard.items()}  # no data
    become_rank_one_of(2)
    sharded = tensor_parallel.ShardedTensors(tensors)
    assert len(sharded) == len(own_shard) - 1  # rope.freqs is not used
    assert all(sharded[name] is own_shard[name] for name in sharded)


@pytest.mark.parametrize("num_files", [1, 4])
def test_other_numbers_of_files_are_resharded_as_meta_shards(base, num_files, become_rank_one_of):
    base_name, = add_shards(base, [num_files])[1:]
    add_shards(base, [2])
    expected = load_checkpoint(base.weights / "tiny2" / "consolidated.01.pth")
    become_rank_one_of(2)
    sharded = tensor_parallel.ShardedTensors(open_base(base.weights / base_name, 480).tensors)
    assert all(torch.equal(sharded[name], expected[name]) for name in sharded)


def test_embedding_sharded_by_vocabulary_is_resharded_by_dimension(become_rank_one_of):
    """Llama 3's files split the embedding by vocabulary."""
    embedding = torch.randn(6, 8)
    become_rank_one_of(2)
    files = MetaShards([{"tok_embeddings.weight": half} for half in embedding.chunk(2)], dim=8)
    sharded = tensor_parallel.ShardedTensors(files)
    assert torch.equal(sharded["tok_embeddings.weight"], embedding[:, 4:])


def meta_model(**llama) -> LaVIN:
    with torch.device("meta"):
        return LaVIN(tiny_config(**llama), tiny_vit(), AdapterConfig())


@pytest.mark.parametrize("size, llama, words", [
    (4, {}, "2 key and value heads"), (3, {}, "4 heads"), (2, {"vocab_size": 51}, "51 pieces"),
    (2, {"d_ff": 45}, "45 hidden units")])
def test_error_names_what_cannot_be_sharded(become_rank_one_of, size, llama, words):
    become_rank_one_of(size)
    with pytest.raises(UserError, match=f"--model_parallel_size {size} does not divide this model's {words}"):
        tensor_parallel.shard_model(meta_model(**llama))


def test_speed_up_keeps_sharded_layers(become_rank_one_of):
    become_rank_one_of(2)
    model = meta_model()
    tensor_parallel.shard_model(model)
    assert isinstance(speed_up(model, "fp8").llama.layers[0].attention.wq, tensor_parallel.ColumnParallelLinear)


def test_out_of_memory_is_not_retried_with_model_parallelism(monkeypatch):
    """Other ranks would wait forever in their collective operations."""
    monkeypatch.setattr(distributed, "model_parallel_size", 2)
    calls = []

    def model(batch):
        calls.append(batch)
        raise torch.OutOfMemoryError
    model.device = "cpu"
    with pytest.raises(torch.OutOfMemoryError):
        accumulate_with_oom_retry(model, [(example, 1.0) for example in mixed_examples()], 1e9, NO_SCALING)
    assert len(calls) == 1


def test_invalid_model_parallel_size_and_flags():
    for size in (0, 2):
        with pytest.raises(UserError, match=f"--model_parallel_size {size} does not divide the number of processes, 1"):
            distributed.init(size)
    with pytest.raises(UserError, match="--bits 16bit in place of fp8"):
        check_shared(train.get_args_parser().parse_args(["--model_parallel_size", "2", "--bits", "fp8"]))
