"""Frozen language models as pure functions of their weights and of one row at a time."""

from softprompt.models.decoder import Decoder, DecoderConfig
from softprompt.models.t5 import T5
from softprompt.models.t5_layers import T5Config

Model = Decoder | T5
ModelConfig = DecoderConfig | T5Config
