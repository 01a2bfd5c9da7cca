"""Checkpoint files with the tensor names that each family's own code saves, made from the tensors of a backbone. Values
are noise, and heads are narrow.
"""

from collections import OrderedDict

import torch
from torch import Tensor

State = dict[str, Tensor]


def layers(prefix: str, spec: str) -> State:
    """The tensors of a Sequential: "0" is a Linear without a bias, "0b" one with a bias, "1n" a BatchNorm, "1s" a
    BatchNorm without weight and bias.
    """
    state = {}
    for item in spec.split():
        number, kind = (item, "") if item[-1].isdigit() else (item[:-1], item[-1])
        at = f"{prefix}{number}."
        if kind in ("", "b"):
            state[at + "weight"] = torch.randn(4, 4)
        if kind in ("b", "n"):
            state |= {at + "bias": torch.randn(4)}
        if kind == "n":
            state |= {at + "weight": torch.randn(4)}
        if kind in ("n", "s"):
            state |= {
                at + "running_mean": torch.randn(4),
                at + "running_var": torch.rand(4),
                at + "num_batches_tracked": torch.tensor(7),
            }
    return state


def below(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    """Another network with the same names, for the twin."""
    return {name: torch.randn_like(value) if value.is_floating_point() else value + 1 for name, value in state.items()}


OPTIMIZER = {"optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}


def moco_v1(net: State) -> dict:
    twin = below("module.encoder_k.", other(net) | {"fc.weight": torch.randn(4, 4), "fc.bias": torch.randn(4)})
    online = below("module.encoder_q.", net | {"fc.weight": torch.randn(4, 4), "fc.bias": torch.randn(4)})
    queue = {"module.queue": torch.randn(4, 32), "module.queue_ptr": torch.tensor([3])}
    return {"epoch": 200, "arch": "resnet50", "state_dict": OrderedDict(online | twin | queue), **OPTIMIZER}


def moco_v2(net: State) -> dict:
    state = below("module.encoder_q.", net | layers("fc.", "0b 2b")) | below(
        "module.encoder_k.", other(net) | layers("fc.", "0b 2b")
    )
    queue = {"module.queue": torch.randn(4, 32), "module.queue_ptr": torch.tensor([3])}
    return {"epoch": 200, "arch": "resnet50", "state_dict": OrderedDict(state | queue), **OPTIMIZER}


def adco(net: State) -> dict:
    file = moco_v2(net)
    del file["state_dict"]["module.queue"], file["state_dict"]["module.queue_ptr"]
    return file | {"best_acc": 0.0, "Memory_Bank": OrderedDict(W=torch.randn(4, 32), v=torch.randn(4, 32))}


def caco(net: State) -> dict:
    head = "0 1n 3 4n 6"
    state = below("module.encoder_q.", net | layers("fc.", head)) | below(
        "module.encoder_k.", other(net) | layers("fc.", head)
    )
    bank = OrderedDict(W=torch.randn(4, 32), v=torch.randn(4, 32))
    return {
        "epoch": 200,
        "arch": "resnet50",
        "state_dict": state,
        "best_acc": 0.0,
        "knn_acc": 0.0,
        "Memory_Bank": bank,
        **OPTIMIZER,
    }


def mocov3(net: State) -> dict:
    head = layers("fc.", "0 1n 3 4s")
    state = below("module.base_encoder.", net | head) | below("module.momentum_encoder.", other(net) | other(head))
    state |= layers("module.predictor.", "0 1n 3 4s") if "cls_token" in net else layers("module.predictor.", "0 1n 3")
    return {
        "epoch": 300,
        "arch": "resnet50",
        "state_dict": state,
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        **OPTIMIZER,
    }


def mocov3_vit(net: State) -> dict:
    file = mocov3(net)
    rename = {name: name.replace("encoder.fc.", "encoder.head.") for name in file["state_dict"]}
    file["state_dict"] = {rename[name]: value for name, value in file["state_dict"].items()}
    file["state_dict"] |= layers("module.base_encoder.head.", "6 7s") | layers("module.momentum_encoder.head.", "6 7s")
    return file


def simsiam(net: State) -> dict:
    state = below("module.encoder.", net | layers("fc.", "0 1n 3 4n 6b 7s")) | layers("module.predictor.", "0 1n 3b")
    return {"epoch": 100, "arch": "resnet50", "state_dict": state, **OPTIMIZER}


def swav(net: State) -> dict:
    state = below("module.", net | layers("projection_head.", "0b 1n 3b")) | {
        "module.prototypes.weight": torch.randn(30, 4)
    }
    return OrderedDict(state)


def swav_training(net: State) -> dict:
    import numpy as np

    optimizer = {"state": {}, "param_groups": [{"lr": np.float64(0.6)}]}  # the schedule of the rate is an array
    return {"epoch": 3, "state_dict": swav(net), "optimizer": optimizer}


def deepcluster(net: State) -> dict:
    state = below("module.", net | layers("projection_head.", "0b 1n 3b"))
    return OrderedDict(state | {f"module.prototypes.prototypes{i}.weight": torch.randn(30, 4) for i in range(3)})


def dino_full(net: State) -> dict:
    import argparse

    import numpy as np

    head = layers("head.mlp.", "0b 2b 4b") | {
        "head.last_layer.weight_g": torch.randn(4, 1),
        "head.last_layer.weight_v": torch.randn(4, 4),
    }
    student = below("module.", below("backbone.", net) | head)
    inside = below("backbone.", other(net)) | other(head)
    teacher = inside if "cls_token" in net else below("module.", inside)
    return {
        "student": student, "teacher": teacher, "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", lr=np.float64(1.0)),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(5e-4), "weight_decay": np.float64(0.04)}]},
        "dino_loss": {"center": torch.randn(1, 8)},
    }  # fmt: skip


