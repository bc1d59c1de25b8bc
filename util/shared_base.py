"""The base model of a process, which one run after another gets with adapters of its own."""

import gc

from lavin.fast.captured_models import bind_graphs
from lavin.fast.speed_up import forget_programs, speed_up
from lavin.mm_adapter import AdapterConfig, AdapterShape
from lavin.model import LaVIN
from lavin.runtime import distributed
from lavin.runtime.flags import flags_of
from lavin.tokenizer import Tokenizer
from lavin.weights.load import exchange_adapters, load_base
from util.data.checksums import file_states
from util.fingerprint import frozen_files
from util.flags import BaseSettings, Execution

# settings of adapters that change the programs which torch.compile makes of a model
COMPILED_IN = tuple(name for name, declared in flags_of(AdapterShape).items() if not declared.reloadable)


class SharedBase:
    """Lends LLaMA, the ViT and the tokenizer to one run after another, fused, quantized and compiled as they are.

    Only one run at a time uses the model: what the run before it has trained is replaced.
    """

    def __init__(self) -> None:
        self.loaded: tuple[LaVIN, Tokenizer] | None = None
        self.key: tuple = ()  # all that a run must have in common with the one before it to get its base
        self.shape: tuple = ()  # of the adapters for which the model was compiled

    def lend(self, base: BaseSettings, execution: Execution, adapter: AdapterConfig, device, dtype, max_seq_len: int,
             drop_path: float = 0.0, tokenizer_path: str | None = None) -> tuple[LaVIN, Tokenizer]:
        """The model with fresh adapters, which are those that `load_base` would make now, and its tokenizer.

        The files are read where the process has another base or none, or where they have changed.
        """
        settings = (base, execution.compile, execution.cuda_graphs, device, dtype, tokenizer_path,
                    distributed.model_parallel_size)
        files = file_states(frozen_files(base, tokenizer_path))
        shape = tuple(getattr(adapter, name) for name in COMPILED_IN), drop_path
        if self.loaded and (settings, files) == self.key:
            if shape != self.shape:
                forget_programs()
            exchange_adapters(self.loaded[0], adapter, drop_path, max_seq_len)
            bind_graphs(self.loaded[0])
        else:
            self.release()
            self.loaded = load_base(base.llama_model_path, base.llm_model, base.vision_model, adapter, device, dtype,
                                    drop_path, tokenizer_path, base.use_vicuna, base.bits, max_seq_len)
            speed_up(self.loaded[0], base.bits, execution.compile, execution.cuda_graphs)
            # the states before reading; files that timm fetched meanwhile have their states after it
            self.key = settings, {**file_states(frozen_files(base, tokenizer_path)), **files}
        self.shape = shape
        return self.loaded

    def release(self) -> None:
        """Frees the memory of a base before the next one is read."""
        if self.loaded:
            self.loaded, self.key = None, ()
            forget_programs()
            gc.collect()
