"""Drop-in for the reference's own scripts: its `ICAE` and arguments over this package's module.

One line of getao/icae's `pretrain.py`, `instruction_finetune.py`, `pretrained_inference.py` or
`fine_tuned_inference.py` changes, and they (with `training_utils.py` as it is) run on any supported base model:

    from modeling_icae_multi_span import ICAE, ModelArguments, DataArguments, TrainingArguments    # before
    from icae_fast.compat import ICAE, ModelArguments, DataArguments, TrainingArguments            # after

What is different, on purpose:

* One copy of the base model encodes and decodes (`decoder` is the same object), and it keeps its vocabulary: logits
  and `icae.config.vocab_size` have the base's width, so that added tokens never compete.
* Any batch size; rows are padded on the right with `pad_token_id`, and padding is never computed.
* `bos_id` and `eos_id` are the tokenizer's or the model's, not Mistral's 1 and 2.
* `state_dict()` holds the trained tensors alone, and `load_state_dict` refuses a dict that lacks some of them even
  with `strict=False`: the reference goes on with random weights (getao/icae #15).
* What the reference keeps in fp16 when `--bf16` is not given is fp32 on a CPU, where fp16 is slower than fp32 and
  overflows.

A batch of more than one needs the script to pad it: give `train_model` the reference's
`DataCollatorForDynamicPadding(model.pad_token_id)`, as its `pretrain.py` does and `instruction_finetune.py` does not.

Source: getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
"""

from icae_fast.compat.adapted_model import AdaptedModel
from icae_fast.compat.arguments import DataArguments, ModelArguments, TrainingArguments, config_from_arguments
from icae_fast.compat.icae import ICAE

__all__ = ["ICAE", "AdaptedModel", "DataArguments", "ModelArguments", "TrainingArguments", "config_from_arguments"]
