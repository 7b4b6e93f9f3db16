"""Drop-in replacement for the reference's `ICAE` and argument classes.

The scripts of getao/icae (`pretrain.py`, `instruction_finetune.py`, `pretrained_inference.py` and
`fine_tuned_inference.py`, with an unchanged `training_utils.py`) run on any supported base model after one line of
theirs is replaced:

    from modeling_icae_multi_span import ICAE, ModelArguments, DataArguments, TrainingArguments    # replace this
    from icae_fast.compat import ICAE, ModelArguments, DataArguments, TrainingArguments            # with this

Intended differences from the reference:

* One copy of the base model encodes and decodes (`decoder` is the same object). Its vocabulary is not resized: logits
  and `icae.config.vocab_size` have the base model's width, so the added tokens never compete with text tokens.
* Batches may have any size. Rows are padded on the right with `pad_token_id`, and padding is never computed.
* `bos_id` and `eos_id` are those of the tokenizer or the model, not Mistral's 1 and 2.
* `state_dict()` holds only the trained tensors. `load_state_dict` refuses a dict that lacks any of these, even with
  `strict=False`, where the reference would continue with random weights (getao/icae #15).
* Weights that the reference keeps in fp16 when `--bf16` is not set are fp32 on a CPU, where fp16 is slower than fp32
  and overflows.

For batches of more than one row the script must pad: pass the reference's
`DataCollatorForDynamicPadding(model.pad_token_id)` to `train_model`, as its `pretrain.py` does and
`instruction_finetune.py` does not.

Source: getao/icae `code/icae_v2/modeling_icae_multi_span.py`.
"""

from icae_fast.compat.adapted_model import AdaptedModel
from icae_fast.compat.arguments import DataArguments, ModelArguments, TrainingArguments, config_from_arguments
from icae_fast.compat.icae import ICAE

__all__ = ["ICAE", "AdaptedModel", "DataArguments", "ModelArguments", "TrainingArguments", "config_from_arguments"]
