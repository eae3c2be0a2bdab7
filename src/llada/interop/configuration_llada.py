"""Configuration of LLaDA, the model and its sampler, for transformers 4.50 and later, 5.x included; self-contained.

The model's fields are those of the released LLaDA-8B checkpoints, whose config.json means the same here, and `qk_norm`
beside them. Fields that say how a model was trained or set up (init_*, precision, flash_attention, dropouts) are kept
and, but for `init_std`, not read.
"""

from transformers import PretrainedConfig

DEFAULTS = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "qk_norm": False,
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}

# What modeling_llada.py computes; any other value of these would change the mathematics. None of a switch is off.
SUPPORTED = {
    "activation_type": ("silu",),
    "alibi": (False,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "block_group_size": (1,),
    "block_type": ("llama",),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "multi_query_attention": (False, None),
    "rope": (True,),
    "scale_logits": (False,),
}


class LLaDAConfig(PretrainedConfig):
    """One LLaDA: the released schema and its 8B values as defaults, all by keyword.

    n_kv_heads       key/value heads, fewer than n_heads for grouped queries; None: n_heads
    mlp_hidden_size  channels of the feed-forward branch; None: mlp_ratio * d_model
    embedding_size   rows of the embedding and of the head, at least vocab_size; None: vocab_size
    weight_tying     the head is the embedding; `tie_word_embeddings` is another name of it
    qk_norm          RMSNorm over each head's channels of queries and keys before the rotary embedding; not in the
                     released schema
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        # transformers ties by this name, and its default is True: one value under two names cannot disagree.
        "tie_word_embeddings": "weight_tying",
    }

    def __init__(self, **fields):
        tied = fields.pop("tie_word_embeddings", None)
        for name, default in DEFAULTS.items():
            setattr(self, name, fields.pop(name, default))
        if tied is not None and tied != self.weight_tying:
            raise ValueError(f"tie_word_embeddings={tied} contradicts weight_tying={self.weight_tying}; set the latter")
        # Passed on is what the base class of some version would set to a default of its own.
        ids = {"eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        super().__init__(tie_word_embeddings=self.weight_tying, **ids, **fields)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        self._check()

    def _check(self):
        """ValueError for what modeling_llada.py does not compute, and for sizes that do not fit each other."""
        wrong = [name for name, allowed in SUPPORTED.items() if getattr(self, name) not in allowed]
        if wrong:
            found = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            allowed = ", ".join(f"{name}={SUPPORTED[name][0]!r}" for name in wrong)
            raise ValueError(f"this LLaDA implementation does not compute {found}; it needs {allowed}")
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2:
            raise ValueError(f"d_model={self.d_model} does not give n_heads={self.n_heads} heads of even size")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}")
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"embedding_size={self.embedding_size} is smaller than vocab_size={self.vocab_size}")


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
