"""CUDA graphs: the choice of passes (CapturedModule.__call__), and the way they are captured and replayed.

Where a step is short, the host takes longer to launch its thousands of kernels than the GPU to run them. A CUDA graph
replays all of them with one launch. A graph always reads and writes the memory it was captured with, so inputs are
copied into static tensors before a replay, and outputs are copied out after it.

Notable:
- One graph for the forward and, in training, one for the backward pass of each bucket (a padded shape).
- The backward graph adds to the parameters' gradients itself: autograd takes the host longer for each than that.
- All buckets share one memory pool and their static buffers, so a pass must be backpropagated before the next one
  starts.
- Without a GPU nothing is captured: `capture` returns the function itself, so tests run the same code on a CPU.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from traceback import clear_frames

import torch
from torch import nn

from lavin.runtime.arithmetic import round_up

CAPTURE_STANCE = "eager_on_recompile"  # slow where it comes to that: tests set "fail_on_recompile"
MAX_GRAPHS = 128  # buckets kept; at 7B each takes 6 MiB outside the shared pool, and half a second to capture


def graph_pool(device: torch.device):
    """Returns a memory pool for graphs whose replays never overlap."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def capture(run: Callable[[], None], device: torch.device, pool=None) -> Callable[[], None]:
    """Captures `run` as a CUDA graph and returns its replay.

    `run` may only use tensors that stay at their address, must not synchronize with the host, and must be compiled
    already. The graph does not keep its inputs alive: the caller must.
    """
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    # Nothing can be compiled during capture; other threads may go on using the GPU.
    with torch.compiler.set_stance(CAPTURE_STANCE), \
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph.replay


