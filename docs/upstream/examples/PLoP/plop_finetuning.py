"""Compare LoRA on the module types that PLoP chooses with LoRA on all linear layers, at equal parameters."""

import argparse
import copy

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft import LoraConfig, get_peft_model
from peft.helpers import PlopSelector


def batches_of(texts, tokenizer, size=8, length=256):
    """Return padded batches, whose labels leave the padding out."""
    batches = []
    for start in range(0, len(texts), size):
        batch = tokenizer(
            texts[start : start + size], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    return batches


def loss_of(model, batch):
    return model(**{key: value.to(model.device) for key, value in batch.items()}).loss


def train(base, targets, rank, rate, steps, batches, held_out):
    """Return the number of trainable parameters and the mean loss on held-out batches."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    model.train()
    for step in range(steps):
        loss_of(model, batches[step % len(batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, batch).item() for batch in held_out]
    return sum(weight.numel() for weight in weights), sum(losses) / len(losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--num-types", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 4e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = load_dataset("json", data_files=args.data, split="train")["text"][:]
    kept = max(1, len(texts) // 10)
    batches, held_out = batches_of(texts[:-kept], tokenizer), batches_of(texts[-kept:], tokenizer)

    selector = PlopSelector(model, batches[:8])
    every, chosen = list(selector.scores()), selector.get_best_targets(num_types=args.num_types)
    layers = dict(model.named_modules())
    size = {name: layers[name].in_features + layers[name].out_features for name in every}
    rank = max(1, args.rank * sum(size.values()) // sum(size[name] for name in chosen))
    for label, targets, r in (("PLoP", chosen, rank), ("all linear", every, args.rank)):
        for rate in args.rates:
            count, loss = train(model, targets, r, rate, args.steps, batches, held_out)
            print(f"{label:10}  rank {r:3}  {count:,} parameters  rate {rate:g}  held-out loss {loss:.4f}")


if __name__ == "__main__":
    main()
