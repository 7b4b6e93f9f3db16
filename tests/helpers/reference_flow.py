"""The flow of the scripts in getao/icae `code/icae_v2`, rewritten for the tests.

Every call on the model is one that those scripts make. Devices, file names and Mistral's literal ids are arguments.
"""

import os

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import HfArgumentParser, Trainer
from transformers.trainer_utils import get_last_checkpoint

from icae_fast.compat import ICAE, DataArguments, ModelArguments, TrainingArguments


def parse(command_line):
    """Return (model, data, training) arguments parsed from a command line, a list."""
    return HfArgumentParser((ModelArguments, DataArguments, TrainingArguments)).parse_args_into_dataclasses(
        [str(a) for a in command_line]
    )


def lora_config(rank, dropout):
    """Return the scripts' LoRA config, with PEFT's default target modules."""
    return LoraConfig(r=rank, lora_alpha=32, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM")


def inference_model(command_line):
    """Load a model as both inference scripts do: `--output_dir` is the checkpoint's file."""
    model_args, _, training_args = parse(command_line)
    model = ICAE(model_args, training_args, lora_config(model_args.lora_r, model_args.lora_dropout))
    model.load_state_dict(load_file(training_args.output_dir), strict=False)
    return model.to("cpu").eval()


def _decode(model, embeddings, max_tokens):
    output, cache, produced = embeddings.clone(), None, []
    for _ in range(max_tokens):
        with model.icae.disable_adapter():
            out = model.icae(inputs_embeds=output, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = torch.argmax(out.logits[:, -1, : model.vocab_size - 1], dim=-1)
        if token.item() == model.eos_id:
            break
        produced.append(token.item())
        output = model.icae.get_base_model().model.embed_tokens(token).unsqueeze(1).to("cpu")
    return produced


@torch.no_grad()
def restore(model, text, max_tokens):
    """Restore a text as `pretrained_inference.py` does: slots, AE, then greedy decoding."""
    ids = model.tokenizer(text, truncation=True, max_length=5120, padding=False, return_attention_mask=False)
    slots = model._compress(torch.LongTensor([ids["input_ids"]]))
    prompt = model.tokens_to_embeddings(torch.LongTensor([[model.ae_token_id]]))
    return _decode(model, torch.cat((slots.to(prompt).unsqueeze(0), prompt), dim=1), max_tokens)


@torch.no_grad()
def ask(model, text, prompt, template, max_tokens):
    """Answer as `fine_tuned_inference.py` does: template, slots, FT, prompt, template, then greedy decoding.

    Args:
        template: ids of both parts of the template.
    """
    ids = model.tokenizer(text, truncation=True, max_length=5120, padding=False, return_attention_mask=False)
    prompt_ids = model.tokenizer(prompt, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    slots = model._compress(torch.LongTensor([ids["input_ids"]]))
    left = model.tokens_to_embeddings(torch.LongTensor([template[0]]))
    right = model.tokens_to_embeddings(torch.LongTensor([[model.ft_token_id, *prompt_ids, *template[1]]]))
    return _decode(model, torch.cat((left, slots.to(right).unsqueeze(0), right), dim=1), max_tokens)


def autoencoding_rows(examples, model, mem):
    """Make rows as `pretrain_tokenize_function` does, without its continuation samples; for `Dataset.map`."""
    rows = model.tokenizer(examples["text"], truncation=False, padding=False, return_attention_mask=False)
    rows["prompt_answer_ids"], rows["labels"] = [], []
    for ids in rows["input_ids"]:
        assert len(ids) <= model.training_args.model_max_length
        prompt = [mem[0]] * (model.compute_num_segments(len(ids)) * model.mem_size) + [model.ae_token_id]
        answer = [*ids, model.eos_id]
        rows["prompt_answer_ids"].append(prompt + answer)
        rows["labels"].append([-100] * len(prompt) + answer)
    return rows


class PaddingCollator:
    """`DataCollatorForDynamicPadding` rewritten: pad contexts and prompts with [PAD], labels with -100."""

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, examples):
        def pad(name, value):
            rows = [torch.tensor(e[name], dtype=torch.long) for e in examples]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "labels": pad("labels", -100),
            "prompt_answer_ids": pad("prompt_answer_ids", self.pad_token_id),
        }


def train_model(model, train_dataset, eval_dataset, training_args, data_collator=None):
    """Train as `training_utils.train_model` does; return the trainer and its evaluation."""
    last = None
    if os.path.isdir(training_args.output_dir) and not training_args.overwrite_output_dir:
        last = get_last_checkpoint(training_args.output_dir)
    if max(training_args.per_device_train_batch_size, training_args.per_device_eval_batch_size) == 1:
        data_collator = None
    str(training_args)  # which the reference prints
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
    )
    result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or last)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    return trainer, metrics
