"""LLaDA for transformers 4.50 and later, 5.x included: the mask predictor and its objective, in plain PyTorch.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokens = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), gen_length=128, block_length=32)
    loss = model.train()(input_ids, attention_mask, labels=labels).loss

Needs torch, transformers and the two files beside this one. Parameters are named as in the released LLaDA-8B.
Shapes: B sequences, L positions given, S positions seen (past ones and those given), D width, H query heads,
K key/value heads, C channels per head, V vocabulary, R masked positions.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig
from .generation_llada import LLaDAGenerationMixin

try:
    from transformers.modeling_layers import GradientCheckpointingLayer
except ImportError:  # older than what it came with: everything but gradient checkpointing
    GradientCheckpointingLayer = nn.Module

IGNORED = -100  # the label of a position that is not to be learned, as all of transformers has it
# In how many portions masked positions meet the vocabulary. Not a number of rows: it must be the same on all ranks,
# which with ZeRO-3 gather the head's parameters together at each of its calls.
PORTIONS = 16


class LLaDARMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32; shape and dtype stay."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """`x`, normalised over its last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class LLaDABlock(GradientCheckpointingLayer):
    """Pre-norm attention and SwiGLU, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        D, F_, eps = config.d_model, config.mlp_hidden_size, config.rms_norm_eps
        self.heads, self.kv_heads, self.channels = config.n_heads, config.n_kv_heads, D // config.n_heads
        self.attn_norm = LLaDARMSNorm(D, eps)
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * self.channels, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * self.channels, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.q_norm = LLaDARMSNorm(self.channels, eps) if config.qk_norm else nn.Identity()
        self.k_norm = LLaDARMSNorm(self.channels, eps) if config.qk_norm else nn.Identity()
        self.ff_norm = LLaDARMSNorm(D, eps)
        self.ff_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.ff_out = nn.Linear(F_, D, bias=False)
        for branch_end in (self.attn_out, self.ff_out):
            # The residual stream sums 2 n_layers branches; scaling them keeps its variance independent of depth.
            branch_end.init_scale = 1 / math.sqrt(2 * config.n_layers)

    def forward(self, x_BLD, angles, mask_B11S=None, past=None):
        """`x_BLD` and the (rotated keys, values), each (B, K, S, C), of past and given positions."""
        B, L, _ = x_BLD.shape
        y_BLD = self.attn_norm(x_BLD)
        query_BLHC = self.q_norm(self.q_proj(y_BLD).view(B, L, self.heads, self.channels))
        key_BLKC = self.k_norm(self.k_proj(y_BLD).view(B, L, self.kv_heads, self.channels))
        query_BHLC, key_BKSC = _rotate(query_BLHC.transpose(1, 2), angles), _rotate(key_BLKC.transpose(1, 2), angles)
        value_BKSC = self.v_proj(y_BLD).view(B, L, self.kv_heads, self.channels).transpose(1, 2)
        if past is not None:
            key_BKSC, value_BKSC = torch.cat([past[0], key_BKSC], dim=2), torch.cat([past[1], value_BKSC], dim=2)
        kept = key_BKSC, value_BKSC
        if self.kv_heads < self.heads:
            key_BKSC, value_BKSC = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in kept)
        mixed_BHLC = F.scaled_dot_product_attention(query_BHLC, key_BKSC, value_BKSC, attn_mask=mask_B11S)
        x_BLD = x_BLD + self.attn_out(mixed_BHLC.transpose(1, 2).reshape(B, L, -1))
        y_BLD = self.ff_norm(x_BLD)
        return x_BLD + self.ff_out(F.silu(self.ff_proj(y_BLD)) * self.up_proj(y_BLD)), kept


def _angles(position_BL, channels, theta):
    """Cosine and sine (B, 1, L, C) in float32."""
    # Computed in every forward: on the meta device, where transformers builds models, buffers would get no values.
    exponent = -torch.arange(0, channels, 2, dtype=torch.float32, device=position_BL.device) / channels
    angle = position_BL.float()[:, None, :, None] * (theta**exponent)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x_BHLC, angles):
    """Rotary embedding, half-split (channel i pairs with i + C/2), in float32; returned in the dtype of `x`."""
    cos, sin = angles
    x = x_BHLC.float()
    left, right = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-right, left], dim=-1) * sin).to(x_BHLC.dtype)


class LLaDATransformer(nn.Module):
    """Tokens to normalised hidden states; holds the head's matrix too, as the released parameter names have it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList([LLaDABlock(config) for _ in range(config.n_layers)]),
            "ln_f": LLaDARMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(parts)

    def forward(
        self, input_ids=None, mask=None, position_ids=None, past=None, embeds_BLD=None, use_cache=False, keep=False
    ):
        """(hidden_BLD, cache, states): arguments as in LLaDAModelLM.forward; `states` of all depths with `keep`."""
        if (input_ids is None) == (embeds_BLD is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BLD = self.transformer.wte(input_ids) if embeds_BLD is None else embeds_BLD
        B, L, _ = x_BLD.shape
        begin = 0 if past is None else past[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(begin, begin + L, device=x_BLD.device)
        position_BL = position_ids.to(x_BLD.device).view(-1, L)
        angles = _angles(position_BL, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        mask_B11S = _mask(mask, (B, begin + L), x_BLD.device)
        if self.training and torch.is_grad_enabled() and not x_BLD.requires_grad:
            # Only parts of a block are trained. Reentrant checkpointing, which transformers 4 uses unless told not to,
            # has no gradient for them where no input of the block asks for one.
            x_BLD = x_BLD.detach().requires_grad_()
        cache, states = (), ()
        for layer, block in enumerate(self.transformer.blocks):
            states += (x_BLD,) if keep else ()
            x_BLD, kept = block(x_BLD, angles, mask_B11S, None if past is None else past[layer])
            cache += (kept,) if use_cache else ()
        hidden_BLD = self.transformer.ln_f(x_BLD)
        return hidden_BLD, cache or None, (*states, hidden_BLD) if keep else None

    def unembed(self, hidden_BLD):
        """Logits over the vocabulary, in the dtype of the model."""
        if not self.config.weight_tying:
            return self.transformer.ff_out(hidden_BLD)
        table_VD = self.transformer.wte.weight
        if table_VD.device.type == "meta":  # offloaded: only the module itself has it
            table_VD = self.transformer.wte(torch.arange(self.config.embedding_size, device=hidden_BLD.device))
        return F.linear(hidden_BLD.to(table_VD.device), table_VD)  # of a model on several devices, wte is on the first


def _mask(attention_mask, shape, device):
    """The keys allowed, bool (B, 1, 1, S); None where all are, so that attention runs without a mask."""
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    if attention_mask.shape != shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, past and given positions are {shape}")
    allowed_BS = attention_mask.to(device).bool()
    if allowed_BS.all():
        return None
    # A row of nothing but padding sees all of it: older versions of torch make NaN of a softmax over no key.
    return (allowed_BS | ~allowed_BS.any(dim=1, keepdim=True))[:, None, None, :]


class LLaDAPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model."""

    config_class = LLaDAConfig
    base_model_prefix = ""  # no part of it is a model of its own
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True
    supports_gradient_checkpointing = GradientCheckpointingLayer is not nn.Module

    def _init_weights(self, module):
        """A new model's weights; through torch.nn.init, which transformers keeps from loaded ones."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.init_std * getattr(module, "init_scale", 1.0))
        elif isinstance(module, LLaDARMSNorm):
            nn.init.ones_(module.weight)


class LLaDAModelLM(LLaDAPreTrainedModel, LLaDAGenerationMixin):
    """The mask predictor: logits for every position, each seeing all others; `generate` and `fill` sample from it."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDATransformer(config)
        self.post_init()

    def get_input_embeddings(self):
        """The module of the embedding."""
        return self.model.transformer.wte

    def set_input_embeddings(self, value):
        """Replace it, and update the number of its rows in the config: transformers updates vocab_size only."""
        self.model.transformer.wte = value
        self.config.embedding_size = len(value.weight)

    def get_output_embeddings(self):
        """The module of the head, which is the embedding where they are tied."""
        return self.model.transformer.wte if self.config.weight_tying else self.model.transformer.ff_out

    def set_output_embeddings(self, value):
        """Replace it."""
        self.model.transformer["wte" if self.config.weight_tying else "ff_out"] = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        labels=None,
        masked_positions=None,
        p_mask=None,
        return_logits=None,
        num_items_in_batch=None,
        **unused,
    ):
        """CausalLMOutputWithPast with logits (B, L, V): position i predicts token i, not the next one.

        attention_mask   (B, past and given positions): 0 where none may look, None: all are seen; 4-D: used as it is
        position_ids     (L,) or (B, L); None: counted on from the past, padding included, as only differences matter
        past_key_values  keys and values of earlier positions, for the positions given to see. A mask predictor's states
                         depend on all tokens: exact if the rest of the canvas was the same, else an approximation
        use_cache        return past_key_values of past and given positions: (keys, values) of every layer
        labels           (B, L): the tokens to learn, not shifted; -100 at context and padding, which are never masked.
                         `loss` is then the objective (`objective`), for which some of these positions get masked here
        masked_positions, p_mask  bool (B, L): which ones, and (B,): the probability of it in each sequence. None:
                         drawn by torch's generator, in evaluation too; p_mask alone: masks are drawn with it
        return_logits    None: not in training mode with labels, where only masked positions meet the vocabulary
        num_items_in_batch  labels in all batches of an update, from Trainer: see `accepts_loss_kwargs`
        """
        if past_key_values is not None and not isinstance(past_key_values, (tuple, list)):
            raise ValueError("past_key_values must be the tuple of keys and values that a forward pass returns")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return_dict = self.config.return_dict if return_dict is None else return_dict
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if labels is not None:
            masked_positions, p_mask = self._masks(labels, masked_positions, p_mask)
            input_ids, inputs_embeds = self._corrupt(input_ids, inputs_embeds, masked_positions)
        elif masked_positions is not None or p_mask is not None:
            raise ValueError("masked_positions and p_mask need labels: without them put mask tokens into input_ids")
        hidden_BLD, cache, states = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, keep
        )
        logits_BLV = loss = None
        if labels is not None:
            loss = self.objective(hidden_BLD, labels, masked_positions, p_mask, num_items_in_batch)
        if return_logits or (return_logits is None and (labels is None or not self.training)):
            logits_BLV = self.model.unembed(hidden_BLD)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BLV, past_key_values=cache, hidden_states=states)
        return output if return_dict else output.to_tuple()

    @property
    def accepts_loss_kwargs(self):
        """Whether Trainer may pass num_items_in_batch, and then does not divide by gradient_accumulation_steps itself.

        Tokens need the number of labels in all batches of an update. A mean over sequences is the mean of the batches'
        means, which are of equally many sequences: there Trainer's own division is the right one.
        """
        return self.config.loss_normalization == "token"

    def objective(self, hidden_BLD, labels_BL, masked_BL, p_B, items=None):
        """The bound on -log p(labelled tokens | all others), in nats per token: Eq. (3) of LLaDA, and Eq. (5) for SFT.

        The sum over masked tokens of nats / p, divided by the number of labelled tokens: in each sequence, and averaged
        over the sequences that have any, or (config.loss_normalization="token") in the batch, which is `items` tokens.
        Eq. (3) is that of sequences whose tokens are all labelled.
        """
        count_B = (labels_BL != IGNORED).sum(dim=1)
        weight_B = 1 / p_B.float()
        if self.config.loss_normalization == "token":
            weight_B = weight_B / (count_B.sum().clamp(min=1) if items is None else items)
        else:
            weight_B = weight_B / count_B.clamp(min=1) / (count_B > 0).sum().clamp(min=1)
        weight_R = weight_B[:, None].expand_as(masked_BL)[masked_BL].to(hidden_BLD.device)
        hidden_RD, token_R = hidden_BLD[masked_BL.to(hidden_BLD.device)], labels_BL[masked_BL].to(hidden_BLD.device)
        # Portions may be empty: a batch of which nothing is masked has the loss 0, and gradients, which DDP waits for.
        portions = (rows_R.tensor_split(PORTIONS) for rows_R in (hidden_RD, token_R, weight_R))
        return sum(map(functools.partial(checkpoint, self._weighted_nats, use_reentrant=False), *portions))

    def _weighted_nats(self, hidden_RD, token_R, weight_R):
        """The sum over rows of weight * -log p(token), in float32. Under `checkpoint`, no logits are saved."""
        logits_RV = self.model.unembed(hidden_RD).float()
        nats_R = F.cross_entropy(logits_RV, token_R.to(logits_RV.device), reduction="none")
        return (nats_R * weight_R.to(logits_RV.device)).sum().to(hidden_RD.device)

    def _masks(self, labels_BL, masked_BL, p_B):
        """(masked_BL, p_B) as given, or drawn: t ~ U[0, 1), p = (1 - eps) t + eps, each labelled position by itself."""
        labelled_BL, B = labels_BL != IGNORED, len(labels_BL)
        if p_B is None:
            if masked_BL is not None:
                raise ValueError("masked_positions needs p_mask: their nats are weighted by 1 / p")
            p_B = (1 - self.config.loss_eps) * _uniform((B,), labels_BL.device) + self.config.loss_eps
        p_B = p_B.to(labels_BL.device)
        if p_B.shape != (B,):
            raise ValueError(f"p_mask is {tuple(p_B.shape)}; it must be one probability for each of {B} sequences")
        if masked_BL is None:
            return (_uniform(labels_BL.shape, labels_BL.device) < p_B[:, None]) & labelled_BL, p_B
        masked_BL = masked_BL.to(labels_BL.device).bool()
        if masked_BL.shape != labels_BL.shape or (masked_BL & ~labelled_BL).any():
            raise ValueError("masked_positions must have the shape of labels, and only positions that have a label")
        return masked_BL, p_B

    def _corrupt(self, input_ids, embeds_BLD, masked_BL):
        """Token ids, or their embeddings where those were given, with the mask token at masked positions."""
        mask_id = self.config.mask_token_id
        if mask_id is None:
            raise ValueError("config.mask_token_id is missing; without it there is no objective")
        if input_ids is not None:
            return input_ids.masked_fill(masked_BL.to(input_ids.device), mask_id), embeds_BLD
        if embeds_BLD is not None:
            mask_D = self.model.transformer.wte(torch.tensor(mask_id, device=embeds_BLD.device))
            embeds_BLD = torch.where(masked_BL[..., None].to(embeds_BLD.device), mask_D, embeds_BLD)
        return None, embeds_BLD


def _uniform(shape, device):
    """Numbers from [0, 1), stratified over ranks: Trainer seeds all of them alike, and they would draw the same."""
    numbers = torch.rand(shape, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        numbers = (numbers + torch.distributed.get_rank() / torch.distributed.get_world_size()) % 1
    return numbers
