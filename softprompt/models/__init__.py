"""Frozen language models: one row at a time, functional, their weights apart."""

from softprompt.models.decoder import Decoder
from softprompt.models.t5 import T5

Model = Decoder | T5