def barlow_full(net: State) -> dict:
    state = below("module.", below("backbone.", net) | layers("projector.", "0 1n 3 4n 6"))
    state |= {f"module.bn.{name}": torch.randn(4) for name in ("running_mean", "running_var")} | {
        "module.bn.num_batches_tracked": torch.tensor(3)
    }
    return {"epoch": 1000, "model": state, **OPTIMIZER}


def vicreg_full(net: State) -> dict:
    return {
        "epoch": 1000,
        "model": below("module.", below("backbone.", net) | layers("projector.", "0b 1n 3b 4n 6")),
        **OPTIMIZER,
    }


def pycontrast(net: State) -> dict:
    head = layers("head.", "0b 2b")
    model = below("module.", below("encoder.", net) | head | layers("head_jig.fc1.", "0b"))
    ema = below("module.", below("encoder.", other(net)) | other(head))
    return {"model": model, "contrast": {"memory": torch.randn(32, 4)}, "model_ema": ema, "epoch": 200, **OPTIMIZER}


def cmc_moco(net: State) -> dict:
    import argparse

    model = below("encoder.module.", net | {"fc.weight": torch.randn(4, 4), "fc.bias": torch.randn(4)})
    ema = below("encoder.module.", other(net) | {"fc.weight": torch.randn(4, 4), "fc.bias": torch.randn(4)})
    return {
        "opt": argparse.Namespace(alpha=0.9),
        "model": model,
        "contrast": {"memory": torch.randn(32, 4)},
        "model_ema": ema,
        "epoch": 1,
        **OPTIMIZER,
    }


def instdisc(net: State) -> dict:
    state = below("module.", net | {"fc.weight": torch.randn(4, 4), "fc.bias": torch.randn(4)})
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, **OPTIMIZER}


CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def children(net: State) -> State:
    return {".".join([CHILDREN[name.split(".")[0]], *name.split(".")[1:]]): value for name, value in net.items()}


def sela_training(net: State) -> dict:
    state = below("features.", children(net)) | {
        f"top_layer{i}.{part}": torch.randn(4) for i in range(3) for part in ("weight", "bias")
    }
    return {"epoch": 3, "arch": "resnetv2", "state_dict": state, "L": torch.arange(7), **OPTIMIZER}


def sela_released(net: State) -> dict:
    return {
        "state_dict": net | {"fc.weight": torch.randn(30, 4), "fc.bias": torch.randn(30)},
        "labels": torch.arange(7),
    }


def vissl(net: State) -> dict:
    heads = layers("0.clf.", "0b 2b") | {"0.prototypes0.weight": torch.randn(30, 4)}
    model = {"trunk": below("_feature_blocks.", net), "heads": heads}
    inner = {
        "base_model": {"model": model, "meta": {}},
        "loss": {"momentum_teacher.trunk._feature_blocks.conv1.weight": torch.randn(2)},
    }
    return {
        "phase_idx": 3,
        "iteration": 5,
        "train_phase_idx": 3,
        "loss": {},
        "classy_state_dict": inner,
        "type": "consolidated",
    }


def vissl_converted(net: State) -> dict:
    return {"model_state_dict": below("_feature_blocks.", net)}


