"""Independent reference implementation of LaVIN on padded sequences; the tests compare the packed model with it.

Each row is `[modality] [BOS] ... [padding]`. Attention uses an explicit mask, the router reads position 0, and every
image goes through the ViT separately. Of lavin, only the parameters and the ViT's attention and MLP are used.
"""

import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grouped_linear(z, weight, bias):
    """Applies a linear layer in two groups: the first half of z [..., r] gives the first half of the output [..., D];
    weight is [D, r/2, 1]."""
    r, d = z.shape[-1], weight.shape[0]
    first = torch.einsum("...r,dr->...d", z[..., :r // 2], weight[:d // 2, :, 0])
    second = torch.einsum("...r,dr->...d", z[..., r // 2:], weight[d // 2:, :, 0])
    return torch.cat((first, second), -1) + bias


def adapter(p, name, x, config, mixture=None):
    """Returns x + s w0 (B z + b) + s w1 (E z + e) with mixture weights w [..., 2], or x + s (B z + b) without them."""
    z = torch.einsum("...d,rd->...r", x, p[f"{name}.conv_A.weight"][:, :, 0]) + p[f"{name}.conv_A.bias"]
    first = grouped_linear(z, p[f"{name}.conv_B.weight"], p[f"{name}.conv_B.bias"])
    if mixture is None:
        return x + config.adapter_scale * first
    second = grouped_linear(z, p[f"{name}.conv_D.weight"], p[f"{name}.conv_D.bias"])
    return x + config.adapter_scale * (mixture[..., :1] * first + mixture[..., 1:] * second)


def router(p, name, h, config):
    scores = torch.einsum("...d,ed->...e", h, p[f"{name}.expert_weights.weight"]) + p[f"{name}.expert_weights.bias"]
    scores = (scores / config.temperature).exp()
    return scores / scores.sum(-1, keepdim=True)


def adapted_norm(model, p, block_index, norm, x):
    """The ViT block's norm, followed by its adapter."""
    name, config = f"vision.vit.blocks.{block_index}.{norm}.adapter", model.adapter
    x = getattr(model.vision.vit.blocks[block_index], norm).norm(x)
    return adapter(p, name, x, config, None if config.visual_adapter_type == "normal" else router(p, name, x, config))


def image_features(model, image):
    """Returns the CLS features [n_prompt, width] of a picture, uint8 [3, S, S]."""
    p, config, vit = dict(model.named_parameters()), model.adapter, model.vision.vit
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed((image / 255 - mean)[None] / std)))
    interval = len(vit.blocks) // config.n_prompt
    features = []
    for i, block in enumerate(vit.blocks):
        x = x + block.attn(adapted_norm(model, p, i, "norm1", x))
        x = x + block.mlp(adapted_norm(model, p, i, "norm2", x) if config.visual_adapter_type == "router_block"
                          else block.norm2(x))
        if (i + 1) % interval == 0:
            features.append(x[0, 0])
    return torch.stack(features)


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, theta):
    """RoPE with complex numbers: x [B, T, heads, d], the adjacent pair k at position t turns by t theta^(-2k/d)."""
    t, d = x.shape[1], x.shape[3]
    angles = torch.arange(t)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)[:, None]).flatten(-2)


@torch.no_grad()
def logits(model, examples, padding: int = 0):
    """Logits [B, T, V] of padded sequences; T is 1 (modality token) + the longest example + `padding`."""
    p, c = dict(model.named_parameters()), model.llama.config
    t = 1 + max(len(example.ids) for example in examples) + padding
    x = torch.randn(len(examples), t, c.dim)  # random padding: no real position may attend to it
    for row, example in zip(x, examples, strict=True):
        row[0] = p["adapter_modality_embedding.weight"][int(example.image is not None)]
        ids = torch.tensor(example.ids)
        row[1:1 + len(ids)] = p["llama.tok_embeddings.weight"][ids.clamp(min=0)]
        if example.image is not None:
            hidden = F.silu(image_features(model, example.image) @ p["adapter_proj.conv_A.weight"].T
                            + p["adapter_proj.conv_A.bias"])
            row[1:1 + len(ids)][ids < 0] = hidden @ p["adapter_proj.conv_B.weight"].T + p["adapter_proj.conv_B.bias"]
    query, key = torch.arange(t)[:, None], torch.arange(t)[None]
    mask = (key <= query) & ((key > 0) | (query == 0))  # causal; only the modality token attends to itself
    for i in range(c.n_layers):
        name = f"llama.layers.{i}"
        h = rms_norm(x, p[f"{name}.attention_norm.weight"], c.norm_eps)
        h = adapter(p, f"{name}.adapter_attn", h, model.adapter,
                    router(p, f"{name}.adapter_attn", h[:, :1], model.adapter))
        q, k, v = ((h @ p[f"{name}.attention.{w}.weight"].T).unflatten(-1, (-1, c.head_dim))
                   for w in ("wq", "wk", "wv"))
        k, v = (y.repeat_interleave(c.n_heads // c.kv_heads, 2) for y in (rotate(k, c.rope_theta), v))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotate(q, c.rope_theta), k) / c.head_dim ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2) @ p[f"{name}.attention.wo.weight"].T
        h = rms_norm(x, p[f"{name}.ffn_norm.weight"], c.norm_eps)
        if model.adapter.adapter_type == "block":
            h = adapter(p, f"{name}.adapter_mlp", h, model.adapter,
                        router(p, f"{name}.adapter_mlp", h[:, :1], model.adapter))
        w1, w2, w3 = (p[f"{name}.feed_forward.{w}.weight"].T for w in ("w1", "w2", "w3"))
        x = x + (F.silu(h @ w1) * (h @ w3)) @ w2
    return rms_norm(x, p["llama.norm.weight"], c.norm_eps) @ p["llama.output.weight"].T


def loss(model, examples, padding: int = 0):
    """Cross-entropy, summed over the answers' tokens."""
    log_probabilities = logits(model, examples, padding).log_softmax(-1)
    total = 0.0
    for row, example in zip(log_probabilities, examples, strict=True):
        for i in range(example.answer_start, len(example.ids)):
            total -= row[i, example.ids[i]]  # the modality token shifts positions by one: position i predicts token i
    return total
