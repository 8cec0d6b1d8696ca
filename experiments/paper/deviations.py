"""What differs from the paper, in the whole study and in each artefact."""

from types import ModuleType

from experiments.paper import (
    continual,
    data_size,
    domain,
    figure1,
    figure2,
    figure3_length,
    figure3_pretraining,
    figure3_start,
    parameters,
    scaling_law,
    section7,
    spot,
    steps,
    style,
    table1,
    table2,
    table3,
    table5,
    table6,
    table7,
)

DEVIATIONS = (
    "Models: decoders that are pretrained here and SmolLM2-135M, and a small T5 for Figures 3c and "
    "3d; in the paper T5 1.1 from 77M to 11,135M parameters, LM-adapted.",
    "SmolLM2 is an instruct model, whose file has 4 bits a weight; the paper's T5 1.1 has seen no "
    "instructions.",
    "Tasks: question types, and the sentiment of movie snippets and of other domains; in the paper "
    "SuperGLUE.",
    "Prompts: 20 vectors, 400 steps of 32 examples on the ladder and 50 of 16 on SmolLM2, AdamW, a "
    "warm-up and a cosine; in the paper 100 vectors, 30,000 steps of 32, Adafactor, a constant "
    "rate.",
    "Dropout: none; in the paper 0.1.",
    "Learning rates: three for each method, on one model of the ladder and on SmolLM2. Full "
    "fine-tuning on SmolLM2 has the largest of its three; a larger one was not tried.",
    "Selection: on a validation split, tested on another; in the paper both on one.",
    "Answers: the candidate with the largest probability; in the paper generated.",
)

_SMOLLM2 = "SmolLM2, an instruct decoder in 4 bits, 50 steps of 16 movie snippets"
_D1 = "d1, a decoder of the ladder, 400 steps of 32 examples"
BY_ARTEFACT: dict[ModuleType, str] = {
    figure1: "Decoders instead of T5, and movie snippets (question types where all compared trials "
    "have them) instead of SuperGLUE. 400 steps of 32 examples on the ladder and 50 of 16 on "
    "SmolLM2, an instruct model in 4 bits; in the paper 30,000 of 32. Full fine-tuning starts from "
    "the weights that the prompt has, in the paper from T5 1.1 without LM adaptation. d0, d2, d3 "
    "and d4 have d1's learning rates. Few-shot is the same model with six examples, in the paper "
    "GPT-3 of like size. Both tasks at once are two tasks, in the paper the mixture of SuperGLUE.",
    scaling_law: "Not in the paper. Figure 1's trials on the ladder, and Figure 3a's on SmolLM2.",
    table1: f"{_SMOLLM2}, tested by accuracy on product reviews, tweets and editorials; in the "
    "paper SQuAD, tested by F1 on six sets of MRQA.",
    section7: f"{_SMOLLM2}. Prompts that start from labels; in the paper T5. "
    "The paper gives no scores: persistence, tightness, duplicates and displacement are defined "
    "here.",
    steps: f"Not in the paper. {_D1}, and 1,600; Vu et al. compare 30,000 with 262,144 steps on T5 "
    "Base.",
    figure3_length: f"{_SMOLLM2}, and no other model: on the ladder prompts stay at chance. In the "
    "paper T5 of five sizes on SuperGLUE, 30,000 steps of 32.",
    table5: f"{_SMOLLM2}, in seconds of a shared CPU, validated every quarter of the steps; within "
    "1 point of the best validation accuracy of the same trial. In the paper BoolQ on T5, within "
    "1 % of the mean.",
    table3: f"{_SMOLLM2}; in the paper T5 XXL on eight sets of SuperGLUE. The best prompt is "
    "chosen by validation, and ties have a rule, which the paper does not give.",
    figure3_start: f"{_SMOLLM2}, and no other model: on the ladder prompts stay at chance. In the "
    "paper T5 of five sizes. Uniform has the RMS of the embeddings, in the paper [-0.5, 0.5].",
    spot: f"{_SMOLLM2} for the source, and 50 steps on 100 examples of the target; Vu et al. train "
    "the source on other tasks for 262,144 steps, on T5.",
    figure3_pretraining: "t0, a T5 of 0.5M parameters in the layers, 400 steps of 32 movie "
    "snippets or questions; in the paper T5 1.1 on SuperGLUE. Its learning rate was not searched: "
    "it has d1's. Prompts start from the vocabulary, in the paper from labels. LM adaptation has "
    "half as many tokens as the pretraining, in the paper 100,000 steps.",
    table2: f"{_D1}: two translations of a Bible verse or not; in the paper QQP and MRPC on T5.",
    continual: f"Not in the paper. {_D1} of each of three tasks.",
    table6: "33 random settings of eight hyperparameters on a decoder, with rates of 0.1, 1 and 10 "
    "times the usual one, and at most its usual steps and batch; in the paper T5, with rates from "
    "0.001 to 0.5 and 10,000 to 30,000 steps of 32 to 512.",
    data_size: f"Not in the paper. {_SMOLLM2}, for each number of snippets.",
    domain: "Not in the paper. SmolLM2, an instruct decoder in 4 bits, 50 steps of 16 verses.",
    style: "Not in the paper. SmolLM2, an instruct decoder in 4 bits, 50 steps of 16 texts.",
    figure2: "Three prompts of 20 vectors for SmolLM2, an instruct decoder in 4 bits, computed in "
    "float32; the paper's figure is a drawing.",
    table7: "None: the sizes are those of the released sets, on which this study does not train.",
    parameters: "None: the counts are those of T5 1.1 itself. LoRA is added to the figure.",
}
