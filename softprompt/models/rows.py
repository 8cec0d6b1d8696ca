"""The input of a model: packed rows, each of which holds several examples."""

from typing import Any

from flax import struct

Array = Any  # NumPy's on the host, JAX's in a compiled program


@struct.dataclass
class Rows:
    """Rows of a batch with arrays [R, ...]; or, inside `jax.vmap`, one row without the axis R.

    An encoder-decoder has two rows for the same examples: the decoder's, and in `encoder` the
    encoder's of S positions, with the same fields for its tokens, segments, positions and prompt.

    Attributes:
        tokens: [T], token ids; ignored at the slots of an inline prompt.
        segments: [T], the example of each position: 1, 2, ... in a row; 0 is padding. Positions of
            an example are adjacent and see only that example.
        positions: [T], the position of a token in its example, from 0, without context and inline
            prompt.
        index: [M], the positions whose logits are needed; None in an encoder's row.
        prompt_index: [T], the row of the inline prompts that is used here, -1 for a token; None:
            there is no inline prompt.
        which: [T], the number of the context that a token sees; None: there is one context.
        branches: [T], the number, from 1, of a sequence (a candidate answer) that continues the
            input. A position sees its own branch and, in a decoder-only model, the input, which is
            branch 0. None: there is one sequence.
        examples: [E], ids of the examples of segments 1, 2, ...; None: nothing is dropped.
        encoder: the encoder's row; None for a decoder-only model.
    """

    tokens: Array
    segments: Array
    positions: Array
    index: Array = None
    prompt_index: Array = None
    which: Array = None
    branches: Array = None
    examples: Array = None
    encoder: "Rows | None" = None
