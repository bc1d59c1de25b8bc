"""CUDA graphs: what one pass or step asks of the GPU, recorded once for each size and launched as one.

Where a step is short, the host takes longer to launch its thousands of kernels than the GPU to run them. A graph reads
and writes where it did when it was recorded, so that its inputs are copied there and its results from there.

Notable:
- Training: LLaMA and the ViT have graphs of their own, a forward and a backward one for each size. Sizes of LLaMA's are
  rounded up, and what is added is a document of its own that nobody reads. So gradients are those of the plain pass.
- All sizes share their buffers and, in one pool, the memory in between; hence one pass at a time.
- Without a GPU nothing is recorded: the same code runs step by step, which is how the tests see it.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from traceback import clear_frames

import torch
from torch import nn

from lavin.llama import PackedPlan
from lavin.mm_adapter import Routing
from lavin.model import MODALITIES


MOST_SIZES = 128  # one takes 6 MiB of its own at 7B, and half a second to record again


def graph_pool(device: torch.device):
    """Memory that graphs may share which never run between one another's launches."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def record(run: Callable[[], None], device: torch.device, pool=None) -> Callable[[], None]:
    """`run` as one launch. It must read and write tensors that stay where they are, and wait for nothing.

    A graph does not keep what it reads: the caller must.
    """
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    # nothing can be compiled meanwhile, and other threads may do what they like
    with torch.compiler.set_stance("eager_on_recompile"), \
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay


def roomy(n: int) -> int:
    """n rounded up, by at most 1/32 from 512 on and to a multiple of 16 below, so that few sizes occur."""
    step = max(16, 1 << max(n.bit_length() - 6, 0))
    return n + -n % step


