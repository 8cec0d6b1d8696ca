"""What every method module has besides its functions: settings, and what is known of its trial.

A method module has a class `Settings`: its keys of a config's section "method", and what the code
outside may ask of it. `resolve(settings, setup)` makes of them the static configuration that the
module's `init`, `variables` and `fold` take. A method that `is_context` also has `context(cfg)`. A
method whose trained model is the same model with other weights also has `merge(delta, weights,
cfg)`, which returns those.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods import initializers
from softprompt.models.decoder_layers import DecoderConfig
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.settings import Settings, keys, setting, summaries

if TYPE_CHECKING:  # it imports every format that a model may come in
    from softprompt.pretrained.loading import Loaded


def bos_setting(*choices: str) -> Any:
    """The key `method.bos`, with what a method allows."""
    return setting(
        "after",
        "after (the text begins with BOS, where the model was trained so: what PEFT reads), before "
        "(what stands before the text does, or where nothing does the text, always) or none",
        choices=choices,
    )


@dataclasses.dataclass(frozen=True)
class MethodSettings(Settings):
    """The keys that every method has, and what the code outside asks of it.

    Attributes:
        name: of the method.
        trains: it trains something.
        trains_weights: what it trains are the model's weights, so that none of them are frozen.
        is_context: what it makes stands before a text.
        is_prompt: it does so among the embeddings, which the model runs through its layers.
        per_task: it makes something of its own for each task of a mixture.
        shows_examples: what stands before a text are examples of the train split.
        multiplies_tokens: its delta is matrices that every token is multiplied by.
        may_leave_out: a delta may be without some of its modules, as imported ones are.
        drops: what `dropout` drops, a field of `softprompt.models.dropout.Dropout`; "" where the
            method has no such key.
    """

    section = "method"
    name: ClassVar[str]
    trains: ClassVar[bool] = True
    trains_weights: ClassVar[bool] = False
    is_context: ClassVar[bool] = False
    is_prompt: ClassVar[bool] = False
    per_task: ClassVar[bool] = False
    shows_examples: ClassVar[bool] = False
    multiplies_tokens: ClassVar[bool] = False
    may_leave_out: ClassVar[bool] = False
    drops: ClassVar[str] = ""

    bos: str = bos_setting("after", "none")

    @property
    def begins_with_bos(self) -> bool:
        """Whether a BOS stands before what the method puts before a text, not behind it."""
        return False

    def label(self) -> str:
        """The method and its size, for a trial's name."""
        return self.name


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a method may know of its trial besides its own settings.

    Attributes:
        sizes: of the model.
        tasks: how many are trained on together.
        seed: of the trial.
        room: positions that the model leaves for what stands before a text.
        start: the settings of the initialiser that `method.init` names. None, as `loaded` and
            `train` are, where only the shapes of a delta are asked for.
        loaded: the pretrained model.
        train: the examples that are trained on.
    """

    sizes: DecoderConfig | T5Config
    tasks: int = 1
    seed: int = 0
    room: int = 2**30
    start: initializers.Start | None = None
    loaded: "Loaded | None" = None
    train: Encoded | None = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether inputs go to an encoder and targets to a decoder of its own."""
        return isinstance(self.sizes, T5Config)

    def initializer(self, place: str) -> initializers.Initializer:
        """Where prompts start; `place` is `method.place`.

        Raises:
            UserError: the start's texts or files cannot be used for this model.
        """
        if self.start is None or self.loaded is None or self.train is None:
            return initializers.uniform()
        return self.start.initializer(self.loaded, self.train, place=place)


@dataclasses.dataclass(frozen=True)
class Context:
    """What stands before a text.

    Attributes:
        length: in vectors, a BOS before them included.
        places: an encoder-decoder's stacks that have so many each, "encoder" or "decoder" (others
            have no positions); () for a decoder.
        prompts: how many there are for examples to have one of, by their task; 0 where all have the
            same.
    """

    length: int = 0
    places: tuple[str, ...] = ()
    prompts: int = 0


@dataclasses.dataclass(frozen=True)
class TrainedContextSettings(MethodSettings):
    """The keys of methods that train what stands before a text."""

    is_context = True

    length: int = setting(20, "length P, in vectors; 0 is the plain model", low=0)
    init: str = setting(
        "vocabulary",
        f"what it starts from: {summaries(initializers.INITIALIZERS)}",
        choices=initializers.INITIALIZERS,
    )
    place: str = setting(
        "encoder",
        "encoder-decoders: before the encoder's input, the decoder's, or both",
        choices=("encoder", "decoder", "both"),
    )
    prompt_to_input: bool = setting(
        True, "encoder-decoders: the prompt and the input see each other, as in the paper"
    )

    def label(self) -> str:
        """The method, its length and its start."""
        return f"{self.name}-{self.length}-{self.init}"

    def stacks(self, setup: Setup) -> tuple[str, ...]:
        """The places of an encoder-decoder that `method.place` names; () for a decoder.

        Raises:
            UserError: a decoder with a key of encoder-decoders.
        """
        if setup.encoder_decoder:
            named = {"both": ("encoder", "decoder"), "all": ("encoder", "decoder", "cross")}
            return named.get(self.place, (self.place,))
        for key in ("place", "prompt_to_input"):
            value, usual = getattr(self, key), keys(type(self))[f"method.{key}"].default
            if value != usual:
                raise UserError(
                    f"config key 'method.{key}' is {value!r}, of encoder-decoders; allowed for a "
                    f"decoder: {usual!r}"
                )
        return ()

    def check_room(self, setup: Setup) -> None:
        """Checks that the model has positions for so many vectors.

        Raises:
            UserError: it has fewer.
        """
        most = setup.room - self.begins_with_bos
        if isinstance(setup.sizes, DecoderConfig) and self.length > most:
            more = ", and a BOS before the prompt" if self.begins_with_bos else ""
            raise UserError(
                f"config key 'method.length' is {self.length}; allowed: at most {most} (the "
                f"model's context of {setup.sizes.context_length} less task.max_input and "
                f"task.max_target{more})"
            )


def wants_bos(bos: str, tokenizer: Tokenizer) -> bool:
    """Whether a text, or what stands before it, begins with BOS.

    With `method.bos` "after" it does where the model was trained so, with "before" always.

    Raises:
        UserError: the tokenizer has none.
    """
    if bos == "before" and tokenizer.bos_id is None:
        raise UserError("config key 'method.bos' is 'before'; this model's tokenizer has no BOS")
    return bos == "before" or tokenizer.add_bos and bos == "after"