class CapturedFunction:
    """A function of a tensor, whose shape stays the same, captured at its first call."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor):
        self.function, self.x = function, x.clone()
        self.replay = capture(self.run, x.device)

    def run(self) -> None:
        self.y = self.function(self.x)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.x.copy_(x)
        self.replay()
        return self.y.clone()


def pad_to_bucket(n: int) -> int:
    """Rounds n up, by at most 1/32 from 512 on and to a multiple of 16 below, so that few different sizes occur."""
    return round_up(n, max(16, 2 ** (n.bit_length() - 6)))


class StaticBuffers:
    """Named buffers that all buckets share; each gets a view of the largest one so far."""

    def __init__(self, device):
        self.device, self.flat = device, {}

    def take(self, name: str, shape, dtype) -> torch.Tensor:
        n = torch.Size(shape).numel()
        if name not in self.flat or self.flat[name].numel() < n:
            self.flat[name] = torch.zeros(n + n // 8, dtype=dtype, device=self.device)
        return self.flat[name][:n].view(shape)


class CapturedPass:
    """The captured forward and, where gradients are enabled, backward pass of one bucket.

    Subclasses create the static tensors in __init__ (`inputs`: those that need a gradient) and call `capture_graphs`;
    their `run` computes the output from them, and `load` copies a batch into those that are not `inputs`. `forward` and
    `backward` are then called in turn: `forward` writes `output`; `backward` reads `grad_output`, writes `grad_inputs`,
    and adds to the gradients of the owner's parameters.
    """

    inputs: list[torch.Tensor] = []

    def __init__(self, owner: "CapturedModule", bucket, x, *others):
        """Makes the static tensors; x and others are inputs that fall into the bucket."""
        raise NotImplementedError

    def run(self) -> torch.Tensor:
        raise NotImplementedError

    def load(self, x, *others) -> None:
        raise NotImplementedError

    def capture_graphs(self, owner: "CapturedModule", shape, dtype) -> None:
        """Captures both passes. `shape` and `dtype` are those of the output."""
        self.owner, take = owner, owner.buffers.take
        self.output = take("output", shape, dtype)
        if not torch.is_grad_enabled():
            self.forward = capture(self.run_inference, owner.device, owner.pool)
            return
        self.grad_output = take("grad_output", shape, dtype)
        self.grad_inputs = [take(f"grad_input {i}", x.shape, x.dtype) for i, x in enumerate(self.inputs)]
        self.grad_parameters = [grad.view(-1) for grad in owner.gradients()]
        self.forward = capture(self.run_forward, owner.device, owner.pool)
        self.backward = capture(self.run_backward, owner.device, owner.pool)

    def run_inference(self) -> None:
        self.output.copy_(self.run())

    def run_forward(self) -> None:
        with torch.enable_grad(), self.owner.parameter_aliases() as aliases:
            self.output_and_leaves = [self.run(), *self.inputs, *aliases]
        self.output.copy_(self.output_and_leaves[0].detach())

    def run_backward(self) -> None:
        (output, *leaves), self.output_and_leaves = self.output_and_leaves, []  # frees the saved activations
        grads = torch.autograd.grad(output, leaves, self.grad_output, materialize_grads=True)
        for static, grad in zip(self.grad_inputs, grads, strict=False):  # grads go on with those of the parameters
            static.copy_(grad)
        # through one contiguous tensor, since a single gradient that is not contiguous would have all added one by one
        flat = torch.cat([grad.flatten() for grad in grads[len(self.inputs):]])
        torch._foreach_add_(self.grad_parameters, flat.split([grad.numel() for grad in self.grad_parameters]))


class GraphReplay(torch.autograd.Function):
    """A CapturedPass as a differentiable function of its input x [n, ...] (None where it has none).

    x and its gradient are padded with zeros to the bucket's number of rows. The parameters are no arguments, since
    autograd would take the host longer for each than the graph, which adds up their gradients itself. `leaf` is any
    tensor that requires a gradient, so that there is a backward pass; it gets none.
    """

    @staticmethod
    def forward(ctx, captured, n, x, leaf):
        ctx.captured, ctx.n, ctx.pass_number = captured, n, captured.owner.num_passes
        for static in captured.inputs:
            copy_and_zero_pad(static.detach(), x)
        captured.forward()
        return captured.output[:n].clone()

    @staticmethod
    def backward(ctx, grad_output):
        captured = ctx.captured
        if ctx.pass_number != captured.owner.num_passes:
            raise RuntimeError("a captured pass must be backpropagated before the next one starts")
        copy_and_zero_pad(captured.grad_output, grad_output)
        captured.owner.gradients()
        captured.backward()
        return None, None, *([grad[:ctx.n].clone() for grad in captured.grad_inputs] or [None]), None


def copy_and_zero_pad(static: torch.Tensor, rows: torch.Tensor) -> None:
    static[:len(rows)].copy_(rows)
    static[len(rows):].zero_()


class CapturedModule:
    """Replaces a module's `forward`: passes are captured per bucket and replayed, those of training and those that
    `captures_inference` names.

    The first pass of each kind runs uncaptured, since it compiles: for a second one next to the captured ones, memory
    might not suffice. Subclasses define `pass_class` and `bucket` (hashable, from the inputs of forward).
    """

    pass_class: type[CapturedPass]

    def __init__(self, module: nn.Module, device: torch.device):
        self.uncaptured, self.module, self.device = module.forward, module, device
        self.leaf = torch.zeros((), device=device, requires_grad=True)  # see GraphReplay
        self.num_passes = 0
        self.bind()
        module.forward = self

    def bind(self) -> None:
        """Takes the trained parameters that the module has now, and drops what was captured with others."""
        self.owners = [(part, name) for part in self.module.modules()
                       for name, p in part.named_parameters(recurse=False) if p.requires_grad]
        self.parameters = [getattr(*owner) for owner in self.owners]
        self.compiled: set[Hashable] = set()  # (training, kind)
        self.free()

    def bucket(self, *inputs):
        raise NotImplementedError

    def kind(self, *inputs) -> Hashable:
        """Returns the kind of the inputs: those of another kind need another compiled program."""
        return None

    def captures_inference(self, *inputs) -> bool:
        return False

    def free(self) -> None:
        """Drops all graphs and the memory they hold."""
        self.buffers, self.pool = StaticBuffers(self.device), graph_pool(self.device)
        self.static_gradients: list[torch.Tensor] = []
        self.graphs: dict[Hashable, CapturedPass] = {}  # by (training, bucket), the last used at the end

    def __call__(self, x, *others):
        training = self.module.training and torch.is_grad_enabled() and not self.module.gradient_checkpointing
        inference = not (self.module.training or torch.is_grad_enabled()) and self.captures_inference(x, *others)
        if not training and not inference:
            return self.uncaptured(x, *others)
        self.num_passes += 1
        kind = training, self.kind(x, *others)
        if kind not in self.compiled:
            out = self.uncaptured(x, *others)
            self.compiled.add(kind)  # only now: the pass may have run out of memory
            return out
        captured = self.captured_pass(training, x, *others)
        captured.load(x, *others)
        if training:
            return GraphReplay.apply(captured, len(x), x if captured.inputs else None, self.leaf)
        for static in captured.inputs:
            copy_and_zero_pad(static, x)
        captured.forward()
        return captured.output[:len(x)].clone()

    def captured_pass(self, training: bool, *inputs) -> CapturedPass:
        key = training, self.bucket(*inputs)
        captured = self.graphs.pop(key, None) or self.capture_bucket(key[1], *inputs)
        self.graphs[key] = captured  # at the end
        if len(self.graphs) > MAX_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return captured

    def gradients(self) -> list[torch.Tensor]:
        """Returns the parameters' gradients, which stay the same tensors, since graphs add to them.

        Where a parameter's gradient was dropped or replaced, its value, or zero, is put into that tensor.
        """
        if not self.static_gradients:
            self.static_gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for p, static in zip(self.parameters, self.static_gradients, strict=True):
            if p.grad is not static:
                static.zero_() if p.grad is None else static.copy_(p.grad)
                p.grad = static
        return self.static_gradients

    @contextmanager
    def parameter_aliases(self) -> Iterator[list[nn.Parameter]]:
        """Swaps in new leaf tensors that share the parameters' memory.

        Autograd ties a leaf's gradient accumulation to the stream of its first use while any graph that uses it lives,
        and capture happens on a stream of its own.
        """
        aliases = [nn.Parameter(p.detach()) for p in self.parameters]
        self.set_parameters(aliases)
        try:
            yield aliases
        finally:
            self.set_parameters(self.parameters)

    def set_parameters(self, leaves: list) -> None:
        for (part, name), leaf in zip(self.owners, leaves, strict=True):
            setattr(part, name, leaf)

    def capture_bucket(self, bucket, *inputs) -> CapturedPass:
        try:
            return self.pass_class(self, bucket, *inputs)
        except torch.OutOfMemoryError as error:  # the caller may free all graphs and retry with smaller passes
            clear_frames(error.__traceback__)  # whose locals hold this pass's tensors
            raise torch.OutOfMemoryError(str(error)) from None
