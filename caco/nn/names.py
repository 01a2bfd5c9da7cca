"""Translates the tensor names of other libraries into those of torchvision and timm, which caco uses. Each function
takes the state of a whole network, a dict of tensors by name.

Not here: the decision which file has which names (formats.py)."""

import re
from collections.abc import Callable

import torch
from torch import Tensor


def dinov2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's names as timm's. In timm the blocks have a single number, the layers of SwiGLU are called fc1 and fc2,
    and registers have no position embedding.
    """
    named = {}
    for name, tensor in state.items():
        name = re.sub(r"(?<![^.])blocks\.\d+\.(?=\d+\.)", "blocks.", name)
        name = name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        named[name] = tensor
    for prefix in ("", "backbone."):
        if f"{prefix}register_tokens" in named:
            place = named[f"{prefix}pos_embed"]
            named[f"{prefix}reg_token"] = named.pop(f"{prefix}register_tokens")
            named[f"{prefix}cls_token"] = named[f"{prefix}cls_token"] + place[:, :1]
            named[f"{prefix}pos_embed"] = place[:, 1:]
    return named


def simclr2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of SimCLR v2 (without selective kernels) in Separius' conversion, as torchvision's."""
    inner = {"projection.shortcut": "downsample.0", "projection.bn.0": "downsample.1"}
    inner |= {f"net.{2 * j}": f"conv{j + 1}" for j in range(3)} | {f"net.{2 * j + 1}.0": f"bn{j + 1}" for j in range(3)}
    named = {}
    for name, tensor in state.items():
        if block := re.fullmatch(r"net\.(\d)\.blocks\.(\d+)\.(.+)\.(\w+)", name):
            name = f"layer{block[1]}.{block[2]}.{inner.get(block[3], f'unknown.{block[3]}')}.{block[4]}"
        else:
            name = re.sub(r"^net\.0\.0\.", "conv1.", re.sub(r"^net\.0\.1\.0\.", "bn1.", name))
        named[name] = tensor
    return named


CHILDREN = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}  # from the number of a child in a Sequential of a ResNet's children to the child's name


def children(state: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    """torchvision's names for a ResNet that was saved as a Sequential of its children, which gives these numbers for
    names.

    Args:
        state: tensors by name.
        beginning: a regular expression of what comes before the numbers; other names stay as they are.
    """
    pattern = re.compile(rf"^((?:{beginning})\.)([014567])\.")
    return {
        pattern.sub(lambda found: f"{found[1]}{CHILDREN[found[2]]}.", name): tensor for name, tensor in state.items()
    }


def transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of Hugging Face's ResNet, ViT and Dinov2 as timm's."""
    state = {re.sub(r"^(?:resnet|vit|dinov2|timm_model)\.", "", name): tensor for name, tensor in state.items()}
    parts: dict[str, dict[str, Tensor]] = {}
    named = {}
    for name, tensor in state.items():
        if found := re.fullmatch(r"(encoder\.layer\.\d+\.)attention\.attention\.(query|key|value)\.(\w+)", name):
            parts.setdefault(f"{found[1]}attn.qkv.{found[3]}", {})[found[2]] = tensor
        else:
            named[name] = tensor
    named |= {
        name: torch.cat([three[part] for part in ("query", "key", "value")])
        for name, three in parts.items()
        if len(three) == 3
    }

    def layer(found: re.Match[str]) -> str:
        return f"layer{int(found[1]) + 1}.{found[2]}."

    table: dict[str, str | Callable[[re.Match[str]], str]] = {
        r"^embedder\.embedder\.convolution\.": "conv1.", r"^embedder\.embedder\.normalization\.": "bn1.",
        r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.": layer,
        r"\blayer\.(\d)\.convolution\.": lambda f: f"conv{int(f[1]) + 1}.",
        r"\blayer\.(\d)\.normalization\.": lambda f: f"bn{int(f[1]) + 1}.",
        r"\bshortcut\.convolution\.": "downsample.0.",
        r"\bshortcut\.normalization\.": "downsample.1.", r"^embeddings\.position_embeddings$": "pos_embed",
        r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.", r"^embeddings\.": "",
        r"^encoder\.layer\.": "blocks.",
        r"\blayernorm_before\.": "norm1.", r"\blayernorm_after\.": "norm2.",
        r"\battention\.output\.dense\.": "attn.proj.",
        r"\bintermediate\.dense\.": "mlp.fc1.", r"\boutput\.dense\.": "mlp.fc2.", r"^layernorm\.": "norm.",
        r"\blayer_scale(\d)\.lambda1$": r"ls\1.gamma", r"\bmlp\.weights_in\.": "mlp.fc1.",
        r"\bmlp\.weights_out\.": "mlp.fc2.",
    }  # fmt: skip
    for theirs, ours in table.items():
        named = {re.sub(theirs, ours, name): tensor for name, tensor in named.items()}
    return named
