"""Flags of the commands that have a model write, or score what it might write: fields of `generation.Request`."""

from llada.commands.command_flags import CommandFlags

# In which order and how many at once positions are written.
ORDER_FLAGS = CommandFlags()
STEPS = ORDER_FLAGS.define_integer("steps", None, "steps of the reverse process; default one per token")
BLOCK_LENGTH = ORDER_FLAGS.define_integer(
    "block_length", None, "fill block by block, left to right; default one block; 1: in order"
)
CONFIDENCE_THRESHOLD = ORDER_FLAGS.define_float(
    "confidence_threshold", None, "approximate: also write every prediction at least this probable"
)

FLAGS = CommandFlags(ORDER_FLAGS)
SEED = FLAGS.define_integer("seed", 0, "of the sampling noise", lower_bound=0, upper_bound=2**31 - 1)
TEMPERATURE = FLAGS.define_float("temperature", 0.0, "0: most likely tokens; 1: the model's own distribution")
CFG_SCALE = FLAGS.define_float("cfg_scale", None, "classifier-free guidance w of LLaDA Eq. (16); default none")
OPTIONS = (
    STEPS,
    BLOCK_LENGTH,
    TEMPERATURE,
    CFG_SCALE,
    FLAGS.define_string(
        "remasking", None, "what a step writes: low_confidence (default), top_probability, random or random_binomial"
    ),
    FLAGS.define_string(
        "eos", None, "end tokens: keep (default), no_logits (never written), no_confidence (written last)"
    ),
    FLAGS.define_integer("speculate", None, "canvases per pass: the same text in fewer passes; default 1, off"),
    FLAGS.define_string("cache", None, "approximate: prefix or dual; default none"),
    CONFIDENCE_THRESHOLD,
)
