"""LLaDA's reverse process, from masks to tokens: what `generate` and `fill` of modeling_llada.py do, and their options.

Shapes: B sequences, L positions of the canvas, N of them, K of a block, D width, V vocabulary, R rows of positions.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers.generation import GenerationMixin

ROWS = 256  # positions that meet the vocabulary at once, so that a long canvas never holds all of its logits


class LLaDASampling:
    """How to run the reverse process; `LLaDAModelLM.generate` says what the settings mean."""

    CHOICES = {
        "remasking": ("low_confidence", "random"),
        "eos": ("keep", "no_logits", "no_confidence"),
        "cache": ("none", "prefix"),
    }
    NAMES = "steps block_length temperature cfg_scale remasking eos cache generator".split()

    def __init__(
        self,
        steps=None,
        block_length=None,
        temperature=0.0,
        cfg_scale=0.0,
        remasking="low_confidence",
        eos="keep",
        cache="none",
        generator=None,
        **unknown,
    ):
        if unknown:
            raise TypeError(
                f"LLaDA does not take {', '.join(sorted(unknown))}. Its reverse process takes gen_length (or "
                f"max_new_tokens), {', '.join(self.NAMES)}; it samples where temperature > 0 and always writes "
                "gen_length tokens"
            )
        self.steps, self.block_length, self.temperature, self.cfg_scale = steps, block_length, temperature, cfg_scale
        self.remasking, self.eos, self.cache, self.generator = remasking, eos, cache, generator
        for name, allowed in self.CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("temperature", "cfg_scale"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number of at least 0")
        if eos == "no_confidence" and remasking != "low_confidence":
            raise ValueError(f"eos='no_confidence' ranks by confidence; remasking={remasking!r} does not")

    def plan(self, counts):
        """(block_length, steps in each block) for rows with so many masks. ValueError for what cannot fill them."""
        most, least = max(counts), min(counts)
        length = most if self.block_length is None else self.block_length
        if not 1 <= length <= most:
            raise ValueError(f"block_length={length} must be between 1 and the {most} tokens to write")
        blocks = -(-most // length)
        if -(-least // length) != blocks:
            raise ValueError(
                f"rows have {least} to {most} masks, which block_length={length} makes different numbers of blocks"
            )
        steps = blocks * length if self.steps is None else self.steps
        if steps < blocks or steps % blocks or steps > blocks * length:
            raise ValueError(
                f"steps={steps} must be a positive multiple of the {blocks} block(s) that block_length={length} makes "
                f"of {most} tokens, and at most {blocks * length}"
            )
        return length, steps // blocks


class LLaDAOptions:
    """What callers of transformers' `generate`, and its pipeline, pass along: what means something here, and the rest.

    settings    keywords for LLaDASampling
    gen_length  tokens to write; None: as many as the context leaves, but `at_most`, which a config may say
    ends        ids that end a text, or None
    """

    WITHOUT_EFFECT = "bos_token_id custom_generate pad_token_id synced_gpus token_type_ids tokenizer use_cache".split()
    # What is not done here may be passed where it asks for nothing.
    NOTHING = {
        "length_penalty": (1.0,),
        "no_repeat_ngram_size": (0,),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "num_beam_groups": (1,),
        "num_beams": (1,),
        "num_return_sequences": (1,),
        "repetition_penalty": (1.0,),
        "top_k": (0,),
        "top_p": (1.0,),
        "typical_p": (1.0,),
        "epsilon_cutoff": (0.0,),
        "eta_cutoff": (0.0,),
        "diversity_penalty": (0.0,),
        "encoder_repetition_penalty": (1.0,),
    }

    def __init__(self, gen_length, prompt_length, options, own_config):
        config = options.pop("generation_config", None)
        for name in self.WITHOUT_EFFECT:
            options.pop(name, None)
        refused = [name for name, value in options.items() if not self._is_known(name, value)]
        if config is not None:
            # 50 is what transformers 4 fills in for a top_k that nobody asked for.
            given = {(name, getattr(config, name, None)) for name in self.NOTHING} - {("top_k", 50)}
            refused += [name for name, value in given if not self._is_known(name, value)]
        if refused:
            raise TypeError(
                f"LLaDA does not take {', '.join(sorted(refused))}. Its reverse process takes gen_length (or "
                f"max_new_tokens), {', '.join(LLaDASampling.NAMES)}; it samples where temperature > 0 and always "
                "writes gen_length tokens"
            )
        self.settings = {name: value for name, value in options.items() if name in LLaDASampling.NAMES}
        self.settings["temperature"] = self._temperature(options, config)
        self.at_most = getattr(config, "max_new_tokens", None) or own_config.max_new_tokens or 64
        most = options.get("max_length")
        if most is None and config is not None and config.max_new_tokens is None and config.max_length != 20:
            most = config.max_length  # transformers 4 fills in 20
        gen_length = options.get("max_new_tokens") if gen_length is None else gen_length
        if gen_length is None and most is not None:
            gen_length = most - prompt_length
        self.gen_length = gen_length
        if self.gen_length is not None and self.gen_length < 1:
            raise ValueError(f"gen_length={self.gen_length} must be at least 1")
        self.ends = options.get("eos_token_id", getattr(config, "eos_token_id", None))

    def _is_known(self, name, value):
        """Whether an option means something here, or asks for nothing."""
        if name in LLaDASampling.NAMES or name in ("do_sample", "eos_token_id", "max_length", "max_new_tokens"):
            return True
        return value is None or value is False or (value is not True and value in self.NOTHING.get(name, ()))

    @staticmethod
    def _temperature(options, config):
        """0 is greedy. One that is passed counts, else that of the config where it says do_sample."""
        sample, temperature = options.get("do_sample"), options.get("temperature")
        if sample is not None and temperature is not None and bool(sample) != (temperature > 0):
            raise ValueError(f"do_sample={sample} and temperature={temperature} contradict each other; leave out one")
        if temperature is not None:
            return temperature
        sample = getattr(config, "do_sample", False) if sample is None else sample
        return (getattr(config, "temperature", None) or 1.0) if sample else 0.0


class LLaDAGenerationMixin(GenerationMixin):
    """`generate` and `fill` of a mask predictor."""

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
