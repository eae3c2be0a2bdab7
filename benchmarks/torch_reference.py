"""The rival: LLaDA in plain PyTorch with the published samplers, for parity tests and speed ratios.

    model = from_jax(config.model, params)                  # float32; .to("cuda", torch.bfloat16) as released
    tokens_BL, passes = generate(model, prompt_BL, steps=64, gen_length=64, block_length=32, mask_id=run.special.mask)

It does the work of the published code (`generate`, `log_likelihood`: github.com/ML-GSAI/LLaDA; `generate_cached`:
github.com/NVlabs/Fast-dLLM): one matrix per projection, the whole canvas at every step, logits of all positions that
the model sees, a softmax over all of them, float64 where theirs is. Avoidable costs of theirs (a device-to-host copy
per row or position, keys rotated again at every pass) are left out.
Shapes: B sequences, L input tokens, S positions of the canvas, D width, H query heads, K key/value heads, C channels
per head, V vocabulary; P prompt and A answer tokens, M Monte Carlo rows.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llada.config import ModelConfig

Cache = list[tuple[torch.Tensor, torch.Tensor]]  # per layer: rotated keys and values, each (B, K, S, C)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32, returned in the dtype of its input."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `x`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # float32 inside, also for bfloat16


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.channels = c.heads, c.key_value_heads, c.head_size
        kv_width = self.kv_heads * self.channels
        self.attention_norm = RMSNorm(c.width, c.norm_eps)
        self.query = nn.Linear(c.width, c.width, bias=False)
        self.key = nn.Linear(c.width, kv_width, bias=False)
        self.value = nn.Linear(c.width, kv_width, bias=False)
        self.output = nn.Linear(c.width, c.width, bias=False)
        self.query_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity()
        self.ffn_norm = RMSNorm(c.width, c.norm_eps)
        self.gate = nn.Linear(c.width, c.ffn, bias=False)
        self.up = nn.Linear(c.width, c.ffn, bias=False)
        self.down = nn.Linear(c.ffn, c.width, bias=False)

    def forward(self, x_BLD, angles, mask_B11S, past, start):
        """`x_BLD` and this layer's keys and values; with `past`, those are `past` written over from `start` on."""
        B, L, _ = x_BLD.shape
        y_BLD = self.attention_norm(x_BLD)
        query_BHLC = self.query_norm(self.query(y_BLD).view(B, L, self.heads, self.channels)).transpose(1, 2)
        key_BKLC = self.key_norm(self.key(y_BLD).view(B, L, self.kv_heads, self.channels)).transpose(1, 2)
        value_BKSC = self.value(y_BLD).view(B, L, self.kv_heads, self.channels).transpose(1, 2)
        query_BHLC, key_BKSC = rotate(query_BHLC, angles), rotate(key_BKLC, angles)
        if past is not None:
            # In place, as the dual cache does: no copy of the canvas's keys for a block of fresh ones.
            past[0][:, :, start : start + L] = key_BKSC
            past[1][:, :, start : start + L] = value_BKSC
            key_BKSC, value_BKSC = past
        returned = (key_BKSC, value_BKSC)
        if self.kv_heads < self.heads:
            key_BKSC, value_BKSC = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in returned)
        mixed_BHLC = F.scaled_dot_product_attention(query_BHLC, key_BKSC, value_BKSC, attn_mask=mask_B11S)
        x_BLD = x_BLD + self.output(mixed_BHLC.transpose(1, 2).reshape(B, L, -1))
        y_BLD = self.ffn_norm(x_BLD)
        return x_BLD + self.down(F.silu(self.gate(y_BLD)) * self.up(y_BLD)), returned