def simclr2(net: State) -> dict:
    names = {"conv": "net.{}", "bn": "net.{}.0"}
    state = {}
    for name, value in net.items():
        part = name.split(".")
        if part[0] in ("conv1", "bn1"):
            state[{"conv1": "net.0.0.", "bn1": "net.0.1.0."}[part[0]] + part[-1]] = value
        elif part[2] == "downsample":
            state[
                f"net.{part[0][-1]}.blocks.{part[1]}.projection." + {"0": "shortcut.", "1": "bn.0."}[part[3]] + part[-1]
            ] = value
        else:
            kind, number = part[2][:-1], int(part[2][-1])
            at = names[kind].format(2 * (number - 1) + (kind == "bn"))
            state[f"net.{part[0][-1]}.blocks.{part[1]}.{at}.{part[-1]}"] = value
    return {
        "resnet": state | {"fc.weight": torch.randn(1000, 4), "fc.bias": torch.randn(1000)},
        "head": layers("layers.", "0 1n 3 4n 6 7n"),
    }


LIGHTNING = {
    "epoch": 3,
    "global_step": 9,
    "pytorch-lightning_version": "2.1.0",
    "loops": {},
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}


def lightly_byol(net: State) -> dict:
    """A file of lightly's ImageNet benchmarks."""
    head = layers("layers.", "0 1n 3b")
    state = (
        below("backbone.", net)
        | below("teacher_backbone.", other(net))
        | below("projection_head.", head)
        | below("prediction_head.", other(head))
    )
    state |= below("teacher_projection_head.", other(head))
    state |= {
        "online_classifier.classification_head.weight": torch.randn(10, 4),
        "online_classifier.classification_head.bias": torch.randn(10),
    }
    return {**LIGHTNING, "state_dict": state}


def lightly_dino(net: State) -> dict:
    """A file of lightly's ImageNet benchmarks, in which `backbone` belongs to the teacher."""
    head = layers("layers.", "0b 2b 4b") | {
        "last_layer.weight_g": torch.randn(4, 1),
        "last_layer.weight_v": torch.randn(4, 4),
    }
    state = (
        below("student_backbone.", net)
        | below("backbone.", other(net))
        | below("projection_head.", head)
        | below("student_projection_head.", other(head))
    )
    return {**LIGHTNING, "state_dict": state | {"criterion.center": torch.randn(1, 1, 4)}}


def lightly_moco_example(net: State) -> dict:
    """A file of lightly's examples, whose backbone is a Sequential of a ResNet's children."""
    head = layers("layers.", "0b 2b")
    state = below("backbone.", children(net)) | below("backbone_momentum.", children(other(net)))
    return {
        **LIGHTNING,
        "state_dict": state | below("projection_head.", head) | below("projection_head_momentum.", other(head)),
    }


def solo_moco(net: State) -> dict:
    head = layers("projector.", "0b 2b")
    state = below("backbone.", net) | below("momentum_backbone.", other(net)) | head | below("momentum_", other(head))
    state |= {
        "classifier.weight": torch.randn(10, 4),
        "classifier.bias": torch.randn(10),
        "queue": torch.randn(2, 4, 32),
        "queue_ptr": torch.tensor([0]),
    }
    return {**LIGHTNING, "state_dict": state}


def solo_barlow_old(net: State) -> dict:
    state = (
        below("encoder.", net)
        | layers("projector.", "0b 1n 3b 4n 6b")
        | {
            "classifier.weight": torch.randn(10, 4),
            "classifier.bias": torch.randn(10),
        }
    )
    return {**LIGHTNING, "state_dict": state}


def stable_pretraining(net: State) -> dict:
    state = (
        below("backbone.student.", net)
        | below("backbone.teacher.", other(net))
        | {"backbone.ema_coefficient": torch.tensor(0.9)}
    )
    state |= (
        layers("projector.student.", "0b 1n 3b")
        | layers("projector.teacher.", "0b 1n 3b")
        | {"callbacks_modules.probe.weight": torch.randn(3, 4)}
    )
    return {**LIGHTNING, "state_dict": state}


def mmselfsup(net: State) -> dict:
    return {"meta": {}, "state_dict": below("backbone.", net) | layers("neck.mlp.", "0b 2b") | layers("head.fc.", "0b")}


def bare(net: State) -> dict:
    return dict(net)


def torchvision_training(net: State) -> dict:
    import argparse

    averaged = below("module.", other(net)) | {"n_averaged": torch.tensor(3)}
    return {
        "model": net,
        "model_ema": averaged,
        "args": argparse.Namespace(model="resnet50"),
        "epoch": 9,
        "lr_scheduler": {},
        **OPTIMIZER,
    }


def timm_training(net: State) -> dict:
    return {"epoch": 9, "arch": "resnet50", "state_dict": net, "state_dict_ema": other(net), "version": 2, **OPTIMIZER}
