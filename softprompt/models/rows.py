"""What a model reads: packed rows, in which several examples lie side by side."""

from typing import Any

from flax import struct

Array = Any  # NumPy's on the host, JAX's in a compiled program


@struct.dataclass
class Rows:
    """Rows of a batch, each array [R, ...]; or one row, where `jax.vmap` has taken the axis R away.

    An encoder-decoder has two rows for the same examples: its decoder's, and in `encoder` one of S
    positions, for whose tokens, segments, positions and prompt the same holds.

    Attributes:
        tokens: [T], token ids. Any where a prompt stands.
        segments: [T], the example that a position belongs to: 1, 2, ... in a row, its positions
            adjacent; 0 is padding. A position sees its own example only.
        positions: [T], of a token in its example, from 0. A context and an inline prompt come
            before.
        index: [M], the positions whose logits are needed; None in an encoder's row.
        prompt_index: [T], the row of the inline prompts that stands here, -1 where a token does;
            None: no prompt stands inline.
        which: [T], the number of the context that a token sees; None: there is one context.
        branches: [T], tells apart sequences (candidate answers) that continue one input, from 1. A
            position sees its own branch, and in a decoder-only model the input, which is branch 0;
            None: there is one sequence.
        examples: [E], ids of the examples that are segments 1, 2, ...; None: nothing is dropped.
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