class Buffers:
    """Tensors by name that all sizes share: views of the largest so far."""

    def __init__(self, device):
        self.device, self.flat = device, {}

    def take(self, name: str, shape, dtype) -> torch.Tensor:
        n = torch.Size(shape).numel()
        if name not in self.flat or self.flat[name].numel() < n:
            self.flat[name] = torch.zeros(n + n // 8, dtype=dtype, device=self.device)
        return self.flat[name][:n].view(shape)


class Recorded:
    """A pass of one size, `run()`, and the gradients of what it returns.

    Subclasses make static tensors, those `inputs` whose gradients are wanted, and `prepare` the rest; `run` reads them,
    and `load` fills all but the inputs. The two launches take turns: `forward` writes `output`; `backward` reads `slope` and
    writes `slopes`, of the inputs, and `gradients`, of the trained parameters.
    """

    inputs: list = []

    def prepare(self, stack: "Stack", shape, dtype) -> None:
        self.stack, take = stack, stack.buffers.take
        self.output, self.slope = (take(name, shape, dtype) for name in ("output", "slope"))
        self.slopes = [take(f"slope of {i}", x.shape, x.dtype) for i, x in enumerate(self.inputs)]
        self.gradients = take("gradients", [sum(p.numel() for p in stack.parameters)], torch.float32)
        self.forward = record(self.run_forward, stack.device, stack.pool)
        self.backward = record(self.run_backward, stack.device, stack.pool)

    def run_forward(self) -> None:
        with torch.enable_grad(), self.stack.aliases() as aliases:
            self.live = self.run(), [*self.inputs, *aliases]
        self.output.copy_(self.live[0].detach())

    def run_backward(self) -> None:
        (output, wanted), self.live = self.live, None  # frees what it kept
        found = torch.autograd.grad(output, wanted, self.slope, materialize_grads=True)
        for slope, seen in zip(self.slopes, found):
            slope.copy_(seen)
        torch.cat([seen.flatten() for seen in found[len(self.inputs):]], out=self.gradients)


class Launch(torch.autograd.Function):
    """A recorded pass as a function of its input, None where it has none, and of the trained parameters.

    What the input has fewer rows than recorded is filled up with zeros.
    """

    @staticmethod
    def forward(ctx, recorded, n, x, *parameters):
        ctx.recorded, ctx.n, ctx.turn = recorded, n, recorded.stack.passes
        for static in recorded.inputs:
            fill(static.detach(), x)
        recorded.forward()
        return recorded.output[:n].clone()

    @staticmethod
    def backward(ctx, slope):
        recorded = ctx.recorded
        if ctx.turn != recorded.stack.passes:
            raise RuntimeError("a recorded pass must go backward before the next one goes forward")
        fill(recorded.slope, slope)
        recorded.backward()
        parameters = recorded.stack.parameters
        parts = recorded.gradients.clone().split([p.numel() for p in parameters])
        return (None, None, *([slope[:ctx.n].clone() for slope in recorded.slopes] or [None]),
                *[part.view_as(p) for part, p in zip(parts, parameters)])


def fill(static: torch.Tensor, rows: torch.Tensor) -> None:
    static[:len(rows)].copy_(rows)
    static[len(rows):].zero_()


class Stack:
    """A module whose training passes are recorded, but for the first of each program, which compiles it.

    Replaces the module's `forward`. Subclasses say of what `kind` its passes are, what `size` one is of, and which sizes
    share a `program`.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self.plain, self.module, self.device = module.forward, module, device
        self.owners = [(part, name) for part in module.modules() for name, p in part.named_parameters(recurse=False)
                       if p.requires_grad]
        self.parameters = [getattr(*owner) for owner in self.owners]
        self.passes, self.compiled = 0, set()
        self.forget()
        module.forward = self

    def forget(self) -> None:
        """Gives back the memory of all that was recorded."""
        self.buffers, self.pool, self.sizes = Buffers(self.device), graph_pool(self.device), {}

    def __call__(self, x, *others):
        if not (torch.is_grad_enabled() and self.module.training) or self.module.gradient_checkpointing:
            return self.plain(x, *others)
        self.passes += 1
        size = self.size(x, *others)
        if (program := self.program(size)) not in self.compiled:
            out = self.plain(x, *others)
            self.compiled.add(program)  # not before: memory may not do for this size
            return out
        recorded = self.sizes.pop(size, None) or self.add(size, x.dtype)
        self.sizes[size] = recorded  # the latest last
        if len(self.sizes) > MOST_SIZES:
            del self.sizes[next(iter(self.sizes))]
        recorded.load(x, *others)
        return Launch.apply(recorded, len(x), x if recorded.inputs else None, *self.parameters)

    @contextmanager
    def aliases(self):
        """Other leaves of the same memory in the parameters' places: autograd ties a leaf to the stream where it was
        first used, while a pass that is not yet forgotten uses it, and a graph is recorded on a stream of its own."""
        aliases = [nn.Parameter(p.detach()) for p in self.parameters]
        self.put(aliases)
        try:
            yield aliases
        finally:
            self.put(self.parameters)

    def put(self, leaves: list) -> None:
        for (part, name), leaf in zip(self.owners, leaves):
            setattr(part, name, leaf)

    def add(self, size, dtype) -> Recorded:
        try:
            return self.kind(self, size, dtype)
        except torch.OutOfMemoryError as error:  # the caller may forget all and try smaller passes
            clear_frames(error.__traceback__)  # which hold what there is of this one
            raise torch.OutOfMemoryError(str(error)) from None


class VisionPass(Recorded):
    def __init__(self, stack, size, dtype):
        vision = stack.module
        self.images = stack.buffers.take("images", size, dtype)
        features = len(vision.vit.blocks) // vision.every
        self.prepare(stack, (size[0], features, vision.width), vision.vit.patch_embed.proj.weight.dtype)

    def run(self):
        return self.stack.plain(self.images)

    def load(self, images):
        self.images.copy_(images)


class RecordedVision(Stack):
    kind = VisionPass

    def size(self, images):
        return images.shape

    def program(self, size):
        """The compiler may want another one for few pictures, and trying costs little here."""
        return size


class LlamaPass(Recorded):
    """What a pass leaves over of this size is a document behind the others."""

    def __init__(self, stack, size, dtype):
        (rows, count, longest), dim = size, stack.module.config.dim
        self.plan = PackedPlan([longest] + [1] * (count - 1), stack.device)  # any, of so many documents
        zeros = partial(torch.zeros, rows, dtype=torch.long, device=stack.device)
        self.plan.documents, self.plan.places, self.plan.positions = zeros(), zeros(), zeros()
        self.routing = Routing(torch.zeros(rows, MODALITIES, device=stack.device))
        self.inputs = [stack.buffers.take("x", [rows, dim], dtype).detach().requires_grad_()]
        self.prepare(stack, (rows, dim), dtype)

    def run(self):
        # a copy, since what is compiled for the first pass is not for views
        return self.stack.plain(self.inputs[0].clone(), self.plan, self.routing)

    def load(self, x, plan, routing):
        n, static = len(x), self.plan
        rows = len(static.documents)
        static.documents[:n].copy_(plan.documents)
        static.documents[n:] = plan.count
        for places, given in ((static.places, plan.places), (static.positions, plan.positions)):
            places[:n].copy_(given)
            torch.arange(rows - n, out=places[n:])
        static.offsets[:plan.count + 1].copy_(plan.offsets)
        static.offsets[plan.count + 1:] = rows
        fill(self.routing.rows, routing.rows)


class RecordedLlama(Stack):
    kind = LlamaPass

    def size(self, x, plan, routing):
        """Rows, documents and the longest one's tokens, rounded up; what is added is a document, too."""
        rows, count = roomy(len(x)), plan.count + 1
        longest = max(plan.longest, rows - len(x))
        return rows, count + -count % 4, longest + -longest % 256

    def program(self, size):
        """One for all: a plain pass beside recorded ones might not find enough memory."""


def forget_recorded(model) -> None:
    """Gives back the memory of recorded training passes, if there are any."""
    for module in (model.llama, model.vision):
        if isinstance(module.forward, Stack):
            module.forward.forget()


def record_training(model) -> None:
    """In place: from now on training passes are recorded."""
    RecordedLlama(model.llama, model.device)
    RecordedVision(model.vision, model.device)