def rotate(x_BHLC: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding, half-split, in float32; returned in the dtype of `x`."""
    cos_LC, sin_LC = angles
    x = x_BHLC.float()
    left, right = x.chunk(2, dim=-1)
    return (x * cos_LC + torch.cat([-right, left], dim=-1) * sin_LC).to(x_BHLC.dtype)


class TorchLLaDA(nn.Module):
    """The bidirectional Transformer of `llada.model.transformer`, random weights; `from_jax` loads trained ones.

    Only `causal=False`; no gradients. `config.dtype` is not read: the model computes in the dtype it is moved to.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.causal:
            raise ValueError("TorchLLaDA is the mask predictor; config.causal must be False")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        self._angles = None  # no buffer: moving the model to bfloat16 must leave these float32
        self.eval().requires_grad_(False)

    def forward(
        self, tokens_BL, allowed_BS=None, past: Cache | None = None, start: int = 0, return_cache: bool = False
    ):
        """`logits_BLV` of the tokens; with `return_cache`, `(logits_BLV, cache)`.

        allowed_BS  bool, positions of the canvas that may be seen as keys; None: all
        past        cache of the whole canvas; the fresh keys and values of positions [start, start + L) are written
                    over its own, IN PLACE, before attention. Tokens of one block: the dual cache; tokens from `start`
                    to the end of the canvas: the prefix cache
        start       true position of the first token
        return_cache  also return the cache: a new one, or `past` itself if there is one
        """
        end = start + tokens_BL.shape[1]
        x_BLD = self.embedding(tokens_BL)
        angles = tuple(table[start:end] for table in self._angle_tables(end, x_BLD.device))
        mask_B11S = None if allowed_BS is None else allowed_BS.bool()[:, None, None, :]
        cache = []
        for layer, block in enumerate(self.blocks):
            x_BLD, keys_values = block(x_BLD, angles, mask_B11S, None if past is None else past[layer], start)
            cache += [keys_values] if return_cache else []
        head = self.embedding if self.head is None else self.head
        logits_BLV = F.linear(self.final_norm(x_BLD), head.weight)
        return (logits_BLV, cache) if return_cache else logits_BLV

    def _angle_tables(self, length, device):
        """Cosine and sine (S, C) for at least `length` positions, recomputed only when more are needed."""
        if self._angles is None or len(self._angles[0]) < length or self._angles[0].device != device:
            channels = self.config.head_size
            exponent = -torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
            position_S = torch.arange(max(length, self.config.max_length), dtype=torch.float32, device=device)
            angle = position_S[:, None] * (self.config.rope_theta**exponent)[None, :]
            angle_SC = torch.cat([angle, angle], dim=-1)
            self._angles = angle_SC.cos(), angle_SC.sin()
        return self._angles


def from_jax(config: ModelConfig, params: dict) -> TorchLLaDA:
    """A float32 model on CPU holding the parameter tree `params` of `llada.model.transformer`."""

    def tensor(leaf, inputs=None):
        array = np.array(leaf, np.float32)
        if inputs is not None:
            # (inputs..., outputs...) becomes torch's (outputs, inputs), in the memory order its products expect.
            array = np.ascontiguousarray(array.reshape(inputs, -1).T)
        return torch.from_numpy(array)

    outer = ("embedding", "final_norm") if config.tie_embeddings else ("embedding", "final_norm", "head")
    state = {f"{name}.weight": tensor(params[name]) for name in outer}
    for name, stacked in params["layers"].items():
        inputs = None if name.endswith("_norm") else config.ffn if name == "down" else config.width
        state |= {f"blocks.{layer}.{name}.weight": tensor(leaf, inputs) for layer, leaf in enumerate(stacked)}
    with torch.device("meta"):  # random weights would only cost time
        model = TorchLLaDA(config)
    model.load_state_dict(state, assign=True)
    return model


@torch.inference_mode()
def generate(
    model: TorchLLaDA,
    prompt_BL: torch.Tensor,
    *,
    steps: int,
    gen_length: int,
    block_length: int,
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int,
    forbidden=None,
    allowed_BL: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, int]:
    """LLaDA's sampler: `(tokens_BS, forward passes)`, the prompt and `gen_length` tokens; guidance counts two a step.

    steps       in total, shared equally by the blocks
    remasking   low_confidence | random: by what predictions are ranked
    forbidden   bool (V,), ids whose logits become -inf; None forbids none, the published behaviour
    allowed_BL  bool, False where the prompt is padding
    generator   of all random numbers, on the model's device
    """
    if remasking not in ("low_confidence", "random"):
        raise ValueError(f"remasking={remasking!r} is neither low_confidence nor random")
    canvas_BS, forbidden_V = _prepare(model, prompt_BL, gen_length, block_length, mask_id, forbidden)
    S = canvas_BS.shape[1]
    steps_per_block = _steps_per_block(steps, gen_length, block_length)
    context_BS = canvas_BS != mask_id
    if allowed_BL is not None:
        allowed_BL = F.pad(torch.as_tensor(allowed_BL).bool().to(canvas_BS.device), (0, gen_length), value=True)
    for begin in range(S - gen_length, S, block_length):
        end = begin + block_length
        for quota_B in _quotas(canvas_BS[:, begin:end] == mask_id, steps_per_block):
            logits_BSV = _guided(model, canvas_BS, context_BS, cfg_scale, mask_id, allowed_BL)
            if forbidden_V is not None:
                logits_BSV.masked_fill_(forbidden_V, -torch.inf)
            guess_BS = _draw(logits_BSV, temperature, generator)
            if remasking == "low_confidence":
                score_BS = F.softmax(logits_BSV, dim=-1).gather(-1, guess_BS[..., None])[..., 0]
            else:
                score_BS = torch.rand(guess_BS.shape, generator=generator, device=guess_BS.device)
            score_BS = score_BS.masked_fill(canvas_BS != mask_id, -torch.inf)
            score_BS[:, end:] = -torch.inf
            _commit_best(canvas_BS, guess_BS, score_BS, quota_B)
    return canvas_BS, steps * (2 if cfg_scale else 1)


@torch.inference_mode()
def generate_cached(
    model: TorchLLaDA,
    prompt_BL: torch.Tensor,
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    threshold: float | None = None,
    mask_id: int,
    kind: str = "dual",
    forbidden=None,
) -> tuple[torch.Tensor, int]:
    """Fast-dLLM at temperature 0: `(tokens_BS, forward passes)`.

    The first pass of a block sees the whole canvas, refreshes the cache and fills positions like any other. The
    following ones see the block (`kind="dual"`) or all from the block on (`kind="prefix"`); the cache stands for the
    rest. With `threshold` a pass commits every prediction at least that probable, and always the best one; without,
    `steps` (valid in either case) are shared by the blocks and fill equal quotas.

    No pass runs once a block is full. Their code runs at least two per block: one too many where the first fills it,
    and an IndexError at one step a block. Forbid the mask token: a model that predicts it leaves the position open, in
    their code with threshold for ever; here a block ends after the passes that would have filled it.
    """
    if kind not in ("dual", "prefix"):
        raise ValueError(f"kind={kind!r} is neither dual nor prefix")
    canvas_BS, forbidden_V = _prepare(model, prompt_BL, gen_length, block_length, mask_id, forbidden)
    S, passes = canvas_BS.shape[1], 0
    steps_per_block = _steps_per_block(steps, gen_length, block_length)

    def fill(tokens_BL, logits_BLV, fillable, quota_B):
        """Commit predictions for masks among the first `fillable` of `tokens_BL`, which is a view of the canvas."""
        if forbidden_V is not None:
            logits_BLV.masked_fill_(forbidden_V, -torch.inf)
        guess_BL = logits_BLV.argmax(dim=-1)
        score_BL = F.softmax(logits_BLV.double(), dim=-1).gather(-1, guess_BL[..., None])[..., 0]
        score_BL.masked_fill_(tokens_BL != mask_id, -torch.inf)
        score_BL[:, fillable:] = -torch.inf
        if threshold is None:
            _commit_best(tokens_BL, guess_BL, score_BL, quota_B)
        else:
            commit_BL = (score_BL >= threshold).scatter(1, score_BL.argmax(dim=-1, keepdim=True), True)
            tokens_BL.copy_(torch.where(commit_BL & (score_BL > -torch.inf), guess_BL, tokens_BL))

    for begin in range(S - gen_length, S, block_length):
        end = begin + block_length
        quotas = _quotas(canvas_BS[:, begin:end] == mask_id, steps_per_block)
        logits_BSV, cache = model(canvas_BS, return_cache=True)
        fill(canvas_BS, logits_BSV, end, quotas[0])
        passes += 1
        seen_BL = canvas_BS[:, begin : end if kind == "dual" else S]
        for step in range(1, steps_per_block if threshold is None else block_length):
            if not (canvas_BS[:, begin:end] == mask_id).any():
                break
            logits_BLV = model(seen_BL, past=cache, start=begin)
            fill(seen_BL, logits_BLV, block_length, quotas[step] if threshold is None else None)
            passes += 1
    return canvas_BS, passes


@torch.inference_mode()
def log_likelihood(
    model: TorchLLaDA,
    prompt_P: torch.Tensor,
    answer_A: torch.Tensor,
    masks_MA: torch.Tensor,
    weights_M: torch.Tensor | None = None,
    *,
    batch_size: int = 16,
    cfg_scale: float = 0.0,
    mask_id: int,
) -> float:
    """LLaDA's Monte Carlo estimate of log p(answer | prompt) in nats, on these masks.

    masks_MA   bool, answer positions that are masked in each row
    weights_M  of each row's masked nats; None: A / (number masked)
    """
    device = model.embedding.weight.device
    prompt_P, answer_A = (torch.as_tensor(t, dtype=torch.long, device=device) for t in (prompt_P, answer_A))
    masks_MA = torch.as_tensor(masks_MA, dtype=torch.bool, device=device)
    M, A = masks_MA.shape
    weights_M = A / masks_MA.sum(dim=1) if weights_M is None else torch.as_tensor(weights_M, device=device)
    masks_MS = F.pad(masks_MA, (len(prompt_P), 0), value=False)
    clean_S = torch.cat([prompt_P, answer_A])
    context_S = torch.arange(len(clean_S), device=device) < len(prompt_P)
    total = 0.0
    for masks_BS, weights_B in zip(masks_MS.split(batch_size), weights_M.split(batch_size), strict=True):
        clean_BS, context_BS = clean_S.expand_as(masks_BS), context_S.expand_as(masks_BS)
        logits_BSV = _guided(model, clean_BS.masked_fill(masks_BS, mask_id), context_BS, cfg_scale, mask_id, None)
        nats_N = F.cross_entropy(logits_BSV[masks_BS], clean_BS[masks_BS], reduction="none")
        total += (nats_N * weights_B[:, None].expand_as(masks_BS)[masks_BS]).sum().item()
    return -total / M


def _prepare(model, prompt_BL, gen_length, block_length, mask_id, forbidden):
    """The prompt followed by masks, int64, on the model's device; `forbidden` beside it."""
    if gen_length % block_length:
        raise ValueError(f"block_length={block_length} does not divide gen_length={gen_length}")
    device = model.embedding.weight.device
    prompt_BL = torch.as_tensor(prompt_BL, dtype=torch.long, device=device)
    forbidden_V = None if forbidden is None else torch.as_tensor(forbidden, dtype=torch.bool, device=device)
    return F.pad(prompt_BL, (0, gen_length), value=mask_id), forbidden_V


def _steps_per_block(steps, gen_length, block_length):
    blocks = gen_length // block_length
    if steps < blocks or steps % blocks:
        raise ValueError(f"steps={steps} is no positive multiple of the {blocks} blocks")
    return steps // blocks


def _quotas(masked_BL, steps):
    """How many positions of each row to fill, step by step: as equal as integers allow, the larger ones first."""
    counts = masked_BL.sum(dim=1).tolist()  # once a block: no synchronisation within its steps
    return [[count // steps + (step < count % steps) for count in counts] for step in range(steps)]


def _guided(model, tokens_BS, context_BS, cfg_scale, mask_id, allowed_BS):
    """Logits, with guidance away from the prediction that sees no context; both branches in one pass."""
    if not cfg_scale:
        return model(tokens_BS, allowed_BS)
    both = torch.cat([tokens_BS, tokens_BS.masked_fill(context_BS, mask_id)])
    # The published code fails here without padding: it uses a doubled mask that it makes only with padding.
    allowed = None if allowed_BS is None else torch.cat([allowed_BS, allowed_BS])
    seeing_BSV, blind_BSV = model(both, allowed).chunk(2)
    return blind_BSV + (cfg_scale + 1) * (seeing_BSV - blind_BSV)


def _draw(logits_BSV, temperature, generator):
    """Tokens by Gumbel-max; in float64 because coarse noise truncates the tail (arXiv 2409.02908)."""
    if temperature == 0:
        return logits_BSV.argmax(dim=-1)
    uniform = torch.rand(logits_BSV.shape, dtype=torch.float64, device=logits_BSV.device, generator=generator)
    # The logarithm of their exp(logits) / (-log u)^temperature: the same argmax, one transcendental function fewer.
    noise = uniform.log_().neg_().log_().mul_(temperature)
    return (logits_BSV.double() - noise).argmax(dim=-1)


def _commit_best(tokens_BL, guess_BL, score_BL, quota_B):
    """Write each row's `quota_B` best-scored guesses into `tokens_BL`."""
    for row, quota in enumerate(quota_B):
        best = score_BL[row].topk(quota).indices
        tokens_BL[row, best] = guess_BL[row, best]
