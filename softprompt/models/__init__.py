"""Frozen language models as pure functions of their weights and of one row at a time."""

from softprompt.models.decoder import Decoder
from softprompt.models.t5 import T5

Model = Decoder | T5
