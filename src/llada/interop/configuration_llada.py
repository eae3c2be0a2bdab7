"""Configuration of LLaDA for transformers 4.50 and later, 5.x included; self-contained.

The fields are those of the released LLaDA-8B checkpoints, whose config.json means the same here, and beside them
`qk_norm` and those of the objective. Fields that say how a model was trained or set up (init_*, precision,
flash_attention, dropouts) are kept and, but for `init_std`, not read.
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
    "loss_eps": 1e-3,
    "loss_normalization": "sequence",
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
    loss_eps         the least probability with which the objective masks a token: its weight 1/p is at most 1/loss_eps
    loss_normalization  "sequence": the loss is the mean over sequences of nats per labelled token; "token": over all
                     labelled tokens of a batch. Neither is in the released schema
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
        if self.loss_normalization not in ("sequence", "token"):
            raise ValueError(f"loss_normalization={self.loss_normalization!r} must be 'sequence' or 'token'")
        if not 0 <= self.loss_eps < 1:
            raise ValueError(f"loss_eps={self.loss_eps} must be at least 0 and less than 1")
