"""A Hugging Face model with `accelerate` and its FSDP plugin: prepare the model and its optimizer, then make it private.

    torchrun --standalone --nproc-per-node=2 scripts/examples/accelerate_fsdp.py --fsdp-version 2

Needs a GPU for each rank: without, accelerate leaves the model whole, and `make_private` refuses it.

The rows come from the engine's loader and are not prepared: it splits every draw over the ranks itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import GPT2Config, GPT2LMHeadModel

from fsdp_dp import PrivacyConfig, PrivacyEngine, make_private, per_sample_cross_entropy

VOCABULARY, LENGTH = 64, 16


def dataset(rows: int) -> list[torch.Tensor]:
    """Token ids, ``[LENGTH]`` a row: sequences that count up, from anywhere."""
    starts = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(0))
    return list((starts + torch.arange(LENGTH)) % VOCABULARY)


def plugin(version: int) -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=version,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        use_orig_params=True if version == 1 else None,
    )


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**size, **dropout, bos_token_id=0, eos_token_id=0))


def train(
    accelerator: Accelerator,
    privacy: PrivacyConfig,
    make_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    learning_rate: float = 1e-3,
) -> tuple[torch.nn.Module, PrivacyEngine]:
    model = make_model()
    optimizer = make_optimizer(model.parameters(), lr=learning_rate)
    model, optimizer = accelerator.prepare(model, optimizer)
    engine = make_private(model, privacy, optimizer)
    rows = dataset(privacy.dataset_size)
    for logical_batch in engine.loader(rows, microbatch_size=16):
        for ids in logical_batch:
            ids = ids.to(accelerator.device)
            logits = model(input_ids=ids).logits
            loss = per_sample_cross_entropy(logits[:, :-1], ids[:, 1:]).mean()
            accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return model, engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp-version", type=int, choices=(1, 2), default=2)
    privacy = PrivacyConfig(
        target_epsilon=8.0,
        target_delta=1e-4,
        max_grad_norm=1.0,
        expected_batch_size=64,
        dataset_size=512,
        steps=20,
    )
    accelerator = Accelerator(fsdp_plugin=plugin(parser.parse_args().fsdp_version))
    _, engine = train(accelerator, privacy)
    accelerator.print(f"epsilon <= {engine.epsilon():.2f} after {engine.steps} steps")


if __name__ == "__main__":
    main()
