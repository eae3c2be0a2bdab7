"""LLaDA for transformers 4.50 and later, 5.x included: the mask predictor and its reverse process, in plain PyTorch.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokens = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), gen_length=128, block_length=32)

Needs torch, transformers and the configuration beside this file. Parameters are named as in the released LLaDA-8B.
Shapes: B sequences, L positions given, S positions seen (past ones and those given), D width, H query heads,
K key/value heads, C channels per head, V vocabulary; in the reverse process L is the canvas, N positions of it.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_llada import LLaDAConfig, LLaDAOptions, LLaDASampling

ROWS = 256  # positions that meet the vocabulary at once, so that a long canvas never holds all of its logits


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


class LLaDABlock(nn.Module):
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

    def _init_weights(self, module):
        """A new model's weights; through torch.nn.init, which transformers keeps from loaded ones."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.init_std * getattr(module, "init_scale", 1.0))
        elif isinstance(module, LLaDARMSNorm):
            nn.init.ones_(module.weight)


class LLaDAModelLM(LLaDAPreTrainedModel, GenerationMixin):
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
        **unused,
    ):
        """CausalLMOutputWithPast with logits (B, L, V): position i predicts token i, not the next one.

        attention_mask   (B, past and given positions): 0 where none may look, None: all are seen; 4-D: used as it is
        position_ids     (L,) or (B, L); None: counted on from the past, padding included, as only differences matter
        past_key_values  keys and values of earlier positions, for the positions given to see. A mask predictor's states
                         depend on all tokens: exact if the rest of the canvas was the same, else an approximation
        use_cache        return past_key_values of past and given positions: (keys, values) of every layer
        """
        if labels is not None:
            raise ValueError("LLaDA's objective is not next-token prediction: it has no loss on labels")
        if past_key_values is not None and not isinstance(past_key_values, (tuple, list)):
            raise ValueError("past_key_values must be the tuple of keys and values that a forward pass returns")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return_dict = self.config.return_dict if return_dict is None else return_dict
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_BLD, cache, states = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, keep
        )
        logits_BLV = self.model.unembed(hidden_BLD)
        output = CausalLMOutputWithPast(logits=logits_BLV, past_key_values=cache, hidden_states=states)
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def generate(self, input_ids=None, attention_mask=None, *, gen_length=None, **options):
        """Tokens (B, L + gen_length): the prompts and what the reverse process writes behind them.

        attention_mask  (B, L): 0 where a prompt is padding, on whichever side
        gen_length      tokens to write (max_new_tokens; max_length with the prompt); None: as many as fit, at most 64
        steps           over all blocks, a multiple of their number; None: one per token
        block_length    blocks are filled from left to right, later ones in view as masks; None: one block
        temperature     0: the most likely tokens; else draws from softmax(logits / temperature)
        cfg_scale       w of classifier-free guidance without labels; 0 is off
        remasking       low_confidence: a step keeps its most probable predictions; random: any of them
        eos             keep; no_logits: end tokens are never written; no_confidence: they are kept last in their block
        cache           none; prefix (Fast-dLLM): earlier positions keep a block's first keys and values, approximate
        generator       a torch.Generator of all random numbers
        Neither the mask token nor ids in `generation_config.suppress_tokens` are ever written. LLaDAOptions reads the
        other options that transformers has.
        """
        if input_ids is None:  # an empty prompt, as the pipeline passes it
            input_ids, attention_mask = torch.zeros((1, 0), dtype=torch.long, device=self.device), None
        asked = LLaDAOptions(gen_length, torch.as_tensor(input_ids).shape[-1], options, self.generation_config)
        process = _ReverseProcess(self, LLaDASampling(**asked.settings), input_ids, asked.ends)
        return process.run(input_ids, attention_mask, asked.gen_length, asked.at_most)

    def _prepare_generation_config(self, *_, **__):  # the pipeline of transformers 4 would have us sample
        return copy.deepcopy(self.generation_config), {}

    @torch.no_grad()
    def fill(self, input_ids, attention_mask=None, **settings):
        """Tokens (B, L): `input_ids` with every mask token, wherever it stands, replaced.

        Settings are those of `generate` from `steps` to `generator`. Rows must have masks for equally many blocks;
        with cache="prefix" the prefix ends where the first row's block begins.
        """
        return _ReverseProcess(self, LLaDASampling(**settings), input_ids).run(input_ids, attention_mask, 0)


