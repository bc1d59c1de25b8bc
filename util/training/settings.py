"""The flags of train.py, and the settings that they become: parsed once, completed, checked, and handed on in parts."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from lavin.mm_adapter import AdapterConfig, dropout_schedule
from lavin.runtime.errors import UserError
from lavin.runtime.flags import FlagGroup, Flags, Parser, Role, flag
from lavin.runtime.schema import Count, FileName, NonNegative, PathText, Positive, Probability, Seed
from util.data.settings import TrainingData
from util.flags import BaseSettings, Execution, check_shared
from util.lr_sched import LearningRate, check_schedule, derive_learning_rate
from util.trackers import Names

BatchSize = Annotated[int, Field(ge=1, le=65536)]
EFFECTIVE_BATCH = "effective_batch"  # the entry of recipes and studies that --batch_size and --accum_iter make


@dataclass(frozen=True)
class Optimization(FlagGroup):
    """The way that each optimizer step is made, beside its learning rate."""

    title: ClassVar[str] = "optimization"
    batch_size: BatchSize = flag(4, "samples per micro-batch on one GPU", Role.RECIPE, stated_as=EFFECTIVE_BATCH,
                                 named=False)
    accum_iter: BatchSize = flag(1, "micro-batches per optimizer step", Role.RECIPE, stated_as=EFFECTIVE_BATCH,
                                 named=False)
    loss_norm: str = flag(
        "batch", "mean over the answer tokens of the optimizer step; microbatch: mean over micro-batches of "
                 "--batch_size samples of the mean over each one's answer tokens, as published", Role.RECIPE,
        choices=("batch", "microbatch"))
    weight_decay: NonNegative = flag(0.02, "on matrices; biases and vectors have none", Role.RECIPE)
    clip_grad: Positive | None = flag(None, "maximum gradient norm (default: no clipping)", Role.RECIPE)
    drop_path: Probability = flag(0.0, "stochastic depth of LLaMA's layers", Role.RECIPE)
    seed: Seed = flag(0, "of the initial adapters, the order of samples and the dropout masks", Role.RECIPE,
                      named=False)
    gradient_checkpointing: bool = flag(
        False, "recompute layers in the backward pass, without CUDA graphs: less memory, much slower", Role.EXECUTION)

    def effective_batch(self, world: int) -> int:
        """Samples of one optimizer step, over all processes. world: the number of data-parallel processes."""
        return self.batch_size * self.accum_iter * world

    def entries(self, world: int) -> dict[str, int]:
        """The entries of a recipe and a study that stand for --batch_size and --accum_iter.

        They are the samples of one optimizer step and, where the loss is a mean over micro-batches, of a micro-batch.
        """
        of_micro_batch = {"batch_size": self.batch_size} if self.loss_norm == "microbatch" else {}
        return {EFFECTIVE_BATCH: self.effective_batch(world), **of_micro_batch}


@dataclass(frozen=True)
class RunSettings(FlagGroup):
    """The run's folder, and what is kept there."""

    title: ClassVar[str] = "run"
    output_dir: FileName = flag("./output_dir", "the run's folder", Role.RUN)
    overwrite: bool = flag(False, "replace a run of another recipe in --output_dir", Role.RUN)
    resume: PathText = flag("", "go on with this run, by its own flags, or back to one of its checkpoints", Role.RUN,
                        metavar="RUN")
    stop_after_epoch: Count | None = flag(
        None, "stop after this many epochs of the whole schedule; the same command without it goes on", Role.RUN)
    save_every_minutes: Positive = flag(10.0, "time between checkpoints in the middle of an epoch", Role.EXECUTION)
    keep_last: Count | None = flag(None, "checkpoints of whole epochs to keep (default: all)", Role.EXECUTION)
    report_to: Names = flag(
        "", "trackers that show the run while it trains: tensorboard, wandb, mlflow, with commas between them",
        Role.EXECUTION)
    log_dir: PathText | None = flag(None, "folder of TensorBoard's events (default: tensorboard in the run's folder)",
                                    Role.EXECUTION)

    @property
    def trackers(self) -> str:
        """The names of --report_to, among which --log_dir alone asks for TensorBoard."""
        names = self.report_to.split(",") if self.report_to else []
        return ",".join(names if not self.log_dir or "tensorboard" in names else [*names, "tensorboard"])


GROUPS = (RunSettings, LearningRate, Optimization, AdapterConfig, BaseSettings, TrainingData, Execution)


@dataclass(frozen=True)
class TrainSettings:
    """All that train.py was told, in parts."""

    run: RunSettings
    schedule: LearningRate
    optimization: Optimization
    adapter: AdapterConfig
    base: BaseSettings
    data: TrainingData
    execution: Execution

    @classmethod
    def of(cls, args: Flags, world: int) -> "TrainSettings":
        """Completes the parsed flags (in place) by the number of data-parallel processes, and checks them.

        Raises UserError for combinations of flags that do not work, before anything is loaded.
        """
        derive_learning_rate(args, Optimization.of(args).effective_batch(world))
        check_shared(args)
        try:
            dropout_schedule(1, args.dropout_prob, args.dropout_var, args.dropout_lim)
            check_schedule(args)
        except ValueError as error:
            raise UserError(str(error)) from error
        return cls(RunSettings.of(args), LearningRate.of(args), Optimization.of(args), AdapterConfig.of(args),
                   BaseSettings.of(args), TrainingData.of(args), Execution.of(args))

    @property
    def flags(self) -> dict[str, Any]:
        """All flags by name, as run folders and checkpoints hold them."""
        return {name: value for group in vars(self).values() for name, value in asdict(group).items()}


def get_args_parser() -> Parser:
    return Parser("train.py", "Fine-tunes LaVIN on ScienceQA, or on instructions with --do_pretrain.", *GROUPS)
