"""Base classes of the methods: their settings, and the trial's data that they may use.

A method module has a class `Settings` with its keys of a config's section "method" and with its
properties. `resolve(settings, setup)` returns the static configuration for the module's `init`,
`variables` and `fold`. A method with `is_context` also has `context(cfg)`. A method whose result
can be written as weights of the same architecture also has `merge(delta, weights, cfg)`, which
returns these weights.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods import initializers
from softprompt.models import ModelConfig
from softprompt.models.decoder_layers import DecoderConfig
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.settings import Settings, keys, setting, summaries

if TYPE_CHECKING:  # this import loads the readers of all model formats
    from softprompt.pretrained.loading import Loaded


def bos_setting(*choices: str) -> Any:
    """The key `method.bos` with the values that a method allows."""
    return setting(
        "after",
        "where BOS is: after (it begins the text, which follows the prompt, if the tokenizer adds "
        "one; as in PEFT), before (always, and before the prompt) or none",
        choices=choices,
    )


@dataclasses.dataclass(frozen=True)
class MethodSettings(Settings):
    """The keys of every method, and its properties.

    Attributes:
        name: of the method.
        trains: it has trained parameters.
        trains_weights: it trains the model's weights, so that none of them are frozen.
        is_context: it puts a context before the text.
        is_prompt: its context consists of input vectors, which the model runs through its layers.
        per_task: it has separate parameters for each task of a mixture.
        shows_examples: its context consists of examples of the train split.
        multiplies_tokens: its delta consists of matrices that every token is multiplied by.
        may_leave_out: a delta may lack some modules, as imported deltas do.
        drops: the field of `softprompt.models.dropout.Dropout` that `method.dropout` sets; "" if
            the method has no such key.
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
        """Whether BOS comes before the method's context, not after it."""
        return False

    def label(self) -> str:
        """The method and its size, for a trial's name."""
        return self.name


@dataclasses.dataclass(frozen=True)
class Setup:
    """The trial's data that a method may use besides its own settings.

    Attributes:
        sizes: the model's config.
        tasks: the number of tasks in the mixture.
        seed: of the trial.
        room: the number of positions that the model has for the method's context.
        initializer_settings: of the initialiser `method.init`. It is None, as are `loaded` and
            `train`, if only the shapes of the delta are needed.
        loaded: the pretrained model.
        train: the training examples.
    """

    sizes: ModelConfig
    tasks: int = 1
    seed: int = 0
    room: int = 2**30
    initializer_settings: initializers.InitializerSettings | None = None
    loaded: "Loaded | None" = None
    train: Encoded | None = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model is an encoder-decoder."""
        return isinstance(self.sizes, T5Config)

    def initializer(self, place: str) -> initializers.Initializer:
        """The prompts' initialiser; `place` is `method.place`.

        Raises:
            UserError: the initialiser's text or file cannot be used for this model.
        """
        if self.initializer_settings is None or self.loaded is None or self.train is None:
            return initializers.uniform()
        return self.initializer_settings.initializer(self.loaded, self.train, place=place)


@dataclasses.dataclass(frozen=True)
class ContextShape:
    """The shape of a method's context.

    Attributes:
        length: in vectors, including a BOS before them.
        stacks: of an encoder-decoder, those with a context of this length, "encoder" or "decoder"
            (a prefix of cross-attention has no positions); () for a decoder.
        prompts: the number of prompts if each task of a mixture has its own; 0 if all examples have
            the same.
    """

    length: int = 0
    stacks: tuple[str, ...] = ()
    prompts: int = 0


@dataclasses.dataclass(frozen=True)
class TrainedContextSettings(MethodSettings):
    """The keys of methods that train a context."""

    is_context = True

    length: int = setting(20, "number of vectors; 0 is the model without a prompt", low=0)
    init: str = setting(
        "vocabulary",
        f"initial values: {summaries(initializers.INITIALIZERS)}",
        choices=initializers.INITIALIZERS,
    )
    place: str = setting(
        "encoder",
        "encoder-decoders: whose input the prompt comes before: the encoder's, the decoder's, both",
        choices=("encoder", "decoder", "both"),
    )
    prompt_to_input: bool = setting(
        True, "encoder-decoders: whether the prompt attends to the input, as in the paper"
    )

    def label(self) -> str:
        """The method, its length and its initialiser."""
        return f"{self.name}-{self.length}-{self.init}"

    def stacks(self, setup: Setup) -> tuple[str, ...]:
        """What `method.place` names in an encoder-decoder; () for a decoder.

        Raises:
            UserError: the model is a decoder, and a key of encoder-decoders is set.
        """
        if setup.encoder_decoder:
            named = {"both": ("encoder", "decoder"), "all": ("encoder", "decoder", "cross")}
            return named.get(self.place, (self.place,))
        for key in ("place", "prompt_to_input"):
            value, default = getattr(self, key), keys(type(self))[f"method.{key}"].default
            if value != default:
                raise UserError(
                    f"config key 'method.{key}' is {value!r}, a key of encoder-decoders; allowed "
                    f"for a decoder: {default!r}"
                )
        return ()

    def check_room(self, setup: Setup) -> None:
        """Checks that the model has enough positions for the context.

        Raises:
            UserError: it has too few.
        """
        most = setup.room - self.begins_with_bos
        if isinstance(setup.sizes, DecoderConfig) and self.length > most:
            more = ", and a BOS before the prompt" if self.begins_with_bos else ""
            raise UserError(
                f"config key 'method.length' is {self.length}; allowed: at most {most} (the "
                f"model's context of {setup.sizes.context_length} less task.max_input and "
                f"task.max_target{more})"
            )


def no_configuration(settings: MethodSettings, setup: Setup) -> None:
    """The `resolve` of a method that needs no static configuration."""


def as_stored(delta: Any, weights: Any, cfg: Any, task_ids: Any) -> Any:
    """The `variables` of a method whose delta has the paths at which modules read it."""
    return delta


def unchanged(delta: Any, cfg: Any) -> Any:
    """The `fold` of a method that stores what it trains."""
    return delta


def wants_bos(bos: str, tokenizer: Tokenizer) -> bool:
    """Whether a text, or the context before it, begins with BOS.

    With `method.bos` "before" it always does, with "after" if the tokenizer adds BOS.

    Raises:
        UserError: `method.bos` is "before", and the tokenizer has no BOS.
    """
    if bos == "before" and tokenizer.bos_id is None:
        raise UserError("config key 'method.bos' is 'before'; this model's tokenizer has no BOS")
    return bos == "before" or tokenizer.add_bos and bos == "after"
