"""Sizes of the published T5s. LM-adapted T5s and Flan-T5 have the sizes of T5 1.1.

Source: the `config.json` of each repository on the hub, and the gin files of
https://github.com/google-research/t5x/tree/main/t5x/examples/t5.
"""

from dataclasses import replace

from softprompt.models.t5_layers import T5Config


def _t5(width: int, ffn: int, heads: int, encoder_layers: int, decoder_layers: int) -> T5Config:
    return T5Config(
        vocab=32128,
        width=width,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        heads=heads,
        head_size=64,
        ffn=ffn,
    )


_PLAIN = {
    "small": _t5(512, 2048, 8, 6, 6),
    "base": _t5(768, 3072, 12, 12, 12),
    "large": _t5(1024, 4096, 16, 24, 24),
    "3B": replace(_t5(1024, 16384, 32, 24, 24), head_size=128),
    "11B": replace(_t5(1024, 65536, 128, 24, 24), head_size=128),
}

_BYTES = {
    "small": _t5(1472, 3584, 6, 12, 4),
    "base": _t5(1536, 3968, 12, 18, 6),
    "large": _t5(1536, 3840, 16, 36, 12),
    "xl": _t5(2560, 6720, 32, 36, 12),
    "xxl": _t5(4672, 12352, 64, 36, 12),
}

T5_11 = {
    "small": _t5(512, 1024, 6, 8, 8),
    "base": _t5(768, 2048, 12, 12, 12),
    "large": _t5(1024, 2816, 16, 24, 24),
    "xl": _t5(2048, 5120, 32, 24, 24),
    "xxl": _t5(4096, 10240, 64, 24, 24),
}
T5_10 = {name: replace(c, gated=False, activation="relu", tied=True) for name, c in _PLAIN.items()}
MT5 = {name: replace(c, vocab=250112, context_length=1024) for name, c in T5_11.items()}
BYT5 = {name: replace(c, vocab=384, context_length=1024) for name, c in _BYTES.items()}