class _ReverseProcess:
    """From masks to tokens, block by block; steps need not ask the device how many masks remain: it is arithmetic."""

    def __init__(self, model, settings, input_ids, ends=None):
        config, generation, self.device = model.config, model.generation_config, model.device
        if self.device.type == "meta":  # offloaded: accelerate loads weights module by module
            self.device = torch.as_tensor(input_ids).device
        if config.mask_token_id is None:
            raise ValueError("config.mask_token_id is missing; without it there is nothing to fill")
        ends = generation.eos_token_id if ends is None else ends
        ends = config.eos_token_id if ends is None else ends
        if ends is None and settings.eos != "keep":
            raise ValueError(f"eos={settings.eos!r} needs eos_token_id in the generation_config or the config")
        self.model, self.mask_id, self.settings = model, config.mask_token_id, settings
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=self.device).view(-1)
        self.forbidden_V = torch.arange(config.embedding_size, device=self.device) >= config.vocab_size
        self.forbidden_V[[self.mask_id, *(generation.suppress_tokens or [])]] = True
        if settings.eos == "no_logits":
            self.forbidden_V[self.ends] = True

    def run(self, input_ids, attention_mask, gen_length, at_most=None):
        """`input_ids` and `gen_length` masks (None: as many as fit, but `at_most`), all masks replaced."""
        tokens_BL = torch.as_tensor(input_ids, dtype=torch.long, device=self.device)
        allowed_BL = torch.ones_like(tokens_BL) if attention_mask is None else torch.as_tensor(attention_mask)
        allowed_BL = allowed_BL.to(self.device).bool()
        if tokens_BL.dim() != 2 or allowed_BL.shape != tokens_BL.shape:
            raise ValueError(f"not both (rows, tokens): input_ids {tokens_BL.shape}, attention_mask {allowed_BL.shape}")
        longest = self.model.config.max_sequence_length
        if gen_length is None:
            left = longest - int(allowed_BL.sum(dim=1).max())
            gen_length = min(at_most, left)
            if left < 1:
                raise ValueError(f"the prompt fills all of max_sequence_length={longest}; gen_length has no room")
        if gen_length and ((tokens_BL == self.mask_id) & allowed_BL).any():
            raise ValueError(f"the prompt holds mask_token_id={self.mask_id}; use fill() to write there")
        canvas_BL = F.pad(tokens_BL, (0, gen_length), value=self.mask_id)
        allowed_BL = F.pad(allowed_BL, (0, gen_length), value=True)
        self.open_BL, self.mask_B11L, self.position_BL = (canvas_BL == self.mask_id) & allowed_BL, None, None
        lengths, counts = torch.stack([allowed_BL.sum(dim=1), self.open_BL.sum(dim=1)]).tolist()
        if max(lengths) > longest:
            what = f"more than max_sequence_length={longest}; shorten the prompt or gen_length={gen_length}"
            raise ValueError(f"the canvas has {max(lengths)} tokens, {what}")
        block_length, steps = self.settings.plan(counts)
        if min(lengths) < canvas_BL.shape[1]:
            # Counted without padding: a row gets the very angles that it would have alone.
            self.position_BL = self.both((allowed_BL.cumsum(dim=1) - 1).clamp(min=0))
            self.mask_B11L = self.both(allowed_BL[:, None, None, :])
        # Masks from left to right, then positions that are none: a row with fewer masks has slots never written to.
        slots_BN = torch.argsort((~self.open_BL).int(), dim=1, stable=True)[:, : max(counts)]
        for slots_BK in slots_BN.split(block_length, dim=1):
            self.fill_block(canvas_BL, slots_BK, steps)
        return canvas_BL

    def both(self, x):
        """A row per row to run: guidance runs a second branch."""
        return torch.cat([x, x]) if self.settings.cfg_scale else x

    def fill_block(self, canvas_BL, slots_BK, steps):
        """Write the block's tokens into the canvas; each step keeps its share, larger ones first."""
        left, begin, past = slots_BK.shape[1], 0, None  # left: masks of the row that has most of them
        while left:
            # Positions still masked come first: no others meet the vocabulary.
            masked_BK = self.open_BL.gather(1, slots_BK) & (canvas_BL.gather(1, slots_BK) == self.mask_id)
            first_BN = torch.argsort((~masked_BK).int(), dim=1, stable=True)[:, :left]
            at_BN, masked_BN = slots_BK.gather(1, first_BN), masked_BK.gather(1, first_BN)
            renew = self.settings.cache == "prefix" and past is None
            token_BN, confidence_BN, fresh = self.predict(canvas_BL, at_BN, begin, past, renew)
            keep_BN = self.kept(token_BN, confidence_BN, masked_BN, steps)
            canvas_BL.scatter_(1, at_BN, torch.where(keep_BN, token_BN, canvas_BL.gather(1, at_BN)))
            left, steps = left - -(-left // steps), steps - 1
            if renew:
                begin = int(slots_BK[:, 0].min())
                past = tuple((key[:, :, :begin], value[:, :, :begin]) for key, value in fresh)

    def predict(self, canvas_BL, at_BN, begin, past, renew):
        """A token and its confidence for the positions `at_BN`, and the pass's cache if it is to be renewed.

        The pass computes positions from `begin` on; `past` stands for those before. With guidance a second batch of
        rows sees the context masked, and hidden states are mixed: logits are linear in them.
        """
        tokens_BL, scale = canvas_BL, self.settings.cfg_scale
        if scale:
            tokens_BL = torch.cat([canvas_BL, canvas_BL.masked_fill(~self.open_BL, self.mask_id)])
        position_BL = None if self.position_BL is None else self.position_BL[:, begin:]
        hidden_BLD, fresh, _ = self.model.model(
            tokens_BL[:, begin:], self.mask_B11L, position_BL, past=past, use_cache=renew
        )
        place_BN1 = self.both(at_BN - begin).clamp(min=0)[..., None].to(hidden_BLD.device)
        hidden_BND = hidden_BLD.gather(1, place_BN1.expand(-1, -1, hidden_BLD.shape[-1]))
        if scale:
            seeing, blind = hidden_BND.float().chunk(2)
            hidden_BND = ((1 + scale) * seeing - scale * blind).to(hidden_BND.dtype)
        chosen = [self.choose(rows) for rows in hidden_BND.flatten(0, 1).split(ROWS)]
        token_BN, confidence_BN = (torch.cat([pair[i] for pair in chosen]).view(at_BN.shape) for i in (0, 1))
        if self.settings.temperature == 0:
            # Where a row shows no token all distributions are equal, and only rounding would rank them: leftmost first.
            seen_BL = canvas_BL != self.mask_id
            seen_BL = seen_BL if self.mask_B11L is None else seen_BL & self.mask_B11L[: len(seen_BL), 0, 0]
            confidence_BN = torch.where(seen_BL.any(dim=1, keepdim=True), confidence_BN, confidence_BN[:, :1])
        return token_BN, confidence_BN, fresh

    def choose(self, hidden_RD):
        """Tokens, and log p of each under the clean distribution: without temperature and noise."""
        logits_RV = self.model.model.unembed(hidden_RD).to(self.device, torch.float32)
        noised_RV = logits_RV = logits_RV.masked_fill(self.forbidden_V, -torch.inf)
        if self.settings.temperature > 0:
            # Gumbel-max in float64: coarse noise cuts the tail off (arXiv 2409.02908). MPS has no float64.
            place = "cpu" if logits_RV.device.type == "mps" else logits_RV.device
            uniform_RV = self.uniform(logits_RV.shape, place, torch.float64)
            noised_RV = logits_RV.to(place).double() - self.settings.temperature * (-uniform_RV.log()).log()
        token_R = noised_RV.argmax(dim=-1).to(logits_RV.device)
        return token_R, logits_RV.gather(1, token_R[:, None])[:, 0] - logits_RV.logsumexp(dim=-1)

    def kept(self, token_BN, confidence_BN, masked_BN, steps_left):
        """Which predictions this step keeps; all that remain when it is the last."""
        score_BN = confidence_BN
        if self.settings.remasking == "random":
            score_BN = self.uniform(token_BN.shape, token_BN.device, torch.float32)
        elif self.settings.eos == "no_confidence":
            score_BN = score_BN.masked_fill(torch.isin(token_BN, self.ends), torch.finfo(torch.float32).min)
        order_BN = score_BN.masked_fill(~masked_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
        quota_B1 = (masked_BN.sum(dim=1, keepdim=True) + steps_left - 1) // steps_left
        return masked_BN & (order_BN.argsort(dim=1) < quota_B1)

    def uniform(self, shape, device, dtype):
        """Numbers from [0, 1), drawn where the generator lives."""
        where = device if self.settings.generator is None else self.settings.generator.device
        return torch.rand(shape, generator=self.settings.generator, device=where, dtype=dtype).to(device)
