"""LaVIN: modality token + image features + text -> loss or hidden states.

Notable:
- A pass is one packed row: the two modality tokens first, each a document of its own, then the samples. So padding
  does not exist, no position attends to a modality token, and the whole batch shares two router inputs a layer.
- Only names with `adapter` train; everything else is frozen, in the compute dtype.
"""

from dataclasses import dataclass

import torch
from torch import nn

from lavin.llama import Llama, LlamaConfig, PackedPlan
from lavin.loss import answer_loss
from lavin.mm_adapter import HOME, AdapterConfig, Routing, VisualProjection, adapt_vit, adapted_block
from lavin.precision import send
from lavin.tokenizer import IMAGE_SLOT, Example
from lavin.vision import VisionEncoder

MODALITIES = 2  # text, image


@dataclass
class Batch:
    """Samples behind one another.

    ids [N], 0 in image slots; lengths and modality [B], one a sample; images [I, 3, S, S] uint8, of the samples that
    have one, in order; slots [I * n_prompt]: rows of the image embeddings; source [M]: rows whose next token is to be
    predicted; target [M]: those tokens; factor [M] float32: of each in the loss.
    """

    ids: torch.Tensor
    lengths: list[int]
    modality: torch.Tensor
    images: torch.Tensor | None
    slots: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    factor: torch.Tensor

    def to(self, device) -> "Batch":
        return Batch(**{name: send(value, device) if isinstance(value, torch.Tensor) else value
                        for name, value in vars(self).items()})


def pack(examples: list[Example], factors: list[float] | None = None) -> Batch:
    """Packs examples into one row. factors: of each example in the loss, 1 where they are left out."""
    ids, source, images, factor = [], [], [], []
    for example, f in zip(examples, factors or [1.0] * len(examples)):
        begin = len(ids)
        ids += example.ids
        source += range(begin + example.answer_start - 1, len(ids) - 1)
        factor += [f] * (len(source) - len(factor))
        if example.image is not None:
            images.append(example.image)
    ids, source = torch.tensor(ids), torch.tensor(source, dtype=torch.long)
    slots = ids == IMAGE_SLOT
    return Batch(ids.masked_fill(slots, 0), [len(example.ids) for example in examples],
                 torch.tensor([int(example.image is not None) for example in examples]),
                 torch.stack(images) if images else None, slots.nonzero()[:, 0], source, ids[source + 1],
                 torch.tensor(factor, dtype=torch.float32))


class LaVIN(nn.Module):
    """LLaMA and a ViT, both frozen, with the trained parts between and inside them."""

    def __init__(self, config: LlamaConfig, vit: nn.Module, adapter: AdapterConfig, drop_path: float = 0.0):
        super().__init__()
        self.adapter = adapter
        self.answer_loss = answer_loss  # may be replaced (lavin/fast.py, lavin/tensor_parallel.py)
        self.records_graphs = False  # whether answering is recorded (lavin/fast.py, lavin/recording.py)
        self.session = None  # of the last answers (lavin/generation.py)
        self.llama = Llama(config, adapted_block(adapter, config.n_layers, drop_path))
        adapt_vit(vit, adapter)
        self.vision = VisionEncoder(vit, adapter.n_prompt)
        self.adapter_proj = VisualProjection(self.vision.width, adapter.hidden_proj, config.dim)
        self.adapter_modality_embedding = nn.Embedding(MODALITIES, config.dim, device=HOME)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = "adapter" in name

    @property
    def device(self):
        return self.adapter_modality_embedding.weight.device

    @property
    def dtype(self):
        return self.llama.tok_embeddings.weight.dtype

    def set_gradient_checkpointing(self, on: bool) -> None:
        self.llama.gradient_checkpointing = self.vision.gradient_checkpointing = on

    def embed(self, batch: Batch):
        """Token and image embeddings of the samples [N, D]."""
        x = self.llama.tok_embeddings(batch.ids)
        if batch.images is not None:
            features = self.vision(batch.images)
            x = x.index_put((batch.slots,), self.adapter_proj(features.float()).flatten(0, 1).to(x.dtype))
        return x

    def modality_rows(self):
        """The two modality tokens [2, D], which lead a packed row, and their own modalities [2]."""
        return (self.adapter_modality_embedding.weight.to(self.dtype),
                torch.arange(MODALITIES, device=self.device))

    def plan(self, lengths: list[int], make=PackedPlan):
        """The plan of a packed row of samples behind the two modality tokens, all of which stand at position 0."""
        return make([1] * MODALITIES + lengths, self.device, starts=[0] * MODALITIES + [1] * len(lengths))

    def hidden_states(self, batch: Batch, plan: PackedPlan | None = None, table: list[dict] | None = None):
        """Last hidden states of the samples [N, D], normalised. plan: of this batch. table: to be filled in, see Routing."""
        tokens, kinds = self.modality_rows()
        plan = plan or self.plan(batch.lengths)
        modality = torch.cat((kinds, batch.modality))[plan.documents]
        x = self.llama(torch.cat((tokens, self.embed(batch))), plan, Routing.of_rows(modality, table))
        return x[MODALITIES:]

    def forward(self, batch: Batch):
        """Cross-entropy of the answers' tokens, each times its factor, summed, float32."""
        hidden = self.hidden_states(batch)[batch.source]
        return self.answer_loss(hidden, self.llama.output.weight, batch.target, batch.factor)

    @torch.no_grad()
    def routing_table(self) -> list[dict]:
        """What Routing keeps, of every layer: it depends on parameters alone."""
        tokens, kinds = self.modality_rows()
        table = [{} for _ in self.llama.layers]
        self.llama(tokens, self.plan([]), Routing.of_rows(kinds, table))
        return table
